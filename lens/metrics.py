"""Figures over held-out activations in float64 numpy, with intervals that respect documents: formulas, and the table.

N activations come from M documents: `doc_N` is the id of the document of each. A figure is
{'value', 'ci95': [low, high]}. Its interval is a percentile bootstrap that resamples whole documents, because
activations of one document are alike; percentiles, other than the basic bootstrap 2 * value - percentile, stay in the
range of a figure (a recall below 0 does not exist). A statistic that is biased under resampling may lie outside of 95%
of its resamples: of few documents, since one drawn twice has less variance than two, and of the held-out mean as a
prediction always. No other percentiles hold it then; the interval is widened to its value.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import numpy as np

from lens import truth

RESAMPLES = 1000


@functools.cache
def _draws(n_docs: int, seed: int = 42) -> np.ndarray:
    """Returns how often each document is in each resample; row 0 is the data itself."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_docs, np.full(n_docs, 1 / n_docs), size=RESAMPLES)
    return np.concatenate([np.ones((1, n_docs)), counts])


def _sums(values_Nx, doc_N):
    """Returns sums of rows of the data (first) and of every resample."""
    documents, doc = np.unique(doc_N, return_inverse=True)
    by_document = np.zeros((len(documents), *values_Nx.shape[1:]))
    np.add.at(by_document, doc, values_Nx)
    return _draws(len(documents)) @ by_document


def _figure(values) -> dict:
    """Makes a figure of a statistic of the data (first) and of the resamples, without those that are NaN."""
    value = float(values[0])
    lo, hi = np.nanpercentile(values[1:], [2.5, 97.5])
    return {'value': value, 'ci95': [min(float(lo), value), max(float(hi), value)]}


def _variance(rows_NxD, doc_N, ddof: int = 1):
    """Returns sum_d Var_d of every resample, from (Q - |s|^2/n) / (n - ddof); NaN where all its rows are one."""
    rows = rows_NxD - rows_NxD.mean(0)  # changes no variance and keeps the sums well conditioned
    n, q, s = (_sums(x, doc_N) for x in (np.ones(len(rows)), (rows**2).sum(1), rows))
    return (q - (s**2).sum(1) / n) / np.where(n > 1, n - ddof, np.nan)


def _positive(variance):
    """Replaces by NaN what is the rounding of a variance of zero."""
    return np.where(variance > 1e-12 * variance[0], variance, np.nan)


def mean(values_N, doc_N) -> dict:
    """Computes the mean of a number, or of a yes or no, per activation."""
    return _figure(_sums(values_N, doc_N) / _sums(np.ones(len(values_N)), doc_N))


def share(hits_N, of_N, doc_N) -> dict | None:
    """Computes a sum over a sum, of counts per activation; None where there is nothing to count."""
    of = _sums(of_N, doc_N)
    return _figure(_sums(hits_N, doc_N) / np.where(of > 0, of, np.nan)) if of[0] else None


def _float64(*arrays):
    return (np.asarray(x, np.float64) for x in arrays)


def _error(pred_NxD, target_NxD, doc_N):
    """Returns mean_i |A_i - pred_i|^2 of the data and of every resample."""
    return _sums(squares(pred_NxD, target_NxD), doc_N) / _sums(np.ones(len(target_NxD)), doc_N)


def fve(pred_NxD, target_NxD, doc_N) -> dict:
    """Computes 1 - mean_i |R_i|^2 / sum_d Var_d(A), R = A - pred: a constant bias counts. Variances have ddof 1."""
    (target,) = _float64(target_NxD)
    return _figure(1 - _error(pred_NxD, target, doc_N) / _positive(_variance(target, doc_N)))


def fve_gain(pred_NxD, other_NxD, target_NxD, doc_N) -> dict:
    """Computes the FVE of pred minus that of another prediction; its interval is that of the difference."""
    (target,) = _float64(target_NxD)
    more = _error(other_NxD, target, doc_N) - _error(pred_NxD, target, doc_N)
    return _figure(more / _positive(_variance(target, doc_N)))


def fve_beyond(pred_NxD, other_NxD, target_NxD, doc_N) -> dict:
    """Computes 1 - sum_i |A_i - pred_i|^2 / sum_i |A_i - other_i|^2: what pred explains of what another prediction leaves
    open."""
    return _figure(1 - _error(pred_NxD, target_NxD, doc_N) / _error(other_NxD, target_NxD, doc_N))


def variance_recovered(pred_NxD, target_NxD, doc_N) -> dict:
    """Computes 1 - sum_d Var_d(R) / sum_d Var_d(A), R = A - pred: a constant bias does not count."""
    pred, target = _float64(pred_NxD, target_NxD)
    return _figure(1 - _variance(target - pred, doc_N) / _positive(_variance(target, doc_N)))


def rawvar(target_NxD, doc_N):
    """Returns mean_i |A_i - mean A|^2 / d of the data and of every resample, of rows of norm sqrt(d): the variance, with
    1/n, that `fve_nrm` of natural language autoencoders divides by."""
    (target,) = _float64(target_NxD)
    return _variance(target, doc_N, ddof=0) / target.shape[1]


def meannorm(target_NxD, doc_N):
    """Returns the same around the mean direction in place of the mean: 2 (1 - |mean A| / sqrt(d))."""
    (target,) = _float64(target_NxD)
    mean = _sums(target, doc_N) / _sums(np.ones(len(target)), doc_N)[:, None]
    return 2 * (1 - np.linalg.norm(mean, axis=1) / np.sqrt(target.shape[1]))


def fve_over(baseline: Callable, pred_NxD, target_NxD, doc_N) -> dict:
    """Computes 1 - mean_i |A_i - pred_i|^2 / d over `baseline`, rawvar or meannorm, of rows of norm sqrt(d)."""
    error = _error(pred_NxD, target_NxD, doc_N) / np.shape(target_NxD)[1]
    return _figure(1 - error / _positive(baseline(target_NxD, doc_N)))


def squares(pred_NxD, target_NxD) -> np.ndarray:
    """Computes |A_i - pred_i|^2, [N]."""
    pred, target = _float64(pred_NxD, target_NxD)
    return ((target - pred) ** 2).sum(1)


def nmse_rows(pred_NxD, target_NxD) -> np.ndarray:
    """Computes |A_i - pred_i|^2 / |A_i|^2, [N]."""
    (target,) = _float64(target_NxD)
    return squares(pred_NxD, target) / np.maximum((target**2).sum(1), 1e-12)


def nmse(pred_NxD, target_NxD, doc_N) -> dict:
    """Computes mean_i |A_i - pred_i|^2 / |A_i|^2."""
    return mean(nmse_rows(pred_NxD, target_NxD), doc_N)


def cosine(pred_NxD, target_NxD, doc_N) -> dict:
    """Computes the mean cosine of A and its reconstruction."""
    pred, target = _float64(pred_NxD, target_NxD)
    norms = np.linalg.norm(pred, axis=1) * np.linalg.norm(target, axis=1)
    return mean((pred * target).sum(1) / np.maximum(norms, 1e-12), doc_N)


def other_document(doc_N) -> np.ndarray:
    """Returns for every activation the index of one of another document; each is used once.

    No document may hold more than half of the activations.
    """
    order = np.argsort(doc_N, kind='stable')
    partner = np.empty_like(order)
    partner[order] = np.roll(order, np.unique(doc_N, return_counts=True)[1].max())
    return partner


def _fact_counts(ids_NxT, established_NxF, fields: list[dict], doc_N):
    """Counts facts that are named and right, established, and named, over all fields, as _sums.

    A value is named when its token occurs anywhere in the explanation.
    """
    counts = []
    for truth_N, field in zip(established_NxF.T, fields, strict=True):
        said_NxV = (ids_NxT[:, :, None] == np.asarray(field['token_ids'])).any(1)
        right_NxV = np.arange(said_NxV.shape[1]) == truth_N[:, None]
        counts.append([(said_NxV & right_NxV).sum(1), truth_N >= 0, said_NxV.sum(1)])
    return (_sums(x, doc_N) for x in np.sum(counts, axis=0))


def facts_recall(ids_NxT, established_NxF, fields: list[dict], doc_N) -> dict:
    """Computes established facts that the explanation names / established facts, pooled over activations and fields.

    established_NxF: value index that the text has established at the position, -1 = none.
    """
    hit, established, _ = _fact_counts(ids_NxT, established_NxF, fields, doc_N)
    return _figure(hit / np.maximum(established, 1))


def facts_hallucinated(ids_NxT, established_NxF, fields: list[dict], doc_N) -> dict:
    """Computes named facts that are not established or wrong / named facts, pooled; arguments as in facts_recall."""
    hit, _, named = _fact_counts(ids_NxT, established_NxF, fields, doc_N)
    return _figure((named - hit) / np.maximum(named, 1))


@dataclasses.dataclass(frozen=True)
class Collected:
    """What figures are made of: N activations `a` and, by the name of a text (texts.TEXTS), pred, its
    reconstruction NxD (the zero vector where a response holds no explanation), ids, its tokens NxT (-1 outside of the
    explanation), and found, whether there is an explanation [N].

    sources: what is true of the text of each; None where its words are not known. doc_N, truth_NxF: as above, the second
    None without `fields`. tagged: whether an explanation stands between tags. error: encoder.error of the run, as which `a`
    and pred are compared. context: encoder.context_tokens of the run; of it alone and of fewer tokens pred has the texts
    quote_0, …, quote_{context}, which have no words and so no ids.
    """

    a: np.ndarray
    pred: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]
    found: dict[str, np.ndarray]
    doc_N: np.ndarray
    truth_NxF: np.ndarray | None
    fields: list[dict]
    tagged: bool
    error: str
    sources: truth.Sources | None = None
    context: int = 0


@dataclasses.dataclass(frozen=True)
class Figure:
    """A held-out figure: function(collected, text) -> {'value', 'ci95'}, None where it means nothing for the run.

    group: under which the report shows it. text: of texts.TEXTS; where the data do not have it the figure is left
    out. quick: whether evaluations during training have it. of_directions: the phrase, made of `meaning`, where the
    encoder learns directions alone (encoder.error=direction).
    """

    group: str
    meaning: str
    function: Callable[[Collected, str], dict | None]
    text: str = 'sampled'
    quick: bool = False
    of_directions: str = '{}'


def _of(formula: Callable) -> Callable:
    return lambda c, text: formula(c.pred[text], c.a, c.doc_N)


def _of_facts(formula: Callable) -> Callable:
    return lambda c, text: formula(c.ids[text], c.truth_NxF, c.fields, c.doc_N) if c.fields else None


def _extracted(c: Collected, text: str) -> dict | None:
    return mean(c.found[text], c.doc_N) if c.tagged else None


def _beyond(c: Collected, text: str) -> dict | None:
    return fve_beyond(c.pred[text], c.pred[f'quote_{c.context}'], c.a, c.doc_N) if c.context else None


def _over(baseline: Callable, itself: bool = False) -> Callable:
    """FVE over a baseline of directions, or the baseline."""

    def figure(c: Collected, text: str) -> dict | None:
        if c.error != 'direction':
            return None
        return _figure(baseline(c.a, c.doc_N)) if itself else fve_over(baseline, c.pred[text], c.a, c.doc_N)

    return figure


def _fve_direction(c: Collected, text: str) -> dict | None:
    """FVE of rows of one norm, whichever it is."""
    if c.error == 'direction':  # `fve` says it
        return None
    rows = _float64(c.pred[text], c.a)
    return fve(*(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in rows), c.doc_N)


_FVE, _COSINE, _RECALL, _HALLUCINATED = _of(fve), _of(cosine), _of_facts(facts_recall), _of_facts(facts_hallucinated)
FIGURES = {
    'fve': Figure(
        'lens',
        'variance of A explained by the reconstruction, explanations sampled at temperature 1; a bias counts',
        _FVE,
        quick=True,
        of_directions='A and reconstruction rescaled to norm sqrt(d): {}; 1 - mean of (2 - 2 cosine) over that variance',
    ),
    'fve_greedy': Figure('lens', 'the same with the most probable explanation', _FVE, 'greedy', quick=True),
    'variance_recovered': Figure(
        'lens',
        'pooled variance recovered, temperature 1; a constant bias does not count',
        _of(variance_recovered),
        of_directions='of the rescaled vectors: {}',
    ),
    'nmse': Figure(
        'lens',
        'mean of |A - reconstruction|^2 / |A|^2, temperature 1',
        _of(nmse),
        of_directions='mean of 2 - 2 cosine, temperature 1; 1 for a response without an explanation',
    ),
    'cosine': Figure('lens', 'mean cosine of A and its reconstruction, temperature 1', _COSINE, quick=True),
    'cosine_greedy': Figure('lens', 'the same with the most probable explanation', _COSINE, 'greedy'),
    'fve_direction': Figure('lens', 'FVE at temperature 1 of both rescaled to norm sqrt(d)', _fve_direction),
    'fve_nrm': Figure('lens', 'fve with 1/n in the variance (rawvar), as published for NLA', _over(rawvar)),
    'fve_meannorm': Figure('lens', 'the same over meannorm in place of the variance', _over(meannorm)),
    'extracted': Figure(
        'lens', 'responses that hold an explanation, temperature 1; the others count as the zero vector', _extracted
    ),
    'extracted_greedy': Figure('lens', 'the same of the most probable responses', _extracted, 'greedy'),
    # read from metrics.jsonl: evaluate.figure_after_sft
    'fve_sft': Figure('lens', 'FVE at temperature 1 at the end of the SFT phase', lambda c, text: None),
    'fve_given': Figure('lens', 'FVE of the given explanation: the ceiling of the text format', _FVE, 'given'),
    'fve_beyond_greedy': Figure('lens', 'fve_beyond with the most probable explanation', _beyond, 'greedy'),
    'fve_beyond_given': Figure(
        'lens', 'fve_beyond of the given explanation: the ceiling of the text format', _beyond, 'given'
    ),
    'gain_over_quote': Figure(
        'lens',
        'FVE minus fve_previous_tokens: what explanations say more than as many quoted tokens',
        lambda c, text: fve_gain(c.pred['sampled'], c.pred[text], c.a, c.doc_N),
        'previous_tokens',
    ),
    'fve_shuffled': Figure(
        'controls',
        'FVE when each explanation is paired with the activation of another document',
        lambda c, text: fve(c.pred[text][other_document(c.doc_N)], c.a, c.doc_N),
    ),
    'fve_no_activation': Figure('controls', 'FVE when the decoder gets the zero vector', _FVE, 'no_activation'),
    'fve_words_permuted': Figure('controls', 'FVE of the words in another order', _FVE, 'words_permuted'),
    'fve_previous_tokens': Figure(
        'controls',
        'FVE of the last tokens of the source (before the context) as words, on which the encoder was not trained',
        _FVE,
        'previous_tokens',
    ),
    'fve_beyond_shuffled': Figure(
        'controls', 'fve_beyond of the words of another document with the own context', _beyond, 'shuffled'
    ),
    'fve_beyond_no_activation': Figure(
        'controls', 'fve_beyond when the decoder gets the zero vector', _beyond, 'no_activation'
    ),
    'fve_mean_baseline': Figure(
        'controls',
        'FVE of predicting the held-out mean: 0 up to the degree of freedom',
        lambda c, text: fve(np.broadcast_to(c.a.mean(0), c.a.shape), c.a, c.doc_N),
    ),
    'rawvar': Figure('controls', 'mean square distance of A to its mean, norm sqrt(d)', _over(rawvar, itself=True)),
    'meannorm': Figure('controls', 'the same to the direction of the mean', _over(meannorm, itself=True)),
    'fve_zero_baseline': Figure('controls', 'FVE of the zero vector', lambda c, text: fve(0 * c.a, c.a, c.doc_N)),
    'facts_recall': Figure('facts', 'established facts that the greedy explanation names', _RECALL, 'greedy', True),
    'facts_hallucinated': Figure(
        'facts', 'facts it names that are wrong or not established', _HALLUCINATED, 'greedy', True
    ),
    'facts_recall_sampled': Figure('facts', 'facts recall at temperature 1', _RECALL),
    'facts_hallucinated_sampled': Figure('facts', 'facts hallucinated at temperature 1', _HALLUCINATED),
}


def _of_words(formula: Callable, other: bool = False) -> Callable:
    """other: of the explanation of another document."""

    def figure(c: Collected, text: str) -> dict | None:
        if c.sources is None:
            return None
        ids = c.ids[text][other_document(c.doc_N)] if other else c.ids[text]
        return share(*formula(c.sources, ids), c.doc_N)

    return figure


_SAYS = {  # formula of truth.py -> its meaning
    'grounded': 'content words of the greedy explanation that stand in the text so far',
    'grounded_ahead': f'those that stand in the next {truth.AHEAD} tokens of the document alone',
    'invented': 'those that stand in neither',
    'topic_recall': 'of the rarest words of the text so far, those that the greedy explanation names',
    'next_match': 'words it gives as what comes next that stand at that place of the document',
}
for _name, _says in _SAYS.items():
    FIGURES[_name] = Figure('truth', _says, _of_words(getattr(truth, _name)), 'greedy', quick=_name != 'next_match')
for _name in _SAYS:
    FIGURES[f'{_name}_sampled'] = Figure('truth', f'{_name} at temperature 1', _of_words(getattr(truth, _name)))
for _name in ('grounded', 'topic_recall', 'next_match'):
    _formula, _of_another = (_of_words(getattr(truth, _name), other) for other in (False, True))
    FIGURES |= {
        f'{_name}_shuffled': Figure('truth', f'{_name} by the explanation of another document', _of_another, 'greedy'),
        f'{_name}_no_activation': Figure(
            'truth', f'{_name} at temperature 1 when the decoder gets the zero vector', _formula, 'no_activation'
        ),
        f'{_name}_given': Figure('truth', f'{_name} of the given explanation', _formula, 'given'),
    }


def quoted(context: int) -> list[int]:
    """Returns how many of the last source tokens are quoted without words: 0, 1, 2, 4, … and the whole context."""
    powers = (2**i for i in range(context.bit_length()))
    return [*(m for m in (0, *powers) if m < context), context] if context else []


def figures(context: int) -> dict[str, Figure]:
    """Returns FIGURES, and before them those that are named after tokens of the context, encoder.context_tokens."""
    if not context:
        return FIGURES
    beyond = f'share of what the last {context} source tokens leave open that sampled words explain: 1 - mean |A - '
    beyond += f'reconstruction|^2 / the same without words (fve_quote_{context}); a failed response is the zero vector'
    quote = 'FVE of the last {} source tokens and no words, by the encoder, which was trained on them'
    quotes = {
        f'fve_quote_{m}': Figure('controls', quote.format(m), _FVE, f'quote_{m}', m == context) for m in quoted(context)
    }
    return {f'fve_beyond_{context}': Figure('lens', beyond, _beyond, quick=True)} | quotes | FIGURES


def headline(values: Mapping) -> list[str]:
    """Returns those of the named figures that come first where there are any: fve_beyond_m and its fve_quote_m."""
    pairs = ([k, k.replace('beyond', 'quote')] for k in values if re.fullmatch(r'fve_beyond_\d+', k))
    return next((pair for pair in pairs if pair[1] in values), [])


def meaning(name: str, error: str, context: int = 0) -> str:
    """Returns a phrase on a figure. error, context: encoder.error and encoder.context_tokens of the run."""
    figure = figures(context)[name]
    return figure.of_directions.format(figure.meaning) if error == 'direction' else figure.meaning
