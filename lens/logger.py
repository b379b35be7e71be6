"""Where figures go: metrics.jsonl (source of truth), the console, optionally TensorBoard and wandb."""

import collections
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lens.distributed import is_first


def write_json(path: pathlib.Path, value) -> None:
    """Appears at once, by rename."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def write_text(path: pathlib.Path, text: str) -> None:
    tmp = path.with_name(f'.{path.name}.tmp')
    tmp.write_text(text)
    os.replace(tmp, path)


def write_jsonl(path: pathlib.Path, rows) -> None:
    write_text(path, ''.join(json.dumps(r) + '\n' for r in rows))


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """All complete lines; a torn last line (a killed run) is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split('\n')
    return [json.loads(line) for line in lines[:-1] if line]


class Writer:
    """Appends one JSON object per line to metrics.jsonl; only process 0 writes.

    resume_step: lines of later steps, from before a restart, are dropped. say: receives a sentence for the user when
    the disk is full; lines wait in memory then, and the file ends with a whole one.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        resume_step: int,
        tensorboard: bool,
        wandb_project: str,
        config: dict,
        say: Callable[[str], None] = print,
    ):
        self.active, self._say = is_first(), say
        self._waiting, self._failing = [], False  # lines that are not in the file yet; whether the last attempt failed
        self._tensorboard = self._wandb = None
        self.elapsed_s = 0.0
        if not self.active:
            return
        path = workdir / 'metrics.jsonl'
        kept = [r for r in read_jsonl(path) if r['step'] <= resume_step]
        write_jsonl(path, kept)
        self.elapsed_s = kept[-1]['wall_s'] if kept else 0.0
        self._file = path.open('ab', buffering=0)
        if tensorboard:
            from tensorboardX import SummaryWriter  # optional extra [tensorboard]

            self._tensorboard = SummaryWriter(str(workdir / 'tensorboard'))
        if wandb_project:
            import wandb  # optional extra [wandb]

            self._wandb = wandb.init(
                project=wandb_project, config=config, dir=str(workdir), resume='allow', id=workdir.name
            )

    def write(self, row: dict) -> None:
        """row: `step`, `phase`, `kind` (train, eval, drift, time, profile) and scalars."""
        if not self.active:
            return
        self._waiting.append(json.dumps(row) + '\n')
        self._append()
        scalars = {f'{row["kind"]}/{k}': v for k, v in row.items() if isinstance(v, (int, float)) and k != 'step'}
        if self._tensorboard:
            for k, v in scalars.items():
                self._tensorboard.add_scalar(k, v, row['step'])
        if self._wandb:
            self._wandb.log(scalars, step=row['step'])

    def _append(self) -> None:
        """Puts the lines that wait into the file, all or none."""
        end, rest = self._file.seek(0, os.SEEK_END), ''.join(self._waiting).encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as e:
            self._file.truncate(end)
            if not self._failing:
                self._say(
                    f'warning: {self._file.name} cannot be written ({e.strerror}); its lines wait in memory: free some disk.'
                )
            self._failing = True
        else:
            self._waiting, self._failing = [], False

    def close(self) -> None:
        if self.active:
            self._append()
            if self._waiting:
                self._say(f'warning: {self._file.name} lacks the last {len(self._waiting)} lines: the disk is full.')
            self._file.close()
            if self._tensorboard:
                self._tensorboard.close()
            if self._wandb:
                self._wandb.finish()


class StepClock:
    """Median seconds of the recent steps of a phase; compilation, evaluation and checkpoints are left out."""

    def __init__(self, now=time.monotonic):
        self._now, self._phase = now, ''
        self._last: float | None = None
        self._recent: collections.deque[float] = collections.deque(maxlen=50)

    def pause(self) -> None:
        """What happens until the next lap is not a step."""
        self._last = None

    def lap(self, phase: str) -> float:
        """A step of `phase` has ended; returns the median so far, 0.0 before the first full step of the phase."""
        now = self._now()
        if phase != self._phase:
            self._phase, self._last = phase, None
            self._recent.clear()
        if self._last is not None:
            self._recent.append(now - self._last)
        self._last = now
        return statistics.median(self._recent) if self._recent else 0.0


def clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f'{hours}:{m:02}:{s:02}' if hours else f'{m}:{s:02}'


class ProgressBar:
    """A bar with loss, FVE and ETA on a terminal; one line every `every` steps elsewhere."""

    def __init__(self, total: int, every: int):
        self.console = Console(quiet=not is_first())
        self.total, self.every = total, every
        self._bar = Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('{task.fields[text]}'),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task('', total=total, text='')

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *exc):
        self._bar.stop()

    def update(self, step: int, phase: str, metrics: dict, eta_s: float) -> None:
        # the policy-gradient loss is 0 by construction: show what it maximises
        names = {'reward': 'reward', 'loss_decoder': 'decoder loss', 'entropy_nats': 'entropy'}
        first = next(f'{text} {metrics[k]:.3f}' for k, text in names.items() if k in metrics)
        text = f'{first}  encoder loss {metrics["loss_encoder"]:.3f}  FVE {metrics["fve"]:.3f}  ETA {clock(eta_s)}'
        self._bar.update(self._task, completed=step, description=phase, text=text)
        if not self.console.is_terminal and (step % self.every == 0 or step == self.total):
            self.print(f'{phase:5} {step:6}/{self.total}  {text}')

    def print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a log on a full disk, or a terminal that is gone, must not end the run
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def provenance() -> dict:
    """Device, versions, commit and command line: what a figure needs beside it."""
    device = jax.devices()[0]
    try:
        here = pathlib.Path(__file__).parent
        git = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True, cwd=here)
        commit = git.stdout.strip()
    except OSError:  # no git on this machine
        commit = ''
    return {
        'device': f'{jax.device_count()} x {device.device_kind} ({os.cpu_count()} CPU cores)',
        'versions': {'python': platform.python_version()}
        | {p: importlib.metadata.version(p) for p in ('jax', 'flax', 'optax')},
        'commit': commit or 'unknown',
        'command': shlex.join(['python', *sys.orig_argv[1:]]),
    }
