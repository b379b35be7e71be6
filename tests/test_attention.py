"""Attention and rotary tables alone, against numpy and published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import sharding
from lens.models import attention, rope
from lens.models.attention import KVCache
from lens.models.rope import Rope
from tests.compare import close

B, T, K, G, H = 2, 13, 2, 3, 4
RNG = np.random.default_rng(0)
Q = RNG.normal(size=(B, T, K, G, H)).astype(np.float32)
KEYS, VALUES = RNG.normal(size=(2, B, T, K, H)).astype(np.float32)
SINKS = 3 * RNG.normal(size=(K, G)).astype(np.float32)
SINKS[1, 2] = 20.0  # a head that looks at nothing
POSITIONS = np.arange(T)


def in_numpy(window, cap, sinks, q=Q):
    """One query at a time in float64."""
    out = np.zeros(q.shape)
    for b, t, k, g in np.ndindex(B, T, K, G):
        seen = np.arange(max(0, t - window + 1) if window else 0, t + 1)
        scores = 0.3 * KEYS[b, seen, k].astype(np.float64) @ q[b, t, k, g]
        scores = cap * np.tanh(scores / cap) if cap else scores
        weights = np.exp(scores)
        weights /= weights.sum() + (np.exp(float(sinks[k, g])) if sinks is not None else 0)
        out[b, t, k, g] = weights @ VALUES[b, seen, k]
    return out


def part(seen, rows=slice(None), at=slice(None), keys=KEYS, values=VALUES):
    """A part of attend: its name, keys, values and mask, of some rows and tokens."""
    return 'keys', *(jnp.moveaxis(x[rows, at], 1, 2) for x in (keys, values)), seen


def mask(at_T, window):
    seen = np.arange(T) <= at_T[:, None]
    return seen & (np.arange(T) > at_T[:, None] - window) if window else seen


@pytest.mark.parametrize(('window', 'cap', 'sinks'), [(0, 0.0, None), (4, 0.7, None), (4, 0.0, SINKS), (0, 0.7, SINKS)])
def test_against_numpy(window, cap, sinks):
    parts = [part(mask(POSITIONS, window))]
    got = jax.jit(lambda q: attention.attend(q, parts, scale=0.3, cap=cap, sinks_KxG=sinks))(Q)
    close(got, in_numpy(window, cap, sinks), steps=32)


@pytest.mark.parametrize('sinks', [None, SINKS])
def test_keys_in_parts_give_the_same_and_rows_may_share_a_part(sinks):
    """5 keys of the first row for both rows, then 8 of each row's own."""
    seen, keys, values = mask(POSITIONS, 4), KEYS.copy(), VALUES.copy()
    keys[1, :5], values[1, :5] = keys[0, :5], values[0, :5]
    parts = [
        part(seen[:, :5], slice(0, 1), slice(0, 5), keys, values),
        part(seen[:, 5:], slice(2), slice(5, T), keys, values),
    ]
    got = jax.jit(lambda q: attention.attend(q, parts, scale=0.3, sinks_KxG=sinks))(Q)
    whole = attention.attend(Q, [part(seen, keys=keys, values=values)], scale=0.3, sinks_KxG=sinks)
    close(got, np.asarray(whole), steps=32)


@pytest.mark.parametrize('shape', [(1, 1, K, G, H), (1, 3, K, 1, H), (1, 1, 1, 1, H), (2, 1, K, 1, H)])
def test_axes_of_one_element_live_where_the_others_do(shape):
    """One row, token or query a head on a mesh: JAX 0.11 guesses where a reshape of them lives, and guessed wrong."""
    mesh, (rows, tokens, heads, _, width) = sharding.make_mesh(1, 1), shape
    q, k = (RNG.normal(size=s).astype(np.float32) for s in (shape, (rows, heads, 1, width)))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, jax.NamedSharding(mesh, sharding.P(sharding.ROW_AXES, *at)))
            for x, at in ((q, (None, 'model', None, None)), (k, ('model', None, None)))
        ]
        seen = np.ones((tokens, 1), bool)
        got = jax.jit(lambda q, k: attention.attend(q, [('keys', k, k, seen)], scale=0.3))(*placed)
    close(np.asarray(got), np.broadcast_to(np.moveaxis(k, 1, 2)[:, :, :, None], shape), steps=32)


@pytest.mark.parametrize('window', [None, 0, 4])
def test_a_query_sees_those_before_it_in_its_window_and_itself(window):
    """As tokens of one call, and as those of a call that come after tokens in a cache, at the end of one with padding."""
    np.testing.assert_array_equal(attention.seen_beside(POSITIONS, T, True, window), mask(POSITIONS, window))
    np.testing.assert_array_equal(attention.seen_beside(POSITIONS, T, False, window), np.eye(T, dtype=bool))
    cache, at = KVCache(*(jnp.zeros((2, 3, 5, 4)) for _ in 'kv'), 5).padded(), POSITIONS[7:]
    assert cache.k.shape[-2] == attention.SLOTS
    for first in (0, 2):
        got = np.asarray(attention.seen_before(at, first, cache, window))
        np.testing.assert_array_equal(got[:, :5], mask(at, window)[:, first : first + 5])
        assert not got[:, 5:].any()


def test_gradients_with_sinks_are_finite_differences():
    """Against the float64 reference, along a random direction of the queries and of the sinks."""
    weights = RNG.normal(size=Q.shape)

    def loss(q, sinks):
        return jnp.sum(weights * attention.attend(q, [part(mask(POSITIONS, 4))], scale=0.3, sinks_KxG=sinks))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(Q, SINKS)
    for grad, (dq, ds) in zip(grads, ((1e-4, 0), (0, 1e-4)), strict=True):
        step = RNG.normal(size=grad.shape)
        up, down = (
            np.sum(
                weights * in_numpy(4, 0, SINKS + sign * ds * (step if ds else 0), Q + sign * dq * (step if dq else 0))
            )
            for sign in (1, -1)
        )
        np.testing.assert_allclose(np.sum(grad * step), (up - down) / 2e-4, rtol=1e-4)


def test_queries_in_chunks_give_the_same(monkeypatch):
    """13 queries in pieces of 4, the last of which is no whole one; values and gradients."""

    def run(q, keys):
        def rows(q, at_T):
            seen = (jnp.arange(T) <= at_T[:, None]) & (jnp.arange(T) > at_T[:, None] - 5)
            return attention.attend(q, [part(seen, keys=keys)], scale=0.3, sinks_KxG=SINKS)

        return jnp.sum(attention.in_chunks(rows, q, jnp.arange(T)) ** 2)

    want = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(Q, KEYS)
    monkeypatch.setattr(attention, 'QUERY_CHUNK', 4)
    program = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))
    assert 'while' in program.lower(Q, KEYS).as_text()
    close(program(Q, KEYS), want)


def test_yarn_table_of_gpt_oss():
    published = Rope(150000.0, 'yarn', 32.0, 4096, truncate=False, attention_factor=0.1 * np.log(32) + 1)
    freq = rope.inverse_frequencies(published, 64)
    np.testing.assert_allclose(freq[[0, 9, 31]], [1, 0.0317057, 3.0235e-7], rtol=2e-5)
    sin, cos = rope.tables(jnp.arange(300), (published,), 0, 64)
    np.testing.assert_allclose(sin[257], 1.346574 * np.sin(257 * freq), atol=2e-4)
    np.testing.assert_allclose(cos[0], 1.346574, rtol=1e-6)
