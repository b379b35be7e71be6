"""Labels of the text and the subject: each against the text that it is of, and greedy words against a loop."""

import dataclasses
import itertools
import json
import re
import types

import jax
import numpy as np
import pytest

from data_gen import arrays, continuations, label_self, render
from data_gen.label import LabelOptions, label
from lens import data, hf
from lens.errors import LensError
from lens.words import Format, fold
from tests.chat_rows import letters, trained
from tests.tiny_world import TINY, make_base

LENGTH, POSITIONS, FROM = 48, 6, 12
ANSWERS = (
    'The volcano threw ash on the slope, and magma followed. Volcanoes destroy what they feed; nobody wonders why!',
    'A violin is tuned by fifths: its strings are wound, and the bow draws a voice out of the wood it touches.',
    'Bread rises\nbecause yeast makes gas. The gas stays in the dough, and heat sets it for good in the oven.',
)
TOKENIZERS = {'letters': letters, 'gpt2': lambda: trained('gpt2'), 'spiece': lambda: trained('spiece')}


def chat(tokenizer, answer: str) -> tuple[list[int], list[int]]:
    """Token ids and roles of a chat, put together by hand."""
    start, end = tokenizer.convert_tokens_to_ids(['<|im_start|>', '<|im_end|>'])
    codes, ids, roles = render.ROLES, [], []
    for role, text in (('system', 'You are careful.'), ('user', 'Tell me about it'), ('final', answer)):
        words = tokenizer(text, add_special_tokens=False)['input_ids']
        ids += [start, *words, end]
        roles += [codes['special'], *[codes[role]] * len(words), codes['special']]
    return ids, roles


@pytest.fixture(scope='module', params=TOKENIZERS)
def chats(request, tmp_path_factory):
    """(folder, tokenizer): six chats; both splits have the same words, other ids."""
    root, tokenizer = tmp_path_factory.mktemp(request.param), TOKENIZERS[request.param]()
    tokenizer.save_pretrained(root / 'tokenizer')
    rows = [chat(tokenizer, f'{answer} Number {i}.') for i, answer in enumerate(ANSWERS * 2)]
    width = max(len(ids) for ids, _ in rows)

    def split(some, begin):
        n = len(some)
        meta = {'format': data.FORMAT, 'vocab_size': len(tokenizer), 'pad_id': tokenizer.pad_token_id, 'documents': n}
        meta |= {'roles': render.ROLES, 'template': 'chat_template'}
        return {
            'tokens': np.array([ids + [0] * (width - len(ids)) for ids, _ in some], np.int32),
            'role': np.array([r + [-1] * (width - len(r)) for _, r in some], np.int8),
            'lengths': np.array([len(ids) for ids, _ in some], np.int32),
            'doc_id': np.arange(begin, begin + n),
        }, meta

    arrays.write_splits(root / 'data', [('train', *split(rows[:4], 0)), ('validation', *split(rows[4:], 4))])
    return root, tokenizer


def labelled(root, out, **more):
    """Runs the command; yields (text so far, true continuation, label, ids of the label) of every label."""
    given = {'method': 'self', 'positions': POSITIONS, 'min_position': FROM, 'explanation_len': LENGTH, 'next': 'text'}
    last = label(LabelOptions(data=str(root / 'data'), tokenizer=str(root / 'tokenizer'), out=str(out), **given | more))
    assert f'{out}: 4 of 4 train, 2 of 2 validation documents have labels' in last
    tokenizer = hf.load_tokenizer(root / 'tokenizer')
    for name in ('train', 'validation'):
        split = data.open_split(str(out), name, vocab_size=len(tokenizer))
        assert split.explanations.shape == (len(split), POSITIONS, LENGTH) and (split.positions >= FROM).all()
        for row, slot in itertools.product(range(len(split)), range(POSITIONS)):
            at, ids = split.positions[row, slot], split.explanations[row, slot]
            parts = np.split(split.tokens[row, : split.lengths[row]], [at + 1])
            words = ids[ids != split.filler]
            yield *(tokenizer.decode(p) for p in parts), tokenizer.decode(words), len(words), split


def last_turn(text: str) -> str:
    return text.rpartition('<|im_start|>')[2]


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text)


def test_every_label_is_of_its_own_text(chats, tmp_path):
    root, _ = chats
    seen = {'topic': 0, 'next': 0}
    for text, ahead, said, length, split in labelled(root, tmp_path / 'out'):
        form = Format.of(split.meta)
        assert form == Format.parse('topic:4,next:4,now:4') and list(form.split(said))[-1] == 'now'
        parts = {k: v.strip() for k, v in form.split(said).items()}
        now = form.split(said)['now']
        assert text.endswith(now.lstrip(' '))  # as it stands there, a space in front or not
        assert length == LENGTH or now.strip() == last_turn(text).strip()  # else there were words left
        ahead = ahead.split('<|im_end|>')[0]
        if 'next' in parts:
            seen['next'] += 1
            assert ahead.strip().startswith(parts['next']) and len(words_of(parts['next'])) <= 4
            assert not re.match(r'\w', ahead.strip()[len(parts['next']) :] or ' ') or '\n' in ahead  # whole words
        topic = parts['topic'].split(', ') if 'topic' in parts else []
        seen['topic'] += len(topic)
        before = text.partition('<|im_end|>')[2]  # the system turn is nobody's topic
        assert {fold(w) for w in topic} <= {fold(w) for w in words_of(before)}
        assert not {w.lower() for w in topic} & {'careful', 'you', 'the', 'and', 'its'}
        assert len({fold(w) for w in topic}) == len(topic)
    assert seen['topic'] > 30 and seen['next'] > 25


def test_what_stands_beside_the_label_is_no_topic(chats, tmp_path):
    root, tokenizer = chats
    for text, _, said, _, split in labelled(root, tmp_path / 'out', parts='next:2,topic:9', context_tokens=20):
        topic = Format.of(split.meta).split(said).get('topic', '').strip().split(', ')
        near = tokenizer.decode(tokenizer(text, add_special_tokens=False)['input_ids'][-12:])
        assert not {fold(w) for w in topic} & {fold(w) for w in words_of(near)[1:]}  # the first one may be cut


def test_bare_labels_have_no_names(chats, tmp_path):
    root, _ = chats
    for text, _, said, _, split in labelled(root, tmp_path / 'out', bare=True, parts='now:3,topic:3'):
        parts = Format.of(split.meta).split(said)
        assert 'topic' not in said and ',' not in parts.get('topic', '')
        assert text.rstrip(' ').endswith(parts['now'].strip(' '))


def test_a_label_of_one_word_that_does_not_fit_is_cut(chats, tmp_path):
    root, tokenizer = chats
    options = LabelOptions(method='self', parts='topic:3', explanation_len=2, positions=1, next='text')
    part = types.SimpleNamespace(
        name='train', split=data.open_split(f'{root}/data', 'train', vocab_size=len(tokenizer))
    )
    part.positions, part.role, part.role_names = np.full((4, 1), 90, np.int32), None, {}
    labels = label_self.make([part], tokenizer, label_self.form(options), options)
    ids, counts = labels.explanations(part, 0)
    assert ids.shape == (4, 1, 2) and counts['cut'] == counts['labels'] == 4


# --- the subject's own words ----------------------------------------------------------------------------------


@pytest.mark.parametrize('changes', [{'windows': (0, 4)}, {'family': 'gpt2', 'ropes': ()}], ids=['windows', 'gpt2'])
def test_greedy_words_are_those_of_a_loop_over_whole_texts(changes):
    model = make_base(dataclasses.replace(TINY, **changes))
    rng, length = np.random.default_rng(0), 5
    most = TINY.max_positions if 'family' in changes else 10**9
    tokens = rng.integers(0, TINY.vocab_size, (5, 64)).astype(np.int32)
    positions = np.array([[3, 30], [-1, -1], [17, -1], [57, 2], [63, 9]], np.int32)
    split = types.SimpleNamespace(tokens=tokens, directory='here')
    got = continuations.greedy(model, split, positions, length)
    assert got.keys() == {(int(r), int(s)) for r, s in np.argwhere(positions >= 0)}
    logits = jax.jit(lambda ids: model(ids))
    for (row, slot), ids in got.items():
        at = positions[row, slot]
        text = [*tokens[row, : at + 1].tolist()]
        for token in ids[: max(min(length, 70 - at), 0)].tolist():
            padded = np.zeros((1, 64 if most < 100 else 72), np.int32)
            padded[0, : len(text)] = text
            assert token == int(np.argmax(logits(padded)[0, len(text) - 1])), (row, slot)
            text.append(token)
        assert len(ids) == min(length, most - at)


def test_the_subject_is_asked_where_the_text_is_not_its_own(world, tmp_path):
    given = {'data': str(world / 'data'), 'tokenizer': str(world / 'subject'), 'method': 'self', 'max_documents': 3}
    given |= {'positions': 2, 'min_position': 20, 'explanation_len': 16, 'out': str(tmp_path / 'out')}
    label(LabelOptions(**given, parts='next:3,now:2'))
    tokenizer, model = hf.load_tokenizer(world / 'subject'), hf.load_model(world / 'subject')
    split = data.open_split(str(tmp_path / 'out'), 'train', vocab_size=len(tokenizer))
    assert len(split) == 3 and json.loads((tmp_path / 'out/train/labels.json').read_text())['next_of_subject'] == 6
    logits, hits = jax.jit(lambda ids: model(ids)), 0
    for row, slot in itertools.product(range(3), range(2)):
        ids = np.zeros((1, 128), np.int32)
        ids[0, : split.tokens.shape[1]] = split.tokens[row]
        at = split.positions[row, slot]
        first = tokenizer.decode([int(np.argmax(logits(ids)[0, at]))]).strip()
        said = Format.of(split.meta).split(tokenizer.decode(split.explanations[row, slot]))
        hits += first in said.get('next', '')
    assert hits >= 4  # others begin with a special token or end at once


@pytest.mark.parametrize(
    ('more', 'needle'),
    [
        ({'parts': 'topic'}, 'is no list such as'),
        ({'parts': 'next:4'}, 'says nothing of the text so far'),
        ({'data': ''}, '--data is needed'),
        ({'tokenizer': ''}, '--tokenizer is needed'),
    ],
)
def test_refusals_write_nothing(world, tmp_path, more, needle):
    given = {'data': str(world / 'data'), 'tokenizer': str(world / 'subject'), 'out': str(tmp_path / 'out')}
    with pytest.raises(LensError, match=needle):
        label(LabelOptions(**given | {'method': 'self', 'next': 'text'} | more))
    assert not any(tmp_path.iterdir())
