"""lens.data: what it reads, what it refuses, and which positions it draws."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from lens import data, feed, widths
from lens.data import DataError
from tests.small_split import (
    DOCUMENTS,
    META,
    VOCAB,
    F,
    S,
    T,
    arrays,
    batches,
    held,
    message_of,
    open_train,
    refused,
    row_of,
    same,
    write,
)
from tests.small_split import (
    folder as folder,
)
from tests.small_split import (
    split as split,
)

# ---- opening ----


def test_round_trip(folder):
    split = open_train(folder)
    for name, x in arrays().items():
        got = getattr(split, name)
        np.testing.assert_array_equal(got, x)
        assert got.dtype == x.dtype and isinstance(got, np.memmap), name
    assert len(split) == DOCUMENTS and split.meta == META and split.directory == folder


def test_explanations_and_facts_are_optional(tmp_path):
    a = arrays()
    write(tmp_path, meta={'format': 'lens-tokens/1'}, **{k: a[k] for k in ('tokens', 'lengths', 'doc_id')})
    split = data.open_split(str(tmp_path), 'train', vocab_size=VOCAB)
    assert split.positions is None and split.explanations is None and split.facts is None


@pytest.mark.parametrize('name', ['tokens', 'lengths', 'doc_id', 'explanations', 'facts'])
def test_missing_array(folder, name):
    (folder / f'{name}.npy').unlink()
    refused(folder, f'{folder}/{name}.npy does not exist', 'data.path')


def test_missing_split(folder):
    with pytest.raises(DataError) as error:
        data.open_split(str(folder.parent), 'validation', vocab_size=VOCAB)
    assert f'{folder.parent}/validation/meta.json does not exist' in message_of(error)


@pytest.mark.parametrize(('name', 'keep'), [('tokens', 0), ('tokens', 3), ('tokens', 64), *((n, -1) for n in arrays())])
def test_truncated_array(folder, name, keep):
    path = folder / f'{name}.npy'
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, f'{path} is truncated')


def test_array_that_would_execute_code_is_not_loaded(folder):
    np.save(folder / 'lengths.npy', np.array([{'a': 1}] * DOCUMENTS, dtype=object), allow_pickle=True)
    refused(folder, f'{folder}/lengths.npy')


@pytest.mark.parametrize(
    ('name', 'wrong'),
    [
        ('tokens', lambda x: x[0]),
        ('tokens', lambda x: x[..., None]),
        ('lengths', lambda x: x[:-1]),
        ('lengths', lambda x: x[:, None]),
        ('doc_id', lambda x: x[1:]),
        ('positions', lambda x: x[:-1]),
        ('explanations', lambda x: x[:, :-1]),
        ('explanations', lambda x: x[:, :, 0]),
        ('facts', lambda x: x[:, :-1]),
        ('facts', lambda x: x[:, :, :-1]),
    ],
)
def test_wrong_shape(folder, name, wrong):
    x = wrong(arrays()[name])
    np.save(folder / f'{name}.npy', x)
    refused(folder, f'{folder}/{name}.npy has shape {x.shape}', 'expected')


@pytest.mark.parametrize('name', ['tokens', 'explanations', 'positions', 'lengths'])
def test_wrong_type(folder, name):
    np.save(folder / f'{name}.npy', arrays()[name] + 0.5)
    refused(folder, f'{folder}/{name}.npy')


@pytest.mark.parametrize('bad', [-1, VOCAB, 2**31 - 1])
@pytest.mark.parametrize(('name', 'place'), [('tokens', (6, 2)), ('explanations', (6, 1, 3))])
def test_token_id_outside_the_vocabulary_names_the_row(folder, name, place, bad, monkeypatch):
    x = arrays()[name]
    x[place] = bad
    np.save(folder / f'{name}.npy', x)
    refused(folder, f'{folder}/{name}.npy row 6', f'0..{VOCAB - 1}')
    monkeypatch.setattr(data, 'BYTES_PER_SCAN', 4 * x[0].nbytes)  # the row counts from the start of the file
    refused(folder, f'{folder}/{name}.npy row 6', f'0..{VOCAB - 1}')


def test_the_vocabulary_is_that_of_the_subject(folder):
    top = int(arrays()['tokens'].max())
    assert open_train(folder, vocab_size=max(top, int(arrays()['explanations'].max())) + 1)
    with pytest.raises(DataError, match=r'tokens\.npy row \d+ holds token ids outside'):
        open_train(folder, vocab_size=top)


@pytest.mark.parametrize('text', ['', '{"format": "lens-tokens/1"', b'\xff\xfe\x00'])
def test_bad_json(folder, text):
    (folder / 'meta.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, f'{folder}/meta.json is not valid JSON')


def test_meta_that_is_no_object(folder):
    (folder / 'meta.json').write_text('["lens-tokens/1"]')
    refused(folder, f'{folder}/meta.json holds no JSON object', 'data.path')


@pytest.mark.parametrize('meta', [{}, {'format': 'lens-tokens/2'}, {'format': None}])
def test_wrong_format(folder, meta):
    (folder / 'meta.json').write_text(json.dumps(meta))
    refused(folder, f'{folder}/meta.json', 'lens-tokens/1')


@pytest.mark.parametrize('length', [0, -1, S + 1])
def test_length_out_of_range(folder, length):
    x = arrays()['lengths']
    x[4] = length
    np.save(folder / 'lengths.npy', x)
    refused(folder, f'{folder}/lengths.npy', f'1..{S}')


@pytest.mark.parametrize('position', [S, 10 * S])
def test_labelled_position_outside_the_text(folder, position):
    """Reading there would give NaN or another token's state, without a word."""
    x = arrays()['positions']
    x[4, 2] = position
    np.save(folder / 'positions.npy', x)
    refused(folder, f'{folder}/positions.npy', 'row 4')


def test_labelled_position_in_the_padding(folder):
    a = arrays()
    row = int(np.argmin(a['lengths']))
    a['positions'][row, -1] = a['lengths'][row]
    np.save(folder / 'positions.npy', a['positions'])
    refused(folder, f'{folder}/positions.npy', f'row {row}')


def test_no_documents(folder):
    for name, x in arrays().items():
        np.save(folder / f'{name}.npy', x[:0])
    refused(folder, f'{folder}/tokens.npy', 'no documents')


# ---- the leak check ----


def two_splits(root, validation):
    write(root, 'train', **arrays())
    write(root, 'validation', **validation)
    return [data.open_split(str(root), s, vocab_size=VOCAB) for s in ('train', 'validation')]


def leak(splits):
    with pytest.raises(DataError) as error:
        data.check_disjoint(*splits)
    text = message_of(error)
    assert all(str(s.directory) in text for s in splits)
    return text


def test_disjoint_splits_pass(tmp_path):
    data.check_disjoint(*two_splits(tmp_path, arrays(5000)))


def test_shared_document_ids(tmp_path):
    other = arrays(5000)
    other['doc_id'][3] = arrays()['doc_id'][8]
    text = leak(two_splits(tmp_path, other))
    assert 'share 1 document id' in text and str(arrays()['doc_id'][8]) in text


def test_shared_texts(tmp_path):
    other = arrays(5000)
    for k in ('tokens', 'lengths'):
        other[k][3] = arrays()[k][8]
    assert 'tokens.npy row 8' in leak(two_splits(tmp_path, other))


def test_shared_texts_are_found_whatever_the_padding_and_the_type(tmp_path):
    """The same text in a wider array of another integer type, padded with another id."""
    a, other = arrays(), arrays(5000)
    n = a['lengths'][8]
    other['tokens'] = np.pad(other['tokens'], ((0, 0), (0, 4))).astype(np.uint16)
    other['facts'] = np.pad(other['facts'], ((0, 0), (0, 4), (0, 0)))
    other['tokens'][3] = 5
    other['tokens'][3, :n], other['lengths'][3] = a['tokens'][8, :n], n
    assert 'tokens.npy row 8' in leak(two_splits(tmp_path, other))


def test_data_of_another_tokenizer_is_refused(tmp_path):
    write(tmp_path, 'train', **arrays())
    write(tmp_path, 'validation', META | {'tokenizer_sha256': 'b'}, **arrays(5000))
    train, validation = data.open_splits(str(tmp_path), VOCAB, 'gpt', lambda subject: 'b' * (subject == 'gpt'))
    assert (train.directory.name, validation.directory.name) == ('train', 'validation')
    with pytest.raises(DataError) as error:
        data.open_splits(str(tmp_path), VOCAB, 'gpt', lambda subject: 'a')
    assert f'{tmp_path}/validation was made with another tokenizer than that of gpt' in message_of(error)


# ---- positions ----


@pytest.mark.parametrize(('length', 'min_pos'), [(12, 3), (12, 0), (5, 4), (5, 5), (3, 8), (1, 0), (1, 8)])
@pytest.mark.parametrize('count', [1, 2, 4])
def test_draw_positions(length, min_pos, count):
    allowed = set(range(min(min_pos, length - 1), length))  # a short document offers its last token
    seen = set()
    for seed in range(200):
        p = feed.draw_positions(length, count, min_pos, np.random.default_rng(seed))
        assert p.shape == (count,) and p.dtype == np.int32
        assert set(p.tolist()) <= allowed and p.tolist() == sorted(p)
        assert len(set(p.tolist())) == count or len(allowed) < count
        seen |= set(p.tolist())
    assert seen == allowed  # both ends included


def test_draw_positions_is_uniform():
    p = np.concatenate([feed.draw_positions(10, 2, 4, np.random.default_rng(s)) for s in range(3000)])
    # 6000 draws over 6 positions: a standard deviation of 29 around 1000
    np.testing.assert_allclose(np.bincount(p, minlength=10)[4:], 1000, atol=150)


# ---- training batches ----


def test_train_batches_have_the_shapes_and_the_content_of_their_documents(split):
    for batch in batches(split, 6):
        assert {k: v.shape for k, v in batch.items()} == {'tokens': (4, S), 'positions': (4, 2), 'doc_id': (4,)}
        rows = row_of(batch['doc_id'])
        np.testing.assert_array_equal(batch['tokens'], split.tokens[rows])
        assert (batch['positions'] >= 3).all() and (batch['positions'] < split.lengths[rows][:, None]).all()
        assert (np.diff(batch['positions'], axis=1) > 0).all()


def test_train_batches_are_deterministic_and_differ_by_seed(split):
    same(batches(split, 6), batches(split, 6))
    one, two = (np.concatenate([b['doc_id'] for b in batches(split, 5, seed=s)]) for s in (0, 1))
    assert (one != two).any()
    p, q = (np.concatenate([b['positions'].ravel() for b in batches(split, 5, seed=s)]) for s in (0, 1))
    assert (p != q).any()


def test_an_epoch_takes_every_document_once_but_for_those_left_over(split):
    """10 documents in batches of 4: two batches, and two documents are left over, others in each epoch."""
    ids = np.array([b['doc_id'] for b in batches(split, 24)])
    epochs = ids.reshape(12, 8)
    assert all(len(set(epoch)) == 8 and set(epoch) <= set(split.doc_id.tolist()) for epoch in epochs)
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 3 and set(epochs.flat) == set(split.doc_id.tolist())
    assert len({tuple(epoch) for epoch in epochs}) == 12, 'every epoch has an order of its own'


def test_widths_are_the_fewest_that_pad_little_and_of_those_the_best():
    """Against all choices of up to three widths."""
    for seed in range(6):
        lengths = np.random.default_rng(seed).lognormal(5, 0.2 + 0.1 * seed, 40).astype(int) + 1
        share = {}
        for n in (1, 2, 3):
            for some in itertools.combinations(range(16, lengths.max() + 16, 16), n):
                if some[-1] >= lengths.max():
                    read = np.array(some)[np.searchsorted(some, lengths)].sum()
                    share[n] = max(share.get(n, 0.0), lengths.sum() / read)
        got = widths.choose_widths(lengths)
        assert len(got) == next((n for n, x in share.items() if x >= widths.TEXT_SHARE), len(got)) or len(got) > 3
        if len(got) <= 3:
            assert lengths.sum() / got[np.searchsorted(got, lengths)].sum() == pytest.approx(share[len(got)])


def test_one_long_text_does_not_make_the_widths_of_short_ones_coarse():
    lengths = np.r_[np.full(4000, 20), np.full(4000, 40), 32768]
    assert widths.choose_widths(lengths).tolist() == [32, 48, 32768]


def test_most_of_what_the_subject_reads_is_text(tmp_path):
    """Chats of lognormal length in rows of 4096 tokens; what a row is cut by is padding."""
    rng, n = np.random.default_rng(0), 2000
    lengths = np.clip(rng.lognormal(np.log(1100), 0.6, n), 16, 4096).astype(np.int32)
    tokens = np.tile(np.arange(1, 4097, dtype=np.int32), (n, 1))
    write(
        tmp_path, meta={'format': 'lens-tokens/1'}, lengths=lengths, tokens=tokens, doc_id=np.arange(n, dtype=np.int64)
    )
    split = data.open_split(str(tmp_path), 'train', vocab_size=5000)
    some = batches(split, 100, documents=8)
    width = np.array([b['tokens'].shape[1] for b in some])
    texts = np.array([lengths[b['doc_id']] for b in some])
    assert texts.sum() / (8 * width).sum() > 0.8 and len(set(width)) <= widths.MOST_WIDTHS
    assert all((texts.max(1) <= width) & (width <= 4096)) and len(set(texts.ravel())) > 500
    assert abs(np.corrcoef(np.arange(100), width)[0, 1]) < 0.4, 'short and long batches take turns'
    for part in ([0, 1, 2], [7]):
        mine = batches(split, 100, documents=8, rows=np.array(part))
        same(mine, [{k: x[part] for k, x in b.items()} for b in some])


def test_train_batches_draw_new_positions_in_every_epoch(split):
    drawn = {}
    for b in batches(split, 15):
        for doc, p in zip(b['doc_id'].tolist(), b['positions'].tolist(), strict=True):
            drawn.setdefault(doc, set()).add(tuple(p))
    assert all(len(p) > 1 for p in drawn.values())


def test_every_batch_draws_positions_of_its_own(tmp_path):
    """Of the same document in the same row."""
    one = {k: x[:1] for k, x in arrays().items() if k in ('tokens', 'lengths', 'doc_id')}
    write(tmp_path, meta={'format': 'lens-tokens/1'}, **one)
    split = data.open_split(str(tmp_path), 'train', vocab_size=VOCAB)
    drawn = {tuple(b['positions'][0].tolist()) for b in batches(split, 20, documents=1)}
    assert len(drawn) > 10


@pytest.mark.parametrize('labelled', [False, True])
def test_train_batches_continue_from_a_saved_state(split, labelled):
    it = batches(split, labelled=labelled)
    states, whole = [it.get_state()], []
    for _ in range(9):
        whole.append(next(it))
        states.append(it.get_state())
    for done in (0, 1, 3, 7):
        again = batches(split, labelled=labelled)
        again.set_state(json.loads(json.dumps(states[done])))  # as a checkpoint keeps it
        same([next(again) for _ in range(9 - done)], whole[done:])


def test_labelled_positions_carry_their_own_explanation(split):
    for batch in batches(split, 10, labelled=True, vectors=2):
        rows = row_of(batch['doc_id'])
        assert batch['explanations'].shape == (4, 2, T)
        np.testing.assert_array_equal(
            batch['explanations'], np.repeat((50 * rows[:, None] + batch['positions'])[..., None], T, 2)
        )
        for row, p in zip(rows, batch['positions'], strict=True):
            have = set(split.positions[row].tolist()) - {-1}
            assert set(p.tolist()) <= have  # -1 is no position
            assert len(set(p.tolist())) == min(2, len(have))


def test_document_ids_keep_their_64_bits(tmp_path):
    """doc_id.npy is int64 (a hash, often); errors name documents by it."""
    a = arrays()
    a['doc_id'] = a['doc_id'] + 2**40
    write(tmp_path, **a)
    split = data.open_split(str(tmp_path), 'train', vocab_size=VOCAB)
    assert set(batches(split, 1)[0]['doc_id'].tolist()) <= set(a['doc_id'].tolist())
    held = feed.held_out(split, documents=3, vectors=2, min_pos=3, seed=0)
    assert held['doc_id'].tolist() == a['doc_id'][:3].tolist()


# ---- held-out set ----


def test_held_out_is_fixed_and_does_not_depend_on_the_number_of_documents(split):
    five, three = held(split, 5), held(split, 3)
    same([five], [held(split, 5)])
    same([{k: v[:3] for k, v in five.items()}], [three])
    assert len(held(split, 1000)['tokens']) == DOCUMENTS


def test_held_out_takes_the_first_documents_in_order(split):
    got = held(split, 5)
    for k in ('tokens', 'lengths', 'doc_id'):
        np.testing.assert_array_equal(got[k], getattr(split, k)[:5])


def test_held_out_facts_and_explanations_are_those_at_the_positions(split):
    got = held(split, DOCUMENTS)
    assert got['facts'].shape == (DOCUMENTS, 2, F) and got['explanations'].shape == (DOCUMENTS, 2, T)
    for i, v in np.ndindex(DOCUMENTS, 2):
        p = got['positions'][i, v]
        assert p in split.positions[i]
        np.testing.assert_array_equal(got['facts'][i, v], split.facts[i, p])
        assert (got['explanations'][i, v] == 50 * i + p).all()


def test_held_out_without_explanations_draws_positions_from_seed_and_document(tmp_path):
    a = arrays()
    meta = {'format': 'lens-tokens/1'}
    write(tmp_path, meta=meta, **{k: a[k] for k in ('tokens', 'lengths', 'doc_id')})
    split = data.open_split(str(tmp_path), 'train', vocab_size=VOCAB)
    got = held(split, DOCUMENTS)
    assert set(got) == {'tokens', 'positions', 'doc_id', 'lengths'}
    assert (got['positions'] >= 3).all() and (got['positions'] < a['lengths'][:, None]).all()
    assert (held(split, DOCUMENTS, seed=1)['positions'] != got['positions']).any()
    # the order of the file does not matter: each document keeps its positions
    write(tmp_path, 'turned', meta=meta, **{k: a[k][::-1] for k in ('tokens', 'lengths', 'doc_id')})
    turned = held(data.open_split(str(tmp_path), 'turned', vocab_size=VOCAB), DOCUMENTS)
    np.testing.assert_array_equal(turned['positions'][::-1], got['positions'])


def test_the_fingerprint_is_of_documents_their_order_and_their_labels(tmp_path):
    write(tmp_path, **arrays())
    split, again = (data.open_split(str(tmp_path), 'train', vocab_size=VOCAB) for _ in range(2))
    other = [dataclasses.replace(split, **{k: getattr(split, k)[::-1]}) for k in ('doc_id', 'lengths', 'positions')]
    prints = [data.fingerprint(x) for x in (split, *other, dataclasses.replace(split, positions=None))]
    assert len(set(prints)) == 5 and data.fingerprint(again) == prints[0]
