"""Rotary positions: inverse frequencies of every published scaling, tables and the rotation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary table. kind: default | linear | llama3 | yarn; the other numbers belong to the kinds
    and carry the names of Hugging Face's rope_parameters."""

    theta: float
    kind: str = 'default'
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: bounds of the ramp rounded outwards
    attention_factor: float = 1.0  # yarn: sin and cos are multiplied by it


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Gives radians per position of each rotated pair, [head_dim / 2] in float64."""
    pair = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    freq = rope.theta**-pair
    if rope.kind == 'linear':
        return freq / rope.factor
    if rope.kind == 'llama3':
        # Long waves are slowed by `factor`, short ones kept, a linear blend in between (Llama 3.1).
        turns = rope.original_length * freq / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0, 1)
        return freq * (keep + (1 - keep) / rope.factor)
    if rope.kind == 'yarn':
        # YaRN (arXiv 2309.00071) by parts: pairs that turn often in the original length are kept.
        def pair_of(turns):
            return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if low == high else 0
        slowed = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
        return freq * (1 - slowed) + freq / rope.factor * slowed
    return freq


def tables(positions: jax.Array, ropes: tuple[Rope, ...], which, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Computes (sin, cos) of ropes[which] at positions [T] or, per row, [B, T]: each [..., head_dim/2] in float32.

    `which` may be traced.
    """
    freq_Rxi = jnp.asarray(np.stack([inverse_frequencies(r, head_dim) for r in ropes]), jnp.float32)
    scale_R = jnp.asarray([r.attention_factor for r in ropes], jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * freq_Rxi[which]
    return jnp.sin(angles) * scale_R[which], jnp.cos(angles) * scale_R[which]


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates x [B, T, ..., h] in the half-split layout (dimension i pairs with i + h/2), any head axes in between.

    sin, cos: [T, i] or, per row, [B, T, i].
    """
    extra = (1,) * (x.ndim - 3)
    sin, cos = (t.reshape(*t.shape[:-1], *extra, t.shape[-1]) for t in (sin, cos))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
