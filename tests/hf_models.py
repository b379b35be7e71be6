"""Random tiny Hugging Face models of every family, and torch forwards that can be watched and edited.

No two dimensions are equal and no parameter is at a neutral value, so that a wrong axis, a forgotten
norm, bias, sink, window or cap shows in the logits.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import transformers

from lens import hf
from lens.models.transformer import Transformer

torch.set_num_threads(1)  # tiny matrices, and a process on every core
WINDOW = 4
EAGER = {'dtype': torch.float32, 'attn_implementation': 'eager', 'experts_implementation': 'eager'}
SLIDING, FULL = 'sliding_attention', 'full_attention'
COMMON = {
    'vocab_size': 97,
    'hidden_size': 48,
    'intermediate_size': 40,
    'num_hidden_layers': 6,
    'num_attention_heads': 6,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
    'rms_norm_eps': 1e-2,  # large enough to matter
    'pad_token_id': None,
    'bos_token_id': None,
    'eos_token_id': None,
}
WIDE = COMMON | {'head_dim': 16}
PLAIN_ROPE = {'rope_type': 'default', 'rope_theta': 500.0}
LLAMA3_ROPE = {
    'rope_type': 'llama3',
    'rope_theta': 500.0,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 32,
}
LINEAR_ROPE = {'rope_type': 'linear', 'rope_theta': 500.0, 'factor': 4.0}
# As published but for the base, the fast bound and the original length: the ramp of 8 frequencies has a middle.
YARN_ROPE = {
    'rope_type': 'yarn',
    'rope_theta': 150.0,
    'factor': 32.0,
    'beta_fast': 2.0,
    'beta_slow': 1.0,
    'truncate': False,
    'original_max_position_embeddings': 16,
}
GEMMA = WIDE | {'query_pre_attn_scalar': 9, 'sliding_window': WINDOW}
GEMMA3 = GEMMA | {
    'layer_types': [SLIDING, SLIDING, FULL, SLIDING, FULL, FULL],
    'rope_parameters': {
        SLIDING: {'rope_type': 'default', 'rope_theta': 100.0},
        FULL: {'rope_type': 'linear', 'rope_theta': 5000.0, 'factor': 8.0},
    },
}
VISION = {
    'hidden_size': 8,
    'intermediate_size': 12,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'image_size': 4,
    'patch_size': 2,
    'vision_use_head': False,
}
# family -> (class stem in transformers, config)
FAMILIES = {
    'gpt2': (
        'GPT2',
        {
            'vocab_size': 97,
            'n_embd': 48,
            'n_inner': 40,
            'n_layer': 6,
            'n_head': 6,
            'n_positions': 64,
            'layer_norm_epsilon': 1e-2,
            'bos_token_id': None,
            'eos_token_id': None,
        },
    ),
    'llama': ('Llama', WIDE | {'rope_parameters': PLAIN_ROPE}),
    'llama3': ('Llama', WIDE | {'rope_parameters': LLAMA3_ROPE}),
    'llama_linear': ('Llama', WIDE | {'rope_parameters': LINEAR_ROPE}),
    'qwen2': (
        'Qwen2',
        COMMON
        | {
            'rope_parameters': PLAIN_ROPE,
            'use_sliding_window': True,
            'sliding_window': WINDOW,
            'max_window_layers': 4,
        },
    ),
    'qwen3': ('Qwen3', WIDE | {'rope_parameters': PLAIN_ROPE}),
    'gemma2': (
        'Gemma2',
        GEMMA
        | {
            'layer_types': [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
            'rope_parameters': PLAIN_ROPE,
            'attn_logit_softcapping': 5.0,
            'final_logit_softcapping': 3.0,
        },
    ),
    'gemma3_text': ('Gemma3', GEMMA3),
    'gemma3': ('Gemma3', {'text_config': GEMMA3, 'vision_config': VISION, 'mm_tokens_per_image': 4}),
    'gpt_oss': (
        'GptOss',
        WIDE
        | {
            'num_local_experts': 5,
            'num_experts_per_tok': 2,
            'sliding_window': WINDOW,
            'rope_parameters': YARN_ROPE,
            'max_position_embeddings': 512,  # factor times original length
        },
    ),
}
# One of each kind of stack; the others differ in a rotary table or in the names in the file.
DISTINCT = ('gpt2', 'llama', 'qwen2', 'qwen3', 'gemma2', 'gemma3_text', 'gpt_oss')
GAINS = {'q_proj': 1.5, 'k_proj': 1.5, 'gate_up_proj': 4.0, 'down_proj': 0.5, 'o_proj': 0.7, 'c_proj': 0.7}


class Pair(NamedTuple):
    """One random model twice."""

    directory: pathlib.Path
    torch: 'transformers.PreTrainedModel'
    jax: Transformer

    def logits(self, ids) -> np.ndarray:
        return forward(self.torch, ids)[0]


def pairs(root: pathlib.Path):
    """pair(family, **changes) -> Pair; each is built once, in a directory of its own below `root`."""

    @functools.cache
    def pair(family: str, **changes):
        directory = root / '-'.join([family, *map(str, changes.values())])
        return Pair(directory, build(family, directory, **changes), hf.load_model(directory))

    return pair


def build(family: str, directory, seed: int = 0, **changes):
    """Writes a random model of `family` to `directory`; returns it (float32, eval, eager attention)."""
    stem, config = FAMILIES[family]
    model = _random(stem, config | changes, seed)
    model.save_pretrained(directory)
    return model


def load(directory):
    """The model of a directory as transformers reads it (float32, eval, eager attention)."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **EAGER).eval()


def altered(model, **changes):
    """A copy of a model (not the wrapped gemma3) with the same weights and another config."""
    config = model.config.to_dict() | changes
    copy = type(model)._from_config(type(model.config)(**config), **EAGER)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def mxfp4(directory, seed: int = 0):
    """Writes a gpt-oss directory with packed experts; returns the dequantised model.

    Every byte of the blocks is drawn, so all 16 codes occur; scales differ from block to block.
    """
    size = {'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 3}
    model = _random('GptOss', FAMILIES['gpt_oss'][1] | size, seed)
    tensors = {}
    unpacked = transformers.integrations.mxfp4.convert_moe_packed_tensors
    rng = torch.Generator().manual_seed(seed)
    for name, w in model.named_parameters():
        if w.ndim != 3:  # no expert matrix: bfloat16, as published
            tensors[name] = w.data.to(torch.bfloat16)
            w.data = tensors[name].float()
            continue
        experts, n_in, n_out = w.shape
        shape = (experts, n_out, n_in // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=rng)
        low = 122 if 'gate_up' in name else 118
        scales = torch.randint(low, low + 4, shape, dtype=torch.uint8, generator=rng)
        w.data = unpacked(blocks, scales, dtype=torch.float32)
        tensors |= {f'{name}_blocks': blocks, f'{name}_scales': scales}
    directory.mkdir()
    safetensors.torch.save_file(tensors, directory / 'model.safetensors', metadata={'format': 'pt'})
    skipped = ['model.layers.*.self_attn', 'model.layers.*.mlp.router', 'model.embed_tokens', 'lm_head']
    config = model.config.to_dict() | {
        'architectures': ['GptOssForCausalLM'],
        'dtype': 'bfloat16',
        'quantization_config': {'quant_method': 'mxfp4', 'modules_to_not_convert': skipped},
    }
    (directory / 'config.json').write_text(json.dumps(config))
    return model


def _random(stem, config, seed):
    if 'vision_config' in config:
        kind, config = 'ForConditionalGeneration', getattr(transformers, f'{stem}Config')(**config)
    else:
        kind = 'LMHeadModel' if stem == 'GPT2' else 'ForCausalLM'
        config_class = f'{stem}TextConfig' if stem == 'Gemma3' else f'{stem}Config'
        config = getattr(transformers, config_class)(**config)
    model = getattr(transformers, stem + kind)._from_config(config, **EAGER)
    rng = torch.Generator().manual_seed(seed)
    gemma = stem.startswith('Gemma')
    for name, w in model.named_parameters():
        w.data = _draw(name, w, gemma, rng)
    return model.eval()


def _draw(name, w, gemma, rng):
    """A random value for one parameter: attention scores of a few units, logits of a few units."""
    x = torch.randn(w.shape, generator=rng)
    owner = name.split('.')[-2]
    if name.endswith('bias'):
        return 0.3 * x
    if name.endswith('sinks'):
        return 3 * x
    if w.ndim == 1:  # a norm; Gemma's are around 0
        return 0.3 * x + (0.4 if owner in ('q_norm', 'k_norm') else 0.0) + (0.0 if gemma else 1.0)
    if 'embed' in name or owner in ('wte', 'wpe'):
        return (0.2 if gemma else 0.5) * x
    stored_in_first = w.ndim == 3 or owner.startswith('c_')
    fan_in = w.shape[-2] if stored_in_first else w.shape[-1]
    x = x * fan_in**-0.5 * GAINS.get(owner if owner != 'experts' else name.split('.')[-1], 1.0)
    if owner == 'c_attn':
        x[:, : 2 * w.shape[0]] *= 1.5
    return x


def blocks(model):
    """The decoder blocks of a torch model."""
    body = model.base_model
    body = getattr(body, 'language_model', body)
    return body.h if hasattr(body, 'h') else body.layers


@torch.no_grad()
def forward(model, ids=None, *, embeds=None, before=None, after=None):
    """(logits, streams): streams[k] enters block k, streams[n_layers] leaves the last one, unnormed.

    before(k, x) and after(k, x) return what enters and what leaves block k instead of x. embeds: the
    model's inputs_embeds in place of ids.
    """
    streams = []

    def entering(k):
        def hook(_, args):
            x = args[0] if before is None else before(k, args[0].clone())
            streams.append(x.numpy())
            return (x, *args[1:])

        return hook

    def leaving(k):
        def hook(_, args, out):
            out = out if after is None else after(k, out.clone())
            if k == len(stack) - 1:
                streams.append(out.numpy())
            return out

        return hook

    stack, handles = blocks(model), []
    for k, block in enumerate(stack):
        handles += [block.register_forward_pre_hook(entering(k)), block.register_forward_hook(leaving(k))]
    try:
        inputs = {'input_ids': _tensor(ids)} if embeds is None else {'inputs_embeds': _tensor(embeds)}
        logits = model(**inputs, use_cache=False).logits.float().numpy()
    finally:
        for handle in handles:
            handle.remove()
    return logits, streams


def _tensor(x):
    x = np.asarray(x)
    return torch.tensor(x, dtype=torch.long if x.dtype.kind == 'i' else torch.float32)
