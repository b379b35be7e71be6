"""activation -> text: the slot, the maps, the soft prompt, prefill and teacher-forced scoring.

The prompt is [left, slot, right]. Map k sends the activation into the stream entering block k; the
stream at the slot is overwritten there for the first N blocks, and later tokens see it through the
key/value cache only. With N = 0 the one map fills the slot at the input. What the prompt is made of is in
the units of the embedding table (before Gemma's scale and GPT-2's positions), what is written at the
entrance of a block in those of the stream.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lens import losses, sharding
from lens.models.attention import KVCache
from lens.models.subject import overwrite
from lens.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """patched_blocks N: blocks whose slot is overwritten. layer: the block that the activation is from."""

    patched_blocks: int
    shared_map: bool
    layer: int


class Decoder(nnx.Module):
    """What the decoder trains: maps, soft prompt, and its own base or adapters where asked for.

    norms: hs norms of the base, [n_layers + 1] (subject.stream_norms): map k starts as the identity
    scaled by norms[k] / norms[layer + 1]; with N = 0, where the model's input scale comes after it, by
    that much less.
    """

    def __init__(
        self, c: DecoderConfig, left_ids, right_ids, base: Transformer, norms, *, own_base: bool, adapters: dict | None
    ):
        self.config = c
        d = base.config.d_model
        n_maps = 1 if c.shared_map else max(c.patched_blocks, 1)
        ratio = norms[:n_maps] / norms[c.layer + 1] / (1.0 if c.patched_blocks else base.config.embed_scale)
        self.maps_w = nnx.Param(ratio[:, None, None] * jnp.eye(d, dtype=jnp.float32))
        self.maps_b = nnx.Param(jnp.zeros((n_maps, d), jnp.float32))
        self.prompt_left = nnx.Param(base.embedding_rows(left_ids).astype(jnp.float32))
        self.prompt_right = nnx.Param(base.embedding_rows(right_ids).astype(jnp.float32))
        self.base = nnx.data(jax.tree.map(lambda x: x.astype(jnp.float32), base) if own_base else None)
        self.adapters = nnx.data(adapters)

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_left) + 1 + len(self.prompt_right)


def _model(decoder: Decoder, base: Transformer) -> Transformer:
    return base if decoder.base is None else decoder.base


def _prompt(decoder: Decoder, model: Transformer, activation_BxD):
    """(prompt rows BxPxD in the units of the embedding table, before_block hook)."""
    c = decoder.config
    dtype = model.embedding.dtype
    a = activation_BxD.astype(jnp.float32)
    maps_NxBxD = jnp.einsum('bd,nde->nbe', a, decoder.maps_w[...]) + decoder.maps_b[...][:, None]
    slot = len(decoder.prompt_left)

    def rows(p_LxD):
        shape = (a.shape[0], *p_LxD.shape)
        return jnp.broadcast_to(p_LxD, shape, out_sharding=sharding.out(sharding.ACT)).astype(dtype)

    x = jnp.concatenate(
        [rows(decoder.prompt_left[...]), maps_NxBxD[0][:, None].astype(dtype), rows(decoder.prompt_right[...])],
        axis=1,
    )

    def hook(x_BxTxD, i):
        value = maps_NxBxD[jnp.minimum(i, len(maps_NxBxD) - 1)]
        return jnp.where(i < c.patched_blocks, overwrite(x_BxTxD, slot, value), x_BxTxD)

    return x, hook if c.patched_blocks else None


def prefill(decoder: Decoder, base: Transformer, activation_BxD, length: int) -> tuple[jax.Array, KVCache]:
    """Runs the prompt. Returns next-token logits BxV and a cache with room for `length` more tokens."""
    model = _model(decoder, base)
    x, hook = _prompt(decoder, model, activation_BxD)
    cache = model.empty_cache(len(x), x.shape[1] + length)
    x, cache = model.run_layers_cached(
        model.enter(x), 0, model.config.n_layers, cache, 0, adapters=decoder.adapters, before_block=hook
    )
    return model.logits(x[:, -1:])[:, 0], cache


def step(decoder: Decoder, base: Transformer, ids_B, cache: KVCache, t) -> tuple[jax.Array, KVCache]:
    """One generated token at index t. Returns the logits of the next one, BxV, and the cache."""
    model = _model(decoder, base)
    start = decoder.prompt_len + t
    x, cache = model.run_layers_cached(
        model.embed(ids_B[:, None], start), 0, model.config.n_layers, cache, start, adapters=decoder.adapters
    )
    return model.logits(x)[:, 0], cache


def teacher_forced_logits(decoder: Decoder, base: Transformer, activation_BxD, ids_BxT) -> jax.Array:
    """Logits BxTxV of every token of given explanations."""
    model = _model(decoder, base)
    x, hook = _prompt(decoder, model, activation_BxD)
    x = model.enter(jnp.concatenate([x, model.lookup(ids_BxT[:, :-1])], axis=1))
    x = model.run_layers(x, 0, model.config.n_layers, adapters=decoder.adapters, before_block=hook)
    return model.logits(x[:, decoder.prompt_len - 1 :])


def score(decoder: Decoder, base: Transformer, activation_BxD, ids_BxT) -> tuple[jax.Array, jax.Array]:
    """Teacher forcing: log-probabilities of the given tokens BxT and the entropy at each, BxT (nats)."""
    logits = teacher_forced_logits(decoder, base, activation_BxD, ids_BxT)
    return losses.token_log_probs(logits, ids_BxT), losses.entropy(logits)


def natural_log_probs(base: Transformer, prefix_P, ids_BxT):
    """The untouched base's log-probabilities of ids after the token ids `prefix_P`, BxT, no gradient."""
    prefix = jnp.broadcast_to(
        prefix_P, (ids_BxT.shape[0], len(prefix_P)), out_sharding=sharding.out(sharding.P('data', None))
    )
    logits = base(jnp.concatenate([prefix, ids_BxT[:, :-1]], axis=1))[:, len(prefix_P) - 1 :]
    return jax.lax.stop_gradient(losses.token_log_probs(logits, ids_BxT))
