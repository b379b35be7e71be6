"""Which turn of a chat is written anew, what is sent for it, and the shapes that chats come in."""

import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_gen import chat_data, servers, tables, turns
from data_gen.generate import GenerateOptions
from lens import hf
from tests.chat_rows import jsonl, talk

SUBJECT = 'configs/tiny_subject'


@pytest.fixture(scope='module')
def tokenizer():
    return hf.load_tokenizer(SUBJECT)


# --- the choice of the turn -----------------------------------------------------------------------------------


def planner(tokenizer, **given):
    return turns.Planner(tokenizer, GenerateOptions(model='tiny', **given))


def test_the_turn_nearest_to_the_anchor_is_chosen(tokenizer):
    value = talk(0, pairs=8)
    some = planner(tokenizer)
    lengths = [some.count(value[:i]) for i in range(1, 16, 2)]
    assert lengths == sorted(lengths) and len(set(lengths)) == 8
    for anchor in (0, 30, 61, 75, 100, 10_000):
        plan = planner(tokenizer, anchor_prompt_tokens=anchor).plan(3, value)
        expected = min(range(8), key=lambda k: abs(lengths[k] - anchor))
        assert plan.turns == value[: 2 * expected + 1] and plan.original_tokens == lengths[expected]
        assert plan.messages == [{'role': 'system', 'content': 'Reasoning: high'}, *plan.turns]
        assert plan.prompt_tokens == some.count(plan.messages) and plan.index == 3
        assert plan.max_tokens == min(1536, 4000 - plan.prompt_tokens)


def test_a_prompt_must_leave_the_margin_below_the_target(tokenizer):
    value = talk(0, pairs=3)
    lengths = [planner(tokenizer).count(value[:i]) for i in (1, 3, 5)]
    for spare, kept in ((16, 3), (17, 5)):
        plan = planner(tokenizer, target_total_tokens=lengths[2] + spare).plan(0, value)
        assert len(plan.turns) == kept
        assert plan.max_tokens == lengths[2] + spare - plan.prompt_tokens
    with pytest.raises(turns.Skip, match='no prompt below'):
        planner(tokenizer, target_total_tokens=lengths[0] + 16).plan(0, value)


def test_a_long_system_line_backs_off_to_earlier_turns(tokenizer):
    value, prompt = talk(0, pairs=12), 'Be kind. ' * 20
    line = {'role': 'system', 'content': prompt}
    some = planner(tokenizer)
    lengths = [some.count(value[:i]) for i in range(1, 24, 2)]
    target = lengths[11] + 17
    room = [target - some.count([line, *value[:i]]) for i in range(1, 24, 2)]
    expected = max(k for k in range(12) if room[k] >= 1)
    assert 3 <= expected <= 9
    plan = planner(tokenizer, system_prompt=prompt, target_total_tokens=target).plan(0, value)
    assert plan.turns == value[: 2 * expected + 1] and plan.max_tokens == room[expected]
    assert plan.messages[0] == {'role': 'system', 'content': prompt}
    with pytest.raises(turns.Skip, match='with the system line'):
        planner(tokenizer, system_prompt=prompt * 20, target_total_tokens=target).plan(0, value)


def test_what_is_sent(tokenizer):
    value = [{'role': 'system', 'content': 'Old.'}, *talk(0, pairs=2)]
    value[2] = value[2] | {'thinking': 'Hm.', 'id': 7}
    late = {'anchor_prompt_tokens': 1000}
    sent = planner(tokenizer, **late).plan(0, value)
    assert [m['role'] for m in sent.messages] == ['system', 'user', 'assistant', 'user']
    assert sent.messages[0]['content'] == 'Reasoning: high' and sent.turns[0]['content'] == 'Old.'
    assert all(set(m) == {'role', 'content'} for m in sent.messages) and sent.turns[2]['thinking'] == 'Hm.'
    assert planner(tokenizer, reasoning_level='', **late).plan(0, value).messages[0]['content'] == 'Old.'
    plain = planner(tokenizer, **late)
    plain.native = False
    assert plain.plan(0, value).messages[2]['content'] == '<think>Hm.</think>\nOld answer 0.'


def test_a_question_without_an_answer_gets_its_first(tokenizer):
    value = [{'role': 'user', 'content': 'Hi'}]
    plan = planner(tokenizer, reasoning_level='').plan(0, value)
    assert plan.turns == plan.messages == value
    # with an answer, that is written anew, and what is asked after it is dropped
    assert planner(tokenizer).plan(0, [*talk(0), *value]).turns == talk(0)[:1]


@pytest.mark.parametrize(
    ('value', 'reason'),
    [
        (None, 'no list of messages'),
        ([], 'no list of messages'),
        ([{'role': 'system', 'content': 'Hi'}], 'no assistant turn after a user turn'),
        ([{'role': 'assistant', 'content': 'Hi'}], 'no assistant turn after a user turn'),
        ([{'role': 'user', 'content': None}], 'message 0 has no text'),
        ([{'role': 'robot', 'content': 'Hi'}], "message 0 has the role 'robot'"),
        ([{'role': 'tool', 'content': '9'}, *talk(0)], 'no assistant turn before the first tool call'),
        ([{'role': 'user', 'content': 'a <|eos|>'}, *talk(0)], 'a message holds the control token <|eos|>'),
    ],
)
def test_rows_without_a_turn_are_skipped(tokenizer, value, reason):
    with pytest.raises(turns.Skip, match=re.escape(reason)):
        planner(tokenizer).plan(0, value)


@pytest.mark.parametrize(
    ('message', 'expected'),
    [
        ({'content': 'c', 'thinking': 't', 'reasoning': 'r'}, ('t', 'c')),
        ({'content': 'c', 'reasoning_content': 't', 'reasoning': 'r'}, ('t', 'c')),
        ({'content': 'c', 'reasoning': 't', 'thinking': None}, ('t', 'c')),
        ({'content': None, 'reasoning': 't'}, ('t', '')),
        ({'content': '<think>t</think>\nc'}, ('t', 'c')),
        ({'content': '<think>\nt\n</think>\n\nc'}, ('\nt\n', '\nc')),
        ({'content': ' \n<think>t</think>c'}, ('t', 'c')),
        ({'content': 't</think>\nc'}, ('t', 'c')),
        ({'content': '<think>cut off'}, ('cut off', '')),
        ({'content': '<think></think>\nc'}, (None, 'c')),
        ({'content': 'c', 'thinking': ''}, (None, 'c')),
        ({'content': 'a\ud800'}, (None, 'a?')),
        ({'content': '<thinking>t</thinking>c'}, ('t', 'c')),
        (
            {'content': 'Tags such as <think>t</think> are words here'},
            (None, 'Tags such as <think>t</think> are words here'),
        ),
        ({'content': '<|begin_of_thought|>t<|end_of_thought|>\n<|begin_of_solution|>c<|end_of_solution|>'}, ('t', 'c')),
        ({'content': 'c', 'reasoning_details': [{'type': 'reasoning.text', 'text': 't'}]}, ('t', 'c')),
        ({'content': '<think>u</think>c', 'reasoning': 't'}, ('t\nu', 'c')),
        ({'content': '<think>t</think>c', 'reasoning': 't'}, ('t', 'c')),
        (
            {'content': '<|channel|>analysis<|message|>t<|end|><|start|>assistant<|channel|>final<|message|>c'},
            ('t', 'c'),
        ),
        ({'content': '<|channel|>final<|message|>c<|return|>'}, (None, 'c')),
        ({'content': '<|channel|>analysis<|message|>cut off'}, ('cut off', '')),
        ({'content': 'analysisIt asks.assistantfinalc'}, ('It asks.', 'c')),
        ({'content': 'analysiswe see.assistantanalysisand so.assistantfinalc'}, ('we see.\nand so.', 'c')),
        ({'content': ' \nanalysisIt asks.assistantfinalc'}, ('It asks.', 'c')),
        ({'content': 'assistantfinalc'}, (None, 'c')),
        ({'content': 'c', 'thought': 't'}, ('t', 'c')),
        ({'content': 'analysis of the final: c'}, (None, 'analysis of the final: c')),
        ({'content': 'analysis: c'}, (None, 'analysis: c')),
    ],
)
def test_thinking_is_found(message, expected):
    assert turns.extract(message) == expected
    if message['content'] is not None:
        (row,) = chat_data.messages_of([{'role': 'assistant', **message}])
        assert (row.get('thinking'), row['content']) == expected


@pytest.mark.parametrize(
    'content',
    [
        '<|channel|>analysis<|message|>t<|end|>c',
        'c <|channel|>final<|message|>d',
        '<|channel|>commentary to=functions.f<|message|>{}<|call|>',
        'the <|message|> token',
        'analysisIt asks and is cut off',
        '<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b',
    ],
)
def test_channels_that_cannot_be_told_apart_are_refused(content):
    with pytest.raises(servers.Failed, match='channels of Harmony'):
        turns.extract({'content': content})
    with pytest.raises(ValueError, match='channels of Harmony'):
        chat_data.messages_of([{'role': 'assistant', 'content': content}])


@pytest.mark.parametrize('token', ['<|pad|>', '<|im_end|>', '<end_of_turn>'])
def test_an_answer_with_control_tokens_is_refused(tokenizer, token):
    some, value = planner(tokenizer), talk(0)
    answer = servers.Answer({'content': f'Deep.{token}'}, 'stop', 1, '', None)
    with pytest.raises(servers.Failed, match=re.escape(f'the answer holds the control token {token}')):
        some.record(some.plan(0, value), answer)


# --- input ----------------------------------------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_rows(tmp_path):
    rows = [{'id': i, 'talk': talk(i, pairs=1 + i % 3)} for i in range(700)]
    jsonl(tmp_path / 'a.jsonl', rows)
    (tmp_path / 'gaps.jsonl').write_text('\n'.join(json.dumps(r) + '\n' for r in rows))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / 'a.parquet', row_group_size=90)
    (tmp_path / 'parts').mkdir()
    pq.write_table(table[:300], tmp_path / 'parts' / 'train-0.parquet')
    pq.write_table(table[300:], tmp_path / 'parts' / 'train-1.parquet')
    pq.write_table(table[:5], tmp_path / 'parts' / 'validation-0.parquet')
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / 'saved')
    datasets.DatasetDict({'train': saved, 'test': saved.select(range(3))}).save_to_disk(tmp_path / 'dict')
    for name in ('a.jsonl', 'gaps.jsonl', 'a.parquet', 'parts', 'saved', 'dict'):
        opened = tables.open_table(str(tmp_path / name))
        assert (
            opened.count == 700
            and opened.columns == ['id', 'talk']
            and chat_data.chat_columns(opened) == {'talk': True}
        )
        for start in (0, 89, 90, 255, 299, 680, 700):
            assert list(opened.rows(start)) == list(enumerate(rows))[start:], name
    assert tables.open_table(str(tmp_path / 'dict'), 'test').count == 3


def test_messages_of_other_shapes():
    plain = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    shapes = [
        ['a', 'b'],
        [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}],
        {'role': ['user', 'assistant'], 'content': ['a', 'b']},
        [{'role': 'User', 'content': 'a'}, {'role': 'BOT', 'content': 'b'}],
        json.dumps(plain),
        [{'role': None, 'content': None, 'from': 'human', 'value': 'a'}, plain[1] | {'from': None, 'value': None}],
        [{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}]}, plain[1] | {'thinking': None, 'extra': 1}],
    ]
    assert all(chat_data.messages_of(s) == plain for s in shapes)
    thought = chat_data.messages_of([plain[0], plain[1] | {'reasoning_content': 't'}])
    assert thought[1] == {'role': 'assistant', 'content': 'b', 'thinking': 't'}
    channels = [{'role': 'assistant', 'channel': c, 'content': x} for c, x in (('analysis', 't'), ('final', 'b'))]
    assert chat_data.messages_of([plain[0], *channels]) == thought


@pytest.mark.parametrize(
    'calling',
    [
        {'from': 'function_call', 'value': '{"name": "f", "arguments": {"n": 3}}'},
        {'role': 'assistant', 'content': None, 'function_call': {'name': 'f', 'arguments': '{"n": 3}'}},
        {'role': 'assistant', 'tool_calls': [{'type': 'function', 'function': {'name': 'f', 'arguments': '{"n": 3}'}}]},
    ],
)
@pytest.mark.parametrize('result', [{'from': 'observation', 'value': '9'}, {'role': 'tool', 'content': '9'}])
def test_calls_of_other_shapes(calling, result):
    call = {'type': 'function', 'function': {'name': 'f', 'arguments': {'n': 3}}}
    got = chat_data.messages_of([calling, result])
    assert got == [{'role': 'assistant', 'content': '', 'tool_calls': [call]}, {'role': 'tool', 'content': '9'}]
    assert chat_data.messages_of(got) == got


@pytest.mark.parametrize('field', ['content', 'thinking', 'reasoning', 'reasoning_content'])
@pytest.mark.parametrize('value', [['a'], {'a': 1}, 3, True])
def test_texts_of_another_type_are_a_failure(field, value):
    with pytest.raises(servers.Failed, match='content or thinking of the answer is no text'):
        turns.extract({'content': 'a', field: value})
