"""Objectives: what gets gradient from what, and that the base is never touched.

All terms are in one program of each objective and are switched by their weights, which are arguments.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lens import losses, objectives, policy, response, sampling
from lens.models import decoder as dec
from lens.models import subject
from lens.models.encoder import encode
from lens.rollout import read
from lens.sharding import make_mesh, put_batch
from tests import programs
from tests.compare import close, size
from tests.tiny_world import LAYER, LENGTH, make_lens

GROUP = 4
WEIGHTS = frozenset({'mse_weight', 'kl_weight', 'lm_weight', 'beta', 'entropy_weight'})
PLAIN = objectives.Hparams(layer=LAYER, length=LENGTH, group=GROUP)
HP = dataclasses.replace(PLAIN, on=WEIGHTS, natural_prefix=(3, 1))
OFF = dict.fromkeys(objectives.KNOBS, np.float32(0)) | {'kl_skip': np.int32(0), 'clip': np.float32(0.2)}
KNOBS = OFF | {'mse_weight': np.float32(1), 'tau': np.float32(0.7), 'entropy_clamp': np.float32(9)}
KEY = jax.random.key(7)
ENCODE, SCORE = jax.jit(encode), programs.score


@pytest.fixture(scope='module')
def full(base):
    return make_lens(base, own_base=True)


@pytest.fixture(scope='module')
def deaf(full):
    """An encoder that ignores the words."""
    out = jax.tree.map(lambda x: x, full)
    out.encoder.readout_w[...] = jnp.zeros_like(out.encoder.readout_w[...])
    return out


def _both(objective, hp, lens, base, batch, knobs, reference):
    roll = objective.rollout(lens, base, read(base, batch, layer=LAYER, again=hp.reads_again), KEY, hp)
    return objectives.gradient(objective, lens, base, roll, KEY, hp, knobs, reference), roll


BOTH = jax.jit(_both, static_argnums=(0, 1))


def gradient(name, lens, base, batch, hp=HP, reference=(), **knobs):
    """((gradient, figures), rollout) with knobs other than KNOBS."""
    knobs = KNOBS | {k: np.float32(v) for k, v in knobs.items()}
    return BOTH(objectives.OBJECTIVES[name], hp, lens, base, batch, knobs, reference)


@pytest.fixture(scope='module')
def plain(base, full, batch):
    """GRPO without any further term."""
    return gradient('grpo', full, base, batch)


@pytest.fixture(scope='module')
def activations(base, batch):
    return np.asarray(read(base, batch, layer=LAYER).a_NxD)


def difference(a, b):
    return jax.tree.map(lambda x, y: x - y, a, b)


def test_grpo_gradients_are_strictly_separated(base, full, plain):
    """The decoder's is the expected policy gradient, whatever the encoder's weights beyond the reward; the encoder's
    is the error's alone."""
    (grads, metrics), roll = plain
    ids, a = roll.ids_NxT, roll.a_NxD
    assert 0 < metrics['logp_diff_mean'] <= metrics['logp_diff_max'] < 1e-4  # of the sampler's and the scorer's
    mse = jax.jit(jax.grad(lambda e: losses.normalised_mse_rows(encode(e, base, ids), a).mean()))(full.encoder)
    close(grads.encoder, mse)
    advantage = policy.advantages(-losses.normalised_mse_rows(ENCODE(full.encoder, base, ids), a), GROUP)
    reinforce = jax.jit(jax.grad(lambda d: -jnp.mean(programs.score(d, base, a, ids)[0] * advantage[:, None])))
    close(grads.decoder, reinforce(full.decoder))
    assert size(grads.decoder) > 1e-2 and size(grads.encoder) > 1e-2


@pytest.mark.parametrize('shape', [(1, 1), (8, 1)])
def test_repeated_texts_are_counted_up_to_their_end(shape):
    """Many rows over few words: against a set of tuples. What follows the end of a text does not tell texts apart."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, (728, 7)).astype(np.int32)
    ends = rng.integers(0, 8, 728)
    share = 1 - len({tuple(row[:end]) for row, end in zip(ids, ends, strict=True)}) / 728
    assert 0.1 < share < 0.9
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        rows = put_batch({'ids': ids, 'mask': (np.arange(7) < ends[:, None]).astype(np.float32)}, mesh)
        np.testing.assert_allclose(jax.jit(losses.repeated)(rows['ids'], rows['mask']), share, atol=1e-6)
    assert losses.repeated(jnp.zeros((5, 3), jnp.int32), jnp.ones((5, 3))) == np.float32(0.8)
    alike = jnp.asarray([[1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 2, 2]])  # another order, one other word
    assert losses.repeated(alike, jnp.ones((4, 3))) == 0


def test_equal_rewards_give_the_decoder_no_gradient(base, deaf, batch):
    (grads, metrics), _ = gradient('grpo', deaf, base, batch)
    assert size(grads.decoder) == 0 and metrics['zero_advantage_fraction'] == 1
    assert size(grads.encoder) > 0


@pytest.mark.parametrize('weight', ['beta', 'entropy_weight', 'lm_weight'])
def test_a_positive_weight_enables_its_term_for_the_decoder_only(base, full, batch, plain, weight):
    (other, _), _ = gradient('grpo', full, base, batch, **{weight: 0.1})
    diff = difference(plain[0][0], other)
    assert size(diff.decoder) > 1e-3
    assert size(diff.encoder) <= 1e-5 * size(other.encoder)


def test_a_term_that_is_off_is_not_in_the_program(base, full, batch, plain):
    (grads, metrics), _ = gradient('grpo', full, base, batch, PLAIN)
    close(grads, plain[0][0])
    assert 'kl_lm_nats' in plain[0][1] and not {'kl_lm_nats', 'kl_natural_nats', 'kl_functional_nats'} & metrics.keys()


@pytest.mark.slow
def test_functional_kl_is_the_encoders_and_equals_patching_one_position_at_a_time(base, full, batch, activations):
    (before, _), _ = gradient('sft', full, base, batch)
    (grads, metrics), _ = gradient('sft', full, base, batch, kl_weight=0.1)
    assert size(difference(before, grads).decoder) <= 1e-5 * size(grads.decoder)

    def expected(e):
        pred, kl = encode(e, base, batch['explanations'].reshape(-1, LENGTH)), []
        for v in range(2):
            p = batch['positions'][:, v]
            both = (
                subject.patch(base, batch['tokens'], p, x.reshape(8, 2, -1)[:, v], LAYER) for x in (activations, pred)
            )
            natural, replaced = (jax.nn.log_softmax(z[jnp.arange(8), p]) for z in both)
            kl.append(jnp.sum(jnp.exp(natural) * (natural - replaced), -1))
        return 0.1 * jnp.mean(jnp.stack(kl)) + losses.normalised_mse_rows(pred, activations).mean()

    value, want = jax.jit(jax.value_and_grad(expected))(full.encoder)
    close(0.1 * metrics['kl_functional_nats'] + metrics['loss_encoder'], value)
    close(grads.encoder, want)


@pytest.mark.slow
def test_kl_to_the_start_compares_with_the_reference(base, full, batch, plain):
    hp = dataclasses.replace(PLAIN, on=frozenset({'mse_weight', 'beta'}), kl_to='start')
    assert hp.needs_reference and not HP.needs_reference
    (same, metrics), roll = gradient('grpo', full, base, batch, hp, full.decoder, beta=0.1)
    assert metrics['kl_start_nats'] < 1e-12  # the square of a rounding
    close(same, plain[0][0])
    moved = make_lens(base, own_base=True, seed=9).decoder
    (grads, metrics), _ = gradient('grpo', full, base, batch, hp, moved, beta=0.1)
    p, q = (np.asarray(SCORE(d, base, roll.a_NxD, roll.ids_NxT)[0], np.float64) for d in (full.decoder, moved))
    close(metrics['kl_start_nats'], np.mean(np.exp(q - p) - (q - p) - 1))
    assert size(difference(same, grads).decoder) > 1e-3


@pytest.mark.slow
def test_averaged_samples_share_their_reward(base, full, batch, activations):
    hp = dataclasses.replace(PLAIN, group=3, mean_of=2)
    (grads, metrics), roll = gradient('grpo', full, base, batch, hp)
    assert roll.ids_NxT.shape == (16 * 6, LENGTH)
    pred = np.asarray(ENCODE(full.encoder, base, roll.ids_NxT)).reshape(16, 3, 2, -1).mean(2)
    a = activations[:, None]
    reward = -((pred - a) ** 2).mean(-1) / (a**2).mean(-1)
    close(metrics['reward'], reward.mean())
    advantage = (reward - reward.mean(1, keepdims=True)) / reward.std(1, ddof=1, keepdims=True)

    def reinforce(d):
        logp, _ = programs.score(d, base, roll.a_NxD, roll.ids_NxT)
        return -jnp.mean(logp * np.repeat(advantage.ravel(), 2)[:, None])

    close(grads.decoder, jax.jit(jax.grad(reinforce))(full.decoder))


def test_responses_without_an_explanation_are_punished_and_teach_the_encoder_nothing(base, full, batch):
    """Closed by one of many tokens, so that some responses are and some are not."""
    group = 12
    hp = dataclasses.replace(PLAIN, group=group, tags=response.Tags((), (17,)), error='direction')
    roll = read(base, batch, layer=LAYER)
    roll = jax.jit(objectives.sampled_rollout, static_argnums=4)(full, base, roll, KEY, hp)
    ids = np.array(roll.ids_NxT)
    ids[::5, 2] = 17
    loss = jax.jit(objectives.gradient, static_argnums=(0, 5))
    roll = roll._replace(ids_NxT=jnp.asarray(ids))
    grads, metrics = loss(objectives.OBJECTIVES['grpo'], full, base, roll, KEY, hp, KNOBS, ())
    hits = [np.flatnonzero(row == 17) for row in ids]
    length = np.array([h[0] if len(h) else 0 for h in hits])
    kept = length > 0
    assert 0.1 < kept.mean() < 0.9
    close(metrics['extracted'], kept.mean())
    a = np.asarray(roll.a_NxD)

    def error(e):  # texts of one length together, each read alone
        rows = jnp.zeros(len(ids))
        for n in range(1, LENGTH):
            rows = jnp.where(length == n, losses.direction_mse_rows(encode(e, base, ids[:, :n]), a), rows)
        return jnp.sum(rows * kept) / kept.sum(), rows

    (value, rows), want = jax.jit(jax.value_and_grad(error, has_aux=True))(full.encoder)
    close(metrics['loss_encoder'], value)
    close(grads.encoder, want)
    close(metrics['text_len'], length[kept].mean())
    reward = np.where(kept, -np.asarray(rows), -2.0)
    close(metrics['reward'], reward.mean())
    close(metrics['reward_group_std'], reward.reshape(-1, group).std(1).mean())
    ends = np.where(kept, length + 1, LENGTH)
    distinct = {tuple(row[:end]) for row, end in zip(ids, ends, strict=True)}
    close(metrics['repeated'], 1 - len(distinct) / len(ids))
    mask = np.arange(LENGTH) < ends[:, None]
    advantage = policy.advantages(jnp.asarray(reward, jnp.float32), group)

    def reinforce(d):
        return -jnp.sum(programs.score(d, base, a, ids)[0] * advantage[:, None] * mask) / mask.sum()

    close(grads.decoder, jax.jit(jax.grad(reinforce))(full.decoder))


@pytest.mark.parametrize(('mean_of', 'resample'), [(1, False), (3, False), (1, True), (3, True)])
def test_what_is_made_of_a_failed_response_counts_nowhere(mean_of, resample):
    """Of 3 documents x 2 activations x 6 responses, some fail; a mean or a partner with a failed one is left out."""
    rng = np.random.default_rng(0)
    a, pred = np.repeat(rng.normal(size=(6, 1, 5)), 6, 1).reshape(36, 5), rng.normal(size=(36, 5))
    ok = rng.random(36) < 0.9
    kept = np.repeat(ok.reshape(-1, mean_of).all(1), mean_of)
    mixed, counted = pred, kept
    if resample:
        mixed, counted = pred + np.roll(a - pred, 12, 0), kept & np.roll(kept, 12)
    ids = jnp.asarray(np.where(ok, 17, 1)[:, None] * (np.arange(LENGTH) == 1))  # a word, then the tag that closes
    roll = objectives.Rollout(jnp.asarray(a), None, {'positions': np.zeros((3, 2))}, ids)
    hp = dataclasses.replace(PLAIN, group=6 // mean_of, mean_of=mean_of, resample=resample)
    hp = dataclasses.replace(hp, tags=response.Tags((), (17,)))

    def loss(lens, base, roll, *rest):
        return objectives._reconstruction(base, roll, jnp.asarray(pred), hp, KNOBS)

    _, metrics = objectives.gradient(objectives.Objective(None, loss), 0.0, None, roll, KEY, hp, KNOBS, ())
    error = ((mixed - a) ** 2).sum(1) / (a**2).sum(1)
    assert 0 < counted.sum() < 36
    np.testing.assert_allclose(metrics['loss_encoder'], error[counted].mean(), rtol=1e-5)
    distinct = a[::6]
    spread = ((distinct - distinct.mean(0)) ** 2).sum() / 5 * len(a)
    np.testing.assert_allclose(metrics['fve'], 1 - ((kept[:, None] * pred - a) ** 2).sum() / spread, rtol=1e-5)


def test_gumbel_reaches_both_sides_through_the_words(base, full, deaf, batch, activations):
    (grads, metrics), _ = gradient('gumbel', full, base, batch, entropy_weight=0.0)
    draw = jax.jit(lambda d: sampling.sample(d, base, activations, KEY, length=LENGTH).ids_NxT)
    ids = draw(full.decoder)
    loss = jax.jit(jax.value_and_grad(lambda e: losses.normalised_mse_rows(encode(e, base, ids), activations).mean()))
    value, want = loss(full.encoder)
    close(metrics['loss_encoder'], value)
    for name in ('prompt_left', 'special_last', 'readout_w'):
        close(getattr(grads.encoder, name)[...], getattr(want, name)[...])
    for name in ('maps_w', 'prompt_left', 'prompt_right'):
        assert size(getattr(grads.decoder, name)) > 1e-4, name
    (grads, _), _ = gradient('gumbel', deaf, base, batch)
    assert size(grads.decoder) == 0
    assert 0 < metrics['logp_diff_mean'] <= metrics['logp_diff_max'] < 1e-4


def test_sft_trains_the_decoder_by_cross_entropy_and_the_encoder_by_mse(base, full, batch, activations):
    (grads, metrics), _ = gradient('sft', full, base, batch)
    ids = batch['explanations'].reshape(-1, LENGTH)
    loss = jax.jit(jax.value_and_grad(lambda d: -jnp.mean(programs.score(d, base, activations, ids)[0])))
    value, want = loss(full.decoder)
    close(metrics['loss_decoder'], value)
    close(grads.decoder, want)
    close(metrics['loss_encoder'], losses.normalised_mse_rows(ENCODE(full.encoder, base, ids), activations).mean())
    assert size(grads.encoder) > 0


def test_position_vectors_leave_the_activation_and_come_back(base, lens, batch, activations):
    """A decoder that takes e(p) off and an encoder that adds it, as if the activation had been read without."""
    table = np.random.default_rng(8).normal(size=(11, 24)).astype(np.float32)
    moved = jax.tree.map(lambda x: x, lens)
    moved.decoder.positions = moved.encoder.positions = nnx.data(nnx.Param(jnp.asarray(table)))
    source = read(base, batch, layer=LAYER).source
    e, ids = table[batch['positions'].ravel()], batch['explanations'].reshape(-1, LENGTH)
    close(dec.without_position(moved.decoder, activations, source.position_N), activations - e)
    close(ENCODE(moved.encoder, base, ids, source), ENCODE(lens.encoder, base, ids) + e)
    (_, metrics), _ = gradient('sft', moved, base, batch, PLAIN)
    close(metrics['loss_decoder'], -jnp.mean(SCORE(lens.decoder, base, activations - e, ids)[0]))


def test_what_stands_after_the_last_position_does_not_matter(base, batch, activations):
    """Batches are as wide as their texts."""
    early = np.flatnonzero(batch['positions'].max(1) < 9)
    cut = {'tokens': batch['tokens'][early, :9], 'positions': batch['positions'][early]}
    close(read(base, cut, layer=LAYER).a_NxD, activations.reshape(8, 2, -1)[early].reshape(-1, 24))


@pytest.mark.parametrize('layer', [0, 2])
def test_activations_are_those_of_the_configured_layer(base, batch, layer):
    a = read(base, batch, layer=layer).a_NxD
    stream = jax.jit(lambda ids: base.run_layers(base.embed(ids), 0, layer + 1))(batch['tokens'])
    close(a, np.take_along_axis(np.asarray(stream), batch['positions'][..., None], 1).reshape(-1, 24))
