"""What does GRPO add? Equal wall time after the same SFT: GRPO, more SFT, the encoder alone.

    python -m benchmarks.second_phase --seeds=3 --seconds=70 --out=runs/second_phase.json

Per seed: the SFT phase of configs/tiny.py once, then from its end three arms, each given the same
seconds of training (compilation and evaluation excluded; the step count that fits is measured
with the first seed, so that every arm finishes its cosine): `grpo` as configured; `sft` continued, same objective
with a fresh cosine; `encoder`, trained by MSE on texts sampled from the frozen decoder.
"""

import dataclasses
import pathlib
import statistics
import time

import jax
import numpy as np
from absl import app, flags

from configs import tiny
from lens import build, data, losses, metrics, objectives, optimizer, sampling, sharding
from lens.evaluate import Evaluator
from lens.models.encoder import encode
from lens.models.subject import tile_rows
from lens.state import init_lens, init_state
from lens.train import train_step

SEEDS = flags.DEFINE_integer('seeds', 3, 'Number of seeds.')
SECONDS = flags.DEFINE_float('seconds', 70.0, 'Training seconds of the second phase.')
OUT = flags.DEFINE_string('out', 'runs/second_phase.json', 'Where the figures are written.')

SFT_AGAIN_RATE = 7e-4  # peak of the continued SFT: half of the first one's
CALIBRATION_STEPS = 15
NAMES = (
    'fve',
    'fve_greedy',
    'fve_given',
    'facts_recall_sampled',
    'facts_hallucinated_sampled',
    'facts_recall',
    'facts_hallucinated',
)


def encoder_only(lens, base, batch, key, hp):
    """Encoder MSE on texts sampled from the decoder as it is."""
    a = objectives.read_activations(base, batch, hp.layer)
    ids = sampling.sample(jax.lax.stop_gradient(lens.decoder), base, a, key, length=hp.length, group=hp.group).ids_NxT
    a = tile_rows(a, hp.group)
    pred = encode(lens.encoder, base, ids)
    mse = losses.normalised_mse(pred, a)
    return mse, {'loss_encoder': mse, 'fve': losses.fve(pred, a)}


class Arm:
    """One objective with its batches."""

    def __init__(self, cfg, run, block, objective, seed):
        self.run, self.block, self.objective = run, block, objective
        phase = run.phases[1 if objective is not objectives.sft else 0]
        self.phase = dataclasses.replace(phase, objective=objective)
        self.batches = data.train_batches(
            run.train,
            documents=block.documents,
            vectors=block.vectors,
            min_pos=run.min_pos,
            labelled=self.phase.labelled,
            seed=seed,
        )
        self.key = jax.random.key(seed)

    def train(self, params, steps):
        """(params, seconds) after `steps` steps with a full cosine; the first two are not timed."""
        settings = build.from_block(optimizer.OptimizerConfig, self.block)
        tx = optimizer.make(dataclasses.replace(settings, steps=steps))
        state = init_state(
            jax.tree.map(lambda x: x.copy(), params), dataclasses.replace(self.phase, tx=tx), self.run.mesh
        )
        for i in range(steps):
            if i == 2:
                jax.block_until_ready(state)
                begin = time.monotonic()
            rows = next(self.batches)
            rows.pop('doc_id')
            state, _ = train_step(
                state,
                self.run.base,
                sharding.put_batch(rows, self.run.mesh),
                self.key,
                objective=self.objective,
                hparams=self.phase.hparams,
                tx=tx,
            )
        jax.block_until_ready(state)
        return state.params, time.monotonic() - begin

    def steps_in(self, params, seconds):
        _, spent = self.train(params, CALIBRATION_STEPS)
        return round(seconds / spent * (CALIBRATION_STEPS - 2))


def one_seed(seed: int, steps: dict[str, int]) -> dict:
    """Figures of every arm; `steps` remembers the step counts that fit, measured with the first seed."""
    cfg = tiny.get_config()
    cfg.seed = seed
    run = build.open_run(cfg)
    again, encoder = cfg.sft.copy_and_resolve_references(), cfg.grpo.copy_and_resolve_references()
    again.learning_rate_decoder = again.learning_rate_encoder = SFT_AGAIN_RATE
    out = {}
    with jax.set_mesh(run.mesh):
        evaluator = Evaluator(run)

        def record(name, params, steps, seconds):
            values = evaluator.full(params).values()
            out[name] = {k: values[k] for k in NAMES} | {'steps': steps, 'seconds': seconds}
            print(f'seed {seed}  {name:9} ' + '  '.join(f'{k} {v:.3f}' for k, v in out[name].items()), flush=True)

        first = Arm(cfg, run, cfg.sft, objectives.sft, seed)
        params, sft_s = first.train(init_lens(cfg, run), cfg.sft.steps)
        record('start', params, cfg.sft.steps, sft_s)
        arms = {
            'grpo': Arm(cfg, run, cfg.grpo, objectives.grpo, seed + 100),
            'sft': Arm(cfg, run, again, objectives.sft, seed + 100),
            'encoder': Arm(cfg, run, encoder, encoder_only, seed + 100),
        }
        for name, arm in arms.items():
            if name not in steps:
                steps[name] = arm.steps_in(params, SECONDS.value)
            trained, seconds = arm.train(params, steps[name])
            record(name, trained, steps[name], seconds)
    return out


def main(_):
    steps = {}
    seeds = [one_seed(seed, steps) for seed in range(SEEDS.value)]
    print('\n| arm | steps | ' + ' | '.join(NAMES) + ' |\n' + '|---' * (len(NAMES) + 2) + '|')
    for arm in seeds[0]:
        cells = [
            f'{np.mean([s[arm][k] for s in seeds]):.3f} ± {statistics.pstdev([s[arm][k] for s in seeds]):.3f}'
            for k in NAMES
        ]
        print(f'| {arm} | {round(np.mean([s[arm]["steps"] for s in seeds]))} | ' + ' | '.join(cells) + ' |')
    path = pathlib.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_json(path, {'seconds': SECONDS.value, 'seeds': seeds} | metrics.provenance())
    print(f'Figures: {path}')


if __name__ == '__main__':
    app.run(main)
