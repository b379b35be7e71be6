"""Lenses as others write them, made with transformers and safetensors alone, and what PyTorch says that they do."""

import json
import pathlib

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
import yaml

from tests import hf_models

MARKER, BOS, ORACLE = '㈎', '<|bos|>', ' ?'
LAYER, BLOCKS, SCALE = 1, 4, 7.5
AV = 'Say <concept>{injection_char}</concept> now.'
AR = 'Of <text>{explanation}</text> <summary>'
CHAT = '{{ bos_token }}{% for m in messages %}<|u|>{{ m.content }}{% endfor %}<|a|>'
CHAT += '{% if enable_thinking is defined and not enable_thinking %}-{% endif %}'
PROMPT = f'{BOS}<|u|>Say <concept>{MARKER}</concept> now.<|a|>'
SPECIAL = (BOS, '<|u|>', '<|a|>')
WHOLE = (*SPECIAL, MARKER, ORACLE)  # tokens 256..260; a byte is one of 0..255


def _visible() -> dict[int, str]:
    """The letter of each byte, by the published table of GPT-2."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {b: chr(b) if b in plain else chr(next(others)) for b in range(256)}


LETTERS = _visible()
BYTES = {b: sorted(LETTERS.values()).index(c) for b, c in LETTERS.items()}


def ids(text: str) -> list[int]:
    """What the tokenizer makes of a text, by hand."""
    out = []
    while text:
        whole = next((i for i, t in enumerate(WHOLE) if text.startswith(t)), None)
        out += [BYTES[b] for b in text[0].encode()] if whole is None else [256 + whole]
        text = text[1 if whole is None else len(WHOLE[whole]) :]
    return out


def tokenizer(directory: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    """A byte is a token, the marker is one, a text begins with BOS: no text merges with its neighbours."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({LETTERS[b]: i for b, i in BYTES.items()}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([*SPECIAL])
    inner.add_tokens([MARKER, ORACLE])
    inner.post_processor = tokenizers.processors.TemplateProcessing(f'{BOS} $A', None, [(BOS, 256)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, chat_template=CHAT)
    made.save_pretrained(directory)
    return made


def model(directory: pathlib.Path, seed: int, family: str = 'qwen2', blocks: int = BLOCKS):
    """A random model, written; 261 tokens, d 48."""
    sizes = {'vocab_size': 261, 'max_position_embeddings': 512, 'num_hidden_layers': blocks, 'max_window_layers': 2}
    sizes |= {'sliding_window': 40}  # the last token of a prompt sees its slot, also where that is filled after block 1
    return hf_models.build(family, directory, seed, **sizes)


def encoder(directory: pathlib.Path, seed: int, bias: bool = False):
    """A random reconstructor of LAYER + 1 blocks without final norm and head; returns reconstruct(ids) -> d."""
    made = model(directory, seed, blocks=LAYER + 1)
    made.model.norm, made.lm_head = torch.nn.Identity(), torch.nn.Identity()
    for file in directory.iterdir():
        file.unlink()
    made.save_pretrained(directory)
    rng = torch.Generator().manual_seed(seed + 1)
    head = torch.nn.Linear(48, 48, bias=bias)
    head.weight.data = torch.eye(48) + 0.3 * torch.randn(48, 48, generator=rng)
    safetensors.torch.save_file(dict(head.state_dict()), directory / 'value_head.safetensors')
    return lambda tokens: head(last(made, tokens)).detach().numpy()


@torch.no_grad()
def last(made, tokens) -> torch.Tensor:
    """The stream after the last block, before any norm, at the last token."""
    return torch.tensor(hf_models.forward(made, [tokens])[1][-1][0, -1])


@torch.no_grad()
def logits(made, row: list[int], at: int | list[int], vector, family: str = 'replace') -> np.ndarray:
    """Logits after a row whose token `at` carries the vector, or whose tokens carry one each."""
    at, v = [*np.atleast_1d(at)], torch.tensor(np.atleast_2d(vector))
    v = v / v.norm(dim=-1, keepdim=True)

    def add(k, x):
        if k == 1:
            x[:, at] += x[:, at].norm(dim=-1, keepdim=True) * v
        return x

    embeds = made.get_input_embeddings().weight[row][None].clone()
    if family == 'replace':
        embeds[:, at] = v * SCALE
    return hf_models.forward(made, embeds=embeds.numpy(), after=add if family == 'add' else None)[0][0, -1]


def said(made, prompt: list[int], at: int, vector, n: int) -> list[int]:
    """n greedy tokens of a verbalizer after its prompt, whose token `at` carries the vector."""
    row = [*prompt]
    for _ in range(n):
        row.append(int(logits(made, row, at, vector).argmax()))
    return row[len(prompt) :]


def beside(role: str, /, **changes) -> dict:
    """A good sidecar of version 2; changes: by dotted key with _ _ for the dot, None removes one."""
    prompt = ids(PROMPT)
    at = prompt.index(259)
    content = {
        'kind': 'nla_model',
        'schema_version': 2,
        'role': role,
        'stage': 'rl',
        'base_checkpoint': 'somebody/a-model',
        'd_model': 48,
        'extraction': {'injection_scale': SCALE, 'mse_scale': 6.928203230275509},
        'tokens': {
            'injection_char': MARKER,
            'injection_token_id': 259,
            'injection_left_neighbor_id': prompt[at - 1],
            'injection_right_neighbor_id': prompt[at + 1],
            'critic_suffix_ids': ids('</text> <summary>')[1:],
        },
        'prompt_templates': {'av': AV, 'ar': AR},
        'extraction_layer_index': LAYER,
    }
    for key, value in changes.items():
        *path, name = key.split('__')
        part = content
        for step in path:
            part = part.setdefault(step, {})
        part[name] = value
        if value is None:
            del part[name]
    return content


def write_sidecar(directory: pathlib.Path, content: dict) -> None:
    (directory / 'nla_meta.yaml').write_text(yaml.safe_dump(content, sort_keys=False), 'utf-8')


def write_pair(root: pathlib.Path, **changes) -> pathlib.Path:
    """Writes subject/ with its tokenizer, pair/av and pair/ar, whole models as kitft releases them. changes: as of beside."""
    model(root / 'subject', 0)
    tokenizer(root / 'subject')
    (root / 'pair').mkdir()
    model(root / 'pair/av', 1)
    encoder(root / 'pair/ar', 2)
    for role in ('av', 'ar'):
        write_sidecar(root / 'pair' / role, beside(role, **changes))
    return root


def adapters(made, rank: int, seed: int, matrices: tuple[str, ...], blocks: int, scale: float) -> dict:
    """Random low-rank factors by name of their matrix, B not zero, and adds their product to `made`."""
    rng, out = torch.Generator().manual_seed(seed), {}
    for name, linear in made.named_modules():
        parts = name.split('.')
        if parts[-1] in matrices and int(parts[parts.index('layers') + 1]) < blocks:
            a = torch.randn(rank, linear.in_features, generator=rng) * linear.in_features**-0.5
            b = torch.randn(linear.out_features, rank, generator=rng)
            linear.weight.data += scale * b @ a
            out |= {f'{name}.lora_A': a, f'{name}.lora_B': b}
    return out


def write_peft(directory: pathlib.Path, factors: dict, **config) -> None:
    directory.mkdir(exist_ok=True)
    about = {'peft_type': 'LORA', 'bias': 'none', 'use_dora': False, 'modules_to_save': None, 'rank_pattern': {}}
    (directory / 'adapter_config.json').write_text(json.dumps(about | config))
    stored = {f'base_model.model.{k}.weight': x for k, x in factors.items()}
    safetensors.torch.save_file(stored, directory / 'adapter_model.safetensors')


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((n, 48))).astype(np.float32)
