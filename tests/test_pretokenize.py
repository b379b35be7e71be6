"""Text in, arrays that lens.data opens out."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from data_gen.pretokenize import pretokenize
from lens import data, hf
from lens.errors import LensError

SUBJECT = 'configs/tiny_subject'
VOCAB = 940


def command(*args):
    return subprocess.run([sys.executable, '-m', 'data_gen.pretokenize', *args], capture_output=True, text=True)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp('text')
    texts = [f'Once there was a rabbit number {i}. ' + 'It went to the meadow. ' * (i % 7 + 3) for i in range(40)]
    lines = [*texts, texts[0], 'short', 'Ünïcode — 兎 was here, and it stayed for a very long while.']
    (root / 'in.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in lines))
    run = command(
        f'--input={root}/in.jsonl',
        f'--tokenizer={SUBJECT}',
        f'--out={root}/out',
        '--seq_len=48',
        '--validation_fraction=0.2',
    )
    assert run.returncode == 0, run.stderr
    return root, lines, run.stdout


def test_every_document_is_in_exactly_one_split(written):
    root, lines, stdout = written
    splits = [data.open_split(str(root / 'out'), s, vocab_size=VOCAB) for s in ('train', 'validation')]
    data.check_disjoint(*splits)
    assert [len(s) for s in splits] == [33, 8] and '(1 too short, 1 repeated)' in stdout
    tokenizer = hf.load_tokenizer(SUBJECT)
    got = {tokenizer.decode(r[1:n]) for s in splits for r, n in zip(s.tokens, s.lengths, strict=True)}
    expected = {
        tokenizer.decode(tokenizer(t, truncation=True, max_length=48)['input_ids'][1:]) for t in lines if t != 'short'
    }
    assert got == expected and len(got) == 41
    for s in splits:
        assert s.meta['documents'] == len(s) and s.meta['vocab_size'] == VOCAB
        assert all(
            (r[n:] == s.meta['pad_id']).all() and r[0] == tokenizer.bos_token_id
            for r, n in zip(s.tokens, s.lengths, strict=True)
        )
        assert np.unique(s.doc_id).size == len(s)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('missing.txt', None, 'missing.txt does not exist'),
        (
            'bad.jsonl',
            '{"text": "fine"}\n{"body": "no"}\n',
            'bad.jsonl line 2 is not a JSON object with a field "text"',
        ),
        ('few.txt', 'one line only\n', 'leaves 0 documents of at least 16 tokens'),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(LensError, match=re.escape(message)):
        pretokenize(tmp_path / name, SUBJECT, tmp_path / 'out', seq_len=64, min_tokens=16, validation=0.1, seed=0)
    assert not (tmp_path / 'out').exists()
