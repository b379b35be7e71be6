"""Products of groups of rows, each group with a matrix of its own, as kernels for GPUs in Triton (by JAX's Pallas).

XLA has no such kernel for GPUs that works everywhere: it multiplies every row by every matrix. A group's rows are cut
into tiles, a tile is multiplied by its group's matrix alone, and that is read from the stack of all layers, of which
XLA would copy a layer first. On other devices the kernels are interpreted, for tests.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lens import sharding

ROWS, FEW_ROWS = 128, 64  # of a tile; the latter where groups have fewer than MANY rows each
MANY = 256
COLUMNS, INNER = 128, 64
WARPS, STAGES = 8, 3  # 96 KB of shared memory: two tiles at a time on one processor of an H100


class Picked(NamedTuple):
    """The matrices of one layer, ExOxI or ExIxO, and where they are stored: in a stack of layers, at `layer`.

    A kernel reads the stack, so that nothing takes the layer out of it; a gradient is that of `own`.
    """

    own: jax.Array
    stack: jax.Array
    layer: jax.Array


def pick(own: jax.Array, stack: jax.Array | None = None, layer=0) -> Picked:
    """Makes a Picked of stack[layer], `own`, or (without a stack) of a layer that is in none."""
    return Picked(own, jax.lax.stop_gradient(own[None] if stack is None else stack), jnp.asarray(layer, jnp.int32))


def dot(rows_AxI: jax.Array, w: Picked, sizes_E: jax.Array, out_first: bool) -> jax.Array:
    """Multiplies AxO: the first sizes_E[0] rows by the first matrix of a layer, the next sizes_E[1] by its second, ...

    out_first: the matrices are OxI, not IxO. Rows beyond the groups are undefined in the product and in its gradient.
    """
    return _dot(rows_AxI, *w, sizes_E, out_first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _dot(rows_AxI, own, stack, layer, sizes_E, out_first):
    del own
    return _product(rows_AxI, stack, layer, sizes_E, out_first)


def _forward(rows_AxI, own, stack, layer, sizes_E, out_first):
    return _dot(rows_AxI, own, stack, layer, sizes_E, out_first), (rows_AxI, stack, layer, sizes_E)


def _backward(out_first, residuals, g_AxO):
    rows_AxI, stack, layer, sizes_E = residuals
    d_rows = _product(g_AxO, stack, layer, sizes_E, not out_first)
    pair = (g_AxO, rows_AxI) if out_first else (rows_AxI, g_AxO)
    return d_rows, _of_matrices(*pair, sizes_E), None, None, None


_dot.defvjp(_forward, _backward)


def _call(kernel, out, flops: int, grid: tuple[int, ...], name: str):
    """A kernel of Triton. out: shape, dtype and what they vary over, of what the kernel writes."""
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=0, transcendentals=0),
        interpret=sharding.platform() != 'gpu',
        name=name,
    )


def _tiles(sizes_E, n_rows: int, size: int):
    """Cuts every group into tiles of `size` rows: (group, first row, end of the group) of each; 0 rows where unused."""
    per_E = pl.cdiv(sizes_E, size)
    last_E, ends_E = jnp.cumsum(per_E), jnp.cumsum(sizes_E)
    tile = jnp.arange(pl.cdiv(n_rows, size) + sizes_E.size - 1)
    group = jnp.sum(tile[:, None] >= last_E, axis=1, dtype=jnp.int32)
    used, group = group < sizes_E.size, jnp.minimum(group, sizes_E.size - 1)
    first = (ends_E - sizes_E)[group] + size * (tile - (last_E - per_E)[group])
    return group, first.astype(jnp.int32), jnp.where(used, ends_E[group], 0).astype(jnp.int32)


def _inside(start, size: int, end):
    return start + jnp.arange(size) < end


def _product(x_AxI, stack, layer, sizes_E, out_first):
    (n_rows, inner), n_out = x_AxI.shape, stack.shape[2 if out_first else 3]
    size = ROWS if n_rows >= MANY * sizes_E.size else FEW_ROWS
    tiles = _tiles(sizes_E, n_rows, size)

    def kernel(layer_ref, group_ref, first_ref, end_ref, x_ref, w_ref, y_ref):
        column, tile = COLUMNS * pl.program_id(0), pl.program_id(1)
        first, end = first_ref[tile], end_ref[tile]
        in_rows, in_columns = _inside(first, size, end), _inside(column, COLUMNS, n_out)
        layer, group = layer_ref[0], group_ref[tile]

        def step(i, sum_):
            at, columns = pl.ds(INNER * i, INNER), pl.ds(column, COLUMNS)
            in_inner = _inside(INNER * i, INNER, inner)
            x = triton.load(x_ref.at[pl.ds(first, size), at], mask=in_rows[:, None] & in_inner, other=0)
            if out_first:
                w = triton.load(w_ref.at[layer, group, columns, at], mask=in_columns[:, None] & in_inner, other=0)
            else:
                w = triton.load(w_ref.at[layer, group, at, columns], mask=in_inner[:, None] & in_columns, other=0)
            return sum_ + jnp.dot(x, w.T if out_first else w, preferred_element_type=jnp.float32)

        @pl.when(first < end)
        def _():
            y = jax.lax.fori_loop(0, pl.cdiv(inner, INNER), step, jnp.zeros((size, COLUMNS), jnp.float32))
            at = y_ref.at[pl.ds(first, size), pl.ds(column, COLUMNS)]
            triton.store(at, y.astype(y_ref.dtype), mask=in_rows[:, None] & in_columns)

    out = jax.eval_shape(lambda x, w: x @ (w[0, 0].T if out_first else w[0, 0]), x_AxI, stack)
    flops = 2 * n_rows * inner * n_out
    grid = pl.cdiv(n_out, COLUMNS), tiles[0].size  # columns first: a tile's rows are read once
    return _call(kernel, out, flops, grid, 'grouped')(layer[None], *tiles, x_AxI, stack)


@jax.jit  # where nothing reads it, as with frozen weights, JAX drops the call of a program, but never one of a kernel
def _of_matrices(a_AxM, b_AxN, sizes_E):
    """Multiplies ExMxN: of each group, its rows of `a`, transposed, by those of `b`."""
    (n_rows, m), n = a_AxM.shape, b_AxN.shape[1]
    ends_E = jnp.cumsum(sizes_E)

    def kernel(start_ref, end_ref, a_ref, b_ref, w_ref):
        group, row, column = pl.program_id(2), COLUMNS * pl.program_id(1), COLUMNS * pl.program_id(0)
        start, end = start_ref[group], end_ref[group]
        in_m, in_n = _inside(row, COLUMNS, m), _inside(column, COLUMNS, n)

        def step(i, sum_):
            first = start + INNER * i
            inside, at = _inside(first, INNER, end)[:, None], pl.ds(first, INNER)
            a = triton.load(a_ref.at[at, pl.ds(row, COLUMNS)], mask=inside & in_m, other=0)
            b = triton.load(b_ref.at[at, pl.ds(column, COLUMNS)], mask=inside & in_n, other=0)
            return sum_ + jnp.dot(a.T, b, preferred_element_type=jnp.float32)

        w = jax.lax.fori_loop(0, pl.cdiv(end - start, INNER), step, jnp.zeros((COLUMNS, COLUMNS), jnp.float32))
        at = w_ref.at[group, pl.ds(row, COLUMNS), pl.ds(column, COLUMNS)]
        triton.store(at, w.astype(w_ref.dtype), mask=in_m[:, None] & in_n)

    out = jax.eval_shape(lambda a, b, s: jnp.zeros_like(s, a.dtype)[:, None, None] * (a.T @ b), a_AxM, b_AxN, sizes_E)
    grid = pl.cdiv(n, COLUMNS), pl.cdiv(m, COLUMNS), sizes_E.size
    return _call(kernel, out, 2 * n_rows * m * n, grid, 'grouped_gradient')(
        (ends_E - sizes_E).astype(jnp.int32), ends_E.astype(jnp.int32), a_AxM, b_AxN
    )
