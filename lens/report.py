"""The report of a run: one self-contained page, workdir/report.html, made from the files beside it.

    python -m lens.report --workdir=runs/tiny

Reads config.json and metrics.jsonl and, as far as the run got, evaluation.json, samples.jsonl and summary.json. The
page holds no script, asks for nothing from outside, escapes every text from a file, and isolates its direction. Its wording and style are in
report.html beside this module; charts are inline SVG.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from lens import commands

    commands.report()

import contextlib
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import jinja2
import numpy as np

from lens import charts, files
from lens.charts import Series, Stretch
from lens.errors import PROSE, LensError, harmless
from lens.metrics import headline

SAMPLES = 10
BEFORE, AFTER = 60, 40  # tokens shown around the read position
PHASES = {'sft': 'SFT', 'grpo': 'GRPO', 'gumbel': 'Gumbel'}
GROUPS = ('lens', 'controls', 'facts', 'truth')  # of figures, in the order of the page; then those of lens/study.py
PLOT = re.compile(r'\w{1,40}')  # name of a file in plots/
REMEDY = '--workdir must be the folder of a run'


class RunFiles(NamedTuple):
    """What the files of a run hold; evaluation, samples and summary are empty where it did not get so far."""

    config: dict
    metrics: list[dict]
    evaluation: dict
    figures: dict[str, dict]
    samples: list[dict]
    summary: dict


@contextlib.contextmanager
def _blame(path: pathlib.Path):
    """Turns what a wrong content raises into a LensError that names the file."""
    try:
        yield
    except KeyError as e:
        raise LensError(f'{path} is damaged: it has no key {e}.') from None
    except (ValueError, TypeError, AttributeError) as e:
        raise LensError(f'{path} is damaged: {e}.') from None


def _clean(x: Any) -> Any:
    """Returns what a file holds with harmless texts, in which lines may break and letters join."""
    if isinstance(x, dict):
        return {_clean(k): _clean(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_clean(v) for v in x]
    return harmless(x, PROSE) if isinstance(x, str) else x


def _number(x: Any) -> float | None:
    """Returns x as a finite float, else None."""
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) else None


def _checked_figure(figure: dict) -> dict:
    """Returns the figure with all keys, numbers finite or None; raises on what is no figure."""
    lo, hi = map(_number, figure.get('ci95') or (None, None))
    return {
        'value': _number(figure['value']),
        'ci95': () if lo is None or hi is None else (lo, hi),
        'group': str(figure.get('group', 'lens')),
        'meaning': str(figure.get('meaning', '')),
    }


def _words(tokens: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Returns (space before, word, CSS class) of tokens with their status; a line break becomes a sign."""
    out = []
    for text, status in tokens:
        word = text.replace('\n', '↵').lstrip(' ')
        pale = 'pale' if re.fullmatch(r'<\S+>|[|]', word) else ''  # special tokens and filler step back
        css = status if status in ('right', 'wrong', 'read') else pale
        out.append((' ' * (len(text) - len(word)), word, css if word else ''))
    return out


def _checked_sample(sample: dict) -> dict:
    """Returns a sample as the page shows it: its text, explanations with their errors, and the facts that hold."""
    tokens, read = [(str(t), '') for t in sample['tokens']], int(sample['read'])
    if not 0 <= read < len(tokens):
        raise ValueError(f'read position {read} lies outside of {len(tokens)} tokens')
    first, end = max(0, read - BEFORE), read + 1 + AFTER
    given = {kind: sample[kind] for kind in ('greedy', 'sampled', 'given') if sample.get(kind)}
    said = {kind: [(str(w['text']), str(w.get('status'))) for w in x['tokens']] for kind, x in given.items()}
    greedy = ''.join(text for text, _ in said.get('greedy', ()))
    facts = {str(k): str(v) for k, v in (sample.get('facts') or {}).items()}
    return {
        'doc_id': sample.get('doc_id', charts.NONE),
        'position': sample.get('position', read),
        'cut': (first > 0, end < len(tokens)),
        'before': _words([*tokens[first:read], (tokens[read][0], 'read')]),
        'after': _words(tokens[read + 1 : end]),
        'without_words': _number(sample.get('nmse_without_words')),
        'said': [(kind, _words(words), _number(given[kind].get('nmse'))) for kind, words in said.items()],
        'facts': [
            (field, value, re.search(rf'(?<!\w){re.escape(value)}(?!\w)', greedy, re.IGNORECASE))
            for field, value in facts.items()
        ],
    }


def load(workdir: pathlib.Path) -> RunFiles:
    """Reads and checks the files of a run. Raises LensError where one is missing or damaged."""
    config = _clean(files.read_json(workdir / 'config.json', REMEDY))
    metrics = _clean(files.read_metrics(workdir / 'metrics.jsonl'))
    paths = workdir / 'evaluation.json', workdir / 'summary.json'
    evaluation, summary = (_clean(files.read_json(p, 'evaluate the run again')) if p.exists() else {} for p in paths)
    with _blame(workdir / 'evaluation.json'):
        figures = {name: _checked_figure(f) for name, f in (evaluation['figures'] if evaluation else {}).items()}
        evaluation['facts'] = [{'field': row['field'], **row} for row in evaluation.get('facts') or []]
        evaluation['plots'] = [p for p in evaluation.get('plots') or [] if PLOT.fullmatch(p)]
    with _blame(workdir / 'samples.jsonl'):
        samples = [_checked_sample(sample) for sample in _clean(files.read_jsonl(workdir / 'samples.jsonl'))]
    return RunFiles(config, metrics, evaluation, figures, samples, summary)


def stretches(metrics: list[dict], total: float | None = None) -> list[Stretch]:
    """Returns the phases in order of their steps; total: all steps, where known."""
    train = [m for m in metrics if m.get('kind') == 'train'] or metrics
    first = {}
    for m in sorted(train, key=lambda m: m['step']):
        first.setdefault(str(m.get('phase', '')), m['step'])
    begin = list(first.values())
    end = [*begin[1:], begin[0] + max(total or 0, *(m['step'] for m in train))] if begin else []
    return [Stretch(PHASES.get(name, name), a, b - a) for name, a, b in zip(first, begin, end, strict=True)]


def _charts(run: RunFiles, phases: list[Stretch], beyond: str) -> list[str]:
    def of(kind, key, label, color):  # [curve], or []; of a step logged twice (resume) the last counts
        found = {m['step']: _number(m.get(key)) for m in run.metrics if m.get('kind') == kind}
        points = sorted((step, y) for step, y in found.items() if y is not None)
        return [Series(label, *np.array(points, float).T, color, kind == 'train')] if points else []

    fve = of('train', 'fve', 'training batches', 2) + of('eval', 'fve', 'sampled', 0)
    facts = of('eval', 'facts_recall', 'recall', 4) + of('eval', 'facts_hallucinated', 'hallucinated', 3)
    more = of('train', 'fve_beyond', 'training batches', 2) + of('eval', beyond, 'sampled', 0)
    loss = 'Cross-entropy in SFT, policy gradient in GRPO: not comparable.'
    panels = [
        ('Share beyond the context', 'share', more, 0.0),
        ('Variance explained', 'FVE', fve + of('eval', 'fve_greedy', 'greedy', 1), 0.0),
        ('Facts in greedy explanations', 'share', facts, 0.0, 1.0),
        ('Decoder loss', 'nats', 'loss_decoder', None, None, loss * ({'SFT', 'GRPO'} <= {p.name for p in phases})),
        ('Encoder loss', 'normalised squared error', 'loss_encoder'),
        ('Reward', 'batch mean', 'reward'),
        ('Entropy of the decoder', 'nats', 'entropy_nats'),
    ]
    out = []
    for title, unit, series, *more in panels:
        series = of('train', series, 'training batches', 0) if isinstance(series, str) else series
        out += [charts.chart(title, unit, series, phases, *more)] if series else []
    return out


def _line(run: RunFiles, phases: list[Stretch]) -> list[str]:
    """Says what was run, in a few words."""
    out = [f'{p.steps:,.10g} steps' + f' of {p.name}' * bool(p.name) for p in phases]
    if wall := int(_number(run.summary.get('wall_s')) or 0):
        hours, minutes, seconds = wall // 3600, wall // 60 % 60, wall % 60
        out.append(f'{hours} h {minutes} min' if hours else f'{minutes} min {seconds} s')
    counts = {k: run.evaluation.get(k) for k in ('documents', 'activations')}
    return out + [f'{count} held-out {k}' for k, count in counts.items() if count]


PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader('lens', ''), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
)
PAGES.filters |= {'number': _number, 'figure': lambda x, name: charts.text(_number(x), name)}


def _page(run: RunFiles, reading: bool) -> str:
    summary = run.summary
    phases = stretches(run.metrics, _number(summary.get('steps')))
    checks = {k: x for m in run.metrics if m.get('kind') == 'eval' for k, x in m.items()}  # the last value of each
    versions, n = summary.get('versions'), len(run.samples)
    values = checks | summary | {k: f['value'] for k, f in run.figures.items()}
    beyond, quote = headline(values) or ('', '')
    return PAGES.get_template('report.html').render(
        run=run,
        reading=reading,
        line=_line(run, phases),
        values=values,
        beyond=beyond,
        quote=quote,
        context=beyond.rpartition('_')[2],
        samples=[run.samples[i] for i in np.unique(np.linspace(0, n - 1, min(n, SAMPLES)).round().astype(int))],
        charts=_charts(run, phases, beyond),
        groups=sorted(dict.fromkeys(f['group'] for f in run.figures.values()), key=lambda g: [*GROUPS, g].index(g)),
        facts={
            'Seed': summary.get('seed', run.config.get('seed')),
            'Device': summary.get('device'),
            'Versions': ', '.join(f'{k} {x}' for k, x in versions.items()) if isinstance(versions, dict) else versions,
            'Commit': summary.get('commit'),
            'Evaluated at step': run.evaluation.get('step'),
        },
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes workdir/report.html at once and returns its path. Raises LensError."""
    page, out = _page(load(workdir), (workdir / 'reading.html').exists()), workdir / 'report.html'
    files.write_text(out, page)
    return out


def main(workdir: str) -> None:
    print(f'Report: {write_report(pathlib.Path(workdir))}')
