"""Prompts and tags as token ids; explanations found, missing, empty; responses made of labels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import response
from lens.errors import LensError
from lens.response import Prompt, Tags, find, respond
from tests import programs
from tests.compare import close
from tests.conftest import LENGTH, TINY

TAGS = Tags((8, 9), (5, 6))


@pytest.mark.parametrize(
    ('ids', 'start', 'length', 'end', 'found'),
    [
        ([8, 9, 1, 2, 5, 6, 3, 3], 2, 2, 6, True),
        ([4, 8, 9, 1, 5, 6, 5, 6], 3, 1, 6, True),
        ([8, 9, 5, 6, 1, 2, 5, 6], 2, 6, 8, False),  # nothing between the first pair
        ([8, 9, 1, 2, 5, 3, 6, 4], 2, 6, 8, False),  # never closed
        ([1, 2, 5, 6, 1, 2, 3, 4], 0, 8, 8, False),  # never opened
        ([8, 9, 1, 2, 3, 4, 5, 6], 2, 4, 8, True),
        ([1, 2, 3, 4, 5, 6, 8, 9], 7, 1, 8, False),  # opened at the very end
    ],
)
def test_explanations_are_found(ids, start, length, end, found):
    got = jax.jit(find, static_argnums=1)(jnp.asarray([ids]), TAGS)
    assert [int(x[0]) for x in got[:3]] == [start, length, end] and bool(got.found_N[0]) is found
    assert np.asarray(got.mask(8))[0].tolist() == [1.0] * end + [0.0] * (8 - end)


def test_without_tags_all_is_explanation_and_an_opening_tag_may_be_missing():
    ids = jnp.asarray([[1, 2, 5, 4]])
    assert [int(x[0]) for x in find(ids, Tags())] == [0, 4, 4, 1]
    assert [int(x[0]) for x in find(ids, Tags((), (5,)))] == [0, 2, 3, 1]


def test_responses_of_labels_are_found_again():
    labels = np.array([[1, 2, 0, 0, 0], [1, 0, 2, 3, 4], [0, 0, 0, 0, 0]])
    got = respond(labels, TAGS, 0, 8)
    assert got.tolist() == [[8, 9, 1, 2, 5, 6, 0, 0], [8, 9, 1, 0, 2, 3, 5, 6], [8, 9, 0, 5, 6, 0, 0, 0]]
    assert got.dtype == labels.dtype
    back = find(jnp.asarray(got), TAGS)
    assert back.found_N.all() and back.length_N.tolist() == [2, 4, 1]
    assert respond(labels, Tags(), 0, 8) is labels
    assert respond(labels, Tags((), (5,)), 0, 8).tolist()[1] == [1, 0, 2, 3, 4, 5, 0, 0]
    assert respond(labels[None], TAGS, 0, 8).tolist() == [got.tolist()]


def test_the_encoder_reads_the_span_alone(base, lens):
    """As if each row had been encoded with its own words only."""
    ids = np.random.default_rng(4).integers(0, TINY.vocab_size, (8, LENGTH))
    spans = [(0, 5), (1, 2), (3, 1), (2, 3), (0, 1), (4, 1), (0, 4), (1, 4)]
    got = programs.encode(lens.encoder, base, ids, None, tuple(map(jnp.asarray, zip(*spans, strict=True))))
    words = [row[s : s + n] for row, (s, n) in zip(ids, spans, strict=True)]
    close(got, programs.encode_by_hand(lens.encoder, base, words))


def letters(text, add_special_tokens=False):
    """A tokenizer of letters in which <|x|>, [INST] and 'ab' are one token each and '#' merges with an 'm' before it."""
    assert not add_special_tokens
    parts = re.findall(r'<\|x\|>|\[INST\]|ab|m#|.', text)
    return {'input_ids': [['<|x|>', '[INST]', 'ab', 'm#'].index(p) if len(p) > 1 else ord(p) for p in parts]}


IDS = response.reader(letters, 128)


def test_prompts_around_slots_and_words():
    assert response.decoder_prompt(IDS, '<|x|>c<embed>d', '') == Prompt([0, ord('c')], [ord('d')])
    assert response.decoder_prompt(IDS, 'a<embed>bc<embed>d<embed>', '') == Prompt(
        [ord('a')], [ord('b'), ord('c'), 0, ord('d'), 0], (2, 4)
    )
    # with a marker, tokens merge over the parts as in the whole text
    assert response.decoder_prompt(IDS, 'c<embed>ab<embed>d', '#') == Prompt(
        [ord('c')], [2, ord('#'), ord('d')], (1,), ord('#')
    )
    # the last <text> is where the words are, the one before is a tag
    assert response.encoder_prompt(IDS, '[INST]<text><text>c') == ([1, *map(ord, '<text>')], [ord('c')])
    assert response.tags(IDS, 'ab', 'c') == Tags((2,), (ord('c'),)) and not response.tags(IDS, '', '')


@pytest.mark.parametrize(
    ('run', 'message'),
    [
        (lambda: response.decoder_prompt(IDS, 'abc', ''), r"decoder.prompt='abc' must contain <embed>"),
        (
            lambda: response.decoder_prompt(IDS, '<bos><embed>', ''),
            r'decoder.prompt holds <bos>, which is no token',
        ),
        (lambda: response.decoder_prompt(IDS, 'a<embed>b', 'cd'), r"decoder.marker='cd' is 2 tokens of the subj"),
        (lambda: response.decoder_prompt(IDS, 'm<embed>b', '#'), r'has 1 slots, but .* its tokens have 0 inside'),
        (lambda: response.decoder_prompt(IDS, '<embed>b', '#'), r'put text around each slot and take a marker'),
        (lambda: response.decoder_prompt(IDS, 'b<embed>', '#'), r'has 1 slots, but .* its tokens have 0 inside'),
        (lambda: response.encoder_prompt(IDS, 'abc'), r"encoder.prompt='abc' must contain <text>"),
        (lambda: response.encoder_prompt(IDS, '<text></s>'), r'encoder.prompt holds </s>, which is no token'),
        (lambda: response.tags(IDS, 'ab', ''), r"explanation_open='ab' needs an explanation_close"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(run, message):
    with pytest.raises(LensError, match=message):
        run()


class Letters:
    """As `letters`, with what a tokenizer says of a token."""

    __call__ = staticmethod(letters)

    def decode(self, ids):
        return ''.join(map(chr, ids))


@pytest.mark.parametrize(
    ('key', 'run'),
    [
        ('decoder.prompt', lambda ids: response.decoder_prompt(ids, 'a<embed>\u00e9b', '')),
        ('decoder.prompt', lambda ids: response.decoder_prompt(ids, '\u00e9<embed>b', '#')),
        ('decoder.marker', lambda ids: response.decoder_prompt(ids, 'a<embed>b', '\u00e9')),
        ('encoder.prompt', lambda ids: response.encoder_prompt(ids, 'a<text>\u00e9')),
        ('explanation_open', lambda ids: response.tags(ids, '\u00e9', 'b')),
        ('explanation_close', lambda ids: response.tags(ids, 'a', '\u00e9')),
    ],
)
def test_a_token_without_an_embedding_is_named_with_its_key(key, run):
    """JAX would read the last row of the table for it."""
    message = f"{key} has the token '\u00e9', id 233, and the subject has embeddings 0..232 alone"
    with pytest.raises(LensError, match=message):
        run(response.reader(Letters(), 233))
    run(response.reader(Letters(), 234))
