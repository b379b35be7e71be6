"""Families on a mesh: loaded into their places, the same logits, gradients and cache as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import hf, sharding
from tests import hf_models

IDS = np.random.default_rng(2).integers(0, 97, (4, 9)).astype(np.int32)
# Over two devices kv heads (2) and experts (4) are split; over four the heads do not divide and are replicated.
CASES = [
    ('gpt_oss', 2, 2),
    *(pytest.param(*c, marks=pytest.mark.slow) for c in (('gpt_oss', 1, 4), ('gemma2', 2, 4), ('gpt2', 4, 2))),
]


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp('sharded')
    small = {'num_hidden_layers': 2}
    hf_models.build('gpt_oss', root / 'gpt_oss', num_local_experts=4, **small)
    hf_models.build('gemma2', root / 'gemma2', layer_types=[hf_models.SLIDING, hf_models.FULL], **small)
    hf_models.build('gpt2', root / 'gpt2', n_layer=2)
    return root


def outputs(model, ids):
    """Logits, the gradient of a loss in the rows that enter, and cached logits of the last tokens."""
    n = model.config.n_layers

    def loss(x):
        logits = model.logits(model.run_layers(x, 0, n))
        return jnp.sum(jnp.sin(3 * logits)), logits

    grad, logits = jax.grad(loss, has_aux=True)(model.embed(ids))
    cache = model.empty_cache(*ids.shape)
    _, cache = model.run_layers_cached(model.embed(ids[:, :6]), 0, n, cache, 0)
    x, _ = model.run_layers_cached(model.embed(ids[:, 6:], 6), 0, n, cache, 6)
    return {'logits': logits, 'grad': grad, 'cached': model.logits(x)}


@pytest.mark.parametrize(('family', 'data', 'model'), CASES)
def test_on_a_mesh_as_on_one_device(directories, family, data, model):
    want = jax.jit(outputs)(hf.load_model(directories / family), IDS)
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        sharded = hf.load_model(directories / family, mesh=mesh)
        got = jax.jit(outputs)(sharded, sharding.put_batch({'ids': IDS}, mesh)['ids'])
    assert any('model' in jax.typeof(x).sharding.spec for x in jax.tree.leaves(sharded))
    for name, x in want.items():
        x = np.asarray(x)
        np.testing.assert_allclose(np.asarray(got[name]), x, rtol=1e-4, atol=1e-5 * np.abs(x).max(), err_msg=name)
    np.testing.assert_allclose(np.asarray(got['cached']), np.asarray(want['logits'])[:, 6:], atol=1e-4)


def test_experts_are_split_where_the_mesh_divides_them(directories):
    for size, share in ((2, 1 / 2), (4, 1 / 4), (3, 1)):
        mesh = sharding.make_mesh(1, size)
        moe = hf.load_model(directories / 'gpt_oss', mesh=mesh).blocks.moe
        for x in (moe.gate_up[...], moe.gate_up_bias[...], moe.down[...], moe.down_bias[...]):
            assert np.prod(x.sharding.shard_shape(x.shape)) == share * x.size
        assert moe.router_w[...].sharding.is_fully_replicated


@pytest.fixture(scope='module')
def packed_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp('mxfp4') / 'm'
    hf_models.mxfp4(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize('packed', [True, False])
def test_what_is_split_over_data_too_computes_the_same(packed_directory, packed):
    """Packed experts and dequantised ones; every matrix is split over the rows' devices as well."""
    want = jax.jit(outputs)(hf.load_model(packed_directory, packed=packed), IDS)
    mesh = sharding.make_mesh(2, 2)
    with jax.set_mesh(mesh):
        split = hf.load_model(packed_directory, packed=packed, mesh=mesh, split_above=0)
        got = jax.jit(outputs)(split, sharding.put_batch({'ids': IDS}, mesh)['ids'])
    for kp, x in jax.tree_util.tree_leaves_with_path(split):
        name = sharding.path(kp)
        small = name.endswith(('bias', 'router_w', 'scale', 'sinks'))
        assert ('data' in jax.typeof(x).sharding.spec) == (not small), name
    for name, x in want.items():
        x = np.asarray(x)
        np.testing.assert_allclose(np.asarray(got[name]), x, rtol=1e-4, atol=1e-5 * np.abs(x).max(), err_msg=name)
