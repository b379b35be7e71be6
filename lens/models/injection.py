"""How a vector enters a prompt: pure functions of a stream, its slots and the vectors.

affine   trained maps of the vector overwrite the slot at the input or at the entrance of the first N blocks
replace  the row of the slot at the input is the vector itself, rescaled to a fixed norm
add      the stream that leaves block 1 keeps its direction at the slot and gets the vector's beside it, norm-matched

`replace` and `add` are the families A and B of natural language autoencoders. They mark their slots in the
prompt by a token of its own, the marker.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

FAMILIES = ('affine', 'replace', 'add')
ADD_BLOCK = 2  # block at whose entrance `add` acts


def sites(ids: Sequence[int], marker: int, left: int | None = None, right: int | None = None) -> tuple[int, ...]:
    """Indices of the marker in `ids` that have neighbours, and these ones where they are given."""
    ids = np.asarray(ids)
    hit = ids[1:-1] == marker
    if left is not None:
        hit &= ids[:-2] == left
    if right is not None:
        hit &= ids[2:] == right
    return tuple((np.flatnonzero(hit) + 1).tolist())


def _at_slots(x_BxTxD, slots: tuple[int, ...], values_BxSxD):
    """(where a slot is [T, 1], the values spread over the positions BxTxD in float32)."""
    if len(slots) != values_BxSxD.shape[1]:
        raise ValueError(f'{len(slots)} slots for {values_BxSxD.shape[1]} vectors')
    hit_TxS = jnp.arange(x_BxTxD.shape[1])[:, None] == jnp.asarray(slots, jnp.int32)
    spread = jnp.einsum(
        'ts,bsd->btd', hit_TxS.astype(jnp.float32), values_BxSxD.astype(jnp.float32), precision='highest'
    )
    return hit_TxS.any(1)[:, None], spread


def overwrite(x_BxTxD, slots: tuple[int, ...], values_BxSxD):
    """x with the rows at the slots replaced by the values, one each."""
    hit, spread = _at_slots(x_BxTxD, slots, values_BxSxD)
    return jnp.where(hit, spread.astype(x_BxTxD.dtype), x_BxTxD)


def add_norm_matched(x_BxTxD, slots: tuple[int, ...], vectors_BxSxD):
    """h + |h| v / (|v| + 1e-9) at the slots; the vector is rounded to the dtype of the stream first."""
    hit, v = _at_slots(x_BxTxD, slots, vectors_BxSxD.astype(x_BxTxD.dtype))
    h = jnp.where(hit, x_BxTxD.astype(jnp.float32), 1.0)  # elsewhere any row with a norm that has a gradient
    size = jnp.linalg.norm(h, axis=-1, keepdims=True)
    added = size * v / (jnp.linalg.norm(jax.lax.stop_gradient(v), axis=-1, keepdims=True) + 1e-9)
    return jnp.where(hit, (h + added).astype(x_BxTxD.dtype), x_BxTxD)


def fixed_norm(v_NxD, norm: float):
    """v * norm / max(|v|, 1e-12): zero stays zero."""
    v = v_NxD.astype(jnp.float32)
    size = jnp.sqrt(jnp.maximum(jnp.sum(v**2, -1, keepdims=True), 1e-24))
    return v * (norm / size)
