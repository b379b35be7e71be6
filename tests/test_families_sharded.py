"""Families on a mesh: loaded into their places, the same logits, gradients and cache as on one device."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import hf, sharding
from lens.models import families
from tests import hf_models

IDS = np.random.default_rng(2).integers(0, 97, (4, 9)).astype(np.int32)
GPT_OSS = json.loads((pathlib.Path(__file__).parent / 'hf_configs/gpt-oss-20b.json').read_text())
# Over two devices kv heads (2) and experts (4) are split; over four the heads do not divide and are replicated.
CASES = [('gpt_oss', 2, 2), ('gemma2', 1, 4)]


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp('sharded')
    hf_models.build('gpt_oss', root / 'gpt_oss', num_local_experts=4, num_hidden_layers=2)
    types = [hf_models.SLIDING, hf_models.FULL]
    hf_models.build('gemma2', root / 'gemma2', layer_types=types, num_hidden_layers=2)
    hf_models.mxfp4(root / 'mxfp4')
    return root


@jax.jit
def outputs(model, ids):
    """Logits, the gradient of a loss in the rows that enter, and cached logits of the last token."""
    n = model.config.n_layers

    def loss(x):
        logits = model.logits(model.run_layers(x, 0, n))
        return jnp.sum(jnp.sin(3 * logits)), logits

    grad, logits = jax.grad(loss, has_aux=True)(model.embed(ids))
    last = ids.shape[1] - 1
    _, cache = model.run_cached(model.embed(ids[:, :last]), 0, n)
    x, _ = model.run_cached(model.embed(ids[:, last:], last), 0, n, (cache,), last)
    return {'logits': logits, 'grad': grad, 'cached': model.logits(x)}


def assert_same(got, want):
    """Sums in another order: to a few thousand roundings of the spread."""
    for name, x in want.items():
        error = np.abs(np.asarray(got[name]) - np.asarray(x)).max() / np.std(x)
        assert error < 1000 * np.finfo(np.float32).eps, (name, error)


@pytest.mark.slow
@pytest.mark.parametrize(('family', 'data', 'model'), CASES)
def test_on_a_mesh_as_on_one_device(directories, family, data, model):
    want = outputs(hf.load_model(directories / family), IDS)
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        sharded = hf.load_model(directories / family, mesh=mesh)
        got = outputs(sharded, sharding.put_batch({'ids': IDS}, mesh)['ids'])
    assert any('model' in jax.typeof(x).sharding.spec for x in jax.tree.leaves(sharded))
    assert_same(got, want)
    assert_same({'cached': want['cached']}, {'cached': np.asarray(want['logits'])[:, -1:]})


def test_experts_are_split_where_the_mesh_divides_them():
    config = dataclasses.replace(families.from_hf(GPT_OSS), n_experts=4)
    for size, share in ((2, 1 / 2), (4, 1 / 4), (3, 1)):
        moe = hf.abstract_model(config, mesh=sharding.make_mesh(1, size)).blocks.moe
        for x in jax.tree.leaves((moe.gate_up, moe.gate_up_bias, moe.down, moe.down_bias)):
            assert np.prod(x.sharding.shard_shape(x.shape)) == share * x.size
        assert jax.tree.leaves(moe.router_w)[0].sharding.is_fully_replicated


@pytest.mark.slow
def test_what_is_split_over_data_too_is_the_same(directories):
    """Packed experts compute it, dequantised ones are it; every matrix is split over the rows' devices as well."""
    whole, mesh = hf.load_model(directories / 'mxfp4'), sharding.make_mesh(2, 2)
    with jax.set_mesh(mesh):
        split, packed = (
            hf.load_model(directories / 'mxfp4', packed=packed, mesh=mesh, split_above=0) for packed in (False, True)
        )
        got = outputs(packed, sharding.put_batch({'ids': IDS}, mesh)['ids'])
    assert_same(got, outputs(whole, IDS))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(split), jax.tree.leaves(whole))
    for model in (split, packed):
        for kp, x in jax.tree_util.tree_leaves_with_path(model):
            name = sharding.path(kp)
            small = name.endswith(('bias', 'router_w', 'scale', 'sinks'))
            assert ('data' in jax.typeof(x).sharding.spec) == (not small), name
