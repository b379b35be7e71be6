"""MXFP4: 4-bit floats, 32 of which share one power of two (OCP Microscaling Formats, 1.0)."""

import jax.numpy as jnp
import numpy as np

BLOCK = 32  # values per scale
POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([POSITIVE, -POSITIVE])  # by code; code 8 is -0
BIAS = 127  # of the scale byte


def dequantise(blocks, scales, dtype):
    """Values [..., n] of blocks uint8 [..., n/32, 16] (low nibble first) and scales uint8 [..., n/32].

    Exact in float32 and bfloat16: table value * 2^(scale - 127). Beyond their range (scales 253 and more) it
    is inf, and results below 2^-126 (scales 0 and 1 only) are 0: XLA has no subnormal numbers.
    """
    codes = jnp.stack([blocks & 0xF, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = jnp.ldexp(jnp.asarray(VALUES, dtype)[codes], scales.astype(jnp.int32)[..., None] - BIAS)
    return values.reshape(*scales.shape[:-1], -1)


def pack(x) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, scales) nearest to x [..., n] (numpy); exact for whatever MXFP4 can represent.

    The scale of a block puts its largest value in 4..8; what then lies beyond 6 becomes 6. Raises ValueError
    when n is no multiple of 32 or a value is not finite.
    """
    x = np.asarray(x, np.float64)
    if x.shape[-1] % BLOCK or not np.isfinite(x).all():
        raise ValueError(f'MXFP4 needs finite values and a last axis in multiples of {BLOCK}, not shape {x.shape}')
    x = x.reshape(*x.shape[:-1], -1, BLOCK)
    exponents = np.frexp(np.abs(x).max(axis=-1))[1] - 3  # the largest is in 2^(e+2)..2^(e+3)
    scales = np.clip(exponents + BIAS, 0, 254)
    magnitudes = np.abs(x) * np.exp2(BIAS - scales)[..., None]
    codes = np.searchsorted((POSITIVE[1:] + POSITIVE[:-1]) / 2, magnitudes) + 8 * np.signbit(x)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8), scales.astype(np.uint8)
