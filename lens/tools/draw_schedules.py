"""Draws every learning rate, weight and temperature of a configuration over its micro-steps.

python -m lens.tools.draw_schedules --config=configs/tiny.py --out=schedules.png
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from lens import commands

    commands.draw_schedules()

import pathlib

import numpy as np

from lens import data, keys, objectives, optimizer, schedules
from lens.errors import LensError
from lens.schedules import Units

VALUES = (*(f'learning_rate_{side}' for side in optimizer.SIDES), *objectives.KNOBS)  # keys of a phase


def unfrozen(cfg, name: str, side: str, clock: Units) -> dict[tuple[float, int], list[str]]:
    """Returns (multiplier, first micro-step) -> regexes of the rows of a phase's table that may match `side`."""
    (other,), out = set(optimizer.SIDES) - {side}, {}
    for row in optimizer.parse_table(cfg[name].table, clock, f'{name}.table'):
        if row.multiplier is not None and (side in row.pattern or other not in row.pattern):
            out.setdefault((row.multiplier, row.unfreeze), []).append(row.pattern)
    return out


def curves(cfg, name: str, key: str, clock: Units) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns micro-steps, and label -> values: of a learning rate one curve for each multiplier and unfreeze time."""
    steps = np.unique(np.linspace(0, clock.total - 1, 2000).astype(np.int32))
    schedule = schedules.parse(cfg[name][key], clock, f'{name}.{key}')
    ys = np.broadcast_to(schedule(steps), steps.shape)
    _, is_rate, side = key.partition('learning_rate_')
    if not is_rate:
        return steps, {'': ys}
    labelled = {}
    for (multiplier, first), patterns in unfrozen(cfg, name, side, clock).items():
        more = f' and {len(patterns) - 1} more' if patterns[1:] else ''
        labelled[f'x {multiplier:g} from {first} on: {patterns[-1]}{more}'] = np.where(
            steps >= first, multiplier * ys, 0
        )
    return steps, labelled


def draw(cfg, documents: int | None, out: pathlib.Path) -> None:
    """Writes a PNG: a column for every phase, a row for every value that is not zero everywhere.

    documents: of the training split, None where no duration may count epochs. Raises LensError.
    """
    from matplotlib.figure import Figure  # takes a second

    phases = list(zip(cfg.phases, schedules.clocks(cfg, documents), strict=True))
    if not phases:
        raise LensError('phases is empty: there is nothing to draw.')
    shown = [v for v in VALUES if any(schedules.parse(cfg[n][v], c, f'{n}.{v}') for n, c in phases)]
    figure = Figure(figsize=(1 + 5 * len(phases), 1 + 1.9 * len(shown)), layout='constrained')
    figure.suptitle('Zero throughout: ' + (', '.join(v for v in VALUES if v not in shown) or 'none'), fontsize=8)
    panels = figure.subplots(len(shown), len(phases), squeeze=False)
    for column, (name, clock) in enumerate(phases):
        for axes, key in zip(panels[:, column], shown, strict=True):
            steps, labelled = curves(cfg, name, key, clock)
            for label, ys in labelled.items():
                axes.plot(steps, ys, label=label)
            if all(labelled):
                axes.legend(fontsize=6)
            axes.set_title(f'{name}.{key} = {cfg[name][key]}', fontsize=8, wrap=True)
            axes.set_xlim(0, clock.total)
            axes.grid(alpha=0.3)
        panels[-1, column].set_xlabel(f'micro-step of {name} ({clock.accumulation} to an optimizer step)', fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, format='png')


def count_documents(cfg) -> int | None:
    """Returns the training documents that may be read; None where no data is there."""
    if not (pathlib.Path(cfg.data.path) / 'train').exists():
        return None
    split = data.open_split(cfg.data.path, 'train', vocab_size=2**31)
    return len(data.readable(split, cfg.data.positions, cfg.data.min_pos))


def main(config, out: str) -> None:
    keys.check(config)
    draw(config, count_documents(config), pathlib.Path(out))
    print(f'Schedules of {", ".join(config.phases)}: {out}')
