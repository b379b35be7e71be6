"""Chats and texts in, arrays that lens.data opens out; every token with the role of its words."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_gen import arrays, chat_data, documents, render, shards
from data_gen import pretokenize as module
from data_gen.documents import BadRow, Chat
from data_gen.pretokenize import Settings, pretokenize
from data_gen.storyworld import harmony_tokenizer
from lens import data, hf
from lens.errors import LensError

SUBJECT = 'configs/tiny_subject'
VOCAB = 940
NAMES = {code: name for name, code in render.ROLES.items()}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def command(*args, **more):
    return subprocess.run([sys.executable, '-m', 'data_gen.pretokenize', *args], capture_output=True, text=True, **more)


def letters(template=CHATML, specials=('<|im_start|>', '<|im_end|>', '<|pad|>')):
    """A byte-level tokenizer without merges: every letter is a token, so that roles can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token='<|pad|>')
    tokenizer.add_special_tokens({'additional_special_tokens': list(specials)})
    tokenizer.chat_template = template
    return tokenizer


def renderer(tokenizer=None, seq_len=4096, truncate='right', chats=True, **more):
    return render.Renderer(
        tokenizer or letters(**more), seq_len=seq_len, truncate=truncate, date='2025-06-28', chats=chats
    )


def runs(tokenizer, encoded):
    """[(role, text)] of what encode gives, neighbours of one role joined."""
    ids, roles, _ = encoded
    cuts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(roles)) + 1)
    return [(NAMES[int(roles[c[0]])], tokenizer.decode(ids[c])) for c in cuts]


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text, thinking=None):
    return {'role': 'assistant', 'content': text} | ({'thinking': thinking} if thinking else {})


def jsonl(path, rows):
    path.write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows))
    return path


def chats(n):
    return [{'messages': [user(f'Where is rabbit {i}?'), assistant(f'In meadow {i}.', 'A rabbit.')]} for i in range(n)]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


# ---- rows ----


@pytest.mark.parametrize(
    ('row', 'expected'),
    [
        ({'question': 'q', 'answer': '<think>t</think>\na'}, ([user('q'), assistant('a', 't')], 'low')),
        ({'question': 'q', 'answer': 'a', 'thinking': 't', 'text': 'x'}, ([user('q'), assistant('a', 't')], 'low')),
        (
            {
                'user_content': 'q',
                'assistant_content': 'a',
                'assistant_thinking': None,
                'system_reasoning_effort': 'high',
            },
            ([user('q'), assistant('a')], 'high'),
        ),
        ({'messages': [user('q'), assistant('a') | {'thinking': None}]}, ([user('q'), assistant('a')], 'low')),
        (
            {'system': 'Reasoning: high', 'messages': [{'role': 'system', 'content': 'x'}, user('q'), assistant('a')]},
            ([{'role': 'system', 'content': 'Reasoning: high'}, user('q'), assistant('a')], 'high'),
        ),
        ({'turns': ['q', 'a', 'r']}, ([user('q'), assistant('a'), user('r')], 'low')),
        ({'text': 'a text', 'id': 'b'}, 'a text'),
        ({'text': 'half \ud83d'}, 'half ?'),
    ],
)
def test_row_formats_in_their_order(tmp_path, row, expected):
    table = chat_data.open_table(str(jsonl(tmp_path / 'in.jsonl', [row])))
    got = documents.parse(row, *documents.row_format(table), 'low')
    assert got == (expected if isinstance(expected, str) else Chat(*expected))


@pytest.mark.parametrize(
    ('row', 'reason'),
    [
        (None, 'not a JSON object'),
        ({'messages': []}, 'no list of messages'),
        ({'messages': [{'role': 'wizard', 'content': 'x'}]}, 'a message has an unknown role'),
        ({'messages': [user('x'), {'role': 'assistant', 'content': None}]}, 'a message has no text'),
        ({'messages': [user('x'), assistant(' \n')]}, 'an empty assistant message'),
        ({'messages': [user('x')], 'reasoning_effort': 'heroic'}, 'unknown reasoning effort'),
    ],
)
def test_bad_rows_name_their_reason(row, reason):
    with pytest.raises(BadRow, match=f'^{reason}$'):
        documents.parse(row, 'chat', 'messages', 'medium')


# ---- roles ----


def test_chatml_roles_by_hand():
    r = renderer()
    chat = Chat(
        [
            {'role': 'system', 'content': 'Be kind.'},
            user('user'),  # the word of the header as well
            assistant('Yes', 'Hm?'),
            user('<|im_end|> é兎'),  # a control token that somebody typed stays one
            assistant('assistant'),
        ],
        'medium',
    )
    ids, roles, flags = r.encode([chat])[0]
    assert flags == 0
    assert runs(r.tokenizer, (ids, roles, flags)) == [
        ('special', '<|im_start|>system\n'),
        ('system', 'Be kind.'),
        ('special', '<|im_end|>\n<|im_start|>user\n'),
        ('user', 'user'),
        ('special', '<|im_end|>\n<|im_start|>assistant\n<think>'),
        ('thinking', 'Hm?'),
        ('special', '</think>\n'),
        ('final', 'Yes'),
        ('special', '<|im_end|>\n<|im_start|>user\n<|im_end|>'),
        ('user', ' é兎'),
        ('special', '<|im_end|>\n<|im_start|>assistant\n'),
        ('final', 'assistant'),
        ('special', '<|im_end|>\n'),
    ]
    assert ids.dtype == np.int32 and roles.dtype == np.int8


def test_a_template_that_strips_and_drops():
    """Like Qwen3: texts stripped, thinking of earlier turns left out, the date asked for."""
    template = (
        "{{ strftime_now('%Y-%m-%d') }}{{ reasoning_effort }}"
        '{% for m in messages %}[{{ m.role }}]{% set c = m.content | trim %}'
        "{% if '</think>' in c and not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        '{{ c }}{% endfor %}'
    )
    r = renderer(template=template)
    chat = Chat([user(' a b\n'), assistant('c', 'gone'), user('d'), assistant('e ', 'kept')], 'high')
    assert runs(r.tokenizer, r.encode([chat])[0]) == [
        ('special', '2025-06-28high[user]'),
        ('user', 'a b'),
        ('special', '[assistant]'),
        ('final', 'c'),
        ('special', '[user]'),
        ('user', 'd'),
        ('special', '[assistant]<think>'),
        ('thinking', 'kept'),
        ('special', '</think>\n'),
        ('final', 'e'),
    ]


def test_templates_that_do_not_serve_are_reasons():
    got = renderer(template='{{ messages[0].content | upper }}').encode([Chat([user('a')], 'low')])
    assert str(got[0]) == 'the chat template changes the text'
    got = renderer(template="{{ raise_exception('No, thanks') }}").encode([Chat([user('a')], 'low')])
    assert str(got[0]) == 'the chat template refuses it: No, thanks'
    with pytest.raises(LensError, match='no chat template'):
        renderer(template=None)


def test_a_template_with_thinking_of_its_own():
    r = renderer(hf.load_tokenizer(SUBJECT))
    got = runs(r.tokenizer, r.encode([Chat([user('the fox'), assistant('the owl', 'the rabbit')], 'low')])[0])
    assert [(role, text.strip()) for role, text in got] == [
        ('special', '<|bos|><|user|>'),
        ('user', 'the fox'),
        ('special', '<|end|><|assistant|><|think|>'),
        ('thinking', 'the rabbit'),
        ('special', '<|/think|>'),
        ('final', 'the owl'),
        ('special', '<|end|>'),
    ]


def test_a_token_across_a_border_belongs_to_its_first_visible_character():
    text = 'user\n\nHi you. <end>'
    spans = [(5, 14, render.USER)]  # '\nHi you. '
    tokens = ['user', '\n\n', 'Hi', ' you', '. <', 'end', '>']
    ends = np.cumsum([len(t) for t in tokens])
    offsets = np.stack([np.append(0, ends[:-1]), ends], 1)
    names = [NAMES[int(r)] for r in render.token_roles(text, spans, offsets)]
    assert names == ['special', 'special', 'user', 'user', 'user', 'special', 'special']
    spaced = render.token_roles('[I] a', [(4, 5, render.USER)], np.array([[0, 3], [3, 5], [5, 5]]))
    assert [NAMES[int(r)] for r in spaced] == ['special', 'user', 'special']


def test_truncation_counts_lost_answers():
    chat = Chat([user('abcd'), assistant('wxyz')], 'low')  # 7 + 4 + 2 + 11 + 4 + 2 tokens with the ChatML around
    (whole,) = renderer().encode([chat])
    first = int(np.flatnonzero(whole[1] == render.FINAL)[0])
    for size, flags in ((len(whole[0]), 0), (first + 4, 1), (first + 2, 1 | 2), (first, 1 | 4)):
        ids, roles, got = renderer(seq_len=size).encode([chat])[0]
        assert got == flags and (ids == whole[0][:size]).all() and (roles == whole[1][:size]).all()
    ids, roles, got = renderer(seq_len=7, truncate='left').encode([chat])[0]
    assert got == 1 and (ids == whole[0][-7:]).all() and (roles == whole[1][-7:]).all()
    assert renderer(seq_len=4, truncate='left').encode([chat])[0][2] == 1 | 2


# ---- Harmony ----


@pytest.fixture(scope='module')
def harmony(tmp_path_factory):
    """(openai_harmony's encoding, the gpt-oss tokenizer rebuilt from it)."""
    folder = tmp_path_factory.mktemp('harmony')
    harmony_tokenizer.build(folder)
    return harmony_tokenizer.load_encoding(), hf.load_tokenizer(folder)


TURNS = [
    {'role': 'system', 'content': 'Reasoning: high\nBe kind.'},
    user("Where's the fox <|end|> 12345?\n\n"),
    assistant('In the den.', 'They want a fox.'),
    user('And 兎?'),
    assistant(' In the meadow…\n', 'A rabbit,\nthen.'),
]


def theirs(encoding, turns, effort='HIGH'):
    import openai_harmony as h

    def message(role, text, channel=None):
        m = h.Message.from_role_and_content(role, text)
        return m.with_channel(channel) if channel else m

    system = h.SystemContent.new().with_reasoning_effort(h.ReasoningEffort[effort])
    out = [message(h.Role.SYSTEM, system.with_conversation_start_date('2025-06-28'))]
    for t in turns:
        if t['role'] == 'system':
            out.append(message(h.Role.DEVELOPER, h.DeveloperContent.new().with_instructions(t['content'])))
        elif t['role'] == 'user':
            out.append(message(h.Role.USER, t['content']))
        else:
            if 'thinking' in t:
                out.append(message(h.Role.ASSISTANT, t['thinking'], 'analysis'))
            out.append(message(h.Role.ASSISTANT, t['content'], 'final'))
    return encoding.render_conversation_for_training(
        h.Conversation.from_messages(out), config=h.RenderConversationConfig(auto_drop_analysis=False)
    )


def test_harmony_is_that_of_openai_harmony(harmony):
    encoding, tokenizer = harmony
    r = renderer(tokenizer)
    assert r.kind == 'harmony'
    chat = documents.parse({'messages': TURNS}, 'chat', 'messages', 'medium')
    assert chat.effort == 'high'
    plain = documents.parse({'messages': [TURNS[1], assistant('No.')]}, 'chat', 'messages', 'medium')
    got = r.encode([chat, plain])
    assert got[0][0].tolist() == theirs(encoding, [{'role': 'system', 'content': 'Be kind.'}, *TURNS[1:]])
    assert got[1][0].tolist() == theirs(encoding, [TURNS[1], assistant('No.')], 'MEDIUM')


def test_harmony_roles_by_hand(harmony):
    r = renderer(harmony[1])
    chat = documents.parse({'messages': TURNS}, 'chat', 'messages', 'medium')
    head = 'Knowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\nReasoning: high\n\n# Valid channels'
    got = runs(r.tokenizer, r.encode([chat])[0])
    assert head in got[1][1] and got[1][0] == 'system'
    assert [got[0], *got[2:]] == [
        ('special', '<|start|>system<|message|>'),
        ('special', '<|end|><|start|>developer<|message|>'),
        ('system', '# Instructions\n\nBe kind.'),
        ('special', '<|end|><|start|>user<|message|>'),
        ('user', "Where's the fox <|end|> 12345?\n\n"),  # typed, not a control token
        ('special', '<|end|><|start|>assistant<|channel|>analysis<|message|>'),
        ('thinking', 'They want a fox.'),
        ('special', '<|end|><|start|>assistant<|channel|>final<|message|>'),
        ('final', 'In the den.'),
        ('special', '<|end|><|start|>user<|message|>'),
        ('user', 'And 兎?'),
        ('special', '<|end|><|start|>assistant<|channel|>analysis<|message|>'),
        ('thinking', 'A rabbit,\nthen.'),
        ('special', '<|end|><|start|>assistant<|channel|>final<|message|>'),
        ('final', ' In the meadow…\n'),
        ('special', '<|return|>'),
    ]


# ---- texts, the whole command ----


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp('text')
    texts = [f'Once there was a rabbit number {i}. ' + 'It went to the meadow. ' * (i % 7 + 3) for i in range(40)]
    lines = [*texts, texts[0], 'short', 'Ünïcode — 兎 was here, and it stayed for a very long while.']
    jsonl(root / 'in.jsonl', [{'text': t} for t in lines] + ['{"body": "no"}', '{torn'])
    run = command(
        f'--input={root}/in.jsonl',
        f'--tokenizer={SUBJECT}',
        f'--out={root}/out',
        '--seq_len=48',
        '--validation_fraction=0.2',
    )
    assert run.returncode == 0, run.stderr
    return root, lines, run.stdout


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
    s = Settings(f'{root}/in.jsonl', SUBJECT, seq_len=48, validation_fraction=0.2)
    assert 'is kept (33 train and 8 validation documents); --force' in pretokenize(s, root / 'out')
    assert 'made with other settings' in pretokenize(Settings(s.input, SUBJECT), root / 'out')
    assert contents(root / 'out') == before
    pretokenize(s, root / 'out', force=True)
    assert contents(root / 'out') == before and {p.name for p in root.iterdir()} == {'in.jsonl', 'out'}


def test_text_files_and_long_documents(tmp_path):
    (tmp_path / 'in.txt').write_text(''.join(f'{i} the fox and the owl ' * 500 + '\n\n' for i in range(5)))
    pretokenize(Settings(str(tmp_path / 'in.txt'), SUBJECT, seq_len=32), tmp_path / 'out')
    train, validation = open_both(tmp_path / 'out')
    assert (len(train), len(validation)) == (4, 1) and (train.lengths == 32).all() and train.meta['truncated'] == 4


def test_left_truncation_keeps_what_the_tokenizer_puts_before_a_text():
    r = renderer(hf.load_tokenizer(SUBJECT), seq_len=6, truncate='left', chats=False)
    text = 'the fox and the owl and the rabbit and the cat'
    whole = r.tokenizer(text)['input_ids']
    assert r.encode([text])[0][0].tolist() == [whole[0], *whole[-5:]] and whole[0] == r.tokenizer.bos_token_id


# ---- shards, resuming, processes ----


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Settings for 100 chats in shards of 8 rows, some of them bad or repeated."""
    monkeypatch.setattr(shards, 'ROWS', 8)
    rows = chats(100)
    rows[17], rows[33], rows[70] = rows[3], 'torn', {'messages': [user('x'), assistant('')]}
    return Settings(str(jsonl(tmp_path / 'in.jsonl', rows)), SUBJECT, seq_len=64, min_tokens=4)


def test_an_interrupted_command_goes_on(many, tmp_path, monkeypatch):
    pretokenize(many, tmp_path / 'whole')
    encode, calls = shards.Worker.encode, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(self, *args)

    monkeypatch.setattr(shards.Worker, 'encode', interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretokenize(many, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    pretokenize(many, tmp_path / 'out')
    assert len(calls) == 6 + 13 - 5
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
    assert {p.name for p in tmp_path.iterdir()} == {'in.jsonl', 'whole', 'out'}
    meta = json.loads((tmp_path / 'out/train/meta.json').read_text())
    assert meta['source']['dropped'] == {'an empty assistant message': 1, 'not a JSON object': 1, 'repeated': 1}
    assert meta['role_tokens']['thinking'] > 0 and sum(meta['role_tokens'].values()) == meta['tokens']


def test_two_commands_cannot_write_one_folder_and_locks_may_be_missing(many, tmp_path, monkeypatch):
    with module.work_folder(tmp_path / 'out', {}) as folder:
        (folder / '0.npz').touch()
        with pytest.raises(LensError, match=r'Another command is writing .*out: wait for it'):
            pretokenize(many, tmp_path / 'out')
        assert (folder / '0.npz').exists()
        (folder / '0.npz').unlink()

    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr('fcntl.flock', flock)
    pretokenize(many, tmp_path / 'out')
    assert len(data.open_split(str(tmp_path / 'out'), 'train', vocab_size=VOCAB))


def test_shards_of_other_settings_are_not_used(many, tmp_path, monkeypatch):
    real = arrays.merge
    monkeypatch.setattr(arrays, 'merge', lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left')))
    with pytest.raises(LensError, match=r'out cannot be written \(No space left.*\): mend that'):
        pretokenize(many, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    monkeypatch.setattr(arrays, 'merge', real)
    other = Settings(many.input, SUBJECT, seq_len=32, min_tokens=4)
    pretokenize(other, tmp_path / 'out')
    pretokenize(other, tmp_path / 'fresh')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'fresh')


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
        pretokenize(Settings(str(file), SUBJECT, seq_len=64, min_tokens=4), tmp_path / name)
    for split in ('train', 'validation'):
        for array in ('tokens', 'role', 'lengths', 'doc_id'):
            assert np.array_equal(*(np.load(tmp_path / n / split / f'{array}.npy') for n in 'ab')), array


def test_a_given_validation_split_is_kept_whole(tmp_path):
    train = jsonl(tmp_path / 'train.jsonl', chats(20))
    held = jsonl(tmp_path / 'held.jsonl', chats(22)[18:])
    s = Settings(str(train), SUBJECT, seq_len=64, min_tokens=4, validation_input=str(held))
    pretokenize(s, tmp_path / 'out')
    train, validation = open_both(tmp_path / 'out')
    data.check_disjoint(train, validation)
    assert train.doc_id.tolist() == list(range(18)) and validation.doc_id.tolist() == [20, 21, 22, 23]
    assert train.meta['source']['dropped'] == {'repeated': 2}


def test_lost_answers_are_said(tmp_path):
    jsonl(tmp_path / 'in.jsonl', chats(30))
    out = pretokenize(Settings(str(tmp_path / 'in.jsonl'), SUBJECT, seq_len=12, min_tokens=4), tmp_path / 'out')
    assert '30 documents were cut at 12 tokens' in out and 'Warning: 30 documents lost their final' in out


@pytest.mark.slow
def test_processes_and_kills_change_nothing(tmp_path):
    jsonl(tmp_path / 'in.jsonl', chats(30_000))
    args = (f'--input={tmp_path}/in.jsonl', f'--tokenizer={SUBJECT}', '--seq_len=64', '--min_tokens=4')
    assert command(*args, f'--out={tmp_path}/one', '--num_proc=1').returncode == 0
    for _ in range(2):
        run = subprocess.Popen([sys.executable, '-m', 'data_gen.pretokenize', *args, f'--out={tmp_path}/two'])
        folder, seen = tmp_path / '.two.partial', len(list((tmp_path / '.two.partial').glob('*.npz')))
        while len(list(folder.glob('*.npz'))) < seen + 4 and run.poll() is None:
            time.sleep(0.1)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert not (tmp_path / 'two').exists()
    assert command(*args, f'--out={tmp_path}/two', '--num_proc=2').returncode == 0
    one, two = (contents(tmp_path / x) for x in ('one', 'two'))
    assert one == two


# ---- errors ----


@pytest.mark.parametrize(
    ('name', 'content', 'more', 'message'),
    [
        ('missing.txt', None, {}, 'missing.txt does not exist'),
        ('empty.jsonl', '', {}, 'empty.jsonl is empty'),
        ('few.txt', 'one line only\n', {}, 'leaves 0 documents of at least 16 tokens'),
        ('other.jsonl', '{"body": "x"}\n', {}, 'its columns: body; it has no texts to read in a column text'),
        ('named.jsonl', '{"text": "x"}\n', {'column': 'prose'}, 'has no column prose'),
        ('bad.parquet', 'no', {}, 'bad.parquet is not a Parquet file'),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, name, content, more, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(LensError, match=re.escape(message)) as error:
        pretokenize(Settings(str(tmp_path / name), SUBJECT, seq_len=64, **more), tmp_path / 'out')
    assert '\n' not in str(error.value) and str(error.value).endswith('.')
    assert not list(tmp_path.glob('*out*')) and not list(tmp_path.glob('.out*'))


def test_output_that_cannot_be(many, tmp_path, monkeypatch):
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos/a.png').write_text('')
    with pytest.raises(LensError, match='exists and is no folder of tokens'):
        pretokenize(many, tmp_path / 'photos', force=True)
    with pytest.raises(LensError, match='cannot be written'):
        pretokenize(many, tmp_path / 'in.jsonl' / 'out')
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 1000}))
    with pytest.raises(LensError, match=r'needs 0\.0 GB and the disk has 0\.0 GB left'):
        pretokenize(many, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
