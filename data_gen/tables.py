"""Rows of data sets: a file, a folder of files, what `datasets` saved, a name on the Hub."""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator

from lens.errors import LensError, shown

from . import readers

BATCH = 256  # rows that are in memory at a time
LOOK = 100  # rows that tell what the columns hold
SHARD = re.compile(r'(.+)-\d{5}-of-\d{5}\.')  # how the Hub names the files of a split


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


def _read_files(paths: list[pathlib.Path], counts: list[int], start: int):
    begin = 0
    for path, count in zip(paths, counts, strict=True):
        if begin + count > start:
            skip = max(start - begin, 0)
            yield from enumerate(readers.rows(path, skip), begin + skip)
        begin += count


def _read_dataset(dataset, start: int):
    for at in range(start, len(dataset), BATCH):
        yield from enumerate(dataset[at : at + BATCH].to_pylist(), at)


def _file_table(name: str, paths: list[pathlib.Path]) -> Table:
    """One or several files, in the order given."""
    identity = [[x.st_size, x.st_mtime_ns] for x in map(os.stat, paths)]
    counts = [readers.count(path) for path in paths]
    columns = dict.fromkeys(c for path in paths for c in readers.columns(path, LOOK))
    return Table(name, list(columns), sum(counts), identity, functools.partial(_read_files, paths, counts))


def _dataset_table(name: str, dataset) -> Table:
    """A data set of the `datasets` library, memory-mapped."""
    read = functools.partial(_read_dataset, dataset.with_format('arrow'))
    return Table(name, list(dataset.column_names), len(dataset), dataset._fingerprint, read)


def open_table(source: str, split: str = 'train', config: str | None = None) -> Table:
    """Opens `source`: a file, a folder, or a Hub id. Raises LensError, also where it has no rows."""
    path = pathlib.Path(source)
    try:
        if path.is_file():
            _pick_split(source, {'train': None}, split)
            table = _file_table(source, [path])
        elif path.is_dir():
            table = _open_folder(path, split, config)
        elif path.exists():
            raise LensError(f'{source} is no regular file and no folder: rows are read twice, so give a file.')
        elif readers.named_as_file(path.name) or path.is_absolute() or source.count('/') > 1:
            raise LensError(f'{source} does not exist: give a file, a folder or the name of a data set on the Hub.')
        else:
            table = _dataset_table(source, _from_hub(source, split, config))
    except OSError as e:
        raise LensError(f'{source} cannot be read ({e.strerror or shown(e)}).') from None
    if not table.count:
        raise LensError(f'{source} is empty: it has no rows.')
    return table


def _pick_split(name, splits: dict, split: str):
    if split not in splits:
        raise LensError(f'{name} has no split {split}; its splits: {", ".join(map(str, splits))}.')
    return splits[split]


def _open_folder(path: pathlib.Path, split: str, config: str | None) -> Table:
    import datasets

    if not ((path / 'dataset_dict.json').is_file() or (path / 'state.json').is_file()):
        return _file_table(str(path), _pick_split(path, _splits(path, config), split))
    try:
        loaded = datasets.load_from_disk(str(path))
    except (ValueError, OSError, KeyError, TypeError) as e:
        raise LensError(f'{path} is not a whole saved data set ({shown(e)}).') from None
    if not isinstance(loaded, datasets.DatasetDict):
        loaded = {str(loaded.split or 'train'): loaded}
    return _dataset_table(str(path), _pick_split(path, loaded, split))


def _splits(path: pathlib.Path, config: str | None) -> dict[str, list[pathlib.Path]]:
    """Split -> files of a folder, by its README.md or the names, as `datasets` finds them. Raises LensError."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            found = datasets.load_dataset_builder(str(path), config, cache_dir=cache).config.data_files
        except Exception as e:  # the library raises dozens of kinds
            raise LensError(f'{path} gives no data files ({shown(e).rstrip(".")}).') from None
    splits = {}
    for split, files in (found or {}).items():
        for file in map(pathlib.Path, files):
            # a NamedSplit was guessed from a word in the name, which takes train_gen-00000-of-00001 for train
            shard = SHARD.match(file.name) if isinstance(split, datasets.NamedSplit) else None
            splits.setdefault(shard[1] if shard else str(split), []).append(file)
    if all(isinstance(split, datasets.NamedSplit) for split in found or {}):
        _say_unread(path, {file.resolve() for files in splits.values() for file in files})
    return splits


def _say_unread(path: pathlib.Path, read: set[pathlib.Path]) -> None:
    """`datasets` takes the files of one format, those that name a split where some do, and is silent about others."""
    files = (p for p in sorted(path.rglob('*')) if readers.named_as_file(p.name) and p.resolve() not in read)
    if others := [str(p.relative_to(path)) for p in files]:
        names = shown(', '.join(others[:3]) + ', …' * (len(others) > 3))
        print(f'Warning: {path} holds {len(others)} other files of data, which are not read ({names}).')


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
            f'{name} is no file or folder, and the Hub gives no such data set and split ({shown(e).rstrip(".")}).'
        ) from None
