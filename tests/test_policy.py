"""What sampled texts are worth and how that teaches: against recorded numbers of another trainer, against numpy, and all
options together in one step against the same by hand."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import losses, objectives, policy, rollout, sharding
from lens.checkpoint import Checkpoints, Keep
from lens.models.encoder import encode
from lens.train import abstract_state, init_state, train_step
from tests import programs
from tests.compare import close, size
from tests.phases import phase_of
from tests.test_slices import FIELD_KNOBS, GRADIENT, KEY
from tests.test_slices import full as full
from tests.test_slices import rollout as rollout_of
from tests.tiny_world import LENGTH, make_lens

RECORDED = json.loads((pathlib.Path(__file__).parent / 'recorded_grpo.json').read_text())
ONE = np.ones((1, 1), np.float32)


@pytest.mark.parametrize('case', RECORDED['k3_clamp'])
def test_k3_is_clamped_where_the_reference_is_likelier_alone(case):
    logp, logq = (np.full((1, 1), case[k], np.float32) for k in ('logp', 'ref'))
    kl, grad = jax.value_and_grad(losses.k3)(logp, logq, ONE)
    np.testing.assert_allclose((kl, grad[0, 0]), (case['kl'], case['grad']), rtol=1e-6)


def test_gradient_of_the_tokens_of_a_text():
    r = RECORDED['token_loss']
    ones = np.ones((1, len(r['logp'])), np.float32)

    def loss(logp):
        gain = policy.policy_gradient(logp, jnp.array([r['advantage']]), ones)
        return gain + r['beta'] * losses.k3(logp, jnp.array([r['ref']]), ones)

    np.testing.assert_allclose(jax.grad(loss)(jnp.array([r['logp']]))[0], r['grad'], rtol=1e-6)


def test_what_a_token_weighs():
    mask = (np.arange(6) < [[2], [6]]).astype(np.float32)
    want = {k: RECORDED['aggregation'][f'grad_weight_per_token_{k}'] for k in ('seq', 'tokenmean')}
    for kind, (short, long) in {
        'responses': want['seq'],
        'tokens': want['tokenmean'],
        'length': (1 / 12, 1 / 12),
    }.items():
        weights, total = policy.AGGREGATES[kind](mask, mask.sum(), 2)
        np.testing.assert_allclose(weights / total, mask * [[short], [long]], rtol=1e-6, err_msg=kind)


def test_kl_over_the_likeliest_words_and_the_rest():
    r = RECORDED['kl_top']
    p, q = (jnp.asarray(r[k], jnp.float32) for k in ('logits', 'reference'))
    np.testing.assert_allclose(losses.kl_top(p, q, 8), r['top8'], rtol=1e-6)
    np.testing.assert_allclose(losses.kl_top(p, q, 1000), r['full'], rtol=1e-5)
    assert np.abs(losses.kl_top(p, p, 8)).max() < 1e-6
    d_p, d_q = jax.grad(lambda p, q: losses.kl_top(p, q, 8).sum(), argnums=(0, 1))(p, q)
    assert not np.asarray(d_q).any()
    step = np.random.default_rng(0).normal(size=p.shape).astype(np.float32)
    change = (losses.kl_top(p + 1e-2 * step, q, 8) - losses.kl_top(p - 1e-2 * step, q, 8)).sum() / 2e-2
    np.testing.assert_allclose((d_p * step).sum(), change, rtol=1e-2)  # central differences in float32


def test_rewards_of_errors_and_of_a_failure():
    errors = np.array([0.5, 2.0, 1e-9, 0.0], np.float32)
    np.testing.assert_allclose(policy.REWARDS['error'](errors), -errors)
    np.testing.assert_allclose(
        policy.REWARDS['log_error'](errors), -np.log([0.5, 2.0, 1e-8, 1e-8], dtype=np.float32), rtol=1e-6
    )
    assert policy.REWARDS['error'](policy.FAILED) == -2
    np.testing.assert_allclose(policy.REWARDS['log_error'](policy.FAILED), -np.log(2), rtol=1e-6)


def test_which_rows_teach():
    kept = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0], np.float32)
    best = policy.best(np.array([3, 1, 1, 5, 4, 0, 1, 2, 3], np.float32), kept, 3)
    np.testing.assert_array_equal(best, [0, 1, 0, 0, 1, 0, 0, 0, 0])  # none of a group that has none
    rewards = np.float32([-0.7, -0.7, -0.7, 1, 1, 1 + 5e-7, 1, 1, 1 + 5e-6])
    np.testing.assert_array_equal(policy.varied(rewards, 3), [0, 0, 0, 0, 0, 0, 1, 1, 1])
    logp, mask = np.zeros((2, 3), np.float32), np.array([[1, 1, 0], [1, 1, 1]])
    drawn = np.array([[0.1, -0.1, 9], [0.1, 0.3, 0.2]], np.float32)
    np.testing.assert_array_equal(policy.agree(logp, drawn, mask, 0.15), [1, 0])


def test_cispo_caps_the_weight_and_keeps_every_gradient():
    rng = np.random.default_rng(3)
    logp, a, mask = -rng.random((4, 5)), rng.normal(size=4), rng.integers(0, 2, (4, 5))
    old = logp - rng.normal(size=(4, 5))
    grad = jax.grad(lambda x: policy.policy_gradient(x, jnp.asarray(a), mask, old, 0.5, kind='cispo'))(
        jnp.asarray(logp)
    )
    weight = np.minimum(np.exp(logp - old), 1.5)
    assert 0 < (weight == 1.5).mean() < 1
    np.testing.assert_allclose(grad, -weight * a[:, None] * mask / mask.sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_all_of_it_in_one_step(base, full, batch):
    """Groups of equal rewards, rows that sampler and trainer disagree on, failed and cut ones, the first words alone."""
    objective, roll, hp = rollout_of('grpo-field', full, base, batch)
    reference = make_lens(base, own_base=True, seed=9)
    grads, figures = GRADIENT(objective, full, base, roll, KEY, hp, FIELD_KNOBS, reference.decoder)
    ids, a, n = np.asarray(roll.ids_NxT), np.asarray(roll.a_NxD), len(roll.ids_NxT)
    close_tag = np.array([(*np.flatnonzero(row == 17), LENGTH)[0] for row in ids])
    found = (close_tag > 0) & (close_tag < LENGTH)
    ends = np.where(found, close_tag + 1, LENGTH)
    cap = np.asarray(roll.words_N)
    assert len(set(cap)) > 1 and (cap.reshape(16, -1) == cap.reshape(16, -1)[:, :1]).all()
    length = np.minimum(np.where(found, close_tag, LENGTH), cap)
    reads = jax.jit(lambda e: encode(e, base, ids, None, (np.zeros(n, int), np.maximum(length, 1))))
    errors = np.asarray(losses.direction_mse_rows(reads(full.encoder), a))
    judged = np.asarray(losses.direction_mse_rows(roll.judged_NxD, a))
    reward = np.where(found, -np.log(np.maximum(judged, 1e-8)), -np.log(2)) - 0.3 * np.maximum(ends - 3, 0)
    by_group = reward.reshape(16, -1)
    varied = np.repeat(by_group.std(1, ddof=1) > 1e-6, hp.group)
    advantage = (by_group - by_group.mean(1, keepdims=True)).ravel()
    mask = np.arange(LENGTH) < ends[:, None]
    logits = programs.teacher_forced_logits(full.decoder, base, a[:: hp.group], ids)
    logp = np.asarray(losses.token_log_probs(logits, ids))
    gap = (np.abs(logp - roll.logp_NxT) * mask).sum(1) / mask.sum(1)
    agree = gap <= 0.1
    for some in (found, varied, agree):
        assert 0.1 < some.mean() < 0.95
    close(figures['mismatched'], 1 - agree.mean())
    close(figures['reward'], reward.mean())
    teaches = varied & agree

    kept = np.where(found & teaches, judged, np.inf).reshape(16, -1)
    best = (np.arange(hp.group) == kept.argmin(1)[:, None]).ravel() & np.isfinite(kept).ravel()
    groups = found.reshape(16, -1).any(1).sum()  # of all that have a text, some of which teach nothing
    assert 0 < best.sum() < groups
    close(figures['loss_encoder'], errors[best].sum() / groups)
    mse = jax.jit(jax.grad(lambda e: (losses.direction_mse_rows(reads(e), a) * best).sum() / groups))
    close(grads.encoder, mse(full.encoder))

    early = mask & teaches[:, None] & ((np.arange(LENGTH) < cap[:, None]) | ~found[:, None])
    late = mask & teaches[:, None] & (np.arange(LENGTH) >= 1)
    other = programs.teacher_forced_logits(reference.decoder, base, a[:: hp.group], ids)
    ratio = np.minimum(np.exp(logp - roll.logp_NxT), 1.2)

    def by_hand(decoder):
        logits = programs.teacher_forced_logits(decoder, base, a[:: hp.group], ids)
        gain = losses.token_log_probs(logits, ids) * ratio * advantage[:, None]
        kl = losses.kl_top(logits, other, 4)
        own = [jnp.sum(x * m, 1) / np.maximum(m.sum(1), 1) for x, m in ((gain, early), (kl, late))]
        return (0.1 * own[1] - own[0]).sum() / n

    close(grads.decoder, jax.jit(jax.grad(by_hand))(full.decoder))


def seen(lens, base, roll, key, hp, knobs, reference):
    """The loss of an encoder that shrinks, and what rewards are of as a figure."""
    del base, key, hp, knobs, reference
    return sum((x**2).sum() for x in jax.tree.leaves(lens.encoder)), {'judged': jnp.mean(roll.judged_NxD**2)}


@pytest.mark.parametrize(('ema', 'lag'), [(0.75, 0), (0.0, 2)])
def test_rewards_are_by_an_encoder_that_follows(base, batch, tmp_path, ema, lag):
    mesh = sharding.make_mesh(1, 1)
    phase = dataclasses.replace(
        phase_of('sft', judged=True),
        objective=objectives.Objective(rollout.given_rollout, seen),
        reward_ema=ema,
        reward_lag=lag,
    )
    with jax.set_mesh(mesh):
        lens = make_lens(base)
        roll = rollout.read(base, batch, layer=phase.hparams.layer)
        state = init_state(lens, phase, mesh)
        want, ids = [np.array(x) for x in jax.tree.leaves(lens.encoder)], batch['explanations'].reshape(-1, LENGTH)
        for t in range(4):
            pred = programs.encode(state.judge, base, ids)
            state, out = train_step(state, base, roll, KEY, phase.knobs(t), **phase.program)
            close(out['judged'], jnp.mean(pred**2))
            new = [np.array(x) for x in jax.tree.leaves(state.params.encoder)]
            share = 1 - ema if not lag else float(t % 2)
            want = [(1 - share) * x + share * y for x, y in zip(want, new, strict=True)]
            for x, y in zip(jax.tree.leaves(state.judge), want, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
            if lag and t % 2:
                assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(state.judge), new, strict=True))
        with Checkpoints(tmp_path / 'c', Keep(1)) as checkpoints:
            checkpoints.save(4, state, {})
            checkpoints.wait()
            again = checkpoints.restore(4, abstract_state(state.params, phase, mesh))
    assert size(jax.tree.map(lambda x, y: x - y, state.judge, state.params.encoder)) > 0 or lag
    for x, y in zip(jax.tree.leaves(again.judge), jax.tree.leaves(state.judge), strict=True):
        np.testing.assert_array_equal(x, y)


def test_accumulated_steps_renew_once():
    phase = phase_of('sft')
    phase = dataclasses.replace(phase, tx=dataclasses.replace(phase.tx, accumulation=3), reward_lag=2)
    assert [float(phase.knobs(t)['renew']) for t in range(9)] == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    phase = dataclasses.replace(phase, reward_lag=0, reward_ema=0.75)
    assert [float(phase.knobs(t)['renew']) for t in range(4)] == [0, 0, 0.25, 0]
