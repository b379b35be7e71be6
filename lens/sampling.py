"""Drawing explanations: prefill once per activation, group members share it, cached decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import losses, sharding
from lens.models import decoder as dec
from lens.models.subject import tile_rows


class Samples(NamedTuple):
    """Explanations ids_NxT with their log-probabilities logp_NxT; rows of one activation contiguous."""

    ids_NxT: jax.Array
    logp_NxT: jax.Array


def noise(key, t, shape: tuple[int, int]):
    """Standard Gumbel noise NxV of token t, the same on every mesh. key: one, or one for each row [N]."""
    if key.ndim:
        return jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, t), shape[1:], jnp.float32))(key)
    place = sharding.out(sharding.rows(2))
    return jax.random.gumbel(jax.random.fold_in(key, t), shape, jnp.float32, out_sharding=place)


def sample(decoder, base, activation_BxD, key, *, length: int, group: int = 1, temperature=1.0) -> Samples:
    """Exactly `length` tokens for each activation, `group` times: N = B * group rows.

    Exact draws from softmax(logits / temperature) as argmax(logits + temperature * Gumbel noise), so 0
    is greedy; a number, or one per activation [B]. logp is at temperature 1. The noise of a row depends
    on key, step and row alone (on its own key where `key` has one for each [N]):
    every mesh draws the same tokens from the same logits.
    """
    temperature_B = sharding.reshard(jnp.broadcast_to(temperature, activation_BxD.shape[:1]), sharding.rows(1))
    temperature_Nx1 = tile_rows(temperature_B, group)[:, None]
    logits_BxV, cache = dec.prefill(decoder, base, activation_BxD, length)
    logits = tile_rows(logits_BxV, group)
    spec = sharding.like(cache.k_LxBxSxKxh)
    cache = jax.tree.map(lambda x: jnp.repeat(x, group, axis=1, out_sharding=spec), cache)

    def draw(logits_NxV, t):
        perturbed = logits_NxV + temperature_Nx1 * noise(key, t, logits_NxV.shape)
        ids = jnp.argmax(perturbed, axis=-1).astype(jnp.int32)
        return ids, losses.token_log_probs(logits_NxV, ids)

    def body(carry, t):
        logits, cache = carry
        ids, logp = draw(logits, t)
        logits, cache = dec.step(decoder, base, ids, cache, t)
        return (sharding.reshard(logits, sharding.rows(2)), cache), (ids, logp)

    (logits, cache), (ids, logp) = jax.lax.scan(body, (logits, cache), jnp.arange(length - 1))
    last_ids, last_logp = draw(logits, length - 1)
    return Samples(
        jnp.concatenate([ids.T, last_ids[:, None]], axis=1),
        jnp.concatenate([logp.T, last_logp[:, None]], axis=1),
    )
