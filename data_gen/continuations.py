"""What a subject would write next, at many positions of many documents: its most probable tokens.

A document is read once. Its keys and values are copied for every position, and the tokens that are written replace those
of the document from there on, so a token is asked as if it stood at the end of the text.

Dimension letters: B documents of a batch, S tokens of a row, V positions, R = B * V, D width, Q written tokens.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from lens import hf, widths
from lens.models.attention import KVCache
from lens.models.transformer import Transformer

ROWS = 32  # positions that are continued together
BATCH_TOKENS = 4096  # of documents that are read together
SHOWN_S = 20  # between two lines of progress


def load(subject: str) -> Transformer:
    """Loads a subject on one device, in the dtype that this kind of device multiplies fastest. Raises LensError."""
    return hf.load_model(subject, dtype=jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16)


@functools.partial(jax.jit, static_argnames='length')
def _continue(model: Transformer, tokens_BxS, positions_BxV, length: int):
    """int32 [B, V, Q] for positions 0..S-1-Q."""
    n, (b, v) = model.config.n_layers, positions_BxV.shape
    x, read = model.run_cached(model.embed(tokens_BxS), 0, n)
    last_Rx1xD = jnp.take_along_axis(x, positions_BxV.reshape(b, v, 1), axis=1).reshape(b * v, 1, -1)
    past, at_R = jax.tree.map(lambda k: jnp.repeat(k, v, axis=1), read.padded()), positions_BxV.reshape(-1)
    row_R = jnp.arange(b * v)

    def put(old_LxRxKxSxh, new_LxRxKx1xh, slot_R):
        return old_LxRxKxSxh.at[:, row_R, :, slot_R].set(jnp.moveaxis(new_LxRxKx1xh[:, :, :, 0], 1, 0))

    def token(carry, t):
        last_Rx1xD, past = carry
        id_R, here_R = jnp.argmax(model.logits(last_Rx1xD)[:, 0], axis=-1).astype(jnp.int32), at_R + 1 + t
        x_Rx1xD = jax.vmap(lambda i, p: model.embed(i[None, None], p)[0])(id_R, here_R)
        last_Rx1xD, new = model.run_cached_apart(x_Rx1xD, 0, n, past, here_R[:, None])
        return (last_Rx1xD, KVCache(put(past.k, new.k, here_R), put(past.v, new.v, here_R), past.length)), id_R

    _, ids_QxR = jax.lax.scan(token, (last_Rx1xD, past), jnp.arange(length))
    return ids_QxR.T.reshape(b, v, length)


def greedy(model: Transformer, split, positions_NxV: np.ndarray, length: int) -> dict[tuple[int, int], np.ndarray]:
    """Continues the documents of a split after every position >= 0 with up to `length` tokens: (row, column) -> ids.

    Documents of about one width are read together. A model with a table of positions writes none beyond it.
    """
    rows = np.flatnonzero((positions_NxV >= 0).any(1))
    need = positions_NxV.max(1) + 1 + length
    most = model.config.max_positions if model.positions is not None else np.iinfo(np.int32).max
    out, i, begun = {}, 0, time.monotonic()
    shown, together = begun, ROWS // positions_NxV.shape[1]
    for wide, some, padded in widths.batches(need[rows], most, BATCH_TOKENS, together):
        some, pick = rows[some], rows[padded]
        tokens = np.zeros((len(pick), wide), np.int32)
        given = np.asarray(split.tokens[pick, :wide])
        tokens[:, : given.shape[1]] = given
        ids = np.asarray(_continue(model, tokens, np.maximum(positions_NxV[pick], 0), length))
        for k, row in enumerate(some):
            for slot in np.flatnonzero(positions_NxV[row] >= 0):
                out[int(row), int(slot)] = ids[k, slot, : most - int(positions_NxV[row, slot])]
        i += len(some)
        if (now := time.monotonic()) - shown > SHOWN_S or i == len(rows):
            shown, left = now, (now - begun) * (len(rows) - i) / i
            eta = f'ETA {left // 60:.0f}:{left % 60:02.0f}'
            print(f'{i}/{len(rows)} documents of {split.directory} continued  {eta}', flush=True)
    return out
