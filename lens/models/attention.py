"""Grouped-query causal attention: rotary positions, sliding windows, sinks, soft-cap, key/value cache.

Query heads are stored as (kv head K, group G): head index = k * G + g, the Hugging Face order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lens import sharding
from lens.models import lora, rope
from lens.models.norm import Norm, normal, zeros

# Scores of a long text are made for this many queries at a time: 4096 x 4096 of 64 heads would be 4 GB a row.
QUERY_CHUNK = 512
KEPT = ('q', 'k', 'v', 'mixed')  # what policies of rematerialisation know what is below by


class KVCache(NamedTuple):
    """Keys and values of the tokens at positions 0..S-1, BxSxKxh of one layer, LxBxSxKxh of several.

    Slots at and beyond the position of who looks at them are undefined.
    """

    k: jax.Array
    v: jax.Array

    def with_room(self, n: int) -> 'KVCache':
        """Adds n empty slots, of several layers."""
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, n), (0, 0), (0, 0))), self)

    def written(self, new: 'KVCache', start) -> 'KVCache':
        """Puts keys and values of the tokens at positions start.. into their slots, of several layers."""
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 2), self, new)


def softcap(x, cap: float):
    """Bounds x smoothly to -cap..cap, not at all where cap is 0 (Gemma-2)."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(q_BxTxKxGxh, k_BxSxKxh, v_BxSxKxh, mask, *, scale: float, cap: float = 0.0, sinks_KxG=None):
    """Computes softmax(scale q k) v under a boolean mask (True = may look); softmax in float32.

    mask: TxS, or Bx1x1xTxS where rows differ.
    sinks: one learned logit per query head that takes part in the softmax and carries no value.
    """
    scores = jnp.einsum('btkgh,bskh->bkgts', q_BxTxKxGxh, k_BxSxKxh, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, softcap(scores * scale, cap), -jnp.inf)
    if sinks_KxG is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = sinks_KxG.astype(jnp.float32)[:, :, None, None]
        top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
        weights = jnp.exp(scores - top)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top))
    return jnp.einsum('bkgts,bskh->btkgh', weights.astype(v_BxSxKxh.dtype), v_BxSxKxh)


def visible(slots_S, at, own, window):
    """Says which of the key slots a query sees, [..., S]: those before its position `at`, and its own.

    at, own: [...]. window: it sees so many, itself included; 0 = all; None where no layer has a window.
    """
    at, own = at[..., None], own[..., None]
    seen = slots_S < at
    if window is not None:
        seen &= (window == 0) | (slots_S > at - window)
    return seen | (slots_S == own)


def in_chunks(attend_rows, q_BxTxKxGxh, *places):
    """Applies attend_rows(q, *places) to QUERY_CHUNK queries at a time, recomputed in the backward pass.

    places: what else differs between queries, [T] or [B, T] each.
    """
    b, t, *heads = q_BxTxKxGxh.shape
    if t <= 2 * QUERY_CHUNK:
        return attend_rows(q_BxTxKxGxh, *places)
    n = -(-t // QUERY_CHUNK)
    pad = n * QUERY_CHUNK - t
    q = jnp.pad(q_BxTxKxGxh, ((0, 0), (0, pad), (0, 0), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(b, n, QUERY_CHUNK, *heads), 1, 0)
    places = [jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]) for x in places]
    places = [jnp.moveaxis(x.reshape(*x.shape[:-1], n, QUERY_CHUNK), -2, 0) for x in places]
    mixed = jax.lax.map(lambda rows: jax.checkpoint(attend_rows)(*rows), (q, *places))
    return jnp.moveaxis(mixed, 0, 1).reshape(b, n * QUERY_CHUNK, *heads)[:, :t]


class Attention(nnx.Module):
    def __init__(self, c, *, rngs: nnx.Rngs, dtype):
        d, k, g, h = c.d_model, c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim

        self.q = normal((d, k, g, h), d, rngs, dtype)
        self.k = normal((d, k, h), d, rngs, dtype)
        self.v = normal((d, k, h), d, rngs, dtype)
        self.o = normal((k, g, h, d), k * g * h * 2 * c.n_layers, rngs, dtype)
        self.q_bias = zeros((k, g, h), dtype, c.qkv_bias)
        self.k_bias = zeros((k, h), dtype, c.qkv_bias)
        self.v_bias = zeros((k, h), dtype, c.qkv_bias)
        self.o_bias = zeros(d, dtype, c.o_bias)
        self.q_norm = nnx.data(Norm(h, c.norm, dtype) if c.qk_norm else None)
        self.k_norm = nnx.data(Norm(h, c.norm, dtype) if c.qk_norm else None)
        self.sinks = zeros((k, g), dtype, c.sinks)

    @jax.named_scope('attention')
    def __call__(self, x_BxTxD, layer, positions, c, past: KVCache | None, adapters):
        """Tokens at positions 0..T-1, which see each other; with `past`, tokens at `positions` [T] or [B, T], each of
        which sees what of `past` is before it, and itself alone.

        Returns (output BxTxD, their own keys and values).
        """
        q, k, v = map(checkpoint_name, self._project(x_BxTxD, layer, positions, c, adapters), KEPT[:3])
        own, out = positions, KVCache(k, v)
        if past is not None:
            own = past.k.shape[1] + jnp.arange(x_BxTxD.shape[1])
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(past, out, strict=True))
        slots_S = jnp.arange(k.shape[1])
        window = c.of_layer(c.windows, layer) if any(c.windows) else None
        sinks = None if self.sinks is None else self.sinks[...]
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale

        def attend_rows(q, at, own_T):
            mask = visible(slots_S, at, own_T, window)
            mask = mask if mask.ndim == 2 else mask[:, None, None]
            return attend(q, k, v, mask, scale=scale, cap=c.attn_softcap, sinks_KxG=sinks)

        mixed = checkpoint_name(in_chunks(attend_rows, q, positions, own), KEPT[3])
        y = lora.project('btkgh,kghd->btd', mixed, self.o, adapters, 'o', sharding.ACT, bias=self.o_bias)
        return y, out

    def _project(self, x_BxTxD, layer, positions, c, adapters):
        """Queries BxTxKxGxh, keys and values BxTxKxh; queries and keys normed and rotated."""
        q = lora.project('btd,dkgh->btkgh', x_BxTxD, self.q, adapters, 'q', bias=self.q_bias)
        k = lora.project('btd,dkh->btkh', x_BxTxD, self.k, adapters, 'k', bias=self.k_bias)
        v = lora.project('btd,dkh->btkh', x_BxTxD, self.v, adapters, 'v', bias=self.v_bias)
        if c.qk_norm:
            q, k = self.q_norm(q, c.norm_eps), self.k_norm(k, c.norm_eps)
        if c.ropes:
            sin, cos = rope.tables(positions, c.ropes, c.of_layer(c.layer_rope, layer), c.head_dim)
            q, k = rope.rotate(q, sin, cos), rope.rotate(k, sin, cos)
        return q, k, v
