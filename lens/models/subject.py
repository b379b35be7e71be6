"""The frozen model that is read: activations out of its residual stream, and back into it."""

from collections.abc import Collection

import jax
import jax.numpy as jnp

from lens import sharding
from lens.models.transformer import Transformer


def streams(subject: Transformer, tokens_BxS, layers: Collection[int]) -> dict[int, jax.Array]:
    """Computes the outputs BxSxD of blocks `layers` (0-based), by block, in one pass that stops after the last of them.

    They are Hugging Face's hidden_states[layer + 1], for the last block before the final norm. Raises ValueError for a
    block that the subject does not have.
    """
    x, done, found = subject.embed(tokens_BxS), 0, {}
    for layer in sorted(set(layers)):
        x = found[layer] = subject.run_layers(x, done, layer + 1)
        done = layer + 1
    return found


@jax.named_scope('read')
def activations_of(subject: Transformer, tokens_BxS, positions_BxP, layers: Collection[int]) -> dict[int, jax.Array]:
    """Reads activations BxPxD of several blocks, by block: what `streams` gives at each position, without gradient."""
    found, at = streams(subject, tokens_BxS, layers), positions_BxP[..., None]
    return jax.lax.stop_gradient({k: jnp.take_along_axis(x, at, axis=1) for k, x in found.items()})


def activations(subject: Transformer, tokens_BxS, positions_BxP, layer: int):
    """Reads activations BxPxD of one block, as activations_of does."""
    return activations_of(subject, tokens_BxS, positions_BxP, (layer,))[layer]


def patch(subject: Transformer, tokens_BxS, position_B, value_BxD, layer: int):
    """Computes logits BxSxV when the output of block `layer` at position_B[b] is replaced by value_BxD[b].

    Replacing by the activation itself gives the natural logits. Differentiable in value_BxD.
    """
    x = subject.run_layers(subject.embed(tokens_BxS), 0, layer + 1)
    hit_BxS = jnp.arange(x.shape[1]) == position_B[:, None]
    x = jnp.where(hit_BxS[..., None], value_BxD[:, None].astype(x.dtype), x)
    return subject.logits(subject.run_layers(x, layer + 1, subject.config.n_layers))


@jax.named_scope('patch')
def stream_at(subject: Transformer, tokens_BxS, positions_BxP, values_BxPxD, layer: int):
    """Computes the last stream BxPxD at positions where the output of block `layer` is replaced by values.

    Its logits at p are patch(...)[b, positions_BxP[b, p]] with that one value put in: replacements do not see each
    other, so a position may come twice, say with the activation and with a reconstruction of it. The
    natural stream runs once for all of them and the gradient passes through P tokens a row, not S;
    it reaches values_BxPxD alone, the subject is a constant. Positions are 0..S-1, not checked. Raises
    ValueError for a layer that the subject does not have.
    """
    subject = jax.lax.stop_gradient(subject)
    x = subject.run_layers(subject.embed(tokens_BxS), 0, layer + 1)
    above = layer + 1, subject.config.n_layers
    _, past = subject.run_cached(x, *above)
    return subject.run_apart(values_BxPxD.astype(x.dtype), *above, past, positions_BxP)


def stream_norms(subject: Transformer, tokens_BxS, lengths_B, skip: int = 5):
    """Measures the mean norm of the stream entering each block and leaving the last one, [n_layers + 1].

    Entry k is hs[k]; positions before `skip` and padding are left out.
    """
    at_S = jnp.arange(tokens_BxS.shape[1])
    mask = (at_S >= skip) & (at_S < lengths_B[:, None])

    def norm(x):
        return jnp.sum(jnp.linalg.norm(x.astype(jnp.float32), axis=-1) * mask) / jnp.maximum(mask.sum(), 1)

    x, norms = subject.collect(subject.embed(tokens_BxS), 0, subject.config.n_layers, norm)
    return jnp.append(norms, norm(x))


def tile_rows(x, group: int):
    """Repeats each row `group` times, copies contiguous: BxPx... -> (B*group)x..., batch-sharded."""
    spec = sharding.out(sharding.rows(x.ndim))
    return jnp.repeat(x, group, axis=0, out_sharding=spec)
