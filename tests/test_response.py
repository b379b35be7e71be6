"""Tags of explanations: found, missing, empty; responses made of labels; an encoder that closes up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens.models.encoder import encode
from lens.response import Tags, extract, respond
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
def test_extraction(ids, start, length, end, found):
    got = jax.jit(extract, static_argnums=1)(jnp.asarray([ids]), TAGS)
    assert [int(x[0]) for x in got[:3]] == [start, length, end] and bool(got.found_N[0]) is found
    assert np.asarray(got.mask(8))[0].tolist() == [1.0] * end + [0.0] * (8 - end)


def test_without_tags_all_is_explanation_and_an_opening_tag_may_be_missing():
    ids = jnp.asarray([[1, 2, 5, 4]])
    assert [int(x[0]) for x in extract(ids, Tags())] == [0, 4, 4, 1]
    assert [int(x[0]) for x in extract(ids, Tags((), (5,)))] == [0, 2, 3, 1]


def test_responses_of_labels_are_extracted_again():
    labels = np.array([[1, 2, 0, 0, 0], [1, 0, 2, 3, 4], [0, 0, 0, 0, 0]])
    got = respond(labels, TAGS, 0, 8)
    assert got.tolist() == [[8, 9, 1, 2, 5, 6, 0, 0], [8, 9, 1, 0, 2, 3, 5, 6], [8, 9, 0, 5, 6, 0, 0, 0]]
    back = extract(jnp.asarray(got), TAGS)
    assert back.found_N.all() and back.length_N.tolist() == [2, 4, 1]
    assert respond(labels, Tags(), 0, 8) is labels
    assert respond(labels, Tags((), (5,)), 0, 8).tolist()[1] == [1, 0, 2, 3, 4, 5, 0, 0]


def test_the_encoder_reads_the_span_alone(base, lens):
    """As if each row had been encoded with its own words only, at its own length."""
    rng = np.random.default_rng(4)
    ids = rng.integers(0, TINY.vocab_size, (4, LENGTH))
    spans = [(0, 5), (1, 2), (3, 1), (2, 3)]
    start, length = (jnp.asarray(x) for x in zip(*spans, strict=True))
    got = jax.jit(lambda i: encode(lens.encoder, base, i, None, (start, length)))(ids)
    for b, (s, n) in enumerate(spans):
        np.testing.assert_allclose(got[b], encode(lens.encoder, base, ids[b : b + 1, s : s + n])[0], atol=1e-5)
