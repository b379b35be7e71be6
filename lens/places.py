"""Which run a workdir holds, and where the folders of a configuration are: by what they hold, not by how they are spelled.

A relative path counts from the current folder; where it leads nowhere, from the workdir and the folders above it, then
from what ships with this package (`files.find`). A run goes on where its folders have the content that they had.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import jax

from lens import data, files, hf
from lens.config import Run
from lens.errors import LensError, shown
from lens.keys import check, get

FOLDERS = {  # key of a folder -> what a folder that is looked up elsewhere must hold
    'subject.path': 'config.json',
    'data.path': 'validation',
    'init_from': '',
    'tuned_lens': 'tuned_lens.json',
}
CONTENTS = {  # key of a folder -> the files that tell its content; that of the data is told by its documents
    'subject.path': ('config.json', *hf.VOCABULARY_FILES, '*.safetensors'),
    'init_from': (
        *('config.json', 'lens.json', '*.safetensors', 'nla_meta.yaml', '*/nla_meta.yaml'),
        *(f'{side}/*.safetensors' for side in ('av', 'ar', 'actor', 'critic')),
    ),
    'tuned_lens': ('tuned_lens.json', 'translators.safetensors'),
}
SAMPLE_BYTES = 1 << 16  # read at the begin, the middle and the end of each of these files
# What may differ between a run and its continuation: how often, where; never what is computed.
FREE_KEYS = ('checkpoint', 'log', 'mesh', 'health')


def locate(cfg, workdir: pathlib.Path, **given: str):
    """Returns a copy of a configuration in which all folders are where they are found from here.

    given: places that count instead, by key with _ for its dot: subject_path, data_path. Raises LensError where a key is
    not there or cannot have its value.
    """
    check(cfg)
    here = workdir.absolute()
    named = {k: file for k, file in FOLDERS.items() if get(cfg, k)}
    found = {k: str(files.find(get(cfg, k), here, *here.parents, holds=file)) for k, file in named.items()}
    out = cfg.copy_and_resolve_references()
    out.update_from_flattened_dict(found | {k.replace('_', '.', 1): x for k, x in given.items() if x})
    return out


def contents(cfg, keys: Sequence[str] = tuple(CONTENTS)) -> dict[str, str | None]:
    """Returns a digest of the files of each folder of a located configuration but the data: '' where there is none to
    be, None where it is gone, as that which a run started from may be. The weights of the subject must be there."""
    folders = {k: hf.local_directory(get(cfg, k)) if k == 'subject.path' else get(cfg, k) for k in keys}
    return {k: folder and _digest(pathlib.Path(folder), CONTENTS[k]) for k, folder in folders.items()}


def _digest(folder: pathlib.Path, names: tuple[str, ...]) -> str | None:
    """Of names, sizes and samples of the files that match."""
    digest, found = hashlib.sha256(), sorted({p for name in names for p in folder.glob(name)})
    for path in found:
        size = path.stat().st_size
        digest.update(f'{path.name} {size}\n'.encode())
        with path.open('rb') as file:
            for start in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16] if found else None


def identity(cfg, run: Run) -> dict:
    """Returns what a checkpoint says of the run that it belongs to, besides `contents`: JSON values."""
    ends = [p.end for p in run.phases]  # epochs depend on the data as well
    splits = [x for x in (run.train, run.validation) if x is not None]
    documents = {x.directory.name: data.fingerprint(x) for x in splits}
    return {'config': json.loads(cfg.to_json()), 'phase_ends': ends, 'documents': documents}


def check_identity(theirs: dict, here: dict, workdir: pathlib.Path) -> None:
    """Raises LensError where the identity of a run in `workdir` is not that of this run, `here`."""
    if keys := differing(theirs['config'], here['config']):
        raise LensError(
            f'{workdir} holds a run with another configuration (differing keys: {shown(", ".join(keys))}): '
            'use that configuration or another --workdir.'
        )
    check_contents(theirs, here, workdir)
    if theirs['phase_ends'] != here['phase_ends']:
        raise LensError(
            f'{workdir} holds a run whose phases end at steps {theirs["phase_ends"]}, now {here["phase_ends"]}: epochs are '
            'counted on the training documents, so restore data.path or use another --workdir.'
        )


def has_begun(here: dict, workdir: pathlib.Path, say: Callable[[str], None]) -> bool:
    """Returns whether checkpoints are there to go on from, told without opening one. say: hears of a damaged file.

    Raises LensError where config.json beside them is of another run, long before the checkpoints are asked.
    """
    if not any(p.name.isdigit() for p in workdir.glob('checkpoints/*')):
        return False
    try:
        stored = files.read_json(workdir / 'config.json', 'the checkpoints tell what it said')
    except LensError as e:
        say(f'warning: {e}')
    else:
        check_identity(here | {'config': stored}, here, workdir)
    return True


def check_contents(theirs: dict, here: dict, workdir: pathlib.Path) -> None:
    """Raises LensError where a folder that both identities tell of holds other things than it did."""
    for key, now in here.get('contents', {}).items():
        before = theirs.get('contents', {}).get(key)
        gone = bool(before) and now is None
        if before is not None and before != now and not gone:
            raise LensError(
                f'{workdir} holds a run with another {key}: {get(here["config"], key) or "none"} has not the content that '
                'it had then: give a folder that has, or use another --workdir.'
            )
    if any(theirs['documents'].get(k, x) != x for k, x in here['documents'].items()):
        raise LensError(
            f'{workdir} holds a run on other documents or labels than those that {here["config"]["data"]["path"]} has '
            'now: give a folder that has them as data.path, or use another --workdir.'
        )


def flat(config: dict) -> dict:
    """Returns the values by dotted key."""
    leaves = jax.tree_util.tree_leaves_with_path(config, is_leaf=lambda x: not isinstance(x, dict))
    return {jax.tree_util.keystr(kp, simple=True, separator='.'): x for kp, x in leaves}


def differing(a: dict, b: dict) -> list[str]:
    """Returns the dotted keys whose values differ, but for folders and those in FREE_KEYS."""
    a, b = flat(a), flat(b)
    keys = (k for k in a.keys() | b.keys() if k not in FOLDERS and k.split('.')[0] not in FREE_KEYS)
    return sorted(k for k in keys if a.get(k) != b.get(k))
