"""Comparisons that hold on any machine: errors are measured in roundings of the largest entry of what is expected."""

import jax
import numpy as np


def close(got, want, roundings: float = 500, name: str = '') -> None:
    """|got - want| <= roundings * eps * max |want| everywhere; eps of the coarser of the two float types."""
    dtypes = [
        x.dtype for x in (np.asarray(got), np.asarray(want)) if x.dtype.name in ('bfloat16', 'float16', 'float32')
    ]
    eps = {'bfloat16': 2.0**-8, 'float16': 2.0**-11, 'float32': 2.0**-24}
    rounding = max((eps[d.name] for d in dtypes), default=2.0**-24)
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f'{name} {got.shape} instead of {want.shape}'
    size = np.abs(want).max(initial=0)
    off = np.abs(got - want).max(initial=0)
    assert off <= roundings * rounding * size, f'{name} is off by {off / max(size, 1e-300):.1e} of {size:.3g}'


def trees_close(got, want, roundings: float = 5000) -> None:
    """`close`, leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (kp, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        close(x, y, roundings, jax.tree_util.keystr(kp))


def size(tree) -> float:
    """Sum of the absolute values of all leaves."""
    return sum(float(np.abs(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(tree))
