"""What sampled texts are worth, and how that teaches: formulas of group-relative policy gradients (GRPO).

Rows of one group are contiguous. Sources: Shao et al. 2024 (GRPO), Ahmadian et al. 2024 (RLOO), Liu et al. 2025 (Dr.
GRPO), MiniMax-M1 2025 (CISPO); rewards and masks as trainers of natural language autoencoders have them.
"""

import jax
import jax.numpy as jnp

from lens.losses import masked_mean

FAILED = 2.0  # the error that a response without an explanation counts as: that of an orthogonal direction
REWARDS = {  # of the encoder's error; the second keeps its slope where errors are small
    'error': lambda error: -error,
    'log_error': lambda error: -jnp.log(jnp.maximum(error, 1e-8)),
}
EQUAL = 1e-6  # standard deviation of the rewards of a group, at most which they are equal


def advantages(rewards_N, group: int, kind: str = 'grpo'):
    """Says what a sample's reward is worth within its group, by one of ADVANTAGES.

    grpo: (r - mean) / max(std, 1e-8), std unbiased. rloo: r - mean of the others.
    dr_grpo: r - mean, no division by the spread.
    """
    r = rewards_N.reshape(-1, group)
    r = r - r[:, :1]  # equal rewards give exact zeros: the rounding of their mean would become an advantage
    a = r - r.mean(1, keepdims=True)
    if kind == 'grpo':
        a = a / jnp.maximum(jnp.std(r, axis=1, ddof=1, keepdims=True), 1e-8)
    elif kind == 'rloo':
        a = a * (group / (group - 1))
    return a.reshape(-1)


ADVANTAGES = ('grpo', 'rloo', 'dr_grpo')


def varied(rewards_N, group: int):
    """Returns 1.0 for each row of a group whose rewards are not equal, [N]: others say nothing of what is better."""
    r = rewards_N.reshape(-1, group)
    r = r - r[:, :1]
    return jnp.where(jnp.std(r, axis=1, ddof=1, keepdims=True) > EQUAL, jnp.ones_like(r), 0).reshape(-1)


def best(error_N, kept_N, group: int):
    """Returns 1.0 for the row of the least error among those of each group that are kept, the first of equals, [N]."""
    error = jnp.where(kept_N > 0, error_N, jnp.inf).reshape(-1, group)
    first = jnp.arange(group) == jnp.argmin(error, axis=1)[:, None]
    return first.reshape(-1) * kept_N


def agree(logp_NxT, drawn_logp_NxT, mask_NxT, most):
    """Returns 1.0 for each row whose log-probabilities, by the trainer and by the sampler, differ by at most so many nats
    on average over its tokens, [N]: others were drawn from something else than what is trained."""
    gap = jnp.abs(jax.lax.stop_gradient(logp_NxT) - drawn_logp_NxT)
    mean_N = jnp.sum(gap * mask_NxT, axis=1) / jnp.maximum(jnp.sum(mask_NxT, axis=1), 1)
    return (mean_N <= most).astype(jnp.float32)


def _own_mean(mask_NxT, tokens, rows: int):
    return mask_NxT / jnp.maximum(jnp.sum(mask_NxT, axis=1, keepdims=True), 1), rows


# name -> function(mask NxT, tokens that count in the whole rollout, rows of it) -> (weight of each token NxT, what the
# weighted sum is divided by). tokens: all alike. responses: each text its own mean first. length: the sum of a text over
# the most that it may have (Dr. GRPO).
AGGREGATES = {
    'tokens': lambda mask_NxT, tokens, rows: (mask_NxT, tokens),
    'responses': _own_mean,
    'length': lambda mask_NxT, tokens, rows: (mask_NxT, rows * mask_NxT.shape[1]),
}


def _clipped(ratio, a, logp, clip):
    return jnp.minimum(ratio * a, jnp.clip(ratio, 1 - clip, 1 + clip) * a)


def _weighted(ratio, a, logp, clip):
    return jax.lax.stop_gradient(jnp.minimum(ratio, 1 + clip)) * a * logp


# name -> function(ratio, advantage, log-probability, clip) -> what is maximised of a token. ppo: the ratio stays in
# 1 - clip .. 1 + clip. cispo: it is a constant weight of 1 + clip at most, so that no token loses its gradient.
POLICIES = {'ppo': _clipped, 'cispo': _weighted}


def policy_gradient(
    logp_NxT, advantages_N, mask_NxT, old_logp_NxT=None, clip: float = 0.0, total=None, kind: str = 'ppo'
):
    """Returns - mean over tokens of ratio * a, ratio = pi / pi_old, as one of POLICIES has it.

    Without old log-probabilities the update is on-policy: the ratio is 1 in value, the gradient REINFORCE's.
    mask, total: of masked_mean, as one of AGGREGATES gives them.
    """
    a = jax.lax.stop_gradient(advantages_N)[:, None]
    old = logp_NxT if old_logp_NxT is None else old_logp_NxT
    ratio = jnp.exp(logp_NxT - jax.lax.stop_gradient(old))
    gain = ratio * a if old_logp_NxT is None else POLICIES[kind](ratio, a, logp_NxT, clip)
    return -masked_mean(gain, mask_NxT, total)
