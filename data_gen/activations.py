"""Activations of documents at their drawn or labelled positions, read by the subject.

Dimension letters: R documents, V positions, D width.
"""

import numpy as np

from lens import widths
from lens.errors import LensError

from .label_prompts import Part

BATCH_TOKENS = 1 << 14  # of documents that are read together


def config_of(subject: str, layer: int):
    """Reads the configuration of a subject that has a block `layer`. Raises LensError."""
    from lens import hf

    config = hf.read_config(hf.local_directory(subject, weights=False))
    if not 0 <= layer < config.n_layers:
        raise LensError(f'--layer={layer} is not a block of the subject, which has blocks 0..{config.n_layers - 1}.')
    return config


class Reader:
    """The subject, and its stream after block `layer`. dtype: name of a float type; auto: float32 on a CPU, else bfloat16.

    Raises LensError where the model cannot be loaded.
    """

    def __init__(self, subject: str, layer: int, *, dtype: str = 'auto', mesh_model: int = 1):
        import jax

        from lens import hf, sharding
        from lens.config import DTYPES
        from lens.models.subject import activations

        self.mesh = sharding.make_mesh(1, mesh_model)
        auto = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
        with jax.set_mesh(self.mesh):
            self.base = hf.load_model(subject, mesh=self.mesh, dtype=DTYPES[auto if dtype == 'auto' else dtype])
        self.read = jax.jit(activations, static_argnums=3)
        self.layer, self.put, self.set_mesh = layer, sharding.put_batch, jax.set_mesh

    def __call__(self, part: Part, rows: np.ndarray) -> np.ndarray:
        """Returns the activations of some documents at their positions, [R, V, D] float32; anything where there is none."""
        lengths, out = part.positions[rows].max(1) + 1, None
        for width, some, padded in widths.batches(lengths, part.split.tokens.shape[1], BATCH_TOKENS):
            pick = rows[padded]
            batch = {'tokens': np.asarray(part.split.tokens[pick, :width], np.int32)}
            batch['positions'] = np.maximum(part.positions[pick], 0)
            with self.set_mesh(self.mesh):
                batch = self.put(batch, self.mesh)
                a = self.read(self.base, batch['tokens'], batch['positions'], self.layer)
            a = np.asarray(a.astype(np.float32))
            out = np.zeros((len(rows), *a.shape[1:]), np.float32) if out is None else out
            out[some] = a[: len(some)]
        return out
