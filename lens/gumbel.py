"""Straight-through Gumbel rollouts: sampled words in value, relaxed tokens in the gradient.

Token t is argmax z_t with z_t = logits_t + temperature * Gumbel noise, an exact draw. Where a table row of it
is read, the row's gradient is that of softmax(z_t / max(tau, MIN_TAU)) times the table: tau changes the
gradient, never the token. Two gradients of one rollout:

full      exact: through the rows that the decoder is fed back, and the keys and values of its own tokens.
two_pass  no sampled history: the tokens are given, as in teacher forcing, and relaxed on the way out.

Reverse mode through the sampling loop would store a cache per token. At step t the cache is the final one before
position t, so the loop backwards linearises each step anew at the final cache and carries one cotangent of
it: memory grows linearly with the length. The layers of a step are scanned beside the cache, not with
it as their carry, which would store a cache per layer.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import sampling, sharding
from lens.models import decoder as dec
from lens.models.attention import KVCache
from lens.models.streams import Stream
from lens.models.transformer import for_rollout, model_of

MIN_TAU = 0.1


class Words(NamedTuple):
    """Tokens of N explanations. stream: of the draw of each token, differentiable in every form.

    words: rows of the given table, exactly table[ids] in value. logp: of the tokens by the sampler, where `stream`
    is not the sampler's own.
    """

    ids_NxT: jax.Array
    words_NxTxW: jax.Array
    stream: Stream
    logp_NxT: jax.Array | None = None


def rollout(
    decoder, base, activation_NxD, table_VxW, key, *, length: int, tau, temperature=1.0, form: str = 'full'
) -> Words:
    """Draws one explanation of `length` tokens per activation: the tokens of sampling.sample for the same key.

    table_VxW: whose rows the reader of the words takes in, a constant. tau: may be traced. temperature: a
    number, or one per activation [N]. Gradients reach the decoder and the activations; base, table, tau and
    temperature are constants. Of the decoder's own embedding table, too, the relaxation is a constant function;
    a row that it feeds back has a lookup's gradient.
    """
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), activation_NxD.shape[:1])
    tau = jnp.asarray(tau, jnp.float32)
    return FORMS[form](length, decoder, base, activation_NxD, table_VxW, key, tau, temperature)


def _relaxed_rows(perturbed_NxV, tau, tables):
    """softmax(z / max(tau, MIN_TAU)) times each of the tables."""
    soft = jax.nn.softmax(perturbed_NxV / jnp.maximum(tau, MIN_TAU), axis=-1)

    def rows(table_VxW):
        split = sharding.like(table_VxW)  # of the vocabulary over `model`
        placed = sharding.reshard(soft.astype(table_VxW.dtype), sharding.P(sharding.ROW_AXES, split and split[0]))
        return jnp.einsum('nv,vw->nw', placed, table_VxW, out_sharding=sharding.out(sampling.ROWS))

    return jax.tree.map(rows, jax.lax.stop_gradient(tables))


def _lookup(table_VxW, ids_NxT):
    return table_VxW.at[ids_NxT].get(out_sharding=sharding.out(sharding.ACT))


def _two_pass(length: int, decoder, base, activation_NxD, table_VxW, key, tau, temperature_N) -> Words:
    base, table_VxW = jax.lax.stop_gradient((base, table_VxW))
    ids, logp = sampling.sample(decoder, base, activation_NxD, key, length=length, temperature=temperature_N)
    stream = Stream(dec.teacher_forced(decoder, base, activation_NxD, ids), model_of(decoder, base))
    head = stream.head()

    @jax.checkpoint
    def relaxed(x_NxD, t):
        logits_NxV = sharding.reshard(head(x_NxD[:, None])[:, 0], sharding.rows(2))
        return _relaxed_rows(sampling.perturbed(logits_NxV, key, t, temperature_N), tau, table_VxW)

    def body(_, at):
        mixed = relaxed(*at)
        return None, mixed - jax.lax.stop_gradient(mixed)  # zero, with a gradient

    _, push_TxNxW = jax.lax.scan(body, None, (jnp.moveaxis(stream.x_BxTxD, 1, 0), jnp.arange(length)))
    return Words(ids, _lookup(table_VxW, ids) + jnp.moveaxis(push_TxNxW, 0, 1), stream, logp)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _full(length: int, decoder, base, activation_NxD, table_VxW, key, tau, temperature_N) -> Words:
    return _forward(length, decoder, base, activation_NxD, table_VxW, key, tau, temperature_N)[0]


def _forward(length, decoder, base, activation_NxD, table_VxW, key, tau, temperature_N):
    """The loop of sampling.sample; the final cache lacks the last token."""
    ready = for_rollout(decoder, base)
    first_NxV, prompt = dec.prefill(ready, base, activation_NxD)
    ids, kept, cache = sampling.draw(
        ready, base, first_NxV, prompt, key, length=length, temperature_N=temperature_N, keep=lambda logits, _: logits
    )
    residuals = decoder, base, activation_NxD, table_VxW, key, tau, temperature_N, ids, (prompt, cache)
    return Words(ids, _lookup(table_VxW, ids), Stream(kept)), residuals


def _backward(length, residuals, cotangents):
    """Cotangents of _full's arguments: the steps in reverse, each linearised at the final cache."""
    decoder, base, activation_NxD, table_VxW, key, tau, temperature_N, ids_NxT, past = residuals
    d_words_NxTxW, d_logits_NxTxV = cotangents.words_NxTxW, cotangents.stream.x_BxTxD
    model = model_of(decoder, base)
    tables = table_VxW, model.table

    def logits_cotangent(logits_NxV, t, d_row_NxD):
        """Of the logits of token t: their own, and that of the rows made of them, read and fed back."""

        def relaxed(logits_NxV):
            return _relaxed_rows(sampling.perturbed(logits_NxV, key, t, temperature_N), tau, tables)

        (through_rows,) = jax.vjp(relaxed, logits_NxV)[1]((_token(d_words_NxTxW, t), d_row_NxD))
        return _token(d_logits_NxTxV, t) + through_rows

    def body(carry, t):
        d_decoder, (d_prompt, d_cache), d_row = carry
        row_Nx1xD = model.lookup(_token(ids_NxT, t)[:, None])
        (logits, written), transpose = jax.vjp(
            lambda *args: dec.step(args[0], base, *args[1:], t), decoder, row_Nx1xD, past
        )
        d_written = jax.tree.map(lambda d, x: _slot(d, t, x.dtype), (d_cache.k, d_cache.v), (written.k, written.v))
        d_logits = logits_cotangent(logits, t + 1, d_row)
        d_step, d_rows_Nx1xD, d_read = transpose((d_logits, KVCache(*d_written, written.length)))
        d_row = d_rows_Nx1xD[:, 0]
        return (_add(d_decoder, d_step), _add((d_prompt, d_cache), d_read), d_row), d_row

    d_decoder, d_past = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (decoder, past))
    d_row = jnp.zeros_like(model.lookup(ids_NxT[:, -1:])[:, 0])  # the last token is fed to nobody
    (d_decoder, (d_prompt, _), d_row), d_rows_TxNxD = jax.lax.scan(
        body, (d_decoder, d_past, d_row), jnp.arange(length - 1), reverse=True
    )

    def start(decoder, activation_NxD):
        """Also the rows that the decoder is fed back: its table may be trained."""
        return *dec.prefill(decoder, base, activation_NxD), model_of(decoder, base).lookup(ids_NxT[:, :-1])

    (logits, _, _), transpose = jax.vjp(start, decoder, activation_NxD)
    d_prompt = jax.tree.map(lambda d, x: d.astype(x.dtype), d_prompt, past[0])
    d_logits = logits_cotangent(logits, 0, d_row)
    d_start, d_activation = transpose((d_logits, d_prompt, jnp.moveaxis(d_rows_TxNxD, 0, 1)))
    d_decoder = jax.tree.map(lambda d, x: d.astype(x.dtype), _add(d_decoder, d_start), decoder)
    return d_decoder, None, d_activation, None, None, None, None


_full.defvjp(_forward, _backward)
FORMS = {'full': _full, 'two_pass': _two_pass}


def _token(x, t):
    return jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)


def _slot(x_LxNxKxSxh, t, dtype):
    return jax.lax.dynamic_slice_in_dim(x_LxNxKxSxh, t, 1, 3).astype(dtype)


def _add(sums, terms):
    return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, terms)
