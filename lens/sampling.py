"""Drawing explanations: prefill once per activation, group members share it, cached decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import losses, sharding
from lens.models import decoder as dec
from lens.models.attention import KVCache
from lens.models.subject import tile_rows
from lens.models.transformer import model_of

ROWS = sharding.rows(2)


class Samples(NamedTuple):
    """Explanations ids_NxT with their log-probabilities logp_NxT; rows of one activation contiguous."""

    ids_NxT: jax.Array
    logp_NxT: jax.Array


def noise(key, t, shape: tuple[int, int]):
    """Draws standard Gumbel noise NxV for token t, the same on every mesh. key: one, or one for each row [N]."""
    if key.ndim:
        return jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, t), shape[1:], jnp.float32))(key)
    return jax.random.gumbel(jax.random.fold_in(key, t), shape, jnp.float32, out_sharding=sharding.out(ROWS))


def perturbed(logits_NxV, key, t, temperature_N):
    """Adds temperature * noise of token t: what its id is the argmax of."""
    temperature_N = sharding.reshard(temperature_N, sharding.rows(1))
    return logits_NxV + temperature_N[:, None] * noise(key, t, logits_NxV.shape)


def draw(decoder, base, logits_NxV, prompt: KVCache, key, *, length: int, temperature_N, keep):
    """Draws `length` tokens a row after a prompt of which prefill gave logits, keys and values.

    Returns (ids NxT, keep(logits NxV, ids N) of every token on a second axis, the cache without the last token).
    """
    model = model_of(decoder, base)
    kept = jax.eval_shape(lambda x: keep(x, jnp.argmax(x, axis=-1)), logits_NxV)
    shape = (len(logits_NxV), length, *kept.shape[1:])
    kept = jnp.zeros(shape, kept.dtype, out_sharding=sharding.out(sharding.rows(len(shape))))

    def token(logits, kept, t):
        ids_N = jnp.argmax(perturbed(logits, key, t, temperature_N), axis=-1).astype(jnp.int32)
        return ids_N, jax.lax.dynamic_update_index_in_dim(kept, keep(logits, ids_N), t, 1)

    def body(carry, t):
        logits, cache, kept = carry
        ids_N, kept = token(logits, kept, t)
        logits, written = dec.step(decoder, base, model.lookup(ids_N[:, None]), cache, t)
        return (logits, cache.written(written, decoder.prompt_len + t), kept), ids_N

    carry = logits_NxV, prompt.with_room(length - 1), kept
    (logits, cache, kept), ids_TxN = jax.lax.scan(body, carry, jnp.arange(length - 1))
    last_N, kept = token(logits, kept, length - 1)
    return jnp.concatenate([ids_TxN.T, last_N[:, None]], axis=1), kept, cache


def sample(decoder, base, activation_BxD, key, *, length: int, group: int = 1, temperature=1.0) -> Samples:
    """Draws exactly `length` tokens for each activation, `group` times: N = B * group rows.

    Exact draws from softmax(logits / temperature) as argmax(logits + temperature * Gumbel noise), so 0
    is greedy; a number, or one per activation [B]. logp is at temperature 1. The noise of a row depends
    on key, step and row alone: every mesh draws the same tokens from the same logits.
    """
    temperature_B = sharding.reshard(jnp.broadcast_to(temperature, activation_BxD.shape[:1]), sharding.rows(1))
    logits_BxV, prompt = dec.prefill(decoder, base, activation_BxD)
    prompt = jax.tree.map(lambda x: jnp.repeat(x, group, axis=1, out_sharding=sharding.like(x)), prompt)
    logits_NxV, temperature_N = tile_rows(logits_BxV, group), tile_rows(temperature_B, group)
    keep = losses.token_log_probs
    ids, logp, _ = draw(decoder, base, logits_NxV, prompt, key, length=length, temperature_N=temperature_N, keep=keep)
    return Samples(ids, logp)
