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
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

from tests.chaos_runs import (
    EVALUATE,
    GOES_ON,
    INTERVAL,
    KILLS,
    LOOPS,
    LOST,
    STARVED_S,
    STEPS,
    STOPPED,
    Disturbance,
    Fault,
    Trial,
    arguments,
    make_world,
    place_on,
    plan,
)


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
    from tests.curves import curve

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
