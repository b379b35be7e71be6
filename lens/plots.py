"""The plots of an evaluation, each as PNG and as PDF."""

import pathlib
from collections.abc import Callable, Mapping

import numpy as np

INK, SOFT = '#23272e', '#8b9098'
COLORS = ('#2c64a8', '#c8701d', '#1f7a53', '#a02a17')
LABELS = {
    'last': 'last m tokens, as words',
    'text_only': 'lens on the state after them',
    'subject': 'that state itself',
}
BINS = 40


def names(study) -> list[str]:
    """Returns the names of the plots of a study.Study, without a suffix."""
    return [name for name, (has, _) in PLOTS.items() if has(study)]


def draw(folder: pathlib.Path, study, figures: Mapping[str, dict]) -> None:
    """Writes the plots into a folder. figures: name -> {'value', 'ci95'}, those of training included."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # takes a second

    folder.mkdir(exist_ok=True)
    style = {'axes.spines.top': False, 'axes.spines.right': False, 'font.size': 9, 'axes.edgecolor': SOFT}
    style |= {'text.color': INK, 'axes.labelcolor': INK, 'axes.titlelocation': 'left', 'legend.frameon': False}
    for name in names(study):
        with rc_context(style):
            figure = Figure(figsize=(5.4, 3.4), layout='constrained')
            axes = figure.subplots()
            PLOTS[name][1](axes, study, figures)
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
            for form in ('png', 'pdf'):
                figure.savefig(folder / f'{name}.{form}', dpi=160)


def _curve(axes, curve: Mapping[int, str], figures, label: str, color: str) -> None:
    """Points with their 95% intervals."""
    x, shown = list(curve), [figures[name] for name in curve.values()]
    y = [f['value'] for f in shown]
    low, high = np.transpose([f['ci95'] for f in shown])
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(x, y, 'o-', color=color, markersize=3.5, label=label)


def _level(axes, figures, name: str, label: str) -> None:
    """A dashed line at a figure, if there is one."""
    if name in figures:
        axes.axhline(figures[name]['value'], color=SOFT, linestyle='--', linewidth=1)
        text = f'{label} {figures[name]["value"]:.3f}'
        axes.annotate(
            text, (0.01, figures[name]['value']), xycoords=axes.get_yaxis_transform(), va='bottom', color=SOFT
        )


def _counted(axes, ticks, label: str) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale('log', base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=label, ylabel='FVE')


def _best_of(axes, study, figures) -> None:
    _curve(axes, study.curves['best_of'], figures, 'best of k, 95%', COLORS[0])
    _level(axes, figures, 'fve_greedy', 'greedy')
    _counted(axes, list(study.curves['best_of']), 'explanations drawn of each activation, k')
    axes.set_title('Best of k explanations')


def _first(axes, study, figures) -> None:
    _curve(axes, study.curves['first'], figures, '', COLORS[0])
    _counted(axes, list(study.curves['first']), 'tokens of the sampled explanation that are read')
    axes.set_title('The first words alone')


def _quoting(axes, study, figures) -> None:
    kinds = [k for k in LABELS if study.curves[k]]
    for kind, color in zip(kinds, COLORS[1:], strict=False):
        _curve(axes, study.curves[kind], figures, LABELS[kind], color)
    _level(axes, figures, 'fve', 'the lens')
    _counted(axes, list(study.curves['last']), 'tokens of the text, m')
    axes.set_title('Without the activation: m tokens of the text')
    axes.legend()


def _nmse(axes, study, figures) -> None:
    most = min(max(np.percentile(x, 99.5) for x in study.nmse.values()), 2.0)
    bins = np.linspace(0, max(most, 1e-6), BINS)
    for (name, x), color in zip(study.nmse.items(), COLORS, strict=False):
        label = f'{name}, mean {x.mean():.3f}'
        axes.hist(np.minimum(x, bins[-1]), bins, histtype='step', color=color, linewidth=1.4, label=label)
    axes.set(xlabel='normalised squared error (last bin: and above)', ylabel='activations')
    axes.set_title('Errors of single activations')
    axes.legend()


def _parts(axes, study, figures) -> None:
    curve = {f'token {k}': v for k, v in study.curves['at'].items()} | study.curves['role']
    shown = [figures[name] for name in curve.values()]
    y = np.array([f['value'] for f in shown])
    low, high = np.transpose([f['ci95'] for f in shown])
    at, first = np.arange(len(curve)), len(study.curves['at'])
    colors = [COLORS[0]] * first + [COLORS[1]] * (len(curve) - first)
    for part, color in zip(zip(at, y, y - low, high - y, strict=True), colors, strict=True):
        x, value, down, up = part
        axes.errorbar(x, value, [[down], [up]], fmt='o', color=color, markersize=4.5, capsize=3)
    axes.set_xticks(at, list(curve), rotation=30, ha='right')
    axes.set(ylabel='FVE', xlim=(-0.6, len(curve) - 0.4))
    axes.set_title('By position and role, 95% intervals')


PLOTS: dict[str, tuple[Callable, Callable]] = {
    'best_of_k': (lambda study: study.curves['best_of'], _best_of),
    'first_words': (lambda study: study.curves['first'], _first),
    'text_alone': (lambda study: study.curves['last'], _quoting),
    'nmse': (lambda study: study.nmse, _nmse),
    'position_and_role': (lambda study: study.curves['at'] or study.curves['role'], _parts),
}
