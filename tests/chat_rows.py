"""Chats as rows, and a tokenizer whose roles can be counted by hand."""

import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_gen import render

NAMES = {code: name for name, code in render.ROLES.items()}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def letters(template=CHATML, specials=('<|im_start|>', '<|im_end|>', '<|pad|>')):
    """A byte-level tokenizer without merges: every letter is a token, so that roles can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token='<|pad|>')
    tokenizer.add_special_tokens({'additional_special_tokens': list(specials)})
    tokenizer.chat_template = template
    return tokenizer


def trained(kind: str):
    """A tokenizer that cuts words in pieces, as GPT-2 does or as sentencepiece does, bytes where it has no letter."""
    gpt2 = kind == 'gpt2'
    backend = Tokenizer(models.BPE())
    metaspace = pre_tokenizers.Metaspace(prepend_scheme='first')
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if gpt2 else metaspace
    known = pre_tokenizers.ByteLevel.alphabet() if gpt2 else sorted('▁abcdefghijklmnopqrstuvwxyzTZ')
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=known, show_progress=False)
    backend.train_from_iterator(['the volcanoes and the words of ashes fell on them two by two'] * 9, trainer)
    if not gpt2:
        model = json.loads(backend.to_str())['model']
        vocab = model['vocab'] | {f'<0x{i:02X}>': len(model['vocab']) + i for i in range(256)}
        backend.model = models.BPE(vocab, [tuple(m) for m in model['merges']], byte_fallback=True)
    plain = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    backend.decoder = decoders.ByteLevel() if gpt2 else decoders.Sequence(plain)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token='<|pad|>')
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>']})
    return tokenizer


def renderer(tokenizer=None, seq_len=4096, truncate='right', chats=True, **more):
    return render.Renderer(
        tokenizer or letters(**more), seq_len=seq_len, truncate=truncate, date='2025-06-28', chats=chats
    )


def runs(tokenizer, encoded):
    """[(role, text)] of what encode gives, neighbours of one role joined."""
    ids, roles, *_ = encoded
    cuts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(roles)) + 1)
    return [(NAMES[int(roles[c[0]])], tokenizer.decode(ids[c])) for c in cuts]


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text, thinking=None):
    return {'role': 'assistant', 'content': text} | ({'thinking': thinking} if thinking else {})


def jsonl(path, rows):
    path.write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows))
    return path


def chats(n):
    return [{'messages': [user(f'Where is rabbit {i}?'), assistant(f'In meadow {i}.', 'A rabbit.')]} for i in range(n)]


def talk(i: int, pairs: int = 1, question: str = 'Tell me a story') -> list[dict]:
    return [user(f'{question} {i}.'), assistant(f'Old answer {i}.')] * pairs
