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
from lens.models.attention import KVCache, Stream
from lens.models.transformer import REMAT_POLICIES, at_layer, model_of

MIN_TAU = 0.1


class Words(NamedTuple):
    """Tokens of N explanations. logits: float32, of the draw of each token, differentiable in every form.

    words: rows of the given table, exactly table[ids] in value. logp: of the tokens by the sampler, where `logits`
    are not the sampler's own.
    """

    ids_NxT: jax.Array
    words_NxTxW: jax.Array
    logits_NxTxV: jax.Array
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
    frozen = jax.lax.stop_gradient(decoder)
    ids, logp = sampling.sample(frozen, base, activation_NxD, key, length=length, temperature=temperature_N)
    logits = dec.teacher_forced_logits(decoder, base, activation_NxD, ids)
    logits = sharding.reshard(logits, sharding.rows(3))

    @jax.checkpoint
    def relaxed(logits_NxV, t):
        return _relaxed_rows(sampling.perturbed(logits_NxV, key, t, temperature_N), tau, table_VxW)

    def body(_, at):
        mixed = relaxed(*at)
        return None, mixed - jax.lax.stop_gradient(mixed)  # zero, with a gradient

    _, push_TxNxW = jax.lax.scan(body, None, (jnp.moveaxis(logits, 1, 0), jnp.arange(length)))
    return Words(ids, _lookup(table_VxW, ids) + jnp.moveaxis(push_TxNxW, 0, 1), logits, logp)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _full(length: int, decoder, base, activation_NxD, table_VxW, key, tau, temperature_N) -> Words:
    return _forward(length, decoder, base, activation_NxD, table_VxW, key, tau, temperature_N)[0]


def _forward(length, decoder, base, activation_NxD, table_VxW, key, tau, temperature_N):
    """The loop of sampling.sample; the final cache lacks the last token."""
    logits, cache = dec.prefill(decoder, base, activation_NxD, length)
    ids, kept, cache = sampling.draw(
        decoder, base, logits, cache, key, length=length, temperature_N=temperature_N, keep=lambda logits, _: logits
    )
    residuals = decoder, base, activation_NxD, table_VxW, key, tau, temperature_N, ids, cache
    return Words(ids, _lookup(table_VxW, ids), kept), residuals


def _backward(length, residuals, cotangents):
    """Cotangents of _full's arguments: the steps in reverse, each linearised at the final cache."""
    decoder, base, activation_NxD, table_VxW, key, tau, temperature_N, ids_NxT, cache = residuals
    d_words_NxTxW, d_logits_NxTxV = cotangents.words_NxTxW, cotangents.logits_NxTxV
    own_table_VxD = model_of(decoder, base).table
    tables = table_VxW, own_table_VxD

    def logits_cotangent(logits_NxV, t, d_row_NxD):
        """Of the logits of token t: their own, and that of the rows made of them, read and fed back."""

        def relaxed(logits_NxV):
            return _relaxed_rows(sampling.perturbed(logits_NxV, key, t, temperature_N), tau, tables)

        (through_rows,) = jax.vjp(relaxed, logits_NxV)[1]((_token(d_words_NxTxW, t), d_row_NxD))
        return _token(d_logits_NxTxV, t) + through_rows

    def body(carry, t):
        d_decoder, d_cache, d_row = carry
        step = functools.partial(_step, base=base, t=t)
        (logits, _), transpose = jax.vjp(step, decoder, _lookup(own_table_VxD, _token(ids_NxT, t)[:, None]), cache)
        start = decoder.prompt_len + t
        d_kv = jax.tree.map(lambda d, x: _slots(d, start, 1, x.dtype), d_cache, cache)
        d_step, d_rows_Nx1xD, d_read = transpose((logits_cotangent(logits, t + 1, d_row), d_kv))
        d_row = d_rows_Nx1xD[:, 0]
        return (_add(d_decoder, d_step), _add(d_cache, d_read), d_row), d_row

    d_decoder, d_cache = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (decoder, cache))
    d_row = jnp.zeros_like(_lookup(own_table_VxD, ids_NxT[:, -1:])[:, 0])  # the last token is fed to nobody
    (d_decoder, d_cache, d_row), d_rows_TxNxD = jax.lax.scan(
        body, (d_decoder, d_cache, d_row), jnp.arange(length - 1), reverse=True
    )
    start = functools.partial(_start, base=base, ids_NxT=ids_NxT[:, :-1])
    (logits, _, _), transpose = jax.vjp(start, decoder, activation_NxD)
    d_kv = jax.tree.map(lambda d, x: _slots(d, 0, decoder.prompt_len, x.dtype), d_cache, cache)
    d_logits = logits_cotangent(logits, 0, d_row)
    d_start, d_activation = transpose((d_logits, d_kv, jnp.moveaxis(d_rows_TxNxD, 0, 1)))
    d_decoder = jax.tree.map(lambda d, x: d.astype(x.dtype), _add(d_decoder, d_start), decoder)
    return d_decoder, None, d_activation, None, None, None, None


_full.defvjp(_forward, _backward)
FORMS = {'full': _full, 'two_pass': _two_pass}


def _token(x, t):
    return jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)


def _slots(x_LxNxSxKxh, start, n: int, dtype):
    return jax.lax.dynamic_slice_in_dim(x_LxNxSxKxh, start, n, 2).astype(dtype)


def _add(sums, terms):
    return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, terms)


@jax.named_scope('prefill')
def _start(decoder, activation_NxD, *, base, ids_NxT):
    """dec.prefill to differentiate: logits NxV of the first token, the prompt's keys and values, the
    decoder's rows of the tokens that it is fed back."""
    model = model_of(decoder, base)
    x, hook = dec.prompt_rows(decoder, model, activation_NxD)
    x, prompt = _run_layers(model, decoder.adapters, model.enter(x), 0, None, hook)
    return sharding.reshard(model.logits(x[:, -1:])[:, 0], sampling.ROWS), prompt, model.lookup(ids_NxT)


@jax.named_scope('decode')
def _step(decoder, row_Nx1xD, cache, *, base, t):
    """dec.step to differentiate: logits NxV of token t+1 after `row` of token t, and its keys and values."""
    model = model_of(decoder, base)
    start = decoder.prompt_len + t
    x, written = _run_layers(model, decoder.adapters, model.enter(row_Nx1xD, start), start, cache)
    return sharding.reshard(model.logits(x)[:, 0], sampling.ROWS), written


def _run_layers(model, adapters, x_NxTxD, start, cache: KVCache | None, before_block=None):
    """Stream after all blocks of tokens at start..start+T-1, and their keys and values as a cache of T slots.

    cache: what they look at besides themselves, slots before `start`; T is 1 where there is one.
    """
    c = model.config
    positions_T = start + jnp.arange(x_NxTxD.shape[1])

    def layer(x, at):
        i, past = at
        block, adapter = at_layer((model.blocks, adapters), i)
        if before_block is not None:
            x = before_block(x, i)
        return block(x, i, positions_T, c, past and Stream(*past), adapter)

    layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat])
    x, written = jax.lax.scan(layer, x_NxTxD, (jnp.arange(c.n_layers), cache))
    return x, KVCache(*written)
