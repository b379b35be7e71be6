"""RMSNorm, Gemma's RMSNorm and LayerNorm; how parameters start."""

import jax
import jax.numpy as jnp
from flax import nnx


def normal(shape, fan_in: int, rngs: nnx.Rngs, dtype) -> nnx.Param:
    """Draws a random matrix whose products have about the size of what it is applied to."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)


def zeros(shape, dtype, wanted: bool = True):
    """Makes a parameter of zeros where it is wanted, else None."""
    return nnx.data(nnx.Param(jnp.zeros(shape, dtype)) if wanted else None)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """Divides x by the root of its mean square, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class Norm(nnx.Module):
    """kind: 'rms', 'rms_offset' (Gemma: the stored weight is the scale minus one) or 'layer'.

    Computed in float32 and rounded once to the dtype of the input.
    """

    def __init__(self, size: int, kind: str, dtype):
        self.kind = kind
        self.scale = nnx.Param(jnp.zeros(size, dtype) if kind == 'rms_offset' else jnp.ones(size, dtype))
        self.bias = zeros(size, dtype, kind == 'layer')

    def __call__(self, x: jax.Array, eps: float) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == 'layer':
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = unit_rms(y, eps) * (self.scale[...].astype(jnp.float32) + (self.kind == 'rms_offset'))
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
