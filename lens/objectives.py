"""What is minimised: pure functions (trainable, base, batch, key, hparams) -> (loss, metrics).

batch: tokens [R, S], positions [R, V] and, for sft, explanations [R, V, T]. The activations are
read inside, A = subject stream after block `layer`, N = R * V of them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lens import losses, sampling, sharding
from lens.models import decoder as dec
from lens.models import subject
from lens.models.encoder import encode, encode_rows, model_of
from lens.models.lens import Lens

MIN_TAU = 0.1


@dataclasses.dataclass(frozen=True)
class Hparams:
    """Constants of an objective.

    tau: temperature of the relaxed tokens of gumbel, not below MIN_TAU. group: samples per activation. beta: weight of the KL to the natural prefix, over tokens from
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
    tau: float = 1.0


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


def straight_through(logits_NxTxV, noise_NxTxV, words_NxTxD, embedding_VxD, tau: float):
    """Rows that are words in value and softmax((logits + noise) / tau) E in their gradient."""
    vocabulary = sharding.like(embedding_VxD)
    soft = jax.nn.softmax((logits_NxTxV + noise_NxTxV) / max(tau, MIN_TAU), axis=-1)
    soft = sharding.reshard(soft, sharding.P('data', None, vocabulary[0] if vocabulary else None))
    table = jax.lax.stop_gradient(embedding_VxD)
    mixed = jnp.einsum('ntv,vd->ntd', soft.astype(table.dtype), table, out_sharding=sharding.out(sharding.ACT))
    return words_NxTxD + (mixed - jax.lax.stop_gradient(mixed))


def gumbel(lens: Lens, base, batch, key, hp: Hparams):
    """Sampled explanations, one backward pass through the words: straight-through Gumbel, two passes.

    The texts are drawn without gradient; one teacher-forced pass relaxes every token with the noise that
    drew it, and the encoder reads the words with that gradient. The way from a token to later tokens
    through the decoder is left out.
    """
    a_NxD = read_activations(base, batch, hp.layer)
    ids = sampling.sample(jax.lax.stop_gradient(lens.decoder), base, a_NxD, key, length=hp.length).ids_NxT
    logits = dec.teacher_forced_logits(lens.decoder, base, a_NxD, ids)
    logits = sharding.reshard(logits, sharding.P('data', None, None))
    noise = [sampling.noise(key, t, (logits.shape[0], logits.shape[2])) for t in range(hp.length)]
    model = model_of(lens.encoder, base)
    words = straight_through(logits, jnp.stack(noise, axis=1), model.lookup(ids), model.embedding[...], hp.tau)
    pred = encode_rows(lens.encoder, base, words)
    loss = losses.normalised_mse(pred, a_NxD)
    entropy = losses.entropy(logits)
    metrics = {'loss_encoder': loss, 'fve': losses.fve(pred, a_NxD), 'entropy_nats': jnp.mean(entropy)}
    if hp.beta:
        logq = dec.natural_log_probs(base, jnp.asarray(hp.natural_prefix), ids)
        metrics['kl_natural_nats'] = losses.k3(losses.token_log_probs(logits, ids), logq, hp.kl_skip)
        loss += hp.beta * metrics['kl_natural_nats']
    if hp.entropy_weight:
        loss -= hp.entropy_weight * jnp.mean(entropy)
    return loss, metrics


OBJECTIVES = {'sft': sft, 'grpo': grpo, 'gumbel': gumbel}
NEEDS_EXPLANATIONS = frozenset({'sft'})
