"""Tokenizing a table in shards, in several processes.

A shard is a file with the finished documents of ROWS rows of the input, unpadded. It appears by rename, so
an interrupted command goes on from the shards that are there. What it holds depends on the input alone.
"""

import concurrent.futures
import hashlib
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

from data_gen import chat_data, documents, render
from lens.errors import LensError

ROWS = 1024  # of the input per shard
SHARDS_PER_PROCESS = 4  # fewer are done sooner without the seconds that a process takes to start
BATCH, BATCH_CHARS = 64, 1 << 19  # documents per tokenizer call; fewer when they are long
PROGRESS_S = (0.5, 20.0)  # seconds between two updates on a terminal, elsewhere
ROW_FIELDS = ('lengths', 'row', 'flags', 'digest')  # of every document of a shard


def progress(what: str, total: int) -> tqdm:
    """A bar on a terminal, cleared when done; a line now and then elsewhere."""
    interval_s = PROGRESS_S[not sys.stderr.isatty()]
    return tqdm(total=total, desc=what, unit=' rows', leave=False, mininterval=interval_s, delay=interval_s)


def write_shard(path: pathlib.Path, kept: list[tuple], counts: dict) -> None:
    """kept: (row number, ids int32 [n], role codes int8 [n], flags). counts: what happened to the others."""
    numbers, ids, roles, flags = zip(*kept, strict=True) if kept else ((), (), (), ())
    digests = [hashlib.blake2b(x.tobytes(), digest_size=16).digest() for x in ids]
    with path.with_suffix('.part').open('wb') as f:
        np.savez(
            f,
            tokens=np.concatenate([np.zeros(0, np.int32), *ids]),
            role=np.concatenate([np.zeros(0, np.int8), *roles]),
            lengths=np.array(list(map(len, ids)), np.int32),
            row=np.array(numbers, np.int64),
            flags=np.array(flags, np.int8),
            digest=np.frombuffer(b''.join(digests), np.uint64).reshape(-1, 2),
            counts=np.array(json.dumps(counts)),
        )
        f.flush()
        os.fsync(f.fileno())
    os.replace(f.name, path)


def read_rows(paths: list[pathlib.Path]) -> tuple[dict[str, np.ndarray], list[dict]]:
    """(ROW_FIELDS of all rows, with `shard`: which path a row is in; the counts of every shard)."""
    parts, counts = {name: [] for name in (*ROW_FIELDS, 'shard')}, []
    for i, path in enumerate(paths):
        with np.load(path, allow_pickle=False) as shard:
            for name in ROW_FIELDS:
                parts[name].append(shard[name])
            parts['shard'].append(np.full(len(shard['lengths']), i, np.int32))
            counts.append(json.loads(str(shard['counts'])))
    return {name: np.concatenate(x) for name, x in parts.items()}, counts


class Worker:
    """Turns stretches of tables into shards. formats: (format, column) of each table, of documents.row_format.

    effort: reasoning effort where a row names none. One is made in each process.
    """

    here = None

    def __init__(self, renderer: render.Renderer, tables: list, formats: list, min_tokens: int, effort: str):
        self.renderer, self.tables, self.formats = renderer, tables, formats
        self.min_tokens, self.effort = max(min_tokens, 1), effort

    def encode(self, number: int, path: pathlib.Path, start: int, stop: int, rows: list | None) -> int:
        """Makes the shard `path` of the rows start..stop-1 of table `number`; returns how many there were.

        rows: (row number, row), where they have been read already.
        """
        kept, dropped, batch, seen, chars = [], Counter(), [], 0, 0
        for index, row in self.tables[number].rows(start, stop) if rows is None else rows:
            seen += 1
            try:
                document = documents.parse(row, *self.formats[number], self.effort)
            except documents.BadRow as e:
                dropped[str(e)] += 1
                continue
            batch.append((index, document))
            chars += len(document)
            if len(batch) == BATCH or chars > BATCH_CHARS:
                self._flush(batch, kept, dropped)
                chars = 0
        self._flush(batch, kept, dropped)
        write_shard(path, kept, {'rows': seen, 'dropped': dropped})
        return seen

    def _flush(self, batch: list, kept: list, dropped: Counter) -> None:
        """Tokenizes and empties `batch`, [(row number, document)]."""
        for (index, _), result in zip(batch, self.renderer.encode([d for _, d in batch]), strict=True):
            if isinstance(result, documents.BadRow):
                dropped[str(result)] += 1
            elif len(result[0]) < self.min_tokens:
                dropped['short'] += 1
            else:
                kept.append((index, *result))
        batch.clear()


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


def shards(table, folder: pathlib.Path, number: int):
    """Yields (path, first row, rows or None) of every shard of a table. Parquet is read here, front to back:
    a worker would have to begin each row group anew."""
    paths = [folder / f'{number}-{i:07}.npz' for i in range(-(-len(table) // ROWS))]
    missing = [i for i, p in enumerate(paths) if not p.exists()]
    if not isinstance(table, chat_data.ParquetTable) or not missing:
        yield from ((p, i * ROWS, None) for i, p in enumerate(paths))
        return
    yield from ((p, i * ROWS, None) for i, p in enumerate(paths[: missing[0]]))
    stream = table.rows(missing[0] * ROWS)
    for i in range(missing[0], len(paths)):
        yield paths[i], i * ROWS, [row for _, row in zip(range(ROWS), stream, strict=False)]


def encode_all(worker: Worker, folder: pathlib.Path, num_proc: int) -> list[list[pathlib.Path]]:
    """Makes every shard that is not there yet, in `num_proc` processes; the paths by table."""
    bar = progress('Tokenizing', sum(map(len, worker.tables)))
    paths, waiting = [[] for _ in worker.tables], set()
    pool, count = None, -(-sum(map(len, worker.tables)) // ROWS)
    num_proc = min(num_proc, -(-count // SHARDS_PER_PROCESS))
    if num_proc > 1:
        pool = concurrent.futures.ProcessPoolExecutor(num_proc, multiprocessing.get_context('spawn'), _start, (worker,))
    try:
        for number, table in enumerate(worker.tables):
            for path, start, rows in shards(table, folder, number):
                paths[number].append(path)
                if path.exists():
                    bar.initial += min(ROWS, len(table) - start)  # of an interrupted command, no part of the rate
                    bar.update(min(ROWS, len(table) - start))
                elif pool is None:
                    bar.update(worker.encode(number, path, start, start + ROWS, rows))
                else:
                    waiting.add(pool.submit(_encode, number, path, start, start + ROWS, rows))
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
