"""Tensors as safetensors files hold them, one file or several with an index: their names and shapes, reading, writing.

What is read is checked: a dtype that weights may have, and no value that is not finite.
"""

import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lens import files
from lens.errors import LensError, shown
from lens.models.families import UNQUANTISED

LONGEST_NAME = 255  # of a file of weights
AGAIN = 'download or export it again'
COMPLETE = 'give a complete directory in Hugging Face layout'
FLOATS = ('F64', 'F32', 'F16', 'BF16')  # what safetensors calls the types that weights may have
LFS = b'version https://git-lfs'
CHECKED_AT_ONCE = 1 << 24  # values of one pass of the check for NaN and infinity


def reason(e: BaseException) -> str:
    """Returns what a library said, as it may stand in a sentence."""
    return shown(str(e).strip() or type(e).__name__, 200)


class Stored(NamedTuple):
    """A tensor on disk; dtype: as safetensors calls it."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


def _shards(directory: pathlib.Path) -> dict[str, str]:
    """Stored name -> file, as the index promises; {} for one file. Raises LensError.

    Like transformers, model.safetensors alone is read where there is one.
    """
    single, index = directory / 'model.safetensors', directory / 'model.safetensors.index.json'
    if single.exists():
        if index.exists():
            print(f'{single} is read; {index.name} beside it is not.', flush=True)
        return {}
    if not index.exists():
        raise missing(single)
    weight_map = files.read_json(index, COMPLETE).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
        raise LensError(f'{index} has no weight_map: {AGAIN}.')
    for file in weight_map.values():
        # by its name: in the cache of the Hub, files are links to elsewhere
        parts = pathlib.PurePath(file).parts if isinstance(file, str) else ()
        named = parts and file.isprintable() and len(file) <= LONGEST_NAME and parts[-1] != '.'
        if not named or '..' in parts or file.startswith('/'):
            raise LensError(
                f'{index} names {shown(repr(file), 80)}, which is no file of the directory: download it again.'
            )
    return weight_map


def missing(file: pathlib.Path) -> LensError:
    """What is said where a file of weights is not there."""
    if other := sorted(p.name for kind in ('*.bin', '*.pt', '*.pth', '*.gguf') for p in file.parent.glob(kind)):
        return LensError(
            f'{file} does not exist, and {shown(other[0])} is of a format that is not read (pickles may run code): where '
            'you trust it, convert it to safetensors with from_pretrained and save_pretrained of transformers or PEFT.'
        )
    return LensError(f'{file} does not exist: the directory needs safetensors weights.')


def headers(directory: pathlib.Path) -> dict[str, Stored]:
    """Stored name -> tensor, of all tensors of a directory. Raises LensError."""
    weight_map, stored = _shards(directory), {}
    for path in sorted({directory / file for file in weight_map.values() or ['model.safetensors']}):
        try:
            with opened(path) as f:
                slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
                stored |= {n: Stored(path, tuple(x.get_shape()), x.get_dtype()) for n, x in slices.items()}
        except (OSError, safetensors.SafetensorError) as e:
            raise LensError(f'{path} cannot be read ({reason(e)}): {AGAIN}.') from None
    for name, file in weight_map.items():
        if name not in stored or stored[name].file != directory / file:
            raise LensError(f'{directory}/{file} lacks {shown(name)}, which the index promises: {AGAIN}.')
    return stored


def opened(path: pathlib.Path):
    """Opens a file to read tensors of. Raises OSError or safetensors.SafetensorError."""
    if not path.is_file():  # opening a pipe would wait
        raise OSError('it is no file' if path.exists() else 'it does not exist')
    with path.open('rb') as file:
        if file.read(len(LFS)) == LFS:
            raise OSError('it is a pointer of Git LFS, in whose place `git lfs pull` puts the file')
    return safetensors.safe_open(path, framework='numpy')


def check_dtype(file: pathlib.Path, name: str, dtype: str) -> None:
    """Raises LensError where a tensor is of a type that weights do not have."""
    if dtype not in (('U8',) if name.endswith(('_blocks', '_scales')) else FLOATS):
        raise LensError(f'{file}: {shown(name)} has dtype {dtype}, which is not supported: {UNQUANTISED}.')


def read(file: pathlib.Path, name: str) -> np.ndarray:
    """Reads one tensor to the host, finite. The file is opened for each, so that no mapped page outlives it. Raises LensError."""
    try:
        with opened(file) as f:
            check_dtype(file, name, f.get_slice(name).get_dtype())
            x = f.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as e:
        raise LensError(f'{file}: {shown(name)} cannot be read ({reason(e)}): {AGAIN}.') from None
    if not _finite(x) or (name.endswith('_scales') and (x == 255).any()):  # 255 is the NaN of MXFP4's scales
        raise LensError(f'{file}: {shown(name)} holds values that are not finite: {AGAIN}.')
    return x


def _finite(x: np.ndarray) -> bool:
    """In pieces, so that nothing of the size of x is made."""
    flat = x.reshape(-1)
    pieces = (flat[i : i + CHECKED_AT_ONCE] for i in range(0, flat.size, CHECKED_AT_ONCE))
    return not jnp.issubdtype(x.dtype, jnp.floating) or all(np.isfinite(p).all() for p in pieces)


def read_all(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all tensors of one safetensors file, which are finite floats. Raises LensError."""
    if not file.exists():
        raise missing(file)
    try:
        with opened(file) as f:
            names = list(f.keys())
    except (OSError, safetensors.SafetensorError) as e:
        raise LensError(f'{file} cannot be read ({reason(e)}): {AGAIN}.') from None
    return {name: read(file, name) for name in names}


def write(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file that others may read (the library makes it private). Raises OSError."""
    try:
        safetensors.numpy.save_file(arrays, file, metadata={'format': 'pt'})
    except safetensors.SafetensorError as e:
        raise OSError(reason(e)) from None
    file.chmod(0o644)
