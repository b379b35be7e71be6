"""Where arrays live: the mesh, the one table of parameter placements, and batch placement.

Nothing else in the project knows the mesh. Axes are `replica` and `data`, which both split the rows of a batch, and
`model` (kv heads, experts, feed-forward width, vocabulary), in JAX's Explicit mode: a wrong placement is an error at
trace time, also on a 1x1x1 mesh. A parameter may besides be split over `data`; it is then put together where it
is used, a layer at a time (fully sharded data parallelism), and stays whole along `replica`: hosts apart from
each other hold a copy each, and gather among neighbours only.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lens.errors import LensError

AXES = ('replica', 'data', 'model')
ROW_AXES = ('replica', 'data')
# Trained leaves above so many elements, and their moments, are split over `data`: below, the memory is not worth a
# collective.
SPLIT_ABOVE = 1 << 24


def rows(ndim: int) -> P:
    """Returns the placement of an array whose first axis is the batch."""
    return P(ROW_AXES, *[None] * (ndim - 1))


ACT = rows(3)  # every residual-stream tensor x_BxTxD

# regex over the end of a leaf path; first match wins, no match is an error.
# Axis 0 of a leaf under `blocks` is the layer. `data` counts where the leaf is split over it.
RULES = (
    (r'blocks/attn/([qkv]_bias|sinks)$', P(None, 'model')),
    (r'blocks/attn/o_bias$', P()),
    (r'blocks/attn/[qkv]$', P(None, 'data', 'model')),
    (r'blocks/attn/o$', P(None, 'model', None, None, 'data')),
    (r'blocks/mlp/(gate|up)$', P(None, 'data', 'model')),
    (r'blocks/mlp/(gate|up)_bias$', P(None, 'model')),
    (r'blocks/mlp/down$', P(None, 'model', 'data')),
    (r'blocks/mlp/down_bias$', P()),
    (r'blocks/moe/(gate_up|down)_bias$', P(None, 'model')),  # experts
    (r'blocks/moe/gate_up', P(None, 'model', None, 'data')),
    (r'blocks/moe/down', P(None, 'model', 'data')),
    (r'blocks/moe/router', P()),
    (r'(^|/)embedding$', P('model', 'data')),
    (r'(^|/)head$', P('data', 'model')),
    (r'(^|/)positions$', P()),
    (r'norm/(scale|bias)$', P()),
    (r'adapters/\w+/a$', P(None, 'data')),
    (r'adapters/\w+/b$', P(None, None, 'data')),
    (r'maps_w$', P(None, 'data')),
    (r'readout_w$', P('data')),
    (r'(maps|prompt|readout|special)_\w+$', P()),
    (r'(^|/)(\w*step|count)$', P()),
)


def make_mesh(data: int, model: int, replica: int = 1, devices=None) -> jax.sharding.Mesh:
    """Returns a mesh over the first replica*data*model of `devices`, or of all; data = -1 takes all that remain.

    Raises LensError when there are too few, or when a process of several would be left without work.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = max(1, len(devices) // (model * replica))
    sizes, n = f'mesh.replica={replica} x mesh.data={data} x mesh.model={model}', replica * data * model
    if n > len(devices) or min(replica, data, model) < 1:
        raise LensError(
            f'{sizes} needs {n} devices, but JAX sees {len(devices)}: lower mesh.data, mesh.model or mesh.replica.'
        )
    if jax.process_count() > 1 and n < len(devices):
        raise LensError(
            f'{sizes} needs {n} devices, but the {jax.process_count()} processes have {len(devices)}: use all of them, '
            'e.g. with mesh.data=-1.'
        )
    return jax.make_mesh((replica, data, model), AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices[:n])


def device():
    """Returns what the program that is traced runs on, with platform and device_kind: devices of the mesh, which may be
    elsewhere when it is only compiled, or the first of this machine."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def platform() -> str:
    """Returns 'cpu', 'gpu' or 'tpu'."""
    return device().platform


def row_count(mesh) -> int:
    """Returns over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[a] for a in ROW_AXES)


def shards(*axes: str) -> int:
    """Returns over how many devices of the mesh that is set these axes split an array; 1 when none is."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.get(a, 1) for a in axes)


def out(spec: P) -> P | None:
    """Returns `spec` for an `out_sharding=` argument, or None when no mesh is set (a notebook)."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def like(x: jax.Array) -> P | None:
    """Returns where `x` lives, for an `out_sharding=` argument; None when no mesh is set."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec


def reshard(x: jax.Array, spec: P) -> jax.Array:
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec)


def path(key_path) -> str:
    """Returns 'blocks/attn/q' for the key path of a leaf of a module or of a tree that holds one."""
    return jax.tree_util.keystr(key_path, simple=True, separator='/').removesuffix('/value')


def top_k(x, k: int):
    """Returns (values, indices) of the k largest along the last axis, row by row where the rows live: the partitioner
    gathers them first."""

    def local(x):
        return tuple(jax.lax.top_k(x, k))

    if jax.sharding.get_abstract_mesh().empty:
        return local(x)
    spec = rows(x.ndim)
    return jax.shard_map(local, in_specs=spec, out_specs=(spec, spec))(reshard(x, spec))


def gathered(tree):
    """Makes leaves that are split over `data` whole along it; what their gradient adds up to is split again."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def whole(x):
        spec = jax.typeof(x).sharding.spec
        return jax.sharding.reshard(x, P(*(None if a == 'data' else a for a in spec))) if 'data' in spec else x

    return jax.tree.map(whole, tree)


def _spec(leaf_path: str, shape: tuple[int, ...], mesh, split_above: float) -> P:
    spec = next((spec for pattern, spec in RULES if re.search(pattern, leaf_path)), None)
    if spec is None:
        raise KeyError(f'no placement rule in sharding.RULES matches parameter {leaf_path!r}')
    off = () if math.prod(shape) > split_above else ('data',)
    # A dimension that the mesh axis does not divide is replicated. Query heads are stored as
    # (kv head, group), so all attention weights take the same decision.
    axes = (None if a is None or a in off or n % mesh.shape[a] else a for a, n in zip(spec, shape, strict=False))
    return P(*axes)


def shardings(tree, mesh, split_above: float = math.inf):
    """Returns a NamedSharding for every array leaf of `tree`, by RULES; split over `data` above so many elements."""
    return jax.tree_util.tree_map_with_path(
        lambda kp, x: NamedSharding(mesh, _spec(path(kp), x.shape, mesh, split_above)), tree
    )


def with_placement(tree, mesh, split_above: float):
    """Returns ShapeDtypeStructs of `tree` that carry their placement, as shardings gives it."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh, split_above)
    )


def put(x: np.ndarray, place) -> jax.Array:
    """Puts a host array, the same on every process, on devices: each receives its part."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])


def place(tree, mesh, split_above: float = math.inf):
    """Puts host arrays, or arrays of this process's devices, where RULES say."""
    return jax.tree.map(put, tree, shardings(tree, mesh, split_above))


def local_rows(mesh, n: int) -> np.ndarray:
    """Returns which of a batch's n rows this process's devices hold, ascending."""
    parts = NamedSharding(mesh, rows(1)).addressable_devices_indices_map((n,)).values()
    return np.unique(np.concatenate([np.arange(n)[i] for i in parts]))


def put_batch(batch: dict[str, np.ndarray], mesh, of: int | None = None) -> dict[str, jax.Array]:
    """Puts host rows on devices, split over ROW_AXES.

    of: rows of the whole batch, where `batch` has local_rows(mesh, of) alone; None where it has all.
    """
    n = of or len(next(iter(batch.values())))
    mine = np.arange(n) if of is None else local_rows(mesh, n)

    def put(x):
        x = np.asarray(x)

        def part(index):
            return x[np.searchsorted(mine, np.arange(n)[index[0]])]

        return jax.make_array_from_callback((n, *x.shape[1:]), NamedSharding(mesh, rows(x.ndim)), part)

    return {k: put(v) for k, v in batch.items()}


def take(x_BxS, at_BxP):
    """Returns the values of each row at its own places, BxP, placed as rows are. jnp.take_along_axis refuses to place one value
    of one row."""
    return jax.vmap(lambda row, at: row[at])(*(reshard(x, rows(2)) for x in (x_BxS, at_BxP)))


def slices(tree, n: int):
    """Cuts arrays Nx… of rows into n parts, n x N/n x …. Each part has its share of the rows of every device, so that
    nothing moves. Scalars come n times. Each device must have a multiple of n rows."""

    def cut(x):
        if not x.ndim:
            return jnp.broadcast_to(x, n)
        shape, spec = x.shape[1:], rows(x.ndim)
        x = reshard(x, spec).reshape(shards(*ROW_AXES), n, -1, *shape, out_sharding=out(rows(len(shape) + 3)))
        return x.swapaxes(0, 1).reshape(n, -1, *shape, out_sharding=out(P(None, *spec)))

    return jax.tree.map(cut, tree)


def joined(x: jax.Array) -> jax.Array:
    """Puts the n parts n x N/n x … of `slices` together again, Nx…."""
    shape, devices = x.shape[2:], shards(*ROW_AXES)
    x = x.reshape(len(x), devices, -1, *shape, out_sharding=out(P(None, *rows(len(shape) + 2))))
    return x.swapaxes(0, 1).reshape(-1, *shape, out_sharding=out(rows(len(shape) + 1)))


def fetch(tree):
    """Returns the arrays on the host, whole on every process. All processes must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: np.asarray(x) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True), tree
    )


def check_divides(count: int, name: str, mesh) -> None:
    """Raises LensError when `count` rows cannot be split evenly over the mesh."""
    n = row_count(mesh)
    if count % n:
        raise LensError(
            f'{name}={count} cannot be split over mesh.replica x mesh.data = {n} devices: use a multiple of {n} or '
            'change the mesh.'
        )
