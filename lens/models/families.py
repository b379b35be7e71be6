"""What a model family is: how its config.json reads, and where its tensors go.

A family is facts only: a function config.json -> TransformerConfig and a table of tensors. Each row
names our leaf path, the Hugging Face tensor and both axis orders in single letters: v vocabulary,
d residual, k kv head, g query heads per kv head, h head dimension, f feed-forward width.
"""

from typing import NamedTuple

import numpy as np

from lens.models.transformer import TransformerConfig


class UnsupportedModelError(ValueError):
    """The config.json describes a model that this version cannot run."""


class Tensor(NamedTuple):
    """One row of a tensor table: `hf_axes` groups letters per stored axis, e.g. 'kgh d'."""

    path: str
    hf_name: str
    hf_axes: str
    axes: str


LLAMA_TENSORS = (
    Tensor('embedding', 'model.embed_tokens.weight', 'v d', 'vd'),
    Tensor('final_norm', 'model.norm.weight', 'd', 'd'),
    Tensor('head', 'lm_head.weight', 'v d', 'dv'),
    Tensor('blocks/attn_norm', 'model.layers.{}.input_layernorm.weight', 'd', 'd'),
    Tensor('blocks/mlp_norm', 'model.layers.{}.post_attention_layernorm.weight', 'd', 'd'),
    Tensor('blocks/attn/q', 'model.layers.{}.self_attn.q_proj.weight', 'kgh d', 'dkgh'),
    Tensor('blocks/attn/k', 'model.layers.{}.self_attn.k_proj.weight', 'kh d', 'dkh'),
    Tensor('blocks/attn/v', 'model.layers.{}.self_attn.v_proj.weight', 'kh d', 'dkh'),
    Tensor('blocks/attn/o', 'model.layers.{}.self_attn.o_proj.weight', 'd kgh', 'kghd'),
    Tensor('blocks/mlp/gate', 'model.layers.{}.mlp.gate_proj.weight', 'f d', 'df'),
    Tensor('blocks/mlp/up', 'model.layers.{}.mlp.up_proj.weight', 'f d', 'df'),
    Tensor('blocks/mlp/down', 'model.layers.{}.mlp.down_proj.weight', 'd f', 'fd'),
)


def tensors(c: TransformerConfig) -> tuple[Tensor, ...]:
    """The tensor table of a model; a tied model has no head of its own."""
    return tuple(t for t in LLAMA_TENSORS if not (c.tied and t.path == 'head'))


def sizes(c: TransformerConfig) -> dict[str, int]:
    return {
        'v': c.vocab_size,
        'd': c.d_model,
        'k': c.n_kv_heads,
        'g': c.n_heads // c.n_kv_heads,
        'h': c.head_dim,
        'f': c.d_ff,
    }


def from_hf(config: dict) -> TransformerConfig:
    """TransformerConfig of a Hugging Face config.json. Raises UnsupportedModelError."""
    family = config.get('model_type')
    if family != 'llama':
        raise UnsupportedModelError(f'model_type {family!r} is not supported; supported: llama')
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind != 'default':
        raise UnsupportedModelError(f'rope_type {kind!r} of a llama model is not supported; supported: default')
    for key in ('attention_bias', 'mlp_bias'):
        if config.get(key):
            raise UnsupportedModelError(f'{key}=true of a llama model is not supported')
    if (act := config.get('hidden_act', 'silu')) not in ('silu', 'swish'):
        raise UnsupportedModelError(f'hidden_act {act!r} of a llama model is not supported; supported: silu')
    heads = config['num_attention_heads']
    return TransformerConfig(
        family=family,
        vocab_size=config['vocab_size'],
        d_model=config['hidden_size'],
        n_layers=config['num_hidden_layers'],
        n_heads=heads,
        n_kv_heads=config.get('num_key_value_heads') or heads,
        head_dim=config.get('head_dim') or config['hidden_size'] // heads,
        d_ff=config['intermediate_size'],
        rope_theta=float(rope.get('rope_theta') or config.get('rope_theta') or 10000.0),
        norm_eps=config.get('rms_norm_eps', 1e-6),
        tied=bool(config.get('tie_word_embeddings', False)),
        max_positions=config.get('max_position_embeddings', 2048),
    )


def to_hf(c: TransformerConfig, dtype: str) -> dict:
    """The config.json of a model, without token ids."""
    return {
        'architectures': ['LlamaForCausalLM'],
        'model_type': c.family,
        'vocab_size': c.vocab_size,
        'hidden_size': c.d_model,
        'num_hidden_layers': c.n_layers,
        'num_attention_heads': c.n_heads,
        'num_key_value_heads': c.n_kv_heads,
        'head_dim': c.head_dim,
        'intermediate_size': c.d_ff,
        'hidden_act': 'silu',
        'rms_norm_eps': c.norm_eps,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta},
        'tie_word_embeddings': c.tied,
        'max_position_embeddings': c.max_positions,
        'attention_bias': False,
        'mlp_bias': False,
        'dtype': dtype,
    }


def hf_shape(t: Tensor, c: TransformerConfig) -> tuple[int, ...]:
    n = sizes(c)
    return tuple(int(np.prod([n[a] for a in group])) for group in t.hf_axes.split())


def from_hf_layout(x: np.ndarray, t: Tensor, c: TransformerConfig) -> np.ndarray:
    """A stored tensor in our axis order."""
    n, flat = sizes(c), t.hf_axes.replace(' ', '')
    return x.reshape([n[a] for a in flat]).transpose([flat.index(a) for a in t.axes])


def to_hf_layout(x: np.ndarray, t: Tensor, c: TransformerConfig) -> np.ndarray:
    """The inverse of from_hf_layout."""
    flat = t.hf_axes.replace(' ', '')
    return x.transpose([t.axes.index(a) for a in flat]).reshape(hf_shape(t, c))
