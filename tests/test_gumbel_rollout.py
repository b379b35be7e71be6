"""Straight-through rollouts: the sampler's tokens, exact rows, and gradients equal to a plain scan's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import gumbel, sampling
from lens.models import decoder as dec
from lens.models import lora
from lens.models.streams import Stream
from tests import naive_rollout, programs
from tests.compare import close
from tests.conftest import TINY, make_base, make_lens

N, LENGTH, WIDTH, TAU = 16, 10, 20, 0.6  # a cache with room for one token less would be full; WIDTH: of the table
KEY = jax.random.key(5)
GEMMA = dataclasses.replace(
    TINY,
    tied=True,
    windows=(5, 0),
    embed_scale=TINY.d_model**0.5,
    norm='rms_offset',
    post_norms=True,
    qk_norm=True,
    attn_softcap=5.0,
    final_softcap=8.0,
    remat='dots',
)
TEMPERATURE = np.linspace(0, 1.5, N, dtype=np.float32)  # row 0 is greedy


@functools.cache
def case(name):
    """(decoder, base)"""
    config = TINY if name == 'llama' else GEMMA
    base = make_base(config)
    adapters = None
    if 'lora' in name:
        adapters = lora.init_adapters(base.blocks, config.n_layers, '.*', 2, 4.0, jax.random.key(1))
    return make_lens(base, own_base='own_base' in name, adapters=(adapters, None)).decoder, base


def inputs(n=N, length=LENGTH, width=WIDTH):
    """Activations, the reader's table, and what the loss multiplies words and logits with."""
    rng = np.random.default_rng(0)
    shapes = (n, TINY.d_model), (TINY.vocab_size, width), (n, length, width), (n, length, TINY.vocab_size)
    return [jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes]


def loss_of(out, up_words, up_logits):
    """Not linear in the words, as a reader is not, and with a term in the logits alone."""
    logp = jax.nn.log_softmax(out.stream.logits())
    return jnp.sum(jnp.sin(out.words_NxTxW) * up_words) + 0.1 * jnp.sum(logp * up_logits)


@functools.partial(jax.jit, static_argnames=('roll', 'length'))
def gradient(decoder, base, a, table, up_words, up_logits, tau, temperature, *, roll, length=LENGTH):
    """((decoder, activation, base, table) gradients, rollout)."""

    def loss(decoder, a, base, table):
        out = roll(decoder, base, a, table, KEY, length=length, tau=tau, temperature=temperature)
        return loss_of(out, up_words, up_logits), out

    return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(decoder, a, base, table)


FULL, TWO_PASS = (functools.partial(gumbel.rollout, form=form) for form in ('full', 'two_pass'))


def constants(gradients) -> bool:
    return not any(np.any(x) for x in jax.tree.leaves(gradients))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['llama', 'gemma_own_base_lora'])
def test_the_full_gradient_is_that_of_the_plain_scan(name):
    decoder, base = case(name)
    arguments = decoder, base, *inputs(), TAU, TEMPERATURE
    got, out = gradient(*arguments, roll=FULL)
    want, oracle = gradient(*arguments, roll=naive_rollout.rollout)
    np.testing.assert_array_equal(out.ids_NxT, oracle.ids_NxT)
    assert all(np.any(x) for x in jax.tree.leaves(want[:2]))
    close(got[:2], want[:2], steps=1024)
    assert constants(got[2:])  # of the base and the reader's table


def test_two_passes_have_the_gradient_of_relaxed_teacher_forcing():
    decoder, base = case('llama')
    a, table, *up = inputs()
    got, out = gradient(decoder, base, a, table, *up, TAU, TEMPERATURE, roll=TWO_PASS)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def want(decoder, a):
        logits = programs.teacher_forced_logits(decoder, base, a, out.ids_NxT)
        noise = jnp.stack([sampling.noise(KEY, t, (N, TINY.vocab_size)) for t in range(LENGTH)], axis=1)
        soft = jax.nn.softmax((logits + TEMPERATURE[:, None, None] * noise) / TAU)
        one_hot = jax.nn.one_hot(out.ids_NxT, TINY.vocab_size) + soft - jax.lax.stop_gradient(soft)
        return loss_of(gumbel.Words(None, one_hot @ table, Stream(logits)), *up)

    close(got[:2], want(decoder, a), steps=1024)
    assert constants(got[2:])


@pytest.mark.parametrize('roll', [FULL, TWO_PASS], ids=['full', 'two_pass'])
def test_tokens_are_the_samplers_words_exact_rows_and_tau_changes_the_gradient_alone(roll):
    decoder, base = case('llama')
    a, table, *up = inputs()
    run = functools.partial(gradient, decoder, base, a, table, *up, roll=roll)
    (floor, x), (below, y), (above, z) = (run(tau, TEMPERATURE) for tau in (gumbel.MIN_TAU, 0.001, 1.0))
    sampled = programs.sample(decoder, base, a, KEY, length=LENGTH, temperature=TEMPERATURE).ids_NxT
    for out in (x, y, z):
        np.testing.assert_array_equal(out.ids_NxT, sampled)
        np.testing.assert_array_equal(out.words_NxTxW, np.asarray(table)[np.asarray(sampled)])
    close(x.stream.logits(), programs.teacher_forced_logits(decoder, base, a, sampled))
    close(below, floor)
    one, other = np.ravel(floor[0].maps_w[...]), np.ravel(above[0].maps_w[...])
    assert np.dot(one, other) < 0.95 * np.linalg.norm(one) * np.linalg.norm(other)


def test_the_forms_have_different_gradients_of_the_same_rollout():
    (full, x), (two_pass, y) = (
        gradient(*case('llama'), *inputs(), TAU, TEMPERATURE, roll=roll) for roll in (FULL, TWO_PASS)
    )
    np.testing.assert_array_equal(x.ids_NxT, y.ids_NxT)
    one, other = (np.ravel(g[0].maps_w[...]) for g in (full, two_pass))
    assert np.linalg.norm(one - other) > 0.02 * np.linalg.norm(one)


@pytest.mark.slow
def test_memory_is_far_below_a_cache_for_every_token():
    """Which is what the plain scan keeps for the gradient."""
    (decoder, base), length = case('llama'), 128
    arguments = decoder, base, *inputs(length=length), TAU, TEMPERATURE
    program = gradient.lower(*arguments, roll=FULL, length=length).compile()
    cache = jax.eval_shape(lambda: dec.prefill(decoder, base, arguments[2])[1].room(len(arguments[2]), length))
    bytes_of_one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * length * bytes_of_one
