"""The report of a run: one self-contained page, workdir/report.html, made from the files beside it.

    python -m lens.report --workdir=runs/tiny

Reads config.json and metrics.jsonl and, as far as the run got, evaluation.json, samples.jsonl and
summary.json. The page holds no script, asks for nothing from outside, and escapes every text from a file. Its
wording and style are in report.html beside this module; charts are inline SVG.
"""

import contextlib
import functools
import html
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

from lens import cli
from lens.errors import LensError

SAMPLES = 10
BEFORE, AFTER = 60, 40  # tokens shown around the read position
WINDOW = 1 / 25  # of a phase: the running mean of a training curve
MAX_POINTS = 500  # per curve
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 540, 270, 50, 14, 24, 42  # of a chart, and its margins
PHASES = {'sft': 'SFT', 'grpo': 'GRPO', 'gumbel': 'Gumbel'}
GROUPS = {'lens': 'The lens', 'controls': 'Controls', 'facts': 'Facts'}
NONE, MINUS = '\N{EN DASH}', '\N{MINUS SIGN}'


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


class Phase(NamedTuple):
    name: str
    first: float  # its first step
    steps: float


class Series(NamedTuple):
    """A curve. noisy: one value per batch, drawn thin below its running mean and broken between phases."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int
    noisy: bool


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
        'doc_id': sample.get('doc_id', NONE),
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


def esc(x: Any) -> str:
    return html.escape(str(x))


def _text(name: str, value: float | None) -> str:
    """A figure as people write it: shares of facts in per cent, the rest with three decimals."""
    if value is None:
        return NONE
    percent = 'recall' in name or 'hallucinated' in name
    text = f'{100 * value:.1f}%' if percent else f'{value:.3f}' if abs(value) < 1000 else f'{value:.0f}'
    return text.replace('-', MINUS)


def _interval(run: Run, name: str) -> str:
    return ' to '.join(_text(name, x) for x in run.figures.get(name, {}).get('ci95') or ())


def _duration(seconds: float) -> str:
    hours, minutes, rest = int(seconds // 3600), int(seconds // 60 % 60), int(seconds % 60)
    return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s'


def phases_of(metrics: list[dict[str, Any]], total: float | None = None) -> list[Phase]:
    """The phases in order of their steps; total: all steps, where known."""
    train = [m for m in metrics if m.get('kind') == 'train'] or metrics
    first = {}
    for m in sorted(train, key=lambda m: m['step']):
        first.setdefault(str(m.get('phase', '')), m['step'])
    begin = list(first.values())
    end = [*begin[1:], begin[0] + max(total or 0, *(m['step'] for m in train))] if begin else []
    return [Phase(PHASES.get(name, name), a, b - a) for name, a, b in zip(first, begin, end, strict=True)]


def _ticks(lo: float, hi: float, count: int) -> np.ndarray:
    """Round numbers (1, 2 or 5 times a power of ten) inside lo..hi, about `count` of them."""
    raw = (hi - lo) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / raw)))
    return np.arange(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1) * step


def _running_mean(y: np.ndarray) -> np.ndarray:
    """Centred mean over WINDOW of the curve; at its ends over what is there."""
    half, i = int(len(y) * WINDOW / 2), np.arange(len(y))
    total, lo, hi = np.cumsum([0, *y]), np.maximum(i - half, 0), np.minimum(i + half + 1, len(y))
    return (total[hi] - total[lo]) / (hi - lo)


def _range(series: list[Series], floor: float | None, top: float | None) -> tuple[float, float]:
    """The y range of a chart: all of the curves, but the inner 98% of noisy ones, and nothing below floor."""
    ends = [np.percentile(s.y, (1, 99) if s.noisy else (0, 100)) for s in series]
    lo, hi = min(a for a, _ in ends), max(b for _, b in ends)
    lo = lo if floor is None else min(floor, hi - 0.1)
    hi = hi if top is None else max(top, hi)
    pad = 0.04 * (hi - lo) or 0.05 * abs(hi) or 0.5
    return lo - pad, hi + pad


def _line(x: np.ndarray, y: np.ndarray, css: str = 'line') -> str:
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).astype(int))
    points = ' '.join(f'{a:.1f},{b:.1f}' for a, b in zip(x[keep], y[keep], strict=True))
    return f'<polyline class="{css}" points="{points}"/>'


def _curve(s: Series, phases: list[Phase], to_x, to_y) -> str:
    """One series as SVG; to_x and to_y turn values into pixels."""
    if s.noisy:
        part, lines = np.searchsorted([p.first for p in phases[1:]], s.x, side='right'), []
        for i in np.unique(part):
            x, y = to_x(s.x[part == i]), s.y[part == i]
            lines += [_line(x, to_y(y), 'raw'), _line(x, to_y(_running_mean(y)))]
    else:
        lines = [_line(to_x(s.x), to_y(s.y))]
        for x, y in zip(s.x, s.y, strict=True) if len(s.x) <= 60 else ():
            hint = f'<title>{esc(s.label)}, step {x:,.10g}: {y:.3f}</title>'
            lines.append(f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3.5">{hint}</circle>')
    return f'<g class="c{s.color}">{"".join(lines)}</g>'


def _axes(lo: float, hi: float, end: float, phases: list[Phase], percent: bool, to_x, to_y) -> str:
    """Grid, ticks, the name of the x axis, and where each phase begins."""
    bottom, right, out = HEIGHT - BOTTOM, WIDTH - RIGHT, []
    for t in _ticks(lo, hi, 5):
        label = (f'{100 * t:.0f}%' if percent else f'{t:.6g}').replace('-', MINUS)
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{to_y(t):.1f}" y2="{to_y(t):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{to_y(t) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    out += [
        f'<text x="{to_x(t):.1f}" y="{bottom + 18}" text-anchor="middle">{t:,.10g}</text>' for t in _ticks(0, end, 6)
    ]
    for i, p in enumerate(phases if len(phases) > 1 else ()):
        x = to_x(p.first if i else 0)
        out.append(f'<text x="{x + 6:.1f}" y="{TOP - 9}">{esc(p.name)}</text>')
        out += [f'<line class="phase" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 20}" y2="{bottom}"/>'] if i else []
    return ''.join(out) + (
        f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        f'<text x="{right}" y="{HEIGHT - 6}" text-anchor="end">training step</text>'
    )


def chart(
    title: str,
    unit: str,
    series: list[Series],
    phases: list[Phase],
    floor: float | None = None,
    top: float | None = None,
    note: str = '',
) -> str:
    """A line chart over training steps as an HTML figure with legend; unit 'share' is written in per cent."""
    (lo, hi), percent = _range(series, floor, top), unit == 'share'
    end = 1.01 * max(1, *(s.x[-1] for s in series), *(p.first + p.steps - phases[0].first for p in phases))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def to_x(x):
        return LEFT + width * x / end

    def to_y(y):
        return TOP + height * (hi - y) / (hi - lo)

    legend = ''
    for s in series:
        last = _text('recall' * percent, float(_running_mean(s.y)[-1] if s.noisy else s.y[-1]))
        legend += f'<li><span class="swatch c{s.color}"></span>{esc(s.label)} <b>{last}</b></li>'
    if any(s.y.min() < lo for s in series if not s.noisy):
        note += ' Lower values lie below the chart.'
    # The nested svg clips what lies outside the plot.
    return (
        f'<figure><h3>{title} <span class="soft">({unit})</span></h3><ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} over training steps">'
        f'{_axes(lo, hi, end, phases, percent, to_x, to_y)}<svg class="plot" x="{LEFT}" y="{TOP}" '
        f'width="{width}" height="{height}" viewBox="{LEFT} {TOP} {width} {height}">'
        f'{"".join(_curve(s, phases, to_x, to_y) for s in series)}</svg></svg>'
        f'<figcaption class="note">{note}</figcaption></figure>'
    )


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
        return [Series(label, *np.array(points, float).T, color, kind == 'train')] if points else []

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
    return [chart(title, unit, series, phases, *more) for title, unit, series, *more in panels if series]


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
        f'<p class="big">{_text(name, _lookup(run, name))}</p>{interval}'
        f'<p class="note">{_wording("tiles")[name]}</p></div>'
    )


def _facts_line(run: Run) -> str:
    """What was run, in a few words."""
    total, wall = _number(run.summary.get('steps')), _number(run.summary.get('wall_s'))
    words = [f'{p.steps:,.10g} steps' + f' of {p.name}' * bool(p.name) for p in phases_of(run.metrics, total)]
    words += [_duration(wall)] if wall else []
    counts = {k: run.evaluation.get(k) for k in ('documents', 'activations')}
    words += [f'{count} held-out {k}' for k, count in counts.items() if count]
    return esc(' · '.join(words))


def _word(text: str, css: str | None) -> str:
    """A token with its class; the space before it stays outside, a line break becomes a sign."""
    text = text.replace('\n', '↵')
    word = text.lstrip(' ')
    css = css or ('pale' if re.fullmatch(r'<\S+>|[|]', word) else None)  # special tokens and filler step back
    space = ' ' * (len(text) - len(word))
    return f'{space}<span class="{css}">{esc(word)}</span>' if css and word else esc(text)


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
        error = '' if nmse is None else f'error {_text("nmse", nmse)}'
        rows.append(
            f'<div class="row"><dt>{kind.capitalize()}</dt><dd class="words">{said.strip()}</dd>'
            f'<dd class="error">{error}</dd></div>'
        )
    greedy, facts = ''.join(text for text, _ in sample['texts'].get('greedy', ((), None))[0]), ''
    for field, value in sample['facts'].items():
        named = re.search(rf'(?<!\w){re.escape(value)}(?!\w)', greedy, re.IGNORECASE)
        word = esc(value) if named else f'<s class="missed">{esc(value)}</s>'
        facts += f'<span><small>{esc(field)}</small>{word}</span>'
    rows += [f'<div class="row"><dt>True so far</dt><dd class="facts">{facts}</dd></div>'] if facts else []
    return (
        f'<article class="card"><p class="note">Document {esc(sample["doc_id"])}, position '
        f'{esc(sample["position"])}</p>{_story(sample["tokens"], sample["read"])}'
        f'<dl class="rows">{"".join(rows)}</dl></article>'
    )


def _figure_row(run: Run, name: str) -> str:
    figure, label = run.figures[name], _wording('labels').get(name, name.replace('_', ' '))
    return (
        f'<tr><th scope="row">{esc(label)}<code>{esc(name)}</code></th>'
        f'<td class="num value">{_text(name, figure["value"])}</td>'
        f'<td class="num interval">{_interval(run, name)}</td>'
        f'<td class="meaning">{esc(figure["meaning"])}</td></tr>'
    )


def _figure_rows(run: Run) -> str:
    found, out = dict.fromkeys(figure['group'] for figure in run.figures.values()), ''
    for group in sorted(found, key=[*GROUPS, *found].index):
        out += f'<tr class="group"><th colspan="4">{esc(GROUPS.get(group, group))}</th></tr>'
        out += ''.join(_figure_row(run, name) for name, f in run.figures.items() if f['group'] == group)
    return out


def _field_row(row: dict[str, Any]) -> str:
    out = f'<tr><th scope="row">{esc(row["field"])}<code>{esc(row.get("values", NONE))} values</code></th>'
    for key in ('recall', 'hallucinated', 'recall_sampled', 'hallucinated_sampled'):
        value, color = _number(row.get(key)), 'c4' if 'recall' in key else 'c3'
        out += (
            f'<td class="num">{_text(key, value)}<span class="bar {color}">'
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
        'command': f'<pre>{esc(command)}</pre>' if command else '',
        'facts': ''.join(f'<dt>{k}</dt><dd>{esc(v)}</dd>' for k, v in facts.items() if v is not None),
        'config': esc(json.dumps(run.config, indent=2, ensure_ascii=False)),
    }


def _page(run: Run) -> str:
    title = 'A consistency lens' + (f' on {run.summary["subject"]}' if 'subject' in run.summary else '')
    title += f', layer {run.summary["layer"]}' if 'layer' in run.summary else ''
    tiles = ['facts_recall', 'facts_hallucinated', 'fve', 'fve_shuffled']
    if _lookup(run, 'facts_recall') is None:
        tiles = ['fve', 'fve_greedy', 'fve_shuffled', 'fve_no_activation']
    charts, fields, n = _charts(run), run.evaluation['facts'], len(run.samples)
    shown = [run.samples[i] for i in np.unique(np.linspace(0, n - 1, min(n, SAMPLES)).round().astype(int))]
    chosen = f'{len(shown)} of {n} samples, evenly spaced, not picked by hand.' if n > len(shown) else ''
    legend = _part('fact_legend') if any(sample['facts'] for sample in shown) else ''
    cards = ''.join(map(_card, shown))
    fields = _part('fields', rows=''.join(map(_field_row, fields))) if fields else ''
    return _part(
        'page',
        title=esc(title),
        css=_part('css'),
        facts=_facts_line(run),
        alert='' if run.figures else _part('alert'),
        tiles=''.join(_tile(run, name) for name in tiles),
        samples=_part('samples', chosen=chosen, fact_legend=legend, cards=cards) if shown else '',
        curves=_part('curves', charts=''.join(charts)) if charts else _part('no_curves'),
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
