"""Reading data sets: Hub id, save_to_disk directory, Parquet, JSON lines, lines of text."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator

from lens.errors import LensError

BATCH = 256  # rows that are in memory at a time
JSON_SUFFIXES = ('.jsonl', '.json', '.ndjson')
LOOK = 100  # rows that tell what the columns hold


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a data set, which are streamed and never held.

    rows(start): (index, row) from there on; the row is None where a line is no JSON object. identity: tells a changed
    input from the one that was read.
    """

    name: str
    columns: list[str]
    count: int
    identity: object
    rows: Callable[[int], Iterator[tuple[int, dict | None]]]

    def first(self, n: int = LOOK) -> list[dict]:
        """Returns the first rows; {} for a line that is no JSON object."""
        return [row or {} for _, row in itertools.islice(self.rows(0), n)]


def _lines(path: pathlib.Path) -> Iterator[bytes]:
    """Empty lines are no rows."""
    with path.open('rb') as f:
        yield from (line for line in f if not line.isspace())


def _read_lines(path: pathlib.Path, start: int):
    """Rows of a file of JSON objects, or of texts, one per line."""
    for index, line in itertools.islice(enumerate(_lines(path)), start, None):
        if path.suffix not in JSON_SUFFIXES:
            yield index, {'text': line.decode('utf-8', 'replace').rstrip('\r\n')}
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            row = None
        yield index, row if isinstance(row, dict) else None


def _read_parquet(paths: list[pathlib.Path], start: int):
    import pyarrow.parquet

    index = 0
    for path in paths:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if index + rows <= start:
                    index += rows
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group]):
                    if index + batch.num_rows > start:
                        yield from ((i, r) for i, r in enumerate(batch.to_pylist(), index) if i >= start)
                    index += batch.num_rows


def _read_dataset(dataset, start: int):
    for at in range(start, len(dataset), BATCH):
        yield from enumerate(dataset[at : at + BATCH].to_pylist(), at)


def _line_table(path: pathlib.Path) -> Table:
    read = functools.partial(_read_lines, path)
    columns = {k: None for _, row in itertools.islice(read(0), LOOK) for k in row or ()}
    return Table(str(path), list(columns), sum(1 for _ in _lines(path)), _sizes_and_times([path]), read)


def _parquet_table(name: str, paths: list[pathlib.Path]) -> Table:
    """One or several files, in the order of their names."""
    import pyarrow
    import pyarrow.parquet

    metas = []
    for path in paths:
        try:
            metas.append(pyarrow.parquet.read_metadata(path))
        except (pyarrow.ArrowException, OSError) as e:
            raise LensError(f'{path} is not a Parquet file ({_first_line(e)}).') from None
    columns, count = metas[0].schema.to_arrow_schema().names, sum(m.num_rows for m in metas)
    return Table(name, columns, count, _sizes_and_times(paths), functools.partial(_read_parquet, paths))


def _dataset_table(name: str, dataset) -> Table:
    """A data set of the `datasets` library, memory-mapped."""
    read = functools.partial(_read_dataset, dataset.with_format('arrow'))
    return Table(name, list(dataset.column_names), len(dataset), dataset._fingerprint, read)


def open_table(source: str, split: str = 'train', config: str | None = None) -> Table:
    """Opens `source`: a file, a folder, or a Hub id. Raises LensError, also where it has no rows."""
    path = pathlib.Path(source)
    if path.suffix == '.parquet' and path.is_file():
        table = _parquet_table(source, [path])
    elif path.is_file():
        table = _line_table(path)
    elif path.is_dir():
        table = _open_folder(path, split)
    elif path.suffix in (*JSON_SUFFIXES, '.parquet', '.txt') or path.is_absolute() or source.count('/') > 1:
        raise LensError(f'{source} does not exist: give a file, a folder or the name of a data set on the Hub.')
    else:
        table = _dataset_table(source, _from_hub(source, split, config))
    if not table.count:
        raise LensError(f'{source} is empty: it has no rows.')
    return table


def _open_folder(path: pathlib.Path, split: str):
    if (path / 'dataset_dict.json').is_file() or (path / 'state.json').is_file():
        import datasets

        try:
            loaded = datasets.load_from_disk(str(path))
        except (ValueError, OSError, KeyError, TypeError) as e:
            raise LensError(f'{path} is not a whole saved data set ({_first_line(e)}).') from None
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise LensError(f'{path} has no split {split}; its splits: {", ".join(loaded)}.')
            loaded = loaded[split]
        return _dataset_table(str(path), loaded)
    files = sorted(path.glob(f'{split}*.parquet')) or sorted(path.glob('*.parquet'))
    if not files:
        raise LensError(f'{path} holds neither a saved data set (state.json, dataset_dict.json) nor Parquet files.')
    return _parquet_table(str(path), files)


def _from_hub(name: str, split: str, config: str | None):
    """More than three configurations and none named: all of them and all splits, shuffled; two or three: an error."""
    import datasets

    try:
        if config is None:
            configs = datasets.get_dataset_config_names(name)
            if len(configs) > 3:
                parts = [d for c in configs for d in datasets.load_dataset(name, c).values()]
                return datasets.concatenate_datasets(parts).shuffle(seed=42)
            if len(configs) > 1:
                raise LensError(f'{name} has the configurations {", ".join(configs)}: name one.')
            config = configs[0] if configs else None
        return datasets.load_dataset(name, config, split=split)
    except LensError:
        raise
    except Exception as e:  # the libraries below raise dozens of kinds
        raise LensError(
            f'{name} is no file or folder, and the Hub gives no such data set and split ({_first_line(e)}).'
        ) from None


def _sizes_and_times(paths: list[pathlib.Path]) -> list:
    return [[x.st_size, x.st_mtime_ns] for x in map(os.stat, paths)]


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip('.')
