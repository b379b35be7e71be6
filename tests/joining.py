"""A tokenizer of 56 tokens that joins across the border of two texts, as many published ones do: punctuation takes a letter
before it along, full stops take line breaks."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZE = 56
PATTERN = r'[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
LETTERS = '!TextndhofsabcA.</>:|")ĠĊ'  # Ġ, Ċ: a blank, a line break
MERGES = [
    't e',
    'te x',
    'tex t',
    'e n',
    'en d',
    '< /',
    '. </',
    '> "',
    '> A',
    '. Ċ',
    ') "',
    ')" Ċ',
    'Ġ o',
    'Ġo f',
    'A s',
    'Ċ Ċ',
    '" </',
]


def tokenizer() -> PreTrainedTokenizerFast:
    merges = [tuple(m.split()) for m in MERGES]
    names = [*dict.fromkeys(LETTERS), *(a + b for a, b in merges)]
    names += [chr(ord('B') + i) for i in range(SIZE - len(names))]
    bpe = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, merges))
    split = pre_tokenizers.Split(Regex(PATTERN), 'isolated')
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)
