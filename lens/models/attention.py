"""Grouped-query causal attention with rotary positions and a key/value cache.

Query heads are stored as (kv head K, group G): head index = k * G + g, the Hugging Face order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lens import sharding
from lens.models import lora


class KVCache(NamedTuple):
    """Keys and values of all layers; slots at and beyond the current position are undefined."""

    k_LxBxSxKxh: jax.Array
    v_LxBxSxKxh: jax.Array


def rope_tables(positions_T: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """(sin, cos), each [T, head_dim/2] in float32: angle = position * theta^(-2i/head_dim)."""
    freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_T.astype(jnp.float32)[:, None] * freq
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x_BxTxNxh: jax.Array, sin_Txi: jax.Array, cos_Txi: jax.Array) -> jax.Array:
    """Rotary embedding, half-split layout (dimension i pairs with i + h/2); any head axes between T and h."""
    extra = (1,) * (x_BxTxNxh.ndim - 3)
    sin, cos = (t.reshape(t.shape[0], *extra, t.shape[1]) for t in (sin_Txi, cos_Txi))
    a, b = jnp.split(x_BxTxNxh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxNxh.dtype)


def attend(q_BxTxKxGxh, k_BxSxKxh, v_BxSxKxh, mask_TxS) -> jax.Array:
    """softmax(q k / sqrt(h)) v under a boolean mask (True = may look); scores in float32."""
    scores = jnp.einsum('btkgh,bskh->bkgts', q_BxTxKxGxh, k_BxSxKxh, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_TxS, scores * q_BxTxKxGxh.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxSxKxh.dtype)
    return jnp.einsum('bkgts,bskh->btkgh', weights, v_BxSxKxh)


class Attention(nnx.Module):
    def __init__(self, c, *, rngs: nnx.Rngs, dtype):
        d, k, g, h = c.d_model, c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim

        def init(shape, fan_in):
            return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)

        self.q = init((d, k, g, h), d)
        self.k = init((d, k, h), d)
        self.v = init((d, k, h), d)
        self.o = init((k, g, h, d), k * g * h * 2 * c.n_layers)

    def __call__(self, x_BxTxD, layer, start, c, cache: KVCache | None, adapters):
        """Positions start..start+T-1. With a cache, writes them into layer `layer` of it and looks at
        all earlier slots. Returns (output BxTxD, cache)."""
        t = x_BxTxD.shape[1]
        q = lora.project('btd,dkgh->btkgh', x_BxTxD, self.q[...], adapters, 'q')
        k = lora.project('btd,dkh->btkh', x_BxTxD, self.k[...], adapters, 'k')
        v = lora.project('btd,dkh->btkh', x_BxTxD, self.v[...], adapters, 'v')
        positions_T = start + jnp.arange(t)
        sin, cos = rope_tables(positions_T, c.head_dim, c.rope_theta)
        q, k = rotate(q, sin, cos), rotate(k, sin, cos)
        if cache is not None:
            at = (layer, 0, start, 0, 0)
            cache = KVCache(
                jax.lax.dynamic_update_slice(cache.k_LxBxSxKxh, k[None], at),
                jax.lax.dynamic_update_slice(cache.v_LxBxSxKxh, v[None], at),
            )
            k, v = cache.k_LxBxSxKxh[layer], cache.v_LxBxSxKxh[layer]
            keys_S = jnp.arange(k.shape[1])
        else:
            keys_S = positions_T
        mixed = attend(q, k, v, keys_S <= positions_T[:, None])
        return lora.project('btkgh,kghd->btd', mixed, self.o[...], adapters, 'o', sharding.ACT), cache
