"""MXFP4: 4-bit floats, 32 of which share one power of two (OCP Microscaling Formats, 1.0)."""

import jax.numpy as jnp
import numpy as np

BLOCK = 32  # values per scale
VALUES = np.outer([1, -1], [0, 0.5, 1, 1.5, 2, 3, 4, 6]).ravel()  # by code; code 8 is -0
BIAS = 127  # of the scale byte


def dequantise(blocks, scales, dtype):
    """Unpacks values [..., n] of blocks uint8 [..., n/32, 16] (low nibble first) and scales uint8 [..., n/32].

    Exact in float32 and bfloat16: table value * 2^(scale - 127). Beyond their range (scales 253 and more) it
    is inf, and results below 2^-126 (scales 0 and 1 only) are 0: XLA has no subnormal numbers.
    """
    codes = jnp.stack([blocks & 0xF, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = jnp.ldexp(jnp.asarray(VALUES, dtype)[codes], scales.astype(jnp.int32)[..., None] - BIAS)
    return values.reshape(*scales.shape[:-1], -1)
