"""Straight-through rollouts: the sampler's tokens, exact rows, and gradients equal to a plain scan's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import gumbel, sampling, sharding
from lens.models import decoder as dec
from lens.models import lora
from tests import naive_rollout
from tests.conftest import TINY, make_base, make_lens

N, LENGTH, WIDTH, TAU = 16, 7, 20, 0.6  # WIDTH: of the table of the reader
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
GPT2 = dataclasses.replace(TINY, ropes=(), norm='layer', mlp='gelu_plain', o_bias=True, mlp_bias=True, tied=True)
GPT_OSS = dataclasses.replace(TINY, windows=(5, 0), sinks=True, n_experts=5, top_k=2)


def decoder_of(config, own_base=False, with_lora=False):
    base = make_base(config)
    adapters = with_lora and lora.init_adapters(base.blocks, config.n_layers, '.*', 2, 4.0, jax.random.key(1))
    return make_lens(base, own_base=own_base, adapters=(adapters or None, None)).decoder, base


CASES = {
    'llama': functools.partial(decoder_of, TINY),
    'llama_own_base_lora': functools.partial(decoder_of, TINY, True, True),
    'gemma_lora': functools.partial(decoder_of, GEMMA, False, True),
    'gpt2_own_base': functools.partial(decoder_of, GPT2, True),
    'gpt_oss': functools.partial(decoder_of, GPT_OSS),
}


def inputs(n=N, length=LENGTH, seed=0):
    """Activations, the reader's table, and what the loss multiplies words and logits with."""
    rng = np.random.default_rng(seed)
    shapes = (n, TINY.d_model), (TINY.vocab_size, WIDTH), (n, length, WIDTH), (n, length, TINY.vocab_size)
    return [jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes]


def loss_of(out, up_words, up_logits):
    """Not linear in the words, as a reader is not, and with a term in the logits alone."""
    logp = jax.nn.log_softmax(out.logits_NxTxV)
    return jnp.sum(jnp.sin(out.words_NxTxE) * up_words) + 0.1 * jnp.sum(logp * up_logits)


@functools.partial(jax.jit, static_argnames=('roll', 'form', 'length'))
def gradient(decoder, base, a, table, up_words, up_logits, tau, *, roll, form, length=LENGTH):
    """((decoder, activation) gradients, rollout)."""

    def loss(decoder, a):
        out = roll(decoder, base, a, table, KEY, length=length, tau=tau, form=form)
        return loss_of(out, up_words, up_logits), out

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(decoder, a)


def assert_close(got, want, rtol, zero=()):
    """Every leaf within rtol of the largest entry of the one that is wanted; those in `zero`, and no others, are 0."""
    leaves = jax.tree_util.tree_leaves_with_path(want)
    for (kp, y), x in zip(leaves, jax.tree.leaves(got), strict=True):
        path, x, y = sharding.path(kp), np.asarray(x), np.asarray(y)
        assert (np.abs(y).max() == 0) == (path in zero), path
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max(), err_msg=path)


@pytest.mark.parametrize(
    ('case', 'form'),
    [
        ('llama', 'full'),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ('llama_own_base_lora', 'full'),
                ('llama_own_base_lora', 'truncated'),
                ('gpt2_own_base', 'full'),
                ('gpt_oss', 'full'),
                ('gemma_lora', 'full'),
                ('gemma_lora', 'truncated'),
            )
        ),
    ],
)
def test_gradient_equals_that_of_the_plain_scan(case, form):
    decoder, base = CASES[case]()
    a, table, *up = inputs()
    got, out = gradient(decoder, base, a, table, *up, TAU, roll=gumbel.rollout, form=form)
    want, oracle = gradient(decoder, base, a, table, *up, TAU, roll=naive_rollout.rollout, form=form)
    np.testing.assert_array_equal(out.ids_NxT, oracle.ids_NxT)
    fed_back_only = () if form == 'full' else ('0/base/embedding',)  # untied: what a table row does is stopped
    assert_close(got, want, 1e-5, fed_back_only if decoder.base is not None else ())


@pytest.mark.slow
def test_the_forms_have_different_gradients_of_the_same_rollout():
    """What each form leaves out is there to be left out: no two gradients are the same."""
    decoder, base = CASES['llama']()
    a, table, *up = inputs()
    (full, x), (truncated, y), (two_pass, z) = (
        gradient(decoder, base, a, table, *up, TAU, roll=gumbel.rollout, form=form) for form in gumbel.FORMS
    )
    jax.tree.map(np.testing.assert_array_equal, (x.ids_NxT, x.words_NxTxE), (y.ids_NxT, y.words_NxTxE))
    np.testing.assert_array_equal(x.ids_NxT, z.ids_NxT)
    grads = [np.ravel(g[0].maps_w[...]) for g in (full, truncated, two_pass)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(grads[i] - grads[j]) > 0.02 * np.linalg.norm(grads[i]), (i, j)


@pytest.mark.parametrize('form', [pytest.param(f, marks=pytest.mark.slow) if f == 'full' else f for f in gumbel.FORMS])
def test_tokens_are_the_samplers_and_words_are_exact_rows(form):
    decoder, base = CASES['gemma_lora']()
    a, table, *_ = inputs()
    temperature = np.linspace(0, 1.5, N, dtype=np.float32)  # row 0 is greedy
    roll = jax.jit(gumbel.rollout, static_argnames=('length', 'form'))
    out = roll(decoder, base, a, table, KEY, length=LENGTH, tau=TAU, temperature=temperature, form=form)
    ids = sampling.sample(decoder, base, a, KEY, length=LENGTH, temperature=temperature).ids_NxT
    np.testing.assert_array_equal(out.ids_NxT, ids)
    np.testing.assert_array_equal(np.asarray(out.words_NxTxE), np.asarray(table)[np.asarray(ids)])
    logits = dec.teacher_forced_logits(decoder, base, a, ids)
    np.testing.assert_allclose(out.logits_NxTxV, logits, atol=1e-4)
    np.testing.assert_array_equal(out.ids_NxT[0], np.argmax(logits[0], axis=-1))


@pytest.mark.slow
def test_two_passes_have_the_gradient_of_relaxed_teacher_forcing():
    decoder, base = CASES['llama_own_base_lora']()
    a, table, *up = inputs()
    got, out = gradient(decoder, base, a, table, *up, TAU, roll=gumbel.rollout, form='two_pass')

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def want(decoder, a):
        logits = dec.teacher_forced_logits(decoder, base, a, out.ids_NxT)
        noise = jnp.stack([sampling.noise(KEY, t, (N, TINY.vocab_size)) for t in range(LENGTH)], axis=1)
        soft = jax.nn.softmax((logits + noise) / TAU)
        one_hot = jax.nn.one_hot(out.ids_NxT, TINY.vocab_size) + soft - jax.lax.stop_gradient(soft)
        return loss_of(gumbel.Rollout(None, one_hot @ table, logits), *up)

    assert_close(got, want(decoder, a), 1e-5)


@pytest.mark.parametrize('form', gumbel.FORMS)
def test_tau_changes_the_gradient_down_to_its_floor_and_never_the_tokens(form):
    decoder, base = CASES['llama']()
    a, table, *up = inputs()
    run = functools.partial(gradient, decoder, base, a, table, *up, roll=gumbel.rollout, form=form)
    (floor, x), (below, y), (above, z) = run(gumbel.MIN_TAU), run(0.001), run(1.0)
    jax.tree.map(np.testing.assert_array_equal, floor, below)
    jax.tree.map(np.testing.assert_array_equal, x, y)
    jax.tree.map(np.testing.assert_array_equal, x, z)
    a, b = np.ravel(floor[0].maps_w[...]), np.ravel(above[0].maps_w[...])
    assert np.dot(a, b) < 0.95 * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.parametrize('form', gumbel.FORMS)
def test_base_and_table_are_constants(form):
    decoder, base = CASES['llama']()
    a, table, *up = inputs(length=2)

    def loss(base, table):
        return loss_of(gumbel.rollout(decoder, base, a, table, KEY, length=2, tau=TAU, form=form), *up)

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(base, table)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.slow
def test_one_token_needs_no_step():
    decoder, base = CASES['llama']()
    a, table, *up = inputs(length=1)
    (full, _), (two_pass, _) = (
        gradient(decoder, base, a, table, *up, TAU, roll=gumbel.rollout, form=form, length=1)
        for form in ('full', 'two_pass')
    )
    assert_close(full, two_pass, 1e-5)


@pytest.mark.slow
def test_bfloat16_base_with_float32_sums():
    """Rounding of the base's dtype in every product; sums over tokens are not rounded to it."""
    decoder, base = CASES['gemma_lora']()
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    a, table, *up = inputs()
    got, out = gradient(decoder, base, a, table, *up, TAU, roll=gumbel.rollout, form='full')
    want, oracle = gradient(decoder, base, a, table, *up, TAU, roll=naive_rollout.rollout, form='full')
    np.testing.assert_array_equal(out.ids_NxT, oracle.ids_NxT)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == jnp.float32
        assert np.linalg.norm(x - y) < 0.03 * np.linalg.norm(y)


@pytest.mark.slow
@pytest.mark.parametrize('form', gumbel.FORMS)
def test_on_a_mesh_as_on_one_device(form):
    @jax.jit
    def run(decoder, base, a, table, *up):
        def loss(decoder, a):
            out = gumbel.rollout(decoder, base, a, table, KEY, length=LENGTH, tau=TAU, form=form)
            return loss_of(out, *up), out.ids_NxT

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(decoder, a)

    decoder, base = CASES['llama_own_base_lora']()
    a, _, up_words, up_logits = inputs()
    # a table that is split over `model`, as a reader's is
    up_words = jnp.concatenate([up_words, up_words[..., :4]], axis=-1)
    grads, ids = run(decoder, base, a, base.embedding[...], up_words, up_logits)
    # where nothing flows through the tokens that are fed back, nothing reaches the table they are looked up in
    zero = ['0/base/embedding'] * (form == 'truncated')
    for shape in ((8, 1), (2, 4)):
        mesh = sharding.make_mesh(*shape)
        with jax.set_mesh(mesh):
            placed = sharding.put_batch(dict(enumerate((a, up_words, up_logits))), mesh).values()
            there, up = next(iter(placed)), list(placed)[1:]
            d, m = sharding.place(decoder, mesh), sharding.place(base, mesh)
            got_grads, got_ids = run(d, m, there, m.embedding[...], *up)
        jax.tree.map(np.testing.assert_array_equal, got_ids, ids)
        assert_close(got_grads, grads, 1e-4, zero)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.shape, y.shape), got_grads[0], decoder)


@pytest.mark.slow
def test_memory_grows_with_the_length_and_not_with_its_square():
    decoder, base = CASES['llama']()

    def temporary_bytes(roll, length):
        a, table, *up = inputs(length=length)
        program = gradient.lower(decoder, base, a, table, *up, TAU, roll=roll, form='full', length=length).compile()
        return program.memory_analysis().temp_size_in_bytes

    exact, naive = ([temporary_bytes(roll, n) for n in (64, 128)] for roll in (gumbel.rollout, naive_rollout.rollout))
    print(f'temporary MB at T = 64, 128: exact {np.divide(exact, 1e6)}, plain scan {np.divide(naive, 1e6)}')
    assert exact[1] < 2.2 * exact[0]
    assert naive[1] > 3 * naive[0]
    assert exact[1] < naive[1] / 10


def test_an_unknown_form_is_refused():
    decoder, base = CASES['llama']()
    a, table, *_ = inputs()
    with pytest.raises(ValueError, match="form='half' is none of full, truncated, two_pass"):
        gumbel.rollout(decoder, base, a, table, KEY, length=2, tau=TAU, form='half')
