"""Disturbs a run at random instants, lets it go on, and compares it with an undisturbed one.

    python -m tests.chaos --kills=20 --processes=1 --seed=0 --workdir=runs/chaos

Half as many disturbances of other kinds come with the kills. One process is started again by this program, several
by launch/train_local.sh. Exit code: 0 when nothing was lost but steps after the last checkpoint and the curves are
equal bit for bit; 1 otherwise, and WORKDIR stays.

    kill      SIGKILL to one process          pause   SIGSTOP to one process, SIGCONT later
    damage    the same, and a file of the     starve  all threads on one core, beside busy loops
              newest checkpoint is cut short  disk    no file may grow beyond a limit, as on a full disk
    SIGUSR1   to one process                  SIGTERM to one process, or to the launcher
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import resource
import shutil
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
    """kind: above. instant: start (before the first step), step, evaluation, writing (of a checkpoint), saved.
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
        'llama', len(hf.load_tokenizer(TOKENIZER)), 24, 3, 8, 4, 6, 40, 1e-5, True, 128, (Rope(500.0),)
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
        return self.in_writing() + [p.name for p in self.workdir.glob('.*')]

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


class Chaos:
    """Carries a plan out on a trial. start_s: seconds that a start takes."""

    def __init__(self, trial: Trial, disturbances: list[Disturbance], rng: random.Random, start_s: float, say=print):
        self.trial, self.disturbances, self.rng, self.start_s, self.say = trial, disturbances, rng, start_s, say
        self.pending, self.checked, self.begun = [], 1, False

    def run(self) -> None:
        """All disturbances, then to the end. Raises Fault."""
        for i, d in enumerate(self.disturbances):
            if not self.trial.popen or not self.trial.running:
                self.trial.start()
                self.begun = False
            if d.instant == 'start':
                time.sleep(self.rng.uniform(0, self.start_s))
                if len(self.trial.begun()) > self.trial.known:
                    self._begins()
            else:
                self._begins()
                self._instant(d, STEPS * i + self.rng.randrange(STEPS))
            {'SIGUSR1': self._stop, 'SIGTERM': self._stop}.get(d.kind, getattr(self, f'_{d.kind}', None))(d)
            if d.kind in GOES_ON:
                d.kept = self.trial.newest()
                self._tell(d)
        if not self.trial.running:
            self.trial.start()
            self.begun = False
        self._begins()
        if code := self.trial.wait():
            raise Fault(f'the last start ended with code {code}')

    def _begins(self) -> None:
        """Waits until training goes on, and checks from where."""
        if self.begun:
            return
        step, self.begun = self.trial.begins_again(), True
        printed, self.checked = self.trial.printed_since(self.checked), self.trial.starts + 1
        for d in self.pending:
            d.resumed = step
        damaged = [d for d in self.pending if d.kind == 'damage']
        for d in self.pending:
            self._tell(d)
            if step != d.kept and not (damaged and step < d.kept and 'is damaged' in printed):
                raise Fault(f'went on from step {step}, and the newest checkpoint was of step {d.kept}')
            # the next one may be in writing
            if d.repeated > INTERVAL * (2 + len(damaged)):
                raise Fault(f'{d.repeated} steps are lost, and a checkpoint comes every {INTERVAL} steps')
        if 'is damaged' in printed and not damaged:
            raise Fault('a checkpoint that nobody has damaged cannot be read')
        self.pending = []

    def _instant(self, d: Disturbance, step: int) -> None:
        """Waits for the instant of `d` that comes at `step` or later, and a random moment more."""
        t = self.trial

        def evaluates() -> bool:
            at, kind = t.last_row()
            return at >= step and kind == 'train' and at % EVALUATE == 0

        ready, spread_s = {
            'step': (lambda: t.last_row()[0] >= step, 0.2),
            'evaluation': (evaluates, 1.0),
            'writing': (lambda: t.last_row()[0] >= step and t.in_writing(), 0.1),
            'saved': (lambda: t.newest() >= step, 0.01),
        }[d.instant]
        t.until(ready, f'{d.instant} at step {step} or later')
        time.sleep(self.rng.uniform(0, spread_s))

    def _died(self, d: Disturbance) -> None:
        d.reached, d.kept = self.trial.last_row()[0], self.trial.newest()
        d.note += ' '.join(f'{name.partition(".")[0]} in writing' for name in self.trial.in_writing())
        self.pending.append(d)
        self.begun = False

    def _kill(self, d: Disturbance) -> None:
        t = self.trial
        if t.processes == 1:
            os.kill(t.popen.pid, signal.SIGKILL)
            t.wait()
            return self._died(d)
        restarts = t.printed.count('\nRestart ')
        t.until(lambda: len(t.pids()) == t.processes, 'all processes were started')
        before = t.pids()
        number = self.rng.randrange(t.processes)
        os.kill(sorted(before)[number], signal.SIGKILL)
        d.note = f'process {number} '
        t.until(lambda: t.printed.count('\nRestart ') > restarts, 'the launcher noticed the death')
        if left := [pid for pid in before if pid in t.pids()]:
            raise Fault(f'processes {left} go on after the death of another')
        t.known = len(t.begun())
        return self._died(d)

    def _damage(self, d: Disturbance) -> None:
        """Cuts a file of the newest checkpoint short, where there is an older one."""
        t = self.trial
        t.until(lambda: len(t.complete()) > 1, 'a second checkpoint')
        self._kill(d)
        files = [p for p in (t.workdir / 'checkpoints' / str(d.kept)).rglob('*') if p.is_file() and p.stat().st_size]
        file = self.rng.choice(sorted(files))
        os.truncate(file, self.rng.randrange(file.stat().st_size))
        d.note += f' {file.relative_to(t.workdir / "checkpoints")} cut'

    def _stop(self, d: Disturbance) -> None:
        t, number = self.trial, getattr(signal, d.kind)
        pids = [*t.pids(), t.popen.pid] if d.kind == 'SIGTERM' else t.pids()
        began = time.monotonic()
        os.kill(self.rng.choice(pids), number)
        code = t.wait()
        if code or not (found := STOPPED.search(t.printed)):
            raise Fault(f'after {d.kind} it ended with code {code} and did not say where')
        self._died(d)
        d.note = f'stopped in {time.monotonic() - began:.1f} s'
        if int(found[1]) != d.kept:
            raise Fault(f'{found[0]}… but the newest checkpoint is of step {d.kept}')
        if litter := t.litter():
            raise Fault(f'after {d.kind} it left {litter}')

    def _goes_on(self, after: int) -> None:
        self.trial.until(lambda: self.trial.last_row()[0] > after, f'a step after {after}')

    def _pause(self, d: Disturbance) -> None:
        pid = self.rng.choice(self.trial.pids())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.5, 3.0))
        d.reached = self.trial.last_row()[0]
        os.kill(pid, signal.SIGCONT)
        self._goes_on(d.reached)

    def _starve(self, d: Disturbance) -> None:
        pid, cpus, loops = self.trial.popen.pid, os.sched_getaffinity(0), []
        try:
            loops = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(LOOPS)]
            for p in (pid, *(p.pid for p in loops)):
                place_on(p, {min(cpus)})
            before = self.trial.last_row()[0]
            time.sleep(STARVED_S)
            d.reached = self.trial.last_row()[0]
        finally:
            for p in loops:
                p.kill()
                p.wait()
        place_on(pid, cpus)
        d.note = f'{d.reached - before} steps in {STARVED_S:.0f} s'
        self._goes_on(d.reached)

    def _disk(self, d: Disturbance) -> None:
        """The array file of a checkpoint cannot be written, metrics.jsonl can."""
        t, pid = self.trial, self.rng.choice(self.trial.pids())
        warnings, kept = t.printed.count(LOST), t.newest()
        most = (t.workdir / 'metrics.jsonl').stat().st_size + 100_000
        free = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, free[1]))
        t.until(lambda: t.printed.count(LOST) > warnings, 'a warning that the checkpoint could not be written')
        resource.prlimit(pid, resource.RLIMIT_FSIZE, free)
        d.reached = t.last_row()[0]
        if t.newest() < kept:
            raise Fault(f'the checkpoint of step {kept} is gone after another could not be written')
        t.until(lambda: t.newest() > d.reached, 'a checkpoint after the disk was free again')

    def _tell(self, d: Disturbance) -> None:
        resumed = 'goes on' if d.resumed is None else d.resumed
        self.say(f'{d.kind:8} {d.instant:11} {d.reached:>7} {d.kept:>10} {resumed:>10} {d.repeated:>8}  {d.note}')


HEAD = f'{"what":8} {"instant":11} {"reached":>7} {"checkpoint":>10} {"resumed at":>10} {"repeated":>8}'


def figures(workdir: pathlib.Path) -> dict:
    """Of the summary, those that do not depend on the clock, and the samples."""
    summary = json.loads((workdir / 'summary.json').read_text())
    free = ('goodput', 'peak_memory_gb')
    out = {k: v for k, v in summary.items() if isinstance(v, (int, float)) and not k.endswith('_s') and k not in free}
    del out['best_step']  # a checkpoint may have been lost with a disk that was full, or damaged
    return out | {'samples': (workdir / 'samples.jsonl').read_text()}


def compare(workdir: pathlib.Path, calm: pathlib.Path) -> None:
    """Raises Fault where the two runs differ."""
    from lens.record import curve

    a, b = curve(workdir), curve(calm)
    for x, y in itertools.zip_longest(a, b):
        if x != y:
            keys = sorted(k for k in {*(x or {}), *(y or {})} if (x or {}).get(k) != (y or {}).get(k))
            raise Fault(f'the curves differ in {keys}: disturbed {x}, undisturbed {y}')
    a, b = figures(workdir), figures(calm)
    if a != b:
        raise Fault(f'the figures at the end differ: {[k for k in a.keys() | b.keys() if a.get(k) != b.get(k)]}')


def chaos(
    folder: pathlib.Path,
    disturbances: list[Disturbance],
    processes: int,
    rng: random.Random,
    phases: tuple[str, ...] = ('sft', 'grpo'),
    evaluate: int = EVALUATE,
    say=print,
) -> str:
    """An undisturbed run and a disturbed one in `folder`; returns the sentence that sums up. Raises Fault.

    evaluate: steps between evaluations, 0: at the end alone, which saves compiling where no instant is `evaluation`.
    """
    began = time.monotonic()
    make_world(folder)
    steps = STEPS * (len(disturbances) + 2)
    trials = [
        Trial(
            arguments(folder, folder / n, processes, phases, steps, evaluate),
            folder / n,
            folder / f'output-{n}',
            processes,
        )
        for n in ('calm', 'disturbed')
    ]
    calm, disturbed = trials
    try:
        calm.start()
        at = time.monotonic()
        calm.begins_again()
        start_s = time.monotonic() - at
        if code := calm.wait():
            raise Fault(f'the undisturbed run ended with code {code}')
        say(f'{steps} steps undisturbed in {time.monotonic() - at:.0f} s, of which {start_s:.0f} s to start')
        say(HEAD)
        Chaos(disturbed, disturbances, rng, 1.2 * start_s, say).run()
        if litter := disturbed.litter():
            raise Fault(f'it left {litter}')
        compare(disturbed.workdir, calm.workdir)
    except Fault as e:
        which = disturbed if disturbed.starts else calm
        tail = '\n'.join(which.printed.splitlines()[-30:]) if which.starts else ''
        raise Fault(f'{e}\nThe last lines of {which.output}/{which.starts}:\n{tail}') from None
    finally:
        for trial in trials:
            trial.end()
    kills = sum(d.kind in ('kill', 'damage') for d in disturbances)
    most = max(d.repeated for d in disturbances)
    return (
        f'chaos: {len(disturbances)} disturbances, {kills} of them kill -9, of {processes} process'
        f'{"es" if processes > 1 else ""} in {time.monotonic() - began:.0f} s; steps repeated at most {most} '
        f'(checkpoint interval {INTERVAL}); curve identical'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--processes', type=int, choices=sorted(KILLS), default=1)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    folder = options.workdir.absolute() / f'{options.processes}'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # kills fall into writing compiled programs too
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'xla')
    rng = random.Random(options.seed)
    try:
        print(chaos(folder, plan(options.kills, options.processes, rng), options.processes, rng))
    except Fault as e:
        sys.exit(f'chaos: {e}\nSeed {options.seed}; the runs are in {folder}')
    shutil.rmtree(folder)


if __name__ == '__main__':
    main()
