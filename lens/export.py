"""A trained lens as Hugging Face directories, with a model card.

python -m lens.export --workdir=runs/tiny --out=exports/tiny      # the newest checkpoint of a run

Layout: lens/lens_folder.py; the card: lens/card.md.jinja; its PyTorch program: lens/card_code.py. Training and
evaluation start from such a folder with --config.init_from=DIR.
"""

import importlib.resources
import pathlib
import shlex
import time

import jax
import jinja2
from absl import flags

from lens import cli, files, hf, lens_folder, logger
from lens.checkpoint import reopen
from lens.config import Run
from lens.errors import LensError
from lens.metrics import FIGURES, meaning
from lens.models.lens import Lens

# Configuration that a lens depends on, besides lora where it has adapters; the rest is how it was trained.
KEYS = 'seed subject layer data explanation_len explanation_open explanation_close position_vectors decoder encoder'
# What the card tells of summary.json besides figures.
TOLD = {'steps': int, 'activations': int, 'documents': int, 'device': str, 'commit': str, 'command': str}
CARDS = jinja2.Environment(
    loader=jinja2.PackageLoader('lens', ''),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
CARDS.filters['code'] = lambda text: f'``{text}``' if '`' in text else f'`{text}`'


def command(spec: dict) -> str:
    """Makes the command that opens this lens again; --config.phases and a --workdir are the user's."""
    flat = []
    for key in [*KEYS.split(), *(['lora'] if spec['lora'] else [])]:
        values = spec['config'][key]
        flat += [(f'{key}.{k}', v) for k, v in values.items()] if isinstance(values, dict) else [(key, values)]
    overrides = [shlex.quote(f'--config.{k}={v}') for k, v in flat]
    return ' \\\n    '.join(['python -m lens.main --config=configs/base.py', *overrides])


def card(spec: dict, summary: dict) -> str:
    """Renders README.md of the folder. spec: lens.json; summary: summary.json of the run, {} where there is none."""
    return CARDS.get_template('card.md.jinja').render(
        spec=spec,
        summary=summary,
        meanings={k: meaning(k, spec['config']['encoder']['error']) for k in spec['figures']},
        code=importlib.resources.files('lens').joinpath('card_code.py').read_text(),
        command=command(spec),
    )


def write_folder(
    out: pathlib.Path, lens: Lens, run: Run, config: dict, step: int, summary: dict, subject: str = ''
) -> None:
    """Writes the whole folder; it appears at once, by rename. Call under jax.set_mesh(run.mesh).

    config: of the run; summary: its summary.json, {} where there is none; subject: where it is, if not where config says.
    """
    ids = {'decoder': run.texts.decoder[:2], 'encoder': run.texts.encoder}
    prompts = {
        side: {'prompt': config[side]['prompt'], 'prompt_ids_left': left, 'prompt_ids_right': right}
        for side, (left, right) in ids.items()
    }
    about = {
        'subject': config['subject']['path'],
        'explanation_len': run.length,
        'tags': {'opening': list(run.texts.tags.opening), 'closing': list(run.texts.tags.closing)},
        'lora': config['lora'] if 'lora' in (config['decoder']['train'], config['encoder']['train']) else None,
        'step': step,
        'figures': {k: summary[k] for k in FIGURES if isinstance(summary.get(k), int | float)},
        'exported': time.strftime('%Y-%m-%d', time.gmtime()),
        'provenance': logger.provenance(),
        'config': config,
    }
    with files.new_folder(out) as tmp:
        spec = lens_folder.write(tmp, lens, run.base, prompts, about)
        files.write_text(tmp / 'README.md', card(spec, summary))
        for side in lens_folder.SIDES:
            model = lens_folder.model(lens, run.base, side)
            print(f'Writing {side}: {model.config.n_layers} blocks, {model.embedding.dtype}', flush=True)
            hf.save_model(model, tmp / side, source=subject or config['subject']['path'])


def _summary(workdir: pathlib.Path, step: int) -> dict:
    """summary.json if it is about this checkpoint."""
    file = workdir / 'summary.json'
    remedy = 'remove it, for a card without figures'
    summary = files.read_json(file, remedy, keys=TOLD) if file.exists() else {}
    return summary if summary.get('steps') == step else {}


def export(workdir: pathlib.Path, out: pathlib.Path, step: str = 'newest', subject: str = '') -> None:
    """Writes a checkpoint of a run, by `step` of reopen, to `out`; no data is needed. Raises LensError.

    subject: where it is, if not where the run found it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LensError(f'{out} holds something already: give an empty or a new folder as --out.')
    again = reopen(workdir, step, data=1, needs=(), subject_path=subject)  # there is no batch to split
    summary = _summary(workdir, again.step)
    with jax.set_mesh(again.run.mesh):
        write_folder(out, again.params, again.run, again.config, again.step, summary, again.subject)


def main(_):
    out = pathlib.Path(OUT.value)
    export(pathlib.Path(WORKDIR.value), out, STEP.value, SUBJECT.value)
    print(f'Exported to {out}: how to use it, with its figures, is in {out}/README.md')


if __name__ == '__main__':
    WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run of lens.main.')
    STEP = flags.DEFINE_string(
        'step', 'newest', 'Which checkpoint: newest, best (highest held-out FVE), or its number.'
    )
    SUBJECT = flags.DEFINE_string('subject', '', 'Where the subject is now, if not where the run found it.')
    OUT = flags.DEFINE_string('out', None, 'New folder for the lens.')
    flags.mark_flags_as_required(['workdir', 'out'])
    cli.run(main)
