"""Where a labelled text ends, what a server is asked, and which answers hold a label."""

import hashlib
import random
from typing import ClassVar

import numpy as np
import pytest

from data_gen import label_prompts, pretokenize
from data_gen.storyworld import world as story_world
from lens import hf
from tests.chat_rows import assistant, jsonl, user
from tests.small_split import VOCAB, S, arrays, write

SUBJECT = 'configs/tiny_subject'
TRAIN, FROM = 14, 50


@pytest.fixture(scope='module')
def tokenizer():
    return hf.load_tokenizer(SUBJECT)


# --- positions and prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'tokens', 'expected'),
    [
        ('openbmb/Ultra-FineWeb:en:0', 2048, [859, 987, 2000, 1831, 866, 1209, 174, 523, 1788, 2001]),
        ('openbmb/Ultra-FineWeb:en:0', 200, [151, 167, 152, 194, 65, 109, 144, 63, 106, 161]),
        ('openbmb/Ultra-FineWeb:en:0', 60, [56, 57, 59, 54, 50, 51, 52, 53, 55, 58]),
        ('openbmb/Ultra-FineWeb:en:0', 55, [53, 54, 51, 50, 52]),
        ('HuggingFaceFW/fineweb:train:7', 300, [224, 221, 165, 278, 186, 225, 182, 184, 59, 297]),
    ],
)
def test_published_position_vectors(name, tokens, expected):
    assert label_prompts.draw(np.arange(50, tokens), name, 42, 10).tolist() == expected


def by_the_rule(ids: np.ndarray, special: set[int], name: str, count: int) -> list[int]:
    candidates = [i for i in range(FROM, len(ids)) if int(ids[i]) not in special]
    key = hashlib.sha256(f'42|{name}'.encode()).digest()
    return random.Random(key).sample(candidates, min(count, len(candidates)))


def test_positions_follow_the_rule_and_texts_end_at_them(tmp_path, tokenizer):
    settings = story_world.Settings(train=TRAIN, validation=5, positions=4)
    story_world.write_arrays(tmp_path / 'data', SUBJECT, settings)
    folder = tmp_path / 'data' / 'train'
    (folder / 'positions.npy').unlink()
    (folder / 'explanations.npy').unlink()
    tokens, lengths = np.load(folder / 'tokens.npy'), np.load(folder / 'lengths.npy')
    tokens[2, 55:60] = tokenizer.convert_tokens_to_ids(['<|bos|>', '<|eos|>', '<|pad|>', '<|eos|>', '<|bos|>'])
    lengths[3] = FROM + 2  # fewer candidates than positions
    np.save(folder / 'tokens.npy', tokens)
    np.save(folder / 'lengths.npy', lengths)
    count, ids = 40, np.load(folder / 'doc_id.npy')
    part = label_prompts.open_part(
        str(tmp_path / 'data'), 'train', tokenizer, seed=42, count=count, min_position=FROM, rows=9
    )
    special = set(tokenizer.convert_tokens_to_ids(['<|bos|>', '<|eos|>', '<|pad|>']))
    for row in range(TRAIN):
        expected = by_the_rule(tokens[row, : lengths[row]], special, f'data_gen.storyworld:train:{ids[row]}', count)
        got = part.positions[row]
        assert got.tolist() == ((expected if row < 9 else []) + [-1] * count)[:count]
    assert (part.positions[3] >= 0).sum() == 2 and not set(part.positions[2]) & {55, 56, 57, 58, 59}
    at = int(part.positions[2, 0])
    words = [tokenizer.decode([i]) for i in tokens[2, : at + 1] if int(i) not in special]
    assert part.text(2, at, tokenizer) == ''.join(words)


def test_chats_show_whose_words_they_are(tmp_path, tokenizer):
    chats = [
        {'messages': [user(f'Who had the {w}?'), assistant(f'Mira had the {w}. ' * 9)]}
        for w in ('river', 'stew', 'button', 'rabbit')
    ]
    where = str(jsonl(tmp_path / 'in.jsonl', chats)), SUBJECT, str(tmp_path / 'data')
    pretokenize.pretokenize(pretokenize.PretokenizeOptions(*where, seq_len=96, validation_fraction=0.25))
    part = label_prompts.open_part(
        str(tmp_path / 'data'), 'train', tokenizer, seed=42, count=999, min_position=0, rows=0
    )
    role = np.load(tmp_path / 'data' / 'train' / 'role.npy')
    code = part.split.meta['roles']
    for row in range(len(part.split)):
        drawn = sorted(p for p in part.positions[row] if p >= 0)
        outside = {*np.flatnonzero(role[row, : part.split.lengths[row]] == code['special']).tolist()}
        assert drawn and not outside & set(drawn) and {*drawn} <= {*range(part.split.lengths[row])}
        text = part.text(row, drawn[-1], tokenizer)
        asked, answered = text.split('\n\n[final]\n')
        assert asked.startswith('[user]\nWho had the ') and answered.startswith('Mira had the ') and '<|' not in text
        inside = [p for p in drawn if role[row, p] == code['user']]
        assert '[final]' not in part.text(row, inside[-1], tokenizer)


# --- parsing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('<analysis>\na\nb\n</analysis>', 'a\n\nb'),
        ('Sure.\n<analysis>a\n\n\n  b  </analysis> Done.', 'a\n\nb'),
        ('<analysis>\n- a\n* b\n• c\n</analysis>', 'a\n\nb\n\nc'),
        ('<analysis>\n1. a\n2) b\n(3) c\niv. d\n</analysis>', 'a\n\nb\n\nc\n\nd'),
        ('<analysis>\n**Genre:** a story\n**b**\n</analysis>', 'Genre: a story\n\nb'),
        ('<analysis>\n_a_\n*b*\n**\n</analysis>', 'a\n\nb'),
        ('<analysis>\n3.5 apples\na-b\n</analysis>', '3.5 apples\n\na-b'),
        ('<analysis>open <analysis>a\nb</analysis>', 'a\n\nb'),
        ('<analysis>a\nb</analysis><analysis>c\nd</analysis>', 'a\n\nb'),
        ('<think><analysis>x\ny</analysis></think>\n<analysis>a\nb</analysis>', 'a\n\nb'),
    ],
)
def test_labels_are_found(content, expected):
    assert label_prompts.parse({'content': content}, 'stop') == expected


@pytest.mark.parametrize(
    ('message', 'finish', 'reason'),
    [
        ({'content': None}, 'stop', 'empty answer'),
        ({}, 'stop', 'empty answer'),
        ({'content': ' \n'}, 'stop', 'empty answer'),
        ({'content': 'a\nb'}, 'stop', 'no closed analysis tag'),
        ({'content': '<analysis>a\nb'}, 'stop', 'no closed analysis tag'),
        ({'content': '<analysis>a\nb'}, 'length', 'cut at max_tokens'),
        ({'content': '<think><analysis>a\nb</analysis>'}, 'length', 'cut at max_tokens'),
        ({'content': '<analysis>only one</analysis>'}, 'stop', 'fewer than 2 features'),
        ({'content': '<analysis>\n- a\n- \n**\n</analysis>'}, 'stop', 'fewer than 2 features'),
        ({'content': ['a']}, 'stop', 'content or thinking of the answer is no text'),
        ({'content': None, 'reasoning': '<analysis>a\nb</analysis>'}, 'stop', 'empty answer'),
    ],
)
def test_answers_without_a_label_have_a_reason(message, finish, reason):
    with pytest.raises(label_prompts.BadAnswer, match=f'^{reason}$'):
        label_prompts.parse(message, finish)


def test_no_place_is_kept_for_more_positions_than_a_row_has_tokens(tmp_path):
    """Of any number of positions asked for."""
    write(tmp_path, **{k: x for k, x in arrays().items() if k in ('tokens', 'lengths', 'doc_id', 'facts')})
    few, many = (
        label_prompts.open_part(str(tmp_path), 'train', Letters(), seed=0, count=n, min_position=3, rows=0).positions
        for n in (S, 10**9)
    )
    np.testing.assert_array_equal(few, many)


class Letters:
    """A tokenizer without special tokens."""

    all_special_ids = ()
    added_tokens_decoder: ClassVar[dict] = {}

    def __len__(self):
        return VOCAB


@pytest.mark.parametrize('source', [None, {}, {'settings': 'none'}, {'settings': None}, {'settings': [1]}])
def test_data_that_do_not_say_where_they_are_from(source):
    assert label_prompts.corpus_of({'source': source}) == 'documents:train'
