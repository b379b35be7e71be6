"""activation -> text: the slot, the maps, the soft prompt, prefill and teacher-forced scoring.

The prompt is [left, slot, right]; `right` may hold further slots. How the activation enters them is one of
injection.FAMILIES. With `affine`, map k sends the activation into the stream entering block k; the stream at
the slot is overwritten there for the first N blocks, and later tokens see it through the key/value cache only.
With N = 0 the one map fills the slot at the input. What the prompt is made of is in the units of the embedding
table (before Gemma's scale and GPT-2's positions), what is written at the entrance of a block in those of the
stream.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lens import losses, sharding
from lens.models import injection
from lens.models.attention import KVCache
from lens.models.transformer import Transformer, model_of


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """layer: the block that the activation is from.

    patched_blocks N: blocks whose slot is overwritten (affine). norm: of the row in the slot (replace), in units
    of the stream. marker: id of the token in the slots. more_slots: rows of `right` that are slots as well.
    """

    patched_blocks: int
    shared_map: bool
    layer: int
    injection: str = 'affine'
    norm: float = 0.0
    marker: int = 0
    more_slots: tuple[int, ...] = ()

    @property
    def n_maps(self) -> int:
        return 1 if self.shared_map else max(self.patched_blocks, 1)


class Prompt(NamedTuple):
    """Token ids left and right of the first slot; more_slots and marker as in DecoderConfig."""

    left: list[int]
    right: list[int]
    more_slots: tuple[int, ...] = ()
    marker: int = 0


class Decoder(nnx.Module):
    """What the decoder trains: maps, soft prompt, and its own base or adapters where asked for.

    maps: (W [maps, d, d], b [maps, d]) of affine at the start; None in the other families. positions: whether
    an activation loses a position vector, of a trained copy of the table, before it enters (GPT-2).
    """

    def __init__(
        self,
        c: DecoderConfig,
        left_ids,
        right_ids,
        base: Transformer,
        maps,
        *,
        own_base: bool,
        adapters: dict | None,
        positions: bool = False,
    ):
        self.config = c
        self.maps_w, self.maps_b = (nnx.data(x if x is None else nnx.Param(x)) for x in maps or (None, None))
        self.prompt_left = nnx.Param(base.embedding_rows(left_ids).astype(jnp.float32))
        self.prompt_right = nnx.Param(base.embedding_rows(right_ids).astype(jnp.float32))
        self.positions = nnx.data(nnx.Param(base.positions[...].astype(jnp.float32)) if positions else None)
        self.base = nnx.data(jax.tree.map(lambda x: x.astype(jnp.float32), base) if own_base else None)
        self.adapters = nnx.data(adapters)

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_left) + 1 + len(self.prompt_right)

    @property
    def slots(self) -> tuple[int, ...]:
        first = len(self.prompt_left)
        return (first, *(first + 1 + i for i in self.config.more_slots))


def scaled_identity(c: DecoderConfig, embed_scale: float, d_model: int, norms):
    """Maps (W, b) that start as the identity times the ratio of mean norms, the scale of consistency lenses.

    norms: hs norms of the base, [n_layers + 1] (subject.stream_norms): map k is scaled by
    norms[k] / norms[layer + 1]; with N = 0, where the model's input scale comes after it, by that much less.
    """
    ratio = norms[: c.n_maps] / norms[c.layer + 1] / (1.0 if c.patched_blocks else embed_scale)
    return ratio[:, None, None] * jnp.eye(d_model, dtype=jnp.float32), jnp.zeros((c.n_maps, d_model), jnp.float32)


def centred(decoder: Decoder, activation_NxD, position_N):
    """What the decoder reads of an activation: without the vector of its position where it has a table of them."""
    if decoder.positions is None:
        return activation_NxD
    return activation_NxD - decoder.positions[...].at[position_N].get(out_sharding=sharding.like(activation_NxD))


def prompt_rows(decoder: Decoder, model: Transformer, activation_BxD):
    """(prompt rows BxPxD in the units of the embedding table, before_block hook)."""
    c, slots = decoder.config, decoder.slots
    dtype = model.embedding.dtype
    a = activation_BxD.astype(jnp.float32)

    def rows(p_LxD):
        shape = (a.shape[0], *p_LxD.shape)
        return jnp.broadcast_to(p_LxD, shape, out_sharding=sharding.out(sharding.ACT)).astype(dtype)

    def spread(value_BxD):
        return jnp.broadcast_to(value_BxD[:, None], (len(a), len(slots), a.shape[-1]))

    hook = None
    if c.injection == 'affine':
        maps_NxBxD = jnp.einsum('bd,nde->nbe', a, sharding.gathered(decoder.maps_w[...])) + decoder.maps_b[...][:, None]
        entry = maps_NxBxD[0]
    elif c.injection == 'replace':
        entry = injection.fixed_norm(a, c.norm) / model.config.embed_scale
    else:
        marker = jax.lax.stop_gradient(model.embedding_rows([c.marker]))
        entry = jnp.broadcast_to(marker, a.shape, out_sharding=sharding.like(a))
    x = jnp.concatenate(
        [rows(decoder.prompt_left[...]), entry[:, None].astype(dtype), rows(decoder.prompt_right[...])], axis=1
    )
    if c.more_slots:
        x = injection.overwrite(x, slots, spread(entry))

    def patch(x_BxTxD, i):
        value = maps_NxBxD[jnp.minimum(i, len(maps_NxBxD) - 1)]
        return jnp.where(i < c.patched_blocks, injection.overwrite(x_BxTxD, slots, spread(value)), x_BxTxD)

    def add(x_BxTxD, i):
        return jnp.where(i == injection.ADD_BLOCK, injection.add_norm_matched(x_BxTxD, slots, spread(a)), x_BxTxD)

    if c.injection == 'affine' and c.patched_blocks:
        hook = patch
    elif c.injection == 'add':
        hook = add
    return x, hook


def prefill(decoder: Decoder, base: Transformer, activation_BxD, length: int) -> tuple[jax.Array, KVCache]:
    """Runs the prompt. Returns next-token logits BxV and a cache with room for `length` more tokens."""
    model = model_of(decoder, base)
    x, hook = prompt_rows(decoder, model, activation_BxD)
    cache = model.empty_cache(len(x), x.shape[1] + length)
    x, cache = model.run_layers_cached(
        model.enter(x), 0, model.config.n_layers, cache, 0, adapters=decoder.adapters, before_block=hook
    )
    return model.logits(x[:, -1:])[:, 0], cache


def step(decoder: Decoder, base: Transformer, ids_B, cache: KVCache, t) -> tuple[jax.Array, KVCache]:
    """One generated token at index t. Returns the logits of the next one, BxV, and the cache."""
    model = model_of(decoder, base)
    start = decoder.prompt_len + t
    x, cache = model.run_layers_cached(
        model.embed(ids_B[:, None], start), 0, model.config.n_layers, cache, start, adapters=decoder.adapters
    )
    return model.logits(x)[:, 0], cache


def teacher_forced_logits(decoder: Decoder, base: Transformer, activation_BxD, ids_BxT) -> jax.Array:
    """Logits BxTxV of every token of given explanations."""
    model = model_of(decoder, base)
    x, hook = prompt_rows(decoder, model, activation_BxD)
    x = model.enter(jnp.concatenate([x, model.lookup(ids_BxT[:, :-1])], axis=1))
    x = model.run_layers(x, 0, model.config.n_layers, adapters=decoder.adapters, before_block=hook)
    return model.logits(x[:, decoder.prompt_len - 1 :])


def score(decoder: Decoder, base: Transformer, activation_BxD, ids_BxT) -> tuple[jax.Array, jax.Array]:
    """Teacher forcing: log-probabilities of the given tokens BxT and the entropy at each, BxT (nats)."""
    logits = teacher_forced_logits(decoder, base, activation_BxD, ids_BxT)
    return losses.token_log_probs(logits, ids_BxT), losses.entropy(logits)


def natural_logits(base: Transformer, prefix_P, ids_BxT):
    """The untouched base's logits BxTxV of every token of ids after the token ids `prefix_P`, no gradient."""
    shape = (ids_BxT.shape[0], len(prefix_P))
    prefix = jnp.broadcast_to(prefix_P, shape, out_sharding=sharding.out(sharding.rows(2)))
    x = base.embed(jnp.concatenate([prefix, ids_BxT[:, :-1]], axis=1))
    x = base.run_layers(x, 0, base.config.n_layers)[:, len(prefix_P) - 1 :]
    return jax.lax.stop_gradient(base.logits(x))
