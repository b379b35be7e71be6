"""The batches of a long evaluation: what each gave stays in a folder, so that a killed one goes on; how far it is."""

import contextlib
import json
import os
import pathlib
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from lens import files
from lens.logger import SILENCE_S, clock

DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile)


class Batches(Protocol):
    """Gives what compute() gives for batch i of a stage: nested dicts of arrays, or one array."""

    def __call__(self, stage: str, i: int, compute: Callable[[], Any]) -> Any: ...


def at_once(stage: str, i: int, compute: Callable[[], Any]) -> Any:
    """Computes each batch and keeps nothing."""
    del stage, i
    return compute()


def _flat(tree, name: str = '') -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        return {name: np.asarray(tree)}
    return {k: x for key, part in tree.items() for k, x in _flat(part, f'{name}/{key}').items()}


def _nested(flat: Mapping[str, np.ndarray]):
    if '' in flat:
        return flat['']
    out = {}
    for name, x in flat.items():
        *above, last = name.split('/')[1:]
        at = out
        for key in above:
            at = at.setdefault(key, {})
        at[last] = x
    return out


class Kept:
    """Batches in a folder, one file each, and a bar; `open` makes it. work: of a batch of each stage, in any unit;
    count: batches of each."""

    def __init__(self, folder: pathlib.Path, work: Mapping[str, float], count: int, console: Console):
        self._folder, self._work, self._count, self._console = folder, work, count, console
        self._total = sum(work.values()) * count
        self._done = self._computed = 0.0
        self._began = self._said = time.monotonic()
        columns = (
            TextColumn('{task.description:14}'),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn('{task.fields[text]}'),
        )
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self.bar.add_task('Evaluating', total=self._total, text='')

    def __call__(self, stage: str, i: int, compute: Callable[[], Any]) -> Any:
        path = self._folder / f'{stage}-{i}.npz'
        with contextlib.suppress(*DAMAGED), np.load(path, allow_pickle=False) as found:
            out = _nested(dict(found))
            self._tell(stage, i, 0.0)
            return out
        out = compute()
        tmp = path.with_suffix('.tmp')
        with tmp.open('wb') as file:
            np.savez(file, **_flat(out))
        os.replace(tmp, path)
        self._tell(stage, i, self._work.get(stage, 0.0))
        return out

    def _tell(self, stage: str, i: int, computed: float) -> None:
        """Moves the bar on; where there is no terminal, says a line every SILENCE_S."""
        now, what = time.monotonic(), stage.replace('_', ' ')
        self._done += self._work.get(stage, 0.0)
        self._computed += computed
        text = ''
        if self._computed:
            text = f'ETA {clock((now - self._began) / self._computed * (self._total - self._done))}'
        self.bar.update(self._task, completed=self._done, description=what, text=text)
        if not self._console.is_terminal and now - self._said >= SILENCE_S:
            self._said = now
            share = 100 * self._done / self._total
            self._console.print(
                f'{share:3.0f}%  {what}, batch {i + 1} of {self._count}  {text}', markup=False, soft_wrap=True
            )


@contextlib.contextmanager
def opened(
    folder: pathlib.Path, key: dict, work: Mapping[str, float], count: int, console: Console | None = None
) -> Iterator[Kept]:
    """Yields the batches of one evaluation, those that are there with the same `key` included; the folder goes at the end,
    and stays where the body fails. Raises LensError where another process has it."""
    console = console or Console(highlight=False)
    folder.mkdir(exist_ok=True)
    with files.lock(folder / 'lock', f'the evaluation in {folder.parent}', 'wait for it, or stop it'):
        stored, mine = folder / 'key.json', json.dumps(key, sort_keys=True)
        if not (stored.is_file() and stored.read_text() == mine):
            for path in folder.glob('*-*.npz'):
                path.unlink()
            files.write_text(stored, mine)
        elif done := len(list(folder.glob('*-*.npz'))):
            console.print(f'Going on: {done} batches of this evaluation are in {folder}', markup=False, soft_wrap=True)
        kept = Kept(folder, work, count, console)
        with kept.bar:
            yield kept
        shutil.rmtree(folder)
