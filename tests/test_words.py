"""Words of token ids against a regular expression on the decoded text; rarity by hand; how labels are written and read."""

import collections
import itertools
import re
import types

import numpy as np
import pytest

from lens import words
from lens.errors import LensError
from lens.words import Format, Frequency, fold
from tests.chat_rows import letters, trained

TEXT = (
    "The volcano's ash fell on Zürich, and volcanoes (two of them!) don't sleep: naïve 東京 😀 and 12 x2 words_joined."
)


@pytest.mark.parametrize('kind', ['gpt2', 'spiece', 'letters'])
def test_words_are_those_of_the_text_whatever_the_tokenizer(kind):
    tokenizer = letters() if kind == 'letters' else trained(kind)
    ids = tokenizer(TEXT, add_special_tokens=False)['input_ids']
    assert tokenizer.decode(ids) == TEXT  # or the words would be others
    found = words.Reader(tokenizer).words(ids)
    assert [w.text for w in found] == re.findall(r"[^\W_]+(?:'[^\W_]+)*", TEXT)
    assert all(a.last < b.last for a, b in itertools.pairwise(found))
    for word in found:  # exactly its tokens
        assert word.text in tokenizer.decode(ids[word.first : word.last + 1])
        assert word.first == word.last or word.text not in tokenizer.decode(ids[word.first : word.last])


def test_no_word_goes_across_a_special_token_or_what_is_masked():
    tokenizer = letters()
    reader = words.Reader(tokenizer)
    a, b = (tokenizer(x)['input_ids'] for x in ('snow', 'ball'))
    special = tokenizer.convert_tokens_to_ids('<|im_end|>')
    assert reader.words([*a, special, *b]) == [('snow', 0, 3), ('ball', 5, 8)]
    mask = np.array([True] * 4 + [False] + [True] * 3)
    assert [w.text for w in reader.words([*a, *b], mask)] == ['snow', 'all']


FOLDED = (
    'volcano volcanoes|make makes making|stop stopped stopping|carry carries carried carrying|box boxes|glass glasses|'
    "movie movies|city cities|fall falls falling|plan plans planned|add adds added|house houses|Tom Tom's"
)


@pytest.mark.parametrize('forms', FOLDED.split('|'))
def test_inflections_are_one_word(forms):
    assert len({fold(x) for x in forms.split()}) == 1
    assert fold(forms.split()[0].upper()) == fold(forms.split()[0])


def test_different_words_stay_different():
    some = 'bus bring string spring speed need thing analysis hundred plane plan volcano ash magma need red sing'
    assert len({fold(x) for x in some.split()}) == len(set(some.split())) - 1  # plane and plan alone are confused


def test_the_rarest_words_by_hand():
    """Of 9 documents: ash in 4, magma in none; slope twice in this text."""
    frequency = Frequency(collections.Counter({fold('ash'): 4, fold('slope'): 4, fold('lava'): 4}), 9)
    text = re.findall(r'\w+', 'The slope and the ash of 1980 and magma on Slopes of lava')
    assert words.rarest(text, frequency, 9) == ['magma', 'slope', 'lava', 'ash']  # of equals the later one
    assert words.rarest(text, frequency, 2) == ['magma', 'slope']
    often = Frequency(collections.Counter({fold('ash'): words.SEEN, fold('lava'): words.SEEN + 1}), 999)
    assert words.rarest(text, often, 9) == ['slope', 'magma', 'ash', 'lava']  # ash is as rare as what no text has


def test_document_frequencies_count_documents_and_leave_out_what_no_one_wrote():
    tokenizer = letters()
    rows = [tokenizer(x)['input_ids'] for x in ('ash on ashes', 'ash and lava', 'lava lava lav')]
    width = max(map(len, rows))
    split = types.SimpleNamespace(
        tokens=np.array([r + [0] * (width - len(r)) for r in rows]),
        lengths=np.array([len(r) for r in rows]),
        role=None,
        meta={},
    )
    count = words.document_frequency(words.Reader(tokenizer), split)
    assert count == ({fold('ash'): 2, fold('lava'): 2, 'lav': 1}, 3)
    split.role = np.where(split.tokens == tokenizer('v')['input_ids'][0], 4, 5)
    split.meta = {'template': 'chat_template', 'roles': {'special': 4, 'text': 5}}
    assert words.document_frequency(words.Reader(tokenizer), split).counts == {fold('ash'): 2}


# --- labels ---------------------------------------------------------------------------------------------------


def test_labels_are_taken_apart_again():
    form = Format.parse('topic:4, next:3,now:2', context_tokens=8)
    assert form.parts == (('topic', 4), ('next', 3), ('now', 2)) and Format.of(form.to_meta()) == form
    text = 'topic: ash, magma | next:es the slope | now: a | b flows'
    assert form.split(text) == {'topic': ' ash, magma ', 'next': 'es the slope ', 'now': ' a | b flows'}
    assert form.split('ash | now: a') == {'': 'ash ', 'now': ' a'}
    assert form.split('nothing of that') == {'': 'nothing of that'}
    bare = Format.parse('topic:4,next:3,now:2', bare=True)
    assert Format.of(bare.to_meta()) == bare
    assert bare.split('ash magma | the slope | a | b') == {
        'topic': 'ash magma ',
        'next': ' the slope ',
        'now': ' a | b',
    }
    assert Format.of({}) is None


@pytest.mark.parametrize('text', ['', 'topic', 'topic:0', 'topic:2,topic:3', 'mood:3', 'topic:2,,now:1', 'topic:-1'])
def test_formats_that_are_none(text):
    with pytest.raises(LensError, match='is no list such as topic:4,next:4,now:4'):
        Format.parse(text)
