"""Flash attention of long texts on an NVIDIA GPU, by cuDNN: causal, grouped queries, static windows, sinks.

cuDNN knows no sinks, but the log-sum-exp of the scores, lse, is all that they need: o * sigmoid(lse - s) is the result
with a sink s, logaddexp(lse, s) its log-sum-exp, and the backward kernel that is given these two gives the gradients.
XLA's kernels are called by name: jax.nn.dot_product_attention rounds lse to bfloat16, drops its gradient, and asks the
devices at hand for what they can, while a program may be compiled for devices that are elsewhere.
"""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lens import sharding

NAME = 'mixed'  # what policies of rematerialisation know the result by
# Shorter texts stay with XLA: there is little to win, and cuDNN's gradients differ in the last bit from run to run.
LONG = 512
WIDEST = 128  # of a head, on every GPU that has the kernels
FORWARD, BACKWARD = '__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'


def _product(left: int, right: int, left_heads: int) -> dict:
    """Dimension numbers of a batched product; right operands are BxTxNxh, left ones that or scores BxNxTxT."""
    axes = {'lhs_contracting': [left], 'rhs_contracting': [right], 'lhs_batch': [0, left_heads], 'rhs_batch': [0, 2]}
    return {f'{k}_dimensions': [str(i) for i in v] for k, v in axes.items()}


# What XLA asks to be told of each kernel. Scores q k and their gradient do v; o, dq: scores times k or v; dk, dv.
SCORES, MIXED, TRANSPOSED = _product(3, 3, 2), _product(3, 1, 1), _product(2, 1, 1)
PRODUCTS = {
    FORWARD: {'bmm1': SCORES, 'bmm2': MIXED},
    BACKWARD: {
        'bmm1_grad_gemm1': TRANSPOSED,
        'bmm1_grad_gemm2': MIXED,
        'bmm2_grad_gemm1': TRANSPOSED,
        'bmm2_grad_gemm2': SCORES,
    },
}


def _call(kernel: str, results, scale: float, window: int, *operands):
    """Runs a kernel. results: ShapeDtypeStructs, of BxTxNxh arrays or of what is no larger than BxNxT."""
    b, t, n, _ = operands[0].shape
    how = {
        'algorithm': {
            'algo_id': '0',
            'math_type': 'TENSOR_OP_MATH',
            'tuning_knobs': {'17': '1', '24': '0'},
            'is_cudnn_frontend': True,
            'workspace_size': '0',
        },
        'fmha_scale': scale,
        'intermediate_tensor_shape': {
            'element_type': 'BF16',
            'dimensions': [str(i) for i in (b, n, t, t)],
            'tuple_shapes': [],
            'layout': {'minor_to_major': ['3', '2', '1', '0']},
            'is_dynamic_dimension': [False] * 4,
        },
        'is_flash_attention': True,
        'mask_type': 'CAUSAL',  # a window without it would look ahead
        'sliding_window_length': window,  # itself included, as in TransformerConfig; 0 = all
        'max_seg_per_batch': 1,
        'is_paged_attention': False,
        'dropout_rate': 0.0,
    }
    how |= {f'{k}_dot_dimension_numbers': v for k, v in PRODUCTS[kernel].items()}
    call = jax.ffi.ffi_call(
        kernel,
        [*results, jax.ShapeDtypeStruct((0,), jnp.uint8)],  # workspace
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({'operation_queue_id': '0', 'cudnn_fmha_backend_config': how}),
        output_layouts=[*((0, 2, 1, 3) if x.ndim == 4 else None for x in results), None],
    )
    return call(*operands)[:-1]


def _heads_first(x_BxTxNxh):
    return jnp.swapaxes(x_BxTxNxh, 1, 2)


def _forward(q_BxTxNxh, k_BxTxKxh, v_BxTxKxh, scale: float, window: int):
    """(causal attention BxTxNxh, log-sum-exp of the scaled scores BxNxT in float32); window 0 = all before."""
    # As types rather than shapes: inside shard_map they tell over which axes the results differ.
    results = jax.eval_shape(lambda q: (_heads_first(q), _heads_first(q)[..., 0].astype(jnp.float32)), q_BxTxNxh)
    o_BxNxTxh, lse_BxNxT = _call(FORWARD, results, scale, window, q_BxTxNxh, k_BxTxKxh, v_BxTxKxh)
    return _heads_first(o_BxNxTxh), lse_BxNxT


def _backward(q_BxTxNxh, k_BxTxKxh, v_BxTxKxh, lse_BxNxT, o_BxTxNxh, do_BxTxNxh, scale: float, window: int):
    """Gradients of queries, keys and values."""
    results = jax.eval_shape(lambda *x: [_heads_first(a) for a in x], q_BxTxNxh, k_BxTxKxh, v_BxTxKxh)
    operands = q_BxTxNxh, k_BxTxKxh, v_BxTxKxh, lse_BxNxT, do_BxTxNxh, o_BxTxNxh
    return tuple(_heads_first(x) for x in _call(BACKWARD, results, scale, window, *operands))


class Kernels(NamedTuple):
    forward: object
    backward: object


CUDNN = Kernels(_forward, _backward)


def on_nvidia() -> bool:
    """Returns whether the program that is traced will run on NVIDIA GPUs: those of the mesh, or of this machine."""
    device = sharding.device()
    # Turing and before have no such kernels; data-centre cards of those years are called Tesla.
    return device.platform == 'gpu' and device.device_kind.startswith('NVIDIA')


def takes(q_BxTxKxGxh, c) -> bool:
    """Returns whether `attend` can run, and pays, for these queries of a model of configuration c."""
    h = q_BxTxKxGxh.shape[-1]
    fits = q_BxTxKxGxh.dtype == jnp.bfloat16 and h <= WIDEST and h % 8 == 0 and not c.attn_softcap
    return fits and q_BxTxKxGxh.shape[1] >= LONG and on_nvidia()


def kinds(c, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (the windows that layers have in a text of so many tokens, each once; the pattern of indices into them).

    0 = all of the text.
    """
    pattern = [w if w < length else 0 for w in c.windows]
    windows = sorted(set(pattern))
    return tuple(windows), tuple(windows.index(w) for w in pattern)


def attend(q_BxTxKxGxh, k_BxTxKxh, v_BxTxKxh, layer, c, *, scale: float, sinks_KxG=None):
    """Computes attention of tokens at positions 0..T-1 that see each other, as attention.attend does under the mask of
    layer `layer`, which may be traced; BxTxKxGxh. What `takes` refuses is an error of the compiler.
    """
    windows, pattern = kinds(c, q_BxTxKxGxh.shape[1])
    kind = c.of_layer(pattern, layer)

    def island(q_BxTxKxGxh, k_BxTxKxh, v_BxTxKxh, sinks_KxG, kind):
        b, t, k, g, h = q_BxTxKxGxh.shape
        sinks_N = None if sinks_KxG is None else sinks_KxG.reshape(k * g)
        q_BxTxNxh = q_BxTxKxGxh.reshape(b, t, k * g, h)
        o_BxTxNxh = _attend(windows, scale, CUDNN, q_BxTxNxh, k_BxTxKxh, v_BxTxKxh, sinks_N, kind)
        return o_BxTxNxh.reshape(b, t, k, g, h)

    if jax.sharding.get_abstract_mesh().empty:
        return island(q_BxTxKxGxh, k_BxTxKxh, v_BxTxKxh, sinks_KxG, kind)

    q_spec, kv_spec = sharding.like(q_BxTxKxGxh), sharding.like(k_BxTxKxh)
    rows, _, heads, *_ = q_spec

    def on_device(q_BxTxKxGxh, k_BxTxKxh, v_BxTxKxh, sinks_KxG, kind):
        # Typed at the entrance as what it meets, so that its gradient is summed there.
        if rows is not None:
            sinks_KxG = jax.lax.pcast(sinks_KxG, rows, to='varying')
        return island(q_BxTxKxGxh, k_BxTxKxh, v_BxTxKxh, sinks_KxG, kind)

    specs = (q_spec, kv_spec, kv_spec, sharding.P(heads), sharding.P())
    return jax.shard_map(on_device, in_specs=specs, out_specs=q_spec)(
        q_BxTxKxGxh, k_BxTxKxh, v_BxTxKxh, sinks_KxG, kind
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(windows, scale, kernels, q_BxTxNxh, k_BxTxKxh, v_BxTxKxh, sinks_N, kind):
    return _attend_and_keep(windows, scale, kernels, q_BxTxNxh, k_BxTxKxh, v_BxTxKxh, sinks_N, kind)[0]


def _attend_and_keep(windows, scale, kernels, q_BxTxNxh, k_BxTxKxh, v_BxTxKxh, sinks_N, kind):
    o_BxTxNxh, lse_BxNxT = _by_kind(kernels.forward, windows, kind, scale, q_BxTxNxh, k_BxTxKxh, v_BxTxKxh)
    if sinks_N is not None:
        s_Nx1 = sinks_N.astype(jnp.float32)[:, None]
        share_BxTxN = jnp.swapaxes(jax.nn.sigmoid(lse_BxNxT - s_Nx1), 1, 2)
        o_BxTxNxh = (o_BxTxNxh * share_BxTxN[..., None]).astype(o_BxTxNxh.dtype)
        lse_BxNxT = jnp.logaddexp(lse_BxNxT, s_Nx1)
    o_BxTxNxh, lse_BxNxT = (checkpoint_name(x, NAME) for x in (o_BxTxNxh, lse_BxNxT))
    return o_BxTxNxh, (q_BxTxNxh, k_BxTxKxh, v_BxTxKxh, sinks_N, kind, o_BxTxNxh, lse_BxNxT)


def _gradients(windows, scale, kernels, kept, do_BxTxNxh):
    q_BxTxNxh, k_BxTxKxh, v_BxTxKxh, sinks_N, kind, o_BxTxNxh, lse_BxNxT = kept
    operands = (q_BxTxNxh, k_BxTxKxh, v_BxTxKxh, lse_BxNxT, o_BxTxNxh, do_BxTxNxh)
    dq, dk, dv = _by_kind(kernels.backward, windows, kind, scale, *operands)
    if sinks_N is None:
        return dq, dk, dv, None, None
    weight_BxNxT = jnp.exp(sinks_N.astype(jnp.float32)[:, None] - lse_BxNxT)
    along_BxTxN = jnp.sum(do_BxTxNxh.astype(jnp.float32) * o_BxTxNxh, axis=-1)
    ds_N = -jnp.sum(weight_BxNxT * jnp.swapaxes(along_BxTxN, 1, 2), axis=(0, 2))
    return dq, dk, dv, ds_N.astype(sinks_N.dtype), None


_attend.defvjp(_attend_and_keep, _gradients)


def _by_kind(kernel, windows, kind, scale, *operands):
    """Runs a kernel with the window of the layer's kind: windows are static in a kernel, layers are not in a scan."""
    branches = [functools.partial(kernel, scale=scale, window=w) for w in windows]
    return branches[0](*operands) if len(branches) == 1 else jax.lax.switch(kind, branches, *operands)
