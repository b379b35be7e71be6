"""lens.metrics against naive loops in float64."""

import numpy as np
import pytest

from lens import metrics

D, M = 4, 7
SIZES = np.array([1, 5, 2, 3, 1, 4, 2])  # activations per document
EXACT = 1e-9  # relative, float64; the sums of squares cost a few digits


def data(seed=0, bias=0.0):
    rng = np.random.default_rng(seed)
    doc = rng.permutation(np.repeat(np.arange(M), SIZES))
    target = rng.normal(size=(len(doc), D)) * [1, 2, 3, 4] + [10, 0, -5, 30]
    pred = target + rng.normal(size=target.shape) * 0.7 + bias
    return pred, target, doc


def naive(pred, target):
    """The four figures by loops over rows and features."""
    rows, residual = range(len(target)), target - pred
    var_a, var_r = (sum(np.var(x[:, d], ddof=1) for d in range(x.shape[1])) for x in (target, residual))
    return {
        'fve': 1 - np.mean([residual[i] @ residual[i] for i in rows]) / var_a,
        'variance_recovered': 1 - var_r / var_a,
        'nmse': np.mean([residual[i] @ residual[i] / (target[i] @ target[i]) for i in rows]),
        'cosine': np.mean([pred[i] @ target[i] / np.sqrt((pred[i] @ pred[i]) * (target[i] @ target[i])) for i in rows]),
    }


def reconstruction(pred, target, doc):
    """The four figures of one reconstruction."""
    formulas = (metrics.fve, metrics.variance_recovered, metrics.nmse, metrics.cosine)
    return {f.__name__: f(pred, target, doc) for f in formulas}


def facts(*what):
    return {f.__name__: f(*what) for f in (metrics.facts_recall, metrics.facts_hallucinated)}


def contains(figure):
    return figure['ci95'][0] <= figure['value'] <= figure['ci95'][1]


def values(figures):
    return {k: v['value'] for k, v in figures.items()}


def width(figure):
    return figure['ci95'][1] - figure['ci95'][0]


def test_figures_against_loops():
    pred, target, doc = data(bias=0.3)
    got = values(reconstruction(pred, target, doc))
    assert got.keys() == naive(pred, target).keys()
    for k, want in naive(pred, target).items():
        np.testing.assert_allclose(got[k], want, rtol=EXACT, err_msg=k)


def test_fve_identity():
    """FVE = 1 - [(N-1)/N sum_d Var(R_d) + |mean R|^2] / sum_d Var(A_d)."""
    pred, target, doc = data(bias=1.3)
    r, n = target - pred, len(target)
    want = 1 - ((n - 1) / n * r.var(0, ddof=1).sum() + r.mean(0) @ r.mean(0)) / target.var(0, ddof=1).sum()
    np.testing.assert_allclose(reconstruction(pred, target, doc)['fve']['value'], want, rtol=EXACT)


def test_published_figures_of_directions():
    """Of rows of norm sqrt(d), around their mean and around its direction; r is the length of the mean over sqrt(d)."""
    pred, target, doc = (x / np.linalg.norm(x, axis=1, keepdims=True) * 2 if x.ndim > 1 else x for x in data(bias=0.3))
    mean = target.mean(0)
    r = np.linalg.norm(mean) / 2
    raw, around = np.mean((target - mean) ** 2), np.mean((target - mean / r) ** 2)
    np.testing.assert_allclose([raw, around], [1 - r**2, 2 * (1 - r)], rtol=EXACT)
    error = np.mean((target - pred) ** 2)
    for baseline, want in ((metrics.rawvar, raw), (metrics.meannorm, around)):
        np.testing.assert_allclose(baseline(target, doc)[0], want, rtol=EXACT)
        figure = metrics.fve_over(baseline, pred, target, doc)
        np.testing.assert_allclose(figure['value'], 1 - error / want, rtol=EXACT)
        assert contains(figure) and width(figure) > 0


def test_a_constant_bias_costs_fve_and_not_variance_recovered():
    plain = values(reconstruction(*data()))
    biased = values(reconstruction(*data(bias=2.0)))
    np.testing.assert_allclose(biased['variance_recovered'], plain['variance_recovered'], rtol=EXACT)
    assert biased['fve'] < plain['fve'] - 0.3


def test_predicting_the_mean_gives_the_degree_of_freedom():
    _, target, doc = data()
    got = values(reconstruction(np.broadcast_to(target.mean(0), target.shape), target, doc))
    np.testing.assert_allclose(got['fve'], 1 / len(target), rtol=EXACT)
    np.testing.assert_allclose(got['variance_recovered'], 0, atol=EXACT)


def test_a_perfect_reconstruction():
    _, target, doc = data()
    got = reconstruction(target, target, doc)
    for k, want in {'fve': 1, 'variance_recovered': 1, 'nmse': 0, 'cosine': 1}.items():
        np.testing.assert_allclose([got[k]['value'], *got[k]['ci95']], want, rtol=EXACT, atol=EXACT)


def test_float32_inputs_far_from_zero_keep_their_digits():
    """Activations of some models have entries of 1e4 that hardly vary."""
    pred, target, doc = data()
    pred, target = (pred + 3e4).astype(np.float32), (target + 3e4).astype(np.float32)
    want = naive(pred.astype(float), target.astype(float))
    got = values(reconstruction(pred, target, doc))
    for k in want:
        np.testing.assert_allclose(got[k], want[k], rtol=EXACT, err_msg=k)


def test_intervals_are_those_of_explicit_resamples_of_documents():
    """Every resample written out: the rows of each drawn document as often as it was drawn."""
    pred, target, doc = data(bias=0.3)
    drawn = metrics._draws(M)[1:]
    tables = {k: [] for k in ('fve', 'variance_recovered', 'nmse', 'cosine')}
    for counts in drawn.astype(int):
        rows = np.concatenate([np.flatnonzero(doc == d) for d in range(M) for _ in range(counts[d])])
        for k, v in naive(pred[rows], target[rows]).items():
            tables[k].append(v)
    got = reconstruction(pred, target, doc)
    for k, v in tables.items():
        np.testing.assert_allclose(got[k]['ci95'], np.percentile(v, [2.5, 97.5]), rtol=1e-6, err_msg=k)
        assert contains(got[k])


@pytest.mark.parametrize('documents', [2, 3, 5, 30])
@pytest.mark.parametrize('vectors', [1, 2])
def test_intervals_hold_their_value(documents, vectors):
    """Half of the resamples of two documents are one of them twice, without any variance where it has one row."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        doc = np.repeat(np.arange(documents), vectors)
        target, noise = rng.normal(size=(2, len(doc), D))
        for pred in (target + noise, 0 * target, np.broadcast_to(target.mean(0), target.shape), target):
            for k, f in reconstruction(pred, target, doc).items():
                assert contains(f) and np.isfinite([f['value'], *f['ci95']]).all(), (k, f)
    # the mean of all predicts a resample worse than all: its value is the best there is
    best = metrics.fve(pred * 0 + target.mean(0), target, doc)
    assert best['ci95'][1] == best['value'] == pytest.approx(1 / len(doc), rel=EXACT)


def test_draws_are_documents_with_replacement():
    draws = metrics._draws(M)
    assert draws.shape == (1 + metrics.RESAMPLES, M)
    assert (draws[0] == 1).all()  # the data itself
    assert (draws.sum(1) == M).all() and (draws >= 0).all()
    # mean 1 within 5 standard errors, variance 1 - 1/M within 5 standard errors (about 0.05)
    np.testing.assert_allclose(draws[1:].mean(0), 1, atol=5 / np.sqrt(metrics.RESAMPLES))
    np.testing.assert_allclose(draws[1:].var(0), 1 - 1 / M, atol=0.3)


def clustered(copies, documents=40, seed=3):
    """`copies` identical activations in every document."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(documents, D))
    pred = target + rng.normal(size=target.shape)
    return np.repeat(pred, copies, 0), np.repeat(target, copies, 0), np.repeat(np.arange(documents), copies)


def test_copies_inside_a_document_add_no_certainty():
    one, ten = (reconstruction(*clustered(c)) for c in (1, 10))
    for k in ('nmse', 'cosine'):
        np.testing.assert_allclose(ten[k]['ci95'], one[k]['ci95'], rtol=EXACT)


@pytest.mark.parametrize('figure', ['fve', 'variance_recovered', 'nmse', 'cosine'])
def test_clustered_data_have_wider_intervals_than_independent_data(figure):
    pred, target, doc = clustered(10)
    by_document = reconstruction(pred, target, doc)[figure]
    by_row = reconstruction(pred, target, np.arange(len(doc)))[figure]
    np.testing.assert_allclose(by_document['value'], by_row['value'], rtol=EXACT)
    assert 2 < width(by_document) / width(by_row) < 5  # sqrt(10) = 3.2, with the noise of 1000 resamples
    assert by_document['ci95'][0] < by_document['value'] < by_document['ci95'][1]


def test_interval_of_a_mean_is_about_two_standard_errors_each_way():
    rng = np.random.default_rng(4)
    target = np.resize([1.0, -1.0], (400, 1))  # of norm 1, so that nmse is the mean squared error
    pred = target + rng.normal(size=target.shape)
    got = reconstruction(pred, target, np.arange(400))['nmse']
    want = 2 * 1.96 * np.std((target - pred) ** 2, ddof=1) / np.sqrt(400)
    # 15%: the percentiles of 1000 resamples have a standard error of 4% of the width
    np.testing.assert_allclose(width(got), want, rtol=0.15)


def test_the_order_of_the_rows_does_not_matter_and_runs_repeat():
    pred, target, doc = data()
    again = reconstruction(pred, target, doc)
    mixed = np.random.default_rng(9).permutation(len(doc))
    other = reconstruction(pred[mixed], target[mixed], doc[mixed])
    assert again == reconstruction(pred, target, doc)
    for k in again:
        np.testing.assert_allclose(other[k]['ci95'], again[k]['ci95'], rtol=1e-8)


# Two fields; token 0 is filler. Expected counts by hand.
FIELDS = [
    {'field': 'kind', 'values': ['fox', 'owl', 'hen'], 'token_ids': [11, 12, 13]},
    {'field': 'mood', 'values': ['sad', 'glad'], 'token_ids': [21, 22]},
]
TEXTS = np.array(
    [
        [11, 0, 21, 0],  # established fox, sad: both right
        [12, 12, 0, 22],  # established fox, -: owl wrong (said twice, counts once), glad not established
        [11, 12, 13, 0],  # established hen, glad: hen right, fox and owl wrong, glad missed
        [0, 0, 0, 0],  # established owl, sad: both missed
        [13, 22, 21, 0],  # established -, glad: hen not established, glad right, sad wrong
    ]
)
ESTABLISHED = np.array([[0, 0], [0, -1], [2, 1], [1, 0], [-1, 1]])
DOCS = np.array([0, 0, 1, 2, 2])


def test_facts_by_hand():
    got = values(facts(TEXTS, ESTABLISHED, FIELDS, DOCS))
    # kind: established 4, right 2 (rows 0, 2), named 6. mood: established 4, right 2 (rows 0, 4), named 4.
    assert got == {'facts_recall': 4 / 8, 'facts_hallucinated': pytest.approx(6 / 10, rel=1e-12)}
    mood = values(facts(TEXTS, ESTABLISHED[:, 1:], FIELDS[1:], DOCS))
    assert mood == {'facts_recall': 2 / 4, 'facts_hallucinated': 2 / 4}


def test_facts_are_pooled_over_activations_and_not_averaged_over_documents_or_fields():
    texts, truth = np.array([[11], [11], [11], [21]]), np.array([[0, -1], [0, -1], [1, -1], [-1, 0]])
    got = values(facts(texts, truth, FIELDS, np.array([0, 0, 0, 1])))
    assert got == {'facts_recall': 3 / 4, 'facts_hallucinated': 1 / 4}


def test_facts_intervals_are_those_of_explicit_resamples_of_documents():
    tables = {'facts_recall': [], 'facts_hallucinated': []}
    rng = np.random.default_rng(6)
    texts, truth = TEXTS[rng.integers(5, size=30)], ESTABLISHED[rng.integers(5, size=30)]
    doc = rng.permutation(np.repeat(np.arange(6), [2, 8, 5, 5, 4, 6]))
    for counts in metrics._draws(6)[1:].astype(int):
        rows = np.concatenate([np.flatnonzero(doc == d) for d in range(6) for _ in range(counts[d])])
        right = have = said = 0
        for i in rows:
            for f, field in enumerate(FIELDS):
                named = {v for v, t in enumerate(field['token_ids']) if t in texts[i]}
                right += truth[i, f] in named
                have += truth[i, f] != -1
                said += len(named)
        tables['facts_recall'].append(right / have)
        tables['facts_hallucinated'].append(1 - right / said)
    figures = facts(texts, truth, FIELDS, doc)
    for k, v in tables.items():
        np.testing.assert_allclose(figures[k]['ci95'], np.percentile(v, [2.5, 97.5]), rtol=1e-6, err_msg=k)


def test_no_fact_named_is_nothing_hallucinated():
    """A lens that names no fact invents none; recall is 0."""
    zero = {'value': 0, 'ci95': [0, 0]}
    got = facts(np.zeros((5, 4), int), ESTABLISHED, FIELDS, DOCS)
    assert got == {'facts_recall': zero, 'facts_hallucinated': zero}


def test_no_fact_established_makes_every_named_fact_hallucinated():
    figures = facts(TEXTS, np.full((5, 2), -1), FIELDS, DOCS)
    assert figures['facts_recall']['value'] == 0
    assert figures['facts_hallucinated'] == {'value': 1, 'ci95': [1, 1]}


def test_other_document_pairs_every_activation_with_another_document_once():
    for doc in ([0, 0, 1, 1, 2, 2], [2, 0, 1, 1, 0, 0, 2, 3], [0, 1]):
        doc = np.array(doc)
        partner = metrics.other_document(doc)
        assert sorted(partner) == list(range(len(doc))) and (doc[partner] != doc).all()
