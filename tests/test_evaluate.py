"""The evaluator against a loop over sampler and encoder, and its controls against what they claim."""

import dataclasses
import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_gen.storyworld import world
from lens import config, data, evaluate, hf, joints, metrics, sampling, sharding, texts
from lens.evaluate import Evaluator
from lens.metrics import Figure
from lens.models import subject
from lens.models.encoder import encode
from lens.response import NO_TAGS, Tags
from lens.texts import Text
from tests import joining, programs
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


def evaluator(split, base, mesh, batch=3 * VECTORS, tags=NO_TAGS, context=0):
    settings = config.EvalSettings(quick_documents=4, documents=DOCUMENTS, vectors=VECTORS, batch=batch, samples=4)
    tokenizer = hf.load_tokenizer('configs/tiny_subject')
    return Evaluator(
        config.Run(
            evaluation=settings,
            base=base,
            tokenizer=tokenizer,
            mesh=mesh,
            seed=0,
            layer=LAYER,
            layers=(),
            length=LENGTH,
            texts=types.SimpleNamespace(tags=tags),
            error='nmse',
            context_tokens=context,
            min_pos=2,
            train=None,
            validation=split,
            phases=(),
        )
    )


@pytest.fixture(scope='module')
def placed():
    """(mesh, base, lens) on one device."""
    mesh, base = sharding.make_mesh(1, 1), make_base()
    return mesh, sharding.place(base, mesh), sharding.place(make_lens(base), mesh)


@pytest.fixture(scope='module')
def result(split, placed):
    """(evaluator, what it collected, evaluation, what it is with another figure)."""
    mesh, base, lens = placed
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as m:
        e = evaluator(split, base, mesh)
        c, full = e._collect(lens, DOCUMENTS, metrics.FIGURES.values()), e.full(lens)
        m.setitem(metrics.FIGURES, 'sum', Figure('controls', 'sum of A', lambda c, text: value(c.a.sum())))
        m.setitem(metrics.FIGURES, 'none', Figure('controls', 'means nothing here', lambda c, text: None))
        more = e.full(lens)
        return e, c, full, more, more.to_json(3)


def value(x):
    return {'value': float(x), 'ci95': None}


def test_every_text_and_reconstruction_belongs_to_its_activation(result, base, lens):
    e, c, *_ = result
    tokens, positions = e.held['tokens'], e.held['positions']
    a = np.asarray(jax.jit(subject.activations, static_argnums=3)(base, tokens, positions, LAYER)).reshape(
        -1, TINY.d_model
    )
    assert len(c.a) == DOCUMENTS * VECTORS
    np.testing.assert_allclose(c.a, a, rtol=0, atol=1e-5 * a.std())
    drawn = {'sampled': (a, 1.0), 'greedy': (a, 0.0), 'no_activation': (0 * a, 1.0)}  # vectors and temperature
    vectors, temperatures = (
        np.concatenate(x) for x in zip(*((v, [t] * len(a)) for v, t in drawn.values()), strict=True)
    )
    fold = jax.random.fold_in
    keys = jnp.stack([fold(fold(jax.random.key(0), i), k) for k in range(len(drawn)) for i in range(len(a))])
    draw = jax.jit(sampling.sample, static_argnames='length')
    ids = np.asarray(draw(lens.decoder, base, vectors, keys, length=LENGTH, temperature=temperatures).ids_NxT)
    for name, expected in zip(drawn, np.split(ids, len(drawn)), strict=True):
        np.testing.assert_array_equal(c.ids[name], expected, err_msg=name)
    assert (c.ids['sampled'] != c.ids['greedy']).any(1).mean() > 0.5
    words = c.ids | {
        'previous_tokens': np.stack(
            [tokens[d, np.maximum(np.arange(p - LENGTH + 1, p + 1), 0)] for d, row in enumerate(positions) for p in row]
        ),
        'given': e.held['explanations'].reshape(-1, LENGTH),
    }
    assert words.keys() == texts.TEXTS.keys()
    pred = np.asarray(jax.jit(encode)(lens.encoder, base, np.concatenate(list(words.values()))))
    for i, name in enumerate(words):
        expected = pred[i * len(a) : (i + 1) * len(a)]
        np.testing.assert_allclose(c.pred[name], expected, rtol=0, atol=1e-5 * expected.std(), err_msg=name)
    np.testing.assert_array_equal(np.sort(c.ids['words_permuted'], 1), np.sort(c.ids['sampled'], 1))
    assert (c.ids['words_permuted'] != c.ids['sampled']).any()


def test_permuted_words_stay_between_their_tags():
    tags, (o, x) = Tags((1,), (2,)), (1, 2)
    ids = np.array([[7, o, 30, 31, 32, 33, 34, 35, x, 8], [o, 40, 41, 42, x, 9, 9, 9, 9, 9]] * 4)
    keys = jax.random.split(jax.random.key(0), len(ids))
    out = np.asarray(jax.jit(functools.partial(texts.permuted, {}, tags=tags))(ids, keys))
    for row, (start, stop) in zip(range(8), [(2, 8), (1, 4)] * 4, strict=True):
        words = set(range(start, stop))
        rest = [i for i in range(10) if i not in words]
        np.testing.assert_array_equal(out[row, rest], ids[row, rest])
        np.testing.assert_array_equal(np.sort(out[row, start:stop]), ids[row, start:stop])
    assert len(np.unique(out[::2], axis=0)) == 4, 'every text has its own order'


def test_figures_are_those_of_what_was_collected(result):
    e, c, full, *_ = result
    doc = np.repeat([0, 1, 2, 6, 3, 4, 5], VECTORS)  # order of the document ids
    np.testing.assert_array_equal(doc, np.unique(c.doc_N, return_inverse=True)[1])
    values, a = full.values(), c.a.astype(np.float64)
    var = a.var(0, ddof=1).sum()

    def fve(pred):
        return 1 - ((a - pred) ** 2).sum(1).mean() / var

    preds = {f'fve_{k}': c.pred[k] for k in ('greedy', 'given', 'no_activation', 'words_permuted', 'previous_tokens')}
    preds |= {'fve': c.pred['sampled'], 'fve_shuffled': c.pred['sampled'][metrics.other_document(doc)]}
    preds |= {'fve_zero_baseline': 0, 'fve_mean_baseline': a.mean(0)}
    for name, pred in preds.items():
        np.testing.assert_allclose(values[name], fve(pred), rtol=1e-6, err_msg=name)
    assert len({values[k] for k in preds}) == len(preds)
    gain = metrics.fve_gain(c.pred['sampled'], c.pred['previous_tokens'], a, doc)
    assert full.figures['gain_over_quote'] == gain
    np.testing.assert_allclose(gain['value'], values['fve'] - values['fve_previous_tokens'], rtol=1e-6)
    assert not [k for k in values if 'beyond' in k or k.startswith('fve_quote')]
    units = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (c.pred['sampled'].astype(np.float64), a))
    expected = metrics.fve(*units, doc)
    assert full.figures['fve_direction']['ci95'] == pytest.approx(expected['ci95'])
    assert values['fve_direction'] == pytest.approx(expected['value'])
    truth = e.held['facts'].reshape(-1, 2)
    for name, text in (('facts_recall', 'greedy'), ('facts_recall_sampled', 'sampled')):
        assert full.figures[name] == metrics.facts_recall(c.ids[text], truth, e.fields, doc)
    (_, b), texts = e.fields, c.ids['sampled']
    said, true = (texts == b['token_ids'][0]).any(1), truth[:, 1] == 0
    assert [r['field'] for r in full.facts] == ['a', 'b'] and full.facts[1]['values'] == 1
    assert full.facts[1]['recall_sampled'] == (said & true).sum() / true.sum()
    assert full.facts[1]['hallucinated_sampled'] == pytest.approx((said & ~true).sum() / max(said.sum(), 1))
    assert {'fve_sft', 'extracted'}.isdisjoint(values)  # no SFT phase, no tags
    assert [s['doc_id'] for s in full.samples] == [-5, 3, 9, 2**60]
    assert [len(s['tokens']) for s in full.samples] == [10, 9, 10, 8]
    text = e.run.tokenizer.decode(e.held['explanations'][1, 1, :1])
    assert full.samples[1]['given']['tokens'][0]['text'] == text


def test_another_figure_is_one_entry(result):
    _, c, full, more, written = result
    assert more.figures == full.figures | {'sum': value(c.a.sum())}
    assert written['figures']['sum'] == value(c.a.sum()) | {'group': 'controls', 'meaning': 'sum of A'}
    assert written['figures']['fve'] == full.figures['fve'] | {
        'group': 'lens',
        'meaning': evaluate.meaning('fve', 'nmse'),
    }


def test_quick_figures_another_batch_size_and_another_text(split, placed, result, monkeypatch):
    """On other batches the same activations have the same texts, with others beside them or not."""
    mesh, base, lens = placed
    _, c, full, *_ = result
    monkeypatch.setitem(texts.TEXTS, 'reversed', Text(text=lambda batch, ids, keys, tags: ids[:, ::-1]))
    found = Figure(
        'controls', '', lambda c, text: value((c.ids[text] == c.ids['sampled'][:, ::-1]).all()), 'reversed', True
    )
    monkeypatch.setitem(metrics.FIGURES, 'is_reversed', found)
    with jax.set_mesh(mesh):
        quick = evaluator(split, base, mesh, batch=2 * VECTORS).quick(lens)
    assert quick.pop('is_reversed') == 1
    truth = {'grounded', 'grounded_ahead', 'invented'}  # no text here has a content word before a position
    assert quick.keys() == {'fve', 'fve_greedy', 'cosine', 'facts_recall', 'facts_hallucinated'} | truth
    n = 4 * VECTORS
    doc = np.repeat([0, 1, 2, 3], VECTORS)
    close = {'rtol': 1e-4}  # float32 sums in another order
    np.testing.assert_allclose(quick['fve'], full.fve_quick, **close)
    greedy, sampled = (metrics.cosine(c.pred[k][:n], c.a[:n], doc)['value'] for k in ('greedy', 'sampled'))
    np.testing.assert_allclose(quick['cosine'], sampled, **close)
    assert abs(greedy - sampled) > 1e-3
    recall = metrics.facts_recall(c.ids['greedy'][:n], c.truth_NxF[:n], c.fields, doc)['value']
    np.testing.assert_allclose(quick['facts_recall'], recall, **close)


@pytest.mark.parametrize('tagged', [pytest.param(False, marks=pytest.mark.slow), True])
def test_figures_of_a_context_are_those_of_explicit_rows(split, placed, result, tagged):
    """Positions from 2 on, a context of 4 and quotes of 5 before it, which texts do not always have; with and without a
    tag that some responses lack."""
    mesh, base, lens = placed
    lens = jax.tree.map(lambda x: x, lens)
    lens.encoder.config = dataclasses.replace(lens.encoder.config, context_tokens=4)
    commonest = int(np.bincount(result[1].ids['sampled'].ravel()).argmax())
    tags = Tags((), (commonest,)) if tagged else NO_TAGS
    with jax.set_mesh(mesh):
        e = evaluator(split, base, mesh, 3 * VECTORS, tags, context=4)
        c, full = e._collect(lens, DOCUMENTS, metrics.figures(4).values()), e.full(lens)
        fewer = evaluator(split, base, mesh, 2 * VECTORS, tags, context=4)
        other = fewer.full(lens).values() if tagged else e.quick(lens)  # of other batches, or of fewer texts
    at = [(row, p) for row, ps in zip(e.held['tokens'], e.held['positions'], strict=True) for p in ps]
    partner = metrics.other_document(c.doc_N)
    texts = {k: [row[row >= 0] for row in x] for k, x in c.ids.items()}
    texts['shuffled'] = [texts['sampled'][i] for i in partner]
    texts['previous_tokens'] = [row[max(0, p - 4 - LENGTH + 1) : max(0, p - 3)] for row, p in at]
    texts |= {f'quote_{m}': [()] * len(at) for m in (0, 1, 2, 4)}
    assert {len(x) for x in texts['previous_tokens']} == set(range(LENGTH))
    found = c.found | {'shuffled': c.found['sampled'][partner]}
    outside = jax.tree.map(np.asarray, (lens.encoder, base))
    preds = {}
    for name, words in texts.items():
        m = int(name[6:]) if name.startswith('quote') else 4
        contexts = [row[max(0, p + 1 - m) : p + 1] for row, p in at]
        preds[name] = programs.encode_by_hand(*outside, words, contexts) * found.get(name, np.ones(len(at)))[:, None]
        np.testing.assert_allclose(c.pred[name], preds[name], rtol=0, atol=1e-5 * preds[name].std(), err_msg=name)
    assert c.pred.keys() == preds.keys() and c.found['sampled'].all() == (not tagged)
    values, a = full.values(), c.a.astype(np.float64)
    error = {k: ((a - x) ** 2).sum() for k, x in preds.items()}
    variance = a.var(0, ddof=1).sum() * len(a)
    want = {f'fve_quote_{m}': 1 - error[f'quote_{m}'] / variance for m in (0, 1, 2, 4)}
    names = {'4': 'sampled'} | {k: k for k in ('greedy', 'given', 'shuffled', 'no_activation')}
    want |= {f'fve_beyond_{k}': 1 - error[text] / error['quote_4'] for k, text in names.items()}
    want['gain_over_quote'] = (error['previous_tokens'] - error['sampled']) / variance
    for name, x in want.items():
        np.testing.assert_allclose(values[name], x, rtol=1e-4, err_msg=name)
        low, high = full.figures[name]['ci95']
        assert low <= values[name] <= high and high - low > 1e-3
    for name, x in other.items() if tagged else ():
        np.testing.assert_allclose(x, values[name], rtol=1e-3, atol=1e-3 * values['nmse'], err_msg=name)
    headline = metrics.headline(values)
    assert headline == ['fve_beyond_4', 'fve_quote_4']
    assert tagged or headline == [k for k in other if 'fve_quote' in k or 'bey' in k]
    assert (
        next(iter(values)) == 'fve_beyond_4'
        and 'last 4 source tokens' in full.to_json(1)['figures']['fve_quote_4']['meaning']
    )


def test_a_response_without_an_explanation_is_the_zero_vector(split, placed, result):
    """The commonest word as closing tag: the responses are those that were drawn without tags."""
    mesh, base, lens = placed
    responses = result[1].ids['sampled']
    closing = int(np.bincount(responses.ravel()).argmax())
    figure = metrics.FIGURES['extracted']
    with jax.set_mesh(mesh):
        e = evaluator(split, base, mesh, tags=Tags((), (closing,)))
        c = e._collect(lens, DOCUMENTS, [figure])
    closed = responses == closing
    first = closed.argmax(1)
    found = closed.any(1) & (first > 0)
    assert 0 < found.mean() < 1
    np.testing.assert_array_equal(c.found['sampled'], found)
    outside = found[:, None] & (np.arange(LENGTH) >= first[:, None])
    np.testing.assert_array_equal(c.ids['sampled'], np.where(outside, -1, responses))
    np.testing.assert_array_equal(c.pred['sampled'].any(1), found)
    assert figure.function(c, figure.text)['value'] == found.mean()


def test_explanations_that_are_text_are_read_by_the_tokenizer(split, placed, result):
    """Joined to the words beside them; the quick figures have it from the tables of the program."""
    mesh, base, lens = placed
    often = np.argsort(-np.bincount(result[1].ids['sampled'].ravel()))[:2].tolist()
    tokenizer, beside = joining.tokenizer(), ('<text>', '</text>')
    ids = [tokenizer(x, add_special_tokens=False)['input_ids'] for x in beside]
    joined = joints.build(tokenizer, beside, ids, tuple(map(tokenizer.decode, often)), TINY.vocab_size)
    tags = Tags(*((i,) for i in often), joints=joined)
    with jax.set_mesh(mesh):
        e = evaluator(split, base, mesh, tags=tags)
        c, quick = (e._collect(lens, DOCUMENTS, [metrics.FIGURES['fve']], quick=q) for q in (False, True))
    (said,), (found,) = c.ids.values(), c.found.values()
    words = [joined.exact(row[row >= 0]) for row in said]
    assert any(w != [*joined.left_cut, *row[row >= 0], *joined.right_cut] for w, row in zip(words, said, strict=True))
    outside = jax.tree.map(np.asarray, (lens.encoder, base))
    pred = programs.encode_by_hand(*outside, words) * found[:, None]
    np.testing.assert_allclose(c.pred['sampled'], pred, rtol=0, atol=1e-5 * pred.std())
    near = np.isclose(quick.pred['sampled'], pred, rtol=0, atol=1e-5 * pred.std()).all(1)
    assert near.mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize('context', [0, 4])
def test_another_mesh_gives_the_same_figures(split, context):
    found = []
    for shape in (1, 1), (4, 2):
        mesh, lens = sharding.make_mesh(*shape), make_lens(make_base())
        lens.encoder.config = dataclasses.replace(lens.encoder.config, context_tokens=context)
        with jax.set_mesh(mesh):
            base = sharding.place(make_base(), mesh)
            found.append(evaluator(split, base, mesh, context=context).full(sharding.place(lens, mesh)).values())
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_meanings_say_what_a_figure_of_directions_is():
    assert evaluate.meaning('nmse', 'nmse').startswith('mean of |A - reconstruction|^2')
    assert evaluate.meaning('nmse', 'direction').startswith('mean of 2 - 2 cosine')
    assert evaluate.meaning('fve', 'nmse') in evaluate.meaning('fve', 'direction')
    assert evaluate.meaning('cosine', 'nmse') == evaluate.meaning('cosine', 'direction')


def test_shipped_subject_is_what_the_design_asks_for():
    directory = pathlib.Path('configs/tiny_subject')
    assert sum(p.stat().st_size for p in directory.iterdir()) < 4e6
    c = hf.read_config(directory)
    sizes = [c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.d_ff, c.vocab_size, c.n_layers]
    assert len(set(sizes)) == len(sizes) and c.head_dim == 32 and c.n_kv_heads < c.n_heads
    assert 1e6 < sum(x.size for x in jax.tree.leaves(hf.abstract_model(c, mesh=sharding.make_mesh(1, 1)))) < 2e6
    tokenizer = hf.load_tokenizer(str(directory))
    assert all(
        len(ids) == len(values)
        for ids, values in zip(world.value_token_ids(tokenizer), world.FIELDS.values(), strict=True)
    )
    assert dataclasses.asdict(c)['family'] == 'llama' and tokenizer.chat_template
