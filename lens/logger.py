"""What a run says of itself: metrics.jsonl (source of truth), TensorBoard, wandb, the console, one clock, a trace."""

import collections
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lens import feed, files, flops, metrics, sharding
from lens.collapse import Collapse
from lens.config import Phase, Run, fires
from lens.distributed import is_first
from lens.errors import LensError, shown
from lens.models import moe

PARTS = ('start', 'compile', 'data', 'step', 'evaluation', 'checkpoint', 'log')
SILENCE_S = 60.0  # most of it, where there is no bar
SAID = ('fve', 'fve_greedy', 'facts_recall', 'facts_hallucinated')  # said of every held-out check


class Lines:
    """Appends JSON objects to a file, one a line, after `rows`; it ends with a whole line at any time.

    While the disk is full lines wait in memory; say(sentence) tells the user.
    """

    def __init__(self, path: pathlib.Path, rows: list[dict], say: Callable[[str], None]):
        files.write_jsonl(path, rows)
        self._file, self._say = path.open('ab', buffering=0), say
        self._waiting: list[str] = []  # lines that are not in the file yet

    def write(self, row: dict) -> None:
        self._waiting.append(json.dumps(row) + '\n')
        reason = self._flush()
        if reason and len(self._waiting) == 1:
            name = self._file.name
            self._say(f'warning: {name} cannot be written ({reason}); its lines wait in memory: free some disk.')

    def _flush(self) -> str | None:
        """Puts the lines that wait into the file, all or none; returns why it could not."""
        end, rest = self._file.seek(0, os.SEEK_END), ''.join(self._waiting).encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as e:
            self._file.truncate(end)
            return e.strerror
        self._waiting = []
        return None

    def close(self) -> None:
        if self._flush():
            self._say(f'warning: {self._file.name} lacks the last {len(self._waiting)} lines: the disk is full.')
        self._file.close()


class Clock:
    """Seconds of a run over restarts: of its named parts, of recent steps, and of the whole.

    start: from `began` to go_on; compile: steps of a width that is new in a phase; a step lasts until its figures are
    there. lost: what killed processes worked after the checkpoint that was gone on from. The time between processes is
    nobody's.
    """

    def __init__(self, began: float, now: Callable[[], float] = time.monotonic):
        self._now, self._began = now, began
        self._done = dict.fromkeys((*PARTS, 'lost'), 0.0)
        self._open: tuple[str, float] | None = ('start', began)
        self._phase, self._last = '', None  # of the last step, and when it ended
        self._steps: collections.deque[tuple[float, float]] = collections.deque(maxlen=50)  # seconds, FLOPs

    def go_on(self, rows: list[dict], step: int) -> None:
        """Ends `start` and adds what the rows of metrics.jsonl say of earlier processes; all that came after `step`, of
        the checkpoint that this one goes on from, was worked for nothing."""
        kept = [r for r in rows if r['step'] <= step]
        wall_s = kept[-1]['wall_s'] if kept else 0.0
        before = next((r for r in reversed(kept) if r['kind'] == 'time'), {})
        self._done['start'] = self._now() - self._began
        self._done['lost'] = rows[-1]['wall_s'] - wall_s if rows else 0.0
        for name in self._done:
            self._done[name] += before.get(f'{name}_part_s', 0.0)
        self._began, self._open = self._began - wall_s, None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside as `name`. Parts do not nest: a second would have two names."""
        if self._open:
            raise RuntimeError(f'part {name!r} begins inside part {self._open[0]!r}')
        self._open = name, self._now()
        try:
            yield
        finally:
            self._done[name] += self._now() - self._open[1]
            self._open = None

    @property
    def wall_s(self) -> float:
        """Returns the seconds of the run so far without those lost."""
        return self._now() - self._began

    @property
    def seconds(self) -> dict[str, float]:
        """Returns the seconds of every part, the open one too, of what was lost, and other: together all there were."""
        out = dict(self._done)
        if self._open:
            out[self._open[0]] += self._now() - self._open[1]
        return out | {'other': max(0.0, self.wall_s - sum(out.values()) + out['lost'])}

    @property
    def goodput(self) -> float:
        """Returns the seconds in steps that count over all seconds, 0..1."""
        seconds = self.seconds
        return seconds['step'] / max(sum(seconds.values()), 1e-9)

    def lap(self, phase: str, work: float = 0.0) -> float:
        """Ends a step of `phase`, of `work` FLOPs; returns the median seconds of its recent ones, 0.0 before the first
        full step."""
        if phase != self._phase:
            self._phase, self._last = phase, None
            self._steps.clear()
        now = self._now()
        if self._last is not None:
            self._steps.append((now - self._last, work))
        self._last = now
        return statistics.median(s for s, _ in self._steps) if self._steps else 0.0

    @property
    def flops_s(self) -> float:
        """Returns FLOP/s over the recent steps, which may be of different sizes; 0.0 before the first full step."""
        seconds, work = map(sum, zip((0.0, 0.0), *self._steps, strict=True))
        return work / seconds if seconds else 0.0

    def pause(self) -> None:
        """Says that what happens until the next lap is no step."""
        self._last = None


class Logger(contextlib.ExitStack):
    """Writes and says what one process of a run does; the first process alone writes and speaks.

    began: time.monotonic() of when this process began. Nothing is written before open(). Set by the loop:
    last_good() gives the step of the newest checkpoint or None.
    """

    def __init__(self, cfg, run: Run, workdir: pathlib.Path, began: float, now: Callable[[], float] = time.monotonic):
        super().__init__()  # what is opened is closed at the end
        self.cfg, self.run, self.workdir = cfg, run, pathlib.Path(workdir)
        self.clock, self.watch = Clock(began, now), Collapse(cfg.health.collapse)
        self.part = self.clock.part
        self.last_good: Callable[[], int | None] = lambda: None
        self.console = Console(quiet=not is_first())
        columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[text]}')
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task, self._said_s = self._bar.add_task('', total=run.steps, text=''), 0.0
        self._pending: tuple | None = None
        self._checked: set[int] = set()  # steps whose full held-out figures are written
        self._lines = self._tensorboard = self._wandb = None

    def open(self, step: int, collapse: dict | None) -> None:
        """Starts the log of a run that goes on from `step` (0: fresh), where the watch had the state `collapse`; lines
        of later steps, from before, are dropped."""
        if collapse:
            self.watch.set_state(collapse)
        path = self.workdir / 'metrics.jsonl'
        rows = files.read_metrics(path, self.say, keep=True) if is_first() else []
        self.clock.go_on(rows, step)
        self._bar.start()
        self.callback(self._bar.stop)
        if is_first():
            self._checked = {r['step'] for r in rows if r.get('full') and r['step'] <= step}
            self._lines = Lines(path, [r for r in rows if r['step'] <= step], self.say)
            self.callback(self._lines.close)
            self._open_services()
        phase = self.run.phase_of(step)
        if rows and phase:  # what was lost so far must not be forgotten when this process is killed before it saves
            self.write(step, phase, 'time', self.time())

    def _open_services(self) -> None:
        if self.cfg.log.tensorboard:
            from tensorboardX import SummaryWriter  # optional extra [tensorboard]

            self._tensorboard = SummaryWriter(str(self.workdir / 'tensorboard'))
            self.callback(self._tensorboard.close)
        if self.cfg.log.wandb_project:
            import wandb  # optional extra [wandb]

            config, here = json.loads(self.cfg.to_json()), self.workdir
            name = {'project': self.cfg.log.wandb_project, 'id': here.name, 'resume': 'allow'}
            self._wandb = wandb.init(**name, config=config, dir=str(here))
            self.callback(self._wandb.finish)

    def say(self, text: str) -> None:
        """Prints a line for the user, above the bar where there is one."""
        with contextlib.suppress(OSError):  # a log on a full disk, or a terminal that is gone, must not end the run
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def write(self, step: int, phase: Phase, kind: str, values: Mapping) -> None:
        """Writes a row of metrics.jsonl. kind: train, eval, drift or time."""
        row = {'step': step, 'phase': phase.name, 'kind': kind} | values | {'wall_s': self.clock.wall_s}
        if self._lines:
            self._lines.write(row)
        scalars = {f'{kind}/{k}': v for k, v in row.items() if isinstance(v, (int, float)) and k != 'step'}
        if self._tensorboard:
            for k, v in scalars.items():
                self._tensorboard.add_scalar(k, v, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def sent(self, phase: Phase, step: int, out: dict[str, jax.Array], work: float) -> None:
        """Takes the figures of a step that was just sent to the devices, `work` FLOPs on all of them, and settles the
        one before: one step behind, the devices always have work."""
        self.settle()
        self._pending = phase, step, out, work

    def settle(self, pause: bool = False) -> None:
        """Waits for the figures of the step that was sent last. pause: what comes now is no step.

        Raises LensError where one is not finite, or of a collapse.
        """
        pending, self._pending = self._pending, None
        if pending:
            self._settle(*pending)
        if pause:
            self.clock.pause()

    def _settle(self, phase: Phase, step: int, out: dict[str, jax.Array], work: float) -> None:
        values = {k: float(v) for k, v in sharding.fetch(out).items()}
        if bad := next((k for k, v in values.items() if not np.isfinite(v)), None):
            seed, local_step = self.run.seed + phase.start, step - phase.start - 1
            where, good = feed.batch_documents(self.run.train, phase.documents, seed, local_step), self.last_good()
            raise LensError(
                f'{bad} is not finite at step {step} (phase {phase.name}, documents {where}); the last good '
                f'checkpoint is {f"step {good}" if good else "none"} in {self.workdir}: lower the learning rates.'
            )
        if phase.objective.samples:
            for warning in self.watch.feed(phase.name, step, values):
                self.say(f'warning: {warning}')
        step_s = self.clock.lap(phase.name, work)
        if fires(phase.every.log, step) or step == phase.end:
            self.write(step, phase, 'train', values | {'step_s': step_s} | self._speed())
        self._progress(phase, step, values, step_s)

    def _speed(self) -> dict[str, float]:
        """Returns model FLOP/s of a device and their share of its peak where that is known."""
        per_s, peak = self.clock.flops_s / self.run.mesh.size, flops.peak(jax.devices()[0].device_kind)
        return ({'tflops_s': per_s / 1e12} | ({'mfu': per_s / peak} if peak else {})) if per_s else {}

    def _progress(self, phase: Phase, step: int, values: Mapping[str, float], step_s: float) -> None:
        """Moves the bar on; where there is no terminal, says a line every five lines of metrics.jsonl, and of slow steps
        every SILENCE_S."""
        names = dict(phase.objective.shows) | {'fve_beyond': 'beyond', 'loss_encoder': 'encoder loss', 'fve': 'FVE'}
        text = '  '.join(f'{text} {values[k]:.3f}' for k, text in names.items() if k in values)
        text += f'  ETA {clock(step_s * (self.run.steps - step))}'
        self._bar.update(self._task, completed=step, description=phase.name, text=text)
        due = fires(5 * (phase.every.log or 0), step) or step == self.run.steps
        if not self.console.is_terminal and (due or self.clock.wall_s - self._said_s >= SILENCE_S):
            self._said_s = self.clock.wall_s
            self.say(f'{phase.name:5} {step:6}/{self.run.steps}  {text}')

    def held_out(self, phase: Phase, step: int, values: Mapping[str, float], full: bool) -> None:
        """Writes the held-out figures, if they are not there, and says some of them."""
        if step not in self._checked:
            self.write(step, phase, 'eval', {'full': full} | values)
        said = (f'{k} {values[k]:.3f}' for k in (*metrics.headline(values), *SAID) if k in values)
        self.say(f'held out at step {step}: {"  ".join(said)}')

    def time(self) -> dict[str, float]:
        """Returns where the seconds went so far: of every part, the share of them that trained, and peak memory."""
        seconds = {f'{k}_part_s': round(v, 3) for k, v in self.clock.seconds.items()}
        return seconds | {'goodput': self.clock.goodput, 'peak_memory_gb': peak_memory_gb()}


class Profile:
    """One trace, in workdir/profile, of the steps START..START+COUNT-1 of this process, counted from 1.

    It holds these steps alone: the devices are idle when it begins and ends. Process 0 traces its own devices.
    window: 'START:COUNT', or '' for none. Raises LensError.
    """

    def __init__(self, window: str, workdir: pathlib.Path, say: Callable[[str], None]):
        match = re.fullmatch(r'([1-9]\d{0,8}):([1-9]\d{0,8})', window or '1:1', re.ASCII)
        if not match:
            raise LensError(
                f'--profile={shown(window)} is not START:COUNT: give two whole numbers from 1 on, e.g. --profile=10:5 for '
                'the steps 10 to 14 of this process.'
            )
        start, count = int(match[1]), int(match[2])
        self._window = range(start, start + count) if window and is_first() else range(0)
        self._folder, self._say = pathlib.Path(workdir) / 'profile', say
        self._here, self._traced = 0, []  # steps of this process; steps of the run in an open trace

    def at(self, step: int) -> None:
        """Begins or ends the trace where it is due; to be called before `step` of the run is sent to the devices."""
        self._here += 1
        if self._here not in self._window:
            return self.close()
        if not self._traced:
            _wait_for_devices()
            jax.profiler.start_trace(str(self._folder))
        self._traced.append(step)

    def close(self) -> None:
        """Ends an open trace: the run may end, or fail, inside the window."""
        if self._traced:
            _wait_for_devices()
            jax.profiler.stop_trace()
            first, last = self._traced[0], self._traced[-1]
            self._say(f'Profile of steps {first} to {last}: tensorboard --logdir={self._folder}')
            self._traced = []


def _wait_for_devices() -> None:
    """Waits until all is done whose results are still held."""
    jax.block_until_ready([x for x in jax.live_arrays() if not x.is_deleted()])


def peak_memory_gb() -> float:
    """Returns the most memory in use at any time so far, in 1e9 bytes: of the fullest local device where the backend
    counts it, else of this process (resident, mapped files included)."""
    stats = (d.memory_stats() or {} for d in jax.local_devices())
    peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss
    return (max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) / 1e9


def clock(seconds: float) -> str:
    """Formats seconds as m:ss or h:mm:ss."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f'{hours}:{m:02}:{s:02}' if hours else f'{m}:{s:02}'


def provenance() -> dict:
    """Returns device, versions, commit and command line: what a figure needs beside it."""
    git = ['git', '-C', pathlib.Path(__file__).parent, 'describe', '--always', '--dirty']
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ''
    versions = {p: importlib.metadata.version(p) for p in ('jax', 'flax', 'optax')}
    return {
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)',
        'versions': {'python': platform.python_version()} | versions,
        'commit': commit or 'unknown',
        'command': shlex.join(['python', *sys.orig_argv[1:]]),
    }


def announce(cfg, run: Run, sizes: dict[str, int], base_size: int, step: int) -> str:
    """Returns the first lines of a run. sizes: trained parameters of each side; step: where the run goes on, or 0."""
    c, kind = run.base.config, cfg.data.positions
    phases = ', '.join(f'{p.name} {p.end - p.start}' for p in run.phases) or 'none, evaluation only'
    mesh = ' x '.join(f'{k} {n}' for k, n in run.mesh.shape.items() if n > 1)
    rows = 'activations stored' if run.train and not run.train.width else ''
    if run.train and run.train.width:
        rows = f'read in rows of {", ".join(map(str, run.train.widths))} tokens'
    lines = [
        f'Subject {cfg.subject.path}: {c.family}, {c.n_layers} blocks, {base_size:,} parameters, read after block '
        f'{run.layer}' + f'; in the slots, after {", ".join(map(str, run.layers))}' * bool(run.layers),
        f'Trained: decoder {sizes["decoder"]:,}, encoder {sizes["encoder"]:,} parameters',
        f'Data {cfg.data.path}: '
        + (f'{len(run.train)} training and ' if run.train else '')
        + f'{len(run.validation)} held-out documents'
        + (f', none in both, {rows}' if run.train else ''),
    ]
    if kind != 'any':
        left_out = ' and '.join(str(x.left_out) for x in (run.train, run.validation) if x)
        lines[-1] += f'; {left_out} without {kind} tokens left out'
    if mesh:
        processes = f', {jax.process_count()} processes' if jax.process_count() > 1 else ''
        lines.append(f'Devices: {mesh}{processes}')
    lines.append(f'Steps: {phases}' + (f'; continuing at step {step}' if step else ''))
    if c.n_experts and (what := moe.slow(c.experts, c.n_experts)):
        lines.append(f'warning: {what}')
    return '\n'.join(lines)
