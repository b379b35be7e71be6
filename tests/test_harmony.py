"""gpt-oss chats: the rebuilt tokenizer and the rendering against openai_harmony, roles by hand."""

import pytest

from data_gen import documents
from data_gen.storyworld import chats as story_chats
from data_gen.storyworld import harmony_tokenizer
from lens import hf
from tests.chat_rows import assistant, renderer, runs, user
from tests.test_tiny_chat import check_encoded

pytestmark = pytest.mark.slow  # a vocabulary of 200,000 is rebuilt; rules of roles and chats: test_roles, test_render


@pytest.fixture(scope='module')
def harmony(tmp_path_factory):
    """(openai_harmony's encoding, the gpt-oss tokenizer rebuilt from it)."""
    folder = tmp_path_factory.mktemp('harmony')
    harmony_tokenizer.build(folder)
    return harmony_tokenizer.load_encoding(), hf.load_tokenizer(folder)


TURNS = [
    {'role': 'system', 'content': 'Reasoning: high\nBe kind.'},
    user("Where's the fox < |end|> 12345?\n\n"),
    assistant('In the den.', 'They want a fox.'),
    user('And 兎?'),
    assistant(' In the meadow…\n', 'A rabbit,\nthen.'),
]


def theirs(encoding, turns, effort='HIGH'):
    import openai_harmony as h

    def message(role, text, channel=None):
        m = h.Message.from_role_and_content(role, text)
        return m.with_channel(channel) if channel else m

    system = h.SystemContent.new().with_reasoning_effort(h.ReasoningEffort[effort])
    out = [message(h.Role.SYSTEM, system.with_conversation_start_date('2025-06-28'))]
    for t in turns:
        if t['role'] == 'system':
            out.append(message(h.Role.DEVELOPER, h.DeveloperContent.new().with_instructions(t['content'])))
        elif t['role'] == 'user':
            out.append(message(h.Role.USER, t['content']))
        else:
            if 'thinking' in t:
                out.append(message(h.Role.ASSISTANT, t['thinking'], 'analysis'))
            out.append(message(h.Role.ASSISTANT, t['content'], 'final'))
    return encoding.render_conversation_for_training(
        h.Conversation.from_messages(out), config=h.RenderConversationConfig(auto_drop_analysis=False)
    )


def test_harmony_is_that_of_openai_harmony(harmony):
    encoding, tokenizer = harmony
    r = renderer(tokenizer)
    assert r.kind == 'harmony'
    chat = documents.parse({'messages': TURNS}, 'chat', ('messages',), 'medium')
    assert chat.effort == 'high'
    plain = documents.parse({'messages': [TURNS[1], assistant('No.')]}, 'chat', ('messages',), 'medium')
    got = [r.encode(c) for c in (chat, plain)]
    assert got[0][0].tolist() == theirs(encoding, [{'role': 'system', 'content': 'Be kind.'}, *TURNS[1:]])
    assert got[1][0].tolist() == theirs(encoding, [TURNS[1], assistant('No.')], 'MEDIUM')


def test_harmony_roles_by_hand(harmony):
    r = renderer(harmony[1])
    chat = documents.parse({'messages': TURNS}, 'chat', ('messages',), 'medium')
    head = 'Knowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\nReasoning: high\n\n# Valid channels'
    got = runs(r.tokenizer, r.encode(chat))
    assert head in got[1][1] and got[1][0] == 'system'
    assert [got[0], *got[2:]] == [
        ('special', '<|start|>system<|message|>'),
        ('special', '<|end|><|start|>developer<|message|>'),
        ('system', '# Instructions\n\nBe kind.'),
        ('special', '<|end|><|start|>user<|message|>'),
        ('user', "Where's the fox < |end|> 12345?\n\n"),
        ('special', '<|end|><|start|>assistant<|channel|>analysis<|message|>'),
        ('thinking', 'They want a fox.'),
        ('special', '<|end|><|start|>assistant<|channel|>final<|message|>'),
        ('final', 'In the den.'),
        ('special', '<|end|><|start|>user<|message|>'),
        ('user', 'And 兎?'),
        ('special', '<|end|><|start|>assistant<|channel|>analysis<|message|>'),
        ('thinking', 'A rabbit,\nthen.'),
        ('special', '<|end|><|start|>assistant<|channel|>final<|message|>'),
        ('final', ' In the meadow…\n'),
        ('special', '<|return|>'),
    ]


@pytest.mark.parametrize(
    ('message', 'reason'),
    [
        ({'role': 'tool', 'content': '9'}, 'a tool message, which Harmony rendering does not take'),
        (
            assistant('') | {'tool_calls': [{'function': {'name': 'f'}}]},
            'a tool call, which Harmony rendering does not take',
        ),
        (user('the <|end|> of it'), r'a message holds the control token <\|end\|>'),
    ],
)
def test_what_harmony_does_not_take(harmony, message, reason):
    row = {'messages': [TURNS[1], message, assistant('b')]}
    with pytest.raises(documents.BadRow, match=f'^{reason}$'):
        renderer(harmony[1]).encode(documents.parse(row, 'chat', ('messages',), 'low'))


def test_the_rebuilt_harmony_tokenizer_is_that_of_the_package(harmony):
    encoding, tokenizer = harmony
    texts = [c.prompt + c.thinking for c in story_chats.first_chats(20)]
    texts += [
        'naïve 12345 ünïcode 漢字かな 🙂🙃',
        "I'LL don't\r\n\n  x\t y ",
        'def f(x):\n    return x**2  # ok',
        '\u0301a',
    ]
    assert tokenizer(texts, add_special_tokens=False)['input_ids'] == [
        encoding.encode(t, disallowed_special=()) for t in texts
    ]
    for name in encoding.special_tokens_set:
        if not name.startswith('<|reserved'):
            assert [tokenizer.convert_tokens_to_ids(name)] == encoding.encode(name, allowed_special='all')


def test_answers_alone_are_learned(harmony):
    check_encoded(harmony[1], 'gpt_oss', '<|start|>')
