"""Low-rank adapters on the block matrices: y = x W + (x A) B, B zero at the start.

Adapters are plain trees {'q': {'a', 'b'}, ...} stacked over layers and passed as a call argument,
so that the frozen base stays untouched. Which matrices have one is a regex over their names.
"""

import re

import jax
import jax.numpy as jnp

from lens import sharding
from lens.errors import LensError

# matrix name -> (leaf path under `blocks`, number of trailing weight axes that are outputs)
MATRICES = {
    'q': ('attn', 3),
    'k': ('attn', 2),
    'v': ('attn', 2),
    'o': ('attn', 1),
    'gate': ('mlp', 1),
    'up': ('mlp', 1),
    'down': ('mlp', 1),
}


def project(spec: str, x, w, adapters, name: str, out_spec=None):
    """einsum(spec, x, w) plus the adapter `name` when `adapters` has one.

    out_spec: where the result lives; needed where the contraction runs over a sharded axis.
    """
    out = sharding.out(out_spec) if out_spec is not None else None
    y = jnp.einsum(spec, x, w, out_sharding=out)
    if adapters is None or name not in adapters:
        return y
    a, b = (adapters[name][k].astype(x.dtype) for k in ('a', 'b'))
    x_axes, rest = spec.split(',')
    w_axes, y_axes = rest.split('->')
    inner = ''.join(c for c in w_axes if c not in y_axes)
    outer = ''.join(c for c in w_axes if c in y_axes)
    low = jnp.einsum(f'{x_axes},{inner}r->btr', x, a, out_sharding=sharding.out(sharding.ACT))
    return y + jnp.einsum(f'btr,r{outer}->{y_axes}', low, b, out_sharding=sharding.like(y))


def init_adapters(blocks, pattern: str, rank: int, alpha: float, key) -> dict:
    """Zero-effect adapters for every block matrix whose name fully matches `pattern`.

    blocks: the stacked blocks of the base (leaves [L, ...]). The scale alpha/rank is folded into A.
    Raises LensError when the pattern matches nothing.
    """
    names = [n for n in MATRICES if re.fullmatch(pattern, n)]
    if not names:
        raise LensError(f'lora.pattern={pattern!r} matches none of {", ".join(MATRICES)}')
    adapters = {}
    for name, k in zip(names, jax.random.split(key, len(names)), strict=True):
        group, n_out = MATRICES[name]
        w = getattr(getattr(blocks, group), name)[...]
        inner, outer = w.shape[1 : w.ndim - n_out], w.shape[w.ndim - n_out :]
        fan_in = 1
        for n in inner:
            fan_in *= n
        scale = alpha / rank * fan_in**-0.5
        adapters[name] = {
            'a': scale * jax.random.normal(k, (w.shape[0], *inner, rank), jnp.float32),
            'b': jnp.zeros((w.shape[0], rank, *outer), jnp.float32),
        }
    return adapters
