"""Runs that are there already: opened again, and as what a new one starts from."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import ml_collections

from lens import config, files, hf, keys, lens_folder, lens_init, places
from lens.checkpoint import Checkpoints, Keep
from lens.config import Run
from lens.errors import LensError, shown
from lens.interchange import directories, reading
from lens.models import injection
from lens.models.lens import Lens

# Keys that say where a lens reads and writes; a lens of another run is only taken over where they agree.
PLACES = (
    *('layer', 'position_vectors'),
    *(f'decoder.{k}' for k in ('train', 'layers', 'injection', 'marker')),
    *(f'encoder.{k}' for k in ('train', 'output_layer', 'readout', 'context_tokens')),
)
MADE = {'data/smollm2/model': 'make smollm2'}  # subjects of lenses that ship, and what makes them
ANOTHER_VERSION = 'it is of another version or damaged; train again'


def _config_of(workdir: pathlib.Path) -> dict:
    """What config.json says, or where it is damaged the newest checkpoint."""
    try:
        return files.read_json(workdir / 'config.json', '--workdir and init_from must be the folder of a run')
    except LensError as e:
        checkpoints = Checkpoints(workdir / 'checkpoints', Keep())
        found = checkpoints.newest(checkpoints.info)
        if found is None:
            raise
        print(f'warning: {e} The configuration is that of checkpoint {found[0]}.')
        return found[1]['config']


def weights(workdir: pathlib.Path, like: Lens, step: str = 'newest') -> tuple[int, tuple[Lens, dict]]:
    """Returns (step, (weights alone, info)) of a checkpoint of a workdir, in the structure and placement of `like`.

    step: newest | best (highest held-out FVE) | a number. Raises LensError.
    """
    with Checkpoints(workdir / 'checkpoints', Keep()) as checkpoints:

        def read(step: int) -> tuple[Lens, dict]:
            info = checkpoints.info(step)
            return checkpoints.restore(step, {'params': like})['params'], info

        have = ', '.join(map(str, checkpoints.steps)) or 'none yet'
        found = checkpoints.newest(read) if step == 'newest' else None
        number = str(checkpoints.best_step) if step == 'best' else step
        if number in have.split(', '):
            found = int(number), read(int(number))
    if found is None:
        raise LensError(f'{workdir}/checkpoints has no checkpoint {step!r}: it has {have}.')
    return found


class Reopened(NamedTuple):
    """A workdir one of whose checkpoints has been restored. config: of the run, as stored; subject: where it is."""

    config: dict
    subject: str
    run: Run
    step: int
    params: Lens


def reopen(
    workdir: pathlib.Path, step: str = 'newest', data: int = -1, needs: Sequence[str] = ('validation',), **given: str
) -> Reopened:
    """Returns the run of a workdir with the weights of a checkpoint, on the devices that are here.

    step: as in `weights`. data: devices that split a batch, -1 for all that the model does not take. needs: as in
    config.plan. given: as in places.locate. Raises LensError, also where what is found is not what it was.
    """
    stored = _config_of(workdir)
    try:
        cfg = ml_collections.ConfigDict(stored)
        keys.check(cfg)
    except (ValueError, TypeError) as e:
        raise LensError(f'{workdir}/config.json cannot be used ({str(e).rstrip(".")}): {ANOTHER_VERSION}.') from e
    cfg = places.locate(cfg, workdir, **given)
    cfg.mesh.update(data=data, model=math.gcd(cfg.mesh.model, jax.device_count()), replica=1)
    run = config.load(cfg, config.plan(cfg, needs))
    with jax.set_mesh(run.mesh):
        like = lens_init.abstract_lens(cfg, run.texts, run.base, run.mesh)
        number, (params, info) = weights(workdir, like, step)
    here = places.identity(cfg, run) | {'contents': places.contents(cfg, ('subject.path',))}
    places.check_contents(info, here, workdir)
    return Reopened(stored, cfg.subject.path, run, number, params)


def open_lens(path: str | pathlib.Path, needs: Sequence[str] = (), question: str = '', **given: str) -> Reopened:
    """Returns the lens of a workdir (its newest checkpoint), a folder of lens.export, one of others, or the name of one that
    ships, on one device of the data axis. needs, given: as in `reopen`; question: of lens.load. Raises LensError.
    """
    folder = files.find(path)
    theirs = directories.is_foreign(folder)
    folder = folder if folder.is_dir() or theirs else files.find(pathlib.Path('lenses') / path)
    if not folder.is_dir() and not theirs:
        ships = ', '.join(sorted(p.parent.name for p in files.home().glob('lenses/*/lens.json'))) or 'none'
        raise LensError(
            f'{shown(path)} is no folder of a run or of lens.export, and no lens that ships with the package ({ships}): give '
            'one of them.'
        )
    try:
        if theirs or question or (folder / 'lens.json').exists():
            return _open_folder(folder, needs, question, **given)
        return reopen(folder, data=1, needs=needs, **given)
    except LensError as e:
        made = next((how for where, how in MADE.items() if where in str(e) and not files.find(where).exists()), None)
        raise (LensError(f'The subject of {shown(path)} is not there: `{made}` makes it.') if made else e) from None


def _open_folder(directory: pathlib.Path, needs: Sequence[str], question: str, **given: str) -> Reopened:
    """Opens an exported lens, whole or light, or one of others. A subject that is another than that of its training is
    refused before weights are read."""
    theirs, file = directories.is_foreign(directory), directory / 'lens.json'
    if question and not theirs:
        raise LensError(f'{directory} is no activation oracle, so it has one prompt: leave the question away.')
    spec = reading.opened(directory, question, **given) if theirs else lens_folder.read_spec(directory)
    stored, step, content = (spec.get(k) for k in ('config', 'step', 'subject_content'))
    try:
        cfg = ml_collections.ConfigDict(stored)
        cfg.update(phases=(), tuned_lens='', init_from=str(directory.absolute() if directory.is_dir() else directory))
        cfg = places.locate(cfg, directory, **given)
    except (ValueError, TypeError, AttributeError) as e:
        raise LensError(f'{file} cannot be used ({str(e).rstrip(".")}): {ANOTHER_VERSION}.') from e
    cfg.mesh.update(data=1, model=math.gcd(cfg.mesh.model, jax.device_count()), replica=1)
    if (content or not theirs) and hf.content(cfg.subject.path) != content:
        raise LensError(
            f'{directory} holds a lens of another subject than {cfg.subject.path}, whose weights are not those of its '
            'training: give the folder of its own as subject.'
        )
    run = config.plan(cfg, needs)
    with jax.set_mesh(run.mesh):
        lens_init.check_start(cfg, lens_init.abstract_lens(cfg, run.texts, run.base, run.mesh), run.base)
        run = config.load(cfg, run)
        params = lens_init.init_lens(cfg, run)
    return Reopened(stored, cfg.subject.path, run, step, params)


def _is_run(folder: str) -> bool:
    """Whether init_from is a workdir, not an exported lens."""
    return bool(folder) and (pathlib.Path(folder) / 'checkpoints').is_dir()


def check_start(cfg, lens: Lens, base) -> None:
    """Raises LensError where what a new run starts from does not fit. lens, base: may be abstract."""
    if not _is_run(cfg.init_from):
        return lens_init.check_start(cfg, lens, base)
    stored = _config_of(pathlib.Path(cfg.init_from)), json.loads(cfg.to_json())
    theirs, ours = (_places(x, cfg.init_from) for x in stored)
    if changed := [f'{k}={theirs[k]!r}' for k in theirs if theirs[k] != ours.get(k)]:
        raise LensError(f'init_from={cfg.init_from} holds a lens with {", ".join(changed)}: use these keys here.')


def _places(stored: dict, workdir: str) -> dict:
    """The values of PLACES, of the fields of the injection and of prompts that are no weights, by dotted key."""
    flat = places.flat(stored)
    if missing := [k for k in PLACES if k not in flat]:
        raise LensError(f'{workdir}/config.json lacks {missing[0]}: {ANOTHER_VERSION}.')
    if flat['encoder.output_layer'] == -1:
        flat['encoder.output_layer'] = flat['layer']
    kind = injection.INJECTIONS[flat['decoder.injection']]
    more = [f'decoder.{f.name}' for f in dataclasses.fields(kind)]
    more += [] if kind.soft_prompts else ['decoder.prompt', 'encoder.prompt']
    return {k: flat.get(k) for k in (*PLACES, *more)}


def initial_lens(cfg, run: Run) -> Lens:
    """Returns the lens that a run starts from: of another workdir, or as lens_init makes it. Call under
    jax.set_mesh(run.mesh). Raises LensError."""
    if not _is_run(cfg.init_from):
        return lens_init.init_lens(cfg, run)
    like = lens_init.abstract_lens(cfg, run.texts, run.base, run.mesh)
    return weights(pathlib.Path(cfg.init_from), like)[1][0]
