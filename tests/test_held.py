"""The probe that chooses topic words: its formula, what it has seen, what it finds, and the command."""

import collections
import json
import types

import numpy as np
import pytest

from data_gen import held
from data_gen.label import LabelOptions, label
from lens import data, hf, words
from lens.errors import LensError

DOCUMENTS, SLOTS, WIDTH = 40, 5, 7
NAMES = ('ash', 'bread', 'cloud', 'drum')


def part_of(name: str, positions: np.ndarray):
    split = types.SimpleNamespace(tokens=np.zeros((len(positions), 9), np.int32))
    return types.SimpleNamespace(name=name, split=split, positions=positions)


def planted(seed: int, held_word: str = 'cloud'):
    """(part, activations [N, V, D], present [N, V] sets): coordinate 2 tells of one word, of the others nothing does."""
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, 9, (DOCUMENTS, SLOTS)).astype(np.int32)
    positions[3] = -1
    a = rng.normal(size=(DOCUMENTS, SLOTS, WIDTH)) * np.arange(1, WIDTH + 1) + 3
    present = [[{w for w in NAMES if rng.random() < 0.4} for _ in range(SLOTS)] for _ in range(DOCUMENTS)]
    a[..., 2] += 20 * np.array([[held_word in p for p in row] for row in present])
    return part_of('train' if seed == 0 else 'validation', positions), a, present


def fitted(monkeypatch, part, arrays: dict, present) -> held.Held:
    """A Held whose subject gives the activations of `arrays`, name of a split -> [N, V, D]."""
    monkeypatch.setattr(held, 'Reader', lambda *_: lambda part, rows: arrays[part.name][rows])
    monkeypatch.setattr(held, 'config_of', lambda *_: None)
    counts = collections.Counter(dict.fromkeys(NAMES, DOCUMENTS // held.COMMON))
    frequency = words.Frequency(counts, DOCUMENTS)
    return held.Held('subject', 1, part, frequency, lambda row, slot: present[row][slot])


def test_a_probe_is_the_ridge_regression_of_standardised_numbers():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(90, WIDTH)) * np.arange(1, 8) + 2, rng.random((90, 3)) < [0.2, 0.5, 0.0]
    both = np.concatenate([np.ones((90, 1)), x, y], axis=1)
    mean, weight = held._probe(both[:, : WIDTH + 1].T @ both)
    z = (x - x.mean(0)) / x.std(0)
    target = (y[:, :2] - y[:, :2].mean(0)) / y[:, :2].std(0)
    wide = np.concatenate([z, np.sqrt(held.RIDGE * 90) * np.eye(WIDTH)])
    want = np.linalg.lstsq(wide, np.concatenate([target, np.zeros((WIDTH, 2))]), rcond=None)[0]
    np.testing.assert_allclose((x - mean) @ weight.T[:, :2], z @ want, rtol=1e-9, atol=1e-12)
    assert not weight[2].any()  # a word that no document of these has


def test_words_that_activations_hold_come_first(monkeypatch):
    part, a, present = planted(0)
    other, b, seen = planted(1)
    probes = fitted(monkeypatch, part, {'train': a, 'validation': b}, present)
    for which, said in ((part, present), (other, seen)):
        first = [
            probes.rank(which, row, slot, [*NAMES, 'unknown'])[0] == 'cloud'
            for row in range(DOCUMENTS)
            for slot in range(SLOTS)
            if which.positions[row, slot] >= 0 and 'cloud' in said[row][slot]
        ]
        assert np.mean(first) > 0.9
    got = probes.rank(part, 0, 0, ['zebra', *NAMES, 'apple'])
    assert got[-2:] == ['zebra', 'apple'] and set(got[:-2]) == set(NAMES)  # nobody knows them: as they were given


def test_a_document_is_judged_by_a_probe_that_has_not_seen_it(monkeypatch):
    part, a, present = planted(0)
    changed = [[set(NAMES) - p for p in row] if i == 8 else row for i, row in enumerate(present)]
    before, after = (fitted(monkeypatch, part, {'train': a}, p) for p in (present, changed))
    own = before.fold['train', 8]
    for fold in range(held.FOLDS + 1):
        same = np.array_equal(before.probes[fold][1], after.probes[fold][1])
        assert same == (fold == own), fold


def test_labels_of_a_command_name_words_of_their_text(world, tmp_path):
    given = {'data': str(world / 'data'), 'tokenizer': str(world / 'subject'), 'method': 'self', 'next': 'text'}
    given |= {'positions': 3, 'min_position': 20, 'explanation_len': 12, 'parts': 'topic:3,next:2'}
    said = {}
    for layer in (-1, 1):
        out = tmp_path / str(layer)
        label(LabelOptions(**given, out=str(out), layer=layer))
        tokenizer = hf.load_tokenizer(world / 'subject')
        split = data.open_split(str(out), 'validation', vocab_size=len(tokenizer))
        assert json.loads((out / 'validation/labels.json').read_text())['layer'] == layer
        for row, slot in zip(*np.nonzero(split.positions >= 0), strict=True):
            ids = split.explanations[row, slot]
            said_here = words.Format.of(split.meta).split(tokenizer.decode(ids[ids != split.filler]))
            topic = said_here.get('topic', '')
            text = tokenizer.decode(split.tokens[row, : split.positions[row, slot] + 1])
            keys = words.keys_of(words.WORD.findall(topic))
            assert keys <= words.keys_of(words.WORD.findall(text))
            said.setdefault(layer, []).append(keys)
    assert said[-1] != said[1]


def test_too_few_documents_for_a_probe_leave_rare_words(world, tmp_path):
    given = {'data': str(world / 'data'), 'tokenizer': str(world / 'subject'), 'method': 'self', 'next': 'text'}
    given |= {'positions': 3, 'min_position': 20, 'explanation_len': 12, 'parts': 'topic:3,next:2', 'max_documents': 1}
    for layer in (-1, 1):
        label(LabelOptions(**given, out=str(tmp_path / str(layer)), layer=layer))
    rare, held_ones = (np.load(tmp_path / f'{layer}/train/explanations.npy') for layer in (-1, 1))
    np.testing.assert_array_equal(held_ones, rare)


@pytest.mark.parametrize(
    ('more', 'needle'),
    [({'layer': 99}, '--layer=99 is not a block'), ({'layer': 1, 'parts': 'now:3'}, 'chooses topic words')],
)
def test_refusals_write_nothing(world, tmp_path, more, needle):
    given = {'data': str(world / 'data'), 'tokenizer': str(world / 'subject'), 'out': str(tmp_path / 'out')}
    with pytest.raises(LensError, match=needle):
        label(LabelOptions(**given | {'method': 'self', 'next': 'text'} | more))
    assert not any(tmp_path.iterdir())
