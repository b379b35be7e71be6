"""What lens.evaluate measures besides the figures of training, against loops over single programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lens import batches, metrics, plots, sampling, sharding, study
from lens.errors import LensError
from tests import programs
from tests.conftest import LAYER, LENGTH
from tests.test_evaluate import DOCUMENTS, VECTORS, evaluator
from tests.test_evaluate import placed as placed
from tests.test_evaluate import split as split

KS = (1, 2, 5, 6)


@pytest.fixture(scope='module')
def spoken(split):
    """The split with roles: the first half of each text one's, the rest another's."""
    role = np.tile(np.arange(10) >= 4, (DOCUMENTS, 1)).astype(np.int8)
    return dataclasses.replace(split, role=role, meta=split.meta | {'roles': {'user': 0, 'fi nal': 1}})


@pytest.fixture(scope='module')
def made(spoken, placed):
    """(evaluator, what it collected, its study, the reconstructions by name)."""
    mesh, base, lens = placed
    with jax.set_mesh(mesh):
        e = evaluator(spoken, base, mesh)
        c = e._collect(lens, DOCUMENTS, metrics.FIGURES.values())
        measure = study.Measure(e, lens, c, KS)
        preds = measure.best() | measure.first_tokens() | measure.text_alone()
        return e, c, measure(), preds


def places(e):
    return [(row, int(p)) for row, ps in zip(e.held['tokens'], e.held['positions'], strict=True) for p in ps]


def close(got, want, name=''):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.std(want), err_msg=name)


def draw(lens, base, vectors, number):
    """A sample of each vector, by its place and the number of the sample."""
    fold = jax.random.fold_in
    keys = jnp.stack([fold(fold(fold(jax.random.key(0), i), study.SAMPLES), number) for i in range(len(vectors))])
    return np.asarray(
        jax.jit(sampling.sample, static_argnames='length')(lens.decoder, base, vectors, keys, length=LENGTH)[0]
    )


def test_best_of_k_is_the_best_of_the_first_k_samples(made, base, lens):
    _, c, found, preds = made
    texts = [c.ids['sampled'], *(draw(lens, base, c.a, k) for k in range(1, KS[-1]))]
    assert len({x.tobytes() for x in texts}) == len(texts)
    outside = jax.tree.map(np.asarray, (lens.encoder, base))
    each = np.stack([programs.encode_by_hand(*outside, x.tolist()) for x in texts])
    errors = ((each - c.a) ** 2).sum(2)
    for k in KS:
        close(preds[f'best_of_{k}'], each[errors[:k].argmin(0), np.arange(len(c.a))], str(k))
    values = [found.figures[f'fve_best_of_{k}']['value'] for k in KS]
    assert values == sorted(set(values)) and values[0] == metrics.fve(c.pred['sampled'], c.a, c.doc_N)['value']
    spread, a = ((c.a - c.a.mean()) ** 2).sum(), c.a.astype(np.float64)
    for k, row in zip(KS, found.by_k, strict=True):
        error = errors[:k].min(0)
        want = {
            'k': k,
            'total_positions': len(a),
            'avg_mse': error.mean() / a.shape[1],
            'r_squared': 1 - error.sum() / spread,
        }
        want |= {'nmse': (error / (a**2).sum(1)).mean(), 'mse_variance_recovery': values[KS.index(k)]}
        assert {name: row[name] for name in want} == pytest.approx(want, rel=1e-4)
        assert row['avg_mse_ci95'][0] <= row['avg_mse'] <= row['avg_mse_ci95'][1]


def test_first_words_and_quoted_words_are_encoded_by_themselves(made, base, lens):
    e, c, found, preds = made
    outside = jax.tree.map(np.asarray, (lens.encoder, base))
    filler = e.run.validation.filler
    texts = {f'first_{n}': [[*x[:n], *[filler] * (LENGTH - n)] for x in c.ids['sampled']] for n in (1, 2, 3, 4, 5)}
    texts |= {f'last_{m}': [row[np.maximum(np.arange(p - m + 1, p + 1), 0)] for row, p in places(e)] for m in (2, 4, 8)}
    for name, words in texts.items():
        close(preds[name], programs.encode_by_hand(*outside, words), name)
    close(preds['first_5'], c.pred['sampled'])
    gain = found.figures['gain_over_last_4']['value']
    values = [metrics.fve(x, c.a, c.doc_N)['value'] for x in (c.pred['sampled'], preds['last_4'])]
    assert gain == pytest.approx(values[0] - values[1], rel=1e-6)
    assert {k for k in preds if k.startswith(('first', 'last'))} == texts.keys()


def test_first_lines_are_encoded_by_themselves(made, placed, monkeypatch):
    """Lines end at what a token of the tokenizer holds: here one of thirteen letters."""
    e, c, found, _ = made
    assert not any('lines' in k for k in found.figures)  # no break is among the words of the small vocabulary
    pieces = {int(i): e.run.tokenizer.decode([int(i)]) for i in np.unique(c.ids['sampled'])}
    assert [study.ends_line(x) for x in ('.\n\n', ' |', '<|think|>', ' a')] == [True, True, False, False]
    letters = 'ABCDEFGHIJKLM'
    monkeypatch.setattr(study, 'ends_line', lambda piece: piece in letters)
    mesh, base, lens = placed
    with jax.set_mesh(mesh):
        got = study.Measure(e, lens, c, KS).first_lines()
    outside, filler = jax.tree.map(np.asarray, (lens.encoder, base)), e.run.validation.filler
    assert len(got) > 1
    for n in range(1, len(got) + 1):
        cut = []
        for row in c.ids['sampled']:
            line, within, kept = 0, False, []
            for i in row:
                end = pieces[int(i)] in letters
                line += not end and not within
                within = not end
                kept.append(int(i) if line <= n else filler)
            cut.append(kept)
        close(got[f'lines_{n}'], programs.encode_by_hand(*outside, cut), f'lines_{n}')
    assert study.line_numbers(np.array([[-1, 4, 9, 9, 5, 9, -1]]), np.array([[0, 0, 1, 1, 0, 1, 0]]) == 1).tolist() == [
        [0, 1, 1, 1, 2, 2, 2]
    ]


def test_text_alone_is_what_the_subject_has_after_a_part_of_it(made, base, lens):
    e, _, found, preds = made
    outside = jax.tree.map(np.asarray, (lens.encoder, base))
    for m in (2, 8):
        rows = [[row[0], *row[max(1, p - m + 1) : p + 1]] for row, p in places(e)]
        tokens = np.array([[*r, *[0] * (m + 1 - len(r))] for r in rows], np.int32)
        at = np.array([[len(r) - 1] for r in rows], np.int32)
        a = np.asarray(programs.activations(base, tokens, at, layer=LAYER))[:, 0]
        close(preds[f'subject_{m}'], a)
        close(preds[f'text_only_{m}'], programs.encode_by_hand(*outside, draw(lens, base, a, 0).tolist()), str(m))
        assert found.figures[f'fve_text_only_{m}']['value'] != found.figures[f'fve_subject_{m}']['value']
    assert 'fve_last_16' not in found.figures  # texts of ten tokens


def test_put_back_is_what_the_subject_predicts_with_another_value(made, base):
    e, c, found, _ = made
    values = {k: c.pred[k] for k in study.PUT_BACK} | {'mean': np.tile(c.a.mean(0), (len(c.a), 1)), 'natural': c.a}
    tokens = np.repeat(e.held['tokens'], VECTORS, axis=0)
    at, rows = e.held['positions'].reshape(-1), np.arange(len(c.a))
    after = np.minimum(at + 1, 9)
    follows = at + 1 < np.repeat(e.held['lengths'], VECTORS)
    logp = {}
    for k, x in values.items():
        logits = np.asarray(programs.patch(base, tokens, at, jnp.asarray(x), layer=LAYER), np.float64)[rows, at]
        logp[k] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    kl = {k: (np.exp(logp['natural']) * (logp['natural'] - x)).sum(1).mean() for k, x in logp.items()}
    ce = {k: -x[rows, tokens[rows, after]][follows].mean() for k, x in logp.items()}
    got = {k: f['value'] for k, f in found.figures.items()}
    for k in (*study.PUT_BACK, 'mean'):
        suffix = '' if k == 'sampled' else f'_{k}'
        assert got[f'kl_functional_nats{suffix}'] == pytest.approx(kl[k], rel=1e-4)
        if k != 'mean' and ce['mean'] > ce['natural']:
            want = (ce['mean'] - ce[k]) / (ce['mean'] - ce['natural'])
            assert got[f'ce_recovered{suffix}'] == pytest.approx(want, rel=1e-3)
    assert [got['ce_nats'], got['ce_nats_mean']] == pytest.approx([ce['natural'], ce['mean']], rel=1e-5)


def test_share_of_cross_entropy_by_hand():
    kl = {k: np.ones(4) for k in ('sampled', 'mean')}
    ce = {'natural': [1, 1, 2, 9], 'mean': [3, 5, 2, 0], 'sampled': [2, 2, 2, 50]}
    out = {'kl': kl, 'ce': {k: np.array(x, float) for k, x in ce.items()}}
    followed, doc = np.array([True, True, True, False]), np.arange(4)
    got = study.functional(out, followed, doc)
    assert got['ce_recovered']['value'] == pytest.approx((1 + 3) / (2 + 4))
    assert got['ce_nats']['value'] == pytest.approx(4 / 3) and 'kl_functional_nats_greedy' not in got
    out['ce']['mean'] = out['ce']['natural']  # the mean costs nothing: there is no share of it
    assert 'ce_recovered' not in study.functional(out, followed, doc)


def test_parts_are_figures_of_their_activations(made):
    e, c, found, _ = made
    user = (e.held['positions'] < 4).reshape(-1)
    for name, pick in {'role_user': user, 'role_fi_nal': ~user, 'tokens_0_to_7': user | True}.items():
        figure = found.figures.get(f'fve_{name}')
        assert (figure is None) == (pick.sum() < study.FEWEST)
        if figure:
            want = metrics.fve(c.pred['sampled'][pick], c.a[pick], c.doc_N[pick])
            assert {k: figure[k] for k in want} == want and f'{pick.sum()} ' in figure['meaning']
    for figure in found.figures.values():
        low, high = figure['ci95']
        assert low <= figure['value'] <= high and figure['group'] and figure['meaning']


def test_plots_are_written_as_png_and_pdf(made, tmp_path):
    _, c, found, _ = made
    quick = {'fve': metrics.fve(c.pred['sampled'], c.a, c.doc_N)}
    plots.draw(tmp_path / 'plots', found, found.figures | quick)
    written = {p.name: p.read_bytes()[:4] for p in (tmp_path / 'plots').iterdir()}
    names = plots.names(found)
    assert names == ['best_of_k', 'first_words', 'text_alone', 'nmse', 'position_and_role']
    assert written == {f'{n}.png': b'\x89PNG' for n in names} | {f'{n}.pdf': b'%PDF' for n in names}
    none = found._replace(curves=found.curves | {'best_of': {}})
    assert 'best_of_k' not in plots.names(none)


def test_a_killed_evaluation_goes_on_and_ends_with_the_same(tmp_path):
    """Seven documents in batches of three; the fourth batch is where it is killed, the second file is damaged after."""
    folder, computed, quiet = tmp_path / 'evaluation.partial', [], Console(quiet=True)

    def evaluate(key, dies=None):
        with batches.opened(folder, key, {'a': 1.0, 'b': 2.0}, 3, quiet) as batch_of:
            for stage in 'ab':
                for i in range(3):

                    def compute(name=f'{stage}{i}', stage=stage, i=i):
                        if name == dies:
                            raise KeyboardInterrupt
                        computed.append(name)
                        return {'x': {'y': np.arange(i + 1), 'z': np.ones((2, i))}} if stage == 'a' else np.full(i, 7)

                    out.append(batch_of(stage, i, compute))

    out = []
    with pytest.raises(KeyboardInterrupt):
        evaluate({'step': 3}, dies='b0')
    (folder / 'a-1.npz').write_bytes(b'PK')
    out.clear(), computed.clear()
    evaluate({'step': 3})
    assert computed == ['a1', 'b0', 'b1', 'b2'] and not folder.exists()
    for i in range(3):
        np.testing.assert_array_equal(out[i]['x']['y'], np.arange(i + 1))
        np.testing.assert_array_equal(out[i]['x']['z'], np.ones((2, i)))
        np.testing.assert_array_equal(out[3 + i], np.full(i, 7))
    with pytest.raises(KeyboardInterrupt):
        evaluate({'step': 3}, dies='b0')
    computed.clear()
    evaluate({'step': 4})  # another checkpoint begins anew
    assert computed == ['a0', 'a1', 'a2', 'b0', 'b1', 'b2']


def test_flags_are_read_or_refused(split):
    assert study.numbers_of('8, 1,2,2') == (1, 2, 8) and study.numbers_of('') == ()
    for wrong in ('0', '1,x', '-1', '1,,2', '99999', '²', '1' * 30):
        with pytest.raises(LensError, match='--best_of'):
            study.numbers_of(wrong)
    settings = dataclasses.make_dataclass('S', [('documents', int), ('vectors', int)])(3, VECTORS)
    run = dataclasses.make_dataclass('R', ['evaluation', 'validation'])(settings, split)
    assert [study.sized(run, n).evaluation.documents for n in (0, 1, 5, 14)] == [3, 2, 3, 7]
    for n, words in ((15, 'has 7'), (-1, 'at least 0')):
        with pytest.raises(LensError, match=words):
            study.sized(run, n)


def test_sizes_and_brief_texts_by_hand():
    assert study.sizes(1) == [1] and study.sizes(5) == [1, 2, 3, 4, 5] and study.sizes(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    tokens = np.arange(10, 20)[None]
    rows, at = study.brief(tokens, np.array([[0, 1, 2, 9]]), 2, 5)
    assert rows[0].tolist() == [[10, 0, 0, 0, 0], [10, 11, 0, 0, 0], [10, 11, 12, 0, 0], [10, 18, 19, 0, 0]]
    assert at.tolist() == [[0, 1, 2, 2]]


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(1, 1), (4, 2)])
def test_another_batch_size_and_mesh_give_the_same_figures(spoken, made, shape, base, lens):
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        placed = sharding.place(lens, mesh)
        e = evaluator(spoken, sharding.place(base, mesh), mesh, batch=4 * VECTORS)
        c = e._collect(placed, DOCUMENTS, metrics.FIGURES.values())
        other = study.Measure(e, placed, c, KS)().figures
    assert other.keys() == made[2].figures.keys()
    for name, figure in made[2].figures.items():
        np.testing.assert_allclose(other[name]['value'], figure['value'], rtol=1e-5, atol=1e-5, err_msg=name)
