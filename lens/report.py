"""The report of a run: one self-contained page, workdir/report.html, made from the files beside it.

    python -m lens.report --workdir=runs/tiny

Reads config.json and metrics.jsonl and, as far as the run got, evaluation.json, samples.jsonl and
summary.json. The page holds no script, asks for nothing from outside, and escapes every text from a file. Its
wording and style are in report.html beside this module; charts are inline SVG.
"""

import contextlib
import functools
import importlib.resources
import json
import math
import os
import pathlib
import re
import string
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from lens import charts, cli
from lens.errors import LensError

SAMPLES = 10
BEFORE, AFTER = 60, 40  # tokens shown around the read position
PHASES = {'sft': 'SFT', 'grpo': 'GRPO', 'gumbel': 'Gumbel'}
GROUPS = {'lens': 'The lens', 'controls': 'Controls', 'facts': 'Facts'}


class ReportError(LensError):
    """A file of the run is missing or damaged; the message is one sentence that names it."""


class Run(NamedTuple):
    """What the files of a run hold; evaluation, samples and summary are empty where it did not get so far."""

    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    figures: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]


@contextlib.contextmanager
def _blame(path: pathlib.Path):
    """Turns what a missing file or a wrong content raises into a ReportError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ReportError(f'{path} is missing: --workdir must be the folder of a run') from None
    except OSError as e:
        raise ReportError(f'{path}: {e.strerror}') from None
    except KeyError as e:
        raise ReportError(f'{path} is damaged: it has no key {e}') from None
    except (ValueError, TypeError, AttributeError) as e:
        raise ReportError(f'{path} is damaged: {e}') from None


def _read(path: pathlib.Path, required: bool = False) -> Any:
    """The object of a .json file, the list of objects of a .jsonl file; empty where there is no such file.

    A torn last line of a .jsonl file (the writer was killed) is left out.
    """
    many = path.suffix == '.jsonl'
    if not required and not path.exists():
        return [] if many else {}
    with _blame(path):
        texts = path.read_bytes().split(b'\n') if many else [path.read_bytes()]
        found = []
        for number, text in enumerate(texts, 1):
            try:
                found += [json.loads(text)] if text.strip() or not many else []
            except ValueError:
                if not many or number < len(texts):
                    raise ValueError(f'line {number} is not JSON' if many else 'it is not JSON') from None
        if not all(isinstance(record, dict) for record in found):
            raise ValueError('it must hold JSON objects')
    return found if many else found[0]


def _number(x: Any) -> float | None:
    """x as a finite float, else None."""
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) else None


def _checked_figure(figure: dict[str, Any]) -> dict[str, Any]:
    """The figure with all keys, numbers finite or None; raises on what is no figure."""
    lo, hi = map(_number, figure.get('ci95') or (None, None))
    return {
        'value': _number(figure['value']),
        'ci95': None if lo is None or hi is None else (lo, hi),
        'group': str(figure.get('group', 'lens')),
        'meaning': str(figure.get('meaning', '')),
    }


def _checked_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with all that the page uses; raises on what cannot be drawn."""
    tokens, read = [str(t) for t in sample['tokens']], int(sample['read'])
    if not 0 <= read < len(tokens):
        raise ValueError(f'read position {read} lies outside of {len(tokens)} tokens')
    given = {kind: sample[kind] for kind in ('greedy', 'sampled', 'given') if sample.get(kind)}
    return {
        'doc_id': sample.get('doc_id', charts.NONE),
        'position': sample.get('position', read),
        'tokens': tokens,
        'read': read,
        'facts': {str(k): str(v) for k, v in (sample.get('facts') or {}).items()},
        'texts': {
            kind: ([(str(w['text']), str(w.get('status'))) for w in text['tokens']], _number(text.get('nmse')))
            for kind, text in given.items()
        },
    }


def load(workdir: pathlib.Path) -> Run:
    """Reads and checks the files of a run; ReportError where one is missing or damaged."""
    config = _read(workdir / 'config.json', required=True)
    metrics = _read(metrics_path := workdir / 'metrics.jsonl', required=True)
    evaluation = _read(evaluation_path := workdir / 'evaluation.json')
    samples = _read(samples_path := workdir / 'samples.jsonl')
    with _blame(metrics_path):
        if any(_number(record['step']) is None for record in metrics):
            raise ValueError('a step is not a number')
    with _blame(evaluation_path):
        figures = evaluation['figures'].items() if evaluation else ()
        figures = {name: _checked_figure(figure) for name, figure in figures}
        evaluation['facts'] = [dict(row, field=row['field']) for row in evaluation.get('facts') or []]
    with _blame(samples_path):
        samples = [_checked_sample(sample) for sample in samples]
    return Run(config, metrics, evaluation, figures, samples, _read(workdir / 'summary.json'))


def _interval(run: Run, name: str) -> str:
    return ' to '.join(charts.text(name, x) for x in run.figures.get(name, {}).get('ci95') or ())


def _duration(seconds: float) -> str:
    hours, minutes, rest = int(seconds // 3600), int(seconds // 60 % 60), int(seconds % 60)
    return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s'


def phases_of(metrics: list[dict[str, Any]], total: float | None = None) -> list[charts.Phase]:
    """The phases in order of their steps; total: all steps, where known."""
    train = [m for m in metrics if m.get('kind') == 'train'] or metrics
    first = {}
    for m in sorted(train, key=lambda m: m['step']):
        first.setdefault(str(m.get('phase', '')), m['step'])
    begin = list(first.values())
    end = [*begin[1:], begin[0] + max(total or 0, *(m['step'] for m in train))] if begin else []
    return [charts.Phase(PHASES.get(name, name), a, b - a) for name, a, b in zip(first, begin, end, strict=True)]


@functools.cache
def _fragments() -> dict[str, str]:
    """The parts of report.html by name."""
    page = importlib.resources.files('lens').joinpath('report.html').read_text('utf-8')
    parts = re.split(r'^@@ (\w+)\n', page, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _part(name: str, **values: str) -> str:
    return string.Template(_fragments()[name]).substitute(values)


def _wording(name: str) -> dict[str, str]:
    return dict(line.split(' = ') for line in _fragments()[name].splitlines())


def _charts(run: Run) -> list[str]:
    def of(kind, key, label, color):  # [curve], or []; of a step logged twice (resume) the last counts
        found = {m['step']: _number(m.get(key)) for m in run.metrics if m.get('kind') == kind}
        points = sorted((step, y) for step, y in found.items() if y is not None)
        return [charts.Series(label, *np.array(points, float).T, color, kind == 'train')] if points else []

    def batches(key):
        return of('train', key, 'training batches', 0)

    phases = phases_of(run.metrics, _number(run.summary.get('steps')))
    mixed = {'SFT', 'GRPO'} <= {p.name for p in phases}
    panels = [
        (
            'Variance explained',
            'FVE',
            of('train', 'fve', 'training batches', 2)
            + of('eval', 'fve', 'sampled', 0)
            + of('eval', 'fve_greedy', 'greedy', 1),
            0.0,
        ),
        (
            'Facts in greedy explanations',
            'share',
            of('eval', 'facts_recall', 'recall', 4) + of('eval', 'facts_hallucinated', 'hallucinated', 3),
            0.0,
            1.0,
        ),
        (
            'Decoder loss',
            'nats',
            batches('loss_decoder'),
            None,
            None,
            'Cross-entropy in SFT, policy gradient in GRPO: not comparable.' * mixed,
        ),
        ('Encoder loss', 'normalised squared error', batches('loss_encoder')),
        ('Reward', 'batch mean', batches('reward')),
        ('Entropy of the decoder', 'nats', batches('entropy_nats')),
    ]
    return [charts.chart(title, unit, series, phases, *more) for title, unit, series, *more in panels if series]


def _lookup(run: Run, name: str) -> float | None:
    """A final figure: from evaluation.json, else summary.json, else the last held-out check."""
    if name in run.figures:
        return run.figures[name]['value']
    held_out = [m[name] for m in run.metrics if m.get('kind') == 'eval' and name in m]
    return _number(run.summary.get(name, held_out[-1] if held_out else None))


def _tile(run: Run, name: str) -> str:
    interval = f'<p class="note num">95%: {_interval(run, name)}</p>' if _interval(run, name) else ''
    return (
        f'<div class="tile"><h3>{_wording("labels")[name]}</h3>'
        f'<p class="big">{charts.text(name, _lookup(run, name))}</p>{interval}'
        f'<p class="note">{_wording("tiles")[name]}</p></div>'
    )


def _facts_line(run: Run) -> str:
    """What was run, in a few words."""
    total, wall = _number(run.summary.get('steps')), _number(run.summary.get('wall_s'))
    words = [f'{p.steps:,.10g} steps' + f' of {p.name}' * bool(p.name) for p in phases_of(run.metrics, total)]
    words += [_duration(wall)] if wall else []
    counts = {k: run.evaluation.get(k) for k in ('documents', 'activations')}
    words += [f'{count} held-out {k}' for k, count in counts.items() if count]
    return charts.esc(' · '.join(words))


def _word(text: str, css: str | None) -> str:
    """A token with its class; the space before it stays outside, a line break becomes a sign."""
    text = text.replace('\n', '↵')
    word = text.lstrip(' ')
    css = css or ('pale' if re.fullmatch(r'<\S+>|[|]', word) else None)  # special tokens and filler step back
    space = ' ' * (len(text) - len(word))
    return f'{space}<span class="{css}">{charts.esc(word)}</span>' if css and word else charts.esc(text)


def _story(tokens: list[str], read: int) -> str:
    first, end = max(0, read - BEFORE), read + 1 + AFTER
    before, after = (''.join(_word(t, None) for t in part) for part in (tokens[first:read], tokens[read + 1 : end]))
    return (
        '<p class="story">'
        + '… ' * (first > 0)
        + before
        + _word(tokens[read], 'read')
        + f'<span class="after">{after}{" …" * (end < len(tokens))}</span></p>'
    )


def _card(sample: dict[str, Any]) -> str:
    """One sample: its text, its explanations with their errors, and the facts that hold."""
    rows = []
    for kind, (words, nmse) in sample['texts'].items():
        said = ''.join(_word(text, status if status in ('right', 'wrong') else None) for text, status in words)
        error = '' if nmse is None else f'error {charts.text("nmse", nmse)}'
        rows.append(
            f'<div class="row"><dt>{kind.capitalize()}</dt><dd class="words">{said.strip()}</dd>'
            f'<dd class="error">{error}</dd></div>'
        )
    greedy, facts = ''.join(text for text, _ in sample['texts'].get('greedy', ((), None))[0]), ''
    for field, value in sample['facts'].items():
        named = re.search(rf'(?<!\w){re.escape(value)}(?!\w)', greedy, re.IGNORECASE)
        word = charts.esc(value) if named else f'<s class="missed">{charts.esc(value)}</s>'
        facts += f'<span><small>{charts.esc(field)}</small>{word}</span>'
    rows += [f'<div class="row"><dt>True so far</dt><dd class="facts">{facts}</dd></div>'] if facts else []
    return (
        f'<article class="card"><p class="note">Document {charts.esc(sample["doc_id"])}, position '
        f'{charts.esc(sample["position"])}</p>{_story(sample["tokens"], sample["read"])}'
        f'<dl class="rows">{"".join(rows)}</dl></article>'
    )


def _figure_row(run: Run, name: str) -> str:
    figure, label = run.figures[name], _wording('labels').get(name, name.replace('_', ' '))
    return (
        f'<tr><th scope="row">{charts.esc(label)}<code>{charts.esc(name)}</code></th>'
        f'<td class="num value">{charts.text(name, figure["value"])}</td>'
        f'<td class="num interval">{_interval(run, name)}</td>'
        f'<td class="meaning">{charts.esc(figure["meaning"])}</td></tr>'
    )


def _figure_rows(run: Run) -> str:
    found, out = dict.fromkeys(figure['group'] for figure in run.figures.values()), ''
    for group in sorted(found, key=[*GROUPS, *found].index):
        out += f'<tr class="group"><th colspan="4">{charts.esc(GROUPS.get(group, group))}</th></tr>'
        out += ''.join(_figure_row(run, name) for name, f in run.figures.items() if f['group'] == group)
    return out


def _field_row(row: dict[str, Any]) -> str:
    out = f'<tr><th scope="row">{charts.esc(row["field"])}<code>{charts.esc(row.get("values", charts.NONE))} values</code></th>'
    for key in ('recall', 'hallucinated', 'recall_sampled', 'hallucinated_sampled'):
        value, color = _number(row.get(key)), 'c4' if 'recall' in key else 'c3'
        out += (
            f'<td class="num">{charts.text(key, value)}<span class="bar {color}">'
            f'<span style="width:{100 * min(max(value or 0, 0), 1):.1f}%"></span></span></td>'
        )
    return out + '</tr>'


def _reproduce(run: Run) -> dict[str, str]:
    versions = run.summary.get('versions')
    if isinstance(versions, dict):
        versions = ', '.join(f'{name} {version}' for name, version in versions.items())
    facts = {
        'Seed': run.summary.get('seed', run.config.get('seed')),
        'Device': run.summary.get('device'),
        'Versions': versions,
        'Commit': run.summary.get('commit'),
        'Evaluated at step': run.evaluation.get('step'),
    }
    command = run.summary.get('command')
    return {
        'command': f'<pre>{charts.esc(command)}</pre>' if command else '',
        'facts': ''.join(f'<dt>{k}</dt><dd>{charts.esc(v)}</dd>' for k, v in facts.items() if v is not None),
        'config': charts.esc(json.dumps(run.config, indent=2, ensure_ascii=False)),
    }


def _page(run: Run) -> str:
    title = 'A consistency lens' + (f' on {run.summary["subject"]}' if 'subject' in run.summary else '')
    title += f', layer {run.summary["layer"]}' if 'layer' in run.summary else ''
    tiles = ['facts_recall', 'facts_hallucinated', 'fve', 'fve_shuffled']
    if _lookup(run, 'facts_recall') is None:
        tiles = ['fve', 'fve_greedy', 'fve_shuffled', 'fve_no_activation']
    panels, fields, n = _charts(run), run.evaluation['facts'], len(run.samples)
    shown = [run.samples[i] for i in np.unique(np.linspace(0, n - 1, min(n, SAMPLES)).round().astype(int))]
    chosen = f'{len(shown)} of {n} samples, evenly spaced, not picked by hand.' if n > len(shown) else ''
    legend = _part('fact_legend') if any(sample['facts'] for sample in shown) else ''
    cards = ''.join(map(_card, shown))
    fields = _part('fields', rows=''.join(map(_field_row, fields))) if fields else ''
    return _part(
        'page',
        title=charts.esc(title),
        css=_part('css'),
        facts=_facts_line(run),
        alert='' if run.figures else _part('alert'),
        tiles=''.join(_tile(run, name) for name in tiles),
        samples=_part('samples', chosen=chosen, fact_legend=legend, cards=cards) if shown else '',
        curves=_part('curves', charts=''.join(panels)) if panels else _part('no_curves'),
        figures=_part('figures', rows=_figure_rows(run), fields=fields) if run.figures else '',
        reproduce=_part('reproduce', **_reproduce(run)),
    )


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes workdir/report.html by atomic rename and returns its path; raises ReportError."""
    workdir = pathlib.Path(workdir)
    page, out = _page(load(workdir)), workdir / 'report.html'
    temporary = workdir / f'.report-{os.getpid()}.html'
    with _blame(out):
        try:
            temporary.write_text(page, encoding='utf-8', errors='replace')  # a token may be half a character
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    return out


def main(_):
    print(f'Report: {write_report(pathlib.Path(WORKDIR.value))}')


if __name__ == '__main__':
    WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
    cli.run(main)
