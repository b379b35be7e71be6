"""The formulas alone. Reductions in float32, natural logarithms; every one is tested against numpy."""

import jax
import jax.numpy as jnp


def normalised_mse(pred_NxD, target_NxD):
    """mean_n [ mean_d (pred - target)^2 / max(mean_d target^2, 1e-12) ]."""
    return normalised_mse_rows(pred_NxD, target_NxD).mean()


def normalised_mse_rows(pred_NxD, target_NxD):
    pred, target = pred_NxD.astype(jnp.float32), target_NxD.astype(jnp.float32)
    return jnp.mean((pred - target) ** 2, -1) / jnp.maximum(jnp.mean(target**2, -1), 1e-12)


def fve(pred_NxD, target_NxD, group: int = 1):
    """Fraction of variance explained, bias penalised: 1 - mean_n |target - pred|^2 / sum_d Var_d(target).

    Var around the mean of these rows, ddof 1; of rows repeated in contiguous groups, each target counts
    once. The mean as prediction gives about 0.
    """
    pred, target = pred_NxD.astype(jnp.float32), target_NxD.astype(jnp.float32)
    error = jnp.mean(jnp.sum((target - pred) ** 2, -1))
    return 1 - error / jnp.maximum(
        jnp.sum(jnp.var(target.reshape(-1, group, target.shape[-1])[:, 0], axis=0, ddof=1)), 1e-12
    )


def token_log_probs(logits_BxTxV, ids_BxT):
    """log softmax picked at the ids, BxT. Written as a masked sum: V may be sharded."""
    logits = logits_BxTxV.astype(jnp.float32)
    hit = jnp.arange(logits.shape[-1]) == ids_BxT[..., None]
    return jnp.sum(jnp.where(hit, logits, 0), -1) - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits_BxTxV):
    """Entropy of the next-token distribution in nats, BxT."""
    logp = jax.nn.log_softmax(logits_BxTxV.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(logp) * logp, -1)


def cross_entropy(logp_BxT, mask_BxT):
    """Mean negative log-probability over the tokens where mask is 1."""
    return -jnp.sum(logp_BxT * mask_BxT) / jnp.maximum(jnp.sum(mask_BxT), 1)


def clamped_entropy(entropy_BxT, clamp: float):
    """mean_b min(mean_t H, clamp): above the clamp a sequence gets no bonus gradient."""
    return jnp.mean(jnp.minimum(jnp.mean(entropy_BxT, -1), clamp))


def rewards(pred_NxD, target_NxD):
    """- mean_d (target - pred)^2, raw, without gradient."""
    return jax.lax.stop_gradient(-jnp.mean((target_NxD.astype(jnp.float32) - pred_NxD.astype(jnp.float32)) ** 2, -1))


def group_advantages(rewards_N, group: int):
    """(r - group mean) / max(group std, 1e-8), std unbiased; groups are contiguous rows of `group`."""
    r = rewards_N.reshape(-1, group)
    r = r - r[:, :1]  # equal rewards give exact zeros: the rounding of their mean would become an advantage
    std = jnp.std(r, axis=1, ddof=1, keepdims=True)
    return ((r - r.mean(1, keepdims=True)) / jnp.maximum(std, 1e-8)).reshape(-1)


def policy_gradient(logp_NxT, advantages_N):
    """- mean_{n,t} [ pi / sg(pi) * a ]: the value is -mean(a), the gradient is REINFORCE's.

    One on-policy update: the ratio is 1 by construction, so there is nothing to clip.
    """
    ratio = jnp.exp(logp_NxT - jax.lax.stop_gradient(logp_NxT))
    return -jnp.mean(ratio * jax.lax.stop_gradient(advantages_N)[:, None])


def k3(logp_NxT, logq_NxT, skip: int):
    """mean over tokens t >= skip of q/pi - log(q/pi) - 1, the k3 estimator of KL(pi || q).

    The gradient goes through pi; q is constant.
    """
    diff = jax.lax.stop_gradient(logq_NxT)[:, skip:] - logp_NxT[:, skip:]
    return jnp.mean(jnp.expm1(diff) - diff)
