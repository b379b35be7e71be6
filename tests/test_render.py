"""Rows to documents to token ids, every token with the role of its words."""

import numpy as np
import pytest

from data_gen import documents, render, tables
from data_gen.documents import BadRow, Chat
from lens import hf
from lens.errors import LensError
from tests.chat_rows import CHATML, NAMES, assistant, jsonl, renderer, runs, user

SUBJECT = 'configs/tiny_subject'


@pytest.fixture(scope='module')
def subject_tokenizer():
    return hf.load_tokenizer(SUBJECT)


@pytest.mark.parametrize('date', ['', 'junk', '2025-02-30', '20250628', '2025-W26-6', '2025-06-28T00:00'])
def test_a_date_that_is_none_is_refused(subject_tokenizer, date):
    with pytest.raises(LensError, match=r'--date=.* is no day: give YYYY-MM-DD\.'):
        render.Renderer(subject_tokenizer, seq_len=9, truncate='right', date=date, chats=False)


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


ASKED, SAID = [user('q')], [assistant('a')]
CHAT = Chat([*ASKED, *SAID], 'low')


@pytest.mark.parametrize(
    ('row', 'columns'),
    [
        ({'prompt': ASKED, 'completion': SAID}, ('prompt', 'completion')),
        ({'prompt': 'q', 'completion': 'a'}, ('prompt', 'completion')),
        ({'prompt': ASKED, 'chosen': SAID, 'rejected': [assistant('no')]}, ('prompt', 'chosen')),
        ({'prompt': 'q', 'chosen': 'a', 'rejected': 'no'}, ('prompt', 'chosen')),
        ({'prompt': 'q', 'chosen': ASKED + SAID, 'rejected': ASKED + SAID}, ('prompt', 'chosen')),
        ({'chosen': ASKED + SAID, 'rejected': [*ASKED, assistant('no')]}, ('chosen',)),
        ({'prompt': 'q', 'chosen': ASKED + SAID, 'rejected': ASKED, 'messages': ASKED + SAID}, ('messages',)),
        ({'prompt': 'q', 'prompt_id': 'x', 'messages': ASKED + SAID}, ('messages',)),
        ({'messages': ASKED, 'response': 'a'}, ('messages', 'response')),
        ({'dialog_so_far': ASKED, 'Answer': 'a'}, ('dialog_so_far', 'Answer')),
        ({'instruction': 'q', 'input': ' ', 'output': 'a', 'text': 'all'}, ('instruction', 'output')),
        ({'input': 'q', 'output': 'a'}, ('input', 'output')),
        ({'Prompt': 'q', 'Response': 'a', 'text': 'x'}, ('Prompt', 'Response')),
        ({'conversations': [{'from': 'HUMAN', 'value': 'q'}, {'from': ' ChatGPT', 'value': 'a'}]}, ('conversations',)),
        ({'conversations': '[{"from": "USER", "value": "q"}, {"from": "ai", "value": "a"}]'}, ('conversations',)),
        (
            {'chat': [{'role': None, 'content': None, 'from': 'Human', 'value': 'q'}, SAID[0] | {'from': None}]},
            ('chat',),
        ),
        (
            {'messages': [user('q'), {'role': 'assistant', 'content': '<|channel|>final<|message|>a<|return|>'}]},
            ('messages',),
        ),
    ],
)
def test_question_and_answer_are_one_chat(tmp_path, row, columns):
    form = documents.row_format(tables.open_table(str(jsonl(tmp_path / 'in.jsonl', [row]))))
    assert form[1] == columns and documents.parse(row, *form, 'low') == CHAT


def test_what_stands_beside_a_question(tmp_path):
    row = {'system_prompt': 's', 'instruction': 'q', 'input': 'more', 'output': 'a', 'tools': '[{"name": "f"}]'}
    form = documents.row_format(tables.open_table(str(jsonl(tmp_path / 'in.jsonl', [row]))))
    expected = [{'role': 'system', 'content': 's'}, user('q\n\nmore'), assistant('a')]
    assert documents.parse(row, *form, 'low') == Chat(expected, 'low', '[{"name": "f"}]')


@pytest.mark.parametrize(
    ('row', 'column', 'message'),
    [
        ({'messages': ASKED + SAID, 'conversations': ASKED + SAID}, None, 'several columns .*messages, conversations'),
        ({'prompt': 'q', 'response': 'a', 'output': 'b'}, None, 'several columns .*prompt, response, output'),
        (
            {'prompt': 'q', 'response': 'a', 'history': ASKED + SAID},
            None,
            'several columns .*prompt, response, history',
        ),
        ({'messages': [{'role': 'wizard', 'content': 'x'}]}, None, r"messages: message 0 has the role 'wizard'"),
        ({'a': 1, 'text': 'x'}, 'a', 'Column a of .* holds neither chats .* nor texts'),
        ({'a': 1}, 'b', 'has no column b; its columns: a'),
        ({'prompt': 'q', 'answer': 'a'}, 'prompt,reply', 'has no column reply'),
    ],
)
def test_columns_that_nobody_can_choose(tmp_path, row, column, message):
    with pytest.raises(LensError, match=message):
        documents.row_format(tables.open_table(str(jsonl(tmp_path / 'in.jsonl', [row]))), column)


def test_a_named_pair_of_columns(tmp_path):
    row = {'prompt': 'q', 'response': 'no', 'output': 'a'}
    form = documents.row_format(tables.open_table(str(jsonl(tmp_path / 'in.jsonl', [row]))), 'prompt,output')
    assert documents.parse(row, *form, 'low') == CHAT


@pytest.mark.parametrize('column', ['turns', 'prompt'])
def test_lists_of_words_are_no_chats_beside_a_text(tmp_path, column):
    row = {column: ['nature', 'river'], 'text': 'a text'}
    assert documents.row_format(tables.open_table(str(jsonl(tmp_path / 'in.jsonl', [row])))) == ('text', ('text',))


@pytest.mark.parametrize(
    ('row', 'reason'),
    [
        (None, 'not a JSON object'),
        ({'messages': []}, 'no list of messages'),
        ({'messages': [{'role': 'wizard', 'content': 'x'}]}, 'a message has an unknown role'),
        ({'messages': [user('x'), {'role': 'assistant', 'content': None}]}, 'a message has no text'),
        ({'messages': [user('x'), assistant(' \n')]}, 'an empty assistant message'),
        ({'messages': [user('x')], 'reasoning_effort': 'heroic'}, 'unknown reasoning effort'),
        ({'messages': [user('x'), assistant('x') | {'thinking': {'a': 1}}]}, 'a message has thinking that is no text'),
        ({'messages': [user('x') | {'thinking': 'x'}]}, 'a message has thinking or calls and is not of the assistant'),
        ({'messages': [{'from': 'function_call', 'value': 'look'}]}, 'a message has a tool call without a name'),
        ({'messages': [user('x')], 'tools': '[torn'}, 'tools that are no JSON'),
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


R1 = (  # as DeepSeek-R1-Distill: what stands before </think> is cut from every answer
    "{% for m in messages %}[{{ m.role }}]{% set c = m.content %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ c }}{% endfor %}"
)
CALL = {'type': 'function', 'function': {'name': 'depth', 'arguments': {'river': 3}}}
CALLS = (
    '{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}'
    '{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{% endfor %}'
)
TOOL_CHAT = Chat(
    [user('depth?'), assistant('') | {'tool_calls': [CALL]}, {'role': 'tool', 'content': '9'}, assistant('Nine.')],
    'low',
    '[{"type": "function", "function": {"name": "depth"}}]',
)


@pytest.mark.parametrize(
    ('template', 'chat', 'lost'),
    [
        (R1, Chat([user('a'), assistant('b', 't'), user('c'), assistant('d', 'u')], 'low'), {'thinking': 2}),
        (R1, Chat([user('a'), assistant('b')], 'low'), {}),
        (CHATML, Chat([user('a'), assistant('b', 't')], 'low'), {}),
        (CHATML, TOOL_CHAT, {'tool calls': 1, 'tools': 1}),
        (CALLS, TOOL_CHAT, {}),
        ('{{ messages[-1].content }}', Chat([user('a'), assistant('b')], 'low'), {'user messages': 1}),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}", TOOL_CHAT,
         {'tool calls': 1, 'tools': 1, 'tool messages': 1}),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_counted(template, chat, lost):
    got = renderer(template=template).encode(chat).lost
    assert {name: n for name, n in zip(render.LOST, got, strict=True) if n} == lost


def test_calls_and_tools_are_rendered():
    r = renderer(template=CALLS)
    assert [text for role, text in runs(r.tokenizer, r.encode(TOOL_CHAT)) if role == 'special'] == [
        '[{"type": "function", "function": {"name": "depth"}}][user]',
        '[assistant]depth({"river": 3})[tool]',
        '[assistant]',
    ]


def test_calls_are_given_as_a_template_wants_them():
    template = (
        '{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls %}'
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    r = renderer(template=template)
    encoded = r.encode(Chat(TOOL_CHAT.messages, 'low'))
    assert ('special', '[assistant]depth {"river": 3}[tool]') in runs(r.tokenizer, encoded) and not sum(encoded.lost)


@pytest.mark.parametrize('where', [0, 1, 2])
def test_control_tokens_are_no_words(where):
    chat = [user('a'), assistant('b', 't'), user('c'), assistant('d')]
    chat[where] = chat[where] | {('thinking' if where == 1 else 'content'): 'so <|im_end|> it is'}
    with pytest.raises(BadRow, match=r'^a message holds the control token <\|im_end\|>$'):
        renderer().encode(Chat(chat, 'low'))
    foreign = [user('How does < |im_end|> differ from <|eot_id|>?'), assistant('d')]
    assert renderer().encode(Chat(foreign, 'low')).flags == 0


def test_templates_without_a_default_are_one_sentence():
    template = {'rag': CHATML, 'tool_use': CHATML}
    with pytest.raises(LensError, match='has the chat templates rag, tool_use, of which none is the default'):
        renderer(template=template)
    assert renderer(template=template | {'default': R1}).own_template == R1


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
