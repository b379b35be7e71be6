"""Are arrays equal up to rounding: tolerances from the dtype and the spread of what is compared, nothing absolute."""

import jax
import jax.numpy as jnp
import numpy as np


def close(got, want, dtype=np.float32, steps: int = 256):
    """Asserts that each leaf is off by at most `steps` roundings of `dtype` at the spread of the wanted leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(want)
    for (where, y), x in zip(leaves, jax.tree.leaves(got), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        spread = np.ptp(y) or np.abs(y).max()
        tolerance = steps * float(jnp.finfo(dtype).eps) * spread
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(where))


def differs(got, other, share: float = 0.01):
    """Asserts that two arrays are apart by more than `share` of the spread of the second: no rounding does that."""
    got, other = np.asarray(got, np.float64), np.asarray(other, np.float64)
    assert np.abs(got - other).max() > share * np.ptp(other)


def size(tree) -> float:
    """Sum of the absolute values of all leaves."""
    return sum(float(np.abs(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(tree))
