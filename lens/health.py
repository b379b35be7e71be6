"""Health of a run: where its seconds go, whether its words collapse, memory, a window for the profiler."""

import collections
import contextlib
import pathlib
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax

from lens.distributed import is_first
from lens.errors import LensError

PARTS = ('start', 'compile', 'data', 'step', 'evaluation', 'checkpoint', 'log')
ACTIONS = ('off', 'warn', 'stop')  # what a collapse does
WINDOW = 20  # steps: the mean of fewer is noise where a step draws some dozens of texts


class CollapseError(LensError):
    """The words of the decoder have collapsed; nothing was saved after the last checkpoint."""


class Goodput:
    """A clock with named parts: start (imports, loading, restoring), compile (the first step of a phase), data,
    step, evaluation, checkpoint, log. A step counts until its figures are there: waiting for them is part of it.

    before: `seconds` of an earlier process, as they stood at the checkpoint that this one goes on from. lost_s:
    what it worked after that checkpoint, all of it for nothing. The time between the processes is nobody's.
    """

    def __init__(self, before: Mapping[str, float] | None = None, lost_s: float = 0.0, now=time.monotonic):
        self._done = dict.fromkeys((*PARTS, 'lost', 'other'), 0.0) | dict(before or {})
        self._done['lost'] += lost_s
        self._now, self._begin = now, now()
        self._wall_before_s = sum(self._done.values())
        self._open: tuple[str, float] | None = None

    @contextlib.contextmanager
    def part(self, name: str):
        """What happens inside counts as `name`. Parts do not nest: a second would have two names."""
        if name not in PARTS:
            raise ValueError(f'{name!r} is none of {", ".join(PARTS)}')
        if self._open:
            raise RuntimeError(f'part {name!r} begins inside part {self._open[0]!r}')
        self._open = name, self._now()
        try:
            yield
        finally:
            self._done[name] += self._now() - self._open[1]
            self._open = None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every part, also of the one that is open, of what was lost, and other: together the wall time."""
        now, out = self._now(), dict(self._done)
        if self._open:
            out[self._open[0]] += now - self._open[1]
        named_s = sum(out.values()) - out['other']
        return out | {'other': max(0.0, self._wall_before_s + now - self._begin - named_s)}

    @property
    def goodput(self) -> float:
        """Seconds in steps that count over wall seconds, 0..1."""
        seconds = self.seconds
        return seconds['step'] / max(sum(seconds.values()), 1e-9)


def lost_seconds(rows: Sequence[Mapping], step: int) -> float:
    """What a killed run worked after `step`, from all the rows of its metrics.jsonl, to the precision of its log."""
    kept = [r['wall_s'] for r in rows if r['step'] <= step]
    return rows[-1]['wall_s'] - (kept[-1] if kept else 0.0) if rows else 0.0


class Rule(NamedTuple):
    """A sign of collapse. holds(now, first): means of the last WINDOW steps and of the first WINDOW of the phase."""

    metric: str
    holds: Callable[[float, float], bool]
    text: str


# Absolute where the figure means the same in every run, relative to the start of the phase where lengths, prompts
# and vocabularies decide. Healthy runs stay far away: entropy falls to 60-70% of its start, texts keep their length.
RULES = (
    # rewards are of order 1; below this their differences are the rounding of bfloat16 activations
    Rule(
        'reward_group_std',
        lambda now, first: now < 1e-4,
        'the rewards within a group differ by {now:.1e}: nothing tells good texts from bad ones',
    ),
    # 0.05 nats: about one word in a hundred is not the likeliest; a low start alone (a well fitted SFT) is no collapse
    Rule(
        'entropy_nats',
        lambda now, first: now < min(0.05 * first, 0.05),
        'the entropy has fallen from {first:.3g} to {now:.3g} nats per token: the decoder has stopped exploring',
    ),
    Rule(
        'text_len',
        lambda now, first: now < 0.3 * first,
        'the explanations have shrunk from {first:.3g} to {now:.3g} tokens',
    ),
    Rule('extracted', lambda now, first: now == 0, 'no response holds an explanation'),
    # short confident texts repeat within a group in healthy runs too, hence the condition on the start
    Rule(
        'repeated',
        lambda now, first: now > 0.5 and first < 0.25,
        'the share of texts that repeat another has risen from {first:.0%} to {now:.0%}',
    ),
)


class Collapse:
    """Watches the texts of phases that learn from their own samples (grpo, gumbel). RULES are asked at every step
    about the means of the last WINDOW steps. A rule that begins to hold gives one warning, and the next one after it
    has not held for more than WINDOW steps. With action 'stop', a rule that has held for WINDOW further steps, so that
    it is true of two windows without a common step, raises CollapseError.
    """

    def __init__(self, action: str):
        if action not in ACTIONS:
            raise LensError(f'{action!r} is no answer to a collapse: use one of {", ".join(ACTIONS)}.')
        self.action = action
        self._begin('')

    def _begin(self, phase: str) -> None:
        self._phase = phase
        self._recent = {r.metric: collections.deque(maxlen=WINDOW) for r in RULES}
        self._first: dict[str, float] = {}  # means of the first window
        self._held = collections.Counter()  # steps since a rule began to hold
        self._quiet = collections.Counter()  # and since it last held; both by metric, absent where there is no alarm

    def feed(self, phase: str, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The figures of one step of `phase`; a new name starts afresh. Metrics without a rule are passed over, rules
        without their metric do not apply. Returns the new warnings, one sentence each."""
        if self.action == 'off':
            return []
        if phase != self._phase:
            self._begin(phase)
        warnings = []
        for rule in RULES:
            recent, value = self._recent[rule.metric], metrics.get(rule.metric)
            # without any explanation there is no length: that has a rule of its own
            if value is None or (rule.metric == 'text_len' and metrics.get('extracted') == 0):
                continue
            recent.append(float(value))
            if len(recent) < WINDOW:
                continue
            now = statistics.fmean(recent)
            first = self._first.setdefault(rule.metric, now)
            begins = self._count(rule.metric, rule.holds(now, first))
            what = f'{rule.text.format(now=now, first=first)} (phase {phase}, means of {WINDOW} steps)'
            if begins:
                warnings.append(f'Collapse at step {step}: {what}.')
            if self.action == 'stop' and self._held[rule.metric] > WINDOW:
                raise CollapseError(
                    f'Stopped at step {step}: {what}; lower the learning rate of the decoder '
                    f'({phase}.learning_rate_decoder), raise {phase}.beta or {phase}.entropy_weight, and start in '
                    'another --workdir.'
                )
        return warnings

    def _count(self, metric: str, holds: bool) -> bool:
        """Updates the counters of a rule; whether an alarm begins."""
        if holds:
            begins = metric not in self._quiet
            self._held[metric] += 1
            self._quiet[metric] = 0
            return begins
        self._held[metric] = 0
        if metric in self._quiet:
            self._quiet[metric] += 1
            if self._quiet[metric] > WINDOW:  # one step that differs is in WINDOW means
                del self._quiet[metric]
        return False

    def get_state(self) -> dict:
        """For a checkpoint, as JSON: a run that goes on from it warns and stops where an uninterrupted one does."""
        return {
            'phase': self._phase,
            'recent': {k: list(v) for k, v in self._recent.items()},
            'first': dict(self._first),
            'held': dict(self._held),
            'quiet': dict(self._quiet),
        }

    def set_state(self, state: dict) -> None:
        self._begin(state['phase'])
        for k, values in state['recent'].items():
            self._recent[k].extend(values)
        self._first = dict(state['first'])
        self._held.update(state['held'])
        self._quiet.update(state['quiet'])


def peak_memory_gb() -> float:
    """The most memory in use at any time so far, in 1e9 bytes: of the fullest local device where the backend counts
    it, else of this process (resident, mapped files included)."""
    stats = (d.memory_stats() or {} for d in jax.local_devices())
    peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss
    return (max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) / 1e9


class Profile:
    """One trace of the steps start..start+count-1 of this process, counted from 1; count 0: none.

    The trace lies in workdir/profile and holds these steps alone: the devices are idle when it begins and ends.
    Process 0 traces its own devices.
    """

    def __init__(self, start: int, count: int, workdir: pathlib.Path, say: Callable[[str], None] = print):
        self._start, self._count, self._say = start, count, say
        self.folder = pathlib.Path(workdir) / 'profile'
        self._before: int | None = None  # the last step before this process
        self._first = 0  # step at which an open trace began, else 0
        self._last = 0

    @classmethod
    def parse(cls, text: str, workdir: pathlib.Path, say: Callable[[str], None] = print) -> 'Profile':
        """Of --profile=START:COUNT; the empty text is no window. Raises LensError."""
        if not text:
            return cls(0, 0, workdir, say)
        match = re.fullmatch(r'([1-9]\d*):([1-9]\d*)', text, re.ASCII)
        if not match:
            raise LensError(
                f'--profile={text} is not START:COUNT: give two whole numbers from 1 on, e.g. --profile=10:5 for the '
                'steps 10 to 14 of this process.'
            )
        return cls(int(match[1]), int(match[2]), workdir, say)

    def at(self, step: int) -> bool:
        """Call before `step` of the run is dispatched. Whether the window has just ended."""
        if self._before is None:
            self._before = step - 1
        here = step - self._before
        ended = self._count > 0 and here == self._start + self._count
        if ended:
            self.close()
        if here == self._start and self._count and is_first():
            _wait_for_devices()
            jax.profiler.start_trace(str(self.folder))
            self._first = step
        self._last = step
        return ended

    def close(self) -> None:
        """Ends an open trace: the run may end, or fail, inside the window."""
        if self._first:
            _wait_for_devices()
            jax.profiler.stop_trace()
            self._say(f'Profile of steps {self._first} to {self._last}: tensorboard --logdir={self.folder}')
            self._first = 0


def _wait_for_devices() -> None:
    """Until all whose results are still held is done."""
    jax.block_until_ready([x for x in jax.live_arrays() if not x.is_deleted()])
