"""Compiled programs that tests share, and the roles written by hand on single blocks.

A program is compiled once for every structure of model and shapes of arguments: take the models and batches of
conftest where they do. What is static is named; everything else, layers of `block` included, is an argument.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lens import gumbel, losses, sampling
from lens.models import decoder as dec
from lens.models import encoder as enc
from lens.models import subject
from lens.models.injection import Add, Affine, Replace
from lens.models.streams import Stream, by_slices
from lens.models.transformer import at_layer, model_of

activations = jax.jit(subject.activations, static_argnames='layer')
patch = jax.jit(subject.patch, static_argnames='layer')
encode = jax.jit(enc.encode)
sample = jax.jit(sampling.sample, static_argnames=('length', 'group', 'tags'))
rollout = jax.jit(gumbel.rollout, static_argnames=('length', 'form'))


@functools.partial(jax.jit, static_argnames='layer')
def logits_at(model, ids_BxS, positions_BxP, values_BxPxD, layer):
    """Logits BxPxV of subject.stream_at."""
    return jax.lax.stop_gradient(model).logits(subject.stream_at(model, ids_BxS, positions_BxP, values_BxPxD, layer))


@jax.jit
def teacher_forced_logits(decoder, base, a_BxD, ids_BxT):
    """Logits BxTxV of every token of given explanations."""
    return model_of(decoder, base).logits(dec.teacher_forced(decoder, base, a_BxD, ids_BxT))


@jax.jit
def score(decoder, base, a_BxD, ids_BxT):
    """Log-probability and entropy of every token of given explanations, BxT each."""
    own = Stream(dec.teacher_forced(decoder, base, a_BxD, ids_BxT), model_of(decoder, base))

    def numbers(logits, ids):
        return losses.token_log_probs(logits['own'], ids), losses.entropy(logits['own'])

    return by_slices(numbers, {'own': own}, ids_BxT)


@jax.jit
def natural_logits(base, prefix_Q, ids_BxT):
    """Logits BxTxV of the untouched base after the prefix."""
    return base.logits(dec.natural(base, prefix_Q, ids_BxT))


@jax.jit
def hidden(model, ids_BxT):
    """(logits BxTxV, hidden states [L + 1] x BxTxD: of what enters each block and what leaves the last one)."""
    x, entering = model.collect(model.embed(ids_BxT), 0, model.config.n_layers, lambda x: x)
    return model.logits(x), jnp.concatenate([entering, x[None]])


@jax.jit
def layers(model, x_BxTxD, adapters=None):
    """The residual stream after all blocks."""
    return model.run_layers(x_BxTxD, 0, model.config.n_layers, adapters=adapters)


@jax.jit
def block(model, x_BxTxD, layer):
    """One block; `layer` is traced."""
    return at_layer(model.blocks, layer)(x_BxTxD, layer, jnp.arange(x_BxTxD.shape[1]), True, model.config, (), None)[0]


@jax.jit
def head(model, x_BxTxD):
    """Logits of a residual stream."""
    return model.logits(x_BxTxD)


def rows_of(side, table) -> tuple[np.ndarray, np.ndarray]:
    """The prompt of a side: what it trains, or its words in a table."""
    if side.prompt_left is None:
        return table[np.asarray(side.left_ids, int)], table[np.asarray(side.right_ids, int)]
    return np.asarray(side.prompt_left[...]), np.asarray(side.prompt_right[...])


def decode_by_hand(decoder, model, a_BxD, ids_BxT):
    """Logits BxTxV of every token of given explanations, block by block; without positions and input scale."""
    c, how, table = decoder.config, decoder.config.injection, np.asarray(model.embedding[...])
    a = np.asarray(a_BxD)
    left, right = (np.tile(p, (len(a), 1, 1)) for p in rows_of(decoder, table))
    x = np.concatenate([left, np.zeros_like(a)[:, None], right, table[np.asarray(ids_BxT)[:, :-1]]], axis=1)
    slots = [len(decoder.left_ids), *(len(decoder.left_ids) + 1 + i for i in c.more_slots)]
    if isinstance(how, Affine):
        maps = [
            a @ np.asarray(w) + np.asarray(b) for w, b in zip(decoder.maps_w[...], decoder.maps_b[...], strict=True)
        ]
        x[:, slots] = maps[0][:, None]
    elif isinstance(how, Replace):
        x[:, slots] = (a * how.norm / np.linalg.norm(a, axis=-1, keepdims=True))[:, None]
    else:
        x[:, slots] = table[c.marker]
    for k in range(model.config.n_layers):
        x = np.array(x)
        if isinstance(how, Affine) and k < how.patched_blocks:
            x[:, slots] = maps[0 if how.shared_map else k][:, None]
        elif isinstance(how, Add) and k == 2:
            h, unit = x[:, slots], a / np.linalg.norm(a, axis=-1, keepdims=True)
            x[:, slots] = h + np.linalg.norm(h, axis=-1, keepdims=True) * unit[:, None]
        x = block(model, x, k)
    return np.asarray(head(model, x))[:, decoder.prompt_len - 1 :]


def encode_by_hand(encoder, model, words: list[list[int]], contexts: list[list[int]] | None = None):
    """Reconstructions of explanations of any lengths, each with its context, block by block, of each alone; rows below it
    are zero."""
    left, right, table = (np.asarray(p[...]) for p in (encoder.prompt_left, encoder.prompt_right, model.embedding))
    rows = [
        np.concatenate([left, table[np.asarray(ids, int)], right, table[np.asarray(context, int)]])
        for ids, context in zip(words, contexts or [()] * len(words), strict=True)
    ]
    last = [len(r) - 1 for r in rows]
    x = np.stack([np.pad(r, ((0, max(last) + 1 - len(r)), (0, 0))) for r in rows])
    x[np.arange(len(x)), last] += np.asarray(encoder.special_last[...])
    for k in range(encoder.config.output_layer + 1):
        x = block(model, x, k)
    y = np.asarray(x)[np.arange(len(x)), last]
    return y @ np.asarray(encoder.readout_w[...]) + np.asarray(encoder.readout_b[...])
