"""The straight-through objective: words in value, relaxed tokens in the gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import losses, objectives, sampling, sharding
from lens.models import decoder as dec
from lens.models.encoder import encode
from tests.conftest import LAYER, LENGTH

HP = objectives.Hparams(layer=LAYER, length=LENGTH, tau=0.7)
KEY = jax.random.key(5)


def test_rows_are_the_words_and_their_gradient_is_that_of_the_softmax():
    rng = np.random.default_rng(0)
    logits, noise = rng.normal(size=(2, 3, 4, 7)).astype(np.float32)
    table, up = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(3, 4, 5)).astype(np.float32)
    words = table[rng.integers(0, 7, (3, 4))]
    rows, back = jax.vjp(lambda z: objectives.straight_through(z, noise, words, table, 0.7), logits)
    np.testing.assert_array_equal(rows, words)
    soft = np.exp((logits + noise) / 0.7)
    soft /= soft.sum(-1, keepdims=True)
    inner = up @ table.T
    want = soft * (inner - (soft * inner).sum(-1, keepdims=True)) / 0.7
    np.testing.assert_allclose(back(up)[0], want, atol=1e-6)


def test_tau_has_a_floor():
    z = jnp.linspace(0.0, 1.0, 6).reshape(1, 1, 6)
    grad = [
        jax.grad(lambda z, t=tau: objectives.straight_through(z, 0 * z, z @ jnp.eye(6), jnp.eye(6), t)[..., 0].sum())(z)
        for tau in (0.1, 0.001)
    ]
    np.testing.assert_array_equal(*grad)


def test_loss_is_that_of_the_sampled_words(base, lens, batch):
    loss, metrics = jax.jit(objectives.gumbel, static_argnums=4)(lens, base, batch, KEY, HP)
    a = objectives.read_activations(base, batch, LAYER)
    ids = sampling.sample(lens.decoder, base, a, KEY, length=LENGTH).ids_NxT
    np.testing.assert_allclose(loss, losses.normalised_mse(encode(lens.encoder, base, ids), a), rtol=1e-5)
    assert metrics['fve'].shape == ()


def test_the_relaxed_token_of_most_weight_is_the_drawn_one(base, lens, batch):
    """The second pass sees the noise that drew the tokens: its argmax is the sample."""
    a = objectives.read_activations(base, batch, LAYER)
    ids = sampling.sample(lens.decoder, base, a, KEY, length=LENGTH).ids_NxT
    logits = dec.teacher_forced_logits(lens.decoder, base, a, ids)
    noise = jnp.stack([sampling.noise(KEY, t, (len(ids), logits.shape[2])) for t in range(LENGTH)], axis=1)
    np.testing.assert_array_equal(jnp.argmax(logits + noise, -1), ids)


@pytest.fixture(scope='module')
def grads(base, lens, batch):
    step = jax.jit(jax.grad(objectives.gumbel, has_aux=True), static_argnums=4)
    return step, step(lens, base, batch, KEY, HP)[0]


def test_both_sides_learn_from_the_one_loss(base, lens, batch, grads):
    """The encoder's gradient is that of the plain loss on the same words; the decoder has one too."""
    _, g = grads
    a = objectives.read_activations(base, batch, LAYER)
    ids = sampling.sample(lens.decoder, base, a, KEY, length=LENGTH).ids_NxT
    plain = jax.grad(lambda e: losses.normalised_mse(encode(e, base, ids), a))(lens.encoder)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), g.encoder, plain)
    for name in ('maps_w', 'prompt_left', 'prompt_right'):
        assert np.abs(getattr(g.decoder, name)[...]).max() > 1e-4, name


def test_a_large_entropy_weight_turns_the_decoder(base, lens, batch, grads):
    step, plain = grads
    g = step(lens, base, batch, KEY, dataclasses.replace(HP, entropy_weight=100.0))[0]
    x, y = (np.ravel(np.asarray(t.decoder.maps_w[...])) for t in (g, plain))
    assert np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) < 0.9


def test_on_a_mesh_as_on_one_device(base, lens, batch, grads):
    mesh = sharding.make_mesh(2, 4)
    with jax.set_mesh(mesh):
        placed = sharding.place(lens, mesh), sharding.place(base, mesh), sharding.put_batch(batch, mesh)
        got = grads[0](*placed, KEY, HP)[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), got, grads[1])
