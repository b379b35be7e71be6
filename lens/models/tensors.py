"""Where the tensors of a Hugging Face checkpoint go, per family, as tables.

Each row names our leaf path, the Hugging Face tensor (without the prefix of the base model) and both
axis orders in single letters: v vocabulary, s positions, d residual, k kv head, g query heads per kv
head, h head dimension, f feed-forward width, e expert, p a fused axis (parts of one stored tensor),
c and b the 32-blocks and bytes of MXFP4.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from lens.errors import LensError
from lens.models.transformer import TransformerConfig


class Tensor(NamedTuple):
    """One row: `hf_axes` groups letters per stored axis, e.g. 'kgh d'. part: which slice of axis p of
    the stored tensor is this leaf (of `parts`). packed: stored as MXFP4 `_blocks` and `_scales`."""

    path: str
    hf_name: str
    hf_axes: str
    axes: str
    part: int | None = None
    parts: int = 2
    packed: bool = False


def _linear(path: str, hf_name: str, hf_axes: str, axes: str) -> tuple[Tensor, Tensor]:
    """A torch Linear and its bias (dropped where the model has none)."""
    outer = hf_axes.split()[0]
    return (
        Tensor(f'blocks/{path}', f'layers.{{}}.{hf_name}.weight', hf_axes, axes),
        Tensor(f'blocks/{path}_bias', f'layers.{{}}.{hf_name}.bias', outer, outer),
    )


EMBEDDING_AND_HEAD = (
    Tensor('embedding', 'embed_tokens.weight', 'v d', 'vd'),
    Tensor('final_norm/scale', 'norm.weight', 'd', 'd'),
    Tensor('head', 'lm_head.weight', 'v d', 'dv'),
)
ATTENTION = (
    *_linear('attn/q', 'self_attn.q_proj', 'kgh d', 'dkgh'),
    *_linear('attn/k', 'self_attn.k_proj', 'kh d', 'dkh'),
    *_linear('attn/v', 'self_attn.v_proj', 'kh d', 'dkh'),
    *_linear('attn/o', 'self_attn.o_proj', 'd kgh', 'kghd'),
    Tensor('blocks/attn/q_norm/scale', 'layers.{}.self_attn.q_norm.weight', 'h', 'h'),
    Tensor('blocks/attn/k_norm/scale', 'layers.{}.self_attn.k_norm.weight', 'h', 'h'),
    Tensor('blocks/attn/sinks', 'layers.{}.self_attn.sinks', 'kg', 'kg'),
    Tensor('blocks/attn_norm/scale', 'layers.{}.input_layernorm.weight', 'd', 'd'),
)
GATED_MLP = (
    *_linear('mlp/gate', 'mlp.gate_proj', 'f d', 'df'),
    *_linear('mlp/up', 'mlp.up_proj', 'f d', 'df'),
    *_linear('mlp/down', 'mlp.down_proj', 'd f', 'fd'),
)
PRE_NORM = (Tensor('blocks/mlp_norm/scale', 'layers.{}.post_attention_layernorm.weight', 'd', 'd'),)
SANDWICH_NORMS = (
    Tensor('blocks/attn_post_norm/scale', 'layers.{}.post_attention_layernorm.weight', 'd', 'd'),
    Tensor('blocks/mlp_norm/scale', 'layers.{}.pre_feedforward_layernorm.weight', 'd', 'd'),
    Tensor('blocks/mlp_post_norm/scale', 'layers.{}.post_feedforward_layernorm.weight', 'd', 'd'),
)
EXPERTS = 'layers.{}.mlp.experts'
MOE = (
    Tensor('blocks/moe/router_w', 'layers.{}.mlp.router.weight', 'e d', 'de'),
    Tensor('blocks/moe/router_bias', 'layers.{}.mlp.router.bias', 'e', 'e'),
    # gate and up are interleaved on the stored axis: even entries are the gate
    Tensor('blocks/moe/gate_up_bias', f'{EXPERTS}.gate_up_proj_bias', 'e fp', 'epf'),
    Tensor('blocks/moe/down_bias', f'{EXPERTS}.down_proj_bias', 'e d', 'ed'),
)
DENSE_EXPERTS = (
    Tensor('blocks/moe/gate_up', f'{EXPERTS}.gate_up_proj', 'e d fp', 'epfd'),
    Tensor('blocks/moe/down', f'{EXPERTS}.down_proj', 'e f d', 'efd'),
)
# The same weights as shipped: stored [expert, out, in], dequantised while loading or kept as bytes.
MXFP4_EXPERTS = (
    Tensor('blocks/moe/gate_up', f'{EXPERTS}.gate_up_proj', 'e fp d', 'epfd', packed=True),
    Tensor('blocks/moe/down', f'{EXPERTS}.down_proj', 'e d f', 'efd', packed=True),
)
PACKED_EXPERTS = (
    Tensor('blocks/moe/gate_up_blocks', f'{EXPERTS}.gate_up_proj_blocks', 'e fp c b', 'epfcb'),
    Tensor('blocks/moe/gate_up_scales', f'{EXPERTS}.gate_up_proj_scales', 'e fp c', 'epfc'),
    Tensor('blocks/moe/down_blocks', f'{EXPERTS}.down_proj_blocks', 'e d c b', 'edcb'),
    Tensor('blocks/moe/down_scales', f'{EXPERTS}.down_proj_scales', 'e d c', 'edc'),
)

LLAMA = (*EMBEDDING_AND_HEAD, *ATTENTION, *PRE_NORM, *GATED_MLP)
GEMMA = (*EMBEDDING_AND_HEAD, *ATTENTION, *SANDWICH_NORMS, *GATED_MLP)
GPT_OSS = (*EMBEDDING_AND_HEAD, *ATTENTION, *PRE_NORM, *MOE)


def _conv1d(path: str, hf_name: str, hf_axes: str, axes: str, **part) -> tuple[Tensor, Tensor]:
    """GPT-2 stores [in, out]; q, k and v share one tensor."""
    outer = hf_axes.split()[1]
    return (
        Tensor(f'blocks/{path}', f'h.{{}}.{hf_name}.weight', hf_axes, axes, **part),
        Tensor(f'blocks/{path}_bias', f'h.{{}}.{hf_name}.bias', outer, outer.replace('p', ''), **part),
    )


GPT2 = (
    Tensor('embedding', 'wte.weight', 'v d', 'vd'),
    Tensor('positions', 'wpe.weight', 's d', 'sd'),
    Tensor('final_norm/scale', 'ln_f.weight', 'd', 'd'),
    Tensor('final_norm/bias', 'ln_f.bias', 'd', 'd'),
    Tensor('head', 'lm_head.weight', 'v d', 'dv'),
    Tensor('blocks/attn_norm/scale', 'h.{}.ln_1.weight', 'd', 'd'),
    Tensor('blocks/attn_norm/bias', 'h.{}.ln_1.bias', 'd', 'd'),
    Tensor('blocks/mlp_norm/scale', 'h.{}.ln_2.weight', 'd', 'd'),
    Tensor('blocks/mlp_norm/bias', 'h.{}.ln_2.bias', 'd', 'd'),
    *_conv1d('attn/q', 'attn.c_attn', 'd pkgh', 'dkgh', part=0, parts=3),
    *_conv1d('attn/k', 'attn.c_attn', 'd pkh', 'dkh', part=1, parts=3),
    *_conv1d('attn/v', 'attn.c_attn', 'd pkh', 'dkh', part=2, parts=3),
    *_conv1d('attn/o', 'attn.c_proj', 'kgh d', 'kghd'),
    *_conv1d('mlp/up', 'mlp.c_fc', 'd f', 'df'),
    *_conv1d('mlp/down', 'mlp.c_proj', 'f d', 'fd'),
)


def sizes(t: Tensor, c: TransformerConfig) -> dict[str, int]:
    """Returns the length of each axis letter of a row; c is 1/32 of the last axis of the weights."""
    width = c.d_model if 'gate_up' in t.path else c.d_ff
    return {
        'v': c.vocab_size,
        's': c.max_positions,
        'd': c.d_model,
        'k': c.n_kv_heads,
        'g': c.n_heads // c.n_kv_heads,
        'h': c.head_dim,
        'f': c.d_ff,
        'e': c.n_experts,
        'p': t.parts,
        'c': width // 32,
        'b': 16,
    }


def hf_shape(t: Tensor, c: TransformerConfig) -> tuple[int, ...]:
    """Returns the shape of the stored tensor (of the dequantised one for a packed row)."""
    n = sizes(t, c)
    return tuple(math.prod(n[a] for a in group) for group in t.hf_axes.split())


def from_hf_layout(x, t: Tensor, c: TransformerConfig):
    """Brings a stored tensor (numpy or JAX) to our axis order, its part alone for a fused one."""
    n, flat = sizes(t, c), t.hf_axes.replace(' ', '')
    x = x.reshape([n[a] for a in flat])
    if t.part is not None:
        x = x[(slice(None),) * flat.index('p') + (t.part,)]
        flat = flat.replace('p', '')
    return x.transpose([flat.index(a) for a in t.axes])


def to_hf_layout(parts: list[np.ndarray], rows: list[Tensor], c: TransformerConfig) -> np.ndarray:
    """Makes the stored tensor of the leaves of all rows that share it, in the order of their parts."""
    stored = []
    for x, t in zip(parts, rows, strict=True):
        t = t if t.part is None else t._replace(hf_axes=t.hf_axes.replace('p', ''))
        x = x.transpose([t.axes.index(a) for a in t.hf_axes if a != ' '])
        stored.append(x.reshape(hf_shape(t, c)))
    # p is the outermost letter of its stored axis, on which the parts follow one another
    return stored[0] if len(stored) == 1 else np.concatenate(stored, axis=-1)


def shapes_on_disk(t: Tensor, c: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Names what is stored of a row: the name, with {} for the layer -> shape: one tensor, two for packed experts."""
    shape = hf_shape(t, c)
    if not t.packed:
        return {t.hf_name: shape}
    blocks = *shape[:-1], shape[-1] // 32
    return {t.hf_name + '_blocks': (*blocks, 16), t.hf_name + '_scales': blocks}


def _prefix(where, stored: Collection[str], table) -> str:
    """What a checkpoint has before the names of the table: by its embedding, or, where the head is that, its norm."""
    anchors = {t.path: t.hf_name for t in table if t.path in ('embedding', 'final_norm/scale')}
    for anchor in anchors.values():
        found = {n.removesuffix(anchor) for n in stored if n == anchor or n.endswith('.' + anchor)}
        if len(found) == 1:
            return found.pop()
        if found:
            break
    raise LensError(f'{where} holds {len(found)} tensors named {anchor}: one is needed.')


def stored_names(where, stored: Collection[str], table, c) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Finds every wanted tensor among the stored names: name in the table -> (stored name, shape that it must have).

    Raises LensError, which names `where`, unless the names of the table stand behind one prefix.
    """
    prefix, names = _prefix(where, stored, table), {}
    heads = [n for n in stored if n == 'lm_head.weight' or n.endswith('.lm_head.weight')]
    for t in table:
        for name, shape in shapes_on_disk(t, c).items():
            for ours in [name.format(i) for i in range(c.n_layers if '{}' in name else 1)]:
                # some writers of tied models store the one table as the head alone
                as_head = t.path == 'head' or (t.path == 'embedding' and c.tied and prefix + ours not in stored)
                names[ours] = heads[0] if as_head and heads else ours if t.path == 'head' else prefix + ours, shape
    return names
