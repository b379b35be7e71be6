"""The rows of a generation: what became of each, and the finished data set.

data.jsonl, rejected.jsonl, failed.jsonl and skipped.jsonl grow while the run lasts; a row is in one of them at most.
finalise() writes the rows of data.jsonl, ordered by index, to parquet/ and dataset/.
"""

import itertools
import json
import os
import pathlib
import shutil

import numpy as np

from lens.errors import LensError
from lens.files import write_json

from . import arrays, journal

KINDS = ('data', 'rejected', 'failed', 'skipped')
LENGTHS = ('original_prompt_tokens', 'prompt_tokens_with_system', 'thinking_tokens', 'content_tokens')
PLACE = 'partial_jsonl'  # key of settings.json: another place of data.jsonl, or ''
BATCH = 1000  # rows that are in memory at a time


class Rows(journal.Journal):
    """What became of `rows` input rows. data: another place of data.jsonl; settings.json remembers it."""

    forgotten, again, elsewhere = ('failed',), '--resume', 'another --output_path'

    def __init__(self, folder: pathlib.Path, data: pathlib.Path | None, rows: int, settings: dict, resume: bool):
        default, before = folder / 'data.jsonl', _lines_before(folder)
        if resume and before:
            if data and data.resolve() != before.resolve():
                raise LensError(
                    f'The finished lines are in {before}, --{PLACE} names {data}: resume with the former, or choose '
                    'another --output_path.'
                )
            if before != default and not before.exists():
                raise LensError(
                    f'The finished lines are in {before}, which is not there: put it back, or remove '
                    f'{folder / "settings.json"} to begin anew.'
                )
            data = before
        paths = {k: folder / f'{k}.jsonl' for k in KINDS} | {'data': data or default}
        for path in (folder, paths['data'].parent):
            journal.check_folder(path)
        existing = next((p for p in (before, *paths.values()) if p and journal.filled(p)), None)
        if existing and not resume:
            raise LensError(f'{existing} exists: add --resume to continue it, or choose another --output_path.')
        self.rows, self.counts = rows, dict.fromkeys(KINDS, 0)
        self._offset = np.full(rows, -1, np.int64)  # where the record begins in data.jsonl
        self._other = np.zeros(rows, bool)  # rejected or skipped
        elsewhere = paths['data'].resolve() != default.resolve()
        super().__init__(folder, paths, settings, {PLACE: str(paths['data'].absolute()) if elsewhere else ''})

    def note(self, kind: str, record: dict, at: int) -> bool:
        index = record.get('index')
        if not isinstance(index, int) or not 0 <= index < len(self._offset) or self.finished(index):
            return False
        if kind == 'data':
            self._offset[index] = at
        else:
            self._other[index] = kind != 'failed'
        self.counts[kind] += 1
        return True

    def finished(self, index: int) -> bool:
        return bool(self._offset[index] >= 0 or self._other[index])

    def unfinished(self) -> np.ndarray:
        return np.flatnonzero((self._offset < 0) & ~self._other)

    def ordered(self):
        """Yields the records of data.jsonl, ordered by index."""
        with self.paths['data'].open('rb') as f:
            for index in np.flatnonzero(self._offset >= 0):
                f.seek(self._offset[index])
                yield json.loads(f.readline())


def _lines_before(folder: pathlib.Path) -> pathlib.Path | None:
    """Where the data.jsonl of this folder was until now; None where there was none."""
    default, before = folder / 'data.jsonl', journal.read_settings(folder / 'settings.json')
    if PLACE in before:
        return pathlib.Path(str(before[PLACE]) or default)
    return default if journal.filled(default) else None


def length_statistics(lengths) -> dict[str, float]:
    """Returns count, extremes, percentiles and mean; the count alone where there is none."""
    if not len(lengths):
        return {'count': 0}
    cuts = {f'p{q}': float(np.percentile(lengths, q)) for q in (50, 90, 95, 99)}
    ends = {'max': int(np.max(lengths)), 'mean': float(np.mean(lengths))}
    return {'count': len(lengths), 'min': int(np.min(lengths))} | cuts | ends


def as_text(stats: dict) -> str:
    """Returns the token lengths of stats.json as a table."""
    rows = [f'{"tokens":<26}' + ''.join(f'{n:>9}' for n in ('count', 'min', 'p50', 'p90', 'p95', 'p99', 'max', 'mean'))]
    for key, values in stats['lengths'].items():
        rows.append(f'{key:<26}' + ''.join(f'{round(x, 1):>9}' for x in values.values()))
    return '\n'.join(rows)


def finalise(rows: Rows) -> dict:
    """Writes parquet/train.parquet, dataset/ and stats.json, each by rename; returns what stats.json holds."""
    folder, temporary = rows.folder, rows.folder / '.unfinished'
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed command
    try:
        temporary.mkdir()
        lengths = _write_tables(rows.ordered(), temporary)
        (folder / 'parquet').mkdir(exist_ok=True)
        os.replace(temporary / 'train.parquet', folder / 'parquet' / 'train.parquet')
        arrays.replace_folder(temporary / 'dataset', folder / 'dataset')
        stats = {'counts': {'done' if k == 'data' else k: n for k, n in rows.counts.items()}}
        stats['lengths'] = {k: length_statistics(v) for k, v in lengths.items()}
        write_json(folder / 'stats.json', stats)
    except OSError as e:
        raise journal.cannot_write(folder, e, rows.again) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return stats


def _write_tables(records, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """dataset/ and train.parquet, BATCH rows in memory at a time; returns the token lengths of the records."""
    import datasets
    import pyarrow as pa

    message = pa.struct([(k, pa.string()) for k in ('role', 'content', 'thinking')])
    fields = [('index', pa.int64()), ('messages', pa.list_(message))]
    schema = pa.schema(fields + [(k, pa.string()) for k in ('system', 'finish_reason', 'model')])
    lengths = {k: [np.zeros(0, np.int32)] for k in LENGTHS}
    with pa.OSFile(str(folder / 'rows.arrow'), 'wb') as sink, pa.ipc.new_stream(sink, schema) as stream:
        while batch := list(itertools.islice(records, BATCH)):
            for r in batch:  # lines of earlier versions may have a finish_reason that is no text
                r['finish_reason'] = r['finish_reason'] if isinstance(r.get('finish_reason'), str) else None
            stream.write_table(pa.Table.from_pylist(batch, schema))
            for name, values in lengths.items():
                values.append(np.array([r['tokens'][name] for r in batch if name in r.get('tokens', {})], np.int32))
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_file(str(folder / 'rows.arrow'))
    dataset.save_to_disk(str(folder / 'dataset'))
    dataset.to_parquet(str(folder / 'train.parquet'))
    return {k: np.concatenate(v) for k, v in lengths.items()}
