"""The recipes of configs/tiny.py at equal wall time: which second phase is worth its seconds?

    python -m benchmarks.recipes --seconds=120 --seeds=1 --out=runs/recipes

Every recipe gets the same seconds of training steps (compilation, evaluation and checkpoints excluded). A short
run of each measures its step times; then the steps of its phases are set so that the first phase fills
--warm of the seconds and the second one the rest, and every schedule runs to its end. One machine, one
recipe after the other: an honest ratio needs an idle one. Figures: OUT/recipes.json and the table printed last.
"""

import pathlib

import numpy as np
from absl import app, flags

from configs import base, tiny
from lens import files
from lens.train import train

SECONDS = flags.DEFINE_float('seconds', 120.0, 'Seconds of training steps of every recipe.')
WARM = flags.DEFINE_float('warm', 0.6, 'Share of the first of two phases.')
SEEDS = flags.DEFINE_integer('seeds', 1, 'Number of seeds.')
OUT = flags.DEFINE_string('out', 'runs/recipes', 'Folder for the runs and recipes.json.')
RECIPES = ('sft', 'grpo', 'gumbel', 'nla')
TRIAL_STEPS = 25
NAMES = ('fve', 'fve_greedy', 'fve_direction', 'fve_given', 'fve_shuffled', 'facts_recall', 'facts_hallucinated')


def run(recipe: str, seed: int, steps: dict[str, int], workdir: pathlib.Path) -> dict:
    """Trains and returns the summary."""
    cfg = tiny.get_config(recipe)
    cfg.seed = seed
    cfg.eval.every = '0'
    cfg.log.every = '1s'
    for name in cfg.phases:
        cfg[name].steps = steps[name]
    if 'gumbel' in cfg.phases:
        cfg.gumbel.table = base.table(encoder_unfreeze=f'{steps["gumbel"] // 3}s')
    return train(cfg, workdir)


def step_times(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the median seconds of a step by phase, the first steps, which compile, left out."""
    rows = [r for r in files.read_jsonl(workdir / 'metrics.jsonl') if r['kind'] == 'train']
    names = dict.fromkeys(r['phase'] for r in rows)
    return {n: float(np.median([r['step_s'] for r in rows if r['phase'] == n][5:])) for n in names}


def main(_):
    out, results, plans = pathlib.Path(OUT.value), [], {}
    for recipe in RECIPES:  # all measured before the first long run, under the same conditions
        run(recipe, 0, dict.fromkeys(tiny.get_config(recipe).phases, TRIAL_STEPS), out / f'{recipe}_trial')
        times = step_times(out / f'{recipe}_trial')
        shares = (1.0,) if len(times) == 1 else (WARM.value, 1 - WARM.value)
        plans[recipe] = {n: round(SECONDS.value * share / times[n]) for n, share in zip(times, shares, strict=True)}
        print(f'{recipe}: {times}, steps {plans[recipe]}', flush=True)
    for recipe, steps in plans.items():
        for seed in range(SEEDS.value):
            workdir = out / f'{recipe}_{seed}'
            summary = run(recipe, seed, steps, workdir)
            spent = sum(step_times(workdir)[n] * steps[n] for n in steps)
            row = {'recipe': recipe, 'seed': seed, 'steps': steps, 'seconds': round(spent, 1)}
            results.append(row | {k: summary[k] for k in NAMES if k in summary})
            files.write_json(out / 'recipes.json', results)
    print('| recipe | seed | steps | s | ' + ' | '.join(NAMES) + ' |\n' + '|---' * (4 + len(NAMES)) + '|')
    for r in results:
        figures = ' | '.join(f'{r[n]:.3f}' if n in r else '' for n in NAMES)
        steps = ' + '.join(f'{n} {k}' for n, k in r['steps'].items())
        print(f'| {r["recipe"]} | {r["seed"]} | {steps} | {r["seconds"]:.0f} | {figures} |')
    print(f'Figures: {out}/recipes.json')


if __name__ == '__main__':
    app.run(main)
