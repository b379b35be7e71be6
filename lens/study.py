"""What lens.evaluate measures besides the figures of training, on the same held-out activations.

best of k     the best of the first k explanations drawn of one activation: of more it is never worse
put back      what the subject predicts next when a reconstruction stands in place of the activation
first words   the first n tokens of the sampled explanation, and its first n lines
text alone    m tokens of the text and no activation: what a lens must beat to say more than the text shows
parts         FVE of each role and each stretch of positions

A reconstruction is a name in Collected.pred; figures of it are made as in metrics.py.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lens import losses, metrics, sampling, sharding, words
from lens.config import Run
from lens.errors import LensError, number, shown
from lens.losses import comparable
from lens.metrics import Collected
from lens.models import subject
from lens.models.encoder import encode
from lens.models.lens import Lens
from lens.models.streams import Stream, by_slices
from lens.response import Tags, between, find
from lens.rollout import Rollout, read, source_of, vectors

GROUP = 4  # explanations of one activation that are drawn at a time
MOST_SAMPLES = 4096  # explanations of one activation
SAMPLES = 1 << 20  # folded into the keys of those after the first; texts.TEXTS folds in small numbers
QUOTES = (2, 4, 8, 16, 32)  # tokens of the text that stand alone
LINES = 8  # of an explanation that have a figure
FEWEST = 8  # activations of a part that has a figure of its own
PUT_BACK = ('sampled', 'greedy', 'previous_tokens')  # and the mean activation


class Study(NamedTuple):
    """figures: whole entries of evaluation.json; by_k: the rows of best of k; nmse: histograms by name, an error for each
    activation; curves: the names of figures that plots show, by plot, with what stands on the axis."""

    figures: dict[str, dict]
    by_k: list[dict]
    nmse: dict[str, np.ndarray]
    curves: dict[str, dict]


@functools.partial(jax.jit, static_argnames=('group', 'length', 'tags', 'error'))
def _said(
    lens: Lens, base, roll: Rollout, index_N, seed, numbers_G, *, group: int, length: int, tags: Tags, error: str
):
    """Explains each activation `group` times and reads the words back, NxGxD. numbers_G: which of the samples of an
    activation they are; their randomness depends on that and on its place index_N alone."""
    fold, key = jax.random.fold_in, jax.random.key(seed)

    def of_row(i):
        return jax.vmap(lambda k: fold(fold(fold(key, i), SAMPLES), k))(numbers_G)

    a = vectors(lens.decoder, roll)
    keys_M = jax.vmap(of_row)(index_N).reshape(-1)
    ids = sampling.sample(lens.decoder, base, a, keys_M, length=length, group=group, tags=tags).ids_NxT
    found, source = find(ids, tags), jax.tree.map(lambda x: subject.tile_rows(x, group), roll.source)
    ids, span = between(ids, found, tags)
    pred = comparable(encode(lens.encoder, base, ids, source, span), error)
    return jnp.where(found.found_N[:, None], pred, 0).reshape(len(a), group, -1)


@functools.partial(jax.jit, static_argnames=('layer', 'layers', 'error'))
def _of_text_alone(base, batch, *, layer: int, layers: tuple[int, ...], error: str):
    """What the subject itself has after its first tokens and the last m of a text, N rows, and [N, D] as compared.

    batch['brief'] [R, V, M], those tokens; batch['at'] [R, V], the last of them.
    """
    tokens, at = (x.reshape(-1, *x.shape[2:]) for x in (batch['brief'], batch['at'][..., None]))
    tokens, at = (sharding.reshard(x, sharding.rows(2)) for x in (tokens, at))
    roll = read(base, {'tokens': tokens, 'positions': at}, layer=layer, layers=layers)
    return roll, comparable(roll.a_NxD, error)


@functools.partial(jax.jit, static_argnames=('layer', 'error'))
def _put_back(base, batch, values, *, layer: int, error: str):
    """Of each activation, with each value RxVxD in its place: (KL in nats of the next token from what it is, cross-entropy
    of the next token of the text); the second for the activation itself as well."""
    a = subject.activations(base, batch['tokens'], batch['positions'], layer).astype(jnp.float32)
    if error == 'direction':  # only the direction was learnt
        size = jnp.linalg.norm(a, axis=-1, keepdims=True)
        values = {
            k: x * size / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for k, x in values.items()
        }
    names, after = ['natural', *values], jnp.minimum(batch['positions'] + 1, batch['tokens'].shape[1] - 1)
    put = sharding.reshard(jnp.concatenate([a, *values.values()], axis=1), sharding.ACT)
    x = subject.stream_at(base, batch['tokens'], jnp.tile(batch['positions'], len(names)), put, layer)
    streams = {k: Stream(part, base) for k, part in zip(names, jnp.split(x, len(names), axis=1), strict=True)}

    def numbers(logits, after):
        kl = {k: losses.kl(logits['natural'], logits[k]) for k in values}
        return {'kl': kl, 'ce': {k: -losses.token_log_probs(logits[k], after) for k in names}}

    out = by_slices(numbers, streams, sharding.take(batch['tokens'], after))
    return jax.tree.map(lambda x: sharding.reshard(x, sharding.rows(2)).reshape(-1), out)


@dataclasses.dataclass(frozen=True)
class Measure:
    """Makes a Study. e: evaluate.Evaluator; c: what it has collected; best_of: ascending numbers of explanations."""

    e: object
    lens: Lens
    c: Collected
    best_of: tuple[int, ...]

    def __call__(self) -> Study:
        """Measures all of it."""
        c, first, texts = self.c, self.first_tokens(), 'tokens' in self.e.held
        last = self.text_alone() if texts else {}
        preds = self.best() | first | self.first_lines() | last
        fve = functools.cache(lambda name: metrics.fve((c.pred | preds)[name], c.a, c.doc_N))
        figures = {f'fve_{k}': fve(k) | {'group': group(k), 'meaning': meaning(k, c)} for k in preds}
        for k in (k for k in last if not k.startswith('subject')):
            gain = metrics.fve_gain(c.pred['sampled'], preds[k], c.a, c.doc_N)
            figures[f'gain_over_{k}'] = gain | {
                'group': group(k),
                'meaning': f'FVE minus fve_{k}, of the same activations',
            }
        figures |= self.put_back() if texts else {}
        roles, stretches = self.roles(), self.stretches()
        figures |= roles | stretches
        curves = {
            'best_of': {k: f'fve_best_of_{k}' for k in self.best_of},
            'first': {int(k.rpartition('_')[2]): f'fve_{k}' for k in first},
            **{
                name: {m: f'fve_{name}_{m}' for m in QUOTES if f'{name}_{m}' in last}
                for name in ('last', 'text_only', 'subject')
            },
            'role': {k.removeprefix('fve_role_'): k for k in roles},
            'at': {k.removeprefix('fve_tokens_').replace('_to_', '-'): k for k in stretches},
        }
        shown = {'sampled': c.pred['sampled'], 'greedy': c.pred['greedy']}
        shown |= {f'best of {k}': preds[f'best_of_{k}'] for k in self.best_of[-1:]}
        return Study(figures, self.by_k(preds), {k: metrics.nmse_rows(x, c.a) for k, x in shown.items()}, curves)

    def best(self) -> dict[str, np.ndarray]:
        """Returns the best reconstruction of the first k samples, for each k; the first of them is `sampled`."""
        if not self.best_of:
            return {}
        e, run, most = self.e, self.e.run, self.best_of[-1]
        how = {'group': GROUP, 'length': run.length, 'tags': run.texts.tags, 'error': run.error}

        def of_batch(batch):
            roll = read(run.base, batch, **run.reading)
            fetched = sharding.fetch({'a': comparable(roll.a_NxD, run.error), 'sampled': batch['sampled']})
            a, best = fetched['a'], fetched['sampled'].reshape(fetched['a'].shape)
            error, out = metrics.squares(best, a), {}
            for j in range(most):
                if j % GROUP == 1 or (GROUP == 1 and j):
                    numbers, index = np.arange(j, j + GROUP), batch['index'].reshape(-1)
                    drawn = sharding.fetch(_said(self.lens, run.base, roll, index, run.seed, numbers, **how))
                if j:
                    pred = drawn[:, (j - 1) % GROUP]
                    made = metrics.squares(pred, a)
                    better = made < error
                    best, error = np.where(better[:, None], pred, best), np.where(better, made, error)
                if j + 1 in self.best_of:
                    out[f'best_of_{j + 1}'] = best
            return out

        arrays = {k: e.held[k] for k in ('tokens', 'activations', 'positions', 'index') if k in e.held}
        arrays['sampled'] = self._by_document(self.c.pred['sampled'])
        return e.by_batch('best_of', of_batch, e.documents, arrays)

    def by_k(self, preds) -> list[dict]:
        """Returns a row for each k: avg_mse is a mean over activations and dimensions, r_squared compares with one number
        for all of them."""
        a, doc, rows = self.c.a.astype(np.float64), self.c.doc_N, []
        spread = ((a - a.mean()) ** 2).sum()
        for k in self.best_of:
            pred = preds[f'best_of_{k}']
            figures = {
                'avg_mse': metrics.mean(metrics.squares(pred, a) / a.shape[1], doc),
                'nmse': metrics.nmse(pred, a, doc),
                'variance_recovery': metrics.variance_recovered(pred, a, doc),
                'mse_variance_recovery': metrics.fve(pred, a, doc),
                'cosine': metrics.cosine(pred, a, doc),
            }
            row = {'k': k, 'total_positions': len(a)}
            for name, f in figures.items():
                row |= {name: f['value'], f'{name}_ci95': f['ci95']}
            rows.append(row | {'r_squared': float(1 - metrics.squares(pred, a).sum() / spread)})
        return rows

    def first_tokens(self) -> dict[str, np.ndarray]:
        """Returns the reconstruction from the first n tokens of the sampled explanation; a response without tags has the
        filler of given explanations in place of the others, as short ones have."""
        rank = np.cumsum(self.c.ids['sampled'] >= 0, axis=1)
        return {f'first_{n}': self._cut(f'first_{n}', rank <= n) for n in sizes(room(self.e.run))}

    def first_lines(self) -> dict[str, np.ndarray]:
        """Returns the reconstruction from the first n lines of the sampled explanation, where some have several."""
        ids = self.c.ids['sampled']
        known = np.unique(ids[ids >= 0])
        pieces = words.Reader(self.e.run.tokenizer).pieces(known)
        ends = [i for i, piece in zip(known, pieces, strict=True) if ends_line(piece)]
        line = line_numbers(ids, np.isin(ids, ends))
        most = min(line.max(), LINES)
        return {f'lines_{n}': self._cut(f'lines_{n}', line <= n) for n in range(1, most + 1) if most > 1}

    def _cut(self, stage: str, keep_NxT: np.ndarray) -> np.ndarray:
        """Reconstructs from a part of the sampled explanation."""
        run, ids = self.e.run, self.c.ids['sampled']
        rest = -1 if run.texts.tags else run.validation.filler
        return self.e.reconstruct(self.lens, stage, np.where(keep_NxT, ids, rest), self.c.found['sampled'])

    def text_alone(self) -> dict[str, np.ndarray]:
        """Returns, for m of QUOTES, the reconstructions last_m, the encoder's of the last m tokens as words, text_only_m,
        that of what the decoder says of the subject's own state after them alone, and subject_m, that state."""
        e, run, out = self.e, self.e.run, {}
        tokens, positions, m_most = e.held['tokens'], e.held['positions'], max(QUOTES)
        before = e.tokens_before(m_most)
        every = np.full(len(self.c.a), True)
        how = {'group': 1, 'length': run.length, 'tags': run.texts.tags, 'error': run.error}

        def of_batch(batch):
            made = {k: batch[k] for k in ('brief', 'at')}
            roll, compared = _of_text_alone(run.base, made, layer=run.layer, layers=run.layers, error=run.error)
            source = source_of({k: batch[k] for k in ('tokens', 'positions')}, recent=max(1, run.context_tokens))
            index = batch['index'].reshape(-1)
            roll = roll._replace(source=source)  # of the text itself, whose context the encoder is shown
            pred = _said(self.lens, run.base, roll, index, run.seed, np.arange(1), **how)
            return {'said': pred[:, 0], 'state': compared}

        for m in (m for m in QUOTES if m < tokens.shape[1]):
            quoted = np.where(np.arange(m_most) >= m_most - m, before, -1).reshape(-1, m_most)
            out[f'last_{m}'] = e.reconstruct(self.lens, f'last_{m}', quoted, every)
            arrays = {k: e.held[k] for k in ('tokens', 'positions', 'index')}
            arrays['brief'], arrays['at'] = brief(tokens, positions, m, m_most + 1)
            made = e.by_batch(f'text_only_{m}', of_batch, e.documents, arrays)
            out |= {f'text_only_{m}': made['said'], f'subject_{m}': made['state']}
        return out

    def put_back(self) -> dict[str, dict]:
        """Returns the figures of what the subject predicts with reconstructions in place of activations."""
        e, run, c = self.e, self.e.run, self.c
        values = {k: c.pred[k] for k in PUT_BACK if k in c.pred} | {'mean': np.broadcast_to(c.a.mean(0), c.a.shape)}
        arrays = {k: e.held[k] for k in ('tokens', 'positions')}

        def of_batch(batch):
            put = {k: batch[f'put_{k}'] for k in values}
            batch = {k: batch[k] for k in arrays}
            return _put_back(run.base, batch, put, layer=run.layer, error=run.error)

        put = {f'put_{k}': self._by_document(np.asarray(x, np.float32)) for k, x in values.items()}
        out = e.by_batch('put_back', of_batch, e.documents, arrays | put)
        followed = (e.held['positions'] + 1 < e.held['lengths'][:, None]).reshape(-1)
        return functional(out, followed, c.doc_N)

    def roles(self) -> dict[str, dict]:
        """Returns the FVE of sampled words by whose words the token is of, where the data say it."""
        split, c = self.e.run.validation, self.c
        if split.role is None:
            return {}
        role = np.take_along_axis(split.role[split.read_rows[: self.e.documents]], self.e.held['positions'], axis=1)
        names = {code: re.sub(r'\W+', '_', name) for name, code in (split.meta.get('roles') or {}).items()}
        return _parts(c, {f'role_{names[k]}': role.reshape(-1) == k for k in names}, 'tokens of this role')

    def stretches(self) -> dict[str, dict]:
        """Returns the FVE of sampled words by position: 0-7, 8-15, 16-31, …"""
        at = self.e.held['positions'].reshape(-1)
        edges = [0, *(2**i for i in range(3, int(at.max()).bit_length() + 1))]
        where = {f'tokens_{a}_to_{b - 1}': (at >= a) & (at < b) for a, b in itertools.pairwise(edges)}
        return _parts(self.c, where, 'positions in this stretch')

    def _by_document(self, x_NxD: np.ndarray) -> np.ndarray:
        return x_NxD.reshape(self.e.documents, self.e.vectors, -1)


def numbers_of(best_of: str) -> tuple[int, ...]:
    """Reads 1,2,4: ascending numbers of explanations; empty: none. Raises LensError."""
    parts = [x.strip() for x in best_of.split(',')] if best_of.strip() else []
    wrong = [x for x in parts if not (x.isascii() and x.isdigit() and 1 <= int(x[:9]) <= MOST_SAMPLES and len(x) < 9)]
    if wrong:
        raise LensError(
            f'--best_of={shown(best_of)} must be numbers of explanations such as 1,2,4, each 1..{MOST_SAMPLES}; empty: none.'
        )
    return tuple(sorted({int(x) for x in parts}))


def sized(run: Run, num_vectors: int) -> Run:
    """Returns the run with so many held-out activations, rounded up to whole documents; 0: as many as it had. Raises
    LensError where the data has not so many."""
    e, have = run.evaluation, len(run.validation)
    number(num_vectors, '--num_vectors', 0)
    if not num_vectors:
        return run
    documents = max(-(-num_vectors // e.vectors), 2)
    if documents > have:
        raise LensError(
            f'--num_vectors={num_vectors} needs {documents} documents of {e.vectors} activations, '
            f'{run.validation.directory} has {have}: lower it, or give more data.'
        )
    return dataclasses.replace(run, evaluation=dataclasses.replace(e, documents=documents))


def work(run, best_of: tuple[int, ...], texts: Sequence[str] = (), studies: bool = True) -> dict[str, float]:
    """Returns how much work a batch of each stage of an evaluation is, in explanations drawn of each activation, about.
    texts: names of those that are read again as text. studies: whether it measures what stands here, too."""
    quotes = [m for m in QUOTES if m < run.validation.width]
    figures = {'figures': 5.0} | ({'shuffled': 1.0} if run.context_tokens else {}) | {f'text_{k}': 0.5 for k in texts}
    if not studies:
        return figures
    return (
        figures
        | ({'put_back': 2.0} if run.validation.width else {})
        | ({'best_of': float(best_of[-1])} if best_of else {})
        | {f'first_{n}': 0.5 for n in sizes(room(run))}
        | {f'last_{m}': 1.0 for m in quotes}
        | {f'text_only_{m}': 2.0 for m in quotes}
    )


def room(run) -> int:
    """Returns how many tokens a response has for its explanation."""
    return run.length - run.texts.tags.around


def sizes(length: int) -> list[int]:
    """Returns 1, 2, 3, 4, 6, 8, 12, … below `length`, and it."""
    steps = sorted({2**i for i in range(length.bit_length())} | {3 * 2**i for i in range(length.bit_length())})
    return [*(n for n in steps if n < length), length]


def ends_line(piece: str) -> bool:
    """Tells whether a token ends a line: explanations have paragraphs, or parts between bars."""
    return '\n' in piece or piece.strip() == words.BAR.strip()


def line_numbers(ids_NxT: np.ndarray, ends_NxT: np.ndarray) -> np.ndarray:
    """Numbers the lines of explanations, -1 outside of them, from 1: of each token that in which it stands, [N, T].

    ends: tokens that end a line, to which they belong. Empty lines do not count.
    """
    inside = (ids_NxT >= 0) & ~ends_NxT
    return np.cumsum(inside & ~np.pad(inside, ((0, 0), (1, 0)))[:, :-1], axis=1)


def brief(tokens_RxS, positions_RxV, m: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first token of each text and the m before each position, with its own, [R, V, width], and where the last
    of them stands; where there are not so many, the text up to there. What is right of it is 0."""
    seen = np.minimum(positions_RxV, m)[..., None]  # besides the first
    at = np.arange(width)
    source = np.where(at == 0, 0, positions_RxV[..., None] - seen + at)
    rows = np.take_along_axis(tokens_RxS[:, None], np.clip(source, 0, tokens_RxS.shape[1] - 1), axis=2)
    return np.where(at <= seen, rows, 0).astype(np.int32), seen[..., 0].astype(np.int32)


def functional(out: dict, followed_N, doc_N) -> dict[str, dict]:
    """Makes the figures of _put_back's numbers. followed_N: where the text has a next token."""
    kl, figures = out['kl'], {}
    names = {'sampled': ('', 'sampled words'), 'greedy': ('_greedy', 'the most probable words')}
    names['previous_tokens'] = '_previous_tokens', 'the last tokens of the source as words'
    names['mean'] = '_mean', 'the mean held-out activation'
    ce = {k: np.where(followed_N, x, 0).astype(np.float64) for k, x in out['ce'].items()}

    def add(name, figure, meaning):
        if figure is not None:
            figures[name] = figure | {'group': 'put back', 'meaning': meaning}

    for k, (suffix, what) in names.items():
        if k in kl:
            says = f'KL in nats of the next token, with A against with the reconstruction from {what} in its place'
            says = says.replace('the reconstruction from the mean', 'the mean')
            add(f'kl_functional_nats{suffix}', metrics.mean(kl[k], doc_N), says)
    says = 'share of the next-token cross-entropy that the mean activation in place of A costs, and the reconstruction from'
    lost = ce['mean'] - ce['natural']
    for k, (suffix, what) in names.items():
        if k in kl and k != 'mean' and lost.sum() > 0:
            figure = metrics.share(ce['mean'] - ce[k], lost, doc_N)
            add(f'ce_recovered{suffix}', figure, f'{says} {what} does not; 1 is A itself, 0 the mean')
    for k, what in {
        'natural': 'A itself',
        'sampled': 'the reconstruction from sampled words',
        'mean': 'the mean',
    }.items():
        name = 'ce_nats' if k == 'natural' else f'ce_nats_{k}'
        says = f'cross-entropy in nats of the next token of the text with {what} at the token before it'
        add(name, metrics.share(ce[k], followed_N.astype(np.float64), doc_N), says)
    return figures


def group(name: str) -> str:
    """Returns under which heading the report shows FVE of a reconstruction."""
    heads = {'best_of': 'best of k', 'first': 'first words', 'lines': 'first words'}
    return heads.get(name.rpartition('_')[0], 'text alone')


def meaning(name: str, c: Collected) -> str:
    """Returns a phrase on the FVE of a reconstruction."""
    kind, _, n = name.rpartition('_')
    before = f', those before the {c.context} that the encoder is shown anyway' if c.context else ''
    rest = '' if c.tagged else '; filler in place of the others'
    return {
        'best_of': f'FVE of the best of the first {n} sampled explanations of each activation, chosen by its error',
        'first': f'FVE of the first {n} tokens of the sampled explanation{rest}',
        'lines': f'FVE of the first {n} lines of the sampled explanation, which line breaks and bars end{rest}',
        'last': f'FVE of the last {n} tokens of the source as words{before}; the encoder was not trained on them',
        'text_only': f'FVE of what the lens says of the subject after the first and the last {n} tokens alone, not '
        'of the activation',
        'subject': f'FVE of the state of the untouched subject after its first and the last {n} tokens of the source',
    }[kind]


def _parts(c: Collected, where: dict[str, np.ndarray], what: str) -> dict[str, dict]:
    """FVE of parts of the activations, each around its own mean; of those of two documents at least."""
    figures = {}
    for name, pick in where.items():
        if pick.sum() >= FEWEST and len(np.unique(c.doc_N[pick])) > 1:
            figure = metrics.fve(c.pred['sampled'][pick], c.a[pick], c.doc_N[pick])
            says = f'FVE at temperature 1 of the {pick.sum()} {what}, around their own mean'
            figures[f'fve_{name}'] = figure | {'group': 'parts', 'meaning': says}
    return figures
