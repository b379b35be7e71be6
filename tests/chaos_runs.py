"""What `tests.chaos` does to a run, and the run that it does it to."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = 'configs/tiny_subject'
INTERVAL, EVALUATE = 5, 10  # steps between checkpoints, between evaluations
STEPS = 7  # of the run for each disturbance
POLL_S, LIMIT_S = 0.01, 300.0
LOOPS, STARVED_S = 8, 3.0
ROW = re.compile(r'^\{"step": (\d+), "phase": "\w+", "kind": "(\w+)".*\}$', re.M)
BEGINS = re.compile(r'^Steps: .*?(?:; continuing at step (\d+))?$', re.M)
STOPPED = re.compile(r'^Stopped at step (\d+) of \d+ by SIG\w+: saved in ', re.M)
LOST = 'could not be written'
GOES_ON = ('pause', 'starve', 'disk')


@dataclasses.dataclass
class Disturbance:
    """kind: of the list in tests/chaos.py. instant: start (before the first step), step, evaluation, writing (of a checkpoint), saved.
    What came of it, in steps: reached by the log; kept: newest complete checkpoint; resumed: where it went on."""

    kind: str
    instant: str
    reached: int | None = None
    kept: int | None = None
    resumed: int | None = None
    note: str = ''

    @property
    def repeated(self) -> int:
        return 0 if self.resumed is None else max(0, self.reached - self.resumed)


# One process, several: what comes in turn.
KILLS = {
    1: 'kill writing, kill step, damage saved, kill start, kill evaluation, kill saved',
    2: 'kill step, kill writing, kill start, kill evaluation',
}
OTHERS = {
    1: 'SIGUSR1 step, disk step, SIGTERM writing, pause step, starve step',
    2: 'SIGUSR1 step, pause step, SIGTERM writing',
}


def plan(kills: int, processes: int, rng: random.Random) -> list[Disturbance]:
    """So many kills and half as many others, in random order; only a kill of a fresh process can be at its start."""

    def take(kinds: str, count: int) -> list[Disturbance]:
        return [Disturbance(*k.split()) for k in itertools.islice(itertools.cycle(kinds.split(', ')), count)]

    out = take(KILLS[processes], kills) + take(OTHERS[processes], kills // 2)
    while True:
        rng.shuffle(out)
        if not any(a.kind in GOES_ON and b.instant == 'start' for a, b in itertools.pairwise(out)):
            return out


class Fault(Exception):
    """What the run did and should not have done."""


def make_world(folder: pathlib.Path) -> None:
    """A small random subject, and stories for it."""
    from lens import hf
    from lens.models.rope import Rope
    from lens.models.transformer import TransformerConfig
    from tests.conftest import make_base  # also sets flags of XLA that make it compile quickly

    config = TransformerConfig(
        'llama', len(hf.load_tokenizer(TOKENIZER)), 24, 3, 8, 4, 6, 40, 1e-5, True, 128, (Rope(10000.0),)
    )
    hf.save_model(make_base(config), folder / 'subject', source=TOKENIZER)
    sizes = ['--train=60', '--validation=12', '--positions=4']
    stories = [sys.executable, '-m', 'data_gen.storyworld', f'--out={folder}/data', f'--tokenizer={TOKENIZER}', *sizes]
    subprocess.run(stories, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def arguments(
    world: pathlib.Path, workdir: pathlib.Path, processes: int, phases: tuple[str, ...], steps: int, evaluate: int
):
    """Of lens.main: a run whose steps are quick; every step is logged."""
    config = {
        'subject.path': world / 'subject',
        'data.path': world / 'data',
        'layer': 1,
        'phases': phases,
        'decoder.patched_blocks': 2,
        'sft.documents': 4,
        'grpo.documents': 2,
        'grpo.group': 3,
        'mesh.data': processes,
        'eval.documents': 6,
        'eval.quick_documents': 4,
        'eval.vectors': 2,
        'eval.batch': 12,
        'eval.every': f'{evaluate}s',
        'eval.samples': 2,
        'log.every': '1s',
        'checkpoint.every': f'{INTERVAL}s',
    } | {f'{phase}.steps': -(-steps // len(phases)) for phase in phases}
    return ['--config=configs/tiny.py', f'--workdir={workdir}', *(f'--config.{k}={v}' for k, v in config.items())]


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that have not ended."""
    out = []
    for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(') ')[2].split()[:2]
            if int(parent) == pid and state not in 'ZX':
                out.append(int(stat.parent.name))
    return out


def place_on(pid: int, cpus: set[int]) -> None:
    """Lets all threads of a process run on these cores alone."""
    for task in os.listdir(f'/proc/{pid}/task'):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task), cpus)


class Trial:
    """A run in a workdir, over all its starts; the output of start I is in OUTPUT/I."""

    def __init__(self, args: list[str], workdir: pathlib.Path, output: pathlib.Path, processes: int):
        self.args, self.workdir, self.output, self.processes = args, workdir, output, processes
        self.popen, self.starts, self.known = None, 0, 0
        self.env = os.environ | {'PYTHON': sys.executable, 'PYTHONUNBUFFERED': '1', 'HF_HUB_OFFLINE': '1'}
        self.env |= {'JAX_PLATFORMS': 'cpu', 'PAUSE_S': '0.2', 'GRACE_S': '5'}
        output.mkdir(parents=True)

    def start(self) -> None:
        launcher = ['launch/train_local.sh', '-n', str(self.processes)]
        command = launcher if self.processes > 1 else [sys.executable, '-m', 'lens.main']
        self.starts, self.known = self.starts + 1, 0
        with (self.output / str(self.starts)).open('w') as f:
            self.popen = subprocess.Popen([*command, *self.args], cwd=ROOT, env=self.env, stdout=f, stderr=f)

    def end(self) -> None:
        """Ends what still runs."""
        if self.popen and self.running:
            pids = self.pids()
            for pid in {*pids, self.popen.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.popen.wait()

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    @property
    def printed(self) -> str:
        return self.printed_since(self.starts)

    def printed_since(self, start: int) -> str:
        return ''.join((self.output / str(i)).read_text(errors='replace') for i in range(start, self.starts + 1))

    def pids(self) -> list[int]:
        """Of the training processes."""
        return [self.popen.pid] if self.processes == 1 else children(self.popen.pid)

    def begun(self) -> list[int]:
        """Where it went on, for each begin of training in this start; several when the launcher started it again."""
        return [int(step or 0) for step in BEGINS.findall(self.printed)]

    def last_row(self) -> tuple[int, str]:
        """Step and kind of the newest row of metrics.jsonl."""
        try:
            with (self.workdir / 'metrics.jsonl').open('rb') as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - 5000))
                step, kind = ROW.findall(f.read().decode(errors='replace'))[-1]
        except (FileNotFoundError, IndexError):
            return 0, ''
        return int(step), kind

    def _checkpoints(self) -> list[pathlib.Path]:
        with contextlib.suppress(FileNotFoundError):
            return list((self.workdir / 'checkpoints').iterdir())
        return []

    def complete(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(int(p.name) for p in self._checkpoints() if p.name.isdigit())

    def newest(self) -> int:
        return max(self.complete(), default=0)

    def in_writing(self) -> list[str]:
        return [p.name for p in self._checkpoints() if not p.name.isdigit()]

    def litter(self) -> list[str]:
        return self.in_writing() + [p.name for p in self.workdir.glob('.*') if p.name != '.lock']

    def until(self, ready, what: str) -> None:
        """Waits. Raises Fault when the run ends before, or after LIMIT_S."""
        last = time.monotonic() + LIMIT_S
        while not ready():
            if not self.running and not ready():
                raise Fault(f'ended with code {self.popen.returncode} before {what}')
            if time.monotonic() > last:
                raise Fault(f'{what} did not come within {LIMIT_S:.0f} s')
            time.sleep(POLL_S)

    def begins_again(self) -> int:
        """Waits until training has begun, since the last call; the step from which."""
        self.until(lambda: len(self.begun()) > self.known, 'training began')
        self.known = len(self.begun())
        return self.begun()[-1]

    def wait(self) -> int:
        try:
            return self.popen.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Fault(f'did not end within {LIMIT_S:.0f} s') from None
