"""text -> activation: a prompt around the words, read-out after one block at the last position."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lens import sharding
from lens.models.transformer import Side, Transformer, model_of, prompt_of, rows_for

READOUTS = ('affine', 'linear', 'none')


class Source(NamedTuple):
    """Where activations NxD are from: the last R tokens up to and with the one that was read, and its position. Where the
    text has fewer before it, the first ones of a row are no part of it."""

    tokens_NxR: jax.Array
    position_N: jax.Array


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """output_layer: 0-based block whose output is read; nothing after it runs. readout: what follows it,
    one of READOUTS. context_tokens: how many of the last source tokens, that which was read the last of them, are shown
    after the prompt."""

    output_layer: int
    readout: str
    context_tokens: int = 0


class Encoder(Side):
    """What the encoder trains: read-out, with a soft prompt a special last vector, and what every side does; its own base
    ends after the block that is read. The reconstruction gets its vector of `positions`."""

    def __init__(
        self,
        c: EncoderConfig,
        left_ids,
        right_ids,
        base,
        *,
        own_base,
        adapters,
        readout=None,
        positions=False,
        compute='',
        soft_prompt=True,
    ):
        """readout: (W DxD, b D) at the start; the identity where not given. The others: Side."""
        own = base.truncated(c.output_layer + 1) if own_base else None
        super().__init__(left_ids, right_ids, base, own, adapters, positions, compute, soft_prompt)
        self.config, d = c, base.config.d_model
        w, b = readout or (jnp.eye(d, dtype=jnp.float32), jnp.zeros(d, jnp.float32))
        self.special_last = nnx.data(nnx.Param(jnp.zeros(d, jnp.float32)) if soft_prompt else None)
        self.readout_w = nnx.data(nnx.Param(w) if c.readout != 'none' else None)
        self.readout_b = nnx.data(nnx.Param(b) if c.readout == 'affine' else None)


def encode(encoder: Encoder, base: Transformer, ids_BxT, source: Source | None = None, span=None):
    """Reconstructs the activation BxD (float32) from token ids; arguments of encode_rows."""
    return encode_rows(encoder, base, model_of(encoder, base).lookup(ids_BxT), source, span)


def encode_context(encoder: Encoder, base: Transformer, source: Source, shown_B, no_words: tuple[int, ...] = ()):
    """Reconstructs the activation BxD (float32) without any words, from the last shown_B tokens of the source. no_words:
    what stands between the prompts even then (Tags)."""
    ids_BxT = 0 * source.tokens_NxR[:, :1] + jnp.asarray(no_words, jnp.int32)
    return encode_rows(encoder, base, model_of(encoder, base).lookup(ids_BxT), source, shown_B=shown_B)


@jax.named_scope('encode')
def encode_rows(
    encoder: Encoder, base: Transformer, words_BxTxD, source: Source | None = None, span=None, shown_B=None
):
    """Reconstructs the activation BxD (float32) from words given as rows of the encoder's embedding table.

    Input rows: [left, words, right, context], the special vector added to the last one, all in the units of the
    embedding table. source: needed by an encoder with a context or positions. span: (start_B, length_B) of the words
    that are read; None: all. shown_B: how many tokens of the context are; None: all; never those before the beginning of
    the text. What is right of a row's last position is never seen by it, so rows of any length run together. Raises
    ValueError for a source of fewer tokens than the context has.
    """
    model = model_of(encoder, base)
    left, dtype, m = len(encoder.left_ids), model.dtype, encoder.config.context_tokens
    if m and source.tokens_NxR.shape[1] < m:
        raise ValueError(f'the encoder reads {m} source tokens, it was given {source.tokens_NxR.shape[1]}')

    def rows(p_QxD):
        return rows_for(len(words_BxTxD), p_QxD, dtype)

    left_QxD, right_QxD = prompt_of(encoder, model)
    tail = rows(right_QxD)
    if m:
        tail = jnp.concatenate([tail, model.lookup(source.tokens_NxR[:, -m:])], axis=1)
    x = jnp.concatenate([rows(left_QxD), words_BxTxD, tail], axis=1)
    last, words = jnp.full(len(x), x.shape[1] - 1), words_BxTxD.shape[1]
    gaps = span is not None or shown_B is not None or m > 1  # the token that was read is always there
    if gaps:
        start, length = (jnp.zeros_like(last), jnp.full_like(last, words)) if span is None else span
        seen = jnp.minimum(source.position_N + 1, m if shown_B is None else shown_B) if m else 0 * length
        x, last = _close_up(x, left, words, m, start, length, seen)
    hit_BxT = jnp.arange(x.shape[1]) == last[:, None]
    if encoder.special_last is not None:
        x = x + jnp.where(hit_BxT[..., None], rows(encoder.special_last[...][None]), 0)
    x = model.run_layers(model.enter(x), 0, encoder.config.output_layer + 1, adapters=encoder.adapters)
    y = jnp.sum(jnp.where(hit_BxT[..., None], x.astype(jnp.float32), 0), axis=1) if gaps else x[:, -1]
    y = y.astype(jnp.float32)
    if encoder.readout_w is not None:
        y = jnp.einsum('bd,de->be', y, sharding.gathered(encoder.readout_w[...]))
    if encoder.readout_b is not None:
        y = y + encoder.readout_b[...]
    if encoder.positions is not None:
        y = y + encoder.positions[...].at[source.position_N].get(out_sharding=sharding.like(y))
    return y


def _close_up(x_BxTxD, left: int, words: int, context: int, start_B, length_B, seen_B):
    """Rows [left, words[start : start + length], right, the last `seen` of the context] of each row, and the index of its
    last one."""
    n, at_T = x_BxTxD.shape[1], jnp.arange(x_BxTxD.shape[1])
    start, length, hidden, prompt = start_B[:, None], length_B[:, None], context - seen_B[:, None], n - words - context
    from_BxT = jnp.where(at_T < left, at_T, at_T + start)
    from_BxT = jnp.where(at_T < left + length, from_BxT, at_T - length + words)
    from_BxT += jnp.where(at_T < prompt + length, 0, hidden)
    x = jnp.take_along_axis(x_BxTxD, jnp.minimum(from_BxT, n - 1)[..., None], axis=1)
    return x, prompt + length_B + seen_B - 1
