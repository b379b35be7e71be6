"""What a run says and writes down while it goes: figures of every step, held-out figures, time, health."""

import json
import pathlib
import time

import jax
import numpy as np

from lens import data, files, flops, health, logger, sharding
from lens.checkpoint import Checkpoints
from lens.config import Phase, Run, fires
from lens.errors import LensError
from lens.models.lens import Lens

HELD_OUT = ('fve', 'fve_greedy', 'facts_recall', 'facts_hallucinated')
# Of logger.jsonl, what differs between two equal runs: keys, and kinds of rows.
TIMES, OF_TIME = ('step_s', 'wall_s', 'mfu', 'tflops_s'), ('time', 'profile')


class NonFiniteError(LensError):
    """The loss is NaN or infinite; nothing was saved after the last good checkpoint."""


class Record:
    """metrics.jsonl, the console, the clock and the watch of one process; the first one alone writes and prints.

    began: time.monotonic() of when this process began. step: of the checkpoint that the run goes on from.
    collapse: state of the watch there, or None. checkpoints: where the last good one is looked up after a failure.
    """

    def __init__(
        self,
        cfg,
        run: Run,
        workdir: pathlib.Path,
        began: float,
        lens: Lens,
        step: int,
        collapse: dict | None,
        checkpoints: Checkpoints,
    ):
        self.run, self.workdir, self.lens, self.checkpoints = run, workdir, lens, checkpoints
        rows = files.read_jsonl(workdir / 'metrics.jsonl')
        before = [r for r in rows if r['kind'] == 'time' and r['step'] <= step]
        parts = {k.removesuffix('_part_s'): v for k, v in before[-1].items() if k.endswith('_part_s')} if before else {}
        self.writer = logger.Writer(
            workdir, step, cfg.log.tensorboard, cfg.log.wandb_project, json.loads(cfg.to_json()), self.say
        )
        self._begin = began - self.writer.elapsed_s
        parts['start'] = parts.get('start', 0.0) + time.monotonic() - began
        self.clock = health.Goodput(parts, health.lost_seconds(rows, step))
        self.bar = logger.ProgressBar(run.steps, run.steps)
        self.watch = health.Collapse(cfg.health.collapse)
        if collapse:
            self.watch.set_state(collapse)
        self._laps, self._pending, self._flops = logger.StepClock(), None, {}
        phase = next((p for p in run.phases if step <= p.end), None)
        if rows and phase:  # what was lost so far must not be forgotten when this process is killed before it saves
            self.write(step, phase, 'time', self.time())

    def __enter__(self):
        self.bar.__enter__()
        return self

    def __exit__(self, *exc):
        self.bar.__exit__(*exc)
        self.writer.close()

    @property
    def wall_s(self) -> float:
        """Seconds of the run so far, over restarts."""
        return time.monotonic() - self._begin

    def say(self, text: str) -> None:
        self.bar.print(text)

    def write(self, step: int, phase: Phase, kind: str, values: dict) -> None:
        row = {'step': step, 'phase': phase.name, 'kind': kind} | values
        self.writer.write(row | {'wall_s': self.wall_s})

    def dispatched(self, phase: Phase, step: int, out: dict) -> None:
        """A step has been sent to the devices; the figures of the one before are there now, or soon."""
        self.settle()
        self._pending = phase, step, out

    def settle(self, pause: bool = False) -> None:
        """Waits for the figures of the step that was sent last. pause: what comes now is no step.

        Raises NonFiniteError, health.CollapseError.
        """
        if self._pending:
            pending, self._pending = self._pending, None
            self._step(*pending)
        if pause:
            self._laps.pause()

    def _step(self, phase: Phase, step: int, out: dict) -> None:
        values = {k: float(v) for k, v in sharding.fetch(out).items()}
        if not all(np.isfinite(v) for v in values.values()):
            bad = next(k for k, v in values.items() if not np.isfinite(v))
            where = data.batch_documents(
                self.run.train, phase.documents, self.run.seed + phase.start, step - phase.start - 1
            )
            last_good = self.checkpoints.latest_step
            raise NonFiniteError(
                f'{bad} is not finite at step {step} (phase {phase.name}, documents {where}); the last good '
                f'checkpoint is {f"step {last_good}" if last_good else "none"} in {self.workdir}: lower the learning '
                'rates.'
            )
        if not phase.labelled:
            for warning in self.watch.feed(phase.name, step, values):
                self.say(f'warning: {warning}')
        step_s = self._laps.lap(phase.name)
        every = phase.every.log
        if fires(every, step) or step == phase.end:
            self.write(step, phase, 'train', values | {'step_s': step_s} | self._speed(phase, step_s))
        self.bar.every = 5 * every if every else self.run.steps
        self.bar.update(step, phase.name, values, step_s * (self.run.steps - step))

    def _speed(self, phase: Phase, step_s: float) -> dict[str, float]:
        """Model FLOP/s of a device, and their share of its peak where that is known (lens/flops.py)."""
        if not step_s or phase.name not in self._flops:
            return {}
        per_s, peak = self._flops[phase.name] / step_s, flops.peak(jax.devices()[0].device_kind)
        return {'tflops_s': per_s / 1e12} | ({'mfu': per_s / peak} if peak else {})

    def held_out(self, phase: Phase, step: int, values: dict, full: bool) -> None:
        self.write(step, phase, 'eval', {'full': full} | values)
        self.say(f'held out at step {step}: ' + '  '.join(f'{k} {values[k]:.3f}' for k in HELD_OUT if k in values))

    def time(self) -> dict[str, float]:
        """Where the seconds went so far: of every part, and the share of them that trained."""
        seconds = {f'{k}_part_s': round(v, 3) for k, v in self.clock.seconds.items()}
        return seconds | {'goodput': self.clock.goodput, 'peak_memory_gb': health.peak_memory_gb()}


def curve(workdir: pathlib.Path) -> list[dict]:
    """The rows of logger.jsonl without what depends on the clock: equal for equal runs, interrupted or not."""
    rows = files.read_jsonl(workdir / 'metrics.jsonl')
    return [{k: v for k, v in r.items() if k not in TIMES} for r in rows if r['kind'] not in OF_TIME]


def announce(cfg, run: Run, sizes: dict[str, int], base_size: int, step: int) -> str:
    """The first lines of a run."""
    c = run.base.config
    phases = ', '.join(f'{p.name} {p.end - p.start}' for p in run.phases) or 'none, evaluation only'
    train, validation, kind = run.train.left_out, run.validation.left_out, cfg.data.positions
    left_out = f'; {train} and {validation} without {kind} tokens left out' if kind != 'any' else ''
    processes = f', {jax.process_count()} processes' if jax.process_count() > 1 else ''
    mesh = ' x '.join(f'{k} {n}' for k, n in run.mesh.shape.items() if n > 1)
    return (
        f'Subject {cfg.subject.path}: {c.family}, {c.n_layers} blocks, {base_size:,} parameters, read after block '
        f'{run.layer}\n'
        f'Trained: decoder {sizes["decoder"]:,}, encoder {sizes["encoder"]:,} parameters\n'
        f'Data {cfg.data.path}: {len(run.train)} training and {len(run.validation)} held-out documents, '
        f'no document in both{left_out}\n'
        + (f'Devices: {mesh}{processes}\n' if mesh else '')
        + f'Steps: {phases}'
        + (f'; continuing at step {step}' if step else '')
    )
