"""Storyworld: generator, tokenizer, arrays and command line."""

import collections
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers

from data_gen.storyworld import grammar, world
from data_gen.storyworld import tokenizer as word_tokenizer
from lens.errors import LensError

FIELD_OF = {value: field for field, values in world.FIELDS.items() for value in values}
SETTINGS = world.Settings(train=60, validation=20, seed=3, positions=5)


@pytest.fixture(scope='module')
def tokenizer_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp('tokenizer')
    world.train_tokenizer(path)
    return path


@pytest.fixture(scope='module')
def tokenizer(tokenizer_dir):
    return word_tokenizer.load(tokenizer_dir)


@pytest.fixture(scope='module')
def arrays_dir(tokenizer_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp('arrays') / 'storyworld'
    assert world.write_arrays(out, tokenizer_dir, SETTINGS)
    return out


def _load(folder):
    return {path.stem: np.load(path) for path in folder.glob('*.npy')}


def test_values_are_unique_and_never_template_words():
    values = [value for field in world.FIELDS.values() for value in field]
    assert [len(v) for v in world.FIELDS.values()] == [24, 16, 24, 16, 16, 16, 12, 8]
    assert len({value.lower() for value in values}) == len(values)
    words = set()
    for _, template in grammar.TEMPLATES:
        words |= set(re.findall(r'\w+', re.sub(r'\{\w+\}', '', template).lower()))
    lowered = {value.lower() for value in values}
    assert not words & lowered
    assert not {value + 's' for value in lowered} & (words | lowered)


def test_stories_depend_on_seed_and_index_only():
    forward = [world.generate(7, index) for index in range(30)]
    backward = [world.generate(7, index) for index in reversed(range(30))]
    assert forward == backward[::-1]
    assert len({story.text for story in forward}) == 30
    assert world.generate(8, 0) != forward[0]
    assert forward[0].text == (
        'The potter was shy. The potter felt shy. At noon Kira was shy. The shy potter slept '
        'until noon. What a shy potter, thought Uma. The potter was shy, and Uma sang. Uma and '
        'Kira sang until noon. Uma wondered why Kira was shy. It was noon, and the potter was '
        'shy. At noon Uma made some cake. Kira, still shy, held the hammer. The road to the '
        'bridge made the potter shy. A hammer for some cake, said Uma.'
    )


def test_lengths_balance_and_pace():
    counts, established, total = collections.Counter(), collections.defaultdict(list), 0
    for index in range(2000):
        story = world.generate(1, index)
        assert 85 <= len(story.words) <= 127 and story.words[0] not in FIELD_OF
        total += len(story.words)
        told = set()
        for at, word in enumerate(story.words):
            if word in FIELD_OF:
                assert story.scene[FIELD_OF[word]] == word
                counts[FIELD_OF[word]] += 1
                told.add(word)
            established[at].append(len(told))
    shares = {field: counts[field] / counts.total() for field in world.FIELDS}
    assert min(shares.values()) >= 0.07 and max(shares.values()) <= 0.16, shares
    assert 0.3 <= counts.total() / total <= 0.4
    assert 5.5 <= np.mean(established[55]) <= 7 and np.mean(established[100]) >= 7.7


def test_every_word_is_one_token(tokenizer):
    ids = world.value_token_ids(tokenizer)
    flat = [token for field in ids for token in field]
    assert len(set(flat)) == len(FIELD_OF)
    assert len(tokenizer) <= word_tokenizer.MAX_VOCAB
    assert tokenizer.convert_ids_to_tokens(range(9)) == list(word_tokenizer.SPECIAL_TOKENS)
    assert len(tokenizer.encode(' | | |', add_special_tokens=False)) == 3
    for index in range(300):
        story = world.generate(99, index)
        tokens = tokenizer.encode(story.text)
        assert tokens[0] == tokenizer.bos_token_id
        assert [tokenizer.decode([token]).strip() for token in tokens[1:]] == story.words


@pytest.mark.parametrize(
    'text',
    [
        world.generate(0, 0).text,
        '  two  spaces , and a stop .',
        'naïve café, 你好 🙂\n\t\u0000',
        'e\u0301 \u202eabc',
        ' | Mira fox |',
        "I'm (not) a <tag>",
    ],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_chat_template(tokenizer):
    messages = [
        {'role': 'system', 'content': 'S'},
        {'role': 'user', 'content': 'Q'},
        {'role': 'assistant', 'thinking': 'T', 'content': 'A'},
        {'role': 'user', 'content': 'R'},
    ]
    expected = '<|bos|><|system|>S<|end|><|user|>Q<|end|><|assistant|><|think|>T<|/think|>A<|end|><|user|>R<|end|>'
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + '<|assistant|>'
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == tokenizer.encode(expected, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_arrays_have_the_documented_layout(arrays_dir, tokenizer):
    ids = {}
    for split, count in (('train', 60), ('validation', 20)):
        arrays = _load(arrays_dir / split)
        layout = {stem: (array.dtype.name, array.shape) for stem, array in arrays.items()}
        assert layout == {
            'tokens': ('int32', (count, 128)),
            'lengths': ('int32', (count,)),
            'doc_id': ('int64', (count,)),
            'positions': ('int32', (count, 5)),
            'explanations': ('int32', (count, 5, 12)),
            'facts': ('int8', (count, 128, 8)),
        }
        ids[split] = set(arrays['doc_id'].tolist())
        assert len(ids[split]) == count
        for row, length, doc_id in zip(arrays['tokens'], arrays['lengths'], arrays['doc_id'], strict=True):
            assert row[:length].tolist() == tokenizer.encode(world.generate(3, int(doc_id)).text)
            assert (row[length:] == tokenizer.pad_token_id).all()
        meta = json.loads((arrays_dir / split / 'meta.json').read_text())
        assert (meta['format'], meta['split'], meta['documents']) == ('lens-tokens/1', split, count)
        assert meta['vocab_size'] == len(tokenizer) and meta['explanation_len'] == 12
        assert {f['field']: tuple(f['values']) for f in meta['facts']} == world.FIELDS
        assert [f['token_ids'] for f in meta['facts']] == world.value_token_ids(tokenizer)
    assert not ids['train'] & ids['validation']


def _naive_facts(tokens, tokenizer):
    """Value indices [S][F], read word by word from the decoded tokens."""
    state, rows = [-1] * len(world.FIELDS), []
    for token in tokens.tolist():
        word = tokenizer.decode([token])
        if word.startswith(' ') and word[1:] in FIELD_OF:
            field = FIELD_OF[word[1:]]
            state[list(world.FIELDS).index(field)] = world.FIELDS[field].index(word[1:])
        rows.append(list(state))
    return rows


def test_facts_and_explanations_against_a_naive_reading(arrays_dir, tokenizer):
    arrays = _load(arrays_dir / 'validation')
    for tokens, positions, explanations, facts in zip(
        arrays['tokens'], arrays['positions'], arrays['explanations'], arrays['facts'], strict=True
    ):
        naive = _naive_facts(tokens, tokenizer)
        assert facts.tolist() == naive
        for position, explanation in zip(positions, explanations, strict=True):
            values = [
                values[index]
                for values, index in zip(world.FIELDS.values(), naive[position], strict=True)
                if index >= 0
            ]
            newest_first = [tokenizer.decode([tokens[position - back]]) for back in range(3)]
            text = newest_first + [' |'] + [f' {value}' for value in values]
            text += [' |'] * (world.EXPLANATION_LEN - len(text))
            assert [tokenizer.decode([token]) for token in explanation] == text


def test_positions_are_sorted_distinct_uniform_and_padded():
    lengths_N = np.array([128, 12, 8, 9] + [28] * 2000, np.int32)
    positions_NxP = world.sample_positions(lengths_N, 128, 6, np.random.default_rng(0))
    for length, row in zip(lengths_N, positions_NxP, strict=True):
        real = row[row >= 0]
        assert len(real) == min(6, max(length - 8, 0)) and (row[len(real) :] == -1).all()
        assert (np.diff(real) > 0).all() and ((real >= 8) & (real < length)).all()
    counts = np.bincount(positions_NxP[4:].ravel(), minlength=28)[8:]
    assert counts.shape == (20,) and counts.min() > 500 and counts.max() < 700
    wide_NxP = world.sample_positions(lengths_N[:4], 16, 30, np.random.default_rng(0))
    assert wide_NxP.shape == (4, 30) and (wide_NxP >= 0).sum(axis=1).tolist() == [8, 4, 0, 1]


def test_unlabelled_slots_hold_padding_only(tokenizer):
    ids = world.value_token_ids(tokenizer)
    tokens_NxS, _ = world.encode_stories(tokenizer, [world.generate(0, 0).text], 10)
    facts_NxSxF = world.track_facts(tokens_NxS, ids, len(tokenizer))
    text_NxPxT = world.explain(tokens_NxS, facts_NxSxF, np.array([[9, -1]]), ids, 500, 0)
    assert tokens_NxS.shape == (1, 10) and (text_NxPxT[0, 0] > 0).all()
    assert (text_NxPxT[0, 1] == 0).all()


def test_the_command_writes_arrays_once(tokenizer_dir, tmp_path):
    out = tmp_path / 'world'
    command = [sys.executable, '-m', 'data_gen.storyworld', f'--out={out}', f'--tokenizer={tokenizer_dir}']
    command += ['--train=5', '--validation=2']
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == f'Arrays written: {out}'
    before = (out / 'train' / 'tokens.npy').stat().st_mtime_ns
    assert not world.write_arrays(out, tokenizer_dir, world.Settings(train=5, validation=2))
    assert (out / 'train' / 'tokens.npy').stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ['world']


@pytest.mark.parametrize(
    'tokenizer_path, changes, message',
    [
        (
            '/nowhere',
            {},
            'No tokenizer.json in /nowhere: run python -m data_gen.storyworld --train_tokenizer=/nowhere.',
        ),
        (None, {'seed': 1}, 'exists with other settings: remove it or choose another --out.'),
        (None, {'train': 0}, 'train, validation and positions must be at least 1, seed at least 0.'),
        *((None, {key: 10**9}, 'train and validation must be at most 10000000.') for key in ('train', 'validation')),
        *(
            (None, changes, 'seq_len must be in 9..4096, and positions no more than it.')
            for changes in ({'seq_len': 8}, {'seq_len': 10**7}, {'positions': 10**9})
        ),
    ],
)
def test_settings_that_do_not_serve(tokenizer_dir, arrays_dir, tokenizer_path, changes, message):
    with pytest.raises(LensError, match=re.escape(message)):
        world.write_arrays(arrays_dir, tokenizer_path or tokenizer_dir, SETTINGS._replace(**changes))


def test_damaged_and_foreign_output_is_kept(tokenizer_dir, arrays_dir, tmp_path):
    out = tmp_path / 'copy'
    shutil.copytree(arrays_dir, out)
    meta = out / 'validation/meta.json'
    meta.write_text('{torn')
    with pytest.raises(LensError, match=r'meta.json is not valid JSON .* remove it or choose another --out'):
        world.write_arrays(out, tokenizer_dir, SETTINGS)
    meta.unlink()
    with pytest.raises(LensError, match=r'meta.json does not exist: remove it or choose another --out'):
        world.write_arrays(out, tokenizer_dir, SETTINGS)
    assert (out / 'train/tokens.npy').exists()


def test_a_tokenizer_that_splits_values_is_refused(tmp_path):
    bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    bytes_only.train_from_iterator([], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(tmp_path)
    with pytest.raises(LensError, match=r"splits ' (\||Mira)' into \d tokens"):
        world.write_arrays(tmp_path / 'out', tmp_path, SETTINGS)
    assert not (tmp_path / 'out').exists()
