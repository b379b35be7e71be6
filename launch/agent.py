"""What srun, ssh and gcloud run on a node: agent.py --workdir=DIR --grace_s=G --stop_s=S [--over_ssh] -- COMMAND

An agent passes signals on to its command and says at the end how that went, in a line that supervise.py reads out of
the output. --over_ssh, where no signals arrive: the command gets SIGTERM when the standard input ends, and SIGKILL S
seconds later, or G seconds after the connection is gone; and what an earlier agent left on this machine is ended first.

Exit code: that of the command, 128 + signal where one ended it.
"""

import argparse
import contextlib
import fcntl
import hashlib
import math
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time

POLL_S = 0.05
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REPORT = re.compile(rb'lens agent on (\S+): ended with code (\d+), newest checkpoint (-?\d+)')


class Failure(Exception):
    """What the user is told in one sentence."""


def say(text):
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f'{text}\n', end='', flush=True)  # one write, so that lines of several processes stay whole


def newest_checkpoint(workdir):
    """The step of the newest checkpoint, -1 where there is none."""
    try:
        return max(
            (int(p.name) for p in (pathlib.Path(workdir) / 'checkpoints').iterdir() if p.name.isdigit()), default=-1
        )
    except OSError:
        return -1


def catch_signals():
    """A list to which signals that ask for a stop will be added."""
    received = []
    for number in STOPS:
        signal.signal(number, lambda n, _: received.append(n))
    return received


def passed_on(number):
    """The signal that a training process gets in the place of one of STOPS."""
    return number if number == signal.SIGUSR1 else signal.SIGTERM


def signal_group(popen, number):
    # a group that has ended, or does not exist yet
    with contextlib.suppress(ProcessLookupError):
        os.killpg(popen.pid, number)


def start(argv, **options):
    """A process in a session of its own, that gets SIGTERM when this one is killed."""
    return subprocess.Popen(['setpriv', '--pdeathsig', 'TERM', *argv], start_new_session=True, **options)


def exit_code(popen):
    """As a shell says it, 128 + signal; None while the process runs."""
    code = popen.poll()
    return 128 - code if code is not None and code < 0 else code


def take_lock(workdir, grace_s):
    """A lock that this machine has once for each workdir, as a file descriptor for the command to inherit.

    Who holds it was left by a connection that was lost: the group whose id is in the file is ended first.
    """
    name = hashlib.sha256(os.path.abspath(workdir).encode()).hexdigest()[:16]
    file = os.path.join(tempfile.gettempdir(), f'lens-agent-{os.getuid()}-{name}')
    lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number and (holder := os.pread(lock, 32, 0)):
            say(f'{number.name} to process group {holder.decode()}, left by an earlier start')
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(holder), number)
        last = time.monotonic() + (grace_s if number else 0)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(lock, 0)
                return lock
            except BlockingIOError:
                if time.monotonic() > last:
                    break
            time.sleep(POLL_S)
    raise Failure(f'{socket.gethostname()} still runs an earlier start in {workdir}, which SIGKILL does not end.')


def input_ended():
    """Waits POLL_S for the end of the standard input."""
    return bool(select.select([0], [], [], POLL_S)[0]) and not os.read(0, 4096)


def output_gone():
    """Whether nobody reads the standard output any more."""
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


def run(options, command):
    """Runs a command to its end, and returns its exit code."""
    received, lock = catch_signals(), None
    if options.over_ssh:
        lock = take_lock(options.workdir, options.grace_s)
    popen = start(command, stdin=subprocess.DEVNULL, pass_fds=[lock] if lock else [])
    if lock:
        os.pwrite(lock, str(popen.pid).encode(), 0)
    asked, lost, last = not options.over_ssh, not options.over_ssh, math.inf
    while (code := exit_code(popen)) is None:
        while received:
            signal_group(popen, passed_on(received.pop(0)))
        if asked:
            time.sleep(POLL_S)
        elif input_ended():
            asked, last = True, time.monotonic() + options.stop_s
            signal_group(popen, signal.SIGTERM)
        if not lost and output_gone():
            lost, last = True, min(last, time.monotonic() + options.grace_s)
        if time.monotonic() > last:
            signal_group(popen, signal.SIGKILL)
    newest = newest_checkpoint(options.workdir)
    say(f'lens agent on {socket.gethostname()}: ended with code {code}, newest checkpoint {newest}')  # see REPORT
    return code


def main(argv):
    at = argv.index('--')
    parser = argparse.ArgumentParser()
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--grace_s', type=float, required=True)
    parser.add_argument('--stop_s', type=float, required=True)
    parser.add_argument('--over_ssh', action='store_true')
    return run(parser.parse_args(argv[:at]), argv[at + 1 :])


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except (Failure, OSError) as e:
        sys.exit(f'error: {e}')
