"""The noise of sampling and the largest number, against JAX's own, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import draws, sharding


@pytest.mark.parametrize('shape', [(1,), (3, 130), (7, 2, 57)])
def test_noise_is_that_of_jax(shape):
    for seed in (0, 1, 2**31 + 5):
        key = jax.random.fold_in(jax.random.key(seed), 3)
        np.testing.assert_array_equal(draws.gumbel(key, shape), jax.random.gumbel(key, shape, jnp.float32))


def test_a_key_for_each_row_draws_as_that_key_alone():
    keys = jax.random.split(jax.random.key(4), 5)
    rows = jax.vmap(lambda k: draws.gumbel(k, (9,)))(keys)
    np.testing.assert_array_equal(rows, jax.vmap(lambda k: jax.random.gumbel(k, (9,), jnp.float32))(keys))


def test_keys_of_another_kind_go_to_jax():
    key = jax.random.key(3, impl='rbg')
    np.testing.assert_array_equal(draws.gumbel(key, (2, 5)), jax.random.gumbel(key, (2, 5), jnp.float32))


def test_noise_is_the_same_on_a_mesh():
    key, alone = jax.random.key(1), draws.gumbel(jax.random.key(1), (8, 50))
    mesh = sharding.make_mesh(4, 2)
    with jax.set_mesh(mesh):
        split = jax.jit(lambda key: draws.gumbel(key, (8, 50), sharding.rows(2)))(key)
        assert len(split.addressable_shards) == 8 and split.addressable_shards[0].data.shape == (2, 50)
        np.testing.assert_array_equal(split, alone)
        drawn = jax.jit(draws.argmax)(split)
    np.testing.assert_array_equal(drawn, np.argmax(alone, axis=-1))


@pytest.mark.parametrize('v', [1, 127, 128, 129, 640])
def test_argmax_is_that_of_jax(v):
    x = np.random.default_rng(v).integers(0, max(v // 3, 1), size=(9, v)).astype(np.float32)  # many are equal
    x[3] = -np.inf
    np.testing.assert_array_equal(draws.argmax(x), np.argmax(x, axis=-1))
    assert draws.argmax(x).dtype == jnp.int32
