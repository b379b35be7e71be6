"""From the last stream of a model to numbers of each token, without all logits at once: they are what is largest."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import sharding
from lens.models.transformer import Transformer

MOST = 1 << 27  # logits that a device holds at a time: 0.5 GB in float32, and about as much twice in the backward pass


class Stream(NamedTuple):
    """What leaves the last block of a model, whose final norm and head are still to come. model None: logits."""

    x_BxTxD: jax.Array
    model: Transformer | None = None

    def logits(self) -> jax.Array:
        """Returns all of them, BxTxV in float32."""
        return self.head()(self.x_BxTxD)

    def head(self) -> Callable:
        """Returns the function of a part of the tokens; the weights are gathered here, once."""
        return self.model.unembedding() if self.model else lambda x: x


@jax.named_scope('score')
def by_slices(f: Callable, streams: Mapping[str, Stream], *of_tokens):
    """Computes f(logits, *of_tokens) slice by slice of the tokens, so that a device holds at most MOST logits.

    f: takes {name: logits BxtxV in float32} and slices of the arrays BxTx…; returns a tree of arrays Bxtx…, what it says
    of a token made of that token alone. The backward pass computes each slice again. Without need there is one slice.
    """
    heads = {k: s.head() for k, s in streams.items()}

    def part(x, of_tokens):
        return f({k: heads[k](x[k]) for k in heads}, *of_tokens)

    data = {k: s.x_BxTxD for k, s in streams.items()}, of_tokens
    rows, length, _ = next(iter(data[0].values())).shape
    words = sum(s.model.config.vocab_size if s.model else s.x_BxTxD.shape[-1] for s in streams.values())
    fewest = -(-rows * length * words // sharding.shards(*sharding.AXES) // MOST)
    if fewest <= 1:
        return part(*data)
    size = -(-length // fewest)
    rest = length % size
    part = jax.checkpoint(part)

    def run(first: int, n: int, size: int):
        """`n` slices from token `first` on; also one alone in a scan, where lens.flops finds what is done again."""

        def split(x):
            x = x[:, first : first + n * size]
            return jnp.moveaxis(x.reshape(rows, n, size, *x.shape[2:]), 1, 0)

        _, out = jax.lax.scan(lambda _, x: (None, part(*x)), None, jax.tree.map(split, data))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, n * size, *x.shape[3:]), out)

    out = run(0, length // size, size)
    if not rest:
        return out
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), out, run(length - rest, 1, rest))
