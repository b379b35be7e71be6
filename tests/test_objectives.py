"""Objectives: what gets gradient from what, and that the base is never touched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lens import losses, objectives, optimizer, response, sampling, schedules
from lens.config import Phase
from lens.lens_init import init_state
from lens.models import decoder as dec
from lens.models import subject
from lens.models.encoder import encode
from lens.sharding import make_mesh, path, put_batch
from lens.train import train_step
from tests.conftest import LAYER, LENGTH, make_base, make_lens

HP = objectives.Hparams(layer=LAYER, length=LENGTH, group=4)
KEY = jax.random.key(7)
RATES = {'decoder': schedules.constant(1e-2), 'encoder': schedules.constant(2e-2)}
TABLE = (optimizer.Row('.*', 1.0, 0.1, 'all'),)


def size(tree):
    return sum(float(np.abs(x).sum()) for x in jax.tree.leaves(tree))


@pytest.fixture(scope='module')
def full(base):
    return make_lens(base, own_base=True)


def gradient(objective, lens, base, batch, hp=HP, reference=()):
    objective = objectives.OBJECTIVES[objective]

    def both(lens, base, batch, reference):
        roll = objective.rollout(lens, base, batch, KEY, hp)
        return jax.grad(objective.loss, has_aux=True)(lens, base, roll, KEY, hp, 0, reference)

    return jax.jit(both)(lens, base, batch, reference)


@pytest.fixture(scope='module')
def plain(base, full, batch):
    """Gradient and figures of GRPO without any further term."""
    return gradient('grpo', full, base, batch)


def test_grpo_gradients_are_strictly_separated(base, full, batch, plain):
    """The decoder's gradient does not change with the encoder's weights except through the reward, and
    the encoder's is the MSE's alone."""
    grads, _ = plain
    a = objectives.read(base, batch, LAYER).a_NxD
    s = jax.jit(lambda d: sampling.sample(d, base, a, KEY, length=LENGTH, group=4))(full.decoder)
    a4 = jnp.repeat(a, 4, axis=0)

    mse = jax.jit(jax.grad(lambda e: losses.normalised_mse(encode(e, base, s.ids_NxT), a4)))(full.encoder)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), grads.encoder, mse)

    adv = losses.advantages(-losses.normalised_mse_rows(encode(full.encoder, base, s.ids_NxT), a4), 4)

    def reinforce(d):
        return -jnp.mean(dec.score(d, base, a4, s.ids_NxT)[0] * adv[:, None])

    expected = jax.jit(jax.grad(reinforce))(full.decoder)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-6), grads.decoder, expected)
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
        np.testing.assert_allclose(jax.jit(objectives.repeated)(rows['ids'], rows['mask']), share, atol=1e-6)
    assert objectives.repeated(jnp.zeros((5, 3), jnp.int32), jnp.ones((5, 3))) == np.float32(0.8)
    alike = jnp.asarray([[1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 2, 2]])  # another order, one other word
    assert objectives.repeated(alike, jnp.ones((4, 3))) == 0


def test_equal_rewards_give_the_decoder_no_gradient(base, full, batch):
    """An encoder that ignores the words rewards every text alike."""
    deaf = jax.tree.map(lambda x: x, full)
    deaf.encoder.readout_w[...] = jnp.zeros_like(deaf.encoder.readout_w[...])
    grads, metrics = gradient('grpo', deaf, base, batch)
    assert size(grads.decoder) == 0 and metrics['zero_advantage_fraction'] == 1
    assert size(grads.encoder) > 0


ON = schedules.constant(0.1)
FOR_THE_DECODER = {
    'beta': {'beta': ON, 'natural_prefix': (3, 1)},
    'entropy': {'entropy_weight': ON, 'entropy_clamp': schedules.constant(9.0)},
    'lm': {'lm_weight': ON, 'natural_prefix': (3, 1)},
}


@pytest.mark.parametrize('term', FOR_THE_DECODER)
def test_a_positive_weight_enables_its_term_for_the_decoder_only(base, full, batch, term, plain):
    other, _ = gradient('grpo', full, base, batch, dataclasses.replace(HP, **FOR_THE_DECODER[term]))
    diff = jax.tree.map(lambda x, y: x - y, plain[0], other)
    assert size(diff.decoder) > 1e-3
    np.testing.assert_allclose(size(diff.encoder), 0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('resample', [False, True])
def test_functional_kl_is_the_encoders_and_equals_patching_one_position_at_a_time(base, full, batch, resample):
    hp = dataclasses.replace(HP, kl_weight=ON, resample=resample)
    plain, _ = gradient('sft', full, base, batch)
    grads, metrics = gradient('sft', full, base, batch, hp)
    np.testing.assert_allclose(size(jax.tree.map(lambda x, y: x - y, plain, grads).decoder), 0, atol=1e-5)

    def expected(e):
        a = objectives.read(base, batch, LAYER).a_NxD
        pred = encode(e, base, batch['explanations'].reshape(-1, LENGTH))
        if resample:  # plus what the next document's reconstruction lacks
            pred += jax.lax.stop_gradient(jnp.roll(a.reshape(8, 2, -1) - pred.reshape(8, 2, -1), 1, 0).reshape(16, -1))
        kl = []
        for v in range(2):
            p = batch['positions'][:, v]
            both = (subject.patch(base, batch['tokens'], p, x.reshape(8, 2, -1)[:, v], LAYER) for x in (a, pred))
            natural, replaced = (jax.nn.log_softmax(z[jnp.arange(8), p]) for z in both)
            kl.append(jnp.sum(jnp.exp(natural) * (natural - replaced), -1))
        return 0.1 * jnp.mean(jnp.stack(kl)) + losses.normalised_mse(pred, a)

    value, want = jax.jit(jax.value_and_grad(expected))(full.encoder)
    np.testing.assert_allclose(0.1 * metrics['kl_functional_nats'] + metrics['loss_encoder'], value, rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5), grads.encoder, want)


@pytest.mark.slow
def test_kl_to_the_start_compares_with_the_reference(base, full, batch):
    hp = dataclasses.replace(HP, beta=ON, kl_to='start')
    assert hp.needs_reference and not HP.needs_reference
    plain, _ = gradient('grpo', full, base, batch)
    same, metrics = gradient('grpo', full, base, batch, hp, full.decoder)
    assert metrics['kl_start_nats'] == 0
    np.testing.assert_allclose(size(jax.tree.map(lambda x, y: x - y, plain, same)), 0, atol=1e-4)
    moved = make_lens(base, own_base=True, seed=9).decoder
    grads, metrics = gradient('grpo', full, base, batch, hp, moved)
    ids = objectives.sampled_rollout(full, base, batch, KEY, hp).ids_NxT
    a4 = jnp.repeat(objectives.read(base, batch, LAYER).a_NxD, 4, axis=0)
    p, q = (np.asarray(dec.score(d, base, a4, ids)[0], np.float64) for d in (full.decoder, moved))
    np.testing.assert_allclose(metrics['kl_start_nats'], np.mean(np.exp(q - p) - (q - p) - 1), rtol=1e-3)
    assert size(jax.tree.map(lambda x, y: x - y, plain, grads).decoder) > 1e-3


@pytest.mark.slow
def test_averaged_samples_share_their_reward(base, full, batch):
    hp = dataclasses.replace(HP, group=3, mean_of=2)
    grads, metrics = gradient('grpo', full, base, batch, hp)
    roll = objectives.sampled_rollout(full, base, batch, KEY, hp)
    assert roll.ids_NxT.shape == (16 * 6, LENGTH)
    pred = np.asarray(encode(full.encoder, base, roll.ids_NxT)).reshape(16, 3, 2, -1).mean(2)
    a = np.asarray(objectives.read(base, batch, LAYER).a_NxD)[:, None]
    reward = -((pred - a) ** 2).mean(-1) / (a**2).mean(-1)
    np.testing.assert_allclose(metrics['reward'], reward.mean(), rtol=1e-4)
    advantage = (reward - reward.mean(1, keepdims=True)) / reward.std(1, ddof=1, keepdims=True)

    def reinforce(d):
        logp, _ = dec.score(d, base, roll.a_NxD, roll.ids_NxT)
        return -jnp.mean(logp * np.repeat(advantage.ravel(), 2)[:, None])

    want = jax.jit(jax.grad(reinforce))(full.decoder)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=3e-6), grads.decoder, want)


def test_responses_without_an_explanation_are_punished_and_teach_the_encoder_nothing(base, full, batch):
    """Closed by one of many tokens, so that some responses are and some are not."""
    tags = response.Tags((), (17,))
    hp = dataclasses.replace(HP, group=12, tags=tags, error='direction')
    roll = objectives.sampled_rollout(full, base, batch, KEY, hp)
    ids = np.array(roll.ids_NxT)
    ids[::5, 2] = 17
    roll = roll._replace(ids_NxT=jnp.asarray(ids))
    loss = jax.jit(jax.grad(objectives.grpo, has_aux=True), static_argnums=4)
    grads, metrics = loss(full, base, roll, KEY, hp, 0, ())
    hits = [np.flatnonzero(row == 17) for row in ids]
    texts = [row[: h[0]] if len(h) and h[0] else None for row, h in zip(ids, hits, strict=True)]
    kept = [i for i, t in enumerate(texts) if t is not None]
    assert 0.1 < len(kept) / len(ids) < 0.9
    np.testing.assert_allclose(metrics['extracted'], len(kept) / len(ids), rtol=1e-5)
    a = np.asarray(roll.a_NxD)

    def error(e):
        rows = [losses.direction_mse_rows(encode(e, base, texts[i][None]), a[i : i + 1])[0] for i in kept]
        return jnp.mean(jnp.stack(rows)), rows

    (value, rows), want = jax.value_and_grad(error, has_aux=True)(full.encoder)
    np.testing.assert_allclose(metrics['loss_encoder'], value, rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5), grads.encoder, want)
    np.testing.assert_allclose(metrics['text_len'], np.mean([len(texts[i]) for i in kept]), rtol=1e-5)
    reward = np.full(len(ids), -2.0)
    reward[kept] = -np.asarray(rows)
    np.testing.assert_allclose(metrics['reward'], reward.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics['reward_group_std'], reward.reshape(-1, 12).std(1).mean(), rtol=1e-4)
    ends = np.array([h[0] + 1 if t is not None else LENGTH for t, h in zip(texts, hits, strict=True)])
    distinct = {tuple(row[:end]) for row, end in zip(ids, ends, strict=True)}
    np.testing.assert_allclose(metrics['repeated'], 1 - len(distinct) / len(ids), atol=1e-6)
    mask = np.arange(LENGTH) < ends[:, None]
    adv = losses.advantages(jnp.asarray(reward), 12)

    def reinforce(d):
        return -jnp.sum(dec.score(d, base, a, ids)[0] * adv[:, None] * mask) / mask.sum()

    want = jax.jit(jax.grad(reinforce))(full.decoder)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5), grads.decoder, want)


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
    found = response.Extraction(*(jnp.zeros(36, jnp.int32),) * 3, jnp.asarray(ok))
    roll = objectives.Rollout(jnp.asarray(a), None, {'positions': np.zeros((3, 2))})
    hp = dataclasses.replace(HP, group=6 // mean_of, mean_of=mean_of, resample=resample)
    _, metrics = objectives._reconstruction(None, roll, jnp.asarray(pred), found, hp, 0)
    error = ((mixed - a) ** 2).sum(1) / (a**2).sum(1)
    assert 0 < counted.sum() < 36
    np.testing.assert_allclose(metrics['loss_encoder'], error[counted].mean(), rtol=1e-5)
    distinct = a[::6]
    spread = ((distinct - distinct.mean(0)) ** 2).sum() / 5 * len(a)
    np.testing.assert_allclose(metrics['fve'], 1 - ((kept[:, None] * pred - a) ** 2).sum() / spread, rtol=1e-5)


SLOW = pytest.mark.slow


@pytest.mark.parametrize('form', [pytest.param('full', marks=SLOW), pytest.param('truncated', marks=SLOW), 'two_pass'])
def test_gumbel_reaches_both_sides_through_the_words(base, full, batch, form):
    hp = dataclasses.replace(HP, group=1, form=form, tau=schedules.constant(0.7))
    grads, metrics = gradient('gumbel', full, base, batch, hp)
    a = objectives.read(base, batch, LAYER).a_NxD
    ids = sampling.sample(full.decoder, base, a, KEY, length=LENGTH).ids_NxT
    np.testing.assert_allclose(
        metrics['loss_encoder'], losses.normalised_mse(encode(full.encoder, base, ids), a), rtol=1e-5
    )
    plain = jax.jit(jax.grad(lambda e: losses.normalised_mse(encode(e, base, ids), a)))(full.encoder)
    for name in ('prompt_left', 'special_last', 'readout_w'):
        x, y = (getattr(t, name)[...] for t in (grads.encoder, plain))
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)
    for name in ('maps_w', 'prompt_left', 'prompt_right'):
        assert size(getattr(grads.decoder, name)) > 1e-4, name
    deaf = jax.tree.map(lambda x: x, full)
    deaf.encoder.readout_w[...] = jnp.zeros_like(deaf.encoder.readout_w[...])
    assert size(gradient('gumbel', deaf, base, batch, hp)[0].decoder) == 0
    if form == 'two_pass':  # elsewhere the sampler's own figures are the scorer's
        assert 0 < metrics['logp_diff_mean'] <= metrics['logp_diff_max'] < 1e-4


def test_sft_trains_the_decoder_by_cross_entropy_and_the_encoder_by_mse(base, full, batch):
    grads, metrics = gradient('sft', full, base, batch)
    a = objectives.read(base, batch, LAYER).a_NxD
    ids = batch['explanations'].reshape(-1, LENGTH)
    np.testing.assert_allclose(metrics['loss_decoder'], -jnp.mean(dec.score(full.decoder, base, a, ids)[0]), rtol=1e-5)
    np.testing.assert_allclose(
        metrics['loss_encoder'], losses.normalised_mse(encode(full.encoder, base, ids), a), rtol=1e-5
    )
    expected = jax.jit(jax.grad(lambda d: -jnp.mean(dec.score(d, base, a, ids)[0])))(full.decoder)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-6), grads.decoder, expected)
    assert size(grads.encoder) > 0


def test_position_vectors_leave_the_activation_and_come_back(base, batch):
    """A decoder that takes e(p) off and an encoder that adds it, as if the activation had been read without."""
    table = np.random.default_rng(8).normal(size=(11, 24)).astype(np.float32)
    lens = make_lens(base)
    lens.decoder.positions = lens.encoder.positions = nnx.data(nnx.Param(jnp.asarray(table)))
    roll = objectives.read(base, batch, LAYER)
    e = table[batch['positions'].ravel()]
    without = dec.centred(lens.decoder, roll.a_NxD, roll.source.position_N)
    np.testing.assert_allclose(without, roll.a_NxD - e, atol=1e-5)
    ids = batch['explanations'].reshape(-1, LENGTH)
    plain = encode(make_lens(base).encoder, base, ids)
    np.testing.assert_allclose(encode(lens.encoder, base, ids, roll.source), plain + e, atol=1e-5)
    logp, _ = dec.score(make_lens(base).decoder, base, roll.a_NxD - e, ids)
    _, metrics = gradient('sft', lens, base, batch)
    np.testing.assert_allclose(metrics['loss_decoder'], -jnp.mean(logp), rtol=1e-5)


def test_the_current_token_is_read_after_the_prompt(base, batch):
    lens = make_lens(base)
    source = objectives.read(base, batch, LAYER).source
    token = np.take_along_axis(batch['tokens'], batch['positions'], 1).ravel()
    np.testing.assert_array_equal(source.token_N, token)
    ids, e = batch['explanations'].reshape(-1, LENGTH), lens.encoder
    e.config = dataclasses.replace(e.config, current_token=True)
    left, right = (np.tile(x[...], (16, 1, 1)) for x in (e.prompt_left, e.prompt_right))
    rows = np.concatenate([left, base.embedding[...][ids], right, base.embedding[...][token][:, None]], axis=1)
    rows[:, -1] += e.special_last[...]
    expected = base.run_layers(jnp.asarray(rows), 0, LAYER + 1)[:, -1] @ e.readout_w[...] + e.readout_b[...]
    np.testing.assert_allclose(encode(e, base, ids, source), expected, atol=1e-5)


def test_sampler_and_scorer_agree_in_bfloat16(base, full, batch, plain):
    """The mean gap of log-probabilities that grpo logs, with base and lens in half precision."""
    half, lens = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), t) for t in (base, full))
    _, metrics = gradient('grpo', lens, half, batch)
    assert 0 < metrics['logp_diff_mean'] < 1e-2
    assert plain[1]['logp_diff_max'] < 1e-4


def test_activations_are_those_of_the_configured_layer(base, batch):
    for layer in range(3):
        a = objectives.read(base, batch, layer).a_NxD
        expected = subject.read(base, batch['tokens'], batch['positions'], layer)
        np.testing.assert_array_equal(a, np.asarray(expected).reshape(-1, 24))


@pytest.mark.parametrize(
    ('objective', 'own_base'), [('sft', False), pytest.param('grpo', True, marks=pytest.mark.slow)]
)
def test_training_leaves_the_base_byte_identical_and_moves_every_trainable_leaf(batch, objective, own_base):
    chosen, hp = objectives.OBJECTIVES[objective], dataclasses.replace(HP, updates=1 + own_base, clip=0.2)
    base = make_base()
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(base)]
    mesh = make_mesh(1, 1)
    with jax.set_mesh(mesh):
        lens = make_lens(base, own_base=own_base)
        start = jax.tree.map(np.asarray, lens)
        phase = Phase('p', 0, 10, chosen, hp, optimizer.make(TABLE, RATES, 1.0, updates=hp.updates), 8, 2, True)
        state = init_state(lens, phase, mesh)
        for _ in range(2):
            state, _ = train_step(state, base, batch, KEY, objective=chosen, hparams=hp, tx=phase.tx)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(base)] == before
    moved = {
        path(kp): not np.array_equal(x, y)
        for (kp, x), y in zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(state.params), strict=True)
    }
    assert all(moved.values()), [k for k, v in moved.items() if not v]
