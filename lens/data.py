"""Pretokenized documents on disk and the Grain pipelines that read them.

A split is a folder of memory-mapped arrays (N documents, S tokens, P labelled positions, T tokens
of an explanation, F known facts):

    tokens.npy int32 [N, S] right padded   lengths.npy int32 [N]    doc_id.npy int64 [N]
    meta.json  {"format": "lens-tokens/1", "vocab_size", "pad_id", ...}
    positions.npy int32 [N, P], explanations.npy int32 [N, P, T]    optional: given explanations
    facts.npy int8 [N, S, F]                                        optional: known answers
    role.npy int8 [N, S]                                            optional: whose words; meta.json's "roles" has the codes

`facts.npy` holds, per token position, which value of each field the text has established (-1:
none); meta.json's "facts" lists every field with its values and their token ids.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable

import grain
import numpy as np

from lens import files
from lens.errors import LensError

FORMAT = 'lens-tokens/1'
# What to do about a damaged or missing file.
MAKE = (
    'make the data, or set data.path to a folder that has it (in lens.evaluate: --data), which counts from the current '
    'folder'
)
READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)  # measured: more threads are slower
ROWS_PER_CHECK = 65536
BYTES_PER_SCAN = 1 << 24  # of role.npy
DIGESTED_ROWS = 64  # whose texts a fingerprint tells apart
# What data.positions may be -> the roles of the positions that are read.
POSITIONS = {'any': (), 'assistant': ('thinking', 'final'), 'thinking': ('thinking',), 'final': ('final',)}


class DataError(LensError):
    """An array is missing, damaged or does not fit the model; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The arrays of one split, see above. rows, codes: after `readable`, the documents that are read and the role codes
    of their positions. respond: makes responses of given explanations, [..., T] -> [..., T']."""

    directory: pathlib.Path
    meta: dict
    tokens: np.ndarray
    lengths: np.ndarray
    doc_id: np.ndarray
    positions: np.ndarray | None
    explanations: np.ndarray | None
    facts: np.ndarray | None
    role: np.ndarray | None = None
    rows: np.ndarray | None = None
    codes: np.ndarray | None = None
    respond: Callable[[np.ndarray], np.ndarray] | None = None

    def __len__(self):
        return len(self.tokens) if self.rows is None else len(self.rows)

    @property
    def read_rows(self) -> np.ndarray:
        """Returns the indices of the documents that are read."""
        return np.arange(len(self.tokens)) if self.rows is None else self.rows

    @property
    def left_out(self) -> int:
        """Returns how many documents have no position that may be read."""
        return len(self.tokens) - len(self)


def _load(path: pathlib.Path, shape: tuple, optional: bool = False) -> np.ndarray | None:
    """A memory-mapped array whose shape matches `shape` (None = any length)."""
    if optional and not path.exists():
        return None
    try:
        x = np.load(path, mmap_mode='r', allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f'{path} does not exist: {MAKE}.') from None
    except (ValueError, EOFError, OSError):
        raise DataError(f'{path} is truncated or not a .npy array of numbers: make the data again.') from None
    if x.dtype.kind not in 'iu':
        raise DataError(f'{path} holds {x.dtype}, expected integers: make the data again.')
    if x.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True)):
        raise DataError(f'{path} has shape {x.shape}, expected {shape} (None = any): make the data again.')
    return x


def open_split(path: str, split: str, *, vocab_size: int) -> Split:
    """Opens and checks `path`/`split`. Raises DataError; reads every token id once (about 1 GB/s)."""
    d = pathlib.Path(path) / split
    meta = files.read_json(d / 'meta.json', MAKE, DataError)
    if meta.get('format') != FORMAT:
        raise DataError(f'{d}/meta.json has format {meta.get("format")!r}, expected {FORMAT!r}.')
    tokens = _load(d / 'tokens.npy', (None, None))
    n, s = tokens.shape
    if n == 0:
        raise DataError(f'{d}/tokens.npy holds no documents.')
    positions = _load(d / 'positions.npy', (n, None), optional=True)
    labelled = positions is not None
    facts = meta.get('facts') or []
    out = Split(
        directory=d,
        meta=meta,
        tokens=tokens,
        lengths=_load(d / 'lengths.npy', (n,)),
        doc_id=_load(d / 'doc_id.npy', (n,)),
        positions=positions,
        explanations=_load(d / 'explanations.npy', (n, positions.shape[1], None)) if labelled else None,
        facts=_load(d / 'facts.npy', (n, s, len(facts))) if facts else None,
        role=_load(d / 'role.npy', (n, s), optional=True),
    )
    for name in ('tokens', 'explanations') if labelled else ('tokens',):
        _check_ids(getattr(out, name), d / f'{name}.npy', vocab_size)
    if out.lengths.min() < 1 or out.lengths.max() > s:
        raise DataError(f'{d}/lengths.npy holds values outside 1..{s}: make the data again.')
    if labelled:
        beyond = (out.positions >= out.lengths[:, None]).any(1)
        if beyond.any():
            raise DataError(
                f'{d}/positions.npy row {np.argmax(beyond)} holds positions beyond the text: make the data again.'
            )
    return out


def _check_ids(ids: np.ndarray, path: pathlib.Path, vocab_size: int) -> None:
    for i in range(0, len(ids), ROWS_PER_CHECK):
        chunk = ids[i : i + ROWS_PER_CHECK]
        if chunk.min() < 0 or chunk.max() >= vocab_size:
            wrong = ((chunk < 0) | (chunk >= vocab_size)).reshape(len(chunk), -1).any(1)
            raise DataError(
                f'{path} row {i + np.argmax(wrong)} holds token ids outside 0..{vocab_size - 1}, the vocabulary of the '
                'subject: pretokenize with the tokenizer of this subject.'
            )


def _digests(split: Split):
    """Of every text, 16 bytes."""
    for row, n in zip(split.tokens, split.lengths, strict=True):
        yield hashlib.blake2b(np.asarray(row[:n], np.int32).tobytes(), digest_size=16).digest()


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
    for i, text in enumerate(_digests(train)):
        if text in seen:
            raise DataError(f'{train.directory}/tokens.npy row {i} is also a text of {validation.directory}.')


def fingerprint(split: Split) -> str:
    """Digests which documents the split holds and where they are labelled, in their order, and some of their texts."""
    digest, some = hashlib.sha256(), slice(None, None, max(len(split.tokens) // DIGESTED_ROWS, 1))
    texts = (x if x is None else x[some] for x in (split.tokens, split.explanations))
    for x in (split.doc_id, split.lengths, split.positions, *texts):
        digest.update(b'' if x is None else np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]


def _given(split: Split, rows, min_pos: int) -> np.ndarray:
    """Which of the given explanations of some rows are at positions that may be read: bool [rows, P]."""
    given = np.asarray(split.positions[rows])
    ok = given >= np.minimum(min_pos, split.lengths[rows] - 1)[:, None]  # without a label it is -1
    if split.codes is None:
        return ok
    return ok & np.isin(np.take_along_axis(split.role[rows], np.maximum(given, 0), 1), split.codes)


def readable(split: Split, positions: str, min_pos: int) -> Split:
    """Returns `split` with only the positions of one kind (a key of POSITIONS), from min_pos on; documents that have
    none are left out. Reads role.npy once. Raises DataError if it is not there or no document is left."""
    if positions == 'any':
        return split
    d, names = split.directory, split.meta.get('roles')
    if split.role is None or not isinstance(names, dict) or not set(POSITIONS[positions]) <= names.keys():
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
        found.append(ok.any(1) if split.positions is None else ok.any(1) & _given(split, rows, min_pos).any(1))
    rows = np.flatnonzero(np.concatenate(found))
    if not len(rows):
        raise DataError(f'{d} has no document with a position for data.positions={positions!r} from {min_pos} on.')
    return dataclasses.replace(split, rows=rows)


def draw_positions(
    length: int, count: int, min_pos: int, rng: np.random.Generator, allowed: np.ndarray | None = None
) -> np.ndarray:
    """Draws positions uniform on min(min_pos, length-1)..length-1, and of them where `allowed` (bool [length or more]);
    distinct where possible."""
    choices = np.arange(min(min_pos, length - 1), length)
    choices = choices if allowed is None else choices[allowed[choices]]
    return np.sort(rng.choice(choices, count, replace=len(choices) < count)).astype(np.int32)


def first_unlabelled(split: Split, min_pos: int) -> int | None:
    """Returns the first row that is read without a given explanation at a position that may be; None: all have one."""
    if split.codes is not None:  # `readable` has left them out
        return None
    ok = _given(split, slice(None), min_pos).any(1)
    return None if ok.all() else int(np.argmin(ok))


def _row(split: Split, i: int, *, vectors: int, min_pos: int, labelled: bool, rng) -> dict:
    row = {'tokens': np.asarray(split.tokens[i], np.int32), 'doc_id': np.int64(split.doc_id[i])}
    if labelled:
        have = np.flatnonzero(_given(split, [i], min_pos))
        pick = np.sort(rng.choice(have, vectors, replace=len(have) < vectors))
        row['positions'] = np.asarray(split.positions[i][pick], np.int32)
        given = np.asarray(split.explanations[i][pick], np.int32)
        row['explanations'] = given if split.respond is None else split.respond(given)
    else:
        allowed = None if split.codes is None else np.isin(split.role[i], split.codes)
        row['positions'] = draw_positions(int(split.lengths[i]), vectors, min_pos, rng, allowed)
    return row


def _order(split: Split, seed: int):
    """The endless sequence of documents that is trained on, the same for every number of processes."""
    return grain.MapDataset.source(split.read_rows).seed(seed).shuffle().repeat()


@dataclasses.dataclass(frozen=True)
class _Picked:
    """Of every `of` consecutive elements, those at `rows`."""

    parent: grain.MapDataset
    rows: np.ndarray
    of: int

    def __len__(self):
        return len(self.parent) // self.of * len(self.rows)

    def __getitem__(self, i):
        batch, row = divmod(int(i), len(self.rows))
        return self.parent[batch * self.of + int(self.rows[row])]


def train_batches(
    split: Split,
    *,
    documents: int,
    vectors: int,
    min_pos: int,
    labelled: bool,
    seed: int,
    rows: np.ndarray | None = None,
):
    """Returns an endless, checkpointable iterator over shuffled documents.

    Each batch has `documents` rows with `vectors` positions each: tokens [R, S], positions [R, V],
    doc_id [R] and, if `labelled`, the given explanations [R, V, T]. State: get_state / set_state.
    rows: the ones that this process reads, with the state of all of them; None: every row. config.check_documents says
    what the data must have.
    """
    drawn = _order(split, seed).random_map(
        lambda i, rng: _row(split, int(i), vectors=vectors, min_pos=min_pos, labelled=labelled, rng=rng)
    )
    rows = np.arange(documents) if rows is None else rows
    mine = grain.MapDataset.source(_Picked(drawn, rows, documents))
    return iter(mine.batch(len(rows)).to_iter_dataset(READ_OPTIONS))


def batch_documents(split: Split, documents: int, seed: int, index: int) -> list[int]:
    """Returns doc_id of every row of batch `index`, from 0, of train_batches."""
    order = _order(split, seed)
    return [int(split.doc_id[order[index * documents + r]]) for r in range(documents)]


def held_out(split: Split, *, documents: int, vectors: int, min_pos: int, seed: int) -> dict:
    """Returns the fixed held-out set: the first `documents` rows that may be read, positions drawn per document id.

    The arrays of a training batch plus `lengths` [R], and `facts` [R, V, F] where the split has them. Positions are
    those of given explanations [R, V, T] where every one of these rows has some.
    """
    n = min(documents, len(split))
    which = split.read_rows[:n]
    labelled = split.positions is not None and bool(_given(split, which, min_pos).any(1).all())
    rows = []
    for i in which:
        rng = np.random.default_rng([seed, int(split.doc_id[i]) % 2**64])
        rows.append(_row(split, i, vectors=vectors, min_pos=min_pos, labelled=labelled, rng=rng))
    batch = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    batch['lengths'] = np.asarray(split.lengths[which])
    if split.facts is not None:
        batch['facts'] = np.stack([split.facts[i][r['positions']] for i, r in zip(which, rows, strict=True)])
    return batch
