"""Questions for a chat model to answer: different, seeded, even, and rows that data_gen.generate reads."""

import collections
import json
import random

import pytest

from data_gen import documents, question_parts, questions, tables
from lens.errors import LensError

FULL = 20000


@pytest.fixture(scope='module')
def full():
    return questions.questions(FULL)


def test_the_full_size_has_no_question_twice_and_begins_with_the_small_one(full):
    assert len(set(full)) == FULL
    assert questions.questions(1500) == full[:1500]
    assert len(set(questions.questions(300, seed=1)) & set(full[:300])) < 30
    assert not any('{' in q or '  ' in q for q in full)


def test_words_of_every_part_are_used(full):
    text = '\n'.join(full)
    tables = [*questions.PARTS.values(), {'': questions.OPENINGS}]
    assert [x for table in tables for values in table.values() for x in values if x not in text] == []
    topics = [t for field in questions.fields() for t in field]
    assert len(set(topics)) == len(topics) >= 300


def test_topics_and_forms_come_in_turn():
    fields, rng = questions.fields(), random.Random(3)
    topics = [t for field in fields for t in field]
    order = questions.passes(fields, rng)
    chosen = [next(order) for _ in question_parts.FORMS]
    for rows in chosen:
        assert sorted(topic for _, topic, _ in rows) == sorted(topics)
    doing = sum(form.doing for form in question_parts.FORMS.values())
    general = len(question_parts.FORMS) - doing
    # the first 1,500 rows: every form that fits all topics, within a third of its share
    counts = collections.Counter(form for rows in chosen for form, _, _ in rows[: 1500 // 4])
    usual = [n for form, n in counts.items() if not question_parts.FORMS[form].doing]
    assert len(counts) == general + doing
    assert max(usual) < 1.34 * sum(usual) / general and min(usual) > 0.66 * sum(usual) / general
    # a topic has every form that fits it before one comes again
    seen = collections.defaultdict(list)
    for form, topic, _ in (row for rows in chosen[:general] for row in rows):
        seen[topic].append(form)
    assert all(len(set(forms)) == general for forms in seen.values())
    assert {'steps', 'needs'} <= set(questions.forms_of('baking bread')) - set(questions.forms_of('bread'))


def test_two_topics_are_of_one_field_and_differ():
    rng = random.Random(0)
    asked = {questions.ask('compare', 'tea', ['tea', 'cheese'], rng) for _ in range(60)}
    assert all('cheese' in q and 'tea' in q for q in asked) and len(asked) > 20


def test_the_command_writes_chats_that_still_need_an_answer(tmp_path):
    out = tmp_path / 'new' / 'q.jsonl'
    said = questions.write(questions.QuestionOptions(out=str(out), rows=7))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r['messages'][0]['content'] for r in rows] == questions.questions(7) and said.startswith('7 questions')
    assert documents.row_format(tables.open_table(str(out), 'train')) == ('chat', ('messages',))


def test_own_topics(tmp_path):
    path = tmp_path / 'topics.txt'
    path.write_text('glass  blowing\n\nmerinos\nglass blowing\n')
    asked = questions.questions(2000, topics=str(path))
    assert len(set(asked)) == 2000 and all('glass blowing' in q or 'merinos' in q for q in asked)


@pytest.mark.parametrize(
    ('text', 'rows', 'says'),
    [
        (None, 5, 'cannot be read'),
        (b'one topic\n', 5, 'has 1 topics'),
        (b'\xff\xfe\xff', 5, 'cannot be read'),
        (b'a\n' + b'x' * 300, 5, 'a topic of 300 characters'),
        (b'a\nb\n', 10**6, 'are all that'),
    ],
)
def test_topics_that_do_not_do_are_refused(tmp_path, monkeypatch, text, rows, says):
    path = tmp_path / 'topics.txt'
    if text is not None:
        path.write_bytes(text)
    if rows == 10**6:  # so that little is to be said
        few = {'joke': question_parts.FORMS['joke'], 'myths': question_parts.FORMS['myths']}
        monkeypatch.setattr(questions, 'FORMS', few)
    with pytest.raises(LensError, match=says):
        questions.questions(rows, topics=str(path))
