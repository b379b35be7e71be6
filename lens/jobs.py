"""Work in steps for the clients of a server: one thread does all of it, a step of each in turn.

The thread alone touches what steps use, a model and its tokenizer. What has not begun comes first: bad input is refused,
and small work is done, while long work of others goes on. Who has gone away is left out before the next step.
"""

import asyncio
import contextlib
import itertools
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any

from lens.errors import LensError

BROKEN = 'This is a fault of the program: what it says is in the terminal of the server.'


class Full(LensError):
    """There is no place for more work."""


class Job:
    """Work of one client: iterate over what its steps give, in the loop of the client, once.

    A LensError of a step is raised there; of any other exception, which is printed, a RuntimeError.
    """

    def __init__(self, steps: Iterator[Any]):
        self.steps, self.cancelled = steps, False
        self._loop, self._given = asyncio.get_running_loop(), asyncio.Queue()

    def cancel(self) -> None:
        """No step is begun any more."""
        self.cancelled = True

    def give(self, value: Any) -> None:
        """Hands a value to the client, if there is one. StopIteration ends it, other exceptions are raised."""
        if value is None:
            return
        with contextlib.suppress(RuntimeError):  # its loop is closed
            self._loop.call_soon_threadsafe(self._given.put_nowait, value)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while not isinstance(value := await self._given.get(), StopIteration):
            if isinstance(value, Exception):
                raise value
            yield value


class Worker:
    """The thread. most: jobs that wait or run at a time."""

    def __init__(self, most: int):
        self.most, self.count = most, 0
        self._turn, self._lock, self._number = queue.PriorityQueue(), threading.Lock(), itertools.count()
        self._thread = threading.Thread(target=self._work, name='worker', daemon=True)
        self._thread.start()

    def submit(self, steps: Iterator[Any]) -> Job:
        """Takes work in, from the loop of its client. Raises Full."""
        with self._lock:
            if self.count >= self.most:
                raise Full(f'{self.most} requests are waiting already: come back in some seconds.')
            self.count += 1
        job = Job(steps)
        self._turn.put((1, next(self._number), job))
        return job

    def close(self) -> None:
        """Ends the thread after its present step; work that is left is dropped."""
        self._turn.put((0, next(self._number), None))
        self._thread.join()

    def _work(self) -> None:
        while (job := self._turn.get()[-1]) is not None:
            value, more = self._step(job)
            if more:
                self._turn.put((2, next(self._number), job))
            else:  # before the client hears of it: its next request has a place
                with self._lock:
                    self.count -= 1
            job.give(value)

    def _step(self, job: Job) -> tuple[Any, bool]:
        """What the client gets, and whether there may be more of the job to do."""
        try:
            if job.cancelled:
                job.steps.close()
                return None, False
            return next(job.steps), True
        except (StopIteration, LensError) as e:
            return e, False
        except Exception:
            traceback.print_exc()
            return RuntimeError(BROKEN), False
