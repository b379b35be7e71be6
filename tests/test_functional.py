"""subject.stream_at, its logits, against subject.patch done one position at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lens import sharding
from lens.models import attention, subject
from lens.models.transformer import Transformer
from tests import hf_models, programs
from tests.compare import close, differs
from tests.conftest import LAYER, TINY

B, S, P = 2, 13, 5
RNG = np.random.default_rng(7)
IDS = RNG.integers(0, 97, (B, S)).astype(np.int32)
# Inside the first window (4) and beyond it, first and last, unordered, neighbours, one twice.
POSITIONS = np.array([[2, 11, 0, 12, 11], [9, 3, 7, 5, 4]], np.int32)
VALUES = RNG.standard_normal((B, P, 48)).astype(np.float32)
MIDDLE = 2  # of six blocks: three are run beside, of both kinds where there are two


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    return hf_models.pairs(tmp_path_factory.mktemp('functional'))


def one_at_a_time(model, ids, positions, values, layer):
    """BxPxV from one patched forward per position."""

    def at(one):
        position_B, value_BxD = one
        logits = subject.patch(model, ids, position_B, value_BxD, layer)
        return logits[jnp.arange(len(ids)), position_B]

    return jnp.swapaxes(jax.lax.map(at, (positions.T, jnp.swapaxes(values, 0, 1))), 0, 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def outputs(logits_of, argnums, model, ids, positions, values, layer):
    """The logits, and the gradients of a bent sum of them in the model (0) or the values (1)."""

    def loss(model, values):
        logits = logits_of(model, ids, positions, values, layer)
        return jnp.sum(jnp.sin(3 * logits)), logits

    grads, logits = jax.grad(loss, argnums, has_aux=True)(model, values)
    return logits, grads


# Windows, caps, a scale at the input and tied weights; sinks and experts.
@pytest.mark.parametrize('family', ['gemma2', pytest.param('gpt_oss', marks=pytest.mark.slow)])
def test_logits_and_gradients_are_those_of_one_patch_after_the_other(pair, family):
    model = pair(family).jax
    got, (constant, grad) = outputs(programs.logits_at, (0, 1), model, IDS, POSITIONS, VALUES, MIDDLE)
    assert got.shape == (B, P, 97) and got.dtype == jnp.float32
    close((got, grad), outputs(one_at_a_time, 1, model, IDS, POSITIONS, VALUES, MIDDLE), steps=1024)
    assert not any(np.any(g) for g in jax.tree.leaves(constant))
    differs(got[0, 1], got[0, 4])  # two values at one position


def test_the_activations_themselves_give_the_natural_logits(base, batch):
    natural, streams = programs.hidden(base, batch['tokens'])
    positions = batch['positions']
    for layer in (LAYER, TINY.n_layers - 1):  # one block above it, none
        own, want = (np.take_along_axis(np.asarray(x), positions[..., None], 1) for x in (streams[layer + 1], natural))
        close(programs.logits_at(base, batch['tokens'], positions, own, layer=layer), want)


def test_logits_do_not_depend_on_what_comes_later(base, batch):
    tokens, positions = batch['tokens'], batch['positions']
    values = np.random.default_rng(8).standard_normal((8, 2, TINY.d_model)).astype(np.float32)
    later = np.where(np.arange(11) >= positions[:, :1], 0, tokens)  # also the token whose state is replaced
    got, want = (programs.logits_at(base, ids, positions, values, layer=LAYER) for ids in (later, tokens))
    np.testing.assert_array_equal(got[:, 0], want[:, 0])
    for x, y in zip(got[:, 1], want[:, 1], strict=True):
        differs(x, y)


def test_many_positions_go_in_chunks(base, batch, monkeypatch):
    """Seven positions: shapes of this test alone, so that nothing was traced for them without chunks."""
    ids, rng = batch['tokens'], np.random.default_rng(9)
    positions = rng.integers(0, ids.shape[1], (len(ids), 7))
    values = rng.standard_normal((*positions.shape, TINY.d_model)).astype(np.float32)
    want = [
        programs.logits_at(base, ids, positions[:, i], values[:, i], layer=LAYER)
        for i in (slice(0, 2), slice(2, 4), slice(4, 6), slice(5, 7))
    ]
    attend, queries = attention.attend, []

    def watched(q, *args, **kwargs):
        queries.append(q.shape[1])
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(attention, 'attend', watched)
    monkeypatch.setattr(attention, 'QUERY_CHUNK', 3)  # 7 = 3 + 3 + 1
    got = programs.logits_at(base, ids, positions, values, layer=LAYER)
    assert 3 in queries
    close(got, np.concatenate([*want[:3], want[3][:, 1:]], axis=1))


@pytest.mark.slow
def test_on_a_mesh_as_on_one_device(base, batch):
    """Heads and vocabulary split over two devices; experts are in test_moe."""
    values = np.random.default_rng(10).standard_normal((8, 2, TINY.d_model)).astype(np.float32)
    arguments = {'ids': batch['tokens'], 'positions': batch['positions'], 'values': values}
    want = outputs(programs.logits_at, 1, base, *arguments.values(), LAYER)
    mesh = sharding.make_mesh(2, 2)
    with jax.set_mesh(mesh):
        placed = sharding.put_batch(arguments, mesh).values()
        got = outputs(programs.logits_at, 1, sharding.place(base, mesh), *placed, LAYER)
    close(jax.tree.map(np.asarray, got), want, steps=1024)


def test_the_gradient_keeps_no_second_copy_of_the_weights():
    """Of nine blocks, seven are run beside; the few tokens need little memory themselves."""
    config = dataclasses.replace(TINY, n_layers=9, d_ff=4096)
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    ids, positions = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (6, 2))
    values = jax.ShapeDtypeStruct((1, 2, TINY.d_model), jnp.float32)
    compiled = outputs.lower(programs.logits_at, 1, model, ids, positions, values, LAYER).compile()
    one_block = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model.blocks)) / 9
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * one_block
