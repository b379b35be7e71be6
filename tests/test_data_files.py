"""lens.data: files of a split that are damaged, of other types, or that a run would stumble over at its end."""

import json
import os

import numpy as np
import pytest

from lens import data
from tests.small_split import DOCUMENTS, FIELDS, META, VOCAB, arrays, batches, held, open_train, refused, same, write
from tests.small_split import folder as folder
from tests.small_split import split as split


@pytest.mark.parametrize('name', list(arrays()))
@pytest.mark.parametrize('kind', ['archive', 'pipe', 'folder', 'text', 'expression', 'minus one'])
def test_files_that_are_no_array(folder, name, kind):
    """None is waited for, and nothing in a header is believed."""
    path = folder / f'{name}.npy'
    good = path.read_bytes()
    path.unlink()
    if kind == 'archive':
        with path.open('wb') as f:
            np.savez(f, a=arrays()[name])
    elif kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'folder':
        path.mkdir()
    elif kind == 'text':
        path.write_text('{"shape": 3}')
    elif kind == 'expression':  # headers are Python literals
        path.write_bytes(good.replace(b"{'descr'", b'{{{{{{{{{', 1))
    else:
        path.write_bytes(good.replace(b"'shape': (", b"'shape': (-", 1))
    refused(folder, str(path), 'is no file' if kind in ('pipe', 'folder') else 'is truncated or not a .npy array')


@pytest.mark.parametrize('name', list(arrays()))
@pytest.mark.parametrize(
    'dtype', ['<f4', '<c8', '?', 'S4', 'U2', 'M8[s]', [('a', '<i4')]], ids=['f', 'c', 'b', 'S', 'U', 'M', 'V']
)
def test_arrays_of_what_is_no_integer(folder, name, dtype):
    np.save(folder / f'{name}.npy', np.zeros(arrays()[name].shape, dtype))
    refused(folder, f'{folder}/{name}.npy holds')


@pytest.mark.parametrize('dtype', ['>i8', '>i4', '<i2', '<u2', '<u4', '<u8'])
def test_integers_of_any_type_and_order_are_read_alike(tmp_path, split, dtype):
    a = arrays()
    for name in a.keys() - {'facts', 'positions'}:
        a[name] = np.asfortranarray(a[name].astype(dtype))
    write(tmp_path, **a)
    other = data.open_split(str(tmp_path), 'train', vocab_size=VOCAB)
    assert (other.lengths.dtype, other.doc_id.dtype) == (np.int32, np.int64)
    same(batches(other, 3, labelled=True), batches(split, 3, labelled=True))
    same([held(other, min_pos=10**6)], [held(split, min_pos=10**6)])


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('tokens', (DOCUMENTS, 0)),
        ('positions', (DOCUMENTS, 0)),
        ('explanations', (DOCUMENTS, 3, 0)),
        ('lengths', (0,)),
    ],
)
def test_arrays_with_an_empty_axis(folder, name, shape):
    np.save(folder / f'{name}.npy', np.zeros(shape, np.int32))
    refused(folder, f'{folder}/{name}.npy has shape')


@pytest.mark.parametrize('value', [2**63, 2**64 - 1])
def test_document_ids_beyond_64_bits_with_a_sign(folder, value):
    ids = arrays()['doc_id'].astype(np.uint64)
    ids[3] = value
    np.save(folder / 'doc_id.npy', ids)
    refused(folder, f'{folder}/doc_id.npy holds values outside -9223372036854775808..9223372036854775807')


@pytest.mark.parametrize(
    ('name', 'value', 'what'), [('positions', -2, 'positions beyond'), ('facts', -2, 'values that')]
)
def test_only_minus_one_means_none(folder, name, value, what):
    x = arrays()[name]
    x[5, 2] = value
    np.save(folder / f'{name}.npy', x)
    refused(folder, f'{folder}/{name}.npy row 5 holds {what}')


@pytest.mark.parametrize(('field', 'value'), [(0, 2), (1, 3), (1, 127)])
def test_facts_beyond_the_values_of_their_field(folder, field, value):
    x = arrays()['facts']
    x[7, 4, field] = value
    np.save(folder / 'facts.npy', x)
    refused(folder, f'{folder}/facts.npy row 7 holds values that are not in the facts of meta.json')


def fields_with(**changes):
    return {'facts': [FIELDS[0], FIELDS[1] | changes]}


@pytest.mark.parametrize(
    ('meta', 'what'),
    [
        ({'pad_id': VOCAB}, f'pad_id={VOCAB} must be at most {VOCAB - 1}'),
        ({'pad_id': -1}, 'pad_id=-1 must be at least 0'),
        ({'pad_id': '0'}, "pad_id='0' must be a whole number"),
        ({'pad_id': 0.0}, 'pad_id=0.0 must be a whole number'),
        ({'filler_id': 10**30}, 'filler_id=1'),
        ({'filler_id': [1]}, 'filler_id=[1] must be a whole number'),
        ({'facts': 5}, 'facts is no list of {"field"'),
        ({'facts': {'a': 1}}, 'facts is no list of {"field"'),
        ({'facts': 'abc'}, 'facts is no list of {"field"'),
        ({'facts': [None]}, 'facts is no list of {"field"'),
        ({'facts': [{'field': 'a'}, {}]}, 'facts is no list of {"field"'),
        (fields_with(token_ids=None), 'facts is no list of {"field"'),
        (fields_with(token_ids=[103, 104]), 'facts is no list of {"field"'),
        (fields_with(values=['a', 'b', 'c', 'd']), 'facts is no list of {"field"'),
        (fields_with(values='abc'), 'facts is no list of {"field"'),
        (fields_with(field=None), 'facts: field=None must be a text'),
        (fields_with(field='\udc00'), 'facts: field='),
        (fields_with(values=['a', 'b', 3]), 'facts[mood]: value=3 must be a text'),
        (
            fields_with(token_ids=[103, 104, VOCAB]),
            f'facts[mood]: token id of calm={VOCAB} must be at most {VOCAB - 1}',
        ),
        (fields_with(token_ids=[103, 104, -1]), 'facts[mood]: token id of calm=-1 must be at least 0'),
        (fields_with(token_ids=[103, 104, True]), 'facts[mood]: token id of calm=True must be a whole number'),
        ({'roles': ['user']}, 'roles is no JSON object'),
        ({'roles': {'user': 'a'}}, "roles[user]='a' must be a whole number"),
        ({'roles': {'user': 3000}}, 'roles[user]=3000 must be at most 127'),
        ({'roles': {'user': None}}, 'roles[user]=None must be a whole number'),
        ({'roles': {'user': [1]}}, 'roles[user]=[1] must be a whole number'),
        ({'roles': {'user': 1, 'final': 1}}, 'roles has one code for two names'),
        ({'source': 'web'}, 'source is no JSON object'),
    ],
)
def test_meta_that_a_run_would_stumble_over_at_its_end(folder, meta, what):
    (folder / 'meta.json').write_text(json.dumps(META | meta))
    refused(folder, f'{folder}/meta.json: {what}')


def test_more_facts_than_the_array_has(folder):
    (folder / 'meta.json').write_text(json.dumps(META | {'facts': [*FIELDS, FIELDS[0]]}))
    refused(folder, f'{folder}/facts.npy has shape')


def test_the_filler_is_what_the_meta_says(folder):
    for meta, want in (({}, 0), ({'filler_id': 7}, 7), ({'filler_id': None, 'pad_id': 5}, 5), ({'pad_id': None}, 0)):
        (folder / 'meta.json').write_text(json.dumps(META | meta))
        assert open_train(folder).filler == want
