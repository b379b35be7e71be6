"""Rows to documents to token ids, every token with the role of its words."""

import numpy as np
import pytest

from data_gen import documents, render, tables
from data_gen.documents import BadRow, Chat
from lens import hf
from lens.errors import LensError
from tests.chat_rows import NAMES, assistant, jsonl, renderer, runs, user

SUBJECT = 'configs/tiny_subject'


@pytest.fixture(scope='module')
def subject_tokenizer():
    return hf.load_tokenizer(SUBJECT)


# ---- rows ----


@pytest.mark.parametrize(
    ('row', 'expected'),
    [
        ({'question': 'q', 'answer': '<think>t</think>\na'}, ([user('q'), assistant('a', 't')], 'low')),
        ({'question': 'q', 'answer': 'a', 'thinking': 't', 'text': 'x'}, ([user('q'), assistant('a', 't')], 'low')),
        (
            {
                'user_content': 'q',
                'assistant_content': 'a',
                'assistant_thinking': None,
                'system_reasoning_effort': 'high',
            },
            ([user('q'), assistant('a')], 'high'),
        ),
        ({'messages': [user('q'), assistant('a') | {'thinking': None}]}, ([user('q'), assistant('a')], 'low')),
        (
            {'system': 'Reasoning: high', 'messages': [{'role': 'system', 'content': 'x'}, user('q'), assistant('a')]},
            ([{'role': 'system', 'content': 'Reasoning: high'}, user('q'), assistant('a')], 'high'),
        ),
        ({'turns': ['q', 'a', 'r']}, ([user('q'), assistant('a'), user('r')], 'low')),
        ({'text': 'a text', 'id': 'b'}, 'a text'),
        ({'text': 'half \ud83d'}, 'half ?'),
    ],
)
def test_row_formats_in_their_order(tmp_path, row, expected):
    table = tables.open_table(str(jsonl(tmp_path / 'in.jsonl', [row])))
    got = documents.parse(row, *documents.row_format(table), 'low')
    assert got == (expected if isinstance(expected, str) else Chat(*expected))


@pytest.mark.parametrize(
    ('row', 'reason'),
    [
        (None, 'not a JSON object'),
        ({'messages': []}, 'no list of messages'),
        ({'messages': [{'role': 'wizard', 'content': 'x'}]}, 'a message has an unknown role'),
        ({'messages': [user('x'), {'role': 'assistant', 'content': None}]}, 'a message has no text'),
        ({'messages': [user('x'), assistant(' \n')]}, 'an empty assistant message'),
        ({'messages': [user('x')], 'reasoning_effort': 'heroic'}, 'unknown reasoning effort'),
    ],
)
def test_bad_rows_name_their_reason(row, reason):
    with pytest.raises(BadRow, match=f'^{reason}$'):
        documents.parse(row, 'chat', ('messages',), 'medium')


# ---- roles ----


def test_chatml_roles_by_hand():
    r = renderer()
    chat = Chat(
        [
            {'role': 'system', 'content': 'Be kind.'},
            user('user'),  # the word of the header as well
            assistant('Yes', 'Hm?'),
            user(' é兎'),
            assistant('assistant'),
        ],
        'medium',
    )
    ids, roles, flags, lost = r.encode(chat)
    assert flags == sum(lost) == 0
    assert runs(r.tokenizer, (ids, roles, flags)) == [
        ('special', '<|im_start|>system\n'),
        ('system', 'Be kind.'),
        ('special', '<|im_end|>\n<|im_start|>user\n'),
        ('user', 'user'),
        ('special', '<|im_end|>\n<|im_start|>assistant\n<think>'),
        ('thinking', 'Hm?'),
        ('special', '</think>\n'),
        ('final', 'Yes'),
        ('special', '<|im_end|>\n<|im_start|>user\n'),
        ('user', ' é兎'),
        ('special', '<|im_end|>\n<|im_start|>assistant\n'),
        ('final', 'assistant'),
        ('special', '<|im_end|>\n'),
    ]
    assert ids.dtype == np.int32 and roles.dtype == np.int8


def test_a_template_that_strips_and_drops():
    """Like Qwen3: texts stripped, thinking of earlier turns left out, the date asked for."""
    template = (
        "{{ strftime_now('%Y-%m-%d') }}{{ reasoning_effort }}"
        '{% for m in messages %}[{{ m.role }}]{% set c = m.content | trim %}'
        "{% if '</think>' in c and not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        '{{ c }}{% endfor %}'
    )
    r = renderer(template=template)
    chat = Chat([user(' a b\n'), assistant('c', 'gone'), user('d'), assistant('e ', 'kept')], 'high')
    assert runs(r.tokenizer, r.encode(chat)) == [
        ('special', '2025-06-28high[user]'),
        ('user', 'a b'),
        ('special', '[assistant]'),
        ('final', 'c'),
        ('special', '[user]'),
        ('user', 'd'),
        ('special', '[assistant]<think>'),
        ('thinking', 'kept'),
        ('special', '</think>\n'),
        ('final', 'e'),
    ]


def test_templates_that_do_not_serve_are_reasons():
    for template, reason in (
        ('{{ messages[0].content | upper }}', 'changes the text'),
        ("{{ raise_exception('No, thanks') }}", 'refuses it: No, thanks'),
    ):
        with pytest.raises(BadRow, match=f'^the chat template {reason}$'):
            renderer(template=template).encode(Chat([user('a')], 'low'))
    with pytest.raises(LensError, match='no chat template'):
        renderer(template=None)


def test_a_template_with_thinking_of_its_own(subject_tokenizer):
    r = renderer(subject_tokenizer)
    got = runs(r.tokenizer, r.encode(Chat([user('the fox'), assistant('the owl', 'the rabbit')], 'low')))
    assert [(role, text.strip()) for role, text in got] == [
        ('special', '<|bos|><|user|>'),
        ('user', 'the fox'),
        ('special', '<|end|><|assistant|><|think|>'),
        ('thinking', 'the rabbit'),
        ('special', '<|/think|>'),
        ('final', 'the owl'),
        ('special', '<|end|>'),
    ]


def test_a_token_across_a_border_belongs_to_its_first_visible_character():
    text = 'user\n\nHi you. <end>'
    spans = [(5, 14, render.USER)]  # '\nHi you. '
    tokens = ['user', '\n\n', 'Hi', ' you', '. <', 'end', '>']
    ends = np.cumsum([len(t) for t in tokens])
    offsets = np.stack([np.append(0, ends[:-1]), ends], 1)
    names = [NAMES[int(r)] for r in render.token_roles(text, spans, offsets)]
    assert names == ['special', 'special', 'user', 'user', 'user', 'special', 'special']
    spaced = render.token_roles('[I] a', [(4, 5, render.USER)], np.array([[0, 3], [3, 5], [5, 5]]))
    assert [NAMES[int(r)] for r in spaced] == ['special', 'user', 'special']


def test_truncation_counts_lost_answers():
    chat = Chat([user('abcd'), assistant('wxyz')], 'low')  # 7 + 4 + 2 + 11 + 4 + 2 tokens with the ChatML around
    whole = renderer().encode(chat)
    first = int(np.flatnonzero(whole[1] == render.FINAL)[0])
    for size, flags in ((len(whole[0]), 0), (first + 4, 1), (first + 2, 1 | 2), (first, 1 | 4)):
        ids, roles, got, _ = renderer(seq_len=size).encode(chat)
        assert got == flags and (ids == whole[0][:size]).all() and (roles == whole[1][:size]).all()
    ids, roles, got, _ = renderer(seq_len=7, truncate='left').encode(chat)
    assert got == 1 and (ids == whole[0][-7:]).all() and (roles == whole[1][-7:]).all()
    assert renderer(seq_len=4, truncate='left').encode(chat)[2] == 1 | 2


def test_left_truncation_keeps_what_the_tokenizer_puts_before_a_text(subject_tokenizer):
    r = renderer(subject_tokenizer, seq_len=6, truncate='left', chats=False)
    text = 'the fox and the owl and the rabbit and the cat'
    whole = r.tokenizer(text)['input_ids']
    assert r.encode(text)[0].tolist() == [whole[0], *whole[-5:]] and whole[0] == r.tokenizer.bos_token_id
