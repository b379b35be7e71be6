"""Gumbel noise and the id of the largest number, as JAX has them to the bit, in a form that a CPU runs fast.

XLA's CPU backend runs the rounds of threefry as a loop over whole arrays, and the reduction to an index number by number;
and it would put the noise into that reduction.
"""

import math

import jax
import jax.numpy as jnp

from lens import sharding

ROUNDS = ((13, 15, 26, 6), (17, 29, 16, 24))  # rotations of Threefry-2x32 (Salmon et al. 2011), 5 times 4 in turn
PARITY = 0x1BD11BDA
CHUNK = 128  # numbers that are reduced to their maximum before an index is looked for


def _threefry(key_2, x0, x1):
    """Threefry-2x32 with 20 rounds of the counters (x0, x1), uint32."""
    keys = key_2[0], key_2[1], key_2[0] ^ key_2[1] ^ jnp.uint32(PARITY)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(5):
        for r in ROUNDS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << r) | (x1 >> (32 - r)))
        x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def gumbel(key, shape: tuple[int, ...], spec=None):
    """Draws what jax.random.gumbel(key, shape, jnp.float32) draws, placed as `spec` says.

    Keys of another kind than threefry2x32 go to JAX. At most 2^32 numbers.
    """
    if str(jax.random.key_impl(key)) != 'threefry2x32':
        return jax.random.gumbel(key, shape, jnp.float32, out_sharding=spec)
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    count = sum(jax.lax.broadcasted_iota(jnp.uint32, shape, i, out_sharding=spec) * n for i, n in enumerate(steps))
    high, low = _threefry(jax.random.key_data(key), jnp.zeros_like(count), count)
    mantissa = ((high ^ low) >> 9) | jnp.uint32(0x3F800000)
    tiny = jnp.finfo(jnp.float32).tiny
    u = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1
    return -jnp.log(-jnp.log(jnp.maximum(tiny, u * (1 - tiny) + tiny)))


def argmax(x_NxV):
    """Gives jnp.argmax(x_NxV, axis=-1) as int32, of numbers none of which is NaN."""
    if sharding.platform() != 'cpu':
        return jnp.argmax(x_NxV, axis=-1).astype(jnp.int32)
    x = jax.lax.optimization_barrier(x_NxV)  # what makes x is not to run inside the reductions
    n, v = x.shape
    x = jnp.pad(x, ((0, 0), (0, -v % CHUNK)), constant_values=-jnp.inf).reshape(n, -1, CHUNK)
    first = jnp.argmax(jnp.max(x, axis=-1), axis=-1)
    inside = jnp.argmax(jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0], axis=-1)
    return (first * CHUNK + inside).astype(jnp.int32)
