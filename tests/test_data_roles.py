"""lens.data: positions of one role."""

import json

import numpy as np
import pytest

from lens import data
from lens.data import DataError
from tests.small_split import (
    DOCUMENTS,
    FIELDS,
    VOCAB,
    S,
    arrays,
    batches,
    held,
    message_of,
    row_of,
    same,
    write,
)
from tests.small_split import (
    split as split,
)

ROLES = {'system': 4, 'user': 1, 'thinking': 0, 'final': 3, 'special': 5, 'text': 2}  # codes are the data's own
KIND = {'assistant': ('thinking', 'final'), 'thinking': ('thinking',), 'final': ('final',)}


def with_roles(root, labelled=False, split='train', **more):
    """Document 2 has nothing of the assistant, 4 only its first token, 5 a final answer alone."""
    a = arrays()
    role = np.random.default_rng(5).choice([ROLES[k] for k in ('user', 'thinking', 'final', 'special')], (DOCUMENTS, S))
    role[2], role[4], role[5] = ROLES['user'], ROLES['user'], ROLES['final']
    role[4, 0] = ROLES['thinking']
    a['role'] = np.where(np.arange(S) < a['lengths'][:, None], role, -1).astype(np.int8)
    names = (*a, 'role') if labelled else ('tokens', 'lengths', 'doc_id', 'role')
    meta = {'format': 'lens-tokens/1', 'roles': ROLES} | more
    folder = write(root, split, meta, **{k: a[k] for k in names})
    return data.open_split(str(folder.parent), split, vocab_size=VOCAB), a


def may_be_read(a, kind, min_pos=3):
    """[N, S] by the definition, one position at a time."""
    codes = [ROLES[k] for k in KIND[kind]]
    return np.array(
        [
            [p >= min(min_pos, n - 1) and p < n and row[p] in codes for p in range(S)]
            for row, n in zip(a['role'], a['lengths'], strict=True)
        ]
    )


@pytest.mark.parametrize('kind', list(KIND))
def test_positions_of_one_role(tmp_path, kind):
    split, a = with_roles(tmp_path)
    chosen, ok = data.readable(split, kind, 3), may_be_read(a, kind)
    have = np.flatnonzero(ok.any(1))
    assert 2 not in have and 4 not in have and (5 in have) == (kind != 'thinking')
    assert chosen.rows.tolist() == have.tolist() and len(chosen) == len(have)
    assert chosen.left_out == DOCUMENTS - len(have) and split.left_out == 0
    seen = np.zeros_like(ok)
    # several positions of each: one that is not drawn in 40 batches may not be read
    for batch in [*batches(chosen, 40, vectors=6), held(chosen, DOCUMENTS, vectors=6)]:
        rows = row_of(batch['doc_id'])
        assert set(rows) <= set(have) and (np.diff(batch['positions']) >= 0).all()
        np.testing.assert_array_equal(batch['tokens'], a['tokens'][rows])
        for row, p in zip(rows, batch['positions'], strict=True):
            assert ok[row, p].all() and (len(set(p.tolist())) == 6 or ok[row].sum() < 6)
            seen[row, p] = True
    assert (seen == ok).all()  # every one that may be read comes up
    assert held(chosen, 3)['doc_id'].tolist() == split.doc_id[have[:3]].tolist()
    np.testing.assert_array_equal(held(chosen, 3)['lengths'], a['lengths'][have[:3]])


def test_positions_of_any_role_are_those_of_data_without_roles(tmp_path, split):
    chosen, _ = with_roles(tmp_path)
    assert data.readable(chosen, 'any', 3) is chosen
    same(batches(chosen, 6), batches(split, 6))


def test_positions_of_one_role_are_deterministic_and_continue(tmp_path):
    chosen = data.readable(with_roles(tmp_path)[0], 'assistant', 3)
    opened_again = data.readable(data.open_split(str(tmp_path), 'train', vocab_size=VOCAB), 'assistant', 3)
    whole = batches(chosen, 8)
    same(whole, batches(chosen, 8))
    it = batches(chosen)
    for _ in range(3):
        next(it)
    state = json.loads(json.dumps(it.get_state()))
    again = batches(opened_again)
    again.set_state(state)
    same([next(again) for _ in range(5)], whole[3:])
    five, two = held(chosen, 5), held(chosen, 2)
    same([{k: v[:2] for k, v in five.items()}], [two])


def test_roles_are_scanned_in_blocks(tmp_path, monkeypatch):
    split, _ = with_roles(tmp_path)
    rows = data.readable(split, 'final', 3).rows
    monkeypatch.setattr(data, 'BYTES_PER_SCAN', 3 * S)
    assert data.readable(split, 'final', 3).rows.tolist() == rows.tolist()


def test_given_explanations_of_one_role(tmp_path):
    split, a = with_roles(tmp_path, labelled=True, facts=FIELDS)
    chosen, ok = data.readable(split, 'assistant', 0), may_be_read(a, 'assistant', 0)
    for batch in [*batches(chosen, 20, labelled=True, min_pos=0), held(chosen, DOCUMENTS, min_pos=0)]:
        for row, p, e in zip(row_of(batch['doc_id']), batch['positions'], batch['explanations'], strict=True):
            assert ok[row, p].all() and set(p.tolist()) <= set(a['positions'][row].tolist())
            assert e[:, 0].tolist() == (50 * row + p).tolist()
    got = held(chosen, DOCUMENTS, min_pos=0)
    rows = row_of(got['doc_id'])
    np.testing.assert_array_equal(got['facts'], a['facts'][rows[:, None], got['positions']])


def test_roles_that_are_not_there(tmp_path, split):
    bare = with_roles(tmp_path / 'a')[0]
    for x in (split, data.open_split(str(tmp_path / 'a'), 'train', vocab_size=VOCAB)):
        if x is not split:
            x.meta.pop('roles')
        with pytest.raises(DataError) as error:
            data.readable(x, 'final', 3)
        assert str(x.directory) in message_of(error) and "data.positions='final'" in str(error.value)
    (bare.directory / 'role.npy').unlink()
    assert data.open_split(str(tmp_path / 'a'), 'train', vocab_size=VOCAB).role is None
    with pytest.raises(DataError) as error:
        data.readable(with_roles(tmp_path / 'b', roles=ROLES | {'thinking': 77})[0], 'thinking', 3)
    assert 'no document with a position' in message_of(error)
