"""The straight-through rollout as a plain scan that JAX differentiates: the oracle of lens.gumbel, form 'full'."""

import jax
import jax.numpy as jnp

from lens import gumbel, sampling
from lens.models import decoder as dec
from lens.models.streams import Stream


def rollout(decoder, base, activation_NxD, table_VxW, key, *, length, tau, temperature=1.0):
    """gumbel.rollout of form 'full'; reverse mode stores a cache per token and layer."""
    model = base if decoder.base is None else decoder.base
    start = decoder.prompt_len

    def straight_through(table, z, ids):
        mixed = jax.nn.softmax(z / jnp.maximum(tau, gumbel.MIN_TAU)).astype(table.dtype) @ jax.lax.stop_gradient(table)
        return table[ids] + (mixed - jax.lax.stop_gradient(mixed))

    def body(carry, t):
        logits, cache = carry
        z = logits + jnp.reshape(temperature, (-1, 1)) * sampling.noise(key, t, logits.shape)
        ids = jnp.argmax(z, axis=-1)
        row = straight_through(model.embedding[...], z, ids)
        x, n = model.enter(row[:, None], start + t), model.config.n_layers
        x, written = model.run_cached(x, 0, n, (prompt, cache), start + t, adapters=decoder.adapters)
        word = straight_through(jax.lax.stop_gradient(table_VxW), z, ids)
        return (model.logits(x)[:, 0], cache.written(written, t)), gumbel.Words(ids, word, Stream(logits))

    logits, prompt = dec.prefill(decoder, base, activation_NxD)
    _, out = jax.lax.scan(body, (logits, prompt.room(len(logits), length)), jnp.arange(length))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)
