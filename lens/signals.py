"""How a signal ends a run: at once where that costs nothing, while it trains after a save."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar('T')

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
OF_TERMINALS = (signal.SIGHUP, signal.SIGINT)  # nohup and a shell's `&` ignore them, and mean it
LAST_WORDS_S = 1.0  # for what it has still to tell
SHOW_CURSOR = '\r\x1b[K\x1b[?25h'  # the bar hides it


class GivenUp(BaseException):
    """A signal came in work that is done again anyway. No library is to catch it."""


class Stop:
    """Within it signals are heeded. Before `begin` and after `saved` they end the process with one sentence and code
    128 + number, also while it reads, compiles or waits for a device; between the two `asked` tells, and only a second
    Ctrl-C ends it at once.

    JAX spreads a SIGTERM that reaches one of several processes that have joined, and takes the signal for itself then:
    `asked` tells all of them after the same step.
    """

    name = ''  # of the signal that has come

    def __init__(self):
        self._where, self._trains, self._may_give_up = 'before the first step', False, False

    def __enter__(self):
        self._before = {s: signal.getsignal(s) for s in SIGNALS + OF_TERMINALS}
        for s, before in self._before.items():
            if s in SIGNALS or before != signal.SIG_IGN:
                signal.signal(s, self._note)
        # Python runs a handler between two of its instructions, which may be minutes apart; this pipe hears it at once
        end, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(end,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc):
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._pipe)
        self._thread.join(LAST_WORDS_S)
        for s, before in self._before.items():  # a second signal must not end a process that has just saved
            signal.signal(s, signal.SIG_IGN if self.name and s in SIGNALS else before)

    def begin(self) -> None:
        """Says that from now on there are steps to save."""
        self._trains = True

    def saved(self) -> None:
        """Says that all steps are saved."""
        self._where, self._trains = 'after the last step, whose weights are saved', False

    def asked(self, step: int) -> bool:
        """Returns whether to stop after `step`. Call it once for each step."""
        if _joined():
            from jax.experimental import multihost_utils  # signals count before JAX is imported

            if multihost_utils.reached_preemption_sync_point(step):
                self.name = 'SIGTERM'
        return bool(self.name)

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Returns work(), which is done again anyway; None where a signal has come, or comes meanwhile to a process
        that is alone."""
        self._may_give_up = not _joined()
        try:
            return None if self.name else work()
        except GivenUp:
            return None
        finally:
            self._may_give_up = False

    def _note(self, number: int, frame) -> None:
        if self._trains and not _joined():
            self.name = signal.Signals(number).name
            if self._may_give_up:
                raise GivenUp

    def _watch(self, end: int) -> None:
        """Hears signals in a thread of its own until the pipe is closed."""
        interrupted = False
        while heard := os.read(end, 1):
            if (number := heard[0]) not in self._before:
                continue
            again, interrupted = interrupted and number == signal.SIGINT, interrupted or number == signal.SIGINT
            if again or not (self._trains or _joined()):
                _end(number, 'at once' if again else self._where)
            if _joined() and number != signal.SIGTERM:
                os.kill(os.getpid(), signal.SIGTERM)
            if number == signal.SIGINT:
                _tell('Ctrl-C: the step is finished and saved first; a second one ends it at once.')
        os.close(end)


def _joined() -> bool:
    """Whether JAX has joined this process with others."""
    return getattr(sys.modules.get('jax.distributed'), 'is_initialized', bool)()


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be there any more
        os.write(2, f'{SHOW_CURSOR if os.isatty(2) else ""}{text}\n'.encode())


def _end(number: int, where: str) -> NoReturn:
    name = signal.Signals(number).name
    _tell(f'Stopped by {name} {where}: the same command goes on from the last checkpoint, if there is one.')
    os._exit(128 + number)
