"""Numbers of tokens from slices of logits against those from whole logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import losses, sharding
from lens.models import streams
from lens.models.streams import Stream
from tests.compare import close
from tests.tiny_world import LENGTH, TINY, make_base

N = 6
CONFIGS = {'head': TINY, 'tied': dataclasses.replace(TINY, tied=True, final_softcap=3.0)}


def given():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, N, LENGTH, TINY.d_model), np.float32)
    return {'x': x, 'y': y, 'ids': rng.integers(0, TINY.vocab_size, (N, LENGTH)), 'weights': rng.random((N, LENGTH, 3))}


def loss(model, x, apart: bool, y, ids, weights):
    """A sum in which no token counts as another, of all numbers that objectives make of logits."""

    def numbers(logits, ids):
        kl = losses.kl(logits['other'], logits['own'])
        return losses.token_log_probs(logits['own'], ids), {'entropy': losses.entropy(logits['own']), 'kl': kl}

    own, other = Stream(x, model), Stream(y, jax.lax.stop_gradient(model))
    if apart:
        out = streams.by_slices(numbers, {'own': own, 'other': other}, ids)
    else:
        out = numbers({'own': own.logits(), 'other': other.logits()}, ids)
    return jnp.sum(jnp.stack(jax.tree.leaves(out), axis=-1) * weights), out


def gradient(apart, model, a):
    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    return grad(model, a['x'], apart, a['y'], a['ids'], a['weights'])


# Tokens at a time: 5 = 2 + 2 + 1, five slices, a limit below one token.
WHOLE = 2 * 2 * N * TINY.vocab_size


@pytest.mark.parametrize(('name', 'most'), [('head', WHOLE), ('head', 1), ('tied', WHOLE // 2)])
def test_values_and_gradients_are_those_of_whole_logits(monkeypatch, name, most):
    """Also of the head, which may be trained, and of a table that is the head as well."""
    model = make_base(CONFIGS[name])
    want = gradient(False, model, given())
    monkeypatch.setattr(streams, 'MOST', most)
    got = gradient(True, model, given())
    close(got, want)
    trained = got[0][0].embedding if name == 'tied' else got[0][0].head
    assert np.any(trained) and np.any(got[0][0].final_norm.scale)


def test_no_logits_are_whole_where_they_are_too_many(monkeypatch):
    monkeypatch.setattr(streams, 'MOST', 2 * N * TINY.vocab_size)
    text = str(jax.make_jaxpr(lambda m, a: gradient(True, m, a))(make_base(), given()))
    assert f'{N},1,{TINY.vocab_size}]' in text and f'{N},{LENGTH},{TINY.vocab_size}]' not in text
    monkeypatch.undo()
    assert 'scan' not in str(jax.make_jaxpr(lambda m, a: loss(m, apart=True, **a)[0])(make_base(), given()))


def test_a_slice_has_what_one_device_holds(monkeypatch):
    """Rows and words are split over the mesh: the same limit lets eight times as many through."""
    monkeypatch.setattr(streams, 'MOST', 2 * N * LENGTH * TINY.vocab_size // 4)
    want = gradient(False, make_base(), given())
    mesh = sharding.make_mesh(2, 2)
    with jax.set_mesh(mesh):
        a, model = sharding.put_batch(given(), mesh), sharding.place(make_base(), mesh, 0)
        assert 'scan' not in str(jax.make_jaxpr(lambda m, a: loss(m, apart=True, **a)[0])(model, a))
        monkeypatch.setattr(streams, 'MOST', streams.MOST // 2)
        got = jax.tree.map(np.asarray, gradient(True, model, a))
    close(got, want)
