"""What a step and an evaluation are given of the documents: batches of rows with drawn or labelled positions (Grain)."""

import dataclasses
import functools
from collections.abc import Callable

import grain
import numpy as np

from lens import data
from lens.data import Split

ENDLESS = 1 << 53  # rows
READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)  # measured: more threads are slower


def draw_positions(
    length: int, count: int, min_pos: int, rng: np.random.Generator, allowed: np.ndarray | None = None
) -> np.ndarray:
    """Draws positions uniform on min(min_pos, length-1)..length-1, and of them where `allowed` (bool [length or more]);
    distinct where possible."""
    choices = np.arange(min(min_pos, length - 1), length)
    choices = choices if allowed is None else choices[allowed[choices]]
    return np.sort(rng.choice(choices, count, replace=len(choices) < count)).astype(np.int32)


def _row(split: Split, i: int, *, width: int, vectors: int, min_pos: int, labelled: bool, rng) -> dict:
    row, stored = {'doc_id': np.int64(split.doc_id[i])}, split.activations is not None
    if not stored:
        row['tokens'] = np.asarray(split.tokens[i, :width], np.int32)
    if labelled or stored:
        have = np.flatnonzero(data.given(split, [i], min_pos))
        pick = np.sort(rng.choice(have, vectors, replace=len(have) < vectors))
        row['positions'] = np.asarray(split.positions[i][pick], np.int32)
    if stored:
        row['activations'] = np.asarray(split.activations[i][pick], np.float32)
    if labelled:
        given = np.asarray(split.explanations[i][pick], np.int32)
        row['explanations'] = given if split.respond is None else split.respond(given)
    elif not stored:
        allowed = None if split.codes is None else np.isin(split.role[i], split.codes)
        row['positions'] = draw_positions(int(split.lengths[i]), vectors, min_pos, rng, allowed)
    return row


class _Order:
    """The endless sequence of batches that is trained on, the same for every number of processes.

    An epoch has each document in one batch, but for the fewer than `documents` that are left over, drawn anew in each.
    The documents of a batch need about the same width.
    """

    def __init__(self, split: Split, documents: int, seed: int):
        self._split, self._documents, self._seed = split, documents, seed
        self._batches = len(split) // documents
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        rows = rng.permutation(self._split.read_rows)[: self._batches * self._documents]
        need = np.searchsorted(self._split.widths, self._split.lengths[rows])
        rows = rows[np.argsort(need, kind='stable')]
        return rng.permutation(rows.reshape(self._batches, self._documents))

    def __getitem__(self, batch: int) -> tuple[np.ndarray, int]:
        """Returns the documents of a batch and its width."""
        rows = self._epoch(batch // self._batches)[batch % self._batches]
        return rows, self._split.width_for(self._split.lengths[rows])


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows `mine` of every batch one after the other, read; the randomness depends on the place in the whole."""

    order: _Order
    mine: np.ndarray
    documents: int
    seed: int
    read: Callable[..., dict]

    def __len__(self):
        return ENDLESS // self.documents * len(self.mine)

    def __getitem__(self, i):
        batch, k = divmod(int(i), len(self.mine))
        rows, width = self.order[batch]
        place = batch * self.documents + int(self.mine[k])
        return self.read(i=int(rows[self.mine[k]]), width=width, rng=np.random.default_rng([self.seed, 0, place]))


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

    Each batch has `documents` rows with `vectors` positions each: tokens [R, S'], positions [R, V], doc_id [R] and, if
    `labelled`, the given explanations [R, V, T]. S' is one of split.widths. Stored activations [R, V, D] come in place of
    tokens. State: get_state / set_state.
    rows: the ones that this process reads, with the state of all of them; None: every row. checks.check_documents says
    what the data must have.
    """
    rows = np.arange(documents) if rows is None else rows
    read = functools.partial(_row, split, vectors=vectors, min_pos=min_pos, labelled=labelled)
    source = grain.MapDataset.source(_Rows(_Order(split, documents, seed), rows, documents, seed, read))
    return iter(source.batch(len(rows)).to_iter_dataset(READ_OPTIONS))


def batch_documents(split: Split, documents: int, seed: int, index: int) -> list[int]:
    """Returns doc_id of every row of batch `index`, from 0, of train_batches."""
    return [int(x) for x in split.doc_id[_Order(split, documents, seed)[index][0]]]


def held_out(split: Split, *, documents: int, vectors: int, min_pos: int, seed: int) -> dict:
    """Returns the fixed held-out set: the first `documents` rows that may be read, positions drawn per document id.

    The arrays of a training batch plus `lengths` [R], and `facts` [R, V, F] where the split has them. Positions are
    those of given explanations [R, V, T] where every one of these rows has some.
    """
    n = min(documents, len(split))
    which = split.read_rows[:n]
    labelled = split.explanations is not None and bool(data.given(split, which, min_pos).any(1).all())
    rows = []
    for i in which:
        rng = np.random.default_rng([seed, int(split.doc_id[i]) % 2**64])
        rows.append(_row(split, i, width=split.width, vectors=vectors, min_pos=min_pos, labelled=labelled, rng=rng))
    batch = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    batch['lengths'] = np.asarray(split.lengths[which])
    if split.facts is not None:
        batch['facts'] = np.stack([split.facts[i][r['positions']] for i, r in zip(which, rows, strict=True)])
    return batch
