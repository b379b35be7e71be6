"""What an instrument computes of one text and a trained lens, each a program by itself: activations, explanations with
their alternatives, reconstructions, how the subject goes on when one activation is replaced."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import losses, sampling, sharding
from lens.models import subject
from lens.models.attention import KVCache
from lens.models.decoder import without_position
from lens.models.encoder import Source, encode
from lens.models.lens import Lens
from lens.models.streams import Stream, by_slices
from lens.models.transformer import Transformer
from lens.response import Tags, between, find, words


class Top(NamedTuple):
    """The most probable tokens, on the last axis: probability_…xK and id_…xK."""

    probability: jax.Array
    id: jax.Array


class Text(NamedTuple):
    """Of every token of texts, a leading axis of rows first: a_SxD, the stream after the block that is read; next, what
    the subject predicts after it; logit_lens, what it would predict if that stream were its last; slots_SxKxD, the streams
    for the slots of a decoder's prompt, where these stand for blocks of their own."""

    a_SxD: jax.Array
    next: Top
    logit_lens: Top
    slots_SxKxD: jax.Array | None = None


class Explained(NamedTuple):
    """Explanations: response ids_NxT, the tokens start..start+length-1 of words_NxT are words, found_N whether there are any;
    probability_NxT of each token and its `alternatives` NxTxK, at temperature 1; pred_NxD, what the encoder makes of
    the words."""

    ids_NxT: jax.Array
    words_NxT: jax.Array
    start_N: jax.Array
    length_N: jax.Array
    found_N: jax.Array
    probability_NxT: jax.Array
    alternatives: Top
    pred_NxD: jax.Array


class Continued(NamedTuple):
    """For each of V values put in: the next token's `next` VxK, kl_V in nats of it from what it is with the first value,
    and ids_VxT, the most probable continuation."""

    next: Top
    kl_V: jax.Array
    ids_VxT: jax.Array


def _top(logits, k: int) -> Top:
    """Of logits …xV that are whole along V."""
    logits = sharding.reshard(logits, sharding.rows(logits.ndim))
    return Top(*jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k))


@functools.partial(jax.jit, static_argnames=('layer', 'top', 'layers'))
def read(base: Transformer, tokens_BxS, *, layer: int, top: int, layers: tuple[int, ...] = ()) -> Text:
    """Reads texts after block `layer`, and after those of the slots; what stands after a token changes nothing before it."""
    found = subject.streams(base, tokens_BxS, (layer, *layers))
    x, end = found[layer], max(found)
    last = base.run_layers(found[end], end + 1, base.config.n_layers)
    slots = jnp.stack([found[k] for k in layers], axis=2).astype(jnp.float32) if layers else None
    streams = {'next': Stream(last, base), 'logit_lens': Stream(x, base)}
    tops = by_slices(lambda logits: {k: _top(v, top) for k, v in logits.items()}, streams)
    return Text(x.astype(jnp.float32), **tops, slots_SxKxD=slots)


@functools.partial(jax.jit, static_argnames=('length', 'tags', 'top'))
def explain(
    lens: Lens, base, a_NxD, source: Source, seed, fold_Nx2, temperature_N, *, length: int, tags: Tags, top: int
) -> Explained:
    """Explains activations, NxD or one for each slot, NxKxD, and reads the explanations back. fold_Nx2: what the randomness
    of a row depends on, besides the seed; temperature 0 is greedy."""
    key, fold = jax.random.key(seed), jax.random.fold_in
    keys_N = jax.vmap(lambda at: fold(fold(key, at[0]), at[1]))(fold_Nx2)

    def keep(logits_NxV, ids_N):
        best = _top(logits_NxV, top)
        drawn = jnp.exp(losses.token_log_probs(logits_NxV, ids_N))
        return jnp.concatenate([drawn[:, None], best.probability, best.id.astype(jnp.float32)], axis=1)

    vectors = without_position(lens.decoder, a_NxD, source.position_N)
    how = {'length': length, 'temperature': temperature_N, 'tags': tags, 'keep': keep}
    ids, kept = sampling.sample(lens.decoder, base, vectors, keys_N, **how)
    found = find(ids, tags)
    read, span = between(ids, found, tags)
    return Explained(
        ids,
        words(ids, found, tags),
        *found.span,
        found.found_N,
        kept[..., 0],
        Top(kept[..., 1 : top + 1], kept[..., top + 1 :].astype(jnp.int32)),
        encode(lens.encoder, base, read, source, span),
    )


@jax.jit
def reconstruct(lens: Lens, base, ids_NxT, length_N, source: Source):
    """Reads the first length_N tokens of each row back, NxD."""
    return encode(lens.encoder, base, ids_NxT, source, (0 * length_N, length_N))


@functools.partial(jax.jit, static_argnames=('layer', 'steps', 'top'))
def go_on(base: Transformer, tokens_VxS, position, values_VxD, *, layer: int, steps: int, top: int) -> Continued:
    """Puts each value in place of the stream after block `layer` at `position` of a text, of which what comes after is
    not read: what the subject predicts there, and the `steps` tokens that it goes on with. tokens_VxS: that text, V times;
    S - steps > position."""
    c, hit_Sx1 = base.config, (jnp.arange(tokens_VxS.shape[1]) == position)[:, None]

    def put(x_VxSxD, block):
        value = values_VxD[:, None].astype(x_VxSxD.dtype)
        return jnp.where((block == layer + 1) & hit_Sx1, value, x_VxSxD)

    x, cache = base.run_cached(base.embed(tokens_VxS), 0, c.n_layers, before_block=put)
    x = put(x, c.n_layers)  # after the last block, if that is read
    first = base.logits(jax.lax.dynamic_slice_in_dim(x, position, 1, axis=1))[:, 0]
    first = sharding.reshard(first, sharding.rows(2))
    ids = jnp.zeros((len(values_VxD), steps), jnp.int32, out_sharding=sharding.out(sharding.rows(2)))

    def step(t, carry):
        logits, cache, ids = carry
        ids_V, at = jnp.argmax(logits, axis=-1), position + 1 + t
        x, written = base.run_cached(base.embed(ids_V[:, None], at), 0, c.n_layers, (cache,), at)
        logits = sharding.reshard(base.logits(x)[:, 0], sharding.rows(2))
        return logits, cache.written(written, at), jax.lax.dynamic_update_index_in_dim(ids, ids_V, t, 1)

    # slots after `position` hold what is not read; each is overwritten before a token sees it
    _, _, ids = jax.lax.fori_loop(0, steps, step, (first, KVCache(cache.k, cache.v, None), ids))
    return Continued(_top(first, top), losses.kl(first[:1], first), ids)
