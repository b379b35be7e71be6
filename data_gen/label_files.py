"""The files of a labelling: JSON lines that survive a kill, and the arrays that are made of them.

Dimension letters: N documents, V labelled positions, T tokens of an explanation.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np

from data_gen import arrays, locks, rollouts
from data_gen.label_prompts import Part
from lens.errors import LensError
from lens.files import write_json

ROWS = 4096  # rows or labels that are in memory at a time
MADE = 'labels.json'  # beside the arrays: how they were made


def cannot_write(path, e: OSError) -> LensError:
    return LensError(
        f'{path} cannot be written ({e.strerror or e}): mend that and give the same command, which goes on from what is '
        'there.'
    )


def check_place(folder: pathlib.Path, needed: int) -> None:
    """Raises LensError where the folder cannot be made or has no room for `needed` bytes; makes nothing."""
    rollouts.check_folder(folder)
    at = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(at).free
    if needed > free:
        raise LensError(f'{folder} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left: make room.')


def records(path: pathlib.Path):
    """The whole records of a file of JSON lines, in their order; nothing where it does not exist."""
    if not path.exists():
        return
    with path.open('rb') as f:
        for line in f:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if line.endswith(b'\n') and isinstance(record, dict):
                    yield record


def write_settings(folder: pathlib.Path, settings: dict) -> None:
    """folder/settings.json, with which later commands compare theirs. Raises LensError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / 'settings.json', settings)
    except OSError as e:
        raise cannot_write(folder, e) from None


class Log:
    """Appends records; one process at a time may hold it. Raises LensError."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            self._file = path.open('ab', buffering=0)
            try:
                locks.take(self._file, f'Another command is writing {path}: wait for its end or stop it.')
            except LensError:
                self._file.close()
                raise
            self._size = self._whole()
            os.truncate(path, self._size)  # a torn last line
        except OSError as e:
            raise cannot_write(path, e) from None

    def _whole(self) -> int:
        """Bytes up to the end of the last whole line."""
        with self.path.open('rb') as f:
            end = f.seek(0, os.SEEK_END)
            while end:
                begin = max(end - (1 << 16), 0)
                f.seek(begin)
                at = f.read(end - begin).rfind(b'\n')
                if at >= 0:
                    return begin + at + 1
                end = begin
        return 0

    def add(self, record: dict) -> None:
        """Survives the end of this process when it returns; otherwise the file is as it was."""
        line = (json.dumps(record, ensure_ascii=False) + '\n').encode('utf-8', 'replace')
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as e:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)
            raise cannot_write(self.path, e) from None
        self._size += len(line)

    def sync(self) -> None:
        """What was added survives the end of the machine, too."""
        try:
            os.fsync(self._file.fileno())
        except OSError as e:
            raise cannot_write(self.path, e) from None

    def close(self) -> None:
        self._file.close()


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the arrays are made of. labelled: bool [N, V] by name of the split."""

    log: pathlib.Path
    labelled: dict[str, np.ndarray]
    tokenizer: object
    explanation_len: int
    made: dict  # for labels.json


def _filler(part: Part) -> int:
    """What follows a label shorter than T tokens, and fills slots without one."""
    return int(part.split.meta.get('pad_id') or 0)


def _described(part: Part, labels: Labels) -> dict:
    """What meta.json says of the labels, in place of what it said of others."""
    return {'explanation_len': labels.explanation_len, 'filler_id': _filler(part)}


def write_explanations(path: pathlib.Path, part: Part, keep_N: np.ndarray, labels: Labels) -> dict:
    """explanations.npy int32 [kept, V, T]; returns how many labels were cut at T tokens, and the tokens of filling."""
    filler, length = _filler(part), labels.explanation_len
    shape = (int(keep_N.sum()), part.positions.shape[1], length)
    with arrays.open_npy(path, np.int32, shape) as add:  # a disk that is full says so here, not in the mapped file
        for i in range(0, shape[0], ROWS):
            add(np.full((min(ROWS, shape[0] - i), *shape[1:]), filler))
    out = np.load(path, mmap_mode='r+')
    new_row = np.cumsum(keep_N) - 1
    counts = {'labels': 0, 'cut': 0, 'filled_tokens': 0}
    missing = labels.labelled[part.name].copy()  # a label counts once

    def flush(batch):
        # a label that quotes a special token spells it
        encoded = labels.tokenizer([r['text'] for r in batch], add_special_tokens=False, split_special_tokens=True)
        for r, ids in zip(batch, encoded['input_ids'], strict=True):
            kept = ids[:length]
            out[new_row[r['row']], r['slot'], : len(kept)] = kept
            counts['labels'] += 1
            counts['cut'] += len(ids) > length
            counts['filled_tokens'] += length - len(kept)

    batch = []
    for r in records(labels.log):
        if r['split'] == part.name and missing[r['row'], r['slot']]:
            missing[r['row'], r['slot']] = False
            batch.append(r)
            if len(batch) == ROWS:
                flush(batch)
                batch = []
    if batch:
        flush(batch)
    out.flush()
    return counts


def write_in_place(part: Part, labels: Labels) -> dict:
    """positions.npy and explanations.npy in the folder of the split, and how they were made.

    At no time are there two arrays that do not belong together.
    """
    folder, labelled = part.split.directory, labels.labelled[part.name]
    temporary = {n: folder / f'.{n}.partial' for n in (MADE, 'meta.json', 'explanations.npy', 'positions.npy')}
    try:
        counts = write_explanations(temporary['explanations.npy'], part, np.ones(len(labelled), bool), labels)
        with temporary['positions.npy'].open('wb') as f:
            np.save(f, np.where(labelled, part.positions, -1).astype(np.int32))
        arrays.write_json(temporary[MADE], labels.made | counts)
        arrays.write_json(temporary['meta.json'], part.split.meta | _described(part, labels))
        (folder / 'positions.npy').unlink(missing_ok=True)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return counts


def write_folder(out: pathlib.Path, data: pathlib.Path, parts: list[Part], labels: Labels) -> dict[str, dict]:
    """A new folder `out` by rename: of every part the documents that have a label; other splits without labels.

    Arrays of which all rows stay are hard links where the file system allows that.
    """
    temporary = out.with_name(f'.{out.name}.partial')
    shutil.rmtree(temporary, ignore_errors=True)
    if out.exists():  # otherwise what a killed command moved away may be the only copy
        shutil.rmtree(f'{temporary}.old', ignore_errors=True)
    counts = {}
    try:
        temporary.mkdir(parents=True)
        for part in parts:
            folder, labelled = temporary / part.name, labels.labelled[part.name]
            keep = labelled.any(1)
            folder.mkdir()
            more = {}
            for path in sorted(part.split.directory.glob('*.npy')):
                if path.stem not in ('positions', 'explanations') and not path.name.startswith('.'):
                    more |= _copy(path, folder / path.name, keep, part.split.meta)
            more |= {'documents': int(keep.sum())} | _described(part, labels)
            arrays.write_json(folder / 'meta.json', part.split.meta | more)
            np.save(folder / 'positions.npy', np.where(labelled, part.positions, -1)[keep].astype(np.int32))
            counts[part.name] = write_explanations(folder / 'explanations.npy', part, keep, labels)
            arrays.write_json(folder / MADE, labels.made | counts[part.name])
        for split in ('train', 'validation'):
            if split not in counts and (data / split).is_dir():
                given = shutil.ignore_patterns('positions.npy', 'explanations.npy', MADE)
                shutil.copytree(data / split, temporary / split, copy_function=_link, ignore=given)
        arrays.replace_folder(temporary, out)
        shutil.rmtree(f'{temporary}.old', ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _link(source, target) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _copy(source: pathlib.Path, target: pathlib.Path, keep_N: np.ndarray, meta: dict) -> dict:
    """Copies the kept rows; returns the counts of meta.json that this array determines."""
    x = np.load(source, mmap_mode='r', allow_pickle=False)
    if keep_N.all() or x.shape[:1] != keep_N.shape:
        _link(source, target)
        return {}
    names = {code: name for name, code in (meta.get('roles') or {}).items()}
    totals = dict.fromkeys(names.values(), 0)
    with arrays.open_npy(target, x.dtype, (int(keep_N.sum()), *x.shape[1:])) as add:
        for i in range(0, len(x), ROWS):
            rows = np.asarray(x[i : i + ROWS])[keep_N[i : i + ROWS]]
            add(rows)
            if source.stem == 'role':
                for code, name in names.items():
                    totals[name] += int((rows == code).sum())
    if source.stem == 'role' and 'role_tokens' in meta:
        return {'role_tokens': totals}
    return {'tokens': int(np.load(target).sum())} if source.stem == 'lengths' and 'tokens' in meta else {}
