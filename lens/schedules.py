"""When things happen and how values change: one notation for durations, intervals and schedules.

A duration is an int or a string: 600, "600s", "600steps" (micro-steps), "100os" (optimizer steps), "5e",
"0.5e", "5epochs" (passes over the training documents), "-1" (the whole phase), "0" (off), None (never).
A value is a number or "KIND START END" with clauses in any order, each D a duration:

    warmup D    linear from 1e-7 START to START, before everything else
    after D     START held that long, then the decay
    over D      length of the decay; without it what remains of the phase
    power P     of polynomial;    every D, growing K    cycles of restarts, each K times as long as the one before

The end value is reached exactly at the last optimizer step of the decay.

    python -m lens.schedules --config=configs/tiny.py --out=schedules.png     # draws all of a configuration
"""

import dataclasses
import math
import pathlib
import re

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from lens import cli
from lens.errors import LensError

WARMUP_START = 1e-7  # of the value that the warm-up leads to
UNITS = {'': 1, 's': 1, 'steps': 1, 'os': 'accumulation', 'e': 'steps_per_epoch', 'epochs': 'steps_per_epoch'}
CLAUSES = {  # kind -> its clauses
    'constant': ('warmup',),
    'linear': ('warmup', 'after', 'over'),
    'cosine': ('warmup', 'after', 'over'),
    'exponential': ('warmup', 'after', 'over'),
    'polynomial': ('warmup', 'after', 'over', 'power'),
    'restarts': ('warmup', 'after', 'every', 'growing'),
}
NUMBERS = ('power', 'growing')  # clauses that take a number; the others take a duration
DURATION_FORMS = (
    '600, "600s" or "600steps", "100os", "5e", "0.5e" or "5epochs", "-1" (the whole phase), "0" (off), None'
)
VALUE_FORMS = (
    'a number, "constant 1", "linear 1 0.1", "cosine 1 0.1", "exponential 1 0.1", "polynomial 1 0.1 power 2" or '
    '"restarts 1 0.1 every 200s growing 2", with "warmup 20s", and on a decay "after 200s", "over 1000s"'
)
VALUES = (  # keys of a phase that hold a value
    'learning_rate_decoder',
    'learning_rate_encoder',
    'tau',
    'mse_weight',
    'kl_weight',
    'lm_weight',
    'beta',
    'entropy_weight',
    'entropy_clamp',
)


class ScheduleError(LensError):
    """A duration or a value is not in the notation; the message names the key and the accepted forms."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """What the units of one phase are worth in micro-steps (one batch, one gradient each).

    accumulation: of an optimizer step. steps_per_epoch: of a pass over the training documents, None where
    the data is not known. total: of the phase, None while that is what is asked.
    """

    accumulation: int = 1
    steps_per_epoch: int | None = None
    total: int | None = None


def duration(value, clock: Clock, key: str) -> int | None:
    """Micro-steps of a duration; 0 is off, None never. Raises ScheduleError naming `key`."""
    if value is None:
        return None
    found = re.fullmatch(r'(\d+)(s|steps|os|)|(\d+(?:\.\d+)?)(e|epochs)|(-1)', str(value).strip())
    if isinstance(value, bool) or not found:
        raise ScheduleError(f'{key}={value!r} is not a duration; accepted: {DURATION_FORMS}.')
    if found[5]:
        if clock.total is None:
            raise ScheduleError(f'{key}={value!r} has no phase to fill: give a length, e.g. "1000s" or "5e".')
        return clock.total
    count, unit = float(found[1] or found[3]), UNITS[found[2] or found[4] or '']
    scale = getattr(clock, unit) if isinstance(unit, str) else unit
    if scale is None:
        raise ScheduleError(f'{key}={value!r} counts epochs, but the data is not known here: give steps, e.g. "1000s".')
    return max(round(count * scale), 1) if count else 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A value by micro-step of the phase: int or traced int32 -> float32 scalar. Hashable, a static argument of jit.

    warmup: end of the warm-up. decays: (first, last) micro-step of the decay, of each cycle for restarts: start
    at first, end at last.
    """

    kind: str
    start: float
    end: float
    warmup: int = 0
    decays: tuple[tuple[int, int], ...] = ()
    power: float = 1.0

    def __call__(self, step) -> jax.Array:
        t = jnp.asarray(step, jnp.int32)
        value = jnp.float32(self.start)
        if self.decays:
            first, last = jnp.asarray(self.decays, jnp.int32).T
            cycle = jnp.maximum(jnp.searchsorted(first, t, side='right') - 1, 0)
            first, last = first[cycle], last[cycle]
            u = jnp.clip((t - first) / jnp.maximum(last - first, 1), 0, 1)
            value = jnp.where(t < first, value, jnp.where(t >= last, jnp.float32(self.end), self._between(u)))
        if self.warmup:
            rising = self.start * (WARMUP_START + (1 - WARMUP_START) * (t / self.warmup))
            value = jnp.where(t < self.warmup, rising, value)
        return value.astype(jnp.float32)

    def _between(self, u):
        """The value at the fraction u of a decay."""
        s, e = self.start, self.end
        if self.kind == 'linear':
            return s + u * (e - s)
        if self.kind == 'exponential':
            return s * (e / s) ** u
        if self.kind == 'polynomial':
            return e + (s - e) * (1 - u) ** self.power
        return e + 0.5 * (s - e) * (1 + jnp.cos(jnp.pi * u))

    @property
    def always_zero(self) -> bool:
        """Whether a term with this weight is off everywhere."""
        return self.start == 0 and (not self.decays or self.end == 0)

    def __bool__(self) -> bool:
        return not self.always_zero

    def __float__(self) -> float:
        if self.warmup or (self.decays and self.end != self.start):
            raise TypeError(f'{self} is not constant: call it with a micro-step')
        return self.start


def constant(value: float) -> Schedule:
    return Schedule('constant', float(value), float(value))


def parse(value, clock: Clock, key: str) -> Schedule:
    """The Schedule of a number or string in the notation. Raises ScheduleError naming `key`."""
    words = str(value).split()
    if isinstance(value, bool) or not words:
        raise _bad(value, key, 'is not a value')
    if _number(words[0]) is not None:
        words = ['constant', *words]
    kind, count = words[0], 1 if words[0] == 'constant' else 2
    ends = [_number(w) for w in words[1 : 1 + count]]
    if kind not in CLAUSES or len(ends) < count or None in ends or len(words[1 + count :]) % 2:
        raise _bad(value, key, 'is not a value')
    clauses = {}
    for name, word in zip(words[1 + count :: 2], words[2 + count :: 2], strict=True):
        if name not in CLAUSES[kind] or name in clauses:
            raise _bad(value, key, f'has a clause {name!r} that {kind} does not take, or takes once')
        if (name, word) == ('over', '-1'):
            continue  # what remains, as without the clause
        clauses[name] = _number(word) if name in NUMBERS else duration(word, clock, f'{key}: {name}')
        if clauses[name] is None:
            raise _bad(value, key, f'has a {name!r} that is not a number')
    start, end = ends[0], ends[-1]
    if kind == 'exponential' and start * end <= 0:
        raise _bad(value, key, 'goes through zero, which an exponential cannot')
    if clauses.get('power', 1) <= 0 or clauses.get('growing', 1) < 1:
        raise _bad(value, key, 'needs power above 0 and growing of at least 1')
    if kind == 'restarts' and not clauses.get('every'):
        raise _bad(value, key, 'needs the length of the first cycle, e.g. "every 200s"')
    warmup = clauses.get('warmup', 0)
    first = warmup + clauses.get('after', 0)
    decays = () if kind == 'constant' else _decays(first, clauses, clock)
    return Schedule(kind, start, end, warmup, decays, clauses.get('power', 1.0))


def _decays(first: int, clauses: dict, clock: Clock) -> tuple[tuple[int, int], ...]:
    """(first, last) micro-step of every decay from micro-step `first` of the phase on."""
    length = clauses.get('every') or clauses.get('over') or max(clock.total - first, 1)
    spans = []
    while not spans or ('every' in clauses and first < clock.total):
        steps_before_end = -(-(first + length) // clock.accumulation) - 1
        spans.append((first, max(steps_before_end * clock.accumulation, first)))
        first, length = first + length, round(length * clauses.get('growing', 1))
    return tuple(spans)


def _number(word: str) -> float | None:
    try:
        x = float(word)
    except ValueError:
        return None
    return x if math.isfinite(x) else None


def _bad(value, key: str, problem: str) -> ScheduleError:
    return ScheduleError(f'{key}={value!r} {problem}; accepted: {VALUE_FORMS}; durations: {DURATION_FORMS}.')


def clocks(cfg, documents: int | None) -> tuple[Clock, ...]:
    """The clock of every phase of a configuration in order. documents: of the training split that may be read, None
    where the data is not known. A phase has whole optimizer steps: its length is rounded up to them."""
    out = []
    for name in cfg.phases:
        p = cfg[name]
        if isinstance(p.accumulate, bool) or not isinstance(p.accumulate, int) or p.accumulate < 1:
            raise ScheduleError(f'{name}.accumulate={p.accumulate!r} is not a number of micro-batches, 1 or more.')
        clock = Clock(p.accumulate, documents and -(-documents // p.documents))
        steps = duration(p.steps, clock, f'{name}.steps')
        if not steps:
            raise ScheduleError(f'{name}.steps={p.steps} must be positive; drop the phase from phases instead.')
        steps = -(-steps // p.accumulate) * p.accumulate
        out.append(dataclasses.replace(clock, total=steps))
    return tuple(out)


def _rates(cfg, name: str, side: str, clock: Clock) -> dict[tuple[float, int], list[str]]:
    """(multiplier, first micro-step) -> regexes of the table's rows that may match leaves of `side`."""
    other = {'decoder': 'encoder', 'encoder': 'decoder'}[side]
    out = {}
    for pattern, multiplier, *rest in cfg[name].table:
        first = duration(rest[-1], clock, f'{name}.table: {pattern}') if rest else None
        if multiplier is not None and first is not None and (side in pattern or other not in pattern):
            out.setdefault((multiplier, first), []).append(pattern)
    return out


def _curves(cfg, name: str, value: str, schedule: Schedule, clock: Clock) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Micro-steps, and label -> values: of a learning rate one curve for every multiplier and unfreeze time."""
    steps = jnp.unique(jnp.linspace(0, clock.total - 1, 2000).astype(jnp.int32))
    ys = jax.vmap(schedule)(steps)
    if not value.startswith('learning_rate_'):
        return steps, {'': ys}
    rates = _rates(cfg, name, value.removeprefix('learning_rate_'), clock)
    return steps, {
        f'x {multiplier:g} from {first} on: {patterns[-1]}'
        + (f' and {len(patterns) - 1} more' if patterns[1:] else ''): jnp.where(steps >= first, multiplier * ys, 0)
        for (multiplier, first), patterns in rates.items()
    }


def draw(cfg, documents: int | None, out: pathlib.Path) -> None:
    """Writes a PNG: a column for every phase, a row for every value that is not zero everywhere; x axis in
    micro-steps of the phase."""
    from matplotlib.figure import Figure  # takes a second

    phases = list(zip(cfg.phases, clocks(cfg, documents), strict=True))
    if not phases:
        raise LensError('phases is empty: there is nothing to draw.')
    parsed = {(name, v): parse(cfg[name][v], clock, f'{name}.{v}') for name, clock in phases for v in VALUES}
    shown = [v for v in VALUES if any(parsed[name, v] for name, _ in phases)]
    figure = Figure(figsize=(1 + 5 * len(phases), 1 + 1.9 * len(shown)), layout='constrained')
    figure.suptitle('Zero throughout: ' + (', '.join(v for v in VALUES if v not in shown) or 'none'), fontsize=8)
    panels = figure.subplots(len(shown), len(phases), squeeze=False)
    for column, (name, clock) in enumerate(phases):
        for axes, value in zip(panels[:, column], shown, strict=True):
            steps, curves = _curves(cfg, name, value, parsed[name, value], clock)
            for label, ys in curves.items():
                axes.plot(steps, ys, label=label)
            if all(curves):
                axes.legend(fontsize=6)
            axes.set_title(f'{name}.{value} = {cfg[name][value]}', fontsize=8, wrap=True)
            axes.set_xlim(0, clock.total)
            axes.grid(alpha=0.3)
        panels[-1, column].set_xlabel(f'micro-step of {name} ({clock.accumulation} to an optimizer step)', fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, format='png')


def _count_documents(cfg) -> int | None:
    """Training documents that may be read; None where no data is there."""
    from lens import data

    if not (pathlib.Path(cfg.data.path) / 'train').exists():
        return None
    split = data.open_split(cfg.data.path, 'train', vocab_size=2**31)
    return len(data.readable(split, cfg.data.positions, cfg.data.min_pos))


def main(_):
    out = pathlib.Path(OUT.value)
    draw(CONFIG.value, _count_documents(CONFIG.value), out)
    print(f'Schedules of {", ".join(CONFIG.value.phases)}: {out}')


if __name__ == '__main__':
    CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe; override keys with --config.a.b=value.')
    OUT = flags.DEFINE_string('out', 'schedules.png', 'PNG file that is written.')
    flags.mark_flag_as_required('config')
    cli.run(main)
