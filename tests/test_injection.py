"""How a vector enters a prompt: formulas on hand numbers, sites, and the same thing under jit, remat, cache, mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import sampling, sharding
from lens.models import decoder as dec
from lens.models import injection
from lens.models.decoder import Decoder, DecoderConfig, scaled_identity
from tests.conftest import LAYER, LENGTH, TINY, make_base

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 4)).astype(np.float32)
V = RNG.normal(size=(2, 2, 4)).astype(np.float32)
KEY = jax.random.key(3)


def test_sites_need_neighbours():
    assert injection.sites([7, 1, 7, 2, 7, 3, 7], 7) == (2, 4)
    assert injection.sites([0, 1, 7, 2, 1, 7, 3], 7, left=1, right=2) == (2,)
    assert injection.sites([1, 2, 3], 7) == ()


def test_overwrite_replaces_each_slot_by_its_own_value():
    want = X.copy()
    want[:, 1], want[:, 3] = V[:, 0], V[:, 1]
    np.testing.assert_array_equal(injection.overwrite(jnp.asarray(X), (1, 3), jnp.asarray(V)), want)
    with pytest.raises(ValueError, match='1 slots for 2 vectors'):
        injection.overwrite(jnp.asarray(X), (1,), jnp.asarray(V))


def test_norm_matched_addition_by_hand():
    h, v = np.array([[[3.0, 4.0], [1.0, 1.0]]]), np.array([[[0.0, 2.0]]])
    got = injection.add_norm_matched(jnp.asarray(h), (0,), jnp.asarray(v))
    np.testing.assert_allclose(got, [[[3.0, 9.0], [1.0, 1.0]]], rtol=1e-6)
    grad = jax.grad(lambda h: injection.add_norm_matched(h, (0,), jnp.asarray(v)).sum())(jnp.asarray(h))
    # d/dh of h + |h| v/|v|: 1 + h_i/|h| in the direction of v
    np.testing.assert_allclose(grad, [[[1.6, 1.8], [1.0, 1.0]]], rtol=1e-6)


def test_fixed_norm():
    got = np.asarray(injection.fixed_norm(jnp.asarray(V[0]), 30.0))
    np.testing.assert_allclose(got, V[0] / np.linalg.norm(V[0], axis=-1, keepdims=True) * 30, rtol=1e-5)
    assert not np.asarray(injection.fixed_norm(jnp.zeros((1, 4)), 30.0)).any()
    assert np.isfinite(jax.grad(lambda v: injection.fixed_norm(v, 2.0).sum())(jnp.full((1, 4), 1e-20))).all()


def decoder(base, family, more=(), blocks=2):
    c = DecoderConfig(blocks, False, LAYER, family, 5.0, 11, more)
    maps = scaled_identity(c, 1.0, TINY.d_model, np.arange(1, 5, dtype=np.float32)) if family == 'affine' else None
    return Decoder(c, [3, 7], [9, 2, 4], base, maps, own_base=False, adapters=None)


def by_hand(base, d, a, ids):
    """Logits of the words, block by block, one activation at a time."""
    c, table = d.config, base.embedding[...]
    rows = np.array(jnp.concatenate([d.prompt_left[...], jnp.zeros((1, 24)), d.prompt_right[...], table[ids[:-1]]]))
    for s in d.slots:
        if c.injection == 'replace':
            rows[s] = a * c.norm / np.linalg.norm(a)
        elif c.injection == 'add':
            rows[s] = table[c.marker]
    x = jnp.asarray(rows)[None]
    for k in range(base.config.n_layers):
        for s in d.slots:
            if c.injection == 'affine' and k < c.patched_blocks:
                x = x.at[0, s].set(a @ d.maps_w[...][k] + d.maps_b[...][k])
            elif c.injection == 'add' and k == 2:
                h = x[0, s]
                x = x.at[0, s].set(h + jnp.linalg.norm(h) * a / jnp.linalg.norm(a))
        x = base.run_layers(x, k, k + 1)
    return base.logits(x)[0, d.prompt_len - 1 :]


@pytest.fixture(scope='module')
def activations():
    return RNG.normal(size=(8, 24)).astype(np.float32)


@pytest.mark.parametrize('more', [(), (1,)])
@pytest.mark.parametrize('family', injection.FAMILIES)
def test_every_family_equals_the_stack_by_hand(base, activations, family, more):
    d, ids = decoder(base, family, more), RNG.integers(0, TINY.vocab_size, (8, LENGTH))
    assert d.slots == ((2, 4) if more else (2,))
    got = jax.jit(dec.teacher_forced_logits)(d, base, activations, ids)
    for b in range(2):
        np.testing.assert_allclose(got[b], by_hand(base, d, activations[b], ids[b]), atol=1e-4)


@pytest.mark.parametrize('family', [pytest.param('replace', marks=pytest.mark.slow), 'add'])
def test_the_sampler_and_the_scorer_inject_alike_with_and_without_remat(base, activations, family):
    d = decoder(base, family, (1,))
    s = jax.jit(lambda d: sampling.sample(d, base, activations, KEY, length=LENGTH, group=2))(d)
    kept = jax.tree.map(lambda x: x, base)
    kept.config = dataclasses.replace(base.config, remat='dots')
    for model in (base, kept):
        logp, _ = dec.score(d, model, jnp.repeat(activations, 2, axis=0), s.ids_NxT)
        np.testing.assert_allclose(logp, s.logp_NxT, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('family', [pytest.param('replace', marks=pytest.mark.slow), 'add'])
def test_sharded_injection_is_unsharded_injection(activations, family):
    ids = RNG.integers(0, TINY.vocab_size, (8, LENGTH))

    def logits_and_gradient(shape):
        mesh = sharding.make_mesh(*shape)
        with jax.set_mesh(mesh):
            base = sharding.place(make_base(), mesh)
            d = sharding.place(decoder(base, family, (1,)), mesh)
            batch = sharding.put_batch({'a': activations, 'ids': ids}, mesh)

            def f(d):
                logits = dec.teacher_forced_logits(d, base, batch['a'], batch['ids'])
                return jnp.mean(jnp.sin(logits)), logits

            (_, logits), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(d)
            return jax.tree.map(np.asarray, (logits, grads))

    plain, other = logits_and_gradient((1, 1)), logits_and_gradient((2, 4))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), plain, other)
