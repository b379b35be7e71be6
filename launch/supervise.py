"""Starts the processes of one training run, watches them, and starts all of them again when one dies.

    supervise.py local --workdir=DIR --processes=N -- ARGUMENTS   N processes on this machine
    supervise.py hosts --workdir=DIR -- ARGUMENTS                 one on each host, by ssh
    supervise.py slurm --workdir=DIR -- ARGUMENTS                 one on each node of this job, by srun
    supervise.py tpu --workdir=DIR -- ARGUMENTS                   one on each worker of a pod, by gcloud

ARGUMENTS are those of lens.main. The launch scripts call this and say which variables of the environment it reads.
The standard library alone, and agent.py beside it.

Exit code: 0 when all processes ended with 0, be it after a signal; 1 otherwise.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

from agent import (
    POLL_S,
    REPORT,
    Failure,
    catch_signals,
    exit_code,
    newest_checkpoint,
    passed_on,
    say,
    signal_group,
    start,
)

USER_ERROR, BROKEN = 1, 70  # as lens.cli ends
# how processes end that are asked to before lens.main handles signals, or once it has saved; and those of a dead peer
ASKED = {128 + signal.SIGTERM, 128 + signal.SIGUSR1}
FOLLOWING = ASKED | {128 + signal.SIGABRT}
# peers of a process that ended with an error find their connections closed, and abort or are broken
AFTER_ERROR = FOLLOWING | {USER_ERROR, BROKEN}
PORTS = range(61440, 65536)  # of runs on this machine, as lens.distributed for Slurm
SETTLE_S = 0.5  # within which the cause of several deaths is known
TAIL_LINES = 20
# nothing is asked, and a connection that is lost is noticed within a minute
SSH_OPTIONS = [
    f'-o{o}' for o in ('BatchMode=yes', 'ConnectTimeout=15', 'ServerAliveInterval=15', 'ServerAliveCountMax=4')
]


@dataclasses.dataclass(frozen=True)
class Command:
    """argv: words; env: more variables; by_stdin: it is stopped by the end of its standard input, not by a signal;
    agents: what it starts are agents, whose reports are in its output."""

    argv: list
    env: dict = dataclasses.field(default_factory=dict)
    by_stdin: bool = False
    agents: bool = False

    def __str__(self):
        return shlex.join([f'{k}={v}' for k, v in self.env.items()] + self.argv)


@dataclasses.dataclass(frozen=True)
class Death:
    """Who ended with which code other than 0; log: where its output is, None: on the terminal."""

    who: str
    code: int
    log: pathlib.Path | None

    def __str__(self):
        name = ''
        with contextlib.suppress(ValueError):
            name = f' ({signal.Signals(self.code - 128).name})'
        return f'{self.who} ended with code {self.code}{name}'


class Process:
    """A command that was started; its output goes to the terminal, or is appended to a log."""

    def __init__(self, command, name, log):
        self.command, self.name, self.log, self.reader = command, name, log, None
        self.newest, self._reports = -1, []
        with open(log, 'ab') if log else contextlib.nullcontext() as out:
            self.popen = start(
                command.argv,
                env=os.environ | {'PYTHONUNBUFFERED': '1'} | command.env,
                stdin=subprocess.PIPE if command.by_stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE if command.agents else out,
                stderr=subprocess.STDOUT if command.agents or log else None,
            )
        if command.agents:
            self.reader = threading.Thread(target=self._read, daemon=True)
            self.reader.start()

    def _read(self):
        with open(self.log, 'ab') if self.log else contextlib.nullcontext(sys.stdout.buffer) as out:
            for line in self.popen.stdout:
                with contextlib.suppress(OSError):  # a terminal that is gone must not stop the training
                    out.write(line)
                    out.flush()
                if found := REPORT.search(line):
                    host, code, newest = found.groups()
                    self._reports.append(Death(f'{self.name} on {host.decode()}', int(code), self.log))
                    self.newest = max(self.newest, int(newest))

    def running(self):
        return self.popen.poll() is None

    def deaths(self):
        """Who ended with a code other than 0, as far as is known."""
        code = exit_code(self.popen)
        if code is not None and self.reader:
            self.reader.join(SETTLE_S)
        return [d for d in self._reports if d.code] or ([Death(self.name, code, self.log)] if code else [])

    def stop(self, number):
        if not self.command.by_stdin:
            signal_group(self.popen, number)
        else:
            self.popen.stdin.close()

    def kill(self):
        signal_group(self.popen, signal.SIGKILL)


def environment_number(name, default):
    text = os.environ.get(name) or default
    try:
        return float(text)
    except ValueError:
        raise Failure(f'{name}={text} is not a number.') from None


def grace_s():
    return environment_number('GRACE_S', 15)


def stop_s():
    return environment_number('STOP_S', 600)


class Supervisor:
    """commands: called before each start, returns what to start. workdir: where checkpoints and logs are."""

    def __init__(self, commands, workdir):
        self.commands, self.workdir = commands, pathlib.Path(workdir)
        self.max_restarts = int(environment_number('MAX_RESTARTS', 10))
        self.pause_s = environment_number('PAUSE_S', 5)
        self.grace_s, self.stop_s = grace_s(), stop_s()
        self.received, self.forwarded, self.deadline = catch_signals(), 0, None
        self.processes, self.newest = [], newest_checkpoint(workdir)

    def run(self):
        """Until all processes have ended with 0, a signal has stopped them, or a restart is of no use."""
        commands, in_vain = self.commands(), 0
        with self._only_one():
            for command in commands:
                say(f'+ {command}')
            while deaths := self._attempt(commands):
                codes = {d.code for d in deaths}
                if codes & ASKED and codes <= FOLLOWING:
                    return say('Stopped by a signal')
                before = self.newest
                self.newest = max([before, newest_checkpoint(self.workdir), *(p.newest for p in self.processes)])
                in_vain = 1 if self.newest > before else in_vain + 1
                self._give_up(deaths, in_vain)
                place = f'checkpoint {self.newest}' if self.newest >= 0 else 'the beginning'
                say(f'Restart {in_vain} of {self.max_restarts}, from {place}, in {self.pause_s:g} s')
                last = time.monotonic() + self.pause_s
                while time.monotonic() < last and not self.received:
                    time.sleep(POLL_S)
                if self.received:
                    return say('Stopped before the restart')
                commands = self.commands()

    @contextlib.contextmanager
    def _only_one(self):
        """Two launchers of one workdir would overwrite each other's checkpoints."""
        logs = self.workdir / 'logs'
        logs.mkdir(parents=True, exist_ok=True)
        with open(logs / 'launcher.lock', 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Failure(
                    f'Another launcher is training in {self.workdir}: wait for it, or choose another --workdir.'
                ) from None
            except OSError:  # a file system without locks
                pass
            yield

    def _attempt(self, commands):
        """One start of all processes. Returns the deaths, none after success; nobody is left running."""
        self.processes, first = [], None
        try:
            for i, command in enumerate(commands):
                name = f'process {i}' if len(commands) > 1 else 'the training'
                log = self.workdir / 'logs' / f'process-{i}.log' if i else None
                self.processes.append(Process(command, name, log))
            while True:
                self._forward()
                deaths = [d for p in self.processes for d in p.deaths()]
                if deaths:
                    # peers of the first that died may have ended before it is known
                    first = first or time.monotonic()
                    causes = [d for d in deaths if d.code not in AFTER_ERROR]
                    if causes or time.monotonic() - first > SETTLE_S:
                        self._tell(deaths)
                        return deaths
                elif not any(p.running() for p in self.processes):
                    return []
                time.sleep(POLL_S)
        finally:
            self._end()

    def _forward(self):
        """Signals that have come go on to all. Raises Failure where one has not ended in time, or at a second Ctrl-C."""
        while self.forwarded < len(self.received):
            number = self.received[self.forwarded]
            self.forwarded += 1
            say(f'{signal.Signals(number).name}: waiting until all have saved, at most {self.stop_s:g} s')
            for p in self.processes:
                if p.running():
                    p.stop(passed_on(number))
            self.deadline = self.deadline or time.monotonic() + self.stop_s
        late = self.deadline is not None and time.monotonic() > self.deadline
        if late or self.received.count(signal.SIGINT) > 1:
            for p in self.processes:
                if p.running():
                    p.kill()
            raise Failure('Ended without saving; the same command goes on from the last checkpoint.')

    def _end(self):
        """Ends what runs: SIGTERM, and SIGKILL for what hangs."""
        running = [p for p in self.processes if p.running()]
        for p in running:
            p.stop(signal.SIGTERM)
        last, late = time.monotonic() + self.grace_s, False
        while any(p.running() for p in running):
            if time.monotonic() > last and not late:
                late = True
                for p in running:
                    if p.running():
                        say(f'SIGKILL to {p.name}, which still runs {self.grace_s:g} s after it was asked to end')
                        p.kill()
            time.sleep(POLL_S)
        for p in self.processes:
            if p.command.by_stdin:
                p.popen.stdin.close()

    def _tell(self, deaths):
        for death in deaths:
            say(str(death))
        for log in dict.fromkeys(d.log for d in deaths if d.log):
            lines = log.read_text(errors='replace').splitlines()[-TAIL_LINES:]
            say('\n'.join([f'The last lines of {log}:', *lines]))

    def _give_up(self, deaths, in_vain):
        codes = {d.code for d in deaths}
        if USER_ERROR in codes and codes <= AFTER_ERROR:
            raise Failure('The training ended with an error that no restart mends, see above.')
        if self.forwarded:
            raise Failure('The training died before it had saved; the same command goes on from the last checkpoint.')
        if in_vain > self.max_restarts:
            raise Failure(f'No new checkpoint in {self.workdir} after {self.max_restarts} restarts: given up.')


# --- commands -------------------------------------------------------------------------------------------------


def training(arguments, *flags):
    return [os.environ['PYTHON'], '-m', 'lens.main', *arguments, *flags]


def place(address, count, index):
    return [f'--coordinator={address}', f'--num_processes={count}', f'--process_id={index}']


def device_parts(count):
    """For each process what is added to its environment: its part of the GPUs, where DEVICES_PER_PROCESS is set."""
    each = int(environment_number('DEVICES_PER_PROCESS', 0))
    if not each:
        return [{}] * count
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    devices = visible.split(',') if visible else [str(i) for i in range(count * each)]
    if len(devices) < count * each:
        raise Failure(
            f'CUDA_VISIBLE_DEVICES={visible} has {len(devices)} devices, and {count} processes with {each} each need '
            f'{count * each}: change DEVICES_PER_PROCESS or the number of processes.'
        )
    return [{'CUDA_VISIBLE_DEVICES': ','.join(devices[i * each : (i + 1) * each])} for i in range(count)]


def free_port():
    """Beyond those that the system gives to connections, so that it is still free when process 0 listens on it."""
    for port in random.SystemRandom().sample(PORTS, 99):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(('127.0.0.1', port))
            return port
    raise Failure(f'99 ports between {PORTS.start} and {PORTS.stop} are all in use.')


def local_commands(options, arguments):
    if options.processes < 1:
        raise Failure(f'{options.processes} processes: give a number of 1 or more.')
    parts = device_parts(options.processes)
    if options.processes == 1:
        return [Command(training(arguments), parts[0])]
    address = f'127.0.0.1:{free_port()}'
    return [Command(training(arguments, *place(address, options.processes, i)), env) for i, env in enumerate(parts)]


def agent(file, options, command, *flags):
    """Words that run a command on a node."""
    words = [f'--workdir={options.workdir}', f'--grace_s={grace_s():g}', f'--stop_s={stop_s():g}']
    return [os.environ['PYTHON'], str(file), *words, *flags, '--', *command]


def slurm_commands(options, arguments):
    cpus = os.environ.get('SLURM_CPUS_PER_TASK')  # a step does not inherit it
    srun = ['srun', '--ntasks-per-node=1', '--kill-on-bad-exit=1', *([f'--cpus-per-task={cpus}'] if cpus else [])]
    file = pathlib.Path(__file__).absolute().with_name('agent.py')
    return [Command(srun + agent(file, options, training(arguments)), agents=True)]


def remote(options, command):
    """What the shell of another machine is given."""
    environment = ['env', 'PYTHONUNBUFFERED=1', *shlex.split(os.environ.get('REMOTE_ENV', ''))]
    words = environment + agent('launch/agent.py', options, command, '--over_ssh')
    return f'cd {shlex.quote(os.environ["REPO_DIR"])} && exec {shlex.join(words)}'


def hosts_commands(options, arguments):
    text = os.environ['HOSTS']
    hosts = text.split()
    if os.path.isfile(text):
        hosts = [
            host for line in pathlib.Path(text).read_text().splitlines() if (host := line.partition('#')[0].strip())
        ]
    if not hosts or len(set(hosts)) < len(hosts):
        raise Failure(f'HOSTS={text} names no host, or one twice: give each host once, or a file of them.')
    address = f'{hosts[0].rpartition("@")[2]}:{os.environ["PORT"]}'
    flags = [place(address, len(hosts), i) if len(hosts) > 1 else [] for i in range(len(hosts))]
    return [
        Command(['ssh', *SSH_OPTIONS, host, remote(options, training(arguments, *f))], by_stdin=True, agents=True)
        for host, f in zip(hosts, flags, strict=True)
    ]


def tpu_commands(options, arguments):
    project = os.environ.get('PROJECT')
    where = [os.environ['TPU_NAME'], f'--zone={os.environ["ZONE"]}', *([f'--project={project}'] if project else [])]
    command = remote(options, training(arguments, '--coordinator=auto'))
    words = [
        'gcloud',
        'compute',
        'tpus',
        'tpu-vm',
        'ssh',
        *where,
        '--worker=all',
        f'--command={command}',
        '--',
        *SSH_OPTIONS,
    ]
    return [Command(words, by_stdin=True, agents=True)]


COMMANDS = {'local': local_commands, 'hosts': hosts_commands, 'slurm': slurm_commands, 'tpu': tpu_commands}


def main(argv):
    at = argv.index('--')
    parser = argparse.ArgumentParser()
    parser.add_argument('mode', choices=COMMANDS)
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--processes', type=int)
    options, arguments = parser.parse_args(argv[:at]), argv[at + 1 :]
    Supervisor(lambda: COMMANDS[options.mode](options, arguments), options.workdir).run()


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (Failure, OSError) as e:
        sys.exit(f'error: {e}')
