"""What a model family is: how its config.json is read and edited, and which tensor table it has.

A family is facts only; the stack is one. `FAMILIES` maps model_type to a Family.
"""

import dataclasses
import math
from collections.abc import Callable

from lens.errors import LensError
from lens.models import tensors
from lens.models.rope import Rope
from lens.models.tensors import Tensor
from lens.models.transformer import TransformerConfig

TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def _refuse_unless(ok: bool, what: str) -> None:
    if not ok:
        raise LensError(what)


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
    own = {}
    if kind == 'llama3':
        own = {k: float(p[k]) for k in ('low_freq_factor', 'high_freq_factor')}
    if kind == 'yarn':
        # sin and cos grow with the logarithm of the factor unless the file says otherwise
        attention = p.get('attention_factor') or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
        own = {'beta_fast': float(p.get('beta_fast') or 32), 'beta_slow': float(p.get('beta_slow') or 1)}
        own |= {'truncate': bool(p.get('truncate', True)), 'attention_factor': float(attention)}
    return Rope(theta, kind, factor, original, **own)


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


# TransformerConfig -> config.json, and GPT-2's names for the same.
KEYS = {
    'vocab_size': ('vocab_size', 'vocab_size'),
    'd_model': ('hidden_size', 'n_embd'),
    'n_layers': ('num_hidden_layers', 'n_layer'),
    'n_heads': ('num_attention_heads', 'n_head'),
    'n_kv_heads': ('num_key_value_heads', ''),
    'head_dim': ('head_dim', ''),
    'd_ff': ('intermediate_size', 'n_inner'),
    'norm_eps': ('rms_norm_eps', 'layer_norm_epsilon'),
    'tied': ('tie_word_embeddings', 'tie_word_embeddings'),
    'max_positions': ('max_position_embeddings', 'n_positions'),
}


def _keys(family: str) -> dict[str, str]:
    return {field: names[family == 'gpt2'] for field, names in KEYS.items() if names[family == 'gpt2']}


def _sizes(config: dict, **defaults) -> dict:
    """The fields of KEYS; defaults: of those that a file may leave out. Raises KeyError."""
    out = {'family': config['model_type']} | defaults
    for field, key in _keys(config['model_type']).items():
        if config.get(key) is not None or field not in defaults:
            out[field] = config[key]
    return out


def _common(config: dict, tied: bool) -> dict:
    """What every family but GPT-2 names alike. tied: where the file does not say."""
    heads = config['num_attention_heads']
    own = {'n_kv_heads': heads, 'head_dim': config['hidden_size'] // heads}
    return _sizes(config, **own, norm_eps=1e-6, tied=tied, max_positions=2048)


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


def _gpt2(config: dict) -> TransformerConfig:
    _activation(config, 'activation_function', 'gelu_new', ('gelu_new',))
    for key, value in (('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False)):
        _refuse_unless(config.get(key, value) == value, f'{key}={config.get(key)} is not supported')
    d, heads = config['n_embd'], config['n_head']
    return TransformerConfig(
        **_sizes(config, d_ff=4 * d, norm_eps=1e-5, tied=True, max_positions=1024),
        n_kv_heads=heads,
        head_dim=d // heads,
        ropes=(),
        norm='layer',
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        mlp='gelu_plain',
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """architecture: the class that transformers loads. table: all rows that a member may have. prefix: of
    the names in a causal language model's checkpoint; the head has none."""

    architecture: str
    read: Callable[[dict], TransformerConfig]
    table: tuple[Tensor, ...]
    prefix: str = 'model.'


FAMILIES = {
    'gpt2': Family('GPT2LMHeadModel', _gpt2, tensors.GPT2, 'transformer.'),
    'llama': Family('LlamaForCausalLM', _llama, tensors.LLAMA),
    'qwen2': Family('Qwen2ForCausalLM', _qwen, tensors.LLAMA),
    'qwen3': Family('Qwen3ForCausalLM', _qwen, tensors.LLAMA),
    'gemma2': Family('Gemma2ForCausalLM', _gemma2, tensors.GEMMA),
    'gemma3_text': Family('Gemma3ForCausalLM', _gemma3, tensors.GEMMA),
    'gpt_oss': Family('GptOssForCausalLM', _gpt_oss, tensors.GPT_OSS),
}


def _text_model(config: dict) -> dict:
    """The config.json of the text model alone where it is nested in that of a multimodal one (Gemma-3)."""
    if config.get('model_type') != 'gemma3':
        return dict(config)
    outer = {k: config[k] for k in TOKEN_IDS if k in config}
    tied = {'tie_word_embeddings': config.get('tie_word_embeddings', True)}
    return tied | dict(config.get('text_config') or {}) | outer | {'model_type': 'gemma3_text'}


def from_hf(config: dict) -> TransformerConfig:
    """Reads a config.json; the text model where it is nested in a multimodal one.

    Raises LensError, without a full stop: for what this version cannot run, for a key that must be there.
    """
    config = _text_model(config)
    family = config.get('model_type')
    _refuse_unless(family in FAMILIES, f'model_type {family!r} is not supported; supported: {", ".join(FAMILIES)}')
    try:
        return FAMILIES[family].read(config)
    except KeyError as e:
        raise LensError(f'it has no key {e}') from None


def edited(config: dict, c: TransformerConfig, dtype: str) -> dict:
    """Returns the config.json of a model: that of its source, or of a relative, changed in what differs.

    dtype: of the stored weights. Raises LensError where more differs than KEYS.
    """
    out = _text_model(config)
    theirs = from_hf(out)
    out |= {key: getattr(c, k) for k, key in _keys(theirs.family).items() if getattr(theirs, k) != getattr(c, k)}
    if out.get('layer_types'):
        out['layer_types'] = out['layer_types'][: c.n_layers]
    if not c.packed:
        out.pop('quantization_config', None)
    out.pop('torch_dtype', None)
    out |= {'architectures': [FAMILIES[c.family].architecture], 'dtype': dtype}
    out |= _older_ropes(out.get('rope_parameters') or {})

    def facts(c: TransformerConfig) -> dict:  # how the model is run is none of its facts
        patterns = {k: getattr(c, k) * c.n_layers for k in ('windows', 'layer_rope')}
        patterns = {k: x[: c.n_layers] for k, x in patterns.items()}
        return dataclasses.asdict(dataclasses.replace(c, remat='', experts='', packed=False)) | patterns

    told, model = facts(from_hf(out)), facts(c)
    differing = ', '.join(k for k in model if told[k] != model[k])
    _refuse_unless(not differing, f'it describes another model than the one to save ({differing} differ)')
    return out


def _older_ropes(p: dict) -> dict:
    """The keys that transformers 4 and other programs read, from rope_parameters of transformers 5; without them
    they would take the usual theta."""
    full, local = p.get('full_attention', p), p.get('sliding_attention', {})
    scaling = {k: x for k, x in full.items() if k != 'rope_theta'}
    out = {'rope_theta': full.get('rope_theta'), 'rope_local_base_freq': local.get('rope_theta')}
    out['rope_scaling'] = scaling if scaling.get('rope_type', 'default') != 'default' else None
    return {k: x for k, x in out.items() if x is not None}


def table(c: TransformerConfig, has_leaf: Callable[[str], bool], mxfp4: bool = False) -> tuple[Tensor, ...]:
    """Rows of the leaves that this model has; experts from MXFP4 tensors where the checkpoint holds those."""
    rows = FAMILIES[c.family].table
    if c.n_experts:
        experts = tensors.MXFP4_EXPERTS if mxfp4 else tensors.DENSE_EXPERTS
        rows += tensors.PACKED_EXPERTS if c.packed else experts
    return tuple(t for t in rows if has_leaf(t.path))
