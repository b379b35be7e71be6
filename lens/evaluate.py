"""Held-out figures with their controls, and sample explanations.

python -m lens.evaluate --workdir=runs/tiny      # a checkpoint of a run, again
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lens import cli, data, files, metrics, report, sampling, sharding
from lens.config import Run
from lens.errors import LensError
from lens.checkpoint import reopen
from lens.models.decoder import without_position
from lens.models.encoder import encode
from lens.models.lens import Lens
from lens.objectives import comparable, extract as read
from lens.response import NO_TAGS, find

MEANINGS = {
    'fve': (
        'lens',
        'variance of A explained by the reconstruction, explanations sampled at temperature 1; a bias counts',
    ),
    'fve_greedy': ('lens', 'the same with the most probable explanation'),
    'variance_recovered': ('lens', 'pooled variance recovered, temperature 1; a constant bias does not count'),
    'nmse': ('lens', 'mean of |A - reconstruction|^2 / |A|^2, temperature 1'),
    'cosine': ('lens', 'mean cosine of A and its reconstruction, temperature 1'),
    'cosine_greedy': ('lens', 'the same with the most probable explanation'),
    'fve_direction': ('lens', 'FVE at temperature 1 when both are rescaled to norm sqrt(d): only directions count'),
    'extracted': ('lens', 'responses that hold an explanation, temperature 1; the others count as the zero vector'),
    'extracted_greedy': ('lens', 'the same of the most probable responses'),
    'fve_sft': ('lens', 'FVE at temperature 1 at the end of the SFT phase'),
    'fve_given': ('lens', 'FVE when the encoder reads the given explanation: the ceiling of the text format'),
    'fve_shuffled': ('controls', 'FVE when each explanation is paired with the activation of another document'),
    'fve_no_activation': ('controls', 'FVE when the decoder gets the zero vector instead of the activation'),
    'fve_words_permuted': ('controls', 'FVE when the words of the explanation are permuted before encoding'),
    'fve_previous_tokens': (
        'controls',
        'FVE when the encoder reads the last tokens of the source instead (it was not trained on them)',
    ),
    'fve_mean_baseline': ('controls', 'FVE of predicting the held-out mean: 0 up to the degree of freedom'),
    'fve_zero_baseline': ('controls', 'FVE of predicting the zero vector'),
    'facts_recall': ('facts', 'established facts that the greedy explanation names'),
    'facts_hallucinated': ('facts', 'facts named by the greedy explanation that are not established or wrong'),
    'facts_recall_sampled': ('facts', 'facts recall at temperature 1'),
    'facts_hallucinated_sampled': ('facts', 'facts hallucinated at temperature 1'),
}

# What else a figure is where the encoder learns directions alone (encoder.error=direction).
OF_DIRECTIONS = {
    'fve': 'A and reconstruction rescaled to norm sqrt(d), baseline their mean: {}; 1 - mean of (2 - 2 cosine) over it',
    'variance_recovered': 'of the rescaled vectors: {}',
    'nmse': 'mean of 2 - 2 cosine, temperature 1; 1 for a response without an explanation',
}


def meaning(name: str, error: str) -> str:
    """One sentence on a figure. error: encoder.error of the run."""
    text = MEANINGS[name][1]
    return OF_DIRECTIONS.get(name, '{}').format(text) if error == 'direction' else text


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """figures: name -> {'value', 'ci95'}; facts: one row per field; samples: one dict per explanation.

    error: encoder.error of the run. fve_quick: FVE on the documents of the quick figures alone.
    """

    error: str
    fve_quick: float
    documents: int
    activations: int
    figures: dict[str, dict]
    facts: list[dict]
    samples: list[dict]

    def values(self) -> dict[str, float]:
        return {k: v['value'] for k, v in self.figures.items()}

    def to_json(self, step: int) -> dict:
        figures = {k: v | {'group': MEANINGS[k][0], 'meaning': meaning(k, self.error)} for k, v in self.figures.items()}
        return {
            'step': step,
            'documents': self.documents,
            'activations': self.activations,
            'figures': figures,
            'facts': self.facts,
        }


@functools.partial(jax.jit, static_argnames=('layer', 'length', 'tags', 'error', 'controls'))
def _evaluate_batch(lens: Lens, base, batch, key, *, layer, length, tags, error, controls):
    """Arrays for the rows of one batch: activations, texts, reconstructions, both as `error` compares them.

    All texts are drawn in one call and encoded in one call: one program each to compile. Tokens outside of an
    explanation are -1; a response without one is reconstructed as the zero vector.
    """
    roll = read(base, batch, layer)
    a = without_position(lens.decoder, roll.a_NxD, roll.source.position_N)
    draw_key, permute_key = jax.random.split(key)
    vectors, temperatures = {'': a, '_greedy': a}, [1.0, 0.0]
    if controls:
        vectors['_no_activation'], temperatures = 0 * a, [1.0, 0.0, 1.0]
    tile = jnp.tile(jnp.asarray(temperatures), len(a))
    ids = sampling.sample(
        lens.decoder, base, _interleave(vectors.values()), draw_key, length=length, temperature=tile
    ).ids_NxT
    texts = _separate(ids, vectors)
    if controls:
        noise = jax.random.uniform(permute_key, texts[''].shape, out_sharding=sharding.out(sharding.rows(2)))
        inside, at = _inside(find(texts[''], tags), length), jnp.arange(length)
        start = jnp.argmax(inside, axis=1, keepdims=True)
        order = jnp.argsort(jnp.where(inside, start + noise, at + (at > start)), axis=1)
        texts['_words_permuted'] = jnp.take_along_axis(texts[''], order, axis=1)
        texts['_previous_tokens'] = batch['previous'].reshape(-1, length)
        if 'explanations' in batch:
            texts['_given'] = batch['explanations'].reshape(-1, length)
    found = {k: find(ids, NO_TAGS if k == '_previous_tokens' else tags) for k, ids in texts.items()}
    span = tuple(_interleave(x) for x in zip(*(f.span for f in found.values()), strict=True)) if tags else None
    source = jax.tree.map(lambda x: _interleave([x] * len(texts)), roll.source)
    pred = _separate(encode(lens.encoder, base, _interleave(texts.values()), source, span), texts)
    pred = {k: jnp.where(found[k].found_N[:, None], comparable(v, error), 0) for k, v in pred.items()}
    out = {'a': comparable(roll.a_NxD, error), 'found': found[''].found_N, 'found_greedy': found['_greedy'].found_N}
    for name in texts.keys() & {'', '_greedy', '_given'}:
        out[f'ids{name}'] = jnp.where(_inside(found[name], length), texts[name], -1)
    return out | {f'pred{k}': v for k, v in pred.items()}


def _inside(found, length: int):
    """Which tokens of the responses are explanation, NxT."""
    start, at = found.start_N[:, None], jnp.arange(length)
    return (at >= start) & (at < start + found.length_N[:, None])


def _interleave(parts):
    """K arrays Nx… as one (N*K)x…, rows of one n contiguous: a shard keeps its rows."""
    x = jnp.stack(list(parts), axis=1)
    return x.reshape(-1, *x.shape[2:])


def _separate(x_MxD, names) -> dict:
    """The inverse of _interleave, by name."""
    x = x_MxD.reshape(-1, len(names), x_MxD.shape[-1])
    return {name: x[:, k] for k, name in enumerate(names)}


class Evaluator:
    """Figures of a lens on the fixed held-out documents."""

    def __init__(self, run: Run):
        e = run.evaluation
        self.base, self.tokenizer, self.mesh, self.seed = run.base, run.tokenizer, run.mesh, run.seed
        self.layer, self.length, self.settings = run.layer, run.length, e
        self.tags, self.error = run.tags, run.error
        self.fields = run.validation.meta.get('facts') or []
        self.held = data.held_out(
            run.validation, documents=e.documents, vectors=e.vectors, min_pos=run.min_pos, seed=run.seed
        )
        self.held['previous'] = self._previous()
        if self.held.get('explanations', np.zeros((0, 0, run.length))).shape[2] != run.length:
            del self.held['explanations']  # only read as a control, in the format of this run
        # documents per batch, the same on every mesh: a row's noise depends on its place in the batch
        self.rows = max(e.batch // e.vectors, 1)
        self.padded = -(-self.rows // sharding.row_count(run.mesh)) * sharding.row_count(run.mesh)
        _, self.document = np.unique(self.held['doc_id'], return_inverse=True)
        if self.document.max() == 0:
            raise LensError(f'{run.validation.directory} holds one document: controls need at least 2.')

    def _previous(self):
        """The `length` tokens that end at each position, left-padded with the first token."""
        p = self.held['positions'][..., None] - np.arange(self.length)[::-1]
        return np.take_along_axis(self.held['tokens'][:, None], np.maximum(p, 0), axis=2)

    def _collect(self, lens: Lens, documents: int, controls: bool) -> dict[str, np.ndarray]:
        """_evaluate_batch over the first `documents` documents; the last batch is padded and cut."""
        vectors = self.held['positions'].shape[1]
        names = {'tokens', 'positions', 'previous', 'explanations'} & self.held.keys()
        key, parts = jax.random.key(self.seed), []
        for i in range(0, documents, self.rows):
            pick = np.minimum(np.arange(i, i + self.padded), documents - 1)
            batch = sharding.put_batch({k: self.held[k][pick] for k in names}, self.mesh)
            out = _evaluate_batch(
                lens,
                self.base,
                batch,
                jax.random.fold_in(key, i),
                layer=self.layer,
                length=self.length,
                tags=self.tags,
                error=self.error,
                controls=controls,
            )
            keep = min(self.rows, documents - i) * vectors
            parts.append({k: v[:keep] for k, v in sharding.fetch(out).items()})
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def quick(self, lens: Lens) -> dict[str, float]:
        """The few figures that a learning curve needs, on the first documents."""
        n = self._quick_documents
        c = self._collect(lens, n, controls=False)
        doc = self._documents(n)
        figures = self._lens_figures(c, doc) | self._fact_figures(c, doc)[0]
        keep = ('fve', 'fve_greedy', 'cosine', 'facts_recall', 'facts_hallucinated')
        return {k: figures[k]['value'] for k in keep if k in figures}

    def full(self, lens: Lens) -> Evaluation:
        """Every figure of MEANINGS that the data allows, and sample explanations."""
        n = len(self.held['lengths'])
        c = self._collect(lens, n, controls=True)
        doc = self._documents(n)
        figures = self._lens_figures(c, doc)
        controls = {
            'fve_given': c.get('pred_given'),
            'fve_shuffled': c['pred'][metrics.other_document(doc)],
            'fve_no_activation': c['pred_no_activation'],
            'fve_words_permuted': c['pred_words_permuted'],
            'fve_previous_tokens': c['pred_previous_tokens'],
            'fve_mean_baseline': np.broadcast_to(c['a'].mean(0), c['a'].shape),
            'fve_zero_baseline': 0 * c['a'],
        }
        for name, pred in controls.items():
            if pred is not None:
                figures[name] = metrics.reconstruction(pred, c['a'], doc)['fve']
        if self.error != 'direction':
            directions = (np.asarray(comparable(c[k], 'direction')) for k in ('pred', 'a'))
            figures['fve_direction'] = metrics.reconstruction(*directions, doc)['fve']
        if self.tags:
            figures |= {f'extracted{k}': metrics.fraction(c[f'found{k}'], doc) for k in ('', '_greedy')}
        facts, by_field = self._fact_figures(c, doc)
        samples = self._samples(c, self.settings.samples)
        return Evaluation(self.error, self._fve_quick(c), n, len(doc), figures | facts, by_field, samples)

    def _fve_quick(self, c) -> float:
        doc = self._documents(self._quick_documents)
        return metrics.reconstruction(c['pred'][: len(doc)], c['a'][: len(doc)], doc)['fve']['value']

    @property
    def _quick_documents(self) -> int:
        return min(self.settings.quick_documents, len(self.held['lengths']))

    def _documents(self, n: int) -> np.ndarray:
        """The document of every activation of the first n rows, numbered from 0."""
        _, doc = np.unique(self.document[:n], return_inverse=True)
        return np.repeat(doc, self.held['positions'].shape[1])

    def _lens_figures(self, c, doc) -> dict:
        sampled = metrics.reconstruction(c['pred'], c['a'], doc)
        greedy = metrics.reconstruction(c['pred_greedy'], c['a'], doc)
        return sampled | {f'{k}_greedy': greedy[k] for k in ('fve', 'cosine')}

    def _fact_figures(self, c, doc) -> tuple[dict, list[dict]]:
        if not self.fields:
            return {}, []
        truth = self.held['facts'].reshape(-1, len(self.fields))[: len(doc)]
        greedy, rows = metrics.facts(c['ids_greedy'], truth, self.fields, doc)
        sampled, sampled_rows = metrics.facts(c['ids'], truth, self.fields, doc)
        rows = [
            r | {'recall_sampled': s['recall'], 'hallucinated_sampled': s['hallucinated']}
            for r, s in zip(rows, sampled_rows, strict=True)
        ]
        return greedy | {f'{k}_sampled': v for k, v in sampled.items()}, rows

    def _samples(self, c, count: int) -> list[dict]:
        """One explanation from each of the first `count` documents, at varying positions."""
        n, vectors = self.held['positions'].shape
        out = []
        for d in range(min(count, n)):
            v = d % vectors
            i = d * vectors + v
            truth = self.held['facts'][d, v] if self.fields else []
            out.append(
                {
                    'doc_id': int(self.held['doc_id'][d]),
                    'position': int(self.held['positions'][d, v]),
                    'tokens': [self.tokenizer.decode([t]) for t in self.held['tokens'][d][: self.held['lengths'][d]]],
                    'read': int(self.held['positions'][d, v]),
                    'facts': {f['field']: f['values'][t] for f, t in zip(self.fields, truth, strict=False) if t >= 0},
                    'greedy': self._text(c['ids_greedy'][i], truth, c['pred_greedy'][i], c['a'][i]),
                    'sampled': self._text(c['ids'][i], truth, c['pred'][i], c['a'][i]),
                    'given': self._text(c['ids_given'][i], truth, c['pred_given'][i], c['a'][i])
                    if 'pred_given' in c
                    else None,
                }
            )
        return out

    def _text(self, ids, truth, pred, a) -> dict:
        """Tokens with status right | wrong | plain, and the normalised error of the reconstruction."""
        right = {f['token_ids'][t] for f, t in zip(self.fields, truth, strict=False) if t >= 0}
        values = {t for f in self.fields for t in f['token_ids']}
        words = ids[ids >= 0].tolist()
        status = ['right' if t in right else 'wrong' if t in values else 'plain' for t in words]
        return {
            'tokens': [{'text': self.tokenizer.decode([t]), 'status': s} for t, s in zip(words, status, strict=True)],
            'nmse': float(((pred - a) ** 2).sum() / max((a**2).sum(), 1e-12)),
        }


def figure_after_sft(workdir: pathlib.Path, run: Run) -> dict[str, dict]:
    """{'fve_sft': …} from metrics.jsonl: the evaluation at the end of the last SFT phase, if there is one."""
    ends = [p.end for p in run.phases if p.labelled]
    rows = files.read_jsonl(workdir / 'metrics.jsonl')
    found = [r['fve'] for r in rows if ends and r['kind'] == 'eval' and r['step'] == ends[-1]]
    return {'fve_sft': {'value': found[-1], 'ci95': None}} if found else {}


def write_results(workdir: pathlib.Path, result: Evaluation, step: int) -> None:
    """evaluation.json, samples.jsonl and report.html of a run."""
    files.write_json(workdir / 'evaluation.json', result.to_json(step))
    files.write_jsonl(workdir / 'samples.jsonl', result.samples)
    report.write_report(workdir)


def main(_):
    workdir = pathlib.Path(WORKDIR.value)
    again = reopen(workdir, STEP.value)
    run, step = again.run, again.step
    with jax.set_mesh(run.mesh):
        result = Evaluator(run).full(again.params)
    result.figures.update(figure_after_sft(workdir, run))
    write_results(workdir, result, step)
    for name, figure in result.figures.items():
        interval = '   [{:.3f}, {:.3f}]'.format(*figure['ci95']) if figure['ci95'] else ''
        print(f'{name:28} {figure["value"]:7.3f}{interval}')
    print(
        f'{result.activations} activations of {result.documents} held-out documents, step {step}. '
        f'Figures: {workdir}/evaluation.json  Report: {workdir}/report.html'
    )


if __name__ == '__main__':
    WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run of lens.main.')
    STEP = flags.DEFINE_string(
        'step', 'newest', 'Which checkpoint: newest, best (highest held-out FVE), or its number.'
    )
    flags.mark_flag_as_required('workdir')
    cli.run(main)
