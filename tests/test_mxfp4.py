import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens.models import mxfp4

TABLE = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]  # not mxfp4.VALUES, on purpose
SCALES = [0, 1, 2, 100, 127, 252, 254]


def random_packed(shape, scales=(100, 127), seed=0):
    """Random bytes for values of `shape`."""
    rng = np.random.default_rng(seed)
    groups = (*shape[:-1], shape[-1] // 32)
    return rng.integers(0, 256, (*groups, 16), np.uint8), rng.integers(*scales, groups, np.uint8)


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


def test_packing_what_was_unpacked_changes_nothing():
    blocks, scales = random_packed((5, 3, 96), scales=(4, 250))
    x = np.asarray(mxfp4.dequantise(blocks, scales, jnp.float32))
    again = mxfp4.pack(x)
    assert [a.dtype for a in again] == [np.uint8] * 2
    assert [a.shape for a in again] == [(5, 3, 3, 16), (5, 3, 3)]
    y = np.asarray(mxfp4.dequantise(*again, jnp.float32))
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(np.signbit(y), np.signbit(x))


def test_packing_takes_the_nearest_value():
    x = np.zeros(32)
    x[:9] = [6.0, 0.2, 0.3, -1.2, -1.3, 2.4, 2.6, 4.9, -5.1]
    y = np.asarray(mxfp4.dequantise(*mxfp4.pack(x), jnp.float32))
    np.testing.assert_array_equal(y[:9], [6.0, 0, 0.5, -1, -1.5, 2, 3, 4, -6])
    x[0] = 7.5  # the scale still fits 4..8, the value does not
    assert mxfp4.dequantise(*mxfp4.pack(x), jnp.float32)[0] == 6


def test_packing_works_on_each_block_alone_and_on_zeros():
    x = np.stack([np.full(32, 2.0**-90), np.full(32, -3 * 2.0**80), np.zeros(32)]).reshape(96)
    np.testing.assert_array_equal(mxfp4.dequantise(*mxfp4.pack(x), jnp.float32), x)


@pytest.mark.parametrize('x', [np.ones((2, 48)), np.full(32, np.nan), np.full(32, np.inf)])
def test_what_cannot_be_packed_is_an_error(x):
    with pytest.raises(ValueError, match='multiples of 32'):
        mxfp4.pack(x)
