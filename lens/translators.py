"""Residual translators of a tuned lens (Belrose et al. 2023): their files, and maps composed of them.

hs[i] is the stream entering block i. Activations are row vectors: T_i(h) = h @ M_i + v_i with
M_i = I + V_i, for i = 0..L-1; T_L is the identity. T_i(hs[i]) gives nearly the logits that hs[L] gives, and
has its typical norm.

DIR/translators.safetensors   weight: V [L, d, d], bias: v [L, d], float32
DIR/tuned_lens.json           subject, convention, held-out figures, how it was trained
"""

import json
import os
import pathlib
import shutil
import tempfile
from typing import NamedTuple

import numpy as np

from lens import hf
from lens.errors import LensError
from lens.models.transformer import TransformerConfig

FORMAT = 'lens-translators/1'
CONVENTION = (
    'T_i(h) = h + h @ weight[i] + bias[i], h a row vector: the stream entering block i. '
    'It is the transpose of the weight of a torch.nn.Linear.'
)
AGAIN = 'train it again with lens.tuned_lens'


class TranslatorsError(LensError):
    """The folder holds no translators, damaged ones, or those of a subject of another shape."""


def write(out: pathlib.Path, weight_LxDxD: np.ndarray, bias_LxD: np.ndarray, about: dict) -> None:
    """Both files; the folder appears at once, by rename. about: further entries of tuned_lens.json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = pathlib.Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    try:
        hf.write_tensors(tmp / 'translators.safetensors', {'weight': weight_LxDxD, 'bias': bias_LxD})
        content = {'format': FORMAT, 'convention': CONVENTION, **about}
        (tmp / 'tuned_lens.json').write_text(json.dumps(content, indent=2) + '\n')
        tmp.chmod(0o755)
        os.replace(tmp, out)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def _read_about(directory: pathlib.Path) -> dict:
    file = directory / 'tuned_lens.json'
    if not file.exists():
        pickles = sorted(p.name for p in directory.glob('*.pt')) if directory.is_dir() else []
        if pickles:
            raise TranslatorsError(
                f'{directory}/{pickles[0]} is a pickle, which may run code and is not read: convert it to '
                'translators.safetensors and tuned_lens.json (see lens/translators.py), or train one with '
                'lens.tuned_lens.'
            )
        raise TranslatorsError(f'{file} does not exist: give a folder that lens.tuned_lens has written.')
    try:
        about = json.loads(file.read_text())
    except ValueError as e:
        raise TranslatorsError(f'{file} is not valid JSON ({e}): {AGAIN}.') from None
    if not isinstance(about, dict) or about.get('format') != FORMAT:
        raise TranslatorsError(f'{file} is not of format {FORMAT}: {AGAIN}.')
    return about


def read(directory: str | pathlib.Path, subject: TransformerConfig) -> tuple[np.ndarray, np.ndarray]:
    """(M_LxDxD = I + V, v_LxD) in float32; row vectors: T_i(h) = h @ M_i + v_i.

    Raises TranslatorsError unless the folder holds finite translators of the family and shape of `subject`.
    """
    directory = pathlib.Path(directory)
    theirs = _read_about(directory).get('subject')
    ours = {'family': subject.family, 'd_model': subject.d_model, 'n_layers': subject.n_layers}
    have = {k: theirs.get(k) for k in ours} if isinstance(theirs, dict) else {}
    if have != ours:
        other = ', '.join(f'{k}={v}' for k, v in have.items()) or 'no description of it'
        wanted = ', '.join(f'{k}={v}' for k, v in ours.items())
        raise TranslatorsError(
            f'{directory}/tuned_lens.json is of a subject with {other}, this one has {wanted}: train one for it.'
        )
    file, d = directory / 'translators.safetensors', subject.d_model
    stored = hf.read_tensors(file)
    for name, shape in {'weight': (subject.n_layers, d, d), 'bias': (subject.n_layers, d)}.items():
        x = stored.get(name)
        if x is None or x.shape != shape:
            found = f'{name} of shape {x.shape}' if x is not None else f'no {name}'
            raise TranslatorsError(f'{file} holds {found}, the subject needs {shape}: {AGAIN}.')
        if not np.isfinite(x).all():
            raise TranslatorsError(f'{file}: {name} holds values that are not finite: {AGAIN}.')
    return np.eye(d, dtype=np.float32) + stored['weight'].astype(np.float32), stored['bias'].astype(np.float32)


class Composition(NamedTuple):
    """y = x @ weight + bias. condition, rank: of the target's translator, which is inverted."""

    weight_DxD: np.ndarray
    bias_D: np.ndarray
    condition: float
    rank: int


def compose(m_LxDxD: np.ndarray, v_LxD: np.ndarray, source: int, target: int) -> Composition:
    """The affine map that sends hs[source] to hs[target], row vectors, float32: T_target(x @ W + b) = T_source(x).

    W = M_source @ pinv(M_target), b = (v_source - v_target) @ pinv(M_target); index L is the identity.
    Computed in float64. Singular values below d times the rounding of float32 (what M is stored in)
    count as zero; directions that they span are lost. Raises ValueError for an index outside 0..L.
    """
    n, d = v_LxD.shape
    if not (0 <= source <= n and 0 <= target <= n):
        raise ValueError(f'streams {source} and {target} are not both in 0..{n}')

    def translator(i):
        return (np.eye(d), np.zeros(d)) if i == n else (m_LxDxD[i].astype(np.float64), v_LxD[i].astype(np.float64))

    (m_source, v_source), (m_target, v_target) = translator(source), translator(target)
    u, s, vt = np.linalg.svd(m_target)
    rank = int(np.sum(s > s[0] * d * np.finfo(np.float32).eps))
    pinv = (vt[:rank].T / s[:rank]) @ u[:, :rank].T
    weight, bias = m_source @ pinv, (v_source - v_target) @ pinv
    condition = float(s[0] / s[-1]) if s[-1] else float('inf')
    return Composition(weight.astype(np.float32), bias.astype(np.float32), condition, rank)
