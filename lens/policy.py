"""What sampled texts are worth, and how that teaches the decoder: formulas of group-relative policy gradients (GRPO)."""

import jax
import jax.numpy as jnp

from lens.losses import masked_mean


def advantages(rewards_N, group: int, kind: str = 'grpo'):
    """Says what a sample's reward is worth within its group of contiguous rows, by one of ADVANTAGES.

    grpo: (r - mean) / max(std, 1e-8), std unbiased. rloo: r - mean of the others (Ahmadian et al. 2024).
    dr_grpo: r - mean, no division by the spread (Liu et al. 2025).
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


def policy_gradient(logp_NxT, advantages_N, mask_NxT, old_logp_NxT=None, clip: float = 0.0, total=None):
    """Returns - mean over tokens of ratio * a, ratio = pi / pi_old; a token mean, without correction for length.

    Without old log-probabilities the update is on-policy: the ratio is 1 in value, the gradient REINFORCE's.
    With them the ratio is clipped to 1 - clip .. 1 + clip (PPO). total: of masked_mean.
    """
    a = jax.lax.stop_gradient(advantages_N)[:, None]
    old = logp_NxT if old_logp_NxT is None else old_logp_NxT
    ratio = jnp.exp(logp_NxT - jax.lax.stop_gradient(old))
    gain = ratio * a
    if old_logp_NxT is not None:
        gain = jnp.minimum(gain, jnp.clip(ratio, 1 - clip, 1 + clip) * a)
    return -masked_mean(gain, mask_NxT, total)
