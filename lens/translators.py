"""Residual translators of a tuned lens (Belrose et al. 2023): how they are read, and maps composed of them.

hs[i] is the stream entering block i. Activations are row vectors: T_i(h) = h @ M_i + v_i with
M_i = I + V_i, for i = 0..L-1; T_L is the identity. T_i(hs[i]) gives nearly the logits that hs[L] gives, and
has its typical norm. lens/tools/tuned_lens.py writes them:

DIR/translators.safetensors   weight: V [L, d, d], bias: v [L, d], float32
DIR/tuned_lens.json           subject, convention, held-out figures, how it was trained
"""

import pathlib

import numpy as np

from lens import files, tensor_files
from lens.errors import LensError, shown
from lens.models.transformer import TransformerConfig

FORMAT = 'lens-translators/1'
REMEDY = 'give a folder that lens.tools.tuned_lens has written'


def read(directory: str | pathlib.Path, subject: TransformerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns (M_LxDxD = I + V, v_LxD) in float32; row vectors: T_i(h) = h @ M_i + v_i.

    Raises LensError unless the folder holds finite translators of the family and shape of `subject`.
    """
    about, file = pathlib.Path(directory) / 'tuned_lens.json', pathlib.Path(directory) / 'translators.safetensors'
    if not about.exists() and (pickles := sorted(about.parent.glob('*.pt'))):
        raise LensError(
            f'{pickles[0]} is a pickle, which may run code and is not read: convert it to translators.safetensors and '
            'tuned_lens.json (see lens/translators.py), or train one with lens.tools.tuned_lens.'
        )
    stored = files.read_json(about, REMEDY)
    if stored.get('format') != FORMAT:
        raise LensError(f'{about} is not of format {FORMAT}: {REMEDY}.')
    ours = {'family': subject.family, 'd_model': subject.d_model, 'n_layers': subject.n_layers}
    theirs = stored.get('subject')
    theirs = {k: theirs.get(k) for k in ours} if isinstance(theirs, dict) else {}
    if theirs != ours:
        have, want = (
            shown(', '.join(f'{k}={v}' for k, v in x.items())) or 'no description of it' for x in (theirs, ours)
        )
        raise LensError(f'{about} is of a subject with {have}, this one has {want}: train one for it.')
    arrays, d = tensor_files.read_all(file), subject.d_model
    for name, shape in {'weight': (subject.n_layers, d, d), 'bias': (subject.n_layers, d)}.items():
        x = arrays.get(name)
        if x is None or x.shape != shape:
            found = f'{name} of shape {x.shape}' if x is not None else f'no {name}'
            raise LensError(f'{file} holds {found}, the subject needs {shape}: {REMEDY}.')
    return np.eye(d, dtype=np.float32) + arrays['weight'].astype(np.float32), arrays['bias'].astype(np.float32)


def compose(m_LxDxD: np.ndarray, v_LxD: np.ndarray, source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the affine map (W_DxD, b_D) of hs[source] to hs[target], row vectors: T_target(x @ W + b) = T_source(x).

    W = M_source @ pinv(M_target), b = (v_source - v_target) @ pinv(M_target); index L is the identity.
    float32, computed in float64. Singular values below d times the rounding of float32 (what M is stored in)
    count as zero; directions that they span are lost. Raises ValueError for an index outside 0..L.
    """
    n, d = v_LxD.shape
    if not (0 <= source <= n and 0 <= target <= n):
        raise ValueError(f'streams {source} and {target} are not both in 0..{n}')

    def translator(i):
        return (np.eye(d), np.zeros(d)) if i == n else (m_LxDxD[i].astype(np.float64), v_LxD[i].astype(np.float64))

    (m_source, v_source), (m_target, v_target) = translator(source), translator(target)
    inverse = np.linalg.pinv(m_target, rcond=d * np.finfo(np.float32).eps)
    weight, bias = m_source @ inverse, (v_source - v_target) @ inverse
    return weight.astype(np.float32), bias.astype(np.float32)
