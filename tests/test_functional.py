"""subject.logits_at against subject.patch done one position at a time, in every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lens import hf, sharding
from lens.models import attention, subject
from lens.models.transformer import Transformer
from tests import hf_models
from tests.conftest import LAYER, TINY

B, S, V = 2, 13, 5
RNG = np.random.default_rng(7)
IDS = RNG.integers(0, 97, (B, S)).astype(np.int32)
# Inside the first window (4) and beyond it, first and last, unordered, neighbours, one twice.
POSITIONS = np.array([[2, 11, 0, 12, 11], [9, 3, 7, 5, 4]], np.int32)
VALUES = RNG.standard_normal((B, V, 48)).astype(np.float32)
MIDDLE = 2  # of six blocks: three are run beside, of both kinds where there are two


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    return hf_models.pairs(tmp_path_factory.mktemp('functional'))


def one_at_a_time(model, ids, positions, values, layer):
    """[B, V, vocabulary] from one patched forward per position."""

    def at(one):
        position_B, value_BxD = one
        logits = subject.patch(model, ids, position_B, value_BxD, layer)
        return logits[jnp.arange(len(ids)), position_B]

    return jnp.swapaxes(jax.lax.map(at, (positions.T, jnp.swapaxes(values, 0, 1))), 0, 1)


def outputs(logits_of, model, ids, positions, values, layer):
    """The logits, and in the values the gradient of a bent sum of them."""

    def loss(values):
        logits = logits_of(model, ids, positions, values, layer)
        return jnp.sum(jnp.sin(3 * logits)), logits

    grad, logits = jax.grad(loss, has_aux=True)(values)
    return logits, grad


jitted = jax.jit(outputs, static_argnums=(0, 5))
# Three blocks above the layer, one, none.
CASES = [(family, MIDDLE) for family in hf_models.DISTINCT] + [('gemma2', 4), ('llama', 5)]


@pytest.mark.parametrize(('family', 'layer'), CASES)
def test_logits_are_those_of_one_patch_after_the_other(pair, family, layer):
    args = pair(family).jax, IDS, POSITIONS, VALUES, layer
    got = jax.jit(subject.logits_at, static_argnums=4)(*args)
    assert got.shape == (B, V, 97) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, jax.jit(one_at_a_time, static_argnums=4)(*args), atol=1e-5)
    assert np.abs(got[0, 1] - got[0, 4]).max() > 0.1  # two values at one position


@pytest.mark.parametrize(
    ('family', 'remat'), [('gemma3_text', 'full'), pytest.param('gpt_oss', 'dots', marks=pytest.mark.slow)]
)
def test_gradient_in_the_values_is_that_of_the_patches(pair, family, remat):
    model = jax.tree.map(lambda x: x, pair(family).jax)
    model.config = dataclasses.replace(model.config, remat=remat)
    _, got = jitted(subject.logits_at, model, IDS, POSITIONS, VALUES, MIDDLE)
    _, want = jitted(one_at_a_time, model, IDS, POSITIONS, VALUES, MIDDLE)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_the_activations_themselves_give_the_natural_logits(pair):
    model = pair('gpt_oss').jax
    own = subject.read(model, IDS, POSITIONS, MIDDLE)
    natural = np.take_along_axis(np.asarray(model(IDS)), POSITIONS[..., None], axis=1)
    run = jax.jit(subject.logits_at, static_argnums=4)
    np.testing.assert_allclose(run(model, IDS, POSITIONS, own, MIDDLE), natural, atol=1e-5)
    assert (np.abs(run(model, IDS, POSITIONS, VALUES, MIDDLE) - natural).max(-1) > 0.1).all()  # others move them


def test_the_subject_is_a_constant(base, batch):
    values = np.ones((8, 2, TINY.d_model), np.float32)
    grads = jax.grad(lambda m: subject.logits_at(m, batch['tokens'], batch['positions'], values, LAYER).sum())(base)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_logits_do_not_depend_on_what_comes_later(base, batch):
    tokens, positions = batch['tokens'], batch['positions']
    values = np.random.default_rng(8).standard_normal((8, 2, TINY.d_model)).astype(np.float32)
    later = np.where(np.arange(11) >= positions[:, :1], 0, tokens)  # also the token whose state is replaced
    got = subject.logits_at(base, later, positions, values, LAYER)
    want = subject.logits_at(base, tokens, positions, values, LAYER)
    np.testing.assert_array_equal(got[:, 0], want[:, 0])
    assert (np.abs(got - want)[:, 1].max(-1) > 1e-4).all()


def test_many_positions_go_in_chunks(pair, monkeypatch):
    """Seven positions: shapes of this test alone, so that nothing was traced for them without chunks."""
    model, ids = pair('gemma2').jax, IDS[:, :-1]
    positions = np.array([[2, 10, 0, 11, 10, 5, 7], [9, 3, 7, 5, 4, 1, 8]], np.int32)
    values = np.random.default_rng(9).standard_normal((B, 7, 48)).astype(np.float32)
    want = one_at_a_time(model, ids, positions, values, MIDDLE)
    x = model.run_layers(model.embed(ids), 0, MIDDLE + 1)
    attend, queries = attention.attend, []

    def watched(q, *args, **kwargs):
        queries.append(q.shape[1])
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(attention, 'attend', watched)
    monkeypatch.setattr(attention, 'QUERY_CHUNK', 3)  # 7 = 3 + 3 + 1
    y = model.run_beside(x, jnp.asarray(values), positions, MIDDLE + 1, model.config.n_layers)
    assert set(queries) == {3}
    np.testing.assert_allclose(model.logits(y), want, atol=1e-5)


# Over two devices kv heads (2) and experts (4) are split; over four the heads do not divide and are replicated.
@pytest.mark.slow
@pytest.mark.parametrize(('family', 'data', 'model'), [('gpt_oss', 2, 2), ('gemma2', 2, 4)])
def test_on_a_mesh_as_on_one_device(tmp_path, family, data, model):
    hf_models.build(family, tmp_path / family, **({'num_local_experts': 4} if family == 'gpt_oss' else {}))
    rng = np.random.default_rng(10)
    batch = {
        'ids': rng.integers(0, 97, (4, S)).astype(np.int32),
        'positions': rng.integers(0, S, (4, V)).astype(np.int32),
        'values': rng.standard_normal((4, V, 48)).astype(np.float32),
    }
    want = jitted(subject.logits_at, hf.load_model(tmp_path / family), *batch.values(), MIDDLE)
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        sharded = hf.load_model(tmp_path / family, mesh=mesh)
        got = jitted(subject.logits_at, sharded, *sharding.put_batch(batch, mesh).values(), MIDDLE)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_the_gradient_keeps_no_second_copy_of_the_weights():
    """Of nine blocks, seven are run beside; the few tokens need little memory themselves."""
    config = dataclasses.replace(TINY, n_layers=9, d_ff=4096)
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    ids, positions = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (6, 2))
    values = jax.ShapeDtypeStruct((1, 2, TINY.d_model), jnp.float32)
    compiled = jitted.lower(subject.logits_at, model, ids, positions, values, LAYER).compile()
    one_block = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model.blocks)) / 9
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * one_block
