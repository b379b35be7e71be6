"""Low-rank adapters on the block matrices: y = x W + (x A) B, B zero at the start.

Adapters are plain trees {'q': {'a', 'b'}, ...} stacked over layers and passed as a call argument,
so that the frozen base stays untouched. Which matrices have one is a regex over their names.
"""

import math
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


def project(x, w, adapters, name: str, out_spec=None, bias=None):
    """Computes x W plus `bias`, plus the adapter `name` when `adapters` has one: BxTxO.

    x: BxTxI; I and O stand for any number of axes, those of w IxO. Input and output are one axis each in the product, which
    no kernel has to transpose then. out_spec: where the result lives; needed where a contracted axis is sharded.
    """
    n, x = x.ndim - 2, x.reshape(*x.shape[:2], -1)
    out = sharding.out(out_spec) if out_spec is not None else None
    y = jnp.einsum('bti,io->bto', x, w[...].reshape(x.shape[-1], -1), out_sharding=out)
    if adapters is not None and name in adapters:
        a, b = (adapters[name][k].astype(x.dtype) for k in ('a', 'b'))
        # split as the matrix is: a gradient is made where its part of the activations is, and gathered itself
        of_w = sharding.like(w[...]) or (None,) * w.ndim
        a = sharding.reshard(a, sharding.P(*of_w[:n], None)).reshape(x.shape[-1], -1)
        b = sharding.reshard(b, sharding.P(None, *of_w[n:])).reshape(len(b), -1)
        low = jnp.einsum('bti,ir->btr', x, a, out_sharding=sharding.out(sharding.ACT))
        y = y + jnp.einsum('btr,ro->bto', low, b, out_sharding=sharding.like(y))
    else:
        (y,) = apart(y)
    y = y.reshape(*y.shape[:2], *w.shape[n:])
    return y if bias is None else y + bias[...]


def apart(*xs_BxTxI):
    """Returns them so that XLA for a GPU puts no product of one token together with others of its input or with what is added to
    it: such a product copies its matrix out of the stack of all layers first, at every token (BUILD_NOTES.md, "Fast")."""
    one = sharding.platform() == 'gpu' and xs_BxTxI[0].shape[1] == 1
    return jax.lax.optimization_barrier(xs_BxTxI) if one else xs_BxTxI


def init_adapters(blocks, n_layers: int, pattern: str, rank: int, alpha: float, key, *, rs: bool = False) -> dict:
    """Makes zero-effect adapters for the first `n_layers` blocks, on every matrix whose name fully matches `pattern`.

    blocks: the stacked blocks of the base (leaves [L, ...]). The scale alpha/rank, or alpha/sqrt(rank) with `rs`
    (rsLoRA, Kalajdzievski 2023), is folded into A.
    Raises LensError when the pattern matches nothing that the model has; experts take no adapter.
    """
    have = [n for n, (group, _) in MATRICES.items() if getattr(getattr(blocks, group), n, None) is not None]
    names = [n for n in have if re.fullmatch(pattern, n)]
    if not names:
        raise LensError(f'lora.pattern={pattern!r} matches none of the matrices of this model: {", ".join(have)}.')
    adapters = {}
    for name, k in zip(names, jax.random.split(key, len(names)), strict=True):
        group, n_out = MATRICES[name]
        w = getattr(getattr(blocks, group), name)[...]
        inner, outer = w.shape[1 : w.ndim - n_out], w.shape[w.ndim - n_out :]
        scale = alpha / (rank**0.5 if rs else rank) * math.prod(inner) ** -0.5
        adapters[name] = {
            'a': scale * jax.random.normal(k, (n_layers, *inner, rank), jnp.float32),
            'b': jnp.zeros((n_layers, rank, *outer), jnp.float32),
        }
    return adapters


@jax.jit
def _merged(w, a, b):
    def layer(i):
        low = jnp.tensordot(a[i], b[i], 1, precision='highest', out_sharding=sharding.like(w[i]))
        return (w[i].astype(jnp.float32) + low).astype(w.dtype)

    return jax.lax.map(layer, jnp.arange(len(a)))


def merge(model, adapters: dict):
    """Puts W + A B in place of every adapted matrix: a Transformer that needs no adapters any more.

    The sum is made in float32 and rounded to the dtype of W. All other leaves are those of `model`, whose
    stacks may be longer than its config.n_layers. Raises ValueError unless each of its blocks is adapted.
    """
    adapted = {f'blocks/{MATRICES[name][0]}/{name}': ab for name, ab in adapters.items()}
    for path, ab in adapted.items():
        if len(ab['a']) != model.config.n_layers:
            raise ValueError(f'adapters of {path} have {len(ab["a"])} blocks, the model has {model.config.n_layers}')

    def leaf(kp, w):
        ab = adapted.get(sharding.path(kp))
        return w if ab is None else _merged(w, ab['a'], ab['b'])

    return jax.tree_util.tree_map_with_path(leaf, model)
