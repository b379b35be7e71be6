"""Grouped-query causal attention: rotary positions, sliding windows, sinks, soft-cap, key/value cache.

Query heads are stored as (kv head K, group G): head index = k * G + g, the Hugging Face order.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name

from lens import sharding
from lens.models import flash, lora, rope
from lens.models.norm import Norm, normal, zeros

# Scores of a long text are made for this many queries at a time: 4096 x 4096 of 64 heads would be 4 GB a row.
QUERY_CHUNK = 512
SLOTS = 8
KEPT = ('q', 'k', 'v', flash.NAME)  # what policies of rematerialisation know what is below by


class KVCache(struct.PyTreeNode):
    """Keys and values of `length` tokens at consecutive positions, BxKxSxh of one layer, LxBxKxSxh of several.

    length: None of one that is being filled. The slots that are left are padding, S a multiple of SLOTS: kernels for
    products would copy others to such a size first, at every layer and token.
    """

    k: jax.Array
    v: jax.Array
    length: int | None = struct.field(pytree_node=False)

    @property
    def slots(self) -> int:
        return self.k.shape[-2]

    def padded(self) -> 'KVCache':
        """Adds the slots that are missing to a multiple of SLOTS."""
        pad = [(0, 0)] * (self.k.ndim - 2) + [(0, -self.slots % SLOTS), (0, 0)]
        return jax.tree.map(lambda x: jnp.pad(x, pad), self)

    def after(self, shared: 'KVCache') -> 'KVCache':
        """Puts the tokens of a cache of R rows, each of which B / R contiguous rows of this one share, before its own."""

        def join(x, y):
            n, r, k, s, h = x.shape
            rows, heads = (sharding.like(y) or (None,) * 5)[1:3]
            one = sharding.out(sharding.P(None, rows, None, heads, None, None))
            x = jnp.broadcast_to(x[:, :, None], (n, r, y.shape[1] // r, k, s, h), out_sharding=one)
            return jnp.concatenate([x.reshape(*y.shape[:3], s, h, out_sharding=sharding.like(y)), y], axis=3)

        return KVCache(join(shared.k, self.k), join(shared.v, self.v), shared.length + self.length)

    def room(self, rows: int, length: int) -> 'KVCache':
        """Makes a cache to be filled with `length` tokens of `rows` rows, of the layers and heads of this one."""
        n, _, k, _, h = self.k.shape
        shape = n, rows, k, -(-max(length, 1) // SLOTS) * SLOTS, h
        k, v = (jnp.zeros(shape, x.dtype, out_sharding=sharding.like(x)) for x in (self.k, self.v))
        return KVCache(k, v, None)

    def written(self, new: 'KVCache', slot) -> 'KVCache':
        """Puts the tokens of `new` into the slots from `slot` on, of several layers."""
        k, v = (jax.lax.dynamic_update_slice_in_dim(x, y, slot, 3) for x, y in ((self.k, new.k), (self.v, new.v)))
        return KVCache(k, v, self.length)


def softcap(x, cap: float):
    """Bounds x smoothly to -cap..cap, not at all where cap is 0 (Gemma-2)."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(q_BxTxKxGxh, parts, *, scale: float, cap: float = 0.0, sinks_KxG=None):
    """Computes softmax(scale q k) v over all keys of `parts` under their masks; softmax in float32. BxTxKxGxh.

    parts: (name, keys RxKxSxh, values RxKxSxh, mask) each; True = may look. Rows that share keys are contiguous, B / R
    of them. mask: TxS, or Bx1x1xTxS where rows differ. Every query sees a key. Parts are not put together: a cache is
    read where it lies. name: a scope, how many of the keys are seen (lens.flops).
    sinks: one learned logit per query head that takes part in the softmax and carries no value.
    """
    q = jnp.moveaxis(q_BxTxKxGxh, 1, 3)
    names, keys, values, masks = zip(*parts, strict=True)
    scores = [_products(*x, 'rkqh,rksh->rkqs', jnp.float32) for x in zip(names, [q] * len(parts), keys, strict=True)]
    scores = [jnp.where(m, softcap(x * scale, cap), -jnp.inf) for x, m in zip(scores, masks, strict=True)]
    top = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x in scores))
    sink = None if sinks_KxG is None else sinks_KxG.astype(jnp.float32)[:, :, None, None]
    top = jax.lax.stop_gradient(top if sink is None else jnp.maximum(top, sink))
    weights = [jnp.exp(x - top) for x in scores]
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    total = total if sink is None else total + jnp.exp(sink - top)
    weights = [(w / total).astype(v.dtype) for w, v in zip(weights, values, strict=True)]
    mixed = [_products(*x, 'rkqs,rksh->rkqh') for x in zip(names, weights, values, strict=True)]
    return jnp.moveaxis(sum(mixed), 3, 1)


def _products(name: str, x_BxKxGxTxi, y_RxKxSxh, spec: str, dtype=None):
    """Products of the queries of a row and head with its keys or values, BxKxGxTxo: all queries that share keys as the rows
    of one matrix, which no kernel has to transpose. Every reshape says where its result lives: among axes of one element JAX
    would guess."""
    rows, of_x = len(y_RxKxSxh), sharding.like(x_BxKxGxTxi)
    apart, joined = of_x and sharding.P(of_x[0], None, *of_x[1:]), of_x and sharding.P(*of_x[:2], None, None)
    x = x_BxKxGxTxi.reshape(rows, -1, *x_BxKxGxTxi.shape[1:], out_sharding=apart)
    x = jnp.moveaxis(x, 1, 2)
    with jax.named_scope(name):
        one = x.reshape(rows, x.shape[1], -1, x.shape[-1], out_sharding=joined)
        y = jnp.einsum(spec, one, y_RxKxSxh, preferred_element_type=dtype)
    y = jnp.moveaxis(y.reshape(*x.shape[:-1], -1, out_sharding=sharding.like(x)), 2, 1)
    return y.reshape(*x_BxKxGxTxi.shape[:-1], -1, out_sharding=of_x)


def seen_before(at, first: int, cache: KVCache, window):
    """Says which slots of `cache`, whose tokens stand at positions from `first` on, a query at `at` [...] sees,
    [..., S]: those of tokens before it. window: it sees so many, itself included; 0 = all; None: no layer has one."""
    slots_S = jnp.arange(cache.slots)
    seen = first + slots_S < at[..., None]
    if cache.length is not None:
        seen &= slots_S < cache.length
    return seen if window is None else seen & ((window == 0) | (first + slots_S > at[..., None] - window))


def seen_beside(own_T, n: int, together: bool, window):
    """Says which of the n tokens of a call the token own_T, of their order, sees, TxS: itself, and with `together` those
    before it."""
    order_S, own_Tx1 = jnp.arange(n), own_T[:, None]
    if not together:
        return order_S == own_Tx1
    seen = order_S <= own_Tx1
    return seen if window is None else seen & ((window == 0) | (order_S > own_Tx1 - window))


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
    def __call__(self, x_BxTxD, layer, positions, together, c, past: Sequence[KVCache], adapters):
        """Tokens at `positions`, [T] or [B, T], which see what of `past` is before them, each itself, and with `together`
        (then their positions are consecutive) those before it.

        past: of the tokens from position 0 on, one part after the other. Returns (output BxTxD, their own keys and
        values).
        """
        q, k, v = map(checkpoint_name, self._project(x_BxTxD, layer, positions, c, adapters), KEPT[:3])
        n = x_BxTxD.shape[1]
        out = KVCache(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), n)
        first = [0, *itertools.accumulate(part.length for part in past[:-1])]
        names = [f'filling_{p.slots}_keys' if p.length is None else f'before_{p.length}_keys' for p in past]
        window = c.of_layer(c.windows, layer) if any(c.windows) else None
        sinks = None if self.sinks is None else self.sinks[...]
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale

        def attend_rows(q, at, own_T):
            masks = [seen_before(at, i, part, window) for i, part in zip(first, past, strict=False)]
            masks = [m if m.ndim == 2 else m[:, None, None] for m in masks]
            parts = [(name, part.k, part.v, mask) for name, part, mask in zip(names, past, masks, strict=True)]
            parts.append((f'beside_{n}_keys', out.k, out.v, seen_beside(own_T, n, together, window)))
            return attend(q, parts, scale=scale, cap=c.attn_softcap, sinks_KxG=sinks)

        if not past and together and flash.takes(q, c):
            mixed = flash.attend(q, k, v, layer, c, scale=scale, sinks_KxG=sinks)
        else:
            mixed = checkpoint_name(in_chunks(attend_rows, q, positions, jnp.arange(n)), KEPT[3])
        y = lora.project(mixed, self.o, adapters, 'o', sharding.ACT, bias=self.o_bias)
        return y, out

    def _project(self, x_BxTxD, layer, positions, c, adapters):
        """Queries BxTxKxGxh, keys and values BxTxKxh; queries and keys normed and rotated."""
        for_q, for_k, for_v = lora.apart(x_BxTxD, x_BxTxD, x_BxTxD)
        q = lora.project(for_q, self.q, adapters, 'q', bias=self.q_bias)
        k = lora.project(for_k, self.k, adapters, 'k', bias=self.k_bias)
        v = lora.project(for_v, self.v, adapters, 'v', bias=self.v_bias)
        if c.qk_norm:
            q, k = self.q_norm(q, c.norm_eps), self.k_norm(k, c.norm_eps)
        if c.ropes:
            sin, cos = rope.tables(positions, c.ropes, c.of_layer(c.layer_rope, layer), c.head_dim)
            q, k = rope.rotate(q, sin, cos), rope.rotate(k, sin, cos)
        return q, k, v
