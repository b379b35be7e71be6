"""Where the time of a training step goes, phase by phase of a recipe.

    python -m benchmarks.step_parts --config=configs/tiny.py

The step is one program after the reading, and the host cannot look inside: its beginnings are run as programs of their own. read: the
activations; sample: the rollout (nothing more for sft; gumbel samples inside its loss); score: the losses and their
gradients; update: the whole step. Nothing is donated, so the trained parameters and optimizer state need their room
twice. For single operations trace a run with --profile: the parts of a step are named scopes there.
"""

import time
from collections.abc import Callable, Mapping

import jax
from absl import flags
from ml_collections import config_flags

from benchmarks.timing import in_turn
from lens import cli, config, feed, sharding
from lens.lens_init import init_lens
from lens.objectives import gradient
from lens.rollout import read
from lens.train import init_state, micro_step

REPEATS = 3


def split_step(prefixes: Mapping[str, Callable[[], object]], now: Callable[[], float] = time.perf_counter) -> dict:
    """Returns the seconds of every part, which add up to those of the step.

    prefixes: by the name of its last part, a program that runs the step up to the end of that part, the whole step
    last. Each runs once to compile and REPEATS times in turn with the others; medians count. A beginning cannot take
    longer than what it is the beginning of: where noise says so, the shorter time stands and the part is 0.
    """
    for program in prefixes.values():
        jax.block_until_ready(program())
    ends = list(in_turn(prefixes, REPEATS, now).values())
    for i in reversed(range(len(ends) - 1)):
        ends[i] = min(ends[i], ends[i + 1])
    return dict(zip(prefixes, (b - a for a, b in zip([0.0, *ends], ends, strict=False)), strict=True))


def step_prefixes(state, base, batch, key, phase: config.Phase) -> dict[str, Callable[[], object]]:
    """Makes the beginnings of train_step, for split_step, on one batch."""
    hp, objective, knobs = phase.hparams, phase.objective, phase.knobs(0)

    def sample(state, base, batch, key):
        roll = read(base, batch, **phase.reading)
        return objective.rollout(state.params, base, roll, jax.random.fold_in(key, state.step), hp)

    def score(state, base, batch, key):
        roll, params = sample(state, base, batch, key), state.params
        key = jax.random.fold_in(key, state.step)
        for _ in range(hp.updates):
            grads, _ = gradient(objective, params, base, roll, key, hp, knobs, state.reference)
            # for the next round: equal parameters would let the compiler do the work once
            params = jax.tree.map(lambda p, g: (p - 1e-12 * g).astype(p.dtype), params, grads)
        return grads

    def update(state, base, batch, key):
        return micro_step(phase, state, base, batch, key, knobs)

    def bound(program):
        jitted = jax.jit(program)
        return lambda: jitted(state, base, batch, key)

    programs = {'read': lambda state, base, batch, key: read(base, batch, **phase.reading)}
    return {k: bound(f) for k, f in (programs | {'sample': sample, 'score': score, 'update': update}).items()}


def main(_):
    cfg = CONFIG.value
    run = config.load(cfg, config.plan(cfg))
    with jax.set_mesh(run.mesh):
        for phase in run.phases:
            shape = {'documents': phase.documents, 'vectors': phase.vectors, 'labelled': phase.labelled}
            rows = next(feed.train_batches(run.train, min_pos=run.min_pos, seed=run.seed, **shape))
            del rows['doc_id']
            batch = sharding.put_batch(rows, run.mesh, phase.documents)
            state = init_state(init_lens(cfg, run), phase, run.mesh, phase.start)
            parts = split_step(step_prefixes(state, run.base, batch, jax.random.key(run.seed), phase))
            text = '  '.join(f'{k} {v:.4f} s' for k, v in parts.items())
            print(f'{phase.name:8} {text}  step {sum(parts.values()):.4f} s')


if __name__ == '__main__':
    CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe, e.g. configs/tiny.py.')
    flags.mark_flag_as_required('config')
    cli.run(main)
