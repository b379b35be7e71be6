"""Held-out figures with their controls, and sample explanations.

python -m lens.evaluate --workdir=runs/tiny      # a checkpoint of a run, again, with what lens/study.py measures

A figure is one entry of metrics.FIGURES, what the encoder reads for it one entry of texts.TEXTS: a new one needs no more.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from lens import commands

    commands.evaluate()

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from lens import __version__, batches, data, feed, files, metrics, plots, report, sharding, study, texts, truth
from lens.batches import Batches, at_once
from lens.config import Run
from lens.errors import LensError
from lens.joints import padded
from lens.metrics import Collected, Figure, meaning
from lens.models.lens import Lens
from lens.objectives import OBJECTIVES
from lens.reader import Reader
from lens.reading import Reading
from lens.reopen import Reopened, open_lens, reopen
from lens.rollout import read, source_of

READ = ('tokens', 'activations', 'positions')  # of the held-out data, what `read` takes
NO_TEXT = '(not stored)'
FEW = 1000  # activations, below which figures are vague


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """figures: name -> {'value', 'ci95'}; facts: one row per field; samples: one dict per explanation.

    error, context: encoder.error and encoder.context_tokens of the run. fve_quick: FVE on the documents of the quick
    figures alone. more: what else evaluation.json holds; its `figures` are whole entries.
    """

    error: str
    fve_quick: float
    documents: int
    activations: int
    figures: dict[str, dict]
    facts: list[dict]
    samples: list[dict]
    context: int = 0
    more: dict = dataclasses.field(default_factory=dict)

    def values(self) -> dict[str, float]:
        return {k: v['value'] for k, v in self.figures.items()}

    def to_json(self, step: int) -> dict:
        """Returns the content of evaluation.json."""
        known, how = metrics.figures(self.context), (self.error, self.context)
        what = {k: {'group': known[k].group, 'meaning': meaning(k, *how)} for k in self.figures}
        counts = {'step': step, 'documents': self.documents, 'activations': self.activations}
        figures = {k: v | what[k] for k, v in self.figures.items()} | self.more.get('figures', {})
        return counts | self.more | {'figures': figures, 'facts': self.facts}


class Evaluator:
    """Figures of a lens on the fixed held-out documents. batch_of: who computes the batches, or has them already."""

    def __init__(self, run: Run, batch_of: Batches = at_once):
        self.run, self.settings, self.batch_of = run, run.evaluation, batch_of
        self.fields = run.validation.meta.get('facts') or []
        count = {'documents': self.settings.documents, 'vectors': self.settings.vectors}
        self.held = feed.held_out(run.validation, **count, min_pos=run.min_pos, seed=run.seed)
        self.documents, self.vectors = self.held['positions'].shape
        if 'tokens' in self.held:
            self.held['previous'] = self.tokens_before(run.length)
        self.held['index'] = np.arange(self.documents * self.vectors, dtype=np.int32).reshape(-1, self.vectors)
        if 'explanations' in self.held and self.held['explanations'].shape[2] != run.length:
            del self.held['explanations']  # only read as a control, in the format of this run
        self.quick_documents = min(self.settings.quick_documents, self.documents)
        shards = sharding.row_count(run.mesh)
        most = min(max(self.settings.batch // self.vectors, 1), self.documents)
        self.rows = -(-most // shards) * shards  # documents per batch

    @functools.cached_property
    def _sources(self) -> truth.Sources | None:
        """What is true of the text of every held-out activation; words are rare in the training documents, if there are any.
        None where no texts are stored."""
        split = self.run.validation
        if split.tokens is None:
            return None
        rows = split.read_rows[: self.documents]
        return truth.sources(split, self.run.train or split, rows, self.held['positions'], self.run.tokenizer)

    @property
    def texts(self) -> list[str]:
        """Returns those of texts.TEXTS that the held-out data have."""
        return [k for k, text in texts.TEXTS.items() if text.needs in self.held]

    def tokens_before(self, n: int) -> np.ndarray:
        """Returns the n tokens that end at each position or, where the encoder has a context, before it, [R, V, n]. What is
        to the left of a text is its first token or, there, -1."""
        before = self.held['positions'][..., None] - self.run.context_tokens - np.arange(n)[::-1]
        tokens = np.take_along_axis(self.held['tokens'][:, None], np.maximum(before, 0), axis=2)
        return np.where(before < 0, -1, tokens) if self.run.context_tokens else tokens

    def _collect(self, lens: Lens, documents: int, figures: Iterable[Figure], quick: bool = False) -> Collected:
        """Reads the first `documents` documents, with the texts that `figures` read and the data allow. quick: explanations
        that are text are read as in training, which is nearly as exact."""
        run, key, m = self.run, jax.random.key(self.run.seed), self.run.context_tokens
        wanted = {'sampled', f'quote_{m}'} | {f.text for f in figures}
        names = tuple(k for k in self.texts if k in wanted)
        how = {'length': run.length, 'tags': run.texts.tags, 'error': run.error, 'names': names}
        how['quotes'] = tuple(k for k in metrics.quoted(m) if f'quote_{k}' in wanted)

        def evaluate(batch):
            return texts.evaluate_batch(lens, run.base, read(run.base, batch, **run.reading), key, **how)

        arrays = (*READ, 'previous', 'index', 'explanations')
        c = Collected(
            **self.by_batch('figures', evaluate, documents, {k: self.held[k] for k in arrays if k in self.held}),
            doc_N=np.repeat(self.held['doc_id'][:documents], self.vectors),
            truth_NxF=self.held['facts'][:documents].reshape(-1, len(self.fields)) if self.fields else None,
            fields=self.fields,
            tagged=bool(run.texts.tags),
            error=run.error,
            sources=self._sources and self._sources.first(documents * self.vectors),
            context=m,
        )
        if run.texts.tags.joints and not quick:
            c.pred.update({k: self.reconstruct(lens, f'text_{k}', c.ids[k], c.found[k]) for k in c.ids})
        if m and 'shuffled' in wanted:
            other = metrics.other_document(c.doc_N)  # of whom the words are, with the own context
            c.pred['shuffled'] = self.reconstruct(lens, 'shuffled', *(x['sampled'][other] for x in (c.ids, c.found)))
        return c

    def by_batch(self, stage: str, function: Callable, documents: int, arrays: dict[str, np.ndarray]):
        """Calls function(batch) on rows of `arrays`, of the first `documents` documents, tokens as wide as they must be;
        returns what it gives for each activation in their order. stage: a name for it, of each its own."""
        parts, lengths = [], self.held['lengths']
        order = np.argsort(lengths[:documents], kind='stable')  # texts of about one length together
        for i in range(0, documents, self.rows):
            pick = order[np.minimum(np.arange(i, i + self.rows), documents - 1)]  # the last batch is padded and cut
            batch = {k: x[pick] for k, x in arrays.items()}
            if 'tokens' in batch:
                batch['tokens'] = batch['tokens'][:, : self.run.validation.width_for(lengths[pick])]
            keep = min(self.rows, documents - i) * self.vectors

            def compute(batch=batch):
                return sharding.fetch(function(sharding.put_batch(batch, self.run.mesh)))

            out = self.batch_of(stage, i // self.rows, compute)
            parts.append(jax.tree.map(lambda x, keep=keep: x[:keep], out))
        back = (np.argsort(order)[:, None] * self.vectors + np.arange(self.vectors)).reshape(-1)
        return jax.tree.map(lambda *x: np.concatenate(x)[back], *parts)

    def reconstruct(self, lens: Lens, stage: str, ids_NxT: np.ndarray, found_N: np.ndarray) -> np.ndarray:
        """Reconstructs the first N activations from explanations, -1 outside of them, with their own context, NxD; the zero
        vector where none is found."""
        documents, run = len(ids_NxT) // self.vectors, self.run
        if joints := run.texts.tags.joints:
            ids_NxT = padded([joints.exact(x[x >= 0]) for x in ids_NxT], -1)
        arrays = {k: self.held[k][:documents] for k in ('tokens', 'positions') if k in self.held}
        arrays['ids'] = ids_NxT.reshape(documents, self.vectors, -1)
        arrays['found'] = found_N.reshape(documents, self.vectors)

        def encode(batch):
            where = {k: batch.pop(k) for k in ('tokens', 'positions') if k in batch}
            source = source_of(where, recent=max(1, run.context_tokens))
            return texts.encode_batch(lens, run.base, batch, source, error=run.error)

        return self.by_batch(stage, encode, documents, arrays)

    def quick(self, lens: Lens) -> dict[str, float]:
        """Computes the few figures that a learning curve needs, on the first documents."""
        quick = {k: f for k, f in metrics.figures(self.run.context_tokens).items() if f.quick}
        c = self._collect(lens, self.quick_documents, quick.values(), quick=True)
        return {k: v['value'] for k, v in _figures(c, quick).items()}

    def full(self, lens: Lens, more: Callable[[Collected], dict] = lambda c: {}) -> Evaluation:
        """Computes every figure that the run and its data allow, and sample explanations. more: makes what else
        evaluation.json holds of what was collected."""
        known = metrics.figures(self.run.context_tokens)
        c = self._collect(lens, self.documents, known.values())
        n = self.quick_documents * self.vectors
        return Evaluation(
            error=c.error,
            fve_quick=metrics.fve(c.pred['sampled'][:n], c.a[:n], c.doc_N[:n])['value'],
            documents=self.documents,
            activations=len(c.a),
            figures=_figures(c, known),
            facts=_facts_by_field(c),
            samples=[self._sample(c, d) for d in range(min(self.settings.samples, self.documents))],
            context=c.context,
            more=more(c),
        )

    def reading(self, lens: Lens, config: dict, step: int, name: str) -> Reading | None:
        """Returns what the lens says of the beginning of the first document, token by token; None where none is wanted.
        config, step: of the run. name: of the lens."""
        if not self.settings.reading or 'tokens' not in self.held:
            return None
        first, end = self.run.min_pos, min(self.run.min_pos + self.settings.reading, int(self.held['lengths'][0]))
        opened = Reader(Reopened(config, config['subject']['path'], self.run, step, lens), name)
        return opened.explain(self.held['tokens'][0, :end], range(first, end))

    def _sample(self, c: Collected, d: int) -> dict:
        """The explanations of one activation of document d; positions vary with d."""
        v, held = d % self.vectors, self.held
        i, position = d * self.vectors + v, int(held['positions'][d, v])
        truth = c.truth_NxF[i] if self.fields else []
        alone = {'nmse_without_words': _nmse(c, f'quote_{c.context}', i)} if c.context else {}
        return {
            'doc_id': int(held['doc_id'][d]),
            'position': position,
            'tokens': self._tokens(d) if 'tokens' in held else [NO_TEXT],
            'read': position if 'tokens' in held else 0,
            'facts': {f['field']: f['values'][t] for f, t in zip(self.fields, truth, strict=False) if t >= 0},
            **alone,
        } | {k: self._text(c, k, i, truth) if k in c.pred else None for k in ('greedy', 'sampled', 'given')}

    def _tokens(self, d: int) -> list[str]:
        return [self.run.tokenizer.decode([t]) for t in self.held['tokens'][d][: self.held['lengths'][d]]]

    def _text(self, c: Collected, text: str, i: int, truth) -> dict:
        """Tokens with status right | wrong | plain, and the normalised error of the reconstruction."""
        right = {f['token_ids'][t] for f, t in zip(self.fields, truth, strict=False) if t >= 0}
        values = {t for f in self.fields for t in f['token_ids']}
        words = c.ids[text][i][c.ids[text][i] >= 0].tolist()
        status = ['right' if t in right else 'wrong' if t in values else 'plain' for t in words]
        decode = self.run.tokenizer.decode
        return {
            'tokens': [{'text': decode([t]), 'status': s} for t, s in zip(words, status, strict=True)],
            'nmse': _nmse(c, text, i),
        }


def _nmse(c: Collected, text: str, i: int) -> float:
    """The normalised error of one reconstruction."""
    return float(metrics.nmse_rows(c.pred[text][i : i + 1], c.a[i : i + 1])[0])


def _figures(c: Collected, figures: dict[str, Figure]) -> dict[str, dict]:
    found = {k: f.function(c, f.text) for k, f in figures.items() if f.text in c.pred}
    return {k: v for k, v in found.items() if v is not None}


def _facts_by_field(c: Collected) -> list[dict]:
    """Recall and hallucination of every field alone: rows of the report."""
    rows = []
    for k, field in enumerate(c.fields):
        row = {'field': field['field'], 'values': len(field['values'])}
        for text, suffix in (('greedy', ''), ('sampled', '_sampled')):
            what = c.ids[text], c.truth_NxF[:, k : k + 1], [field], c.doc_N
            row[f'recall{suffix}'] = metrics.facts_recall(*what)['value']
            row[f'hallucinated{suffix}'] = metrics.facts_hallucinated(*what)['value']
        rows.append(row)
    return rows


def figure_after_sft(workdir: pathlib.Path, config: dict) -> dict[str, dict]:
    """Returns {'fve_sft': …} from metrics.jsonl: the evaluation at the end of the last SFT phase, if there is one.

    config: of the run, as stored.
    """
    names = [name for name in config['phases'] if not OBJECTIVES[config[name]['objective']].samples]
    rows = files.read_metrics(workdir / 'metrics.jsonl')
    ends = [r for r in rows if r['kind'] == 'eval' and r.get('full') and 'fve' in r]
    found = [r['fve'] for r in ends if r['phase'] in names[-1:]]
    return {'fve_sft': {'value': found[-1], 'ci95': None}} if found else {}


def write_results(workdir: pathlib.Path, result: Evaluation, step: int, reading: Reading | None) -> None:
    """Writes evaluation.json, samples.jsonl, reading.html where there is a reading, and report.html of a run."""
    files.write_json(workdir / 'evaluation.json', result.to_json(step))
    files.write_jsonl(workdir / 'samples.jsonl', result.samples)
    if reading:
        reading.to_page(workdir / 'reading.html')
    report.write_report(workdir)


def _key(again: Reopened, best_of: tuple[int, ...]) -> dict:
    """What the batches of an evaluation depend on."""
    run = again.run
    weights = [float(jnp.sum(jnp.abs(x.astype(jnp.float32)))) for x in jax.tree.leaves(again.params)]
    return {
        'step': again.step,
        'weights': weights,
        'config': again.config,
        'documents': data.fingerprint(run.validation),
        'evaluation': dataclasses.asdict(run.evaluation),
        'mesh': dict(run.mesh.shape),
        'best_of': best_of,
        'version': __version__,
    }


def _open(workdir: pathlib.Path, step: str, lens: str, **places: str) -> Reopened:
    """The checkpoint of a run, or a lens that was exported, whose figures then get a folder of their own."""
    if not lens:
        return reopen(workdir, step, **places)
    if (workdir / 'checkpoints').exists():
        raise LensError(f'--workdir={workdir} is a run: give another folder for the figures of --lens={lens}.')
    again = open_lens(lens, ('validation',), **places)
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / 'config.json', again.config)
    return again


def main(
    workdir: str, step: str, lens: str, subject: str, data: str, best_of: str, num_vectors: int, studies: bool = True
) -> None:
    ks, workdir = study.numbers_of(best_of) if studies else (), pathlib.Path(workdir)
    print(f'Opening {lens or workdir}', flush=True)
    again = _open(workdir, step, lens, subject_path=subject, data_path=data)
    again, done = again._replace(run=study.sized(again.run, num_vectors)), []
    with jax.set_mesh(again.run.mesh):
        evaluator = Evaluator(again.run)
        documents, each = evaluator.documents, evaluator.vectors
        n, at_a_time = documents * each, evaluator.rows * each
        print(f'{n} activations of {documents} held-out documents, {at_a_time} at a time', flush=True)

        def more(c: Collected) -> dict:
            if not studies:
                return {}
            done.append(study.Measure(evaluator, again.params, c, ks)())
            return {'figures': done[0].figures, 'results_by_k': done[0].by_k, 'plots': plots.names(done[0])}

        again_read = evaluator.texts if again.run.texts.tags.joints else ()
        how = _key(again, ks), study.work(again.run, ks, again_read, studies), -(-documents // evaluator.rows)
        with batches.opened(workdir / 'evaluation.partial', *how) as evaluator.batch_of:
            result = evaluator.full(again.params, more)
            reading = evaluator.reading(again.params, again.config, again.step, workdir.name)
            result.figures.update(figure_after_sft(workdir, again.config))
            figures = result.figures | result.more.get('figures', {})
            for found in done:
                plots.draw(workdir / 'plots', found, figures)
            write_results(workdir, result, again.step, reading)
    for name, figure in figures.items():
        interval = '   [{:.3f}, {:.3f}]'.format(*figure['ci95']) if figure['ci95'] else ''
        print(f'{name:28} {figure["value"]:7.3f}{interval}')
    few = ' (few: intervals are wide)' if result.activations < FEW else ''
    print(
        f'{result.activations} activations{few} of {result.documents} held-out documents, step {again.step}. Figures: '
        f'{workdir}/evaluation.json  {f"Plots: {workdir}/plots  " if done else ""}Report: {workdir}/report.html'
    )
