"""text -> activation: soft prompt around the words, read-out after one block at the last position."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lens import sharding
from lens.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """output_layer: 0-based block whose output is read; nothing after it runs. readout: whether an
    affine map follows."""

    output_layer: int
    readout: bool


class Encoder(nnx.Module):
    """What the encoder trains: soft prompt, special last vector, read-out map, own base or adapters."""

    def __init__(
        self, c: EncoderConfig, left_ids, right_ids, base: Transformer, *, own_base: bool, adapters: dict | None
    ):
        self.config = c
        d = base.config.d_model
        self.prompt_left = nnx.Param(base.embedding_rows(left_ids).astype(jnp.float32))
        self.prompt_right = nnx.Param(base.embedding_rows(right_ids).astype(jnp.float32))
        self.special_last = nnx.Param(jnp.zeros(d, jnp.float32))
        self.readout_w = nnx.Param(jnp.eye(d, dtype=jnp.float32)) if c.readout else None
        self.readout_b = nnx.Param(jnp.zeros(d, jnp.float32)) if c.readout else None
        own = base.truncated(c.output_layer + 1) if own_base else None
        self.base = nnx.data(jax.tree.map(lambda x: x.astype(jnp.float32), own))
        self.adapters = nnx.data(adapters)


def model_of(encoder: Encoder, base: Transformer) -> Transformer:
    return base if encoder.base is None else encoder.base


def encode(encoder: Encoder, base: Transformer, ids_BxT):
    """Reconstruction BxD (float32) of the activation from the token ids alone."""
    return encode_rows(encoder, base, model_of(encoder, base).lookup(ids_BxT))


def encode_rows(encoder: Encoder, base: Transformer, words_BxTxD):
    """Reconstruction BxD (float32) from words given as rows of the encoder's embedding table.

    Input rows: [left, words, right], the special vector added to the last one, all in the units of the
    embedding table.
    """
    model = model_of(encoder, base)
    dtype = model.embedding.dtype

    def rows(p_LxD):
        shape = (words_BxTxD.shape[0], *p_LxD.shape)
        return jnp.broadcast_to(p_LxD, shape, out_sharding=sharding.out(sharding.ACT)).astype(dtype)

    x = jnp.concatenate([rows(encoder.prompt_left[...]), words_BxTxD, rows(encoder.prompt_right[...])], axis=1)
    last = jnp.arange(x.shape[1]) == x.shape[1] - 1
    x = x + (last[:, None] * encoder.special_last[...]).astype(dtype)
    x = model.run_layers(model.enter(x), 0, encoder.config.output_layer + 1, adapters=encoder.adapters)
    y = x[:, -1].astype(jnp.float32)
    if encoder.readout_w is not None:
        y = jnp.einsum('bd,de->be', y, encoder.readout_w[...]) + encoder.readout_b[...]
    return y
