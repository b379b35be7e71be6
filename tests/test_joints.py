"""Explanations as text: what the encoder reads of a response against the tokenizer on the whole text."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import joints, response, sharding
from lens.errors import LensError
from lens.response import Found, between, find, respond
from tests import joining

LEFT, RIGHT = 'Text: <text>', '</text> <end>'
OPEN, CLOSE, END = '<e>\n', '\n</e>', '|'
LENGTH = 40


@pytest.fixture(scope='module')
def tokenizer():
    return joining.tokenizer()


@pytest.fixture(scope='module')
def texts(tokenizer):
    """Prompts of an encoder without what is joined with words, and the tags of an explanation that is text."""
    ids = response.reader(tokenizer, len(tokenizer))
    prompt = response.encoder_prompt(ids, f'{LEFT}<text>{RIGHT}')
    joined = joints.build(tokenizer, (LEFT, RIGHT), prompt, (OPEN, CLOSE), len(tokenizer))
    return joined.cut_off(*prompt), response.tags(ids, OPEN, CLOSE, END, joined)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)['input_ids']


def responses(tokenizer, made: list[str]):
    rows = [encode(tokenizer, x) for x in made]
    return jnp.asarray([[*row, *[0] * (LENGTH - len(row))] for row in rows])


def read(ids, tags) -> tuple[Found, list[list[int]]]:
    found = jax.jit(find, static_argnums=1)(ids, tags)
    rows, (start, length) = jax.device_get(jax.jit(between, static_argnums=2)(ids, found, tags))
    return found, [row[s : s + n].tolist() for row, s, n in zip(rows, start, length, strict=True)]


WORDS = ['a text.', '"of" the end', 'As of', 'bc ad', 'text)"', 'end\n\ntext.', 'a.', 'Asa of. ', ' \n of it\n']


def test_the_encoder_reads_what_the_tokenizer_makes_of_the_whole_text(tokenizer, texts):
    (left, right), tags = texts
    found, got = read(responses(tokenizer, [OPEN + w + CLOSE + END for w in WORDS]), tags)
    want = [encode(tokenizer, LEFT + w.strip() + RIGHT) for w in WORDS]
    assert found.found_N.all() and [[*left, *row, *right] for row in got] == want
    # joined token by token, as before, most are others
    apart = [encode(tokenizer, LEFT) + encode(tokenizer, w.strip()) + encode(tokenizer, RIGHT) for w in WORDS]
    assert sum(a == b for a, b in zip(apart, want, strict=True)) < len(WORDS) / 2
    assert tags.joints.cut == (1, 1)


TAGGED = [
    'a text.</e>',
    'A text</e>|',
    '"of"</e>',
    '.\n\nof.</e>.',
    ' \n\n as)"\n\n</e>\n\n',
    'a',
    '</e>a</e>',
    '\n</e>',
    'a</e',
    '.',
    'A.</e>',
]


def test_one_response_alone_is_read_as_beside_others(tokenizer, texts):
    """On a mesh, as a batch of one activation is."""
    both = responses(tokenizer, [OPEN + WORDS[1] + CLOSE + END] * 2)
    mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
        (found, one), (_, two) = (read(sharding.put_batch({'ids': both[:n]}, mesh)['ids'], texts[1]) for n in (1, 2))
    assert found.found_N.all() and one == two[:1] == two[1:]


def test_tags_are_found_as_text_though_they_are_joined_with_words(tokenizer, texts):
    """As a regular expression on the text has it, and the encoder reads what stands between them."""
    (left, right), tags = texts
    tags = dataclasses.replace(tags, end=())
    made = ['<e>' + x for x in TAGGED] + ['of.<e>' + x for x in TAGGED] + ['<e ' + x for x in TAGGED]
    found, got = read(responses(tokenizer, made), tags)
    want = [re.search('<e>(.*?)</e>', x, re.DOTALL) for x in made]
    want = [m[1].strip() if m else '' for m in want]
    assert found.found_N.tolist() == [bool(x) for x in want] and 10 < sum(map(bool, want)) < len(want)
    for text, row, ok in zip(want, got, found.found_N, strict=True):
        assert not ok or [*left, *row, *right] == encode(tokenizer, LEFT + text + RIGHT), text
    ids = responses(tokenizer, made)
    shown = response.words(ids, found, tags)
    spans = zip(shown, found.start_N, found.length_N, found.found_N, strict=True)
    assert [tokenizer.decode(row[s : s + n]).strip() if ok else '' for row, s, n, ok in spans] == want


@pytest.mark.parametrize('text', [*WORDS, '.', '"', 'A', ''])
def test_outside_of_a_step_any_text_is_read_exactly(tokenizer, texts, text):
    (left, right), tags = texts
    got = [*left, *tags.joints.exact(encode(tokenizer, text)), *right]
    assert got == encode(tokenizer, LEFT + text.strip() + RIGHT)
    assert tags.no_words == tuple(tags.joints.exact([]))


def test_a_prompt_of_control_tokens_or_none_joins_nothing(tokenizer):
    joined = joints.build(tokenizer, ('', ''), ([], []), (OPEN, CLOSE), len(tokenizer) + 3)
    assert joined.cut == (0, 0) and joined.texts == ('', '')
    ids = encode(tokenizer, 'a.\n')
    assert joined.exact(ids) == encode(tokenizer, 'a.')
    assert joined.head_VxH[-1].tolist()[0] == len(tokenizer) + 2  # a row that no token has stays what it is


def test_responses_are_written_as_text_and_found_again(tokenizer, texts):
    _, tags = texts
    labels = np.asarray([[*encode(tokenizer, w), *[0] * (20 - len(encode(tokenizer, w)))] for w in ('a text.', 'As)"')])
    got = respond(labels, tags, 0, LENGTH)
    assert tokenizer.decode(got[0]).rstrip('!') == OPEN + 'a text.' + CLOSE + END  # '!' has id 0
    assert got[1].tolist()[: len(encode(tokenizer, OPEN + 'As)"' + CLOSE))] == encode(tokenizer, OPEN + 'As)"' + CLOSE)
    found = find(jnp.asarray(got), tags)
    assert found.found_N.all() and found.end_N.tolist() == [(row != 0).sum() for row in got]
    short = tags.around + 3
    cut = respond(labels[:1], tags, 0, short)
    assert cut.shape[1] == short and find(jnp.asarray(cut), tags).found_N.all()
    assert tokenizer.decode(cut[0]).endswith(CLOSE + END)


def test_a_response_that_is_cut_before_its_end_has_failed(tokenizer, texts):
    """Though its tag is closed; without an end token in the configuration it has not."""
    _, tags = texts
    made = ['a' + CLOSE + END, 'a' + CLOSE, 'a' + CLOSE + 'of' + END, 'a' + END + CLOSE, '\n \n' + CLOSE + END]
    ids = responses(tokenizer, [OPEN + x for x in made])
    found = find(ids, tags)
    assert found.found_N.tolist() == [True, False, True, False, False]
    lengths = [len(encode(tokenizer, OPEN + x)) for x in made]
    stop = len(encode(tokenizer, OPEN + 'a' + END))
    assert found.end_N.tolist() == [lengths[0], LENGTH, lengths[2], stop, lengths[4]]
    free = response.tags(response.reader(tokenizer, len(tokenizer)), OPEN, CLOSE, '', tags.joints)
    assert find(ids, free).found_N.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (('', '', '|'), r"explanation_end='\|' needs an explanation_close"),
        (('', 'x', 'ab'), r"explanation_end='ab' is 2 tokens of the subject, it must be one"),
        (('', ' of', ''), r"explanation_close=' of': its white space is joined to it"),
    ],
)
def test_tags_that_cannot_be_used_are_refused(tokenizer, given, message):
    with pytest.raises(LensError, match=message):
        response.tags(response.reader(tokenizer, len(tokenizer)), *given)


def test_equal_joints_are_one_static_argument(tokenizer, texts):
    """A program is compiled once for them."""
    _, tags = texts
    prompt = [encode(tokenizer, x) for x in (LEFT, RIGHT)]
    again = joints.build(tokenizer, (LEFT, RIGHT), prompt, (OPEN, CLOSE), len(tokenizer))
    of = (LEFT, ' of'), (prompt[0], encode(tokenizer, ' of'))
    others = [joints.build(tokenizer, *of, (OPEN, CLOSE), len(tokenizer))]
    others += [joints.build(tokenizer, (LEFT, RIGHT), prompt, (OPEN, '</f>'), len(tokenizer))]
    assert (again == tags.joints) and hash(again) == hash(tags.joints) and again not in others
    assert re.fullmatch('[0-9a-f]{64}', again.digest)
