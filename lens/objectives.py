"""What is minimised: pure functions (trainable, base, batch, key, hparams) -> (loss, metrics).

batch: tokens [R, S], positions [R, V] and, for sft, explanations [R, V, T]. The activations are
read inside, A = subject stream after block `layer`, N = R * V of them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lens import losses, sampling
from lens.models import decoder as dec
from lens.models import subject
from lens.models.encoder import encode
from lens.models.lens import Lens


@dataclasses.dataclass(frozen=True)
class Hparams:
    """Constants of an objective.

    group: samples per activation. beta: weight of the KL to the natural prefix, over tokens from
    kl_skip on. natural_prefix: token ids of the decoder prompt with the word for the activation.
    entropy_clamp in nats.
    """

    layer: int
    length: int
    group: int = 2
    entropy_weight: float = 0.0
    entropy_clamp: float = 0.0
    beta: float = 0.0
    kl_skip: int = 0
    natural_prefix: tuple[int, ...] = ()


def read_activations(base, batch, layer: int):
    """Activations NxD in float32."""
    a = subject.read(base, batch['tokens'], batch['positions'], layer)
    return a.reshape(-1, a.shape[-1]).astype(jnp.float32)


def sft(lens: Lens, base, batch, key, hp: Hparams):
    """Given explanations: decoder cross-entropy plus encoder normalised MSE on the same texts."""
    del key
    a_NxD = read_activations(base, batch, hp.layer)
    ids_NxT = batch['explanations'].reshape(-1, hp.length)
    logp, entropy = dec.score(lens.decoder, base, a_NxD, ids_NxT)
    ce = losses.cross_entropy(logp, jnp.ones_like(logp))
    pred = encode(lens.encoder, base, ids_NxT)
    mse = losses.normalised_mse(pred, a_NxD)
    metrics = {
        'loss_decoder': ce,
        'loss_encoder': mse,
        'fve': losses.fve(pred, a_NxD),
        'entropy_nats': jnp.mean(entropy),
    }
    return ce + mse, metrics


def grpo(lens: Lens, base, batch, key, hp: Hparams):
    """Sampled explanations: decoder by policy gradient, encoder by normalised MSE on the same samples.

    The samples are constants for both sides, so decoder parameters get gradient from the policy
    gradient, the KL and the entropy bonus only, encoder parameters from the MSE only.
    """
    a_BxD = read_activations(base, batch, hp.layer)
    frozen = jax.lax.stop_gradient(lens.decoder)
    samples = sampling.sample(frozen, base, a_BxD, key, length=hp.length, group=hp.group)
    ids, a_NxD = samples.ids_NxT, subject.tile_rows(a_BxD, hp.group)

    pred = encode(lens.encoder, base, ids)
    mse = losses.normalised_mse(pred, a_NxD)
    reward = losses.rewards(pred, a_NxD)
    advantage = losses.group_advantages(reward, hp.group)

    logp, entropy = dec.score(lens.decoder, base, a_NxD, ids)
    loss = losses.policy_gradient(logp, advantage)
    metrics = {
        'loss_decoder': loss,
        'loss_encoder': mse,
        'fve': losses.fve(pred, a_NxD, group=hp.group),
        'reward': jnp.mean(reward),
        'entropy_nats': jnp.mean(entropy),
        'zero_advantage_fraction': jnp.mean(jnp.abs(advantage) < 1e-6),
        'logp_diff_max': jnp.max(jnp.abs(logp - samples.logp_NxT)),
    }
    if hp.beta:
        logq = dec.natural_log_probs(base, jnp.asarray(hp.natural_prefix), ids)
        metrics['kl_natural_nats'] = losses.k3(logp, logq, hp.kl_skip)
        loss += hp.beta * metrics['kl_natural_nats']
    if hp.entropy_weight:
        loss -= hp.entropy_weight * losses.clamped_entropy(entropy, hp.entropy_clamp)
    return loss + mse, metrics


OBJECTIVES = {'sft': sft, 'grpo': grpo}
NEEDS_EXPLANATIONS = frozenset({'sft'})
