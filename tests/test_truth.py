"""Words of explanations against the text: every figure by hand, on a tokenizer whose tokens are letters."""

import types

import numpy as np
import pytest

from lens import metrics, truth
from lens.metrics import FIGURES, Collected
from lens.words import Format
from tests.chat_rows import letters

TOKENIZER = letters()
TEXTS = [  # | is the position that is read
    'The volcano threw ash and ash fell on| the slopes; ash nobody in the distant town of Orle had noticed anything',
    'A violin is tuned by fi|fths, and its strings are wound with silver by a patient old master of Cremona town',
]
T = 90


def ids_of(text: str, length: int = T) -> np.ndarray:
    ids = TOKENIZER(text)['input_ids'][:length]
    return np.array(ids + [-1] * (length - len(ids)))


def split_of(texts, **meta):
    rows = [TOKENIZER(x)['input_ids'] for x in texts]
    tokens = np.array([r + [0] * (max(map(len, rows)) - len(r)) for r in rows])
    return types.SimpleNamespace(tokens=tokens, lengths=np.array([len(r) for r in rows]), role=None, meta=meta)


def sources(texts=TEXTS, **meta):
    split, positions = split_of([x.replace('|', '') for x in texts], **meta), [[x.index('|') - 1] for x in texts]
    train = split_of(['the town and silver and ash', 'a slope of ash', 'the town'])
    return truth.sources(split, train, range(len(texts)), np.array(positions), TOKENIZER)


NAMED = Format.parse('topic:2,next:2,now:2').to_meta()


def test_what_is_true_of_a_text():
    first, second = sources(**NAMED).of_N
    assert first.said == {'volcano', 'threw', 'ash', 'fel'}
    assert first.ahead == {'slop', 'ash', 'nobodi', 'distant'}  # within 32 letters; a stop word is none
    assert first.rarest == ('fel', 'threw')  # in no other text, the later one first
    assert first.next[:3] == ('th', 'slop', 'ash')
    assert second.said == {'violin', 'tun'} and 'fifth' in second.ahead  # a word that goes on is not yet there
    assert second.next[:2] == ('fth', 'and')


def shares(said, name, **meta):
    hits, of = getattr(truth, name)(sources(**meta), np.stack([ids_of(x) for x in said]))
    return [f'{h}/{n}' for h, n in zip(hits, of, strict=True)]


def test_content_words_are_of_the_text_ahead_or_invented():
    """Inflections are folded, a word counts once, the names of parts do not count."""
    said = ['topic: volcanoes, volcano, dragon | next: the slope | now: fell on', 'topic: string | next:fths now']
    assert shares(said, 'grounded', **NAMED) == ['2/4', '0/1']  # fths is the end of a word
    assert shares(said, 'grounded_ahead', **NAMED) == ['1/4', '1/1']
    assert shares(said, 'invented', **NAMED) == ['1/4', '0/1']
    assert shares(['', 'topic: the'], 'invented', **NAMED) == ['0/0', '0/0']
    plain = ['topic volcano: ash', 'violins']  # labels without parts: every word counts
    assert shares(plain, 'grounded') == ['2/3', '1/1']


def test_a_word_that_the_end_cuts_counts_where_the_text_has_more_of_it():
    whole = 'now: on the volcano and the slo'
    ids = np.stack([ids_of(whole, len(whole)), ids_of('now: of a dragon with strange', len(whole))])
    hits, of = truth.invented(sources(**NAMED), ids)
    assert hits.tolist() == [0, 2] and of.tolist() == [1, 2]
    assert truth.grounded(sources(**NAMED), ids)[0].tolist() == [1, 0]


def test_the_rarest_words_are_found_in_any_part():
    rare = [s.rarest for s in sources(**NAMED).of_N]
    assert rare[1] == ('tun', 'violin')  # of equals the later one
    said = [f'topic: dragon | now: {rare[0][1]}', 'next: a violin | now: tuned']
    assert shares(said, 'topic_recall', **NAMED) == ['1/2', '2/2']
    beside = Format.parse('topic:2', context_tokens=12).to_meta()
    assert sources(**beside).of_N[1].rarest == ('violin',)  # tuned stands beside the label


def test_the_next_words_count_at_their_place():
    said = ['next: the slope of', 'next:fths, or | now: and its']
    assert shares(said, 'next_match', **NAMED) == ['2/3', '1/2']
    assert shares(said, 'next_match') == ['0/0', '0/0']


def collected(said: dict, with_sources=True, **meta):
    """Two activations, one a document."""
    ids = {k: np.stack([ids_of(x) for x in v]) for k, v in said.items()}
    what = sources(**meta) if with_sources else None
    none = {'a': None, 'pred': ids, 'found': None, 'truth_NxF': None, 'fields': [], 'tagged': False, 'error': 'nmse'}
    return Collected(ids=ids, doc_N=np.array([3, 4]), sources=what, **none)


def values(c, text_of):
    found = {k: f.function(c, f.text) for k, f in FIGURES.items() if f.group == 'truth' and f.text in text_of}
    return {k: v['value'] for k, v in found.items() if v is not None}


def test_figures_are_pooled_and_their_controls_are_those_of_other_activations():
    said = {
        'greedy': ['topic: volcano, ash, dragon | next: the slope', 'topic: violin | next:fths'],
        'no_activation': ['topic: town', 'topic: town'],
    }
    got = values(collected(said, **NAMED), said)
    assert got['grounded'] == pytest.approx(3 / 5, rel=1e-12) and got['invented'] == pytest.approx(1 / 5, rel=1e-12)
    assert got['grounded'] + got['grounded_ahead'] + got['invented'] == pytest.approx(1, rel=1e-12)
    assert got['grounded_shuffled'] == 0 and got['next_match_shuffled'] == 0 and got['next_match'] == 1
    assert got['topic_recall_shuffled'] == got['topic_recall_no_activation'] == 0 < got['topic_recall']
    assert 'next_match_no_activation' not in got and not any(k.endswith(('_sampled', '_given')) for k in got)
    assert values(collected(said, with_sources=False), said) == {}
    figure = metrics.share(*truth.grounded(sources(**NAMED), collected(said, **NAMED).ids['greedy']), np.array([3, 4]))
    assert figure['ci95'] == [0.5, 1.0]  # of one document alone, or the other
