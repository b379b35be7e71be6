"""The files of a generation run: append-only JSON lines that survive a kill, and the finished data set.

data.jsonl, rejected.jsonl, failed.jsonl and skipped.jsonl grow while the run lasts; a row is in one of them at
most. finalise() writes the rows of data.jsonl, ordered by index, to parquet/ and dataset/.
"""

import contextlib
import json
import os
import pathlib
import shutil
import threading

import numpy as np

from data_gen import locks
from lens.errors import LensError
from lens.files import write_json

KINDS = ('data', 'rejected', 'failed', 'skipped')
LENGTHS = ('original_prompt_tokens', 'prompt_tokens_with_system', 'thinking_tokens', 'content_tokens')
PLACE = 'partial_jsonl'  # key of settings.json: another place of data.jsonl, or ''
REMEDY = 'remove it to continue with the options given now'  # where settings.json is damaged
BATCH = 1000  # rows that are in memory at a time


def cannot_write(path, e: OSError) -> LensError:
    return LensError(
        f'{path} cannot be written ({e.strerror or e}): free space or choose another place; --resume goes on.'
    )


def check_folder(folder: pathlib.Path) -> None:
    """Raises LensError where the folder cannot be made, before anything is."""
    at = folder.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        raise LensError(f'{folder} cannot be written: {at} is {"not writable" if at.is_dir() else "no folder"}.')


def _read_settings(path: pathlib.Path, remedy: str) -> dict | None:
    """The JSON object at `path`; None where there is no file. Raises LensError, with the remedy, where it is damaged."""
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text())
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise LensError(f'{path} is damaged: {remedy}.')
    return settings


def changed_setting(path: pathlib.Path, settings: dict, remedy: str) -> tuple[str, object] | None:
    """(key, value in the file) of the first of `settings` that the JSON file at `path` has otherwise.

    None where all agree or there is no file. Raises LensError, with the remedy, where it is damaged.
    """
    before = _read_settings(path, remedy)
    if before is None:
        return None
    return next(((k, before.get(k)) for k, v in settings.items() if before.get(k) != v), None)


def _filled(path: pathlib.Path) -> bool:
    return path.exists() and path.stat().st_size > 0


class Journal:
    """Appends records; knows which of `rows` input rows are finished. One process at a time may hold it.

    data: another place of data.jsonl; settings.json remembers it. offset[index]: where the record begins there, or -1.
    """

    def __init__(self, folder: pathlib.Path, data: pathlib.Path | None, rows: int, settings: dict, resume: bool):
        """Only reads, unless it resumes. Raises LensError."""
        self.folder, self._settings = folder, settings
        self._settings_file, default = folder / 'settings.json', folder / 'data.jsonl'
        before = self._place_before()
        if resume and before:
            data = self._same_place(before, data)
        self.paths = {k: folder / f'{k}.jsonl' for k in KINDS} | {'data': data or default}
        elsewhere = self.paths['data'].resolve() != default.resolve()
        self._place = str(self.paths['data'].absolute()) if elsewhere else ''
        self.offset = np.full(rows, -1, np.int64)
        self._other = bytearray(rows)  # 1: rejected or skipped
        self.counts = dict.fromkeys(KINDS, 0)
        self._files, self._sizes, self._lock = {}, {}, threading.Lock()
        for path in (folder, self.paths['data'].parent):
            check_folder(path)
        existing = [p for p in (before, *self.paths.values()) if p and _filled(p)]
        if existing and not resume:
            raise LensError(f'{existing[0]} exists: add --resume to continue it, or choose another --output_path.')
        if existing:
            self._compare_settings()
            self.open()

    def _place_before(self) -> pathlib.Path | None:
        """Where this folder's data.jsonl was until now; None where there was none."""
        default, before = self.folder / 'data.jsonl', _read_settings(self._settings_file, REMEDY) or {}
        if PLACE in before:
            return pathlib.Path(str(before[PLACE]) or default)
        return default if _filled(default) else None

    def _same_place(self, before: pathlib.Path, given: pathlib.Path | None) -> pathlib.Path:
        """`before`. Raises LensError where another place is given, or where nothing is there."""
        if given and given.resolve() != before.resolve():
            raise LensError(
                f'The finished lines are in {before}, --{PLACE} names {given}: resume with the former, or choose another '
                '--output_path.'
            )
        if before != self.folder / 'data.jsonl' and not before.exists():
            raise LensError(
                f'The finished lines are in {before}, which is not there: put it back, or remove {self._settings_file} to '
                'begin anew.'
            )
        return before

    def _compare_settings(self) -> None:
        path = self._settings_file
        changed = changed_setting(path, self._settings, REMEDY)
        if changed:
            key, before = changed
            raise LensError(
                f'{path} says {key} {before!r}, this run {self._settings[key]!r}: resume with what it was begun with, or '
                'choose another --output_path.'
            )

    def open(self) -> None:
        """Makes or takes over the files; mends torn last lines. Raises LensError."""
        if self._files:
            return
        path = self.folder
        try:
            for path in (self.folder, self.paths['data'].parent):
                path.mkdir(parents=True, exist_ok=True)
            for kind, path in self.paths.items():
                self._files[kind] = path.open('ab', buffering=0)
                locks.take(self._files[kind], f'Another generation is writing {path}: wait for its end or stop it.')
            path = self.paths['failed']
            self._files['failed'].truncate(0)  # failed rows are tried again
            for kind in KINDS:
                path = self.paths[kind]
                self._sizes[kind] = self._scan(kind)
            path = self._settings_file
            write_json(path, self._settings | {PLACE: self._place})
        except OSError as e:
            raise cannot_write(path, e) from None

    def _scan(self, kind: str) -> int:
        """Notes the finished rows; returns the size of the file, whose last line is whole now."""
        at = 0
        with self.paths[kind].open('rb') as f:
            for line in f:
                index = _index(line)
                torn = not line.endswith(b'\n')
                if torn and index is None:
                    os.truncate(self.paths[kind], at)
                    break
                if index is not None:
                    self._note(kind, index, at)
                at += len(line)
                if torn:  # only the end of the line is missing
                    self._write(kind, b'\n')
                    return at + 1
        return at

    def _note(self, kind: str, index: int, at: int) -> bool:
        """False where the row is finished already."""
        if index >= len(self.offset) or self.finished(index):
            return False
        if kind == 'data':
            self.offset[index] = at
        else:
            self._other[index] = kind != 'failed'
        self.counts[kind] += 1
        return True

    def finished(self, index: int) -> bool:
        return self.offset[index] >= 0 or bool(self._other[index])

    def unfinished(self) -> np.ndarray:
        return np.flatnonzero((self.offset < 0) & (np.frombuffer(self._other, np.uint8) == 0))

    def _write(self, kind: str, block: bytes) -> None:
        view = memoryview(block)
        while view:
            view = view[self._files[kind].write(view) :]

    def append(self, batch: list[tuple[str, dict]]) -> None:
        """(kind, record) pairs, on disk when it returns. Raises LensError; then the files end in a whole line."""
        with self._lock:
            for kind in KINDS:
                lines, at = [], self._sizes[kind]
                for record in (r for k, r in batch if k == kind):
                    line = (json.dumps(record, ensure_ascii=False) + '\n').encode('utf-8', 'replace')
                    if self._note(kind, record['index'], at):
                        lines.append(line)
                        at += len(line)
                if not lines:
                    continue
                try:
                    self._write(kind, b''.join(lines))
                    os.fsync(self._files[kind].fileno())
                except OSError as e:
                    with contextlib.suppress(OSError):
                        os.truncate(self.paths[kind], self._sizes[kind])
                    raise cannot_write(self.paths[kind], e) from None
                self._sizes[kind] = at

    @property
    def is_open(self) -> bool:
        return bool(self._files)

    def reason_file(self) -> pathlib.Path:
        """The file that holds most of the rows without an answer."""
        return self.paths[max(KINDS[1:], key=lambda k: self.counts[k])]

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def records(self):
        """The records of data.jsonl, ordered by index."""
        with self.paths['data'].open('rb') as f:
            for index in np.flatnonzero(self.offset >= 0):
                f.seek(self.offset[index])
                yield json.loads(f.readline())


def _index(line: bytes) -> int | None:
    """The index of a record; None where the line is none."""
    try:
        index = json.loads(line)['index']
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return index if isinstance(index, int) and index >= 0 else None


def length_statistics(values) -> dict[str, float]:
    values = np.asarray(values)
    if not len(values):
        return {'count': 0}
    cuts = {f'p{q}': float(np.percentile(values, q)) for q in (50, 90, 95, 99)}
    ends = {'max': int(values.max()), 'mean': float(values.mean())}
    return {'count': len(values), 'min': int(values.min())} | cuts | ends


def as_text(stats: dict) -> str:
    """The token lengths of stats.json as a table."""
    names = ('count', 'min', 'p50', 'p90', 'p95', 'p99', 'max', 'mean')
    rows = [f'{"tokens":<26}' + ''.join(f'{n:>9}' for n in names)]
    for key, values in stats['lengths'].items():
        cells = (f'{values[n]:>9.1f}' if isinstance(values[n], float) else f'{values[n]:>9}' for n in values)
        rows.append(f'{key:<26}' + ''.join(cells))
    return '\n'.join(rows)


def finalise(journal: Journal) -> dict:
    """Writes parquet/train.parquet, dataset/ and stats.json, each by rename; returns what stats.json holds."""
    folder = journal.folder
    temporary = folder / '.unfinished'
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        lengths = _write_tables(journal.records(), temporary)
        _save_dataset(temporary)
        (folder / 'parquet').mkdir(exist_ok=True)
        os.replace(temporary / 'train.parquet', folder / 'parquet' / 'train.parquet')
        if (folder / 'dataset').exists():
            os.rename(folder / 'dataset', temporary / 'old')
        os.rename(temporary / 'dataset', folder / 'dataset')
        stats = {'counts': {'done' if k == 'data' else k: n for k, n in journal.counts.items()}}
        stats['lengths'] = {k: length_statistics(v) for k, v in lengths.items()}
        write_json(folder / 'stats.json', stats)
    except OSError as e:
        raise cannot_write(folder, e) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return stats


def _write_tables(records, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """train.parquet and rows.arrow in one pass; returns the token lengths of the records that have them."""
    import pyarrow as pa
    import pyarrow.parquet

    message = pa.struct([(k, pa.string()) for k in ('role', 'content', 'thinking')])
    fields = [('index', pa.int64()), ('messages', pa.list_(message))]
    schema = pa.schema(fields + [(k, pa.string()) for k in ('system', 'finish_reason', 'model')])
    lengths = {k: [] for k in LENGTHS}
    with (
        pyarrow.parquet.ParquetWriter(folder / 'train.parquet', schema) as parquet,
        pa.OSFile(str(folder / 'rows.arrow'), 'wb') as sink,
        pa.ipc.new_stream(sink, schema) as stream,
    ):
        for batch in _batches(records):
            table = pa.Table.from_pylist([_row(r) for r in batch], schema)
            parquet.write_table(table)
            stream.write_table(table)
            for name, values in lengths.items():
                new = [r['tokens'][name] for r in batch if name in r.get('tokens', {})]
                values.append(np.asarray(new, np.int32))
    return {k: np.concatenate(v) for k, v in lengths.items()}


def _row(record: dict) -> dict:
    """A record as a row: a finish_reason that is no text, which lines of earlier versions may have, is none."""
    reason = record.get('finish_reason')
    return record | {'finish_reason': reason if isinstance(reason, str) else None}


def _batches(records):
    batch = []
    for record in records:
        batch.append(record)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _save_dataset(folder: pathlib.Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_file(str(folder / 'rows.arrow')).save_to_disk(str(folder / 'dataset'))
