"""The evaluator against a loop over sampler and encoder, and its controls against what they claim."""

import dataclasses
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from data_gen.storyworld import world
from lens import config, data, hf, metrics, sampling, sharding
from lens.evaluate import Evaluator
from lens.models import subject
from lens.models.encoder import encode
from lens.response import NO_TAGS
from tests.conftest import LAYER, LENGTH, TINY, make_base, make_lens

DOCUMENTS, VECTORS = 7, 2


@pytest.fixture(scope='module')
def split(tmp_path_factory):
    """Seven documents with two known fields; batches of three do not divide them."""
    d = tmp_path_factory.mktemp('data') / 'validation'
    d.mkdir()
    rng = np.random.default_rng(8)
    fields = [
        {'field': 'a', 'values': ['x', 'y'], 'token_ids': [11, 12]},
        {'field': 'b', 'values': ['z'], 'token_ids': [30]},
    ]
    arrays = {
        'tokens': rng.integers(0, TINY.vocab_size, (DOCUMENTS, 10)),
        'lengths': np.array([10, 9, 10, 8, 10, 10, 9]),
        'positions': np.sort(rng.permuted(np.tile(np.arange(2, 8), (DOCUMENTS, 1)), axis=1)[:, :3], axis=1),
        'explanations': rng.integers(0, TINY.vocab_size, (DOCUMENTS, 3, LENGTH)),
        'facts': rng.integers(-1, [2, 1], (DOCUMENTS, 10, 2)),
    }
    for name, x in arrays.items():
        np.save(d / f'{name}.npy', x.astype(np.int8 if name == 'facts' else np.int32))
    np.save(d / 'doc_id.npy', np.array([-5, 3, 9, 2**60, 11, 12, 13]))
    (d / 'meta.json').write_text(json.dumps({'format': data.FORMAT, 'vocab_size': TINY.vocab_size, 'facts': fields}))
    return data.open_split(str(d.parent), 'validation', vocab_size=TINY.vocab_size)


def evaluator(split, base, mesh):
    settings = config.EvalSettings(
        quick_documents=4, documents=DOCUMENTS, vectors=VECTORS, batch=3 * VECTORS, samples=4
    )
    tokenizer = types.SimpleNamespace(decode=lambda ids: f' {ids[0]}')
    return Evaluator(
        types.SimpleNamespace(
            evaluation=settings,
            base=base,
            tokenizer=tokenizer,
            mesh=mesh,
            seed=0,
            layer=LAYER,
            length=LENGTH,
            tags=NO_TAGS,
            error='nmse',
            min_pos=2,
            validation=split,
        )
    )


@pytest.fixture(scope='module')
def result(split):
    mesh = sharding.make_mesh(1, 1)
    base = make_base()
    with jax.set_mesh(mesh):
        base, lens = sharding.place(base, mesh), sharding.place(make_lens(base), mesh)
        e = evaluator(split, base, mesh)
        return e, e._collect(lens, DOCUMENTS, controls=True), e.full(lens)


def test_every_text_and_reconstruction_belongs_to_its_activation(result):
    e, c, _ = result
    base, lens = make_base(), make_lens(make_base())
    tokens, positions = e.held['tokens'], e.held['positions']
    a = np.asarray(subject.read(base, tokens, positions, LAYER)).reshape(-1, TINY.d_model)
    assert len(c['a']) == DOCUMENTS * VECTORS
    np.testing.assert_allclose(c['a'], a, atol=1e-5)
    greedy = sampling.sample(lens.decoder, base, a, jax.random.key(0), length=LENGTH, temperature=0.0).ids_NxT
    np.testing.assert_array_equal(c['ids_greedy'], greedy)
    assert (c['ids'] != c['ids_greedy']).any(1).mean() > 0.5
    previous = np.stack(
        [tokens[d, np.maximum(np.arange(p - LENGTH + 1, p + 1), 0)] for d, row in enumerate(positions) for p in row]
    )
    texts = {
        'pred': c['ids'],
        'pred_greedy': c['ids_greedy'],
        'pred_previous_tokens': previous,
        'pred_given': e.held['explanations'].reshape(-1, LENGTH),
    }
    for name, ids in texts.items():
        np.testing.assert_allclose(c[name], encode(lens.encoder, base, ids), atol=1e-5, err_msg=name)


def test_without_the_activation_texts_do_not_depend_on_it(result):
    """The zero vector gives one distribution for all: greedy it is one text."""
    _, c, _ = result
    base, lens = make_base(), make_lens(make_base())
    draws = sampling.sample(lens.decoder, base, 0 * c['a'], jax.random.key(3), length=LENGTH, temperature=0.0).ids_NxT
    assert len(np.unique(np.asarray(draws), axis=0)) == 1
    assert np.abs(c['pred_no_activation'] - c['pred']).max() > 0.05


def test_figures_are_the_statistics_of_what_was_collected(result):
    e, c, full = result
    doc = np.repeat([0, 1, 2, 6, 3, 4, 5], VECTORS)  # order of the document ids
    np.testing.assert_array_equal(doc, e._documents(DOCUMENTS))
    values = full.values()
    var = c['a'].astype(np.float64).var(0, ddof=1).sum()

    def fve(pred):
        return 1 - ((c['a'].astype(np.float64) - pred) ** 2).sum(1).mean() / var

    for name, key in (
        ('fve', 'pred'),
        ('fve_greedy', 'pred_greedy'),
        ('fve_given', 'pred_given'),
        ('fve_no_activation', 'pred_no_activation'),
        ('fve_previous_tokens', 'pred_previous_tokens'),
    ):
        np.testing.assert_allclose(values[name], fve(c[key]), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(values['fve_shuffled'], fve(c['pred'][metrics.other_document(doc)]), rtol=1e-6)
    assert abs(values['fve_shuffled'] - values['fve']) > 1e-3
    np.testing.assert_allclose(values['fve_zero_baseline'], fve(0), rtol=1e-6)
    truth = e.held['facts'].reshape(-1, 2)
    expected, _ = metrics.facts(c['ids_greedy'], truth, e.fields, doc)
    assert full.figures['facts_recall'] == expected['facts_recall']
    assert [s['doc_id'] for s in full.samples] == [-5, 3, 9, 2**60]
    assert [len(s['tokens']) for s in full.samples] == [10, 9, 10, 8]


@pytest.mark.slow
def test_another_mesh_gives_the_same_figures(split, result):
    mesh = sharding.make_mesh(4, 2)
    with jax.set_mesh(mesh):
        base = sharding.place(make_base(), mesh)
        full = evaluator(split, base, mesh).full(sharding.place(make_lens(make_base()), mesh))
    for name, value in result[2].values().items():
        np.testing.assert_allclose(full.values()[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_shipped_subject_is_what_the_design_asks_for():
    directory = pathlib.Path('configs/tiny_subject')
    assert sum(p.stat().st_size for p in directory.iterdir()) < 4e6
    c = hf.load_model(directory).config
    sizes = [c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.d_ff, c.vocab_size, c.n_layers]
    assert len(set(sizes)) == len(sizes) and c.head_dim == 32 and c.n_kv_heads < c.n_heads
    assert 1e6 < sum(x.size for x in jax.tree.leaves(hf.load_model(directory))) < 2e6
    tokenizer = hf.load_tokenizer(str(directory))
    assert all(
        len(ids) == len(values)
        for ids, values in zip(world.value_token_ids(tokenizer), world.FIELDS.values(), strict=True)
    )
    assert dataclasses.asdict(c)['family'] == 'llama' and tokenizer.chat_template
