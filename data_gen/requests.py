"""One engine for all that is asked of servers: a window of requests, a journal of answers, progress, signals.

What is asked and what becomes of an answer is the front end's: a `Work`. Everything that is not waiting for a server
(reading rows, tokenizing, writing lines) happens in one thread, one thing at a time.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import os
import signal
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lens.errors import LensError, shown

from .journal import Journal
from .servers import Answer, Failed, Servers, say

PAUSE_S = 0.5  # after a request without an answer
SYNC_EVERY_S = 0.5
LINE_EVERY_S = 10.0  # of progress where there is no terminal
LOCAL = 'http://localhost:8000/v1'


def api_key(variable: str) -> str | None:
    """Returns the API key that an environment variable holds; None for no variable. Raises LensError."""
    key = os.environ.get(variable, '').strip()
    if variable and not (key and key.isascii() and key.isprintable()):
        raise LensError(f'--api_key_env={shown(variable)}: this environment variable holds no API key.')
    return key or None


@dataclasses.dataclass(frozen=True)
class Request:
    """A job and what is sent for it. most: what it can cost at most."""

    job: object
    body: dict
    most: float = 0.0


END = Request(None, {})


class Work(Protocol):
    """What a front end does. No two of its methods run at the same time; all may raise LensError, which ends the run."""

    journal: Journal
    unit: str  # what the journal counts
    total: int  # of them

    def next(self) -> Request | None:
        """Returns the next request, None for a job without one, END after the last; the journal is open by then."""

    def take(self, request: Request, answer: Answer) -> bool:
        """Writes what an answer is; returns whether the job is closed. Raises Failed where it is as good as none."""

    def give_up(self, request: Request, attempts: int, e: Failed) -> None:
        """Writes that a server refused, or that none has answered."""

    def progress(self) -> str:
        """Says what is there now, for the sentence about a run that was stopped."""


class Display:
    """A bar on a terminal, a line now and then elsewhere: jobs, tokens per second of each server, time left."""

    def __init__(self, work: Work):
        self._work, self._began, self._begun_with = work, time.monotonic(), work.journal.done()
        self._console, self._line_at = Console(), self._began + LINE_EVERY_S
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[text]}', markup=False))
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task('', total=work.total, text='')

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *exc):
        self._bar.stop()

    def update(self, servers: Servers, last: bool = False) -> None:
        from lens.logger import clock  # with JAX, which --help needs not

        work, done, now = self._work, self._work.journal.done(), time.monotonic()
        new = done - self._begun_with
        left = clock((work.total - done) * (now - self._began) / new) if new else '?'
        text = ', '.join(f'{s.label} {s.speed():.0f} tok/s' for s in servers.all.values())
        text += ''.join(f'  {n} {k}' for k, n in work.journal.counts.items() if k != 'data' and n) + f'  ETA {left}'
        self._bar.update(self._task, completed=done, text=text)
        if not self._console.is_terminal and (last or now >= self._line_at):
            self._line_at = now + LINE_EVERY_S
            say(f'{done}/{work.total} {work.unit}  {text}')


class Engine:
    """Asks `servers` for what `work` wants, `window` requests at a time, and never for more than max_cost (0: no limit)."""

    def __init__(self, work: Work, servers: Servers, window: int, max_cost: float = 0.0):
        self._work, self._servers, self._display = work, servers, Display(work)
        self._window, self._max_cost, self._thread = window, max_cost, concurrent.futures.ThreadPoolExecutor(1)
        self._in_flight, self._reserved = 0, 0.0

    def run(self) -> None:
        """Runs to the end. Raises LensError; what was answered until then is in the journal."""
        with self._display:
            asyncio.run(self._main())

    async def _main(self) -> None:
        stopped, task, loop = [], asyncio.current_task(), asyncio.get_running_loop()
        for s in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(s, lambda s=s: (stopped.append(s.name), task.cancel()))
        try:
            async with self._servers:
                await self._servers.start()
                self._work.journal.open()
                await self._all()
                self._display.update(self._servers, last=True)
        except asyncio.CancelledError:
            self._thread.shutdown()  # answers that have come are written
            raise LensError(
                f'Stopped by {" ".join(stopped)} with {self._work.progress()}: {self._work.journal.again} goes on.'
            ) from None
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            self._thread.shutdown()

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(self._servers.watch()), group.create_task(self._refresh())]
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._window):
                    workers.create_task(self._worker())
            for task in background:
                task.cancel()

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(SYNC_EVERY_S)
            await asyncio.to_thread(self._work.journal.sync)
            self._display.update(self._servers)

    async def _in_thread(self, function, *args):
        """What has begun comes to its end, even when the caller is cancelled."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, function, *args))

    async def _worker(self) -> None:
        while (request := await self._in_thread(self._work.next)) is not END:
            if request:
                await self._ask(request)

    async def _ask(self, request: Request) -> None:
        """Asks until the job is closed."""
        attempts, closed = 0, False
        while not closed:
            try:
                async with self._affordable(request.most):
                    answer = await self._servers.complete(request.body)
                    closed = await self._take(request, answer)
            except Failed as e:
                attempts += e.counts
                closed = bool(e.refused) or attempts >= max(3, 2 * len(self._servers.all))
                if closed:
                    await self._in_thread(self._work.give_up, request, attempts, e)
                else:
                    await asyncio.sleep(PAUSE_S)

    async def _take(self, request: Request, answer: Answer) -> bool:
        try:
            closed = await self._in_thread(self._work.take, request, answer)
        except Failed as e:
            self._servers.judge(answer, e)
            raise
        self._servers.judge(answer, None)
        return closed

    @contextlib.asynccontextmanager
    async def _affordable(self, most: float):
        """Waits until `most` cannot exceed the limit, whatever the requests under way will cost."""
        while self._max_cost and self._work.journal.cost + self._reserved + most > self._max_cost:
            if not self._in_flight:
                raise LensError(
                    f'--max_cost={self._max_cost:g} is reached: {self._work.progress()}, and the next request may '
                    f'cost {most:.2g}. Raise it to go on, or make the arrays of what is there with --finish.'
                )
            await asyncio.sleep(0.1)
        self._in_flight, self._reserved = self._in_flight + 1, self._reserved + most
        try:
            yield
        finally:
            self._in_flight, self._reserved = self._in_flight - 1, self._reserved - most


def _first(e: BaseException) -> BaseException:
    """The error that ended a group of tasks."""
    while isinstance(e, BaseExceptionGroup):
        e = e.exceptions[0]
    return e
