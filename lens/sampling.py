"""Drawing explanations: prefill once per activation, group members share it, cached decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import draws, losses, sharding
from lens.models import decoder as dec
from lens.models.attention import KVCache
from lens.models.subject import tile_rows
from lens.models.transformer import for_rollout, model_of
from lens.response import NO_TAGS, Tags, find

ROWS = sharding.rows(2)
UNDRAWN = -1  # equals no token of a tag


class Samples(NamedTuple):
    """Explanations ids_NxT with their log-probabilities logp_NxT, or what else was kept of their tokens; rows of one
    activation contiguous."""

    ids_NxT: jax.Array
    logp_NxT: jax.Array


def noise(key, t, shape: tuple[int, int]):
    """Draws standard Gumbel noise NxV for token t, the same on every mesh. key: one, or one for each row [N]."""
    if key.ndim:
        return jax.vmap(lambda k: draws.gumbel(jax.random.fold_in(k, t), shape[1:]))(key)
    return draws.gumbel(jax.random.fold_in(key, t), shape, sharding.out(ROWS))


def perturbed(logits_NxV, key, t, temperature_N):
    """Adds temperature * noise of token t: what its id is the argmax of."""
    temperature_N = sharding.reshard(temperature_N, sharding.rows(1))
    return logits_NxV + temperature_N[:, None] * noise(key, t, logits_NxV.shape)


def every(logits_NxV):
    return logits_NxV


def draw(
    decoder,
    base,
    first_NxV,
    prompt: KVCache,
    key,
    *,
    length: int,
    temperature_N,
    keep,
    tags: Tags = NO_TAGS,
    only=every,
):
    """Draws `length` tokens a row after a prompt of which prefill gave keys and values, and first_NxV the logits.

    tags: once every row has come to its end nothing more is drawn, and the tokens that are left are 0. only: of logits,
    gives those that ids are drawn from. Returns (ids NxT, keep(logits NxV, ids N) of every token on a second axis, the
    cache of all tokens but the last).
    """
    model, n = model_of(decoder, base), len(first_NxV)
    kept = jax.eval_shape(lambda x: keep(x, jnp.argmax(x, axis=-1)), first_NxV)
    kept = jnp.zeros((n, length, *kept.shape[1:]), kept.dtype, out_sharding=sharding.out(sharding.rows(kept.ndim + 1)))
    ids = jnp.full((n, length), UNDRAWN, jnp.int32, out_sharding=sharding.out(ROWS))

    def token(logits, ids, kept, t):
        ids_N = draws.argmax(perturbed(only(logits), key, t, temperature_N))
        put = jax.lax.dynamic_update_index_in_dim
        return ids_N, put(ids, ids_N, t, 1), put(kept, keep(logits, ids_N), t, 1)

    def goes_on(carry):
        t, _, _, ids, _ = carry
        more = t < length - 1
        return more & ~(find(ids, tags).end_N <= t).all() if tags else more

    def body(carry):
        t, logits, cache, ids, kept = carry
        ids_N, ids, kept = token(logits, ids, kept, t)
        logits, written = dec.step(decoder, base, model.lookup(ids_N[:, None]), (prompt, cache), t)
        return t + 1, logits, cache.written(written, t), ids, kept

    carry = jnp.int32(0), first_NxV, prompt.room(n, length - 1), ids, kept
    t, logits, cache, ids, kept = jax.lax.while_loop(goes_on, body, carry)
    _, ids, kept = token(logits, ids, kept, t)
    return jnp.maximum(ids, 0), kept, cache


def sample(
    decoder,
    base,
    activation_BxD,
    key,
    *,
    length: int,
    group: int = 1,
    temperature=1.0,
    tags: Tags = NO_TAGS,
    keep=losses.token_log_probs,
    only=every,
) -> Samples:
    """Draws `length` tokens for each activation, `group` times: N = B * group rows; with tags as draw does. No gradient.

    Exact draws from softmax(logits / temperature) as argmax(logits + temperature * Gumbel noise), so 0
    is greedy; a number, or one per activation [B]. logp is at temperature 1, of all tokens. keep, only: as draw does. The
    noise of a row depends on key, step and row alone: every mesh draws the same tokens from the same logits.
    """
    decoder, activation_BxD = for_rollout(decoder, base), jax.lax.stop_gradient(activation_BxD)
    temperature_B = sharding.reshard(jnp.broadcast_to(temperature, activation_BxD.shape[:1]), sharding.rows(1))
    first_BxV, prompt = dec.prefill(decoder, base, activation_BxD)
    first_NxV, temperature_N = tile_rows(first_BxV, group), tile_rows(temperature_B, group)
    how = {'length': length, 'temperature_N': temperature_N, 'keep': keep, 'tags': tags, 'only': only}
    ids, logp, _ = draw(decoder, base, first_NxV, prompt, key, **how)
    return Samples(ids, logp)
