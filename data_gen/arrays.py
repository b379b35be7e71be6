"""Writing a data folder in the layout that lens/data.py reads; it appears at once, by rename.

Large data sets come in shards: files of finished rows, unpadded, from which `merge` writes the arrays of
a split block by block.
"""

import contextlib
import os
import pathlib
import shutil

import numpy as np

from lens import files

BLOCK_BYTES = 1 << 23  # of padded token ids that are in memory at a time
NO_ROLE = -1  # role of the padding
SHORT = 1 << 16  # token ids that two bytes tell apart


def write_splits(out: pathlib.Path, splits) -> None:
    """Writes out/<name>/<array>.npy and meta.json for every (name, arrays, meta) of `splits`.

    `splits` may be a generator: one split is in memory at a time. `out` must not exist.
    """
    with files.new_folder(out) as folder:
        for name, arrays, meta in splits:
            (folder / name).mkdir()
            for stem, array in arrays.items():
                np.save(folder / name / f'{stem}.npy', array)
            files.write_json(folder / name / 'meta.json', meta)


def replace_folder(new: pathlib.Path, out: pathlib.Path) -> None:
    """Puts `new` in the place of `out`, which may exist."""
    old = new.with_name(f'{new.name}.old')
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a killed command; without `out` it may be the only copy
        os.rename(out, old)
    os.rename(new, out)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def open_npy(path: pathlib.Path, dtype, shape: tuple[int, ...]):
    """Yields a function that appends an array to a new .npy file of known shape."""
    with path.open('wb') as f:
        header = {
            'descr': np.lib.format.dtype_to_descr(np.dtype(dtype)),
            'fortran_order': False,
            'shape': tuple(map(int, shape)),
        }
        np.lib.format.write_array_header_1_0(f, header)
        yield lambda x: f.write(np.ascontiguousarray(x, dtype).data)
        f.flush()
        os.fsync(f.fileno())


def pad(flat: np.ndarray, lengths: np.ndarray, width: int, value: int) -> np.ndarray:
    """Returns rows laid end to end as [N, width], right padded."""
    out = np.full((len(lengths), width), value, flat.dtype)
    out[np.arange(width) < lengths[:, None]] = flat
    return out


def merge(
    paths: list[pathlib.Path],
    shard_N: np.ndarray,
    keep_N: np.ndarray,
    folder: pathlib.Path,
    width: int,
    pad_id: int,
    roles: int,
    vocab_size: int,
    on_rows=lambda n: None,
) -> np.ndarray:
    """Writes tokens.npy [kept, width] and role.npy of the kept rows; returns the tokens of every role code [roles].

    Ids have two bytes where a vocabulary of vocab_size allows that, otherwise four.
    shard_N: which of `paths` a row is in. keep_N: bool. on_rows is told how many rows were written.
    """
    shape, totals = (np.count_nonzero(keep_N), width), np.zeros(roles, np.int64)
    step = max(BLOCK_BYTES // (4 * width), 1)
    bounds = np.searchsorted(shard_N, np.arange(len(paths) + 1))
    with (
        open_npy(folder / 'tokens.npy', np.uint16 if vocab_size <= SHORT else np.int32, shape) as add_tokens,
        open_npy(folder / 'role.npy', np.int8, shape) as add_role,
    ):
        for path, lo, hi in zip(paths, bounds[:-1], bounds[1:], strict=True):
            keep = keep_N[lo:hi]
            if not keep.any():
                continue
            with np.load(path, allow_pickle=False) as shard:
                lengths, tokens, role = shard['lengths'], shard['tokens'], shard['role']
            ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            for i in range(0, hi - lo, step):
                some, n = keep[i : i + step], lengths[i : i + step]
                inside = np.repeat(some, n)
                part = slice(ends[i], ends[i + len(n)])
                add_tokens(pad(tokens[part][inside], n[some], width, pad_id))
                add_role(pad(role[part][inside], n[some], width, NO_ROLE))
                totals += np.bincount(role[part][inside], minlength=roles)
                on_rows(int(np.count_nonzero(some)))
    return totals
