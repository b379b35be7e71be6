"""activation -> text: the slots, the maps, the prompt, prefill and teacher-forced scoring.

The prompt is [left, slot, right]; `right` may hold further slots. `left` is the same for every activation: it runs once
where that spares more than it costs.
How the activation enters the slots is an object of injection.py; later tokens see it through the key/value cache only.
What the prompt is made of is in the units of the embedding table: before Gemma's scale and GPT-2's positions.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lens import sharding
from lens.models import injection
from lens.models.attention import KVCache
from lens.models.subject import tile_rows
from lens.models.transformer import Side, Transformer, TransformerConfig, model_of, prompt_of, rows_for

# Tokens on a device that a pass over the weights of its own has to spare: an H100 reads a parameter of bfloat16 in the time of
# 220 products with it (3 TB/s, 650 TFLOP/s).
PASS_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """layer: block of the activation that is reconstructed. more_slots: rows of `right` that are slots too. marker: id in
    them. layers: a block for each slot, whose activations stand there; (): that of `layer` in all."""

    injection: injection.Injection
    layer: int
    more_slots: tuple[int, ...] = ()
    marker: int = 0
    layers: tuple[int, ...] = ()


class Decoder(Side):
    """What the decoder trains: maps, and what every side does. Of `positions`, an activation loses its vector."""

    def __init__(
        self, c: DecoderConfig, left_ids, right_ids, base, maps, *, own_base, adapters, positions=False, compute=''
    ):
        """maps: (W MxDxD, b MxD) at the start, with c.layers those of each of K slots, (MxDxKxD, MxKxD); None for an injection
        without maps. The others: Side."""
        own = base if own_base else None
        super().__init__(left_ids, right_ids, base, own, adapters, positions, compute, c.injection.soft_prompts)
        self.config = c
        self.maps_w, self.maps_b = (nnx.data(x if x is None else nnx.Param(x)) for x in maps or (None, None))

    @property
    def prompt_len(self) -> int:
        return len(self.left_ids) + 1 + len(self.right_ids)

    @property
    def slots(self) -> tuple[int, ...]:
        """Gives the places of all slots, counted from the first."""
        return (0, *(1 + i for i in self.config.more_slots))


def scaled_identity(inject: injection.Injection, layer: int, embed_scale: float, d_model: int, norms):
    """Makes maps (W, b) that start as the identity times the ratio of mean norms, the scale of consistency lenses.

    norms: hs norms of the base, [n_layers + 1] (subject.stream_norms): map k is scaled by norms[k] / norms[layer + 1];
    where it fills the slot of the input, before the model's input scale, by that much less.
    """
    ratio = norms[: inject.n_maps] / norms[layer + 1] / (embed_scale if inject.at_input else 1.0)
    zero = jnp.zeros((inject.n_maps, d_model), jnp.float32)
    return ratio[:, None, None] * jnp.eye(d_model, dtype=jnp.float32), zero


def without_position(decoder: Decoder, activation_NxD, position_N):
    """Takes the vector of its position off each activation, where the decoder has a table of them."""
    if decoder.positions is None:
        return activation_NxD
    return activation_NxD - decoder.positions[...].at[position_N].get(out_sharding=sharding.like(activation_NxD))


def prompt_rows(decoder: Decoder, model: Transformer, activation_BxD):
    """Makes (rows of the prompt from the first slot on, BxQxD in the units of the embedding table; before_block hook).
    activation: one for all slots, or BxKxD, one for each of K, as it is with `layers`."""
    n, dtype = len(activation_BxD), model.dtype
    slot_BxD, hook = decoder.config.injection.enter(decoder, model, activation_BxD.astype(jnp.float32))
    right = rows_for(n, prompt_of(decoder, model)[1], dtype)
    first_BxD = slot_BxD if slot_BxD.ndim == 2 else slot_BxD[:, 0]
    x = jnp.concatenate([first_BxD[:, None].astype(dtype), right], axis=1)
    return (injection.overwrite(x, decoder.slots, slot_BxD) if decoder.config.more_slots else x), hook


def _begin(decoder: Decoder, model: Transformer, activation_BxD, apart: bool):
    """Makes (rows of the prompt, place of the first one, caches of those before it, hook). apart: what stands left of the
    slots, the same for all rows, runs by itself, once on each device."""
    x, hook = prompt_rows(decoder, model, activation_BxD)
    n, left_QxD = len(decoder.left_ids), prompt_of(decoder, model)[0]
    if not n:
        return x, 0, (), hook
    if apart:
        once = model.enter(rows_for(sharding.shards(*sharding.ROW_AXES), left_QxD, model.dtype))
        return x, n, (model.run_cached(once, 0, model.config.n_layers, adapters=decoder.adapters)[1],), hook
    x = jnp.concatenate([rows_for(len(x), left_QxD, model.dtype), x], axis=1)
    return x, 0, (), hook and (lambda x, block: jnp.concatenate([x[:, :n], hook(x[:, n:], block)], axis=1))


def _left_is_worth_a_pass(decoder: Decoder, c: TransformerConfig, rows: int) -> bool:
    """Tells whether the prompt left of the slots is enough tokens in `rows`. Few tokens are multiplied by all experts."""
    least = PASS_TOKENS * c.n_experts // c.top_k if c.n_experts else PASS_TOKENS
    return rows // sharding.shards(*sharding.ROW_AXES) * len(decoder.left_ids) > least


def _prompt(decoder: Decoder, base: Transformer, activation_BxD, apart: bool) -> tuple[jax.Array, KVCache]:
    """Runs the prompt: the stream that leaves its last token, Bx1xD, and its keys and values. apart: see `_begin`."""
    model = model_of(decoder, base)
    x, start, before, hook = _begin(decoder, model, activation_BxD, apart)
    how = {'adapters': decoder.adapters, 'before_block': hook}
    x, cache = model.run_cached(model.enter(x, start), 0, model.config.n_layers, before, start, **how)
    return x[:, -1:], functools.reduce(KVCache.after, before, cache).padded()


@jax.named_scope('prefill')
def prefill(decoder: Decoder, base: Transformer, activation_BxD) -> tuple[jax.Array, KVCache]:
    """Runs the prompt. Returns the logits of the first token, BxV, and the prompt's keys and values."""
    x, cache = _prompt(decoder, base, activation_BxD, True)
    return _logits(model_of(decoder, base), x), cache


@jax.named_scope('decode')
def step(decoder: Decoder, base: Transformer, row_Nx1xD, past: Sequence[KVCache], t) -> tuple[jax.Array, KVCache]:
    """Reads generated token t, a row of the decoder's table. Returns the logits of the next one, NxV, and the token's
    own keys and values. past: of the prompt, which rows may share, and of the tokens before."""
    x, written = _continued(decoder, base, row_Nx1xD, past, t)
    return _logits(model_of(decoder, base), x), written


def _logits(model: Transformer, x_Nx1xD):
    """Of one token a row, NxV by rows."""
    return sharding.reshard(model.logits(x_Nx1xD)[:, 0], sharding.rows(2))


def _continued(decoder: Decoder, base: Transformer, rows_NxTxD, past: Sequence[KVCache], t=0):
    """Runs generated tokens t.. after the prompt and those before: their stream NxTxD, keys and values."""
    model, start = model_of(decoder, base), decoder.prompt_len + t
    x = model.enter(rows_NxTxD, start)
    return model.run_cached(x, 0, model.config.n_layers, past, start, adapters=decoder.adapters)


@jax.named_scope('score')
def teacher_forced(decoder: Decoder, base: Transformer, activation_BxD, ids_NxT) -> jax.Array:
    """Computes the stream NxTxD before final norm and head that every token of given explanations is drawn from.

    The N / B explanations of an activation are contiguous and share its prompt, which runs once; where there is one, prompt
    and words are one run, whose weights have one gradient to be summed over the devices.
    """
    model, group = model_of(decoder, base), len(ids_NxT) // len(activation_BxD)
    words_NxTxD = model.lookup(ids_NxT[:, :-1])
    if group == 1:
        apart = _left_is_worth_a_pass(decoder, model.config, len(ids_NxT))
        x, start, before, hook = _begin(decoder, model, activation_BxD, apart)
        x, how = jnp.concatenate([x, words_NxTxD], axis=1), {'adapters': decoder.adapters, 'before_block': hook}
        x = model.run_layers(model.enter(x, start), 0, model.config.n_layers, before, start, **how)
        return x[:, decoder.prompt_len - 1 - start :]
    first_Bx1xD, prompt = _prompt(decoder, base, activation_BxD, False)
    rest, _ = _continued(decoder, base, words_NxTxD, (prompt,))
    return jnp.concatenate([tile_rows(first_Bx1xD, group), rest], axis=1)


@jax.named_scope('natural')
def natural(base: Transformer, prefix_Q, ids_BxT):
    """Computes the untouched base's stream BxTxD for each token of ids after those of `prefix_Q`, no gradient."""
    shape = (ids_BxT.shape[0], len(prefix_Q))
    prefix = jnp.broadcast_to(prefix_Q, shape, out_sharding=sharding.out(sharding.rows(2)))
    x = base.embed(jnp.concatenate([prefix, ids_BxT[:, :-1]], axis=1))
    return jax.lax.stop_gradient(base.run_layers(x, 0, base.config.n_layers)[:, len(prefix_Q) - 1 :])
