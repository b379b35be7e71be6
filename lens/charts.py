"""Line charts over training steps as inline SVG, and how numbers and texts are written on the page."""

import math
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

WINDOW = 1 / 25  # of a phase: the running mean of a training curve
MAX_POINTS = 500  # per curve
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 540, 270, 50, 14, 24, 42  # of a chart, and its margins
NONE, MINUS = '\N{EN DASH}', '\N{MINUS SIGN}'


class Stretch(NamedTuple):
    """The steps of one phase."""

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


def text(value: float | None, name: str) -> str:
    """Writes a figure as people do: shares of facts in per cent, the rest with three decimals."""
    if value is None:
        return NONE
    percent = 'recall' in name or 'hallucinated' in name
    written = f'{100 * value:.1f}%' if percent else f'{value:.3f}' if abs(value) < 1000 else f'{value:.0f}'
    return written.replace('-', MINUS)


def ticks(lo: float, hi: float, count: int) -> np.ndarray:
    """Returns round numbers (1, 2 or 5 times a power of ten) inside lo..hi, about `count` of them."""
    raw = (hi - lo) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / raw)))
    return np.arange(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1) * step


def running_mean(y: np.ndarray) -> np.ndarray:
    """Returns the centred mean over WINDOW of the curve; at its ends over what is there."""
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


def _curve(s: Series, phases: list[Stretch], to_x, to_y) -> str:
    """One series as SVG; to_x and to_y turn values into pixels."""
    if s.noisy:
        part, lines = np.searchsorted([p.first for p in phases[1:]], s.x, side='right'), []
        for i in np.unique(part):
            x, y = to_x(s.x[part == i]), s.y[part == i]
            lines += [_line(x, to_y(y), 'raw'), _line(x, to_y(running_mean(y)))]
    else:
        lines = [_line(to_x(s.x), to_y(s.y))]
        for x, y in zip(s.x, s.y, strict=True) if len(s.x) <= 60 else ():
            hint = f'<title>{escape(s.label)}, step {x:,.10g}: {y:.3f}</title>'
            lines.append(f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3.5">{hint}</circle>')
    return f'<g class="c{s.color}">{"".join(lines)}</g>'


def _axes(lo: float, hi: float, end: float, phases: list[Stretch], percent: bool, to_x, to_y) -> str:
    """Grid, ticks, the name of the x axis, and where each phase begins."""
    bottom, right, out = HEIGHT - BOTTOM, WIDTH - RIGHT, []
    for t in ticks(lo, hi, 5):
        label = (f'{100 * t:.0f}%' if percent else f'{t:.6g}').replace('-', MINUS)
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{to_y(t):.1f}" y2="{to_y(t):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{to_y(t) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for t in ticks(0, end, 6):
        out.append(f'<text x="{to_x(t):.1f}" y="{bottom + 18}" text-anchor="middle">{t:,.10g}</text>')
    for i, p in enumerate(phases if len(phases) > 1 else ()):
        x = to_x(p.first if i else 0)
        out.append(f'<text x="{x + 6:.1f}" y="{TOP - 9}">{escape(p.name)}</text>')
        out += [f'<line class="phase" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 20}" y2="{bottom}"/>'] if i else []
    return ''.join(out) + (
        f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        f'<text x="{right}" y="{HEIGHT - 6}" text-anchor="end">training step</text>'
    )


def chart(
    title: str,
    unit: str,
    series: list[Series],
    phases: list[Stretch],
    floor: float | None = None,
    top: float | None = None,
    note: str = '',
) -> Markup:
    """Draws a line chart over training steps as an HTML figure with legend; unit 'share' is written in per cent."""
    (lo, hi), percent = _range(series, floor, top), unit == 'share'
    end = 1.01 * max(1, *(s.x[-1] for s in series), *(p.first + p.steps - phases[0].first for p in phases))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def to_x(x):
        return LEFT + width * x / end

    def to_y(y):
        return TOP + height * (hi - y) / (hi - lo)

    legend = ''
    for s in series:
        last = text(float(running_mean(s.y)[-1] if s.noisy else s.y[-1]), 'recall' * percent)
        legend += f'<li><span class="swatch c{s.color}"></span>{escape(s.label)} <b>{last}</b></li>'
    if any(s.y.min() < lo for s in series if not s.noisy):
        note += ' Lower values lie below the chart.'
    # The nested svg clips what lies outside the plot.
    return Markup(
        f'<figure><h3>{title} <span class="soft">({unit})</span></h3><ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} over training steps">'
        f'{_axes(lo, hi, end, phases, percent, to_x, to_y)}<svg class="plot" x="{LEFT}" y="{TOP}" '
        f'width="{width}" height="{height}" viewBox="{LEFT} {TOP} {width} {height}">'
        f'{"".join(_curve(s, phases, to_x, to_y) for s in series)}</svg></svg>'
        f'<figcaption class="note">{note}</figcaption></figure>'
    )
