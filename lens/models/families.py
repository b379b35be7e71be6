"""What a model family is: how its config.json is read and edited, and which tensor table it has.

A family is facts only; the stack is one. `FAMILIES` maps model_type to a Family.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from lens.errors import LensError, number, shown
from lens.models import tensors
from lens.models.rope import Rope
from lens.models.tensors import Tensor
from lens.models.transformer import TransformerConfig

TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
# Keys whose null says that a model has none of it; any other null is a key left out.
NULLABLE = ('sliding_window', 'attn_logit_softcapping', 'final_logit_softcapping')
# Field of TransformerConfig -> key of config.json.
KEYS = {
    'vocab_size': 'vocab_size',
    'd_model': 'hidden_size',
    'n_layers': 'num_hidden_layers',
    'n_heads': 'num_attention_heads',
    'n_kv_heads': 'num_key_value_heads',
    'head_dim': 'head_dim',
    'd_ff': 'intermediate_size',
    'norm_eps': 'rms_norm_eps',
    'tied': 'tie_word_embeddings',
    'max_positions': 'max_position_embeddings',
}
GPT2_KEYS = {
    'vocab_size': 'vocab_size',
    'd_model': 'n_embd',
    'n_layers': 'n_layer',
    'n_heads': 'n_head',
    'd_ff': 'n_inner',
    'norm_eps': 'layer_norm_epsilon',
    'tied': 'tie_word_embeddings',
    'max_positions': 'n_positions',
}
ROPES = ('default', 'linear', 'llama3', 'yarn')
MLPS = {'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu'}  # activation -> TransformerConfig.mlp
LAYER_TYPES = ('sliding_attention', 'full_attention')
DTYPES = ('float64', 'float32', 'float16', 'bfloat16', 'auto')
UNQUANTISED = 'give a copy of the model with weights in bfloat16, float16 or float32'


class Number(NamedTuple):
    """The numbers that a key may have; its bounds lie far beyond every published model."""

    least: float
    most: float
    whole: bool = True


SIZE, COUNT, LENGTH, TOKEN = Number(1, 10**6), Number(1, 10**4), Number(1, 10**9), Number(-1, 10**9)
POSITIVE = Number(1e-6, 1e12, whole=False)
# What the keys of a config.json may hold, nested ones too; keys that are not here are not read.
KINDS = {
    **dict.fromkeys(('hidden_size', 'n_embd', 'intermediate_size', 'n_inner', 'head_dim'), SIZE),
    **dict.fromkeys(('num_hidden_layers', 'n_layer', 'num_attention_heads', 'n_head', 'num_key_value_heads'), COUNT),
    **dict.fromkeys(('num_local_experts', 'num_experts', 'num_experts_per_tok', 'experts_per_token'), COUNT),
    **dict.fromkeys(('sliding_window_pattern', '_sliding_window_pattern'), COUNT),
    **dict.fromkeys(('max_position_embeddings', 'n_positions', 'sliding_window'), LENGTH),
    **dict.fromkeys(('original_max_position_embeddings', 'initial_context_length'), LENGTH),
    'vocab_size': Number(1, 10**7),
    'max_window_layers': Number(0, 10**4),
    **dict.fromkeys(('rms_norm_eps', 'layer_norm_epsilon'), Number(0, 1, whole=False)),
    **dict.fromkeys(('rope_theta', 'rope_local_base_freq'), Number(2, 1e15, whole=False)),
    **dict.fromkeys(('low_freq_factor', 'high_freq_factor', 'beta_fast', 'beta_slow', 'attention_factor'), POSITIVE),
    **dict.fromkeys(('query_pre_attn_scalar', 'attn_logit_softcapping', 'final_logit_softcapping'), POSITIVE),
    'factor': Number(1, 1e6, whole=False),
    **dict.fromkeys(TOKEN_IDS, TOKEN),
    **dict.fromkeys(('tie_word_embeddings', 'attention_bias', 'mlp_bias', 'use_sliding_window', 'truncate'), bool),
    **dict.fromkeys(('scale_attn_weights', 'scale_attn_by_inverse_layer_idx'), bool),
    **dict.fromkeys(('model_type', 'rope_type', 'type', 'quant_method'), str),
    **dict.fromkeys(('hidden_act', 'hidden_activation', 'activation_function', 'dtype', 'torch_dtype'), str),
    **dict.fromkeys(('text_config', 'rope_parameters', 'rope_scaling', *LAYER_TYPES), dict),
    **dict.fromkeys(('quantization_config', 'compression_config'), dict),
    'layer_types': list,
}
NAMES = {bool: 'true or false', str: 'a text', dict: 'an object', list: 'a list'}


def _refuse_unless(ok: bool, what: str) -> None:
    if not ok:
        raise LensError(f'{what}.')


def _checked(config: dict, within: str = '') -> dict:
    """A copy without the nulls that say nothing. Raises LensError for a known key with a value that it cannot have."""
    out = {k: x for k, x in config.items() if x is not None or k in NULLABLE}
    for key, x in out.items():
        kind, name = KINDS.get(key, object), f'{within}{key}'
        if isinstance(kind, Number):
            for one in x if isinstance(x, list) and key in TOKEN_IDS else [x]:
                number(one if one is not None else kind.least, name, kind.least, kind.most, whole=kind.whole)
        else:
            _refuse_unless(isinstance(x, kind), f'{name}={shown(repr(x), 60)} must be {NAMES.get(kind)}')
        if kind is dict:
            out[key] = _checked(x, f'{name}.')
    return out


def _not_quantised(config: dict) -> None:
    """Raises LensError for weights in a format of few bits, but for gpt-oss's own MXFP4."""
    for key in ('quantization_config', 'compression_config'):
        said = config.get(key)
        if not said or (said.get('quant_method') == 'mxfp4' and config['model_type'] == 'gpt_oss'):
            continue
        method = said.get('quant_method') or ('bitsandbytes' if any(k.startswith('load_in_') for k in said) else key)
        _refuse_unless(
            False, f'the weights are quantised by {shown(method, 40)}, which is not supported: {UNQUANTISED}'
        )
    for key in ('dtype', 'torch_dtype'):
        dtype = config.get(key, DTYPES[0])
        known = dtype.removeprefix('torch.') in DTYPES
        _refuse_unless(known, f'{key}={shown(repr(dtype), 40)} is not supported: {UNQUANTISED}')


def _rope(p: dict, theta: float, max_positions: int = 0) -> Rope:
    """One table from rope_parameters (or the older rope_scaling); theta: where p has none."""
    kind = p.get('rope_type', p.get('type', 'default'))
    _refuse_unless(p.keys().isdisjoint(LAYER_TYPES), 'rotary tables by layer type are not supported')
    _refuse_unless(kind in ROPES, f'rope_type {shown(repr(kind), 60)} is not supported; supported: {", ".join(ROPES)}')
    _refuse_unless(p.get('partial_rotary_factor', 1.0) == 1.0, 'partial_rotary_factor is not supported; supported: 1')
    _refuse_unless(not p.get('mscale'), 'rope mscale is not supported')
    theta = float(p.get('rope_theta') or theta)
    if kind == 'default':
        return Rope(theta)
    factor, own = float(p['factor']), {}
    if kind == 'llama3':
        own = {k: float(p[k]) for k in ('low_freq_factor', 'high_freq_factor')}
        _refuse_unless(
            own['low_freq_factor'] < own['high_freq_factor'], 'low_freq_factor is not below high_freq_factor'
        )
    if kind == 'yarn':
        # sin and cos grow with the logarithm of the factor unless the file says otherwise
        attention = p.get('attention_factor') or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
        own = {'beta_fast': float(p.get('beta_fast') or 32), 'beta_slow': float(p.get('beta_slow') or 1)}
        own |= {'truncate': bool(p.get('truncate', True)), 'attention_factor': float(attention)}
    return Rope(theta, kind, factor, int(p.get('original_max_position_embeddings') or max_positions), **own)


def _windows(config: dict, default_types: Callable[[int], bool]) -> tuple[int, ...]:
    """Window of every layer: layer_types where given, else the family's default (True = sliding)."""
    n, types = config['num_hidden_layers'], config.get('layer_types')
    sliding = [t == LAYER_TYPES[0] for t in types] if types else [default_types(i) for i in range(n)]
    _refuse_unless(len(sliding) == n, f'layer_types has {len(sliding)} entries for {n} layers')
    other = [t for t in types or () if t not in LAYER_TYPES]
    _refuse_unless(not other, f'layer_types has {shown(other[:1], 60)}; supported: {", ".join(LAYER_TYPES)}')
    return tuple((config['sliding_window'] or 0) if s else 0 for s in sliding)


def _per_head(width: int, heads: int) -> int:
    _refuse_unless(width % heads == 0, f'a width of {width} cannot be split into {heads} heads')
    return width // heads


def _common(config: dict, activation: str = 'hidden_act') -> dict:
    """Fields that every family but GPT-2 names alike; activation: key of that of the MLP."""
    act, heads = config[activation], config['num_attention_heads']
    _refuse_unless(act in MLPS, f'{activation} {shown(repr(act), 60)} is not supported; supported: {", ".join(MLPS)}')
    head_dim = config.get('head_dim') or _per_head(config['hidden_size'], heads)
    sizes = {'num_key_value_heads': heads, 'head_dim': head_dim} | config
    tables = [config[k] for k in ('rope_parameters', 'rope_scaling') if config.get(k)] or [{}]
    ropes = {_rope(p, config['rope_theta'], config['max_position_embeddings']) for p in tables}
    _refuse_unless(len(ropes) == 1, 'rope_parameters and rope_scaling differ: remove the one that is not meant')
    return {
        **{field: sizes[key] for field, key in KEYS.items()},
        'ropes': tuple(ropes),
        'qkv_bias': bool(config['attention_bias']),
        'o_bias': bool(config['attention_bias']),
        'mlp_bias': bool(config.get('mlp_bias')),
        'mlp': MLPS[act],
    }


def _qwen(config: dict) -> dict:
    sliding = config if config.get('use_sliding_window') else config | {'sliding_window': None}
    windows = _windows(sliding, lambda i: i >= config['max_window_layers'])
    if config['model_type'] == 'qwen3':
        return _common(config) | {'windows': windows, 'qk_norm': True}
    return _common(config) | {'windows': windows, 'qkv_bias': True, 'o_bias': False}  # whatever the file says


def _gemma(config: dict) -> dict:
    _refuse_unless(not config.get('use_bidirectional_attention'), 'use_bidirectional_attention is not supported')
    return _common(config, 'hidden_activation') | {
        'norm': 'rms_offset',
        'post_norms': True,
        'query_scale': config['query_pre_attn_scalar'] ** -0.5,
        'final_softcap': config.get('final_logit_softcapping') or 0.0,
        'embed_scale': config['hidden_size'] ** 0.5,
    }


def _gemma2(config: dict) -> dict:
    windows = _windows(config, lambda i: i % 2 == 0)
    return _gemma(config) | {'windows': windows, 'attn_softcap': config['attn_logit_softcapping'] or 0.0}


def _gemma3(config: dict) -> dict:
    """The text model; full layers have a rotary table of their own. The reference never applies a cap on
    the attention scores, whatever the file says."""
    period = config.get('sliding_window_pattern') or config.get('_sliding_window_pattern') or 6
    windows = _windows(config, lambda i: (i + 1) % period != 0)
    p = config.get('rope_parameters') or {}
    full, local = p.get('full_attention') or config.get('rope_scaling') or {}, p.get('sliding_attention') or {}
    return _gemma(config | {'rope_parameters': full}) | {
        'ropes': tuple(
            _rope(p, config[theta], config['max_position_embeddings'])
            for p, theta in ((full, 'rope_theta'), (local, 'rope_local_base_freq'))
        ),
        'layer_rope': tuple(int(w > 0) for w in windows),
        'windows': windows,
        'qk_norm': True,
    }


def _gpt_oss(config: dict) -> dict:
    _refuse_unless(config.get('swiglu_alpha', 1.702) == 1.702, 'swiglu_alpha must be 1.702')
    _refuse_unless(config.get('swiglu_limit', 7.0) == 7.0, 'swiglu_limit must be 7')
    original = config.get('initial_context_length', 4096)
    yarn = {'rope_type': 'yarn', 'factor': 32.0, 'truncate': False, 'original_max_position_embeddings': original}
    rope = config.get('rope_parameters') or config.get('rope_scaling') or yarn
    return _common(config | {'rope_parameters': rope}) | {
        'windows': _windows(config, lambda i: i % 2 == 0),
        'sinks': True,
        'n_experts': config.get('num_local_experts') or config['num_experts'],
        'top_k': config.get('num_experts_per_tok') or config.get('experts_per_token') or 4,
    }


def _gpt2(config: dict) -> dict:
    act = config['activation_function']
    _refuse_unless(
        act == 'gelu_new', f'activation_function {shown(repr(act), 60)} is not supported; supported: gelu_new'
    )
    for key, value in (('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False)):
        _refuse_unless(config.get(key, value) == value, f'{key}={config.get(key)} is not supported')
    sizes = {'n_inner': 4 * config['n_embd']} | config
    return {
        **{field: sizes[key] for field, key in GPT2_KEYS.items()},
        'n_kv_heads': config['n_head'],
        'head_dim': _per_head(config['n_embd'], config['n_head']),
        'ropes': (),
        'norm': 'layer',
        **dict.fromkeys(('qkv_bias', 'o_bias', 'mlp_bias'), True),
        'mlp': 'gelu_plain',
    }


class Family(NamedTuple):
    """architecture: the class that transformers loads. read: config.json to the fields of a TransformerConfig but
    `family`. table: all rows that a member may have. defaults: of the keys that a config.json may leave out, as in
    transformers. prefix: of the names in a causal language model's checkpoint; the head has none."""

    architecture: str
    read: Callable[[dict], dict]
    table: tuple[Tensor, ...]
    defaults: dict
    prefix: str = 'model.'
    keys: dict[str, str] = KEYS


GPT2 = {'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True, 'n_positions': 1024}
LLAMA = {
    'hidden_act': 'silu',
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': False,
    'max_position_embeddings': 2048,
    'rope_theta': 10000.0,
    'attention_bias': False,
}
QWEN2 = LLAMA | {'sliding_window': 4096, 'max_window_layers': 28}
QWEN3 = QWEN2 | {'head_dim': 128}
GEMMA2 = LLAMA | {
    'hidden_activation': 'gelu_pytorch_tanh',
    'tie_word_embeddings': True,
    'max_position_embeddings': 8192,
    'head_dim': 256,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
}
GEMMA3 = GEMMA2 | {
    'vocab_size': 262208,
    'max_position_embeddings': 131072,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'final_logit_softcapping': None,
    'rope_theta': 1e6,
    'rope_local_base_freq': 1e4,
}
GPT_OSS = LLAMA | {
    'rms_norm_eps': 1e-5,
    'max_position_embeddings': 131072,
    'rope_theta': 150000.0,
    'attention_bias': True,
    'head_dim': 64,
    'sliding_window': 128,
}
FAMILIES = {
    'gpt2': Family('GPT2LMHeadModel', _gpt2, tensors.GPT2, GPT2, 'transformer.', GPT2_KEYS),
    'llama': Family('LlamaForCausalLM', _common, tensors.LLAMA, LLAMA),
    'qwen2': Family('Qwen2ForCausalLM', _qwen, tensors.LLAMA, QWEN2),
    'qwen3': Family('Qwen3ForCausalLM', _qwen, tensors.LLAMA, QWEN3),
    'gemma2': Family('Gemma2ForCausalLM', _gemma2, tensors.GEMMA, GEMMA2),
    'gemma3_text': Family('Gemma3ForCausalLM', _gemma3, tensors.GEMMA, GEMMA3),
    'gpt_oss': Family('GptOssForCausalLM', _gpt_oss, tensors.GPT_OSS, GPT_OSS),
}


def _text_model(config: dict) -> dict:
    """A copy; of the text model alone where it is nested in a multimodal one (Gemma-3)."""
    if config.get('model_type') != 'gemma3':
        return dict(config)
    outer = {k: config[k] for k in (*TOKEN_IDS, 'quantization_config') if k in config}
    tied = {'tie_word_embeddings': config.get('tie_word_embeddings', True)}
    return tied | dict(config.get('text_config') or {}) | outer | {'model_type': 'gemma3_text'}


def from_hf(config: dict) -> TransformerConfig:
    """Reads a config.json; the text model where it is nested in a multimodal one.

    Raises LensError, which names no file: for what this version cannot run, for a key that must be there, for a value
    that a key cannot have.
    """
    config = _text_model(_checked(config))
    family = config.get('model_type')
    known = f'model_type {shown(repr(family), 60)} is not supported; supported: {", ".join(FAMILIES)}'
    _refuse_unless(family in FAMILIES, known)
    _not_quantised(config)
    try:
        c = TransformerConfig(family, **FAMILIES[family].read(FAMILIES[family].defaults | config))
    except KeyError as e:
        raise LensError(f'it has no key {e}.') from None
    _refuse_unless(c.n_heads % c.n_kv_heads == 0, f'{c.n_heads} heads cannot share {c.n_kv_heads} key-value heads')
    _refuse_unless(not c.ropes or c.head_dim % 2 == 0, f'head_dim={c.head_dim} is odd: rotary positions turn pairs')
    _refuse_unless(c.top_k <= c.n_experts, f'num_experts_per_tok={c.top_k} is more than the {c.n_experts} experts')
    return c


def edited(config: dict, c: TransformerConfig, dtype: str) -> dict:
    """Edits the config.json of a model's source, or of a relative, in what differs; dtype: of the stored weights.

    Raises LensError where more differs than KEYS.
    """
    theirs, out = from_hf(config), _text_model(config)
    keys = FAMILIES[theirs.family].keys
    out |= {key: getattr(c, k) for k, key in keys.items() if getattr(theirs, k) != getattr(c, k)}
    if out.get('layer_types'):
        out['layer_types'] = out['layer_types'][: c.n_layers]
    if not c.packed:
        out.pop('quantization_config', None)
    out.pop('torch_dtype', None)
    out |= {'architectures': [FAMILIES[c.family].architecture], 'dtype': dtype}
    out |= _older_ropes(out.get('rope_parameters') or {})

    def facts(c: TransformerConfig) -> dict:  # how the model is run is none of its facts
        whole = {k: (getattr(c, k) * c.n_layers)[: c.n_layers] for k in ('windows', 'layer_rope')}
        return dataclasses.asdict(dataclasses.replace(c, remat='', experts='', packed=False, compute='', **whole))

    told, model = facts(from_hf(out)), facts(c)
    differing = ', '.join(k for k in model if told[k] != model[k])
    _refuse_unless(not differing, f'it describes another model than the one to save ({differing} differ)')
    return out


def _older_ropes(p: dict) -> dict:
    """What transformers 4 and other programs read in place of rope_parameters; without it they take the usual theta."""
    full, local = p.get('full_attention') or p, p.get('sliding_attention') or {}
    out = {'rope_theta': full.get('rope_theta'), 'rope_local_base_freq': local.get('rope_theta')}
    if full.get('rope_type', 'default') != 'default':
        out['rope_scaling'] = {k: x for k, x in full.items() if k != 'rope_theta'}
    return {k: x for k, x in out.items() if x is not None}


def table(c: TransformerConfig, has_leaf: Callable[[str], bool], mxfp4: bool = False) -> tuple[Tensor, ...]:
    """Picks the rows of the leaves that this model has; experts from MXFP4 tensors where the checkpoint holds those."""
    rows = FAMILIES[c.family].table
    if c.n_experts:
        experts = tensors.MXFP4_EXPERTS if mxfp4 else tensors.DENSE_EXPERTS
        rows += tensors.PACKED_EXPERTS if c.packed else experts
    return tuple(t for t in rows if has_leaf(t.path))
