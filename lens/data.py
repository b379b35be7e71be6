"""Pretokenized documents on disk.

A split is a folder of memory-mapped arrays (N documents, S tokens, P labelled positions, T tokens
of an explanation, F known facts):

    tokens.npy integers [N, S] right padded   lengths.npy int32 [N]    doc_id.npy int64 [N]
    meta.json  {"format": "lens-tokens/1", "vocab_size", "pad_id", ...}
    positions.npy int32 [N, P], explanations.npy int32 [N, P, T]    optional: given explanations
    facts.npy int8 [N, S, F]                                        optional: known answers
    role.npy int8 [N, S]                                            optional: whose words; meta.json's "roles" has the codes

or, where activations are stored and no subject reads texts, without tokens, lengths, facts and roles:

    activations.npy [N, P, D] float32, or the bits of bfloat16 as uint16, at positions.npy; explanations.npy is optional then
    meta.json has "activations": {"layer", …}, the block that they are from

`facts.npy` holds, per token position, which value of each field the text has established (-1:
none); meta.json's "facts" lists every field with its values and their token ids.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np

from lens import files
from lens.errors import LARGEST_INT, LensError, number, shown, text
from lens.widths import choose_widths

FORMAT = 'lens-tokens/1'
# What to do about a damaged or missing file.
MAKE = (
    'make the data, or set data.path to a folder that has it (in lens.evaluate: --data), which counts from the current '
    'folder'
)
BYTES_PER_SCAN = 1 << 20  # of an array that is read once
DIGESTED_ROWS = 64  # whose texts a fingerprint tells apart
# What data.positions may be -> the roles of the positions that are read.
POSITIONS = {'any': (), 'assistant': ('thinking', 'final'), 'thinking': ('thinking',), 'final': ('final',)}


class DataError(LensError):
    """An array is missing, damaged or does not fit the model; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The arrays of one split, see above. rows, codes: after `readable`, the documents that are read and the role codes
    of their positions. respond: makes responses of given explanations, [..., T] -> [..., T']. With stored activations
    there are no tokens, and lengths end at the last position."""

    directory: pathlib.Path
    meta: dict
    tokens: np.ndarray | None
    lengths: np.ndarray
    doc_id: np.ndarray
    positions: np.ndarray | None
    explanations: np.ndarray | None
    facts: np.ndarray | None
    role: np.ndarray | None = None
    activations: np.ndarray | None = None
    rows: np.ndarray | None = None
    codes: np.ndarray | None = None
    respond: Callable[[np.ndarray], np.ndarray] | None = None

    def __len__(self):
        return len(self.lengths) if self.rows is None else len(self.rows)

    @property
    def width(self) -> int:
        """Returns the tokens of a row, 0 where there are no texts."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    @property
    def read_rows(self) -> np.ndarray:
        """Returns the indices of the documents that are read."""
        return np.arange(len(self.lengths)) if self.rows is None else self.rows

    @property
    def filler(self) -> int:
        """Returns the token id that follows the words of a given explanation."""
        return next((self.meta[k] for k in ('filler_id', 'pad_id') if self.meta.get(k) is not None), 0)

    @property
    def left_out(self) -> int:
        """Returns how many documents have no position that may be read."""
        return len(self.lengths) - len(self)

    @functools.cached_property
    def widths(self) -> np.ndarray:
        """Returns the widths of its batches, ascending: a document is read in one that is wide enough for it."""
        lengths = self.lengths[self.read_rows]
        return np.array([lengths.max()]) if self.tokens is None else np.minimum(choose_widths(lengths), self.width)

    def width_for(self, lengths) -> int:
        """Returns the width of a batch of texts of these lengths."""
        return int(self.widths[np.searchsorted(self.widths, np.max(lengths))])


def load(path: pathlib.Path, shape: tuple, optional: bool = False, kinds: str = 'iu') -> np.ndarray | None:
    """Opens a memory-mapped .npy array of integers whose shape matches `shape` (None = any length), None where an
    `optional` one is not there. kinds: of numpy's types. Raises DataError."""
    if optional and not path.exists():
        return None
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f'{path} {"is no file" if path.exists() else "does not exist"}: {MAKE}.')
    try:
        x = np.lib.format.open_memmap(path, mode='r')
    except Exception:  # a damaged header may hold any expression
        raise DataError(f'{path} is truncated or not a .npy array of numbers: make the data again.') from None
    if x.dtype.kind not in kinds:
        raise DataError(
            f'{path} holds {x.dtype}, expected {"integers" if kinds == "iu" else "float32"}: make the data again.'
        )
    if x.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True)):
        raise DataError(f'{path} has shape {x.shape}, expected {shape} (None = any): make the data again.')
    if 0 in x.shape:
        raise DataError(f'{path} has shape {x.shape} and so holds no documents: make the data again.')
    return x


def _as(x: np.ndarray, dtype, low: int, high: int, path: pathlib.Path) -> np.ndarray:
    """Returns a small array as `dtype` of this machine once all of it is in low..high."""
    if x.min() < low or x.max() > high:
        raise DataError(f'{path} holds values outside {low}..{high}: make the data again.')
    return x if x.dtype == dtype else x.astype(dtype)


def open_split(path: str, split: str, *, vocab_size: int) -> Split:
    """Opens and checks `path`/`split`. Raises DataError; reads every token id once (about 1 GB/s)."""
    if pathlib.Path(path).is_file():
        raise DataError(
            f'{path} is a file: data.path is a folder, which data_gen.import_stages makes of Parquet files.'
        )
    d = pathlib.Path(path) / split
    meta = files.read_json(d / 'meta.json', MAKE, DataError)
    fields = _check_meta(meta, d / 'meta.json', vocab_size)
    if 'activations' in meta:
        return _open_stored(d, meta, vocab_size)
    tokens = load(d / 'tokens.npy', (None, None))
    n, s = tokens.shape
    lengths = _as(load(d / 'lengths.npy', (n,)), np.int32, 1, s, d / 'lengths.npy')
    positions = load(d / 'positions.npy', (n, None), optional=True)
    labelled = positions is not None
    out = Split(
        directory=d,
        meta=meta,
        tokens=tokens,
        lengths=lengths,
        doc_id=_doc_id(d, n),
        positions=positions,
        explanations=load(d / 'explanations.npy', (n, positions.shape[1], None)) if labelled else None,
        facts=load(d / 'facts.npy', (n, s, len(fields))) if fields else None,
        role=load(d / 'role.npy', (n, s), optional=True),
    )
    _check_ids(tokens, d / 'tokens.npy', vocab_size)
    if labelled:
        _check_ids(out.explanations, d / 'explanations.npy', vocab_size)
        what = 'positions beyond the text: make the data again'
        _check_rows(positions, d / 'positions.npy', -1, lengths[:, None], what)  # -1: no position
    if fields:
        what = 'values that are not in the facts of meta.json: make the data again'
        _check_rows(out.facts, d / 'facts.npy', -1, [len(f['values']) for f in fields], what)
    return out


def _open_stored(d: pathlib.Path, meta: dict, vocab_size: int) -> Split:
    """Opens a split of stored activations. Raises DataError."""
    activations = load(d / 'activations.npy', (None, None, None), kinds='fu')
    n, p, _ = activations.shape
    if activations.dtype == np.uint16:
        activations = activations.view(ml_dtypes.bfloat16)
    elif activations.dtype != np.float32:
        raise DataError(f'{d}/activations.npy holds {activations.dtype}, expected float32: make the data again.')
    positions = load(d / 'positions.npy', (n, p))
    _check_rows(positions, d / 'positions.npy', -1, LARGEST_INT, 'no positions: make the data again')  # -1: none
    explanations = load(d / 'explanations.npy', (n, p, None), optional=True)
    if explanations is not None:
        _check_ids(explanations, d / 'explanations.npy', vocab_size)
    lengths = np.maximum(np.asarray(positions).max(1), 0).astype(np.int32) + 1
    texts = {'tokens': None, 'facts': None, 'lengths': lengths}
    return Split(
        d, meta, doc_id=_doc_id(d, n), positions=positions, explanations=explanations, activations=activations, **texts
    )


def _doc_id(d: pathlib.Path, n: int) -> np.ndarray:
    whole = np.iinfo(np.int64)
    return _as(load(d / 'doc_id.npy', (n,)), np.int64, whole.min, whole.max, d / 'doc_id.npy')


def _check_ids(x: np.ndarray, path: pathlib.Path, vocab_size: int) -> None:
    what = f'token ids outside 0..{vocab_size - 1}, the vocabulary of the subject: pretokenize with its tokenizer'
    _check_rows(x, path, 0, vocab_size, what)


def _check_meta(meta: dict, path: pathlib.Path, vocab_size: int) -> list[dict]:
    """Returns the facts of a meta.json. Raises DataError where it is not as the head of this file says."""
    if meta.get('format') != FORMAT:
        raise DataError(f'{path} has format {shown(repr(meta.get("format")))}, expected {FORMAT!r}.')
    for key in ('roles', 'source', 'activations'):
        if not isinstance(meta.get(key) or {}, dict):
            raise DataError(f'{path}: {key} is no JSON object: make the data again.')
    try:
        for key in ('pad_id', 'filler_id'):
            if meta.get(key) is not None:
                number(meta[key], key, 0, vocab_size - 1)
        codes = [number(code, f'roles[{shown(name)}]', -128, 127) for name, code in (meta.get('roles') or {}).items()]
        if len(set(codes)) < len(codes):
            raise LensError('roles has one code for two names.')
        return _fields(meta.get('facts') or [], vocab_size)
    except LensError as e:
        raise DataError(f'{path}: {str(e).rstrip(".")}: make the data again.') from None


def _fields(facts, vocab_size: int) -> list[dict]:
    """Returns the fields of known facts: a name, texts as values, as many token ids. Raises LensError."""
    form = 'facts is no list of {"field": text, "values": texts, "token_ids": as many ids}'
    for field in facts if isinstance(facts, list) else [None]:
        lists = [field.get(k) for k in ('values', 'token_ids')] if isinstance(field, dict) else []
        if not lists or not all(isinstance(x, list) for x in lists) or len({*map(len, lists)}) > 1:
            raise LensError(f'{form}.')
        name = text(field.get('field'), 'facts: field')
        for value, token in zip(*lists, strict=True):
            text(value, f'facts[{shown(name)}]: value')
            number(token, f'facts[{shown(name)}]: token id of {shown(value)}', 0, vocab_size - 1)
    return facts


def _check_rows(x: np.ndarray, path: pathlib.Path, low: int, below, what: str) -> None:
    """Raises DataError for the first row that holds a value outside low..below-1. below: an int, an int for each place
    of the last axis, or for each row [N, 1]."""
    below, size = np.asarray(below), max(BYTES_PER_SCAN // x[0].nbytes, 1)
    for i in range(0, len(x), size):
        rows = slice(i, i + size)
        wrong = (x[rows] < low) | (x[rows] >= (below[rows] if below.ndim == 2 else below))
        if wrong.any():
            row = i + int(np.argmax(wrong.reshape(len(wrong), -1).any(1)))
            raise DataError(f'{path} row {row} holds {what}.')


def _digests(split: Split):
    """Of every text, or of the activations of a document, 16 bytes."""
    texts = split.activations is None
    for row, n in zip(split.tokens if texts else split.activations, split.lengths, strict=True):
        row = np.asarray(row[:n], np.int32) if texts else np.asarray(row)
        yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def open_splits(
    path: str, vocab_size: int, subject, tokenizer_sha256: Callable, train: bool = True
) -> tuple[Split | None, Split]:
    """Opens and checks `path`/train and `path`/validation: no text in both, made with the tokenizer of the subject
    where they say with which. train: without it the training split may be missing, None. Raises DataError."""
    names = ('train', 'validation') if train or (pathlib.Path(path) / 'train').is_dir() else ('validation',)
    splits = [open_split(path, x, vocab_size=vocab_size) for x in names]
    for split in splits:
        made_with = split.meta.get('tokenizer_sha256')
        if made_with is not None and made_with != tokenizer_sha256(subject):
            raise DataError(
                f'{split.directory} was made with another tokenizer than that of {subject}: pretokenize again.'
            )
    if len(splits) == 1:
        return None, *splits
    check_disjoint(*splits)
    return tuple(splits)


def check_disjoint(train: Split, validation: Split) -> None:
    """Raises DataError where a document id or a text is in both splits: the leak check."""
    both = np.intersect1d(train.doc_id, validation.doc_id)
    if len(both):
        raise DataError(f'{train.directory} and {validation.directory} share {len(both)} document ids, e.g. {both[0]}.')
    seen = set(_digests(validation))
    for i, digest in enumerate(_digests(train)):
        if digest in seen:
            name = 'tokens' if train.activations is None else 'activations'
            raise DataError(f'{train.directory}/{name}.npy row {i} is also a text of {validation.directory}.')


def fingerprint(split: Split) -> str:
    """Digests which documents the split holds and where they are labelled, in their order, and some of their texts."""
    digest, some = hashlib.sha256(), slice(None, None, max(len(split.lengths) // DIGESTED_ROWS, 1))
    texts = (x if x is None else np.asarray(x[some], np.int32) for x in (split.tokens, split.explanations))
    stored = split.activations if split.activations is None else np.asarray(split.activations[some])
    for x in (split.doc_id, split.lengths, split.positions, *texts, stored):
        digest.update(b'' if x is None else np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]


def given(split: Split, rows, min_pos: int) -> np.ndarray:
    """Which of the given explanations of some rows are at positions that may be read: bool [rows, P]."""
    given = np.asarray(split.positions[rows])
    ok = given >= np.minimum(min_pos, split.lengths[rows] - 1)[:, None]  # without a label it is -1
    if split.codes is None:
        return ok
    return ok & np.isin(np.take_along_axis(split.role[rows], np.maximum(given, 0), 1), split.codes)


def readable(split: Split, positions: str, min_pos: int) -> Split:
    """Returns `split` with only the positions of one kind (a key of POSITIONS), from min_pos on; documents that have
    none are left out. Reads role.npy once. Raises DataError if it is not there or no document is left."""
    if positions == 'any':  # of stored activations, what has none is left out
        if split.activations is None:
            return split
        return dataclasses.replace(split, rows=np.flatnonzero(given(split, slice(None), min_pos).any(1)))
    d, names = split.directory, split.meta.get('roles') or {}
    if split.role is None or not set(POSITIONS[positions]) <= names.keys():
        raise DataError(
            f'{d} has no roles of its tokens (role.npy, and their names in meta.json), which '
            f'data.positions={positions!r} needs: pretokenize chats again, or use data.positions=any.'
        )
    split = dataclasses.replace(split, codes=np.array([names[k] for k in POSITIONS[positions]], np.int8))
    n, width = split.tokens.shape
    size, column, found = max(BYTES_PER_SCAN // width, 1), np.arange(width), []
    for rows in (slice(i, i + size) for i in range(0, n, size)):
        length = np.asarray(split.lengths[rows])[:, None]
        ok = np.isin(split.role[rows], split.codes) & (column < length) & (column >= np.minimum(min_pos, length - 1))
        # a given explanation must be at such a position, too
        found.append(ok.any(1) if split.positions is None else ok.any(1) & given(split, rows, min_pos).any(1))
    rows = np.flatnonzero(np.concatenate(found))
    if not len(rows):
        raise DataError(f'{d} has no document with a position for data.positions={positions!r} from {min_pos} on.')
    return dataclasses.replace(split, rows=rows)


def first_unlabelled(split: Split, min_pos: int) -> int | None:
    """Returns the first row that is read without a given explanation at a position that may be; None: all have one."""
    if split.codes is not None:  # `readable` has left them out
        return None
    ok = given(split, slice(None), min_pos).any(1)
    return None if ok.all() else int(np.argmin(ok))
