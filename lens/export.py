"""A trained lens as Hugging Face directories, or as a small folder beside its subject, with a model card.

python -m lens.export --workdir=runs/tiny --out=exports/tiny      # the newest checkpoint of a run
python -m lens.export --workdir=runs/x --out=lenses/x --format=lens  # maps, prompts, adapters alone, in bfloat16
python -m lens.export --workdir=runs/nla --out=exports/nla --format=nla --verify  # as natural language autoencoders are

Layouts: lens/lens_folder.py, of others lens/interchange/writing.py; the card: lens/card.md.jinja; its PyTorch program:
lens/card_code.py, card_nla.py. Training and evaluation start from such a folder with --config.init_from=DIR.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from lens import commands

    commands.export()

import importlib.resources
import pathlib
import re
import shlex
import time

import jax
import jinja2
from markupsafe import Markup

from lens import files, hf, lens_folder, logger
from lens.config import Run
from lens.errors import LensError, shown
from lens.interchange import verify, writing
from lens.metrics import FIGURES, figures, meaning
from lens.models.lens import Lens
from lens.reopen import reopen

# Configuration that a lens depends on, besides lora where it has adapters; the rest is how it was trained.
KEYS = 'seed subject layer data explanation_len explanation_open explanation_close explanation_end position_vectors decoder encoder'
# What the card tells of summary.json besides figures.
TOLD = {'steps': int, 'activations': int, 'documents': int, 'device': str, 'commit': str, 'command': str}
SPECIAL = re.compile(r'[\\`*_\[\]<>#|~&!$]')  # in Markdown


def _ticks(text: str, least: int) -> str:
    """More backticks than the text has one after another."""
    return '`' * max(least, 1 + max(map(len, re.findall('`+', text)), default=0))


def _plain(x: object) -> Markup:
    """A value as Markdown that shows it and does nothing else."""
    return x if isinstance(x, Markup) else Markup(SPECIAL.sub(r'\\\g<0>', shown(x)))


def _code(x: object) -> Markup:
    text = shown(x, 1000)
    pad = ' ' if text.startswith('`') or text.endswith('`') else ''
    return Markup(f'{_ticks(text, 1)}{pad}{text}{pad}{_ticks(text, 1)}' if text else '(empty)')


def _fenced(text: str, language: str) -> Markup:
    return Markup(f'{_ticks(text, 3)}{language}\n{text.rstrip()}\n{_ticks(text, 3)}')


CARDS = jinja2.Environment(
    loader=jinja2.PackageLoader('lens', ''),
    autoescape=True,  # by _plain: what it returns is escaped already
    finalize=_plain,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
CARDS.filters |= {'code': _code, 'fenced': _fenced}


def _quoted(text: str) -> str:
    """A word of a shell, what a page would not show as an escape of bash."""
    if text.replace('\n', '').isprintable():
        return shlex.quote(text)
    return "$'" + ''.join(c if c.isprintable() and c not in "\\'" else f'\\U{ord(c):08x}' for c in text) + "'"


def command(spec: dict) -> str:
    """Makes the command that opens this lens, in DIR, again."""
    flat = []
    for key in [*KEYS.split(), *(['lora'] if spec['lora'] else [])]:
        values = spec['config'][key]
        flat += [(f'{key}.{k}', v) for k, v in values.items()] if isinstance(values, dict) else [(key, values)]
    overrides = [_quoted(f'--config.{k}={v}') for k, v in flat]
    last = "--config.init_from=DIR --config.phases='()' --workdir=runs/again"
    return ' \\\n    '.join(['python -m lens.main --config=configs/base.py', *overrides, last])


def card(spec: dict, summary: dict, form: str = 'hf') -> str:
    """Renders README.md of the folder. spec: lens.json, or what it would say; summary: summary.json of the run, {} where there
    is none; form: of the folder."""
    how = [spec['config']['encoder'][k] for k in ('error', 'context_tokens')]
    return CARDS.get_template('card.md.jinja').render(
        spec=spec,
        summary=summary,
        meanings={k: meaning(k, *how) for k in spec['figures']},
        form=form,
        code=importlib.resources.files('lens').joinpath(verify.PROGRAMS.get(form, 'card_code.py')).read_text(),
        command=command(spec),
    )


def write_folder(
    out: pathlib.Path,
    lens: Lens,
    run: Run,
    config: dict,
    step: int,
    summary: dict,
    subject: str = '',
    form: str = 'hf',
    held: verify.Held | None = None,
) -> None:
    """Writes the whole folder; it appears at once, by rename. Call under jax.set_mesh(run.mesh). Raises LensError.

    config: of the run; summary: its summary.json, {} where there is none; subject: where it is, if not where config says;
    form: hf, lens or one of writing.LAYOUTS; held: what PyTorch must make of the folder too, if it is to be verified.
    """
    name = config['subject']['path']
    source = subject or name
    where = writing.subject_of(name, source, out)
    tags = run.texts.tags
    known = figures(config['encoder']['context_tokens'])
    about = {
        'subject': name,
        'subject_content': where.content,
        'subject_folder': where.folder,
        'explanation_len': run.length,
        'tags': {'opening': list(tags.opening), 'closing': list(tags.closing)},
        'reads_text': tags.joints is not None,
        'lora': config['lora'] if 'lora' in (config['decoder']['train'], config['encoder']['train']) else None,
        'step': step,
        'figures': {k: summary[k] for k in known if isinstance(summary.get(k), int | float)},
        'exported': time.strftime('%Y-%m-%d', time.gmtime()),
        'provenance': logger.provenance(),
        'config': config,
    }
    prompts = {side: config[side]['prompt'] for side in lens_folder.SIDES}
    spec = lens_folder.describe(lens, run.base, prompts, about, models=form == 'hf')
    with files.new_folder(out) as tmp:
        if form in writing.LAYOUTS:
            writing.check(form, lens, run.base.config)
            writing.write(tmp, form, lens, run, writing.sidecars(lens, run, config, where, step), source)
        else:
            lens_folder.write(tmp, lens, spec)
        files.write_text(tmp / 'README.md', card(spec, summary, form))
        for side in spec['models']:
            model = lens_folder.model(lens, run.base, side)
            print(f'Writing {side}: {model.config.n_layers} blocks, {model.embedding.dtype}', flush=True)
            hf.save_model(model, tmp / side, source=source)
        if held:
            print(verify.verify(tmp, form, held), flush=True)


def _summary(workdir: pathlib.Path, step: int) -> dict:
    """summary.json if it is about this checkpoint."""
    file = workdir / 'summary.json'
    remedy = 'remove it, for a card without figures'
    summary = files.read_json(file, remedy, keys=TOLD) if file.exists() else {}
    if bad := [k for k in FIGURES if not isinstance(summary.get(k, 0.0), int | float)]:
        raise LensError(f'{file} is damaged: {bad[0]} is no number: {remedy}.')
    return summary if summary.get('steps') == step else {}


def export(
    workdir: pathlib.Path,
    out: pathlib.Path,
    step: str = 'newest',
    subject: str = '',
    form: str = 'hf',
    verified: bool = False,
) -> None:
    """Writes a checkpoint of a run, by `step` of reopen, to `out`. Raises LensError.

    subject: where it is, if not where the run found it. form: as in write_folder. verified: only where PyTorch makes of the
    folder what the lens makes of held-out activations; of the data their split is needed then, else none.
    """
    files.check_free(out)
    if verified:
        verify.check_possible(form)
    needs = ('validation',) if verified else ()
    again = reopen(workdir, step, data=1, needs=needs, subject_path=subject)  # there is no batch to split
    summary = _summary(workdir, again.step)
    with jax.set_mesh(again.run.mesh):
        held = verify.hold(again.params, again.run) if verified else None
        write_folder(out, again.params, again.run, again.config, again.step, summary, again.subject, form, held)


def main(workdir: str, step: str, out: str, subject: str, form: str, verified: bool) -> None:
    export(pathlib.Path(workdir), pathlib.Path(out), step, subject, form, verified)
    print(f'Exported to {out}: how to use it, with its figures, is in {out}/README.md')
