"""Tokenizing tables in shards, in several processes.

A shard is a file with the finished documents of ROWS rows of the input, unpadded. It appears by rename, so
an interrupted command goes on from the shards that are there. What it holds depends on the input alone.
"""

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import threading
from collections import Counter

import numpy as np
from tqdm import tqdm

from data_gen import documents, render
from data_gen.documents import BadRow
from lens.errors import LensError

ROWS = 1024  # of the input per shard
SHARDS_PER_PROCESS = 4  # fewer are done sooner without the seconds that a process takes to start
PROGRESS_S = (0.5, 20.0)  # seconds between two updates on a terminal, elsewhere
ROW_FIELDS = ('lengths', 'row', 'flags', 'lost', 'digest')  # of every document of a shard


def progress(what: str, total: int, done: int = 0) -> tqdm:
    """Returns a bar on a terminal, cleared when done; a line now and then elsewhere. done: rows of an earlier command."""
    interval_s = PROGRESS_S[not sys.stderr.isatty()]
    how = {'unit': ' rows', 'leave': False, 'mininterval': interval_s, 'delay': interval_s}
    return tqdm(total=total, desc=what, initial=done, **how)


def write_shard(path: pathlib.Path, kept: list[tuple], counts: dict) -> None:
    """Writes a shard. kept: (row number, fields of render.Encoded). counts: the fate of the others."""
    numbers, ids, roles, flags, lost = zip(*kept, strict=True) if kept else [()] * 5
    with path.with_suffix('.part').open('wb') as f:
        np.savez(
            f,
            tokens=np.concatenate([np.zeros(0, np.int32), *ids]),
            role=np.concatenate([np.zeros(0, np.int8), *roles]),
            lengths=np.array(list(map(len, ids)), np.int32),
            row=np.array(numbers, np.int64),
            flags=np.array(flags, np.int8),
            lost=np.array(lost, np.int32).reshape(-1, len(render.LOST)),
            digest=np.array([hashlib.blake2b(x.tobytes(), digest_size=16).digest() for x in ids], 'S16'),
            counts=np.array(json.dumps(counts)),
        )
        f.flush()
        os.fsync(f.fileno())
    os.replace(f.name, path)


def read_rows(paths: list[pathlib.Path]) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Returns (ROW_FIELDS of all rows, with `shard`: which path a row is in; the counts of every shard)."""
    parts, counts = {name: [] for name in (*ROW_FIELDS, 'shard')}, []
    for i, path in enumerate(paths):
        with np.load(path, allow_pickle=False) as shard:
            for name in ROW_FIELDS:
                parts[name].append(shard[name])
            parts['shard'].append(np.full(len(shard['lengths']), i, np.int32))
            counts.append(json.loads(str(shard['counts'])))
    return {name: np.concatenate(x) for name, x in parts.items()}, counts


class Worker:
    """Turns rows into shards; there is one in each process.

    formats: (format, columns) of each table, of documents.row_format. effort: reasoning effort where a row names none.
    """

    here = None

    def __init__(self, renderer: render.Renderer, formats: list, min_tokens: int, effort: str):
        self.renderer, self.formats, self.min_tokens, self.effort = renderer, formats, max(min_tokens, 1), effort

    def encode(self, number: int, path: pathlib.Path, rows: list[tuple[int, dict | None]]) -> int:
        """Makes the shard `path` of `rows` of table `number`; returns how many they are."""
        kept, dropped = [], Counter()
        for index, row in rows:
            try:
                document = documents.parse(row, *self.formats[number], self.effort)
                encoded = self.renderer.encode(document)
                if len(encoded.ids) < self.min_tokens:
                    raise BadRow('short')
                kept.append((index, *encoded))
            except BadRow as e:
                dropped[str(e)] += 1
        write_shard(path, kept, {'dropped': dropped})
        return len(rows)


def _start(worker: Worker) -> None:
    """In a new process, which ends with the one that started it."""
    parent = multiprocessing.parent_process()
    threading.Thread(
        target=lambda: (multiprocessing.connection.wait([parent.sentinel]), os._exit(1)), daemon=True
    ).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    Worker.here = worker


def _encode(*args) -> int:
    return Worker.here.encode(*args)


def _missing(tables: list, paths: list[list[pathlib.Path]]):
    """Yields (number of the table, path, rows) of the shards that are not there. A table is read once, front to back."""
    for number, table in enumerate(tables):
        first = next((i for i, p in enumerate(paths[number]) if not p.exists()), len(paths[number]))
        stream = table.rows(first * ROWS)
        for path in paths[number][first:]:
            rows = list(itertools.islice(stream, ROWS))
            if not path.exists():
                yield number, path, rows


def encode_all(worker: Worker, tables: list, folder: pathlib.Path, num_proc: int) -> list[list[pathlib.Path]]:
    """Makes every shard that is not there yet, in `num_proc` processes; returns the paths by table."""
    paths = [[folder / f'{n}-{i:07}.npz' for i in range(-(-t.count // ROWS))] for n, t in enumerate(tables)]
    sizes = {p: min(ROWS, t.count - i * ROWS) for t, of in zip(tables, paths, strict=True) for i, p in enumerate(of)}
    bar = progress('Tokenizing', sum(sizes.values()), sum(n for p, n in sizes.items() if p.exists()))
    pool, waiting = None, set()
    num_proc = min(num_proc, -(-len(sizes) // SHARDS_PER_PROCESS))
    if num_proc > 1:
        pool = concurrent.futures.ProcessPoolExecutor(num_proc, multiprocessing.get_context('spawn'), _start, (worker,))
    try:
        for job in _missing(tables, paths):
            if pool is None:
                bar.update(worker.encode(*job))
                continue
            waiting.add(pool.submit(_encode, *job))
            if len(waiting) > num_proc:
                _collect(waiting, bar)
        while waiting:
            _collect(waiting, bar)
    except concurrent.futures.BrokenExecutor:
        raise LensError(
            'A worker process was killed: give the same command with a smaller --num_proc, it goes on where it was.'
        ) from None
    finally:
        bar.close()
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)
    return paths


def _collect(waiting: set, bar: tqdm) -> None:
    done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
    waiting -= done
    for future in done:
        bar.update(future.result())
