"""Which run a workdir holds, and how it goes on: the newest checkpoint that can be read, if it is of this run."""

import json
import pathlib

from lens import data
from lens.checkpoint import CheckpointError, Checkpoints, DamagedError
from lens.config import Run
from lens.lens_init import State, phase_of, restore

# What may differ between a run and its continuation: how often, where; never what is computed.
FREE_KEYS = ('checkpoint', 'log', 'mesh', 'health')


def identity(config: dict, run: Run) -> dict:
    """What a checkpoint says of the run that it belongs to."""
    ends = [p.end for p in run.phases]  # epochs depend on the data as well
    documents = {x.directory.name: data.fingerprint(x) for x in (run.train, run.validation)}
    return {'config': config, 'phase_ends': ends, 'documents': documents}


def has_begun(config: dict, workdir: pathlib.Path) -> bool:
    """Whether checkpoints are there to go on from, told without opening one.

    Raises CheckpointError where config.json beside them is of another run, long before `newest` would find out.
    """
    if not any(p.name.isdigit() for p in workdir.glob('checkpoints/*')):
        return False
    try:
        theirs = json.loads((workdir / 'config.json').read_text())
    except (OSError, ValueError):  # `newest` asks the checkpoints
        return True
    _same(theirs, config, workdir)
    return True


def newest(cfg, here: dict, run: Run, checkpoints: Checkpoints, workdir: pathlib.Path) -> tuple[State, dict] | None:
    """(state, info) of the newest checkpoint that can be read, damaged ones after it moved away; None where the run
    has not begun. here: the identity of this run. Call under jax.set_mesh(run.mesh). Raises CheckpointError when the
    workdir holds another run."""

    def read(step: int) -> tuple[State, dict]:
        info = checkpoints.info(step)
        _check(info, here, run, workdir)
        return restore(cfg, run, checkpoints, step), info

    try:
        found = checkpoints.newest(read)
    except DamagedError as e:
        raise CheckpointError(f'{e} None of the others can be read either: start in another --workdir.') from e
    if found is None:
        return None
    step, (state, info) = found
    checkpoints.set_aside(after=step)
    phase = phase_of(run, step)
    return state, info | ({'data': None} if phase and step == phase.end else {})


def _check(info: dict, here: dict, run: Run, workdir: pathlib.Path) -> None:
    try:
        theirs, ends, documents = (info[k] for k in ('config', 'phase_ends', 'documents'))
    except KeyError as e:
        raise DamagedError(f'{workdir}/checkpoints: a checkpoint says no {e}.') from e
    _same(theirs, here['config'], workdir)
    if ends != here['phase_ends']:
        raise CheckpointError(
            f'{workdir} holds a run whose phases end at steps {ends}, now {here["phase_ends"]}: epochs are counted on '
            'the training documents, so restore data.path or use another --workdir.'
        )
    if documents != here['documents']:
        raise CheckpointError(
            f'{workdir} holds a run on other documents or labels than those that {run.train.directory.parent} has now: '
            'restore data.path or use another --workdir.'
        )


def _same(theirs: dict, config: dict, workdir: pathlib.Path) -> None:
    if keys := differing(theirs, config):
        raise CheckpointError(
            f'{workdir} holds a run with another configuration (differing keys: {", ".join(keys)}): '
            'use that configuration or another --workdir.'
        )


def differing(a: dict, b: dict, prefix: str = '') -> list[str]:
    """Dotted keys whose values differ, but for FREE_KEYS."""
    out = []
    for k in sorted((a.keys() | b.keys()) - (set() if prefix else set(FREE_KEYS))):
        x, y = a.get(k), b.get(k)
        if isinstance(x, dict) and isinstance(y, dict):
            out += differing(x, y, f'{prefix}{k}.')
        elif x != y:
            out.append(prefix + k)
    return out
