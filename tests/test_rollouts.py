"""The journal of a generation: torn lines, kills at any byte, two commands, the finished data set."""

import errno
import json
import os
import re

import datasets
import numpy as np
import pytest

from data_gen import chat_data, rollouts
from lens.errors import LensError
from lens.files import read_jsonl
from tests.chat_rows import talk

# --- files ----------------------------------------------------------------------------------------------------


def record(i: int) -> dict:
    return {'index': i, 'messages': talk(i), 'tokens': {'original_prompt_tokens': i}}


def rows_of(folder, n: int, resume: bool = False) -> rollouts.Rows:
    return rollouts.Rows(folder, None, n, {}, resume)


@pytest.mark.parametrize('tail', [0, 1, 20, -2, -1])
def test_a_torn_last_line_is_taken_off(tmp_path, tail):
    lines = [(json.dumps(record(i)) + '\n').encode() for i in (4, 0, 2)]
    (tmp_path / 'data.jsonl').write_bytes(b''.join(lines[:2]) + b'{broken\n' + lines[2][:tail])
    (tmp_path / 'skipped.jsonl').write_text('{"index": 1, "reason": "x"}\n{"ind')
    journal = rows_of(tmp_path, 6, True)
    journal.open()
    assert journal.unfinished().tolist() == [2, 3, 5]
    assert [journal.append('data', record(i)) for i in (5, 4, 3, 2)] == [True, False, True, True]
    journal.close()
    assert [r['index'] for r in journal.ordered()] == [0, 2, 3, 4, 5] and journal.counts['data'] == 5
    text = (tmp_path / 'data.jsonl').read_text()
    assert text.endswith('\n') and sorted(re.findall(r'{"index": (\d)', text)) == list('02345')
    assert (tmp_path / 'skipped.jsonl').read_text() == '{"index": 1, "reason": "x"}\n'


def test_killed_after_any_byte_every_row_gets_one_line(tmp_path):
    whole = b''.join((json.dumps(record(i)) + '\n').encode() for i in (2, 0, 1))
    for size in range(0, len(whole) + 1, 7):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / 'data.jsonl').write_bytes(whole[:size])
        journal = rows_of(folder, 3, True)
        journal.open()
        left = journal.unfinished().tolist()
        assert len(left) == 3 - whole[:size].count(b'\n')
        for i in left:
            assert journal.append('data', record(i))
        journal.close()
        assert [r['index'] for r in journal.ordered()] == [0, 1, 2] and len(read_jsonl(folder / 'data.jsonl')) == 3


def test_what_another_command_adds_before_the_files_are_opened_is_seen(tmp_path):
    first, second = rows_of(tmp_path, 3), rows_of(tmp_path, 3)
    first.open()
    first.append('data', record(1))
    with pytest.raises(LensError, match='Another command is writing'):
        second.open()
    first.close()
    second.open()
    assert second.unfinished().tolist() == [0, 2] and not second.append('data', record(1))
    second.close()


def test_a_file_system_without_locks_is_written(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr('fcntl.flock', flock)
    journal = rows_of(tmp_path, 3)
    journal.open()
    journal.append('data', record(0))
    journal.close()
    assert journal.counts['data'] == 1


def test_lines_that_are_there_become_a_data_set_whatever_their_finish_reason(tmp_path):
    reasons = ['stop', 7, None, {'type': 'stop'}, 'length']
    lines = [json.dumps(record(i) | {'finish_reason': reason}) + '\n' for i, reason in enumerate(reasons)]
    (tmp_path / 'data.jsonl').write_text(''.join(lines))
    journal = rows_of(tmp_path, len(reasons) + 1, True)
    journal.open()
    journal.append('rejected', {'index': 5, 'reason': 'half a pair \ud800'})
    assert rollouts.finalise(journal)['counts']['done'] == len(reasons)
    journal.close()
    saved = datasets.load_from_disk(str(tmp_path / 'dataset')).to_list()
    assert [r['finish_reason'] for r in saved] == ['stop', None, None, None, 'length']
    assert [chat_data.messages_of(r['messages']) for r in saved] == [talk(i) for i in range(len(reasons))]


def test_statistics_agree_with_numpy():
    values = np.random.default_rng(0).integers(0, 4000, 1001)
    got = rollouts.length_statistics(values)
    assert list(got) == ['count', 'min', 'p50', 'p90', 'p95', 'p99', 'max', 'mean']
    assert got['count'] == 1001 and got['min'] == values.min() and got['max'] == values.max()
    assert all(got[f'p{q}'] == np.percentile(values, q) for q in (50, 90, 95, 99))
    assert got['mean'] == pytest.approx(values.mean()) and rollouts.length_statistics([]) == {'count': 0}
