"""Storyworld: seeded short stories whose facts are known at every token, by construction.

Each story has a hidden scene of 8 fields (see `grammar.FIELDS`), told in short sentences
that establish the facts one after the other and need them again later. `write_arrays` makes labelled token arrays
of them; `python -m data_gen.storyworld` is its command.

Dimension letters: N documents, S sequence length, P labelled positions, T explanation tokens,
F fields, V vocabulary.
"""

import hashlib
import itertools
import json
import os
import pathlib
import random
import re
from typing import NamedTuple

import numpy as np

from lens import files
from lens.errors import LensError

from .. import arrays
from . import grammar
from . import tokenizer as word_tokenizer

FIELDS = grammar.FIELDS
BAR = ' |'
EXPLANATION_LEN = 12  # 3 last tokens, the bar, at most 8 facts
FIRST_POSITION = 8  # earlier positions have almost nothing established
FIRST_VALIDATION_INDEX = 10_000_000
MOST_TOKENS = 4096  # of a row; no story has as many
TOKENIZER_STORIES = 4000
NEW_FACT_SHARE = 0.5
MAX_NEW_FACTS = 2
MIN_BUDGET, MAX_BUDGET = 100, 127  # story tokens without BOS; MAX_BUDGET + BOS = 128
RECENT_FORMS = 5  # forms that are not told again so soon


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
    cum_weights: list[float]


def split_words(text: str) -> list[str]:
    """Returns words and punctuation marks of a story text, in order."""
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
    """Makes story number `index` of the world `seed`; it depends on nothing else."""
    rng = random.Random(f'{seed}|{index}')
    scene = {field: rng.choices(values)[0] for field, values in FIELDS.items()}
    left = rng.choices(range(MIN_BUDGET, MAX_BUDGET + 1))[0]
    told, sentences, recent = 0, [], []
    choice = _OPENERS
    while True:
        for _ in range(4):
            form = rng.choices(choice.forms, cum_weights=choice.cum_weights)[0]
            if form not in recent:
                break
        if form.tokens > left:
            break
        left -= form.tokens
        told |= form.fields
        recent = [form, *recent[: RECENT_FORMS - 1]]
        sentences.append(rng.choices(form.variants)[0].format_map(scene))
        adds = _NEW[told].forms and (not _REPEAT[told].forms or rng.random() < NEW_FACT_SHARE)
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


def train_tokenizer(directory: str | os.PathLike):
    """Trains the tokenizer, saves it and returns it. Value words and ordinary words, each with its leading space,
    and ` |` are one token each."""
    tokenizer = word_tokenizer.train(_tokenizer_corpus(), directory)
    value_token_ids(tokenizer)
    return tokenizer


def value_token_ids(tokenizer) -> list[list[int]]:
    """Returns the token id of every value with its leading space, per field. Raises LensError if one is split."""
    return [[word_tokenizer.single_token(tokenizer, f' {value}') for value in values] for values in FIELDS.values()]


def encode_stories(tokenizer, texts: list[str], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids [N, S] int32, BOS first and right padded, and lengths [N] int32."""
    rows = [encoding.ids[:seq_len] for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    lengths_N = np.array(list(map(len, rows)), np.int32)
    return arrays.pad(np.concatenate(rows).astype(np.int32), lengths_N, seq_len, tokenizer.pad_token_id), lengths_N


def track_facts(tokens_NxS: np.ndarray, token_ids: list[list[int]], vocab: int) -> np.ndarray:
    """Returns the value index established at each token, int8 [N, S, F], -1 where none is yet."""
    value_VxF = np.full((vocab, len(token_ids)), -1, np.int8)
    for field, ids in enumerate(token_ids):
        value_VxF[ids, field] = np.arange(len(ids))
    return np.maximum.accumulate(value_VxF[tokens_NxS], axis=1)  # a story has one value per field


def sample_positions(lengths_N: np.ndarray, seq_len: int, positions: int, rng: np.random.Generator) -> np.ndarray:
    """Draws distinct positions in FIRST_POSITION..length-1, int32 [N, P], ascending, then -1."""
    key_NxS = rng.random((len(lengths_N), seq_len), np.float32)
    index_S = np.arange(seq_len)
    key_NxS[(index_S < FIRST_POSITION) | (index_S >= lengths_N[:, None])] = 2
    order_NxP = np.argsort(key_NxS, axis=1, kind='stable')[:, :positions]
    usable_NxP = np.take_along_axis(key_NxS, order_NxP, axis=1) < 2
    sorted_NxP = np.sort(np.where(usable_NxP, order_NxP, seq_len), axis=1)
    result_NxP = np.full((len(lengths_N), positions), -1, np.int32)
    result_NxP[:, : sorted_NxP.shape[1]] = np.where(sorted_NxP < seq_len, sorted_NxP, -1)
    return result_NxP


def explain(tokens_NxS, facts_NxSxF, positions_NxP, token_ids: list[list[int]], bar_id: int, pad_id: int) -> np.ndarray:
    """Makes gold explanations, int32 [N, P, T]: the last 3 tokens, newest first, ` |`, facts, ` |` ...

    Established facts stand in field order without gaps. Where the position is -1, all is padding.
    """
    at_NxP = np.maximum(positions_NxP, 2)
    row_Nx1 = np.arange(len(tokens_NxS))[:, None]
    last_NxPx3 = np.stack([tokens_NxS[row_Nx1, at_NxP - back] for back in range(3)], axis=-1)
    facts_NxPxF = facts_NxSxF[row_Nx1, at_NxP]
    named_F = [np.array([*ids, bar_id])[facts_NxPxF[..., f]] for f, ids in enumerate(token_ids)]  # -1 picks the bar
    order_NxPxF = np.argsort(facts_NxPxF < 0, axis=-1, kind='stable')
    named_NxPxF = np.take_along_axis(np.stack(named_F, axis=-1), order_NxPxF, axis=-1)
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
    rules = [FIELDS, grammar.TEMPLATES, NEW_FACT_SHARE, MAX_NEW_FACTS]
    rules += [MIN_BUDGET, MAX_BUDGET, RECENT_FORMS, FIRST_POSITION]
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()


def _meta(split: str, settings: Settings, tokenizer, tokenizer_dir: str | os.PathLike) -> dict:
    from lens import hf  # with JAX, which --help needs not

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
        'filler_id': word_tokenizer.single_token(tokenizer, BAR),
        'facts': [
            {'field': field, 'values': list(values), 'token_ids': ids}
            for (field, values), ids in zip(FIELDS.items(), value_token_ids(tokenizer), strict=True)
        ],
    }


def build_split(meta: dict, settings: Settings, tokenizer) -> dict[str, np.ndarray]:
    """Makes all arrays of the split that `meta` describes, by file stem; see `write_arrays` for the shapes."""
    first = {'train': 0, 'validation': FIRST_VALIDATION_INDEX}[meta['split']]
    doc_id_N = np.arange(first, first + meta['documents'], dtype=np.int64)
    token_ids = [field['token_ids'] for field in meta['facts']]
    texts = [generate(settings.seed, int(index)).text for index in doc_id_N]
    tokens_NxS, lengths_N = encode_stories(tokenizer, texts, settings.seq_len)
    facts_NxSxF = track_facts(tokens_NxS, token_ids, meta['vocab_size'])
    rng = np.random.default_rng([settings.seed, first])
    positions_NxP = sample_positions(lengths_N, settings.seq_len, settings.positions, rng)
    return {
        'tokens': tokens_NxS,
        'lengths': lengths_N,
        'doc_id': doc_id_N,
        'positions': positions_NxP,
        'explanations': explain(tokens_NxS, facts_NxSxF, positions_NxP, token_ids, meta['filler_id'], meta['pad_id']),
        'facts': facts_NxSxF,
    }


def write_arrays(out: str | os.PathLike, tokenizer_dir: str | os.PathLike, settings: Settings) -> bool:
    """Writes out/train and out/validation at once; False if they exist with the same settings.

    Per split: tokens [N, S] int32 (BOS first, right padded), lengths [N] int32, doc_id [N] int64,
    positions [N, P] int32 (-1 = none), explanations [N, P, T] int32, facts [N, S, F] int8 (-1 = not
    established yet; the last state after the end of the story) and meta.json.

    Raises LensError if settings or tokenizer do not serve, or if `out` holds something else.
    """
    if min(settings.train, settings.validation, settings.positions) < 1 or settings.seed < 0:
        raise LensError('train, validation and positions must be at least 1, seed at least 0.')
    if max(settings.train, settings.validation) > FIRST_VALIDATION_INDEX:
        raise LensError(f'train and validation must be at most {FIRST_VALIDATION_INDEX}.')
    if not FIRST_POSITION < settings.seq_len <= MOST_TOKENS or settings.positions > settings.seq_len:
        raise LensError(f'seq_len must be in {FIRST_POSITION + 1}..{MOST_TOKENS}, and positions no more than it.')
    out = pathlib.Path(out)
    tokenizer = word_tokenizer.load(tokenizer_dir)
    metas = [_meta(split, settings, tokenizer, tokenizer_dir) for split in ('train', 'validation')]
    if out.exists():
        remedy = 'remove it or choose another --out'
        if all(files.read_json(out / m['split'] / 'meta.json', remedy) == m for m in metas):
            return False
        raise LensError(f'{out} exists with other settings: {remedy}.')
    arrays.write_splits(out, ((m['split'], build_split(m, settings, tokenizer), m) for m in metas))
    return True
