"""The mixture of experts of gpt-oss: each token goes through `top_k` of `n_experts` gated MLPs.

On a mesh the experts are split over `model` where it divides them: every shard runs its own experts on the
tokens of its `data` row, and the shards' results are summed.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lens import sharding
from lens.errors import LensError
from lens.models import grouped, mxfp4
from lens.models.grouped import Picked
from lens.models.norm import normal, zeros

LIMIT = 7.0  # of the gate from above, of `up` on both sides
ALPHA = 1.702
# Up to so many tokens of a shard an accelerator multiplies by every expert: it reads all of their weights in any case,
# and multiplies about 220 rows by a number in the time that it takes to read it (H100, TPU v5e).
DENSE_TOKENS = 256


class Experts(NamedTuple):
    """The weights of the experts at hand; index 0 of the axis of two is the gate, 1 is `up`."""

    gate_up_Ex2xFxD: Picked
    gate_up_bias_Ex2xF: jax.Array
    down_ExFxD: Picked
    down_bias_ExD: jax.Array


def activate(gate_up_Nx2xF):
    """Gates the clipped float32 halves: [..., F]."""
    gate = jnp.minimum(gate_up_Nx2xF[..., 0, :], LIMIT)
    up = jnp.clip(gate_up_Nx2xF[..., 1, :], -LIMIT, LIMIT)
    return (up + 1) * gate * jax.nn.sigmoid(ALPHA * gate)


def _order(keys_A):
    """argsort, stable. jnp.argsort types its result as equal on all devices inside shard_map, which can
    drop sums from gradients without an error."""
    return jax.lax.sort((keys_A, jax.lax.iota(jnp.int32, keys_A.size)), num_keys=1)[1]


def _grouped(multiply, x_NxD, choice_NxC, weight_NxC, w: Experts):
    """The (token, choice) rows in order of expert, one product per group of rows; NxD in float32.

    multiply is grouped.dot or does what that does. Choices outside 0..E-1 belong to another shard; they come last,
    beyond all groups.
    """
    n_experts, f = w.gate_up_bias_Ex2xF.shape[::2]
    n, k = choice_NxC.shape
    expert_A = choice_NxC.reshape(-1)
    expert_A = jnp.where((expert_A >= 0) & (expert_A < n_experts), expert_A, n_experts)
    order_A = _order(expert_A)
    expert_A = expert_A[order_A]
    sizes_E = jnp.sum(expert_A[:, None] == jnp.arange(n_experts), axis=0, dtype=jnp.int32)
    here_Ax1 = (expert_A < n_experts)[:, None]
    expert_A = jnp.minimum(expert_A, n_experts - 1)

    def product(rows_AxI, w: Picked, out_first):
        # Rows beyond the groups are undefined in the product and in its gradient: masked on both sides.
        return jnp.where(here_Ax1, multiply(jnp.where(here_Ax1, rows_AxI, 0), w, sizes_E, out_first), 0)

    # A permutation, not a gather with repeats: its transpose is then deterministic on GPU too.
    rows_AxD = jnp.repeat(x_NxD, k, axis=0).at[order_A].get(unique_indices=True)
    own, stack, layer = w.gate_up_Ex2xFxD
    joined = Picked(own.reshape(n_experts, 2 * f, -1), stack.reshape(-1, n_experts, 2 * f, x_NxD.shape[1]), layer)
    gate_up = product(rows_AxD, joined, True).reshape(-1, 2, f)
    h_AxF = activate(gate_up.astype(jnp.float32) + w.gate_up_bias_Ex2xF[expert_A]).astype(x_NxD.dtype)
    y_AxD = product(h_AxF, w.down_ExFxD, False) + w.down_bias_ExD[expert_A]
    y_AxD = jnp.where(here_Ax1, y_AxD, 0).astype(x_NxD.dtype)
    y_NxCxD = y_AxD.at[_order(order_A)].get(unique_indices=True).reshape(n, k, -1)
    return jnp.einsum('nkd,nk->nd', y_NxCxD, weight_NxC, preferred_element_type=jnp.float32)


def _dense(x_NxD, choice_NxC, weight_NxC, w: Experts):
    """Every expert for every token; NxD in float32. Two plain products, whose weights are read as they are stored: the
    columns of all experts side by side, then the sum over all of their rows, which carry a token's weights."""
    n_experts = w.down_bias_ExD.shape[0]
    chosen_NxCxE = choice_NxC[..., None] == jnp.arange(n_experts)
    weight_NxE = jnp.sum(jnp.where(chosen_NxCxE, weight_NxC[..., None], 0), axis=1)
    with jax.named_scope(f'all_{n_experts}_experts'):  # for lens.flops
        gate_up = jnp.einsum('nd,ecfd->necf', x_NxD, w.gate_up_Ex2xFxD.own)
        h_NxExF = activate(gate_up.astype(jnp.float32) + w.gate_up_bias_Ex2xF) * weight_NxE[..., None]
        down_ExFxD = w.down_ExFxD.own
        y_NxD = jnp.einsum('nef,efd->nd', h_NxExF.astype(x_NxD.dtype), down_ExFxD, preferred_element_type=jnp.float32)
        return y_NxD + weight_NxE @ w.down_bias_ExD


def _ragged_dot(rows_AxI, w: Picked, sizes_E, out_first):
    return jax.lax.ragged_dot(rows_AxI, w.own.swapaxes(1, 2) if out_first else w.own, sizes_E)


def _auto(x_NxD, choice_NxC, weight_NxC, w: Experts):
    """Whatever is fastest on the platform for so many tokens."""
    kernel = {'gpu': 'triton', 'tpu': 'ragged'}.get(sharding.platform())
    name = 'dense' if kernel is None or x_NxD.shape[0] <= DENSE_TOKENS else kernel
    return IMPLEMENTATIONS[name](x_NxD, choice_NxC, weight_NxC, w)


# `experts` of the config -> how a shard runs its experts
IMPLEMENTATIONS = {
    'auto': _auto,
    'dense': _dense,
    'ragged': functools.partial(_grouped, _ragged_dot),
    'triton': functools.partial(_grouped, grouped.dot),
}


def slow(name: str, n_experts: int) -> str:
    """Says what is slow about an implementation where it runs, '' for nothing."""
    if name == 'ragged' and sharding.platform() == 'gpu':
        return f'subject.experts=ragged multiplies every token by all {n_experts} experts on a GPU; auto does not.'
    if name == 'triton' and sharding.platform() != 'gpu':
        return 'subject.experts=triton interprets its kernels where there is no GPU; auto does not.'
    return ''


def _planned_dot(rows_AxI, w: Picked, sizes_E, out_first):
    """One product of the shapes, FLOPs and operands of a grouped one, all of whose weights are in memory."""
    del sizes_E
    w_IxO = jax.lax.optimization_barrier(w.own)[0]
    return rows_AxI @ (w_IxO.T if out_first else w_IxO)


# Not for a user: for programs that are compiled and never run (lens.plan), where nothing has a kernel for groups and
# `dense` would count what no accelerator holds.
PLANNED = {'planned': functools.partial(_grouped, _planned_dot)}


class MoE(nnx.Module):
    """One layer of experts, in `dtype` or (c.packed) in MXFP4."""

    def __init__(self, c, *, rngs: nnx.Rngs, dtype):
        """Raises LensError when packed widths are no multiples of 32."""
        e, d, f = c.n_experts, c.d_model, c.d_ff

        def init_packed(shape, fan_in):
            """Random bytes of about the size that `normal` gives: a random code has an RMS of 2.9."""
            if shape[-1] % mxfp4.BLOCK:
                raise LensError(f'packed experts need d_model={d} and d_ff={f} to be multiples of {mxfp4.BLOCK}.')
            groups = (*shape[:-1], shape[-1] // mxfp4.BLOCK)
            scale = mxfp4.BIAS + round(math.log2(fan_in**-0.5 / 2.9))
            blocks = jax.random.bits(rngs.params(), (*groups, mxfp4.BLOCK // 2), jnp.uint8)
            scales = jax.random.randint(rngs.params(), groups, scale - 1, scale + 2).astype(jnp.uint8)
            return nnx.Param(blocks), nnx.Param(scales)

        down_fan_in = f * 2 * c.n_layers
        self.router_w = normal((d, e), d, rngs, dtype)
        self.router_bias = zeros(e, dtype)
        if c.packed:
            self.gate_up_blocks, self.gate_up_scales = init_packed((e, 2, f, d), d)
            self.down_blocks, self.down_scales = init_packed((e, d, f), down_fan_in)
        else:
            self.gate_up = normal((e, 2, f, d), d, rngs, dtype)
            self.down = normal((e, f, d), down_fan_in, rngs, dtype)
        self.gate_up_bias = zeros((e, 2, f), dtype)
        self.down_bias = zeros((e, d), dtype)

    def at_layer(self, i, dtype=None) -> 'MoE':
        """Picks layer i of a stack: matrices that are whole, and in the dtype of the products where it is given, stay in it
        for kernels that read them there."""
        layer = jax.tree.map(lambda w: w[i], self)
        for name in () if hasattr(self, 'gate_up_blocks') else ('gate_up', 'down'):
            stack = getattr(self, name)[...]
            if 'data' not in (sharding.like(stack) or ()) and stack.dtype == jnp.dtype(dtype or stack.dtype):
                setattr(layer, name, nnx.data(grouped.pick(getattr(layer, name)[...], stack, i)))
        return layer

    def route(self, x_BxTxD, top_k: int):
        """Chooses (experts, weights), each BxTxC: the largest logits and, in float32, the softmax over those alone."""
        logits = jnp.einsum('btd,de->bte', x_BxTxD, self.router_w[...], preferred_element_type=jnp.float32)
        # Rounded once, after the bias: in bfloat16 the rounding decides which experts tie.
        logits = (logits + self.router_bias[...].astype(jnp.float32)).astype(x_BxTxD.dtype)
        top, choice = sharding.top_k(logits, top_k)
        return choice, jax.nn.softmax(top.astype(jnp.float32), axis=-1)

    @jax.named_scope('mlp')
    def __call__(self, x_BxTxD, c):
        """BxTxD, like x."""
        choice, weight = self.route(x_BxTxD, c.top_k)
        stored = {k: v for k, v in vars(self).items() if k.startswith(('gate_up', 'down'))}
        stored = {k: v if isinstance(v, Picked) else v[...] for k, v in stored.items()}

        def run(x_BxTxD, choice_BxTxC, weight_BxTxC, stored):
            rows = (a.reshape(-1, a.shape[-1]) for a in (x_BxTxD, choice_BxTxC, weight_BxTxC))
            y_NxD = (IMPLEMENTATIONS | PLANNED)[c.experts](*rows, _unpack(stored, x_BxTxD.dtype))
            return y_NxD.reshape(x_BxTxD.shape)

        if jax.sharding.get_abstract_mesh().empty:
            return run(x_BxTxD, choice, weight, stored).astype(x_BxTxD.dtype)

        axis = sharding.like(stored['down_bias'])[0]  # 'model', or None where it does not divide the experts

        def run_shard(x_BxTxD, choice_BxTxC, weight_BxTxC, stored):
            # Whatever meets per-device values is typed so at the entrance: its gradient is summed there, and
            # kernels with gradients of their own need no knowledge of the mesh.
            stored = jax.lax.pcast(stored, sharding.ROW_AXES, to='varying')
            if axis is None:
                return run(x_BxTxD, choice_BxTxC, weight_BxTxC, stored).astype(x_BxTxD.dtype)
            x_BxTxD, choice_BxTxC, weight_BxTxC = jax.lax.pcast(
                (x_BxTxD, choice_BxTxC, weight_BxTxC), axis, to='varying'
            )
            first = jax.lax.axis_index(axis) * stored['down_bias'].shape[0]
            y_BxTxD = run(x_BxTxD, choice_BxTxC - first, weight_BxTxC, stored)
            return jax.lax.psum(y_BxTxD, axis).astype(x_BxTxD.dtype)

        of_stored = {
            k: Picked(sharding.P(axis), sharding.P(None, axis), sharding.P())
            if isinstance(v, Picked)
            else sharding.P(axis)
            for k, v in stored.items()
        }
        specs = (sharding.ACT, sharding.ACT, sharding.ACT, of_stored)
        return jax.shard_map(run_shard, in_specs=specs, out_specs=sharding.ACT)(x_BxTxD, choice, weight, stored)


def _unpack(stored: dict, dtype) -> Experts:
    """The weights as matrices in `dtype` and the biases in float32."""

    def picked(name) -> Picked:
        if f'{name}_blocks' in stored:
            w = mxfp4.dequantise(stored[f'{name}_blocks'], stored[f'{name}_scales'], dtype)
            return grouped.pick(w if name == 'gate_up' else jnp.swapaxes(w, 1, 2))
        w = stored[name]
        if isinstance(w, Picked) and w.own.dtype == dtype:
            return w
        return grouped.pick((w.own if isinstance(w, Picked) else w).astype(dtype))

    gate_up_bias, down_bias = (stored[name].astype(jnp.float32) for name in ('gate_up_bias', 'down_bias'))
    return Experts(picked('gate_up'), gate_up_bias, picked('down'), down_bias)
