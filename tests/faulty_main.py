"""What the launchers take for Python in tests/test_processes.py: lens.main, whose process 1 ends its starts one after the
other by a LensError when the processes have met, by SIGKILL and by SIGUSR1 at step 5, and works then.

python -m tests.faulty_main -m lens.main ARGUMENTS, with FAULTY_WORKDIR in the environment
"""

import os
import pathlib
import runpy
import signal
import sys
import time

import jax

from lens import distributed, signals
from lens.errors import LensError

STEP, SAVED = 5, 3
WORKDIR = pathlib.Path(os.environ['FAULTY_WORKDIR'])


START = len(list(WORKDIR.glob('start-*')))


class Stop(signals.Stop):
    def asked(self, step: int) -> bool:
        if step == STEP and START in (1, 2):
            while not (WORKDIR / 'checkpoints' / str(SAVED)).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL if START == 1 else signal.SIGUSR1)
        if step >= STEP and START == 2:
            time.sleep(1)  # the processes agree in the background on the step to stop after
        return super().asked(step)


def meet_and_fail(*place):
    JOIN(*place)
    jax.devices()
    raise LensError('process 1 has failed')


if __name__ == '__main__':
    del sys.argv[0:2]
    if '--process_id=1' in sys.argv:
        (WORKDIR / f'start-{START}').touch()
        JOIN, signals.Stop = distributed.initialize, Stop
        if START == 0:
            distributed.initialize = meet_and_fail
    runpy.run_module('lens.main', run_name='__main__', alter_sys=True)
