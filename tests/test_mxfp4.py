"""MXFP4 against a table and against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens.models import mxfp4

TABLE = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]  # not mxfp4.VALUES, on purpose
SCALES = [0, 1, 2, 100, 127, 252, 254]


def random_packed(shape):
    """Random bytes for values of `shape`."""
    rng = np.random.default_rng(0)
    groups = (*shape[:-1], shape[-1] // 32)
    return rng.integers(0, 256, (*groups, 16), np.uint8), rng.integers(100, 127, groups, np.uint8)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_every_code_in_either_nibble_at_every_scale(dtype):
    # One block per (scale, code): the low nibble holds `code`, the high one the code after it.
    codes = np.arange(16, dtype=np.uint8)
    after = (codes + 1) % 16
    blocks = np.broadcast_to((codes | after << 4)[None, :, None], (len(SCALES), 16, 16))
    scales = np.broadcast_to(np.array(SCALES, np.uint8)[:, None], (len(SCALES), 16))
    pairs = np.stack([np.array(TABLE)[codes], np.array(TABLE)[after]], -1)
    expected = np.ldexp(np.tile(pairs, (1, 16)), np.array(SCALES)[:, None, None] - 127)
    expected[np.abs(expected) < 2.0**-126] *= 0  # XLA flushes subnormals, keeping the sign
    expected[np.abs(expected) >= 2.0**128] *= np.inf

    dequantise = jax.jit(mxfp4.dequantise, static_argnums=2)
    got = dequantise(blocks[:, :, None], scales[:, :, None], dtype)
    assert got.dtype == dtype
    got = np.asarray(got).astype(np.float64)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_equals_transformers(dtype):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_packed((3, 10, 128))  # 3 experts, 10 outputs, 128 inputs
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=getattr(torch, dtype))
    ours = mxfp4.dequantise(blocks, scales, jnp.dtype(dtype))
    assert theirs.shape == (3, 128, 10) and ours.shape == (3, 10, 128)  # theirs: inputs before outputs
    np.testing.assert_array_equal(np.asarray(ours).swapaxes(1, 2).astype(np.float32), theirs.float().numpy())
