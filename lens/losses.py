"""The formulas alone. Reductions in float32, natural logarithms; every one is tested against numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from lens import sharding

FLOOR = 1e-12  # of a squared norm that is divided by: far below that of any activation


def normalised_mse_rows(pred_NxD, target_NxD):
    """Returns mean_d (pred - target)^2 / max(mean_d target^2, 1e-12), [N]."""
    pred, target = pred_NxD.astype(jnp.float32), target_NxD.astype(jnp.float32)
    return jnp.mean((pred - target) ** 2, -1) / jnp.maximum(jnp.mean(target**2, -1), 1e-12)


def direction_mse_rows(pred_NxD, target_NxD):
    """Returns mean_d of the squared difference when both have norm sqrt(d): 2 (1 - cos), the error of NLA lenses, [N].

    The floor of a norm is inside its square root: a prediction of zero has error 1 and a gradient below 2 / sqrt(1e-12).
    """
    pred, target = directions(pred_NxD), directions(target_NxD)
    return jnp.mean((pred - target) ** 2, -1)


def directions(x_NxD):
    """Rescales rows to norm sqrt(d), in float32; zero stays zero."""
    x = x_NxD.astype(jnp.float32)
    return x * jnp.sqrt(x.shape[-1] / jnp.maximum(jnp.sum(x**2, -1, keepdims=True), FLOOR))


ERRORS = ('nmse', 'direction')  # what the encoder minimises: the first or the second of those


def error_rows(pred_NxD, target_NxD, error: str):
    """Returns the encoder's error of every row, one of ERRORS."""
    return (direction_mse_rows if error == 'direction' else normalised_mse_rows)(pred_NxD, target_NxD)


def comparable(x_NxD, error: str):
    """Gives rows as figures compare them: as they are, or rescaled to norm sqrt(d) where only directions count."""
    return directions(x_NxD) if error == 'direction' else x_NxD


def masked_mean(x, mask, total=None):
    """Averages x where mask, which broadcasts against it, is 1; 0 where it is nowhere.

    total: the sum of the mask of all rows, where these are a part of them; what the parts give then adds up to the mean.
    """
    mask = jnp.broadcast_to(mask, x.shape)
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask) if total is None else total, 1)


def fve(pred_NxD, target_NxD, group: int = 1, mask_N=None):
    """Returns the fraction of variance explained, bias penalised: 1 - mean_n |target - pred|^2 / sum_d Var_d(target).

    Var around the mean of these rows, ddof 1; of rows repeated in contiguous groups, each target counts
    once. The mean as prediction gives about 0. mask: 1 for rows whose error counts; None: all.
    """
    pred, target = pred_NxD.astype(jnp.float32), target_NxD.astype(jnp.float32)
    error = jnp.sum((target - pred) ** 2, -1)
    error = jnp.mean(error) if mask_N is None else masked_mean(error, mask_N)
    spread = jnp.sum(jnp.var(target.reshape(-1, group, target.shape[-1])[:, 0], axis=0, ddof=1))
    return 1 - error / jnp.maximum(spread, 1e-12)


def token_log_probs(logits_BxTxV, ids_BxT):
    """Picks log softmax at the ids, BxT. Written as a masked sum: V may be sharded.

    The noughts are made of the ids: constant ones JAX would hold in memory, BxTxV of them, around a loop over slices.
    """
    logits, ids = logits_BxTxV.astype(jnp.float32), ids_BxT[..., None]
    hit = jnp.arange(logits.shape[-1]) == ids
    return jnp.sum(jnp.where(hit, logits, 0 * ids), -1) - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits_BxTxV):
    """Returns the entropy of the next-token distribution in nats, BxT."""
    logp = jax.nn.log_softmax(logits_BxTxV.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(logp) * logp, -1)


def cross_entropy(logp_BxT, mask_BxT, total=None):
    """Returns the mean negative log-probability over the tokens where mask is 1. total: of masked_mean."""
    return -masked_mean(logp_BxT, mask_BxT, total)


def clamped_entropy(entropy_BxT, mask_BxT, clamp):
    """Returns mean_b min(mean_t H, clamp): above the clamp a sequence gets no bonus gradient."""
    mean_B = jnp.sum(entropy_BxT * mask_BxT, -1) / jnp.maximum(jnp.sum(mask_BxT, -1), 1)
    return jnp.mean(jnp.minimum(mean_B, clamp))


K3_CLAMP = 12.0  # of the log-ratio; e^12 tokens of weight would be one token's noise


def k3(logp_NxT, logq_NxT, mask_NxT, total=None):
    """Returns the mean over tokens of q/pi - log(q/pi) - 1, the k3 estimator of KL(pi || q).

    The gradient goes through pi; q is constant. log(q/pi) is at most K3_CLAMP: beyond it there is no gradient, while a
    token that pi makes much likelier than q is always pulled back. total: of masked_mean.
    """
    diff = jnp.minimum(jax.lax.stop_gradient(logq_NxT) - logp_NxT, K3_CLAMP)
    return masked_mean(jnp.expm1(diff) - diff, mask_NxT, total)


def kl(logits_p, logits_q):
    """Returns KL(P || Q) in nats of the distributions over the last axis, [...]; P is constant."""
    logp = jax.nn.log_softmax(jax.lax.stop_gradient(logits_p).astype(jnp.float32), axis=-1)
    logq = jax.nn.log_softmax(logits_q.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(logp) * (logp - logq), -1)


def kl_top(logits_p, logits_q, k: int):
    """Returns KL(P || Q) in nats over the k likeliest words of P, each by itself, and all others as one, [...]; Q is constant.

    A lower bound of kl(), and 0 where both agree. Without the one for the others it would fall as P moves its mass away
    from what is counted. Words as likely as the k-th of P are counted by themselves as well.
    """
    logp = jax.nn.log_softmax(logits_p.astype(jnp.float32), axis=-1)
    logq = jax.nn.log_softmax(jax.lax.stop_gradient(logits_q).astype(jnp.float32), axis=-1)
    fixed = jax.lax.stop_gradient(logp)
    top = fixed >= sharding.top_k(fixed, min(k, logp.shape[-1]))[0][..., -1:]
    p, q = (jnp.where(top, jnp.exp(x), 0) for x in (logp, logq))
    rest_p, rest_q = (jnp.maximum(1 - jnp.sum(x, -1), 1e-9) for x in (p, q))
    return jnp.sum(p * jnp.where(top, logp - logq, 0), -1) + rest_p * (jnp.log(rest_p) - jnp.log(rest_q))


def repeated(ids_NxT, mask_NxT):
    """Returns the share of the texts that equal an earlier one; tokens where mask is 0 do not count.

    Two hashes of 32 bits are compared, sums over mixed words: texts that differ in one place never agree, others by
    chance once in 2^64 pairs.
    """
    words = jnp.where(mask_NxT > 0, ids_NxT + 1, 0).astype(jnp.uint32)
    factors = np.random.default_rng(0).integers(2**31, size=(2, words.shape[1]), dtype=np.uint32) * 2 + 1
    hashes = []
    for factor_T in factors:
        x = words * factor_T
        x = (x ^ (x >> 15)) * np.uint32(0x2C1B3C6D)
        hashes.append(sharding.reshard(jnp.sum(x ^ (x >> 12), axis=1, dtype=jnp.uint32), sharding.P()))
    first, second = jax.lax.sort(hashes, num_keys=2)
    return jnp.sum((first[1:] == first[:-1]) & (second[1:] == second[:-1])) / len(first)


def copied_rows(ids_NxT, inside_NxT, recent_NxR):
    """Returns how many of the tokens that are inside stand among the recent ones, over T, [N]."""
    there_NxT = (ids_NxT[:, :, None] == recent_NxR[:, None, :]).any(-1)
    return jnp.mean(there_NxT & inside_NxT, axis=1, dtype=jnp.float32)
