"""One small split on disk in which every value names its place, and how it is read."""

import itertools
import json

import numpy as np
import pytest

from lens import data, feed

DOCUMENTS, S, POSITIONS, T, F, VOCAB = 10, 13, 3, 4, 2, 600
FIELDS = [
    {'field': 'kind', 'values': ['fox', 'owl'], 'token_ids': [101, 102]},
    {'field': 'mood', 'values': ['sad', 'glad', 'calm'], 'token_ids': [103, 104, 105]},
]


def arrays(first_id=1000, documents=DOCUMENTS):
    """Every value names its place: explanation of document i at p starts with 50 * i + p."""
    rng = np.random.default_rng(first_id)
    lengths = rng.integers(8, S + 1, documents).astype(np.int32)
    lengths[0] = S
    tokens = rng.integers(1, VOCAB, (documents, S)).astype(np.int32)
    tokens[np.arange(S) >= lengths[:, None]] = 0
    positions = np.stack([np.sort(rng.choice(n, POSITIONS, replace=False)) for n in lengths]).astype(np.int32)
    positions[1] = [positions[1].max(), -1, -1]  # -1: fewer than POSITIONS labelled positions
    explanations = np.broadcast_to(
        (50 * np.arange(documents)[:, None] + positions)[..., None], (documents, POSITIONS, T)
    )
    facts = np.stack([rng.integers(-1, len(f['values']), (documents, S)) for f in FIELDS], -1).astype(np.int8)
    return {
        'tokens': tokens,
        'lengths': lengths,
        'doc_id': first_id + 7 * np.arange(documents, dtype=np.int64),
        'positions': positions,
        'explanations': np.abs(explanations).astype(np.int32),
        'facts': facts,
    }


META = {'format': 'lens-tokens/1', 'vocab_size': VOCAB, 'pad_id': 0, 'facts': FIELDS}


def write(root, split='train', meta=META, **arrays_of_split):
    folder = root / split
    folder.mkdir(parents=True)  # never written over: a reader's thread may have the arrays mapped
    (folder / 'meta.json').write_text(json.dumps(meta))
    for name, x in arrays_of_split.items():
        np.save(folder / f'{name}.npy', x)
    return folder


@pytest.fixture
def folder(tmp_path):
    """tmp_path/train with every array; tests damage it."""
    return write(tmp_path, **arrays())


@pytest.fixture(scope='module')
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write(root, **arrays())
    return data.open_split(str(root), 'train', vocab_size=VOCAB)


def open_train(folder, vocab_size=VOCAB):
    return data.open_split(str(folder.parent), 'train', vocab_size=vocab_size)


def message_of(error) -> str:
    """The message, after a check that it is one sentence on one line."""
    text = str(error.value)
    assert text.endswith('.') and '\n' not in text and '. ' not in text.replace('e.g. ', ''), text
    return text


def refused(folder, *needles):
    """Opening the split fails with a sentence that holds the needles."""
    with pytest.raises(data.DataError) as error:
        open_train(folder)
    text = message_of(error)
    assert [n for n in needles if n not in text] == [], text


def batches(split, n=None, **more):
    settings = {'documents': 4, 'vectors': 2, 'min_pos': 3, 'labelled': False, 'seed': 0} | more
    it = feed.train_batches(split, **settings)
    return it if n is None else list(itertools.islice(it, n))


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for k in x:
            np.testing.assert_array_equal(x[k], y[k])


def row_of(doc_id):
    return (np.asarray(doc_id) - 1000) // 7


def held(split, documents=5, **more):
    return feed.held_out(split, documents=documents, **{'vectors': 2, 'min_pos': 3, 'seed': 0} | more)
