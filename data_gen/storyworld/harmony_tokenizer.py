"""The tokenizer directory of gpt-oss, rebuilt offline: python -m data_gen.storyworld.harmony_tokenizer --out=DIR

The vocabulary (o200k and the Harmony control tokens, 201088 rows with those that are reserved) comes out of the
package oss-harmony, which holds it; nothing is downloaded. 27 MB: made where it is needed, never committed.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from . import commands

    commands.harmony_tokenizer()

import os

from lens.errors import LensError

from . import tokenizer

VOCAB_SIZE = 201088  # rows of the model's tables; ids from 200019 on have no name in the tokenizer
PLAIN, NAMED = 199998, 200019  # first control token; first id without a name
BOS, PAD, EOS = '<|startoftext|>', '<|endoftext|>', '<|return|>'
PATTERN = '|'.join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r'\p{N}{1,3}',
        r' ?[^\s\p{L}\p{N}]+[\r\n/]*',
        r'\s*[\r\n]+',
        r'\s+(?!\S)',
        r'\s+',
    ]
)
# Harmony as the published template writes chats without tools; thinking of the last assistant turn alone.
CHAT_TEMPLATE = """
{{- '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\n' }}
{{- 'Knowledge cutoff: 2024-06\\nCurrent date: ' + strftime_now('%Y-%m-%d') }}
{{- '\\n\\nReasoning: ' + (reasoning_effort or 'medium') }}
{{- '\\n\\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>' }}
{%- for message in messages %}
  {%- if message['role'] in ('system', 'developer') %}
    {{- '<|start|>developer<|message|># Instructions\\n\\n' + message['content'] + '<|end|>' }}
  {%- elif message['role'] == 'assistant' %}
    {%- if message['thinking'] and loop.last %}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' + message['thinking'] + '<|end|>' }}
    {%- endif %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + message['content'] }}
    {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
  {%- else %}
    {{- '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""


def load_encoding():
    """Loads the Harmony encoding of oss-harmony. Raises LensError where the package is missing."""
    try:
        import openai_harmony
    except ImportError:
        raise LensError('The Harmony vocabulary needs a package: pip install oss-harmony.') from None
    return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that byte-pair encoding joins, in order, of tokens whose ids are their ranks."""
    out = []
    for token, rank in ranks.items():
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks]
        out += [(rank, *x) for x in sorted(known)]
    return [x[3:] for x in sorted(out, key=lambda x: x[:3])]


def _control_tokens(encoding) -> list[str]:
    """Names of the ids PLAIN..NAMED-1; an id with two names keeps the one that is not reserved."""
    names = {}
    for name in sorted(encoding.special_tokens_set, key=lambda n: not n.startswith('<|reserved')):
        names[encoding.encode(name, allowed_special='all')[0]] = name
    return [names.get(i, f'<|reserved_{i}|>') for i in range(PLAIN, NAMED)]


def build(directory: str | os.PathLike) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja; a few seconds. Raises LensError."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    encoding, letter = load_encoding(), bytes_to_unicode()
    ranks = {bytes(encoding._inner.decode_bytes([i])): i for i in range(PLAIN)}

    def text(token: bytes) -> str:
        return ''.join(letter[b] for b in token)

    merges = [(text(a), text(b)) for a, b in _merges(ranks)]
    bpe = Tokenizer(models.BPE({text(t): i for t, i in ranks.items()}, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), 'isolated')
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(_control_tokens(encoding))
    tokenizer.save(bpe, directory, CHAT_TEMPLATE.strip(), pad=PAD, bos=BOS, eos=EOS)


def main(out: str) -> None:
    build(out)
    print(f'Tokenizer of gpt-oss: {out}')
