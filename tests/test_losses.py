"""lens.losses against a few lines of float64 numpy each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import losses, policy

N, D, B, T, V = 11, 5, 3, 4, 7
FLOAT32 = 1e-5  # relative error of the float32 formulas


def normal(seed, *shape, scale=1.0, shift=0.0):
    """Float32 values, so that both sides start from the same numbers."""
    return (shift + scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def close(got, want, rtol=FLOAT32):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=1e-6)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return np.log(p / p.sum(-1, keepdims=True))


def finite_differences(f, x, step=1e-5):
    """Gradient of a float64 scalar function by central differences."""
    x = np.asarray(x, np.float64)
    grad = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        grad[i] = (f(up) - f(down)) / (2 * step)
    return grad


def test_normalised_mse_of_rows():
    pred, target = normal(0, N, D), normal(1, N, D, scale=30.0)
    want = [np.sum((p - t) ** 2) / np.sum(t**2) for p, t in zip(pred.astype(float), target.astype(float), strict=True)]
    close(losses.normalised_mse_rows(pred, target), want)


def test_normalised_mse_of_a_zero_target_is_finite():
    pred = np.full((1, D), 1e-6, np.float32)
    close(losses.normalised_mse_rows(pred, np.zeros((1, D), np.float32)).mean(), 1e-12 / 1e-12)


def test_normalised_mse_computes_in_float32_on_bfloat16_inputs():
    pred, target = normal(0, N, D).astype(jnp.bfloat16), normal(1, N, D).astype(jnp.bfloat16)
    p, t = pred.astype(np.float64), target.astype(np.float64)
    got = losses.normalised_mse_rows(jnp.asarray(pred), jnp.asarray(target)).mean()
    assert got.dtype == jnp.float32
    close(got, np.mean(((p - t) ** 2).sum(1) / (t**2).sum(1)))


def test_fve_against_numpy():
    target, pred = normal(2, N, D, scale=2, shift=3), normal(3, N, D)
    a, r = target.astype(float), target.astype(float) - pred
    close(losses.fve(pred, target), 1 - np.mean(np.sum(r * r, 1)) / np.trace(np.cov(a.T)))


def test_fve_of_the_mean_is_the_degree_of_freedom():
    target = normal(2, N, D, shift=3)
    mean = np.broadcast_to(target.mean(0), target.shape)
    close(losses.fve(mean, target), 1 / N)  # ddof 1: 1 - (N - 1) / N


def test_fve_penalises_a_bias():
    target, bias = normal(2, N, D), 0.5
    close(losses.fve(target + bias, target), 1 - D * bias**2 / np.trace(np.cov(target.astype(float).T)))
    assert losses.fve(target, target) == 1


def test_token_log_probs():
    logits = normal(4, B, T, V, scale=20)
    ids = np.random.default_rng(5).integers(V, size=(B, T))
    want = [[log_softmax(logits)[b, t, ids[b, t]] for t in range(T)] for b in range(B)]
    close(losses.token_log_probs(logits, ids), want)


def test_token_log_probs_computes_in_float32_on_bfloat16_logits():
    logits = jnp.asarray(normal(4, B, T, V, scale=20)).astype(jnp.bfloat16)
    got = losses.token_log_probs(logits, jnp.zeros((B, T), int))
    assert got.dtype == jnp.float32
    close(got, log_softmax(np.asarray(logits, np.float64))[..., 0])


def test_entropy():
    logits = normal(6, B, T, V, scale=3)
    p = np.exp(log_softmax(logits))
    close(losses.entropy(logits), np.sum(p * np.log(1 / p), -1))
    close(losses.entropy(np.zeros((1, 1, V), np.float32)), [[np.log(V)]])


def test_cross_entropy_leaves_masked_tokens_out():
    logp, mask = -np.abs(normal(7, B, T)), np.random.default_rng(8).integers(2, size=(B, T))
    assert 0 < mask.sum() < mask.size
    close(losses.cross_entropy(logp, mask), -logp[mask == 1].astype(float).mean())
    assert losses.cross_entropy(logp, np.zeros((B, T))) == 0
    grad = np.asarray(jax.grad(losses.cross_entropy)(jnp.asarray(logp), mask))
    close(grad, np.where(mask, -1 / mask.sum(), 0))


def test_clamped_entropy_has_no_gradient_above_the_clamp():
    h = np.asarray([[0.1, 0.3, 0.2, 0.2], [2.0, 0.1, 0.1, 0.2], [1.0, 3.0, 2.0, 0.8]], np.float32)
    clamp = 1.0  # the mean of a row counts: row 1 has one token above it and stays below
    value, grad = jax.value_and_grad(losses.clamped_entropy)(jnp.asarray(h), np.ones_like(h), clamp)
    close(value, (0.2 + 0.6 + 1.0) / 3)
    close(grad, [[1 / 12] * 4, [1 / 12] * 4, [0] * 4])
    assert not np.asarray(grad)[2].any()


def test_clamped_entropy_is_a_mean_over_the_tokens_of_each_text():
    h = np.abs(normal(9, 3, T))
    mask = np.arange(T) < np.array([[1], [3], [T]])
    rows = [row[m].astype(float).mean() for row, m in zip(h, mask, strict=True)]
    close(losses.clamped_entropy(h, mask, 0.7), np.mean(np.minimum(rows, 0.7)))


def test_direction_error_is_the_squared_distance_at_norm_sqrt_d():
    pred, target = normal(9, N, D, scale=10), normal(10, N, D, scale=3)
    unit = [x.astype(float) * np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True) for x in (pred, target)]
    close(losses.direction_mse_rows(pred, target), np.mean((unit[0] - unit[1]) ** 2, axis=1))
    close(losses.direction_mse_rows(pred, -7 * pred), np.full(N, 4.0))
    tiny = jnp.asarray(pred) * np.float32(1e-20)
    grads = jax.grad(lambda p: losses.direction_mse_rows(p, target).sum())(tiny)
    assert np.abs(np.asarray(grads)).max() < 1e9
    close(losses.direction_mse_rows(0 * tiny, target), np.ones(N))  # as far as the mean of a direction's square
    assert np.abs(jax.grad(lambda p: losses.direction_mse_rows(p, target).sum())(0 * tiny)).max() < 1e9


def test_rloo_compares_with_the_mean_of_the_others_and_dr_grpo_with_the_mean_of_all():
    r = normal(11, 4, 3, scale=5)
    rloo = [[row[i] - np.delete(row, i).astype(float).mean() for i in range(3)] for row in r]
    close(policy.advantages(jnp.asarray(r).ravel(), 3, 'rloo'), np.ravel(rloo))
    close(policy.advantages(jnp.asarray(r).ravel(), 3, 'dr_grpo'), (r - r.astype(float).mean(1, keepdims=True)).ravel())


def test_group_advantages_standardise_contiguous_groups():
    groups = [[-1.0, -2.0, -6.0], [-40.0, -10.0, -10.0]]
    got = policy.advantages(jnp.asarray(groups).ravel(), 3)
    close(got, np.concatenate([(np.array(g) - np.mean(g)) / np.std(g, ddof=1) for g in groups]))
    # by hand, group 1: mean -3, unbiased variance (4 + 1 + 9) / 2 = 7
    close(got[:3], np.array([2, 1, -3]) / np.sqrt(7))


@pytest.mark.parametrize('group', [2, 3, 5, 8, 12])
def test_group_advantages_of_equal_rewards_are_exactly_zero(group):
    """Identical explanations teach nothing. The rounding of the mean must not become an advantage."""
    values = np.asarray([0.0, -0.1, -0.7, -1 / 3, -333.3, -1.2345e7], np.float32)
    got = jax.jit(policy.advantages, static_argnums=1)(np.repeat(values, group), group)
    np.testing.assert_array_equal(np.asarray(got).reshape(-1, group), np.zeros((len(values), group)))


def test_policy_gradient_counts_the_tokens_of_the_mask_alone():
    logp, a, mask = -np.abs(normal(13, N, T)), normal(14, N), np.random.default_rng(8).integers(2, size=(N, T))
    both = jax.value_and_grad(policy.policy_gradient, argnums=(0, 1))
    for m in (mask, np.ones_like(mask)):
        value, (d_logp, d_a) = both(jnp.asarray(logp), jnp.asarray(a), m)
        close(value, -(a[:, None].astype(float) * m).sum() / m.sum())
        close(d_logp, -a[:, None].astype(float) * m / m.sum())
        assert not np.asarray(d_a).any()


def test_clipped_policy_gradient_against_numpy():
    """PPO: no gradient where the ratio has left the interval on the side that the advantage asks for."""
    old, a, ones = -np.abs(normal(13, N, T)), normal(14, N), np.ones((N, T))
    logp = old + normal(22, N, T, scale=0.4)
    value, grad = jax.value_and_grad(policy.policy_gradient)(jnp.asarray(logp), jnp.asarray(a), ones, old, 0.2)
    ratio, up = np.exp(logp.astype(float) - old), a[:, None].astype(float)
    close(value, -np.mean(np.minimum(ratio * up, np.clip(ratio, 0.8, 1.2) * up)))
    free = np.where(up > 0, ratio < 1.2, ratio > 0.8)
    assert 0 < free.sum() < free.size
    close(grad, -np.where(free, ratio * up, 0) / (N * T))


# A policy over V3**T2 = 9 texts, small enough to take every expectation exactly.
V3, T2 = 3, 2
TEXTS = list(itertools.product(range(V3), repeat=T2))
THETA = np.random.default_rng(15).normal(size=(T2, V3))
LOG_Q = log_softmax(np.random.default_rng(16).normal(size=(T2, V3)))
REWARD = np.random.default_rng(17).normal(size=len(TEXTS))


def text_log_probs(theta, text):
    return np.array([log_softmax(theta)[t, w] for t, w in enumerate(text)])


def probability(theta, text):
    return np.exp(text_log_probs(theta, text).sum())


def expected_gradient(term, *per_text):
    """sum_w pi(w) * d term(log pi(w), per_text[w]) / d theta, the factor pi(w) held constant."""

    def loss(theta, ids, *x):
        return term(losses.token_log_probs(theta[None], ids[None]), *x)

    grads = jax.jit(jax.vmap(jax.grad(loss), (None, *[0] * (1 + len(per_text)))))(
        jnp.asarray(THETA, jnp.float32), jnp.asarray(TEXTS), *(jnp.asarray(x, jnp.float32) for x in per_text)
    )
    weights = [probability(THETA, w) for w in TEXTS]
    return np.tensordot(weights, np.asarray(grads, np.float64), 1)


def test_policy_gradient_is_minus_the_gradient_of_the_expected_reward():
    got = expected_gradient(lambda x, r: policy.policy_gradient(x, r, np.ones((1, T2))), REWARD[:, None])

    def expected_reward(theta):
        return sum(probability(theta, w) * r for w, r in zip(TEXTS, REWARD, strict=True))

    up = finite_differences(expected_reward, THETA)
    close(got, -up / T2)  # the token mean divides by T
    assert expected_reward(THETA - 0.1 * got) > expected_reward(THETA)


def test_k3_against_numpy_and_its_skip():
    logp, logq = -np.abs(normal(18, N, T)), -np.abs(normal(19, N, T))
    for skip in (0, 1, 3):
        ratio = np.exp(logq.astype(float) - logp)[:, skip:]
        close(losses.k3(logp, logq, np.arange(T) >= skip), np.mean(ratio - np.log(ratio) - 1))


def test_k3_is_zero_where_both_agree_and_precise_close_to_it():
    logp = -np.abs(normal(18, N, T))
    assert losses.k3(logp, logp, np.ones((N, T))) == 0
    zero, near = np.zeros((1, 1), np.float32), np.full((1, 1), 2e-3, np.float32)
    # d^2/2 + d^3/6: the plain formula q/pi - log(q/pi) - 1 has lost most digits here.
    # rtol 1e-3: of expm1(d) - d in float32, whose two terms agree to three digits
    np.testing.assert_allclose(losses.k3(zero, near, np.ones((1, 1))), 2e-6 + 8e-9 / 6, rtol=1e-3)


def test_k3_gradient_is_one_minus_q_over_pi_and_stops_at_q():
    logp, logq, skip = -np.abs(normal(18, N, T)), -np.abs(normal(19, N, T)), 1
    d_p, d_q = jax.grad(losses.k3, argnums=(0, 1))(
        jnp.asarray(logp), jnp.asarray(logq), jnp.tile(jnp.arange(T) >= skip, (N, 1))
    )
    want = (1 - np.exp(logq.astype(float) - logp)) / (N * (T - skip))
    want[:, :skip] = 0
    close(d_p, want)
    assert not np.asarray(d_q).any()


def test_k3_of_a_hopeless_token_is_clamped():
    far = losses.k3(np.full((1, 1), -40.0, np.float32), np.zeros((1, 1), np.float32), np.ones((1, 1)))
    close(far, np.exp(12) - 13)


def test_k3_estimates_kl_pi_q_and_its_gradient_is_that_of_kl_q_pi():
    logp = log_softmax(THETA)
    log_p, log_q = (np.asarray([[text_log_probs(x, w)] for w in TEXTS], np.float32) for x in (THETA, LOG_Q))
    value = sum(probability(THETA, w) * losses.k3(log_p[i], log_q[i], np.ones((1, T2))) for i, w in enumerate(TEXTS))
    close(value, np.mean(np.sum(np.exp(logp) * (logp - LOG_Q), -1)))

    ones = np.ones((1, T2))
    got = expected_gradient(lambda logp, logq: losses.k3(logp, logq, ones), [[text_log_probs(LOG_Q, w)] for w in TEXTS])
    kl_q_pi = finite_differences(lambda x: np.mean(np.sum(np.exp(LOG_Q) * (LOG_Q - log_softmax(x)), -1)), THETA)
    close(got, kl_q_pi)


def test_fve_of_repeated_rows_counts_each_target_once_in_the_variance():
    rng = np.random.default_rng(11)
    target, noise = rng.standard_normal((4, 6)), rng.standard_normal((12, 6))
    repeated = np.repeat(target, 3, axis=0)
    expected = 1 - (noise**2).sum() / 12 / target.var(0, ddof=1).sum()
    np.testing.assert_allclose(losses.fve(repeated + noise, repeated, group=3), expected, rtol=1e-5)


def test_kl_against_numpy_with_a_constant_first_argument():
    logits_p, logits_q = normal(20, B, T, V, scale=3), normal(21, B, T, V, scale=3)
    logp, logq = log_softmax(logits_p), log_softmax(logits_q)
    close(losses.kl(logits_p, logits_q), np.sum(np.exp(logp) * (logp - logq), -1))
    d_p, d_q = jax.grad(lambda p, q: losses.kl(p, q).sum(), argnums=(0, 1))(jnp.asarray(logits_p), logits_q)
    assert not np.asarray(d_p).any()
    close(d_q, np.exp(logq) - np.exp(logp))


def test_kl_is_0_of_equal_distributions_and_in_float32_on_bfloat16_logits():
    p, q = (jnp.asarray(normal(seed, B, V, scale=20)).astype(jnp.bfloat16) for seed in (22, 23))
    np.testing.assert_array_equal(losses.kl(p, p), np.zeros(B))
    logp, logq = log_softmax(np.asarray(p, np.float64)), log_softmax(np.asarray(q, np.float64))
    got = losses.kl(p, q)
    assert got.dtype == jnp.float32
    close(got, np.sum(np.exp(logp) * (logp - logq), -1))
