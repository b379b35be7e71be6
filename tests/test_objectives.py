"""Objectives: what gets gradient from what, and that the base is never touched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import losses, objectives, optimizer, sampling
from lens.build import Phase
from lens.models import decoder as dec
from lens.models import subject
from lens.models.encoder import encode
from lens.sharding import make_mesh, path
from lens.state import init_state
from lens.train import train_step
from tests.conftest import LAYER, LENGTH, make_base, make_lens

HP = objectives.Hparams(layer=LAYER, length=LENGTH, group=4)
KEY = jax.random.key(7)
OPT = optimizer.OptimizerConfig(
    steps=10,
    warmup_steps=0,
    final_fraction=0.1,
    learning_rate_decoder=1e-2,
    learning_rate_encoder=2e-2,
    weight_decay=0.1,
    grad_clip=1.0,
)


def size(tree):
    return sum(float(np.abs(x).sum()) for x in jax.tree.leaves(tree))


@pytest.fixture(scope='module')
def full(base):
    return make_lens(base, own_base=True)


def gradient(objective, lens, base, batch, hp=HP):
    return jax.jit(jax.grad(objective, has_aux=True), static_argnums=4)(lens, base, batch, KEY, hp)


def test_grpo_gradients_are_strictly_separated(base, full, batch):
    """The decoder's gradient does not change with the encoder's weights except through the reward, and
    the encoder's is the MSE's alone."""
    grads, _ = gradient(objectives.grpo, full, base, batch)
    a = objectives.read_activations(base, batch, LAYER)
    s = jax.jit(lambda d: sampling.sample(d, base, a, KEY, length=LENGTH, group=4))(full.decoder)
    a4 = jnp.repeat(a, 4, axis=0)

    mse = jax.jit(jax.grad(lambda e: losses.normalised_mse(encode(e, base, s.ids_NxT), a4)))(full.encoder)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), grads.encoder, mse)

    adv = losses.group_advantages(losses.rewards(encode(full.encoder, base, s.ids_NxT), a4), 4)

    def reinforce(d):
        return -jnp.mean(dec.score(d, base, a4, s.ids_NxT)[0] * adv[:, None])

    expected = jax.jit(jax.grad(reinforce))(full.decoder)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-6), grads.decoder, expected)
    assert size(grads.decoder) > 1e-2 and size(grads.encoder) > 1e-2


def test_equal_rewards_give_the_decoder_no_gradient(base, full, batch):
    """An encoder that ignores the words rewards every text alike."""
    deaf = jax.tree.map(lambda x: x, full)
    deaf.encoder.readout_w[...] = jnp.zeros_like(deaf.encoder.readout_w[...])
    grads, metrics = gradient(objectives.grpo, deaf, base, batch)
    assert size(grads.decoder) == 0 and metrics['zero_advantage_fraction'] == 1
    assert size(grads.encoder) > 0


@pytest.mark.parametrize(
    'change', [{'beta': 0.1, 'natural_prefix': (3, 1)}, {'entropy_weight': 0.1, 'entropy_clamp': 9.0}]
)
def test_a_positive_weight_enables_its_term_for_the_decoder_only(base, full, batch, change):
    plain, _ = gradient(objectives.grpo, full, base, batch)
    other, _ = gradient(objectives.grpo, full, base, batch, dataclasses.replace(HP, **change))
    diff = jax.tree.map(lambda x, y: x - y, plain, other)
    assert size(diff.decoder) > 1e-3
    np.testing.assert_allclose(size(diff.encoder), 0, atol=1e-5)


def test_sft_trains_the_decoder_by_cross_entropy_and_the_encoder_by_mse(base, full, batch):
    grads, metrics = gradient(objectives.sft, full, base, batch)
    a = objectives.read_activations(base, batch, LAYER)
    ids = batch['explanations'].reshape(-1, LENGTH)
    np.testing.assert_allclose(metrics['loss_decoder'], -jnp.mean(dec.score(full.decoder, base, a, ids)[0]), rtol=1e-5)
    np.testing.assert_allclose(
        metrics['loss_encoder'], losses.normalised_mse(encode(full.encoder, base, ids), a), rtol=1e-5
    )
    expected = jax.jit(jax.grad(lambda d: -jnp.mean(dec.score(d, base, a, ids)[0])))(full.decoder)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-6), grads.decoder, expected)
    assert size(grads.encoder) > 0


def test_activations_are_those_of_the_configured_layer(base, batch):
    for layer in range(3):
        a = objectives.read_activations(base, batch, layer)
        expected = subject.read(base, batch['tokens'], batch['positions'], layer)
        np.testing.assert_array_equal(a, np.asarray(expected).reshape(-1, 24))


@pytest.mark.parametrize(('objective', 'own_base'), [(objectives.sft, False), (objectives.grpo, True)])
def test_training_leaves_the_base_byte_identical_and_moves_every_trainable_leaf(batch, objective, own_base):
    base = make_base()
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(base)]
    mesh = make_mesh(1, 1)
    with jax.set_mesh(mesh):
        lens = make_lens(base, own_base=own_base)
        start = jax.tree.map(np.asarray, lens)
        phase = Phase('p', 0, 10, objective, HP, optimizer.make(OPT), 8, 2, True)
        state = init_state(lens, phase, mesh)
        for _ in range(2):
            state, _ = train_step(state, base, batch, KEY, objective=objective, hparams=HP, tx=phase.tx)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(base)] == before
    moved = {
        path(kp): not np.array_equal(x, y)
        for (kp, x), y in zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(state.params), strict=True)
    }
    assert all(moved.values()), [k for k, v in moved.items() if not v]
