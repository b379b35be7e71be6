"""What each objective teaches in the same time: SFT, GRPO, Gumbel, the NLA recipe, and maps on a frozen base.

    python -m benchmarks.recipes --seconds=120 --seeds=0 --out=runs/recipes
    python -m benchmarks.recipes --config=smollm2 --seconds=720 --trial=4 --documents=100

start      the `sft` recipe of the configuration, for --warm of the seconds
sft, grpo, gumbel   from there, its last phase, that objective, for the rest
nla        the NLA recipe, from nothing, for all of them
maps       the `sft` recipe with maps and read-out alone, from nothing, for all of them

Seconds are those of training steps: compilation, evaluation and checkpoints do not count. A short run of each first measures
its step times; they become steps, in the proportion that the configuration gives its phases, warm-ups shrink with them, and
every schedule runs to its end. So figures do not depend on what else the machine does later. The steps are kept in
OUT/steps.json: what was killed goes on, and another process can run other seeds beside (`taskset -c 1 …`, each on a core
of its own).
Figures: those of each run, OUT/ARM_SEED/evaluation.json, and the table printed last.
"""

import importlib
import pathlib
import re
from typing import NamedTuple

import numpy as np
from absl import app, flags

from lens import files
from lens.optimizer import SIDES
from lens.train import train

CONFIG = flags.DEFINE_string('config', 'tiny', 'Module of configs/ whose recipes run.')
SECONDS = flags.DEFINE_float('seconds', 120.0, 'Seconds of training steps of every recipe.')
WARM = flags.DEFINE_float('warm', 0.6, 'Share of the start.')
TRIAL = flags.DEFINE_integer('trial', 25, 'Steps of each phase that are timed.')
SEEDS = flags.DEFINE_multi_integer('seeds', [0], 'Seeds of weights, batches and samples.')
DOCUMENTS = flags.DEFINE_integer('documents', 300, 'Held-out documents of the figures.')
OUT = flags.DEFINE_string('out', 'runs/recipes', 'Folder of the runs.')
FVE = ('fve', 'fve_greedy', 'fve_given', 'fve_shuffled')
FACTS = ('facts_recall', 'facts_hallucinated', 'grounded', 'invented', 'topic_recall', 'next_match')
BEYOND = ('fve_beyond_greedy', 'fve_beyond_given', 'fve_beyond_shuffled')
WARMUP = re.compile(r'warmup (\d+)s')


class Arm(NamedTuple):
    """recipe: argument of the configuration. start: whether it goes on from there, with its last phase alone. train: of
    decoder and encoder, if not as the configuration says."""

    recipe: str
    start: bool = False
    train: str = ''


START = {'start': Arm('sft')}
ARMS = {
    'sft': Arm('sft', start=True),
    'grpo': Arm('grpo', start=True),
    'gumbel': Arm('gumbel', start=True),
    'nla': Arm('nla'),
    'maps': Arm('sft', train='maps'),
}


def configured(arm: Arm, seed: int, steps: dict[str, int] | None = None):
    """Returns the configuration of an arm. steps: by phase, if not as it says."""
    cfg = importlib.import_module(f'configs.{CONFIG.value}').get_config(arm.recipe)
    cfg.seed, cfg.log.every = seed, '1s'
    cfg.eval.every, cfg.eval.reading, cfg.eval.documents = '0', 0, DOCUMENTS.value
    if arm.train:
        cfg.decoder.train = cfg.encoder.train = arm.train
    if arm.start:
        cfg.phases = cfg.phases[-1:]
        cfg.init_from = f'{OUT.value}/start_{seed}'
    for name, count in (steps or {}).items():
        share, cfg[name].steps = count / cfg[name].steps, count
        for key in (f'learning_rate_{side}' for side in SIDES):
            cfg[name][key] = WARMUP.sub(
                lambda m, share=share: f'warmup {max(1, round(int(m[1]) * share))}s', cfg[name][key]
            )
    return cfg


def step_times(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the median seconds of a step by phase, those that compile left out."""
    rows = [r for r in files.read_jsonl(workdir / 'metrics.jsonl') if r.get('step_s')]
    names = dict.fromkeys(r['phase'] for r in rows)
    return {n: float(np.median([r['step_s'] for r in rows if r['phase'] == n])) for n in names}


def timed_steps(out: pathlib.Path) -> dict[str, dict[str, int]]:
    """Times a few steps of every arm and returns how many of each phase fill its seconds, by arm."""
    times, found = {}, {}
    for name, arm in (START | ARMS).items():
        cfg, timed = configured(arm, SEEDS.value[0]), (arm.recipe, arm.train)
        own = {n: int(cfg[n].steps) for n in cfg.phases}
        if timed not in times:
            short = configured(arm._replace(start=False), SEEDS.value[0], dict.fromkeys(own, TRIAL.value))
            short.phases, short.eval.documents, short.eval.quick_documents = cfg.phases, 4, 4
            train(short, out / f'{name}_trial')
            times[timed] = step_times(out / f'{name}_trial')
        seconds = SECONDS.value * (1 - WARM.value if arm.start else WARM.value if name in START else 1)
        factor = seconds / sum(times[timed][n] * own[n] for n in own)
        found[name] = {n: max(1, round(factor * own[n])) for n in own}
        told = {n: round(times[timed][n], 3) for n in own}
        print(f'{name}: {told} s a step, steps {found[name]}', flush=True)
    return found


def main(_):
    out = pathlib.Path(OUT.value)
    plan = out / 'steps.json'
    if not plan.exists():
        files.write_json(plan, timed_steps(out))
    steps, rows = files.read_json(plan, 'delete it to time them again'), []
    for seed in SEEDS.value:
        for name, arm in (START | ARMS).items():
            workdir = out / f'{name}_{seed}'
            if not (workdir / 'summary.json').exists():
                train(configured(arm, seed, steps[name]), workdir)
            rows.append((name, seed, steps[name], files.read_json(workdir / 'summary.json', 'delete the folder')))
    beyond = f'fve_beyond_{configured(START["start"], 0).encoder.context_tokens}'
    names = [n for n in (*FVE, beyond, *BEYOND, *FACTS) if any(n in figures for *_, figures in rows)]
    print('| recipe | seed | steps | ' + ' | '.join(names) + ' |\n' + '|---' * (3 + len(names)) + '|')
    for name, seed, counts, figures in rows:
        numbers = ' | '.join(f'{figures[n]:.3f}' if n in figures else '' for n in names)
        print(f'| {name} | {seed} | {" + ".join(f"{n} {k}" for n, k in counts.items())} | {numbers} |')
    print(f'Runs: {out}')


if __name__ == '__main__':
    app.run(main)
