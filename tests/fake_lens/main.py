"""Plays lens.main for the launchers: processes that take steps together, save, stop and die when told.

--fault=KIND:I:K (several, separated by commas): process I, at the third step of its start K, from 0, does KIND:
    kill     ends itself by SIGKILL
    abort    by SIGABRT
    error    says a sentence and ends with code 1
    broken   ends with code 70
    hang     takes no further step, deaf to SIGTERM
    late     when all have stopped, ends by the signal, as one that it reaches late
--imports_s=S: only after S seconds are signals handled. --endless=K: start K ends by a signal alone. A checkpoint comes
every --save_every steps, 2 by default. A step begins when all processes have ended the one before: those of a dead one
hang, deaf to SIGTERM. WORKDIR/starts-I has a line with arguments, process id and some of the environment for each start.
"""

import json
import os
import pathlib
import signal
import sys
import time

FAULT_STEP, STEP_S = 3, 0.008
TOLD = ('CUDA_VISIBLE_DEVICES', 'SLURMD_NODENAME', 'NOTE')


def say(text):
    # one write, so that lines of several processes stay whole
    print(f'{text}\n', end='', flush=True)


def option(name, default=None):
    return next((a.split('=', 1)[1] for a in sys.argv[1:] if a.startswith(f'--{name}=')), default)


def place():
    """(index, count)"""
    if option('coordinator') == 'auto':
        index, count = os.environ['FAKE_TPU'].split()
    elif option('coordinator'):
        index, count = option('process_id'), option('num_processes')
    else:
        index, count = os.environ.get('SLURM_PROCID', 0), os.environ.get('SLURM_NTASKS', 1)
    return int(index), int(count)


def main():
    if option('imports_s'):
        say('importing')
        time.sleep(float(option('imports_s')))
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, _: asked.append(n))
    (index, count), workdir = place(), pathlib.Path(option('workdir'))
    checkpoints = workdir / 'checkpoints'
    checkpoints.mkdir(parents=True, exist_ok=True)
    starts = workdir / f'starts-{index}'
    start = len(starts.read_text().splitlines()) if starts.exists() else 0
    with starts.open('a') as f:
        line = {
            'arguments': sys.argv[1:],
            'pid': os.getpid(),
            'environment': {k: os.environ[k] for k in TOLD if k in os.environ},
        }
        print(json.dumps(line), file=f)
    meeting = workdir / 'meetings' / str(start)
    meeting.mkdir(parents=True, exist_ok=True)
    step = max((int(p.name) for p in checkpoints.iterdir()), default=0)
    every = int(option('save_every', '2'))
    last = step + FAULT_STEP
    say(f'process {index} of {count} begins at step {step}')
    while step < int(option('steps', '12')) or option('endless') == str(start):
        step += 1
        for kind, i, k in (f.split(':') for f in option('fault', '').split(',') if f):
            if step == last and (int(i), int(k)) == (index, start):
                if kind in ('kill', 'abort'):
                    os.kill(os.getpid(), signal.SIGKILL if kind == 'kill' else signal.SIGABRT)
                elif kind == 'broken':
                    sys.exit(70)
                elif kind == 'error':
                    sys.exit(f'error: step {step} is not possible.')
                while kind == 'hang':
                    time.sleep(1)
        new = meeting / f'{step}-{index}.new'
        new.write_text(str(asked[0] if asked else 0))
        new.rename(new.with_suffix(''))
        met = [meeting / f'{step}-{i}' for i in range(count)]
        while not all(p.exists() for p in met):  # as a collective: for ever when another has died
            time.sleep(STEP_S / 4)
        stop = max(int(p.read_text()) for p in met)
        if index == 0 and (stop or step % every == 0):
            (checkpoints / str(step)).mkdir(exist_ok=True)
        if stop:
            for number in (signal.SIGTERM, signal.SIGUSR1):  # as lens.signals does: one that comes late ends nothing
                signal.signal(number, signal.SIG_IGN)
            say(f'Stopped at step {step} by {signal.Signals(stop).name}')
            if f'late:{index}:{start}' in option('fault', ''):
                signal.signal(stop, signal.SIG_DFL)
                os.kill(os.getpid(), stop)
            return
        time.sleep(STEP_S)
    if index == 0:
        (workdir / 'summary.json').write_text('{}')


if __name__ == '__main__':
    main()
