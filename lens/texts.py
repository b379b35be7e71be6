"""What the encoder reads for a figure: explanations of an activation, their controls, and what it makes of them.

A figure reads one entry of TEXTS or a quote, the last tokens of the source and no words.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import sampling, sharding
from lens.losses import comparable
from lens.models.encoder import Source, encode, encode_context
from lens.models.lens import Lens
from lens.response import Found, Tags, between, find, words
from lens.rollout import Rollout, vectors


class Text(NamedTuple):
    """What the encoder reads: drawn by the decoder from vector(a), a all that it is given, NxD or NxKxD, or made by
    text(batch, sampled_NxT, keys_N, tags).

    temperature: of a drawn text. tagged: whether the explanation stands between the tags of the run. needs: the array
    of the held-out data without which there is no such text.
    """

    vector: Callable | None = None
    temperature: float = 1.0
    text: Callable | None = None
    tagged: bool = True
    needs: str = 'positions'


def permuted(batch, sampled_NxT, keys_N, tags: Tags):
    """Puts the words of the sampled explanation in another order; tags and what is outside of them stay."""
    length = sampled_NxT.shape[1]
    noise = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys_N)
    inside, at = find(sampled_NxT, tags).inside(length), jnp.arange(length)
    start = jnp.argmax(inside, axis=1, keepdims=True)
    order = jnp.argsort(jnp.where(inside, start + noise, at), axis=1)
    return sharding.take(sampled_NxT, order)


def from_batch(name: str) -> Callable:
    """Takes texts that are there before any is drawn: an array RxVxT of the batch."""
    return lambda batch, sampled_NxT, keys_N, tags: batch[name].reshape(sampled_NxT.shape)


# The randomness of a text depends on its place here: a new one goes to the end.
TEXTS = {
    'sampled': Text(vector=lambda a: a),
    'greedy': Text(vector=lambda a: a, temperature=0.0),
    'no_activation': Text(vector=lambda a: 0 * a),
    'words_permuted': Text(text=permuted),
    'previous_tokens': Text(text=from_batch('previous'), tagged=False, needs='previous'),
    'given': Text(text=from_batch('explanations'), needs='explanations'),
}


@functools.partial(jax.jit, static_argnames=('length', 'tags', 'error', 'names', 'quotes'))
def evaluate_batch(
    lens: Lens,
    base,
    roll: Rollout,
    key,
    *,
    length: int,
    tags: Tags,
    error: str,
    names: tuple[str, ...],
    quotes: tuple[int, ...],
) -> dict:
    """Computes the arrays a, pred, ids, found of Collected for what was read of one batch and the texts `names`.

    All texts are drawn in one call and encoded in one call, and in another one contexts of `quotes` tokens. The randomness
    of a text depends on its activation's place in the held-out data, batch['index'] [R, V], alone.
    """
    batch, a = roll.batch, vectors(lens.decoder, roll)
    fold = jax.random.fold_in
    of_row_N = jax.vmap(fold, (None, 0))(key, batch['index'].reshape(-1))
    keys = {k: jax.vmap(fold, (0, None))(of_row_N, list(TEXTS).index(k)) for k in names}
    drawn = [k for k in names if TEXTS[k].vector]
    ids = sampling.sample(
        lens.decoder,
        base,
        _interleave(TEXTS[k].vector(a) for k in drawn),
        _interleave(keys[k] for k in drawn),
        length=length,
        temperature=jnp.tile(jnp.asarray([TEXTS[k].temperature for k in drawn]), len(a)),
        tags=tags,
    ).ids_NxT
    texts = _separate(ids, drawn)
    for k in names:
        if k not in texts:
            texts[k] = TEXTS[k].text(batch, texts['sampled'], keys[k], tags)
    found = {k: find(x, tags) if TEXTS[k].tagged else _quoted(x) for k, x in texts.items()}
    every = Found(*(_interleave(x) for x in zip(*found.values(), strict=True)))
    source = jax.tree.map(lambda x: _interleave([x] * len(texts)), roll.source)
    read_NxT, span = between(jnp.maximum(_interleave(texts.values()), 0), every, tags)
    span = every.span if quotes and not span else span
    pred = _separate(encode(lens.encoder, base, read_NxT, source, span), texts)
    alone = {}
    if quotes:
        source = jax.tree.map(lambda x: _interleave([x] * len(quotes)), roll.source)
        shown = _interleave(jnp.full_like(roll.source.position_N, m) for m in quotes)
        alone = encode_context(lens.encoder, base, source, shown, tags.no_words)
        alone = _separate(alone, [f'quote_{m}' for m in quotes])
    return {
        'a': comparable(roll.a_NxD, error),
        'pred': {k: jnp.where(found[k].found_N[:, None], comparable(x, error), 0) for k, x in pred.items()}
        | {k: comparable(x, error) for k, x in alone.items()},
        'ids': {k: jnp.where(found[k].inside(length), words(x, found[k], tags), -1) for k, x in texts.items()},
        'found': {k: f.found_N for k, f in found.items()},
    }


@functools.partial(jax.jit, static_argnames='error')
def encode_batch(lens: Lens, base, batch: dict, source: Source, *, error: str):
    """Reconstructs from texts batch['ids'] [R, V, T], -1 outside of what the encoder reads, and their context; the zero vector
    where batch['found'] [R, V] is False."""
    ids_NxT, found_N = (batch[k].reshape(-1, *batch[k].shape[2:]) for k in ('ids', 'found'))
    span = jnp.argmax(ids_NxT >= 0, axis=1), jnp.sum(ids_NxT >= 0, axis=1)
    pred = encode(lens.encoder, base, jnp.maximum(ids_NxT, 0), source, span)
    return jnp.where(found_N[:, None], comparable(pred, error), 0)


def _quoted(ids_NxT) -> Found:
    """A quoted text: all of it but -1 at its beginning, where the source has no more tokens."""
    t, start_N = ids_NxT.shape[1], jnp.sum(ids_NxT < 0, axis=1)
    return Found(start_N, t - start_N, jnp.full_like(start_N, t), start_N >= 0)


def _interleave(parts: Iterable):
    """Joins K arrays Nx… to one (N*K)x…, rows of one n contiguous: a shard keeps its rows."""
    x = jnp.stack(list(parts), axis=1)
    return x.reshape(-1, *x.shape[2:])


def _separate(x_MxD, names) -> dict:
    """The inverse of _interleave, by name."""
    x = x_MxD.reshape(-1, len(names), x_MxD.shape[-1])
    return {name: x[:, k] for k, name in enumerate(names)}
