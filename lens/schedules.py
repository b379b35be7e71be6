"""When things happen and how values change: one notation for durations, intervals and schedules.

A duration is an int or a string: 600, "600s", "600steps" (micro-steps), "100os" (optimizer steps), "5e",
"0.5e", "5epochs" (passes over the training documents), "-1" (the whole phase), "0" (off), None (never).
A value is a number or "KIND START END" with clauses in any order, each D a duration:

    constant V, linear START END, cosine START END
    warmup D    linear from 1e-7 START to START, before everything else
    after D     START held that long, then the decay
    over D      length of the decay; without it what remains of the phase

The end value is reached exactly at the last optimizer step of the decay. Values are made on the host and are arguments
of a step: no schedule compiles a program of its own. Drawn by lens/tools/draw_schedules.py.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax

from lens.errors import LARGEST_FLOAT, LARGEST_INT, LensError, shown

WARMUP_START = 1e-7  # of the value that the warm-up leads to
UNITS = {'': 1, 's': 1, 'steps': 1, 'os': 'accumulation', 'e': 'steps_per_epoch', 'epochs': 'steps_per_epoch'}
CLAUSES = {'constant': ('warmup',), 'linear': ('warmup', 'after', 'over'), 'cosine': ('warmup', 'after', 'over')}
DURATION_FORMS = (
    '600, "600s" or "600steps", "100os", "5e", "0.5e" or "5epochs", "-1" (the whole phase), "0" (off), None'
)
VALUE_FORMS = (
    'a number, "constant 1", "linear 1 0.1" or "cosine 1 0.1", with "warmup 20s", and on a decay "after 200s", '
    '"over 1000s"'
)
BLOCK = 1024  # micro-steps whose values are made at once
NO_MESH = jax.sharding.Mesh(np.empty((), object), ())  # the devices of a mesh may be no more than planned


@dataclasses.dataclass(frozen=True)
class Units:
    """What the units of one phase are worth in micro-steps (one batch, one gradient each).

    accumulation: of an optimizer step. steps_per_epoch: of a pass over the training documents, None where
    the data is not known. total: of the phase, None while that is what is asked.
    """

    accumulation: int = 1
    steps_per_epoch: int | None = None
    total: int | None = None


def duration(value, clock: Units, key: str) -> int | None:
    """Returns the micro-steps of a duration; 0 is off, None never. Raises LensError naming `key`."""
    if value is None:
        return None
    given = f'{key}={shown(repr(value))}'
    found = re.fullmatch(r'([0-9]+)(s|steps|os|)|([0-9]+(?:\.[0-9]+)?)(e|epochs)|(-1)', str(value).strip())
    if isinstance(value, bool) or not found:
        raise LensError(f'{given} is not a duration; accepted: {DURATION_FORMS}.')
    if found[5]:
        if clock.total is None:
            raise LensError(f'{given} has no phase to fill: give a length, e.g. "1000s" or "5e".')
        return clock.total
    count, unit = float(found[1] or found[3]), UNITS[found[2] or found[4] or '']
    scale = getattr(clock, unit) if isinstance(unit, str) else unit
    if scale is None:
        raise LensError(f'{given} counts epochs, but the data is not known here: give steps, e.g. "1000s".')
    if count * scale > LARGEST_INT:
        raise LensError(f'{given} is longer than {LARGEST_INT} micro-steps.')
    return max(round(count * scale), 1) if count else 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A value by micro-step of the phase. False where it is zero everywhere: its term is off then."""

    start: float
    end: float
    curve: optax.Schedule

    def __call__(self, step) -> np.ndarray:
        """Returns the values at an int or an array of ints, float32."""
        if np.ndim(step):
            with jax.set_mesh(NO_MESH):
                return np.asarray(self.curve(np.asarray(step)) + np.zeros(np.shape(step)), np.float32)
        return _block(self, step // BLOCK)[step % BLOCK]

    def __bool__(self) -> bool:
        return self.start != 0 or self.end != 0


@functools.lru_cache(maxsize=64)
def _block(schedule: Schedule, index: int) -> np.ndarray:
    return schedule(np.arange(index * BLOCK, (index + 1) * BLOCK))


def constant(value: float) -> Schedule:
    return Schedule(float(value), float(value), optax.constant_schedule(float(value)))


def parse(value, clock: Units, key: str) -> Schedule:
    """Returns the Schedule of a number or string in the notation. Raises LensError naming `key`."""

    def refuse(problem: str):
        raise LensError(f'{key}={shown(repr(value))} {problem}; accepted: {VALUE_FORMS}; durations: {DURATION_FORMS}.')

    words = str(value).split()
    if isinstance(value, bool) or not words:
        refuse('is not a value')
    if _number(words[0]) is not None:
        words = ['constant', *words]
    kind, count = words[0], 1 if words[0] == 'constant' else 2
    ends = [_number(w) for w in words[1 : 1 + count]]
    if kind not in CLAUSES or len(ends) < count or None in ends or len(words[1 + count :]) % 2:
        refuse('is not a value')
    clauses = {}
    for name, word in zip(words[1 + count :: 2], words[2 + count :: 2], strict=True):
        if name not in CLAUSES[kind] or name in clauses:
            refuse(f'has a clause {shown(repr(name))} that {kind} does not take, or takes once')
        if (name, word) != ('over', '-1'):  # what remains, as without the clause
            clauses[name] = duration(word, clock, f'{key}: {name}')
    start, end = ends[0], ends[-1]
    warmup = clauses.get('warmup', 0)
    curve = optax.constant_schedule(start) if kind == 'constant' else _decay(kind, start, end, warmup, clauses, clock)
    if warmup:
        rise = optax.linear_schedule(WARMUP_START * start, start, warmup)
        curve = optax.join_schedules([rise, curve], [warmup])
    return Schedule(start, end, curve)


def _decay(kind: str, start: float, end: float, warmup: int, clauses: dict, clock: Units) -> optax.Schedule:
    """Of micro-steps counted from the end of the warm-up."""
    after = clauses.get('after', 0)
    first = warmup + after
    stop = first + (clauses.get('over') or max(clock.total - first, 1))
    last = max((-(-stop // clock.accumulation) - 1) * clock.accumulation, first)
    if last == first:
        fall = optax.constant_schedule(end)
    elif kind == 'linear':
        fall = optax.linear_schedule(start, end, last - first)
    else:
        unit = optax.cosine_decay_schedule(1.0, last - first)

        def fall(step):
            return end + (start - end) * unit(step)

    return optax.join_schedules([optax.constant_schedule(start), fall], [after]) if after else fall


def _number(word: str) -> float | None:
    try:
        x = float(word)
    except ValueError:
        return None
    return x if abs(x) <= LARGEST_FLOAT else None  # NaN is not


def clocks(cfg, documents: int | None) -> tuple[Units, ...]:
    """Returns the clock of every phase of a configuration in order.

    documents: of the training split that may be read, None where the data is not known. A phase has whole optimizer
    steps: its length is rounded up to them. Raises LensError.
    """
    out = []
    for name in cfg.phases:
        p = cfg[name]
        clock = Units(p.accumulate, documents and -(-documents // p.documents))
        steps = duration(p.steps, clock, f'{name}.steps')
        if not steps:
            raise LensError(f'{name}.steps={p.steps} must be positive; drop the phase from phases instead.')
        out.append(dataclasses.replace(clock, total=-(-steps // p.accumulate) * p.accumulate))
    if sum(clock.total for clock in out) > LARGEST_INT:
        raise LensError(f'{", ".join(f"{n}.steps" for n in cfg.phases)} make more than {LARGEST_INT} micro-steps.')
    return tuple(out)
