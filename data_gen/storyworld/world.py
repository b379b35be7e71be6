"""Storyworld: seeded short stories whose facts are known at every token, by construction.

Each story has a hidden scene of 8 fields (see `grammar.FIELDS`), told in short sentences
that establish the facts one after the other and need them again later. The module also trains the
tokenizer (one token per word) and writes labelled token arrays:

    python -m data_gen.storyworld --train_tokenizer=configs/tiny_subject
    python -m data_gen.storyworld --out=data/storyworld --tokenizer=configs/tiny_subject

Dimension letters: N documents, S sequence length, P labelled positions, T explanation tokens,
F fields, V vocabulary.
"""

import bisect
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import sys
from typing import Any, NamedTuple

import numpy as np

from data_gen import arrays
from data_gen.storyworld import grammar
from lens import hf

FIELDS = grammar.FIELDS

SPECIAL_TOKENS = (
    '<|pad|>',
    '<|bos|>',
    '<|eos|>',
    '<|user|>',
    '<|assistant|>',
    '<|system|>',
    '<|think|>',
    '<|/think|>',
    '<|end|>',
)
BAR = ' |'
EXPLANATION_LEN = 12  # 3 last tokens, the bar, at most 8 facts
FIRST_POSITION = 8  # earlier positions have almost nothing established
FIRST_VALIDATION_INDEX = 10_000_000
MAX_VOCAB = 2000
TOKENIZER_STORIES = 4000
NEW_FACT_SHARE = 0.5
MAX_NEW_FACTS = 2
MIN_BUDGET, MAX_BUDGET = 100, 127  # story tokens without BOS; MAX_BUDGET + BOS = 128
RECENT_FORMS = 5  # forms that are not told again so soon

CHAT_TEMPLATE = (
    '{{ bos_token }}'
    '{% for message in messages %}'
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' and message['thinking'] %}"
    "{{ '<|think|>' + message['thinking'] + '<|/think|>' }}"
    '{% endif %}'
    "{{ message['content'] + '<|end|>' }}"
    '{% endfor %}'
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class StoryworldError(ValueError):
    """A problem that the caller can mend; the message is one sentence."""


class Story(NamedTuple):
    """text as written, words (punctuation apart; one per token), scene: field -> value."""

    text: str
    words: list[str]
    scene: dict[str, str]


class _Form(NamedTuple):
    variants: tuple[str, ...]  # format strings, one per combination of word alternatives
    tokens: int
    fields: int  # bit mask
    weight: float
    opens: bool  # starts with an ordinary word, so it may start a text


class _Choice(NamedTuple):
    forms: list[_Form]
    cumulative: list[float]


def split_words(text: str) -> list[str]:
    """Words and punctuation marks of a story text, in order."""
    return re.findall(r'\w+|[.,]', text)


def _compile(weight: float, template: str) -> _Form:
    parts = [part.split('|') for part in re.split(r'[\[\]]', template)]
    variants = tuple(''.join(choice) for choice in itertools.product(*parts))
    mentioned = re.findall(r'\{(\w+)\}', template)
    mask = sum(1 << i for i, field in enumerate(FIELDS) if field in mentioned)
    return _Form(variants, len(split_words(variants[0])), mask, weight, template[0] != '{')


FORMS = tuple(_compile(weight, template) for weight, template in grammar.TEMPLATES)


def _choice(forms: list[_Form]) -> _Choice:
    return _Choice(forms, list(itertools.accumulate(form.weight for form in forms)))


def _tables() -> tuple[list[_Choice], list[_Choice], _Choice]:
    """Forms allowed for each bit mask of told fields: with new facts, without; and the openers."""
    masks = range(1 << len(FIELDS))
    new = [[f for f in FORMS if 1 <= (f.fields & ~told).bit_count() <= MAX_NEW_FACTS] for told in masks]
    repeat = [[f for f in FORMS if not f.fields & ~told] for told in masks]
    openers = [form for form in new[0] if form.opens]
    return [_choice(forms) for forms in new], [_choice(forms) for forms in repeat], _choice(openers)


_NEW, _REPEAT, _OPENERS = _tables()


def generate(seed: int, index: int) -> Story:
    """Story number `index` of the world `seed`; it depends on nothing else."""
    rng = random.Random(f'{seed}|{index}')
    uniform = rng.random
    scene = {field: values[int(uniform() * len(values))] for field, values in FIELDS.items()}
    left = MIN_BUDGET + int(uniform() * (MAX_BUDGET - MIN_BUDGET + 1))
    told, sentences, recent = 0, [], []
    choice = _OPENERS
    while True:
        for _ in range(4):
            draw = uniform() * choice.cumulative[-1]
            form = choice.forms[bisect.bisect_right(choice.cumulative, draw)]
            if form not in recent:
                break
        if form.tokens > left:
            break
        left -= form.tokens
        told |= form.fields
        recent = [form, *recent[: RECENT_FORMS - 1]]
        variant = form.variants[int(uniform() * len(form.variants))]
        sentences.append(variant.format_map(scene))
        adds = _NEW[told].forms and (not _REPEAT[told].forms or uniform() < NEW_FACT_SHARE)
        choice = _NEW[told] if adds else _REPEAT[told]
    text = ' '.join(sentences)
    return Story(text, split_words(text), scene)


def _tokenizer_corpus() -> list[str]:
    variants = [variant for form in FORMS for variant in form.variants]
    words = {word for variant in variants for word in split_words(re.sub(r'\{\w+\}', '', variant))}
    values = [value for field in FIELDS.values() for value in field]
    listed = [f' {word}' for word in sorted(words) + values if word.isalpha()]
    starts = [form.variants[0] for form in FORMS if form.opens]
    stories = [generate(0, index).text for index in range(TOKENIZER_STORIES)]
    return stories + listed + starts + [BAR * 8]


def train_tokenizer(out_dir: str | os.PathLike[str]) -> Any:
    """Trains the byte-level BPE tokenizer, saves it to out_dir and returns it.

    Every value word with its leading space, every ordinary word and ` |` is one token. Encoding with
    special tokens puts `<|bos|>` in front.
    """
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        _tokenizer_corpus(),
        tokenizers.trainers.BpeTrainer(
            vocab_size=MAX_VOCAB,
            min_frequency=1,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single='<|bos|> $A', pair='<|bos|> $A $B', special_tokens=[('<|bos|>', 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token='<|pad|>',
        bos_token='<|bos|>',
        eos_token='<|eos|>',
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out_dir)
    config_path = pathlib.Path(out_dir) / 'tokenizer_config.json'
    config = json.loads(config_path.read_text())
    config['tokenizer_class'] = 'PreTrainedTokenizerFast'  # transformers 5 writes a name of its own
    config_path.write_text(json.dumps(config, indent=2) + '\n')
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer saved at `path`; StoryworldError where there is none."""
    if not (pathlib.Path(path) / 'tokenizer.json').is_file():
        raise StoryworldError(
            f'No tokenizer.json in {path}: run python -m data_gen.storyworld --train_tokenizer={path}'
        )
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path)


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise StoryworldError(
            f'The tokenizer splits {text!r} into {len(ids)} tokens; Storyworld needs '
            'a tokenizer that keeps every value word whole (--train_tokenizer)'
        )
    return ids[0]


def value_token_ids(tokenizer: Any) -> list[list[int]]:
    """Token id of every value with its leading space, per field; StoryworldError if one is split."""
    return [[_single_token(tokenizer, f' {value}') for value in values] for values in FIELDS.values()]


def encode_stories(tokenizer: Any, texts: list[str], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [N, S] int32, BOS first and right padded, and lengths [N] int32."""
    rows = [encoding.ids[:seq_len] for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    lengths_N = np.array([len(row) for row in rows], np.int32)
    tokens_NxS = np.full((len(rows), seq_len), tokenizer.pad_token_id, np.int32)
    tokens_NxS[np.arange(seq_len) < lengths_N[:, None]] = np.concatenate(rows)
    return tokens_NxS, lengths_N


def track_facts(tokens_NxS: np.ndarray, token_ids: list[list[int]], vocab: int) -> np.ndarray:
    """Value index established at each token, int8 [N, S, F], -1 where none is yet."""
    value_VxF = np.full((vocab, len(token_ids)), -1, np.int8)
    for field, ids in enumerate(token_ids):
        value_VxF[ids, field] = np.arange(len(ids))
    return np.maximum.accumulate(value_VxF[tokens_NxS], axis=1)  # a story has one value per field


def sample_positions(lengths_N: np.ndarray, seq_len: int, positions: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct positions in FIRST_POSITION..length-1, int32 [N, P], ascending, then -1."""
    key_NxS = rng.random((len(lengths_N), seq_len), np.float32)
    index_S = np.arange(seq_len)
    key_NxS[(index_S < FIRST_POSITION) | (index_S >= lengths_N[:, None])] = 2
    order_NxP = np.argsort(key_NxS, axis=1, kind='stable')[:, :positions]
    usable_NxP = np.take_along_axis(key_NxS, order_NxP, axis=1) < 2
    sorted_NxP = np.sort(np.where(usable_NxP, order_NxP, seq_len), axis=1)
    result_NxP = np.full((len(lengths_N), positions), -1, np.int32)
    result_NxP[:, : sorted_NxP.shape[1]] = np.where(sorted_NxP < seq_len, sorted_NxP, -1)
    return result_NxP


def explain(
    tokens_NxS: np.ndarray,
    facts_NxSxF: np.ndarray,
    positions_NxP: np.ndarray,
    token_ids: list[list[int]],
    bar_id: int,
    pad_id: int,
) -> np.ndarray:
    """Gold explanations, int32 [N, P, T]: the last 3 tokens, newest first, ` |`, facts, ` |` ...

    Established facts stand in field order without gaps. Where the position is -1, all is padding.
    """
    at_NxP = np.maximum(positions_NxP, 2)
    row_Nx1 = np.arange(len(tokens_NxS))[:, None]
    last_NxPx3 = np.stack([tokens_NxS[row_Nx1, at_NxP - back] for back in range(3)], axis=-1)
    facts_NxPxF = facts_NxSxF[row_Nx1, at_NxP]
    named_NxPxF = np.stack(
        [
            np.array([*ids, bar_id], np.int32)[facts_NxPxF[..., field]]  # -1 picks the bar
            for field, ids in enumerate(token_ids)
        ],
        axis=-1,
    )
    order_NxPxF = np.argsort(facts_NxPxF < 0, axis=-1, kind='stable')
    named_NxPxF = np.take_along_axis(named_NxPxF, order_NxPxF, axis=-1)
    bar_NxPx1 = np.full((*positions_NxP.shape, 1), bar_id, np.int32)
    text_NxPxT = np.concatenate([last_NxPx3, bar_NxPx1, named_NxPxF], axis=-1)
    text_NxPxT[positions_NxP < 0] = pad_id
    return text_NxPxT.astype(np.int32)


class Settings(NamedTuple):
    """What decides the arrays besides grammar and tokenizer."""

    train: int = 8000
    validation: int = 600
    seed: int = 0
    positions: int = 16
    seq_len: int = 128


def _grammar_sha256() -> str:
    rules = [
        FIELDS,
        grammar.TEMPLATES,
        NEW_FACT_SHARE,
        MAX_NEW_FACTS,
        MIN_BUDGET,
        MAX_BUDGET,
        RECENT_FORMS,
        FIRST_POSITION,
    ]
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()


def _meta(
    split: str, settings: Settings, tokenizer: Any, tokenizer_dir: str | os.PathLike[str], token_ids: list[list[int]]
) -> dict[str, Any]:
    return {
        'format': 'lens-tokens/1',
        'split': split,
        'documents': getattr(settings, split),
        'seq_len': settings.seq_len,
        'vocab_size': len(tokenizer),
        'pad_id': tokenizer.pad_token_id,
        'bos_id': tokenizer.bos_token_id,
        'tokenizer_sha256': hf.tokenizer_sha256(tokenizer_dir),
        'source': {
            'generator': 'data_gen.storyworld',
            'seed': settings.seed,
            'positions': settings.positions,
            'grammar_sha256': _grammar_sha256(),
        },
        'explanation_len': EXPLANATION_LEN,
        'filler_id': _single_token(tokenizer, BAR),
        'facts': [
            {'field': field, 'values': list(values), 'token_ids': ids}
            for (field, values), ids in zip(FIELDS.items(), token_ids, strict=True)
        ],
    }


def build_split(split: str, settings: Settings, tokenizer: Any) -> dict[str, np.ndarray]:
    """All arrays of 'train' or 'validation', by file stem; see `write_arrays` for the shapes."""
    first = {'train': 0, 'validation': FIRST_VALIDATION_INDEX}[split]
    doc_id_N = np.arange(first, first + getattr(settings, split), dtype=np.int64)
    token_ids = value_token_ids(tokenizer)
    texts = [generate(settings.seed, int(index)).text for index in doc_id_N]
    tokens_NxS, lengths_N = encode_stories(tokenizer, texts, settings.seq_len)
    facts_NxSxF = track_facts(tokens_NxS, token_ids, len(tokenizer))
    rng = np.random.default_rng([settings.seed, first])
    positions_NxP = sample_positions(lengths_N, settings.seq_len, settings.positions, rng)
    explanations_NxPxT = explain(
        tokens_NxS, facts_NxSxF, positions_NxP, token_ids, _single_token(tokenizer, BAR), tokenizer.pad_token_id
    )
    return {
        'tokens': tokens_NxS,
        'lengths': lengths_N,
        'doc_id': doc_id_N,
        'positions': positions_NxP,
        'explanations': explanations_NxPxT,
        'facts': facts_NxSxF,
    }


def write_arrays(out: str | os.PathLike[str], tokenizer_dir: str | os.PathLike[str], settings: Settings) -> bool:
    """Writes out/train and out/validation at once; False if they exist with the same settings.

    Per split: tokens [N, S] int32 (BOS first, right padded), lengths [N] int32, doc_id [N] int64,
    positions [N, P] int32 (-1 = none), explanations [N, P, T] int32, facts [N, S, F] int8 (-1 = not
    established yet; the last state after the end of the story) and meta.json.

    Raises StoryworldError if settings or tokenizer do not serve, or if `out` holds something else.
    """
    if min(settings.train, settings.validation, settings.positions) < 1 or settings.seed < 0:
        raise StoryworldError('train, validation and positions must be at least 1, seed at least 0')
    if settings.train > FIRST_VALIDATION_INDEX or settings.seq_len <= FIRST_POSITION:
        raise StoryworldError(f'train must be at most {FIRST_VALIDATION_INDEX} and seq_len above {FIRST_POSITION}')
    out = pathlib.Path(out)
    tokenizer = load_tokenizer(tokenizer_dir)
    token_ids = value_token_ids(tokenizer)
    metas = {split: _meta(split, settings, tokenizer, tokenizer_dir, token_ids) for split in ('train', 'validation')}
    if out.exists():
        paths = {split: out / split / 'meta.json' for split in metas}
        if all(p.is_file() and json.loads(p.read_text()) == metas[s] for s, p in paths.items()):
            return False
        raise StoryworldError(f'{out} exists with other settings; remove it or choose another --out')
    arrays.write_splits(out, ((s, build_split(s, settings, tokenizer), m) for s, m in metas.items()))
    return True


def _parse_flags(argv: list[str]) -> Any:
    """Flags live in their own container: importing this module must not claim names like --seed."""
    from absl import flags

    values, defaults = flags.FlagValues(), Settings()
    flags.DEFINE_string('train_tokenizer', None, 'Train the tokenizer into this folder, then stop.', flag_values=values)
    flags.DEFINE_string('out', 'data/storyworld', 'Folder for the arrays.', flag_values=values)
    flags.DEFINE_string('tokenizer', 'configs/tiny_subject', 'Folder with tokenizer.json.', flag_values=values)
    helps = {
        'train': 'Training stories.',
        'validation': 'Validation stories.',
        'seed': 'Which world.',
        'positions': 'Labelled positions per story.',
        'seq_len': 'Tokens per row, BOS included.',
    }
    for name, text in helps.items():
        flags.DEFINE_integer(name, getattr(defaults, name), text, flag_values=values)
    flags.DEFINE_bool('help', False, 'Show the flags.', flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        raise StoryworldError(str(error)) from error
    if len(rest) > 1:
        raise StoryworldError(f'Unexpected argument {rest[1]!r}')
    return values


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    try:
        flags = _parse_flags(argv)
        if flags.help:
            print(__doc__, flags.get_help(), sep='\n')
        elif flags.train_tokenizer:
            tokenizer = train_tokenizer(flags.train_tokenizer)
            value_token_ids(tokenizer)
            print(f'Tokenizer with {len(tokenizer)} entries: {flags.train_tokenizer}')
        else:
            settings = Settings(*(flags[name].value for name in Settings._fields))
            print(
                f'Storyworld: {settings.train} training and {settings.validation} validation stories, '
                f'seed {settings.seed} ...',
                flush=True,
            )
            written = write_arrays(flags.out, flags.tokenizer, settings)
            print(
                f'Arrays written: {flags.out}'
                if written
                else f'Nothing to do, these settings are there already: {flags.out}'
            )
    except StoryworldError as error:
        print(f'Error: {error}', file=sys.stderr)
        return 1
    return 0
