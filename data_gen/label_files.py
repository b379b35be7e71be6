"""The arrays that are made of the lines of a labelling.

Dimension letters: N documents, V labelled positions, T tokens of an explanation.
"""

import dataclasses
import itertools
import os
import pathlib
import shutil

import numpy as np

from lens.files import new_folder, write_json

from . import arrays
from .label_prompts import Part
from .ledger import Ledger

ROWS = 4096  # rows or labels that are encoded or copied together
MADE = 'labels.json'  # beside the arrays: how they were made


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the arrays are made of: the answers of servers. label_self.Labels makes them of the texts."""

    ledger: Ledger
    tokenizer: object
    explanation_len: int
    made: dict  # for labels.json
    meta: dict  # what meta.json says of the labels besides

    def labelled(self, part: Part) -> np.ndarray:
        """Returns bool [N, V]: which of the drawn positions have a label."""
        return self.ledger.labelled(part)

    def remark(self) -> str:
        """Says after the counts which labels are missing and what was spent."""
        return f' Without a label: {self.ledger.why()}. {self.ledger.spent()}.'

    def explanations(self, part: Part, filler: int) -> tuple[np.ndarray, dict]:
        """int32 [N, V, T]; how many labels were cut at T tokens, and the tokens of filling."""
        missing, length = self.labelled(part), self.explanation_len  # a label counts once
        out = np.full((*missing.shape, length), filler, np.int32)
        counts = {'labels': int(missing.sum()), 'cut': 0, 'filled_tokens': 0}
        records = (r for r in self.ledger.records('labels') if r['split'] == part.name)
        while batch := list(itertools.islice(records, ROWS)):
            # a label that quotes a special token spells it
            encoded = self.tokenizer([r['text'] for r in batch], add_special_tokens=False, split_special_tokens=True)
            for r, ids in zip(batch, encoded['input_ids'], strict=True):
                place = r['row'], r['slot']
                if missing[place]:
                    missing[place] = False
                    out[*place, : len(ids)] = ids[:length]
                    counts['cut'] += len(ids) > length
                    counts['filled_tokens'] += max(length - len(ids), 0)
        return out, counts


def _write_split(folder: pathlib.Path, part: Part, keep_N: np.ndarray, labels, meta: dict) -> dict:
    """positions.npy, explanations.npy, meta.json and labels.json of the kept documents; returns the counts of labels."""
    filler = meta.get('pad_id') or 0  # follows a label shorter than T tokens, and fills slots without one
    explanations, counts = labels.explanations(part, filler)
    np.save(folder / 'explanations.npy', explanations[keep_N])
    np.save(folder / 'positions.npy', np.where(labels.labelled(part), part.positions, -1)[keep_N].astype(np.int32))
    said = {'explanation_len': labels.explanation_len, 'filler_id': filler} | labels.meta
    write_json(folder / 'meta.json', {k: v for k, v in meta.items() if k != 'label_parts'} | said)
    write_json(folder / MADE, labels.made | counts)
    return counts


def write_in_place(part: Part, labels: Labels) -> dict:
    """Writes the arrays of a split in its own folder. At no time are there two that do not belong together."""
    folder, temporary = part.split.directory, part.split.directory / '.labels.partial'
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        counts = _write_split(temporary, part, np.ones(len(part.split), bool), labels, part.split.meta)
        (folder / 'positions.npy').unlink(missing_ok=True)
        for name in (MADE, 'meta.json', 'explanations.npy', 'positions.npy'):
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def write_folder(out: pathlib.Path, data: pathlib.Path, parts: list[Part], labels: Labels) -> dict[str, dict]:
    """Writes a folder `out`, in place of one that is there: of every part the documents that have a label; other
    splits without labels.

    Arrays of which all rows stay are hard links where the file system allows that.
    """
    counts, new = {}, out.with_name(f'.{out.name}.new')
    shutil.rmtree(new, ignore_errors=True)  # of a killed command
    with new_folder(new) as temporary:
        for part in parts:
            folder, keep = temporary / part.name, labels.labelled(part).any(1)
            folder.mkdir()
            meta = part.split.meta | {'documents': int(keep.sum())}
            for path in sorted(part.split.directory.glob('[!.]*.npy')):
                if path.stem not in ('positions', 'explanations'):
                    meta |= _copy(path, folder / path.name, keep, part.split.meta)
            counts[part.name] = _write_split(folder, part, keep, labels, meta)
        for split in {'train', 'validation'} - counts.keys():
            if (data / split).is_dir():
                given = shutil.ignore_patterns('positions.npy', 'explanations.npy', MADE, '.*')
                shutil.copytree(data / split, temporary / split, copy_function=_link, ignore=given)
    arrays.replace_folder(new, out)
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
    with arrays.open_npy(target, x.dtype, (int(keep_N.sum()), *x.shape[1:])) as add:
        for i in range(0, len(x), ROWS):
            add(np.asarray(x[i : i + ROWS])[keep_N[i : i + ROWS]])
    kept = np.load(target, mmap_mode='r')
    if source.stem == 'role' and 'role_tokens' in meta:
        return {'role_tokens': {name: int((kept == code).sum()) for name, code in meta['roles'].items()}}
    return {'tokens': int(kept.sum())} if source.stem == 'lengths' and 'tokens' in meta else {}
