"""Chats and texts in, arrays that lens.data opens out; every token with the role of its words."""

import errno
import functools
import json
import multiprocessing
import os
import re
import signal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_gen import arrays, render, shards
from data_gen import pretokenize as module
from data_gen.pretokenize import PretokenizeOptions
from lens import data, hf
from lens.errors import LensError
from tests.chat_rows import assistant, chats, jsonl, user

SUBJECT = 'configs/tiny_subject'
VOCAB = 940
CHATS = {'seq_len': 64, 'min_tokens': 4}
FLAGS = {'seq_len': 48, 'validation_fraction': 0.2}


def options(source, out, **more) -> PretokenizeOptions:
    return PretokenizeOptions(str(source), SUBJECT, str(out), **{'num_proc': 1} | more)


def pretokenize(source, out, **more) -> str:
    return module.pretokenize(options(source, out, **more))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


# ---- texts, the whole command ----


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp('text')
    texts = [f'Once there was a rabbit number {i}. ' + 'It went to the meadow. ' * (i % 7 + 3) for i in range(40)]
    lines = [*texts, texts[0], 'short', 'Ünïcode — 兎 was here, and it stayed for a very long while.']
    jsonl(root / 'in.jsonl', [{'text': t} for t in lines] + ['{"body": "no"}', '{torn'])
    return root, lines, pretokenize(root / 'in.jsonl', root / 'out', **FLAGS)


@pytest.mark.parametrize(('vocab_size', 'dtype'), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_ids_are_as_short_as_the_vocabulary_allows(tmp_path, vocab_size, dtype):
    ids = np.array([vocab_size - 1, 3, 0], np.int32)
    np.savez(tmp_path / 's.npz', lengths=np.array([2, 1]), tokens=ids, role=np.zeros(3, np.int8))
    arrays.merge([tmp_path / 's.npz'], np.zeros(2, int), np.ones(2, bool), tmp_path, 2, 1, 1, vocab_size)
    written = np.load(tmp_path / 'tokens.npy')
    assert written.dtype == dtype and written.tolist() == [[vocab_size - 1, 3], [0, 1]]


def open_both(root):
    return [data.open_split(str(root), s, vocab_size=VOCAB) for s in ('train', 'validation')]


def test_every_document_is_in_exactly_one_split(written):
    root, lines, stdout = written
    splits = open_both(root / 'out')
    data.check_disjoint(*splits)
    dropped = {'no text in text': 1, 'not a JSON object': 1, 'repeated': 1, 'short': 1}
    assert [len(s) for s in splits] == [33, 8] and splits[0].meta['source']['dropped'] == dropped
    assert all(f'{n} {k}' in stdout for k, n in dropped.items())
    tokenizer = hf.load_tokenizer(SUBJECT)
    got = {tokenizer.decode(r[1:n]) for s in splits for r, n in zip(s.tokens, s.lengths, strict=True)}
    expected = {
        tokenizer.decode(tokenizer(t, truncation=True, max_length=48)['input_ids'][1:]) for t in lines if t != 'short'
    }
    assert got == expected and len(got) == 41
    for s in splits:
        assert s.meta['documents'] == len(s) and s.meta['vocab_size'] == VOCAB
        assert s.tokens.dtype == np.uint16  # which hold such a vocabulary
        assert s.meta['tokenizer_sha256'] == hf.tokenizer_sha256(SUBJECT) and s.meta['template_sha256'] is None
        assert all(
            (r[n:] == s.meta['pad_id']).all() and r[0] == tokenizer.bos_token_id
            for r, n in zip(s.tokens, s.lengths, strict=True)
        )
        assert np.unique(s.doc_id).size == len(s)
        for row, ids, n in zip(s.role, s.tokens, s.lengths, strict=True):
            special = np.isin(ids[:n], tokenizer.all_special_ids)
            assert (row[:n] == np.where(special, render.SPECIAL, render.TEXT)).all() and (row[n:] == -1).all()
        for i, row in zip(s.doc_id, s.tokens, strict=True):  # the number of the line
            assert tokenizer.decode(row[1:9]) == tokenizer.decode(tokenizer(lines[i])['input_ids'][1:9])


def test_the_command_prints_an_example_and_keeps_its_output(written):
    root, _, stdout = written
    assert '[special] <|bos|>\n[text] Once there was a rabbit' in stdout and 'were cut at 48 tokens' in stdout
    before = contents(root / 'out')
    both = root / 'in.jsonl', root / 'out'
    assert 'is kept (33 train and 8 validation documents); --force' in pretokenize(*both, **FLAGS)
    assert 'made with other settings' in pretokenize(*both)
    assert contents(root / 'out') == before
    pretokenize(*both, **FLAGS, force=True)
    assert contents(root / 'out') == before and {p.name for p in root.iterdir()} == {'in.jsonl', 'out'}


def test_a_document_is_printed_without_what_a_terminal_obeys(tmp_path):
    jsonl(
        tmp_path / 'in.jsonl',
        [{'text': f'\x1b]0;name\x07\u202e{i} ' + 'Once there was a rabbit. ' * 4} for i in range(9)],
    )
    said = pretokenize(tmp_path / 'in.jsonl', tmp_path / 'out', **FLAGS)
    assert 'Once there' in said and all(c.isprintable() or c == '\n' for c in said)


def test_text_files_and_long_documents(tmp_path):
    (tmp_path / 'in.txt').write_text(''.join(f'{i} the fox and the owl ' * 500 + '\n\n' for i in range(5)))
    pretokenize(tmp_path / 'in.txt', tmp_path / 'out', seq_len=32)
    train, validation = open_both(tmp_path / 'out')
    assert (len(train), len(validation)) == (4, 1) and (train.lengths == 32).all() and train.meta['truncated'] == 4


# ---- shards, resuming, processes ----


@pytest.fixture
def many(tmp_path, monkeypatch):
    """The command for 100 chats in shards of 8 rows, some of them bad or repeated."""
    monkeypatch.setattr(shards, 'ROWS', 8)
    rows = chats(100)
    rows[17], rows[33], rows[70] = rows[3], 'torn', {'messages': [user('x'), assistant('')]}
    return functools.partial(pretokenize, jsonl(tmp_path / 'in.jsonl', rows), **CHATS)


def test_an_interrupted_command_goes_on(many, tmp_path, monkeypatch):
    many(tmp_path / 'whole')
    encode, calls = shards.Worker.encode, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(self, *args)

    monkeypatch.setattr(shards.Worker, 'encode', interrupted)
    with pytest.raises(KeyboardInterrupt):
        many(tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    many(tmp_path / 'out')
    assert len(calls) == 6 + 13 - 5
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
    assert {p.name for p in tmp_path.iterdir()} == {'in.jsonl', 'whole', 'out'}
    meta = json.loads((tmp_path / 'out/train/meta.json').read_text())
    assert meta['source']['dropped'] == {'an empty assistant message': 1, 'not a JSON object': 1, 'repeated': 1}
    assert meta['role_tokens']['thinking'] > 0 and sum(meta['role_tokens'].values()) == meta['tokens']


def test_two_commands_cannot_write_one_folder_and_locks_may_be_missing(many, tmp_path, monkeypatch):
    with module.work_folder(tmp_path / 'out', {}) as folder:
        (folder / '0.npz').touch()
        with pytest.raises(LensError, match=r'out is in use by process \d+ on .*: wait for it'):
            many(tmp_path / 'out')
        assert (folder / '0.npz').exists()
        (folder / '0.npz').unlink()

    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr('fcntl.flock', flock)
    many(tmp_path / 'out')
    assert len(data.open_split(str(tmp_path / 'out'), 'train', vocab_size=VOCAB))


def test_shards_of_other_settings_are_not_used(many, tmp_path, monkeypatch):
    real = arrays.merge
    monkeypatch.setattr(arrays, 'merge', lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left')))
    with pytest.raises(LensError, match=r'out cannot be written \(No space left.*\): mend that'):
        many(tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    monkeypatch.setattr(arrays, 'merge', real)
    many(tmp_path / 'out', seq_len=32)
    many(tmp_path / 'fresh', seq_len=32)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'fresh')


def test_a_replacement_that_was_killed_does_not_stop_the_next(tmp_path):
    for name in ('new', 'new.old', 'out'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'file').write_text(name)
    arrays.replace_folder(tmp_path / 'new', tmp_path / 'out')
    assert [p.name for p in tmp_path.iterdir()] == ['out'] and (tmp_path / 'out/file').read_text() == 'new'


@pytest.mark.parametrize('kind', ['parquet', 'folder', 'disk'])
def test_other_sources_give_the_same(many, tmp_path, kind):
    rows = [
        json.loads(x) if x.startswith('{') else {'messages': []}
        for x in (tmp_path / 'in.jsonl').read_text().splitlines()
    ]
    jsonl(tmp_path / 'in.jsonl', rows)
    if kind == 'disk':
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / 'saved'))
        source = tmp_path / 'saved'
    else:
        (tmp_path / 'train').mkdir()
        source = tmp_path / 'train' / 'train-0.parquet'
        pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=30)
        source = source.parent if kind == 'folder' else source
    for name, file in (('a', tmp_path / 'in.jsonl'), ('b', source)):
        pretokenize(file, tmp_path / name, **CHATS)
    for split in ('train', 'validation'):
        for array in ('tokens', 'role', 'lengths', 'doc_id'):
            assert np.array_equal(*(np.load(tmp_path / n / split / f'{array}.npy') for n in 'ab')), array


def test_a_given_validation_split_is_kept_whole(tmp_path):
    train = jsonl(tmp_path / 'train.jsonl', chats(20))
    held = jsonl(tmp_path / 'held.jsonl', chats(22)[18:])
    pretokenize(train, tmp_path / 'out', **CHATS, validation_input=str(held))
    train, validation = open_both(tmp_path / 'out')
    data.check_disjoint(train, validation)
    assert train.doc_id.tolist() == list(range(18)) and validation.doc_id.tolist() == [20, 21, 22, 23]
    assert train.meta['source']['dropped'] == {'repeated': 2}


def test_lost_answers_are_said(tmp_path):
    out = pretokenize(jsonl(tmp_path / 'in.jsonl', chats(30)), tmp_path / 'out', seq_len=12, min_tokens=4)
    assert '30 documents were cut at 12 tokens' in out and 'Warning: 30 documents lost their final' in out


def test_rows_are_as_wide_as_their_text(tmp_path):
    pretokenize(jsonl(tmp_path / 'in.jsonl', chats(30)), tmp_path / 'out', seq_len=4096, min_tokens=4)
    for split in open_both(tmp_path / 'out'):
        assert split.tokens.shape[1] == split.role.shape[1] == split.lengths.max() < 64
        assert split.meta['seq_len'] == 4096


def test_what_is_lost_is_said_and_counted(tmp_path):
    rows = chats(30)
    call = {'role': 'assistant', 'content': None, 'function_call': {'name': 'look', 'arguments': '{}'}}
    for row in rows[:10]:
        row['messages'][1:1] = [call, {'role': 'tool', 'content': 'Nothing.'}] * 2
    rows[20]['messages'].append(user('And now?'))
    rows[21]['messages'][0]['content'] = 'What is <|eos|>?'
    out = pretokenize(jsonl(tmp_path / 'in.jsonl', [*rows, rows[0]]), tmp_path / 'out', **CHATS)
    assert 'Warning: the chat template leaves out 20 tool calls in 10 documents.' in out
    assert 'Warning: 1 chats do not end with an answer' in out and '1 a message holds the control token <|eos|>' in out
    source = open_both(tmp_path / 'out')[0].meta['source']
    assert source['lost'] == {'tool calls': 20} and source['lost_documents'] == {'tool calls': 10}
    assert source['dropped'] == {'a message holds the control token <|eos|>': 1, 'repeated': 1}


@pytest.mark.parametrize('fraction', [float('nan'), -0.1, float('inf')])
def test_a_fraction_is_a_number(tmp_path, fraction):
    with pytest.raises(LensError, match=r'--validation_fraction=.* must be a number from 0 to 1'):
        pretokenize(jsonl(tmp_path / 'in.jsonl', chats(3)), tmp_path / 'out', validation_fraction=fraction)


def test_a_shard_without_a_document(many, tmp_path):
    rows = [{'messages': [user('x'), assistant('')]}] * 16 + chats(30)
    pretokenize(jsonl(tmp_path / 'in.jsonl', rows), tmp_path / 'out', **CHATS)
    assert sum(map(len, open_both(tmp_path / 'out'))) == 30


@pytest.mark.slow
def test_processes_and_kills_change_nothing(many, tmp_path, monkeypatch):
    """The command in two processes, of which one is killed; then again."""
    many(tmp_path / 'one')
    monkeypatch.setattr(shards, 'SHARDS_PER_PROCESS', 1)
    collect = shards._collect

    def collect_and_kill(waiting, bar):
        collect(waiting, bar)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    monkeypatch.setattr(shards, '_collect', collect_and_kill)
    with pytest.raises(LensError, match=r'A worker process was killed: .* a smaller --num_proc'):
        many(tmp_path / 'two', num_proc=2)
    assert list((tmp_path / '.two.partial').glob('*.npz')) and not (tmp_path / 'two').exists()
    monkeypatch.setattr(shards, '_collect', collect)
    many(tmp_path / 'two', num_proc=2)
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')


# ---- errors ----


@pytest.mark.parametrize(
    ('name', 'content', 'more', 'message'),
    [
        ('missing.txt', None, {}, 'missing.txt does not exist'),
        ('empty.jsonl', '', {}, 'empty.jsonl is empty'),
        ('few.txt', 'one line only\n', {}, 'leaves 0 documents of at least 16 tokens in its texts (text)'),
        (
            'one.json',
            '{"messages": "x", "chat": ["a", "b"]}',
            {},
            'leaves 0 documents of at least 16 tokens in its chats (chat)',
        ),
        ('split.jsonl', '{"text": "x"}\n', {'split': 'trian'}, 'has no split trian; its splits: train'),
        ('other.jsonl', '{"body": "x"}\n', {}, 'its columns: body; it has no texts to read in a column text'),
        ('named.jsonl', '{"text": "x"}\n', {'column': 'prose'}, 'has no column prose'),
        ('dated.jsonl', '{"text": "x"}\n', {'date': '28.06.2025'}, '--date=28.06.2025 is no day: give YYYY-MM-DD'),
        (
            'bad.parquet',
            'no',
            {},
            'bad.parquet is damaged or of another format than its suffix says (Parquet file size',
        ),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, name, content, more, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(LensError, match=re.escape(message)) as error:
        pretokenize(tmp_path / name, tmp_path / 'out', seq_len=64, **more)
    assert '\n' not in str(error.value) and str(error.value).endswith('.')
    assert not list(tmp_path.glob('*out*')) and not list(tmp_path.glob('.out*'))


def test_output_that_cannot_be(many, tmp_path, monkeypatch):
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos/a.png').write_text('')
    with pytest.raises(LensError, match='exists and is no folder of tokens'):
        many(tmp_path / 'photos', force=True)
    with pytest.raises(LensError, match='cannot be written'):
        many(tmp_path / 'in.jsonl' / 'out')
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), {'free': 1000}))
    with pytest.raises(LensError, match=r'needs 0\.0 GB and the disk has 0\.0 GB left'):
        many(tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
