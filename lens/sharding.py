"""Where arrays live: the mesh, the one table of parameter placements, and batch placement.

Nothing else in the project knows the mesh. Axes are `data` (batch rows) and `model` (kv heads, experts,
feed-forward width, vocabulary), in JAX's Explicit mode: a wrong placement is an error at trace
time, also on a 1x1 mesh.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lens.errors import LensError

ACT = P('data', None, None)  # every residual-stream tensor x_BxTxD

# regex over the end of a leaf path; first match wins, no match is an error.
# Axis 0 of a leaf under `blocks` is the layer.
RULES = (
    (r'blocks/attn/([qkv]_bias|sinks)$', P(None, 'model')),
    (r'blocks/attn/o_bias$', P()),
    (r'blocks/attn/q$', P(None, None, 'model', None, None)),
    (r'blocks/attn/[kv]$', P(None, None, 'model', None)),
    (r'blocks/attn/o$', P(None, 'model', None, None, None)),
    (r'blocks/mlp/(gate|up)$', P(None, None, 'model')),
    (r'blocks/mlp/(gate|up)_bias$', P(None, 'model')),
    (r'blocks/mlp/down$', P(None, 'model', None)),
    (r'blocks/mlp/down_bias$', P()),
    (r'blocks/moe/(gate_up|down)', P(None, 'model')),  # experts
    (r'blocks/moe/router', P()),
    (r'(^|/)embedding$', P('model', None)),
    (r'(^|/)head$', P(None, 'model')),
    (r'(^|/)positions$', P()),
    (r'norm/(scale|bias)$', P()),
    (r'adapters/', P()),
    (r'(maps|prompt|readout|special)_\w+$', P()),
    (r'(^|/)(\w*step|count)$', P()),
)


class MeshError(LensError):
    """The mesh does not fit the devices or the batch."""


def make_mesh(data: int, model: int) -> jax.sharding.Mesh:
    """The ('data', 'model') mesh over the first data*model devices; data = -1 takes all that remain."""
    devices = jax.devices()
    if data == -1:
        data = max(1, len(devices) // model)
    if data * model > len(devices) or min(data, model) < 1:
        raise MeshError(
            f'mesh.data={data} x mesh.model={model} needs {data * model} devices, but JAX sees '
            f'{len(devices)}: lower mesh.data or mesh.model.'
        )
    return jax.make_mesh(
        (data, model),
        ('data', 'model'),
        axis_types=(AxisType.Explicit,) * 2,
        devices=devices[: data * model],
    )


def out(spec: P) -> P | None:
    """`spec` for an `out_sharding=` argument, or None when no mesh is set (a notebook)."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def like(x: jax.Array) -> P | None:
    """Where `x` lives, for an `out_sharding=` argument; None when no mesh is set."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec


def reshard(x: jax.Array, spec: P) -> jax.Array:
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec)


def path(key_path) -> str:
    """'blocks/attn/q' for the key path of a leaf of a module or of a tree that holds one."""
    return jax.tree_util.keystr(key_path, simple=True, separator='/').removesuffix('/value')


def _spec(leaf_path: str, shape: tuple[int, ...], mesh) -> P:
    spec = next((spec for pattern, spec in RULES if re.search(pattern, leaf_path)), None)
    if spec is None:
        raise KeyError(f'no placement rule in sharding.RULES matches parameter {leaf_path!r}')
    # A dimension that the mesh axis does not divide is replicated. Query heads are stored as
    # (kv head, group), so all attention weights take the same decision.
    axes = (a if a is None or n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape, strict=False))
    return P(*axes)


def shardings(tree, mesh):
    """A NamedSharding for every array leaf of `tree`, by RULES."""
    return jax.tree_util.tree_map_with_path(lambda kp, x: NamedSharding(mesh, _spec(path(kp), x.shape, mesh)), tree)


def place(tree, mesh):
    """Host or device arrays put where RULES say."""
    return jax.device_put(tree, shardings(tree, mesh))


def put_batch(batch: dict[str, np.ndarray], mesh) -> dict[str, jax.Array]:
    """Host rows to devices, rows split over `data`."""
    return {k: jax.device_put(v, NamedSharding(mesh, P('data', *([None] * (v.ndim - 1))))) for k, v in batch.items()}


def check_divides(rows: int, name: str, mesh) -> None:
    """Raises MeshError when `rows` cannot be split evenly over the data axis."""
    n = mesh.shape['data']
    if rows % n:
        raise MeshError(f'{name}={rows} cannot be split over mesh.data={n}: use a multiple of {n} or change mesh.data.')
