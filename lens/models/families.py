"""What a model family is: how its config.json reads and writes, and which tensor table it has.

A family is facts only; the stack is one. `FAMILIES` maps model_type to a Family.
"""

import dataclasses
import math
from collections.abc import Callable

from lens.models import tensors
from lens.models.rope import Rope
from lens.models.tensors import Tensor
from lens.models.transformer import TransformerConfig


class UnsupportedModelError(ValueError):
    """The config.json describes a model that this version cannot run."""


def _refuse_unless(ok: bool, what: str) -> None:
    if not ok:
        raise UnsupportedModelError(what)


def _rope(p: dict, default_theta: float, max_positions: int) -> Rope:
    """One table from rope_parameters (or the older rope_scaling)."""
    kind = p.get('rope_type', p.get('type', 'default'))
    _refuse_unless(
        kind in ('default', 'linear', 'llama3', 'yarn'),
        f'rope_type {kind!r} is not supported; supported: default, linear, llama3, yarn',
    )
    _refuse_unless(p.get('partial_rotary_factor', 1.0) == 1.0, 'partial_rotary_factor is not supported; supported: 1')
    _refuse_unless(not p.get('mscale'), 'rope mscale is not supported')
    theta = float(p.get('rope_theta') or default_theta)
    if kind == 'default':
        return Rope(theta)
    factor, original = float(p['factor']), int(p.get('original_max_position_embeddings') or max_positions)
    if kind == 'linear':
        return Rope(theta, kind, factor)
    if kind == 'llama3':
        low, high = float(p['low_freq_factor']), float(p['high_freq_factor'])
        return Rope(theta, kind, factor, original, low_freq_factor=low, high_freq_factor=high)
    # YaRN: sin and cos grow with the logarithm of the factor unless the file says otherwise
    attention = p.get('attention_factor') or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return Rope(
        theta,
        kind,
        factor,
        original,
        beta_fast=float(p.get('beta_fast') or 32),
        beta_slow=float(p.get('beta_slow') or 1),
        truncate=bool(p.get('truncate', True)),
        attention_factor=float(attention),
    )


def _rope_to_hf(r: Rope) -> dict:
    out = {'rope_type': r.kind, 'rope_theta': r.theta}
    if r.kind != 'default':
        out['factor'] = r.factor
    if r.kind == 'llama3':
        out |= {'low_freq_factor': r.low_freq_factor, 'high_freq_factor': r.high_freq_factor}
    if r.kind == 'yarn':
        out |= {'beta_fast': r.beta_fast, 'beta_slow': r.beta_slow, 'truncate': r.truncate}
        out['attention_factor'] = r.attention_factor
    if r.original_length:
        out['original_max_position_embeddings'] = r.original_length
    return out


def _ropes_to_hf(full: Rope, local: Rope | None = None) -> dict:
    """The keys of transformers 5, and those that its version 4 and other programs read; without them they would take
    the usual theta."""
    table = _rope_to_hf(full)
    scaling = {k: v for k, v in table.items() if k != 'rope_theta'} if full.kind != 'default' else None
    older = {'rope_theta': full.theta, 'rope_scaling': scaling}
    if local is None:
        return older | {'rope_parameters': table}
    both = {'full_attention': table, 'sliding_attention': _rope_to_hf(local)}
    return older | {'rope_parameters': both, 'rope_local_base_freq': local.theta}


def _one_rope(config: dict, default_theta: float) -> tuple[Rope, ...]:
    p = config.get('rope_parameters') or config.get('rope_scaling') or {}
    theta = config.get('rope_theta') or default_theta
    return (_rope(p, theta, config.get('max_position_embeddings', 0)),)


def _windows(config: dict, default_types: Callable[[int], bool]) -> tuple[int, ...]:
    """Window of every layer: layer_types where given, else the family's default (True = sliding)."""
    n, window = config['num_hidden_layers'], config.get('sliding_window')
    types = config.get('layer_types')
    sliding = [t == 'sliding_attention' for t in types] if types else [default_types(i) for i in range(n)]
    _refuse_unless(len(sliding) == n, f'layer_types has {len(sliding)} entries for {n} layers')
    return tuple(window if s and window else 0 for s in sliding)


def _layer_types(c: TransformerConfig) -> list[str]:
    pattern = [c.windows[i % len(c.windows)] for i in range(c.n_layers)]
    return ['sliding_attention' if w else 'full_attention' for w in pattern]


def _common(config: dict, tied_default: bool) -> dict:
    """What every family but GPT-2 names alike."""
    heads = config['num_attention_heads']
    return {
        'family': config['model_type'],
        'vocab_size': config['vocab_size'],
        'd_model': config['hidden_size'],
        'n_layers': config['num_hidden_layers'],
        'n_heads': heads,
        'n_kv_heads': config.get('num_key_value_heads') or heads,
        'head_dim': config.get('head_dim') or config['hidden_size'] // heads,
        'd_ff': config['intermediate_size'],
        'norm_eps': config.get('rms_norm_eps', 1e-6),
        'tied': bool(config.get('tie_word_embeddings', tied_default)),
        'max_positions': config.get('max_position_embeddings', 2048),
    }


def _common_to_hf(c: TransformerConfig) -> dict:
    return {
        'vocab_size': c.vocab_size,
        'hidden_size': c.d_model,
        'num_hidden_layers': c.n_layers,
        'num_attention_heads': c.n_heads,
        'num_key_value_heads': c.n_kv_heads,
        'head_dim': c.head_dim,
        'intermediate_size': c.d_ff,
        'rms_norm_eps': c.norm_eps,
        'tie_word_embeddings': c.tied,
        'max_position_embeddings': c.max_positions,
    }


def _activation(config: dict, key: str, default: str, supported: tuple[str, ...]) -> None:
    act = config.get(key) or default
    _refuse_unless(act in supported, f'{key} {act!r} is not supported; supported: {", ".join(supported)}')


def _llama(config: dict) -> TransformerConfig:
    """Llama 2 and 3, SimpleStories."""
    _activation(config, 'hidden_act', 'silu', ('silu', 'swish'))
    bias = bool(config.get('attention_bias'))
    return TransformerConfig(
        **_common(config, False),
        ropes=_one_rope(config, 10000.0),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(config.get('mlp_bias')),
    )


def _llama_to_hf(c: TransformerConfig) -> dict:
    own = {'attention_bias': c.o_bias, 'mlp_bias': c.mlp_bias, 'hidden_act': 'silu'}
    return _common_to_hf(c) | own | _ropes_to_hf(*c.ropes)


def _qwen(config: dict) -> TransformerConfig:
    """Qwen2, Qwen2.5 (biases on q, k, v) and Qwen3 (norms on q and k)."""
    _activation(config, 'hidden_act', 'silu', ('silu', 'swish'))
    three = config['model_type'] == 'qwen3'
    first = config.get('max_window_layers', 28)
    sliding = config if config.get('use_sliding_window') else config | {'sliding_window': None}
    bias = bool(config.get('attention_bias'))
    return TransformerConfig(
        **_common(config if not three else {'head_dim': 128} | config, False),
        ropes=_one_rope(config, 10000.0),
        windows=_windows({'sliding_window': 4096} | sliding, lambda i: i >= first),
        qkv_bias=bias if three else True,
        o_bias=bias if three else False,
        qk_norm=three,
    )


def _qwen_to_hf(c: TransformerConfig) -> dict:
    own = {
        'hidden_act': 'silu',
        'use_sliding_window': any(c.windows),
        'sliding_window': max(c.windows) or None,
        'layer_types': _layer_types(c),
        **_ropes_to_hf(*c.ropes),
    }
    return _common_to_hf(c) | own | ({'attention_bias': c.o_bias} if c.qk_norm else {})


def _gemma(config: dict, **own) -> TransformerConfig:
    act = {'hidden_activation': config.get('hidden_activation') or config.get('hidden_act')}
    _activation(act, 'hidden_activation', 'gelu_pytorch_tanh', ('gelu_pytorch_tanh',))
    _refuse_unless(not config.get('use_bidirectional_attention'), 'use_bidirectional_attention is not supported')
    bias = bool(config.get('attention_bias'))
    return TransformerConfig(
        **_common(config, True),
        norm='rms_offset',
        post_norms=True,
        query_scale=config.get('query_pre_attn_scalar', 256) ** -0.5,
        attn_softcap=config.get('attn_logit_softcapping') or 0.0,
        final_softcap=config.get('final_logit_softcapping') or 0.0,
        embed_scale=config['hidden_size'] ** 0.5,
        mlp='gelu',
        qkv_bias=bias,
        o_bias=bias,
        **own,
    )


def _gemma2(config: dict) -> TransformerConfig:
    published = {'head_dim': 256, 'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}
    config = published | {'sliding_window': 4096, 'max_position_embeddings': 8192} | config
    windows = _windows(config, lambda i: i % 2 == 0)
    return _gemma(config, ropes=_one_rope(config, 10000.0), windows=windows)


def _gemma3(config: dict) -> TransformerConfig:
    """The text model; full layers have a rotary table of their own. The reference never applies a cap on
    the attention scores, whatever the file says."""
    published = {'vocab_size': 262208, 'head_dim': 256, 'num_attention_heads': 8, 'num_key_value_heads': 4}
    config = published | {'sliding_window': 4096, 'max_position_embeddings': 131072} | config
    config['attn_logit_softcapping'] = None
    period = config.get('sliding_window_pattern') or config.get('_sliding_window_pattern') or 6
    windows = _windows(config, lambda i: (i + 1) % period != 0)
    p = config.get('rope_parameters') or {}
    full = p.get('full_attention') or config.get('rope_scaling') or {}
    local = p.get('sliding_attention') or {}
    ropes = (
        _rope(full, config.get('rope_theta') or 1e6, 0),
        _rope(local, config.get('rope_local_base_freq') or 1e4, 0),
    )
    return _gemma(config, ropes=ropes, windows=windows, layer_rope=tuple(int(w > 0) for w in windows), qk_norm=True)


def _gemma_to_hf(c: TransformerConfig) -> dict:
    own = {
        'hidden_activation': 'gelu_pytorch_tanh',
        'query_pre_attn_scalar': round(c.query_scale**-2),
        'attn_logit_softcapping': c.attn_softcap or None,
        'final_logit_softcapping': c.final_softcap or None,
        'attention_bias': c.o_bias,
        'sliding_window': max(c.windows) or None,
        'layer_types': _layer_types(c),
        **_ropes_to_hf(*c.ropes),
    }
    return _common_to_hf(c) | own


def _gpt_oss(config: dict) -> TransformerConfig:
    _refuse_unless(config.get('swiglu_alpha', 1.702) == 1.702, 'swiglu_alpha must be 1.702')
    _refuse_unless(config.get('swiglu_limit', 7.0) == 7.0, 'swiglu_limit must be 7')
    config = {'head_dim': 64, 'rms_norm_eps': 1e-5, 'sliding_window': 128, 'max_position_embeddings': 131072} | config
    yarn = {
        'rope_type': 'yarn',
        'factor': 32.0,
        'truncate': False,
        'original_max_position_embeddings': config.get('initial_context_length', 4096),
    }
    if not (config.get('rope_parameters') or config.get('rope_scaling')):
        config = config | {'rope_parameters': yarn}
    bias = bool(config.get('attention_bias', True))
    return TransformerConfig(
        **_common(config, False),
        ropes=_one_rope(config, 150000.0),
        windows=_windows(config, lambda i: i % 2 == 0),
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        n_experts=config.get('num_local_experts') or config['num_experts'],
        top_k=config.get('num_experts_per_tok') or config.get('experts_per_token') or 4,
    )


def _gpt_oss_to_hf(c: TransformerConfig) -> dict:
    own = {
        'hidden_act': 'silu',
        'attention_bias': c.o_bias,
        'sliding_window': max(c.windows) or None,
        'layer_types': _layer_types(c),
        **_ropes_to_hf(*c.ropes),
        'num_local_experts': c.n_experts,
        'num_experts_per_tok': c.top_k,
        'swiglu_limit': 7.0,
    }
    quantised = {'quantization_config': {'quant_method': 'mxfp4'}} if c.packed else {}
    return _common_to_hf(c) | own | quantised


def _gpt2(config: dict) -> TransformerConfig:
    _activation(config, 'activation_function', 'gelu_new', ('gelu_new',))
    for key, value in (('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False)):
        _refuse_unless(config.get(key, value) == value, f'{key}={config.get(key)} is not supported')
    d, heads = config['n_embd'], config['n_head']
    return TransformerConfig(
        family='gpt2',
        vocab_size=config['vocab_size'],
        d_model=d,
        n_layers=config['n_layer'],
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=d // heads,
        d_ff=config.get('n_inner') or 4 * d,
        norm_eps=config.get('layer_norm_epsilon', 1e-5),
        tied=bool(config.get('tie_word_embeddings', True)),
        max_positions=config.get('n_positions', 1024),
        ropes=(),
        norm='layer',
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        mlp='gelu_plain',
    )


def _gpt2_to_hf(c: TransformerConfig) -> dict:
    return {
        'vocab_size': c.vocab_size,
        'n_embd': c.d_model,
        'n_layer': c.n_layers,
        'n_head': c.n_heads,
        'n_inner': c.d_ff,
        'n_positions': c.max_positions,
        'layer_norm_epsilon': c.norm_eps,
        'activation_function': 'gelu_new',
        'tie_word_embeddings': c.tied,
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """architecture: the class that transformers loads. table: all rows that a member may have. prefix: of
    the names in a causal language model's checkpoint; the head has none."""

    architecture: str
    read: Callable[[dict], TransformerConfig]
    write: Callable[[TransformerConfig], dict]
    table: tuple[Tensor, ...]
    prefix: str = 'model.'


FAMILIES = {
    'gpt2': Family('GPT2LMHeadModel', _gpt2, _gpt2_to_hf, tensors.GPT2, 'transformer.'),
    'llama': Family('LlamaForCausalLM', _llama, _llama_to_hf, tensors.LLAMA),
    'qwen2': Family('Qwen2ForCausalLM', _qwen, _qwen_to_hf, tensors.LLAMA),
    'qwen3': Family('Qwen3ForCausalLM', _qwen, _qwen_to_hf, tensors.LLAMA),
    'gemma2': Family('Gemma2ForCausalLM', _gemma2, _gemma_to_hf, tensors.GEMMA),
    'gemma3_text': Family('Gemma3ForCausalLM', _gemma3, _gemma_to_hf, tensors.GEMMA),
    'gpt_oss': Family('GptOssForCausalLM', _gpt_oss, _gpt_oss_to_hf, tensors.GPT_OSS),
}


def from_hf(config: dict) -> TransformerConfig:
    """TransformerConfig of a config.json; of the text model where it is nested in a multimodal one.

    Raises UnsupportedModelError, KeyError for a key that must be there.
    """
    if config.get('model_type') == 'gemma3':
        text = dict(config.get('text_config') or {})
        config = {'tie_word_embeddings': config.get('tie_word_embeddings', True)} | text
        config['model_type'] = 'gemma3_text'
    family = config.get('model_type')
    _refuse_unless(family in FAMILIES, f'model_type {family!r} is not supported; supported: {", ".join(FAMILIES)}')
    return FAMILIES[family].read(config)


def to_hf(c: TransformerConfig, dtype: str) -> dict:
    """The config.json of a model, without token ids."""
    family = FAMILIES[c.family]
    names = {'architectures': [family.architecture], 'model_type': c.family}
    return names | family.write(c) | {'dtype': dtype}


def table(c: TransformerConfig, has_leaf: Callable[[str], bool], mxfp4: bool = False) -> tuple[Tensor, ...]:
    """Rows of the leaves that this model has; experts from MXFP4 tensors where the checkpoint holds those."""
    rows = FAMILIES[c.family].table
    if c.n_experts:
        experts = tensors.MXFP4_EXPERTS if mxfp4 else tensors.DENSE_EXPERTS
        rows += tensors.PACKED_EXPERTS if c.packed else experts
    return tuple(t for t in rows if has_leaf(t.path))
