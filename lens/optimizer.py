"""AdamW for the trainable tree: decoder and encoder clipped and scheduled separately."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

from lens import schedules, sharding

SIDES = ('decoder', 'encoder')
# Weight decay acts on matrices of a trained base or adapter only; never on maps, prompts or norms.
NO_DECAY_DIMS = 2


def side(path: str) -> str:
    """'decoder' or 'encoder' for a leaf path of the trainable tree."""
    return path.split('/')[0]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Of one phase; learning rates are peaks, grad_clip is a global norm per side."""

    steps: int
    warmup_steps: int
    final_fraction: float
    learning_rate_decoder: float
    learning_rate_encoder: float
    weight_decay: float
    grad_clip: float


def make(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer of one phase, for a tree whose first path element is a side."""

    def one(peak):
        schedule = schedules.warmup_cosine(peak, cfg.steps, cfg.warmup_steps, cfg.final_fraction)
        decayed = lambda tree: jax.tree_util.tree_map_with_path(  # noqa: E731
            lambda kp, x: (
                re.search(r'(^|/)(blocks|adapters)/', sharding.path(kp)) is not None and x.ndim > NO_DECAY_DIMS
            ),
            tree,
        )
        return optax.chain(
            optax.clip_by_global_norm(cfg.grad_clip),
            optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=cfg.weight_decay, mask=decayed),
        )

    peaks = {'decoder': cfg.learning_rate_decoder, 'encoder': cfg.learning_rate_encoder}
    labels = lambda tree: jax.tree_util.tree_map_with_path(lambda kp, _: side(sharding.path(kp)), tree)  # noqa: E731
    return optax.partition({name: one(peaks[name]) for name in SIDES}, labels)


def norms_by_side(tree) -> dict[str, jax.Array]:
    """Global L2 norm of the decoder's and of the encoder's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        name: jnp.sqrt(sum(jnp.sum(x.astype(jnp.float32) ** 2) for kp, x in leaves if side(sharding.path(kp)) == name))
        for name in SIDES
    }
