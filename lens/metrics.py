"""Figures over held-out activations in float64 numpy, with intervals that respect documents.

N activations come from documents: `doc_N` is the index of the document of each. Intervals are
percentile bootstraps that resample whole documents, because activations of one document are alike.
"""

import numpy as np

RESAMPLES = 1000


def _by_document(values_Nx, doc_N):
    """Sums of rows per document, M x ...; documents are numbered 0..M-1."""
    out = np.zeros((doc_N.max() + 1, *values_Nx.shape[1:]))
    np.add.at(out, doc_N, values_Nx)
    return out


def _draws(n_docs: int, seed: int = 42) -> np.ndarray:
    """How often each document is in each resample; row 0 is the data itself."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_docs, np.full(n_docs, 1 / n_docs), size=RESAMPLES)
    return np.concatenate([np.ones((1, n_docs)), counts])


def _figure(values) -> dict:
    """{'value', 'ci95'} from a statistic on the data (first) and on the resamples."""
    lo, hi = np.percentile(values[1:], [2.5, 97.5])
    return {'value': float(values[0]), 'ci95': [float(lo), float(hi)]}


def _variance(draws, rows_NxD, doc_N):
    """sum_d Var_d (ddof 1) for each resample, from (Q - |s|^2/n) / (n - 1)."""
    n = draws @ _by_document(np.ones(len(rows_NxD)), doc_N)
    q = draws @ _by_document((rows_NxD**2).sum(1), doc_N)
    s = draws @ _by_document(rows_NxD, doc_N)
    return (q - (s**2).sum(1) / n) / (n - 1), n


def reconstruction(pred_NxD, target_NxD, doc_N) -> dict[str, dict]:
    """fve, variance_recovered, nmse, cosine, each {'value', 'ci95'}.

    fve = 1 - mean_i |R_i|^2 / sum_d Var_d(A): a constant bias counts. variance_recovered =
    1 - sum_d Var_d(R) / sum_d Var_d(A): it does not. R = A - pred, variances with ddof 1 around the
    held-out mean. nmse = mean_i |R_i|^2 / |A_i|^2.
    """
    pred, target = np.asarray(pred_NxD, np.float64), np.asarray(target_NxD, np.float64)
    residual = target - pred
    draws = _draws(doc_N.max() + 1)
    # shifting A by its mean changes no variance and keeps the sums well conditioned
    var_a, n = _variance(draws, target - target.mean(0), doc_N)
    var_r, _ = _variance(draws, residual - residual.mean(0), doc_N)
    sq = (residual**2).sum(1)
    per_row = {
        'nmse': sq / np.maximum((target**2).sum(1), 1e-12),
        'cosine': (pred * target).sum(1)
        / np.maximum(np.linalg.norm(pred, axis=1) * np.linalg.norm(target, axis=1), 1e-12),
    }
    means = {k: draws @ _by_document(v, doc_N) / n for k, v in (per_row | {'error': sq}).items()}
    return {
        'fve': _figure(1 - means['error'] / var_a),
        'variance_recovered': _figure(1 - var_r / var_a),
        'nmse': _figure(means['nmse']),
        'cosine': _figure(means['cosine']),
    }


def fraction(hit_N, doc_N) -> dict:
    """Mean of a yes or no per activation."""
    draws = _draws(doc_N.max() + 1)
    return _figure(draws @ _by_document(np.asarray(hit_N, np.float64), doc_N) / (draws @ np.bincount(doc_N)))


def other_document(doc_N) -> np.ndarray:
    """For every activation the index of one of another document; each is used once.

    No document may hold more than half of the activations.
    """
    order = np.argsort(doc_N, kind='stable')
    partner = np.empty_like(order)
    partner[order] = np.roll(order, np.bincount(doc_N).max())
    return partner


def named_facts(ids_NxT, fields: list[dict]) -> list[np.ndarray]:
    """Per field, which of its values the text names: N x values, bool. A value is named when its
    token occurs anywhere in the explanation."""
    return [(ids_NxT[:, :, None] == np.asarray(f['token_ids'])).any(1) for f in fields]


def facts(ids_NxT, established_NxF, fields: list[dict], doc_N) -> tuple[dict, list[dict]]:
    """Facts recall and hallucination against the known answers.

    established_NxF: value index that the text has established at the position, -1 = none.
    recall = established facts that the explanation names / established facts; hallucinated = named
    facts that are not established or wrong / named facts; both pooled over activations. Returns
    ({'facts_recall', 'facts_hallucinated'}, [{'field', 'values', 'recall', 'hallucinated'}]).
    """
    rows, hits, known, named = [], [], [], []
    for f, truth_N, said_NxV in zip(fields, established_NxF.T, named_facts(ids_NxT, fields), strict=True):
        right_NxV = np.arange(said_NxV.shape[1]) == truth_N[:, None]
        hit, have, said = (said_NxV & right_NxV).sum(1), truth_N >= 0, said_NxV.sum(1)
        rows.append(
            {
                'field': f['field'],
                'values': len(f['values']),
                'recall': float(hit.sum() / max(have.sum(), 1)),
                'hallucinated': float((said - hit).sum() / max(said.sum(), 1)),
            }
        )
        hits.append(hit), known.append(have), named.append(said)
    draws = _draws(doc_N.max() + 1)
    hit, have, said = (draws @ _by_document(np.sum(x, axis=0), doc_N) for x in (hits, known, named))
    return {
        'facts_recall': _figure(hit / np.maximum(have, 1)),
        'facts_hallucinated': _figure((said - hit) / np.maximum(said, 1)),
    }, rows
