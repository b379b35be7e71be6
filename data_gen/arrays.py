"""Writing a data folder in the layout that lens/data.py reads; it appears at once, by rename."""

import json
import os
import pathlib
import shutil
import tempfile

import numpy as np


def write_splits(out: str | os.PathLike[str], splits) -> None:
    """Writes out/<name>/<array>.npy and meta.json for every (name, arrays, meta) of `splits`.

    `splits` may be a generator: one split is in memory at a time. `out` must not exist.
    """
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    try:
        temporary.chmod(0o755)
        for name, arrays, meta in splits:
            (temporary / name).mkdir()
            for stem, array in arrays.items():
                np.save(temporary / name / f'{stem}.npy', array)
            (temporary / name / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
