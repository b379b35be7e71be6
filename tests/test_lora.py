"""The scale of adapters at the start, and what their gradient moves between devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import roofline
from lens import sharding
from lens.models import flash, lora
from tests.compare import close
from tests.conftest import TINY


@pytest.mark.parametrize(('rs', 'scale'), [(False, 6.0 / 9), (True, 6.0 / 3)])
def test_the_scale_of_an_update_is_alpha_by_rank_or_by_its_root(base, rs, scale):
    """Alpha 6, rank 9: A has unit variance before the scale and 1/sqrt(fan in)."""
    a = lora.init_adapters(base.blocks, 2, 'up', 9, 6.0, jax.random.key(0), rs=rs)['up']['a']
    unit = jax.random.normal(jax.random.split(jax.random.key(0), 1)[0], (2, TINY.d_model, 9))
    np.testing.assert_allclose(a, scale * TINY.d_model**-0.5 * unit, rtol=1e-5)


@pytest.mark.parametrize('w_axes', [('model', None), (None, 'model')])
def test_the_gradient_of_an_adapter_gathers_no_activations(w_axes):
    """Of a matrix that is split over `model` it is made where the activations are, and gathered itself."""
    mesh, rank, wide, narrow = sharding.make_mesh(2, 4), 3, 64, 12
    first, last = (wide, narrow) if w_axes[0] else (narrow, wide)

    def array(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, sharding.P(*axes)))

    def loss(adapter, x, w):
        return jnp.sum(lora.project(x, w, {'m': adapter}, 'm', sharding.ACT if w_axes[0] else None) ** 2)

    adapter = {'a': array((first, rank)), 'b': array((rank, last))}
    x, w = array((4, 16, first), sharding.ROW_AXES, None, w_axes[0]), array((first, last), *w_axes)
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(adapter, x, w).compile().as_text()
    _, sent = roofline.by_kind(roofline.collectives(text)).get('all-gather', (0, 0.0))
    assert sent <= 3 / 4 * wide * rank * 4


@pytest.mark.parametrize(('tokens', 'barriers'), [(1, 9), (2, 0)])
def test_products_of_one_token_stand_apart_on_a_gpu(base, monkeypatch, tokens, barriers):
    """Inputs of q, k, v and of gate and up, outputs of all seven; numbers are as without."""

    def run(x):
        return base.run_layers(x, 0, TINY.n_layers)

    x = jax.random.normal(jax.random.key(0), (2, tokens, TINY.d_model))
    want = run(x)
    monkeypatch.setattr(sharding, 'platform', lambda: 'gpu')
    monkeypatch.setattr(flash, 'takes', lambda q, c: False)
    jax.clear_caches()
    assert str(jax.make_jaxpr(run)(x)).count('optimization_barrier') == barriers
    close(run(x), want)
    jax.clear_caches()  # of programs for another platform


def test_what_stands_apart_is_differentiable(monkeypatch):
    """As rows of a batch, too: gradients go through sampled words, a token at a time."""
    monkeypatch.setattr(sharding, 'platform', lambda: 'gpu')
    x = jnp.arange(6.0).reshape(2, 1, 3)
    got = jax.vmap(jax.grad(lambda x: jnp.sum(lora.apart(x, x)[1] ** 2)))(x[:, None])
    np.testing.assert_array_equal(got, 2 * x[:, None])
