"""Small files: atomic, torn lines left out, one sentence for what is damaged."""

import errno
import json
import os
import pathlib

import pytest

from lens import files
from lens.errors import LensError, need_package, shown

ROW = {'step': 1, 'phase': 'sft', 'kind': 'train', 'fve': 0.5, 'wall_s': 2.0}


def row(**changes):
    return json.dumps(ROW | changes).encode()


DAMAGED_LINES = {
    'words': b'garbage',
    'binary': b'\xff\xfe\x00\x9d',
    'NUL': b'\0' * 40,
    'list': b'[1, 2]',
    'null': b'null',
    'empty': b'{}',
    'deep': b'{"step":' + b'[' * 100_000,
    'half': row()[:30],
    'two': row() * 2,
    'step is a text': row(step='2'),
    'step is a share': row(step=0.5),
    'step is true': row(step=True),
    'step is huge': row(step=10**400),
    'no time': json.dumps({k: x for k, x in ROW.items() if k != 'wall_s'}).encode(),
    'infinite time': row(wall_s=float('inf')),
    'figure is a text': row(fve='high'),
    'figure is huge': row(fve=-1e308),
    'figure is a list': row(step_part_s=[1]),
    'kind is a number': row(kind=3),
}


@pytest.mark.parametrize('torn', ['', '{"step": 3', '{"step": 3, "fve": 0.5}', '{', '"'])
def test_read_jsonl_leaves_a_torn_last_line_out(tmp_path, torn):
    """A line counts once its newline is there: `{"step": 1` of `{"step": 12}` must not be read either."""
    path = tmp_path / 'metrics.jsonl'
    assert files.read_jsonl(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "name": "\\u00e9"}\n' + torn)
    assert files.read_jsonl(path) == [{'step': 1}, {'step': 2, 'name': 'é'}]


def test_what_is_written_reads_back_and_leaves_no_temporary_file(tmp_path):
    rows = [{'step': 1, 'text': 'a\nb "c" é\u2028'}, {'step': 2, 'x': 1e-17}]
    files.write_jsonl(tmp_path / 'a.jsonl', iter(rows))
    assert files.read_jsonl(tmp_path / 'a.jsonl') == rows
    for value in ({'fve': 0.1}, {'fve': 0.2, 'nested': [1, None, 'é']}):
        files.write_json(tmp_path / 'b.json', value)
        assert files.read_json(tmp_path / 'b.json', 'run it') == value
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.jsonl', 'b.json']


def test_the_old_file_stands_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / 'summary.json'
    files.write_json(path, {'fve': 0.1})
    old = path.read_bytes()
    with pytest.raises(TypeError):
        files.write_json(path, {'fve': 0.2, 'bad': object()})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, 'replace', killed)
        files.write_json(path, {'fve': 0.2})
    assert path.read_bytes() == old
    files.write_json(path, {'fve': 0.3})
    assert [p.name for p in tmp_path.iterdir()] == ['summary.json']


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (None, 'does not exist: run it.'),
        (b'{', 'is not valid JSON'),
        (b'', 'is not valid JSON'),
        (b'\0\xff{}', 'is not valid JSON'),
        (b'[]', 'holds no JSON object'),
        (b'null', 'holds no JSON object'),
        (b'{"a":' * 65 + b'1' + b'}' * 65, 'is nested more than 64 deep'),
        (b'[' * 1_000_000, 'is nested more than 64 deep'),
        (b'{"a": ' + b'9' * 5000 + b'}', 'holds a number of 5000 digits'),
        (b'{"n": 1}', 'holds no name, expected a text'),
        (b'{"n": 1, "name": null}', 'holds name=None, expected a text'),
        (b'{"n": true, "name": "x"}', 'holds n=True, expected a number'),
        (b'{"n": NaN, "name": "x"}', 'holds n=nan, expected a number'),
        (b'{"n": 1e999, "name": "x"}', 'holds n=inf, expected a number'),
    ],
)
def test_read_json_says_what_is_wrong_and_what_to_do(tmp_path, content, words):
    path = tmp_path / 'a.json'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LensError) as e:
        files.read_json(path, 'run it', keys={'n': float, 'name': str})
    assert str(path) in str(e.value) and words in str(e.value) and str(e.value).endswith(': run it.')


@pytest.mark.parametrize(
    'content',
    [
        '\ufeff{"n": 1}',  # a byte order mark, as some editors write
        '{"n": 1, "text": "' + '[{\\"' * 100 + '"}',  # brackets in a text do not nest
        '{"n": 1, "rows": [' + '[1],' * 100 + '[]]}',  # nor do those side by side
        '{"n": 1, "deep": ' + '[' * 63 + ']' * 63 + '}',
        '{"n": -9223372036854775808, "nothing": NaN}',
    ],
)
def test_read_json_takes_what_is_unusual_and_right(tmp_path, content):
    (tmp_path / 'a.json').write_text(content, 'utf-8')
    assert files.read_json(tmp_path / 'a.json', 'run it', keys={'n': int})['n'] in (1, -(2**63))


@pytest.mark.parametrize('kind', ['pipe', 'folder', 'device', 'large'])
def test_what_is_no_small_file_is_refused_unread(tmp_path, kind):
    path = tmp_path / 'a.json'
    make = {'pipe': os.mkfifo, 'folder': os.mkdir, 'device': lambda p: os.symlink('/dev/zero', p)}
    make.get(kind, lambda p: p.write_bytes(b''))(path)
    if kind == 'large':
        os.truncate(path, files.MOST_BYTES + 1)
    with pytest.raises(LensError, match=r'a\.json (is no file|has \d+ bytes, at most \d+ are read): run it\.'):
        files.read_json(path, 'run it')
    if kind != 'large':
        with pytest.raises(LensError, match=r'a\.json is no file'):
            files.read_jsonl(path)


@pytest.mark.parametrize('keep', [False, True])
def test_damaged_lines_of_metrics_are_left_out_and_kept_beside(tmp_path, keep):
    path, said = tmp_path / 'metrics.jsonl', []
    good = [row(step=n) for n in (1, 2, 3)]
    bad = list(DAMAGED_LINES.values())
    path.write_bytes(b'\n'.join([good[0], *bad, b'', good[1], bad[0], good[2], b'{"step": 4']))
    assert [r['step'] for r in files.read_metrics(path, said.append, keep)] == [1, 2, 3]
    assert len(said) == 1 and f'{len(bad) + 1} of its lines, from line 2 on' in said[0] and str(path) in said[0]
    beside = tmp_path / 'metrics.jsonl.damaged'
    assert beside.exists() == keep and (not keep or beside.read_bytes() == b''.join(x + b'\n' for x in [*bad, bad[0]]))
    path.write_bytes(b'again\n')
    assert files.read_metrics(path, said.append, keep) == [] and len(said) == 2
    assert not keep or beside.read_bytes().endswith(bad[0] + b'\nagain\n'), 'what was kept before stays'
    files.write_jsonl(path, [ROW])
    assert files.read_metrics(path, said.append, keep) == [ROW] and len(said) == 2


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"a": 1}\n[2]\n')
    with pytest.raises(LensError, match='line 2 is no JSON object'):
        files.read_jsonl(tmp_path / 'a.jsonl')


def test_find_looks_here_then_in_the_roots_then_in_what_ships(tmp_path, monkeypatch):
    here, first, second = (tmp_path / name for name in ('here', 'first', 'second'))
    for root in (here, first, second):
        root.mkdir()
    monkeypatch.chdir(here)
    assert files.find('a/b', first, second) == pathlib.Path('a/b'), 'what is nowhere stays, for the message'
    (second / 'a/b').mkdir(parents=True)
    assert files.find('a/b', first, second) == second / 'a/b'
    assert files.find('a/b', first, second, holds='config.json') == pathlib.Path('a/b')
    (first / 'a/b').mkdir(parents=True)
    (first / 'a/b/config.json').touch()
    assert files.find('a/b', first, second) == files.find('a/b/', second, first, holds='config.json')
    assert files.find(tmp_path / 'gone', first) == tmp_path / 'gone'
    assert files.find('configs/tiny_subject', first, holds='config.json').is_dir()
    (here / 'a/b').mkdir(parents=True)
    assert files.find('a/b/', first, second) == pathlib.Path('a/b')


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    message = rf'{tmp_path}/out cannot be written \(No space left on device\)'  # a write tells no name
    with pytest.raises(LensError, match=message), files.new_folder(tmp_path / 'out') as tmp:
        (tmp / 'x').write_text('1')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / 'out') as tmp:
        (tmp / 'x').write_text('1')
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.new_folder(tmp_path / 'out') as tmp:
        (tmp / 'x').write_text('1')
        assert not (tmp_path / 'out').exists()
    assert [p.name for p in tmp_path.rglob('*')] == ['out', 'x']


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    with files.lock(tmp_path / 'lock', 'runs/a', 'wait for it'):
        message = rf'runs/a is in use by process {os.getpid()} on .+: wait for it\.'
        with pytest.raises(LensError, match=message), files.lock(tmp_path / 'lock', 'runs/a', 'wait for it'):
            pass
    with files.lock(tmp_path / 'lock', 'runs/a', 'wait for it'):
        pass


def test_texts_of_others_are_one_line_without_control_characters():
    assert shown('a\n\x1b[31mb\u202ec\ud800') == 'a \ufffd[31mb\ufffdc\ufffd'
    assert shown('x' * 1000, 10) == 'x' * 8 + ' …'


def test_a_missing_package_is_named_with_its_extra():
    need_package('numpy', 'test', 'this')
    with pytest.raises(
        LensError, match=r"log.tensorboard=True needs the package nosuch: pip install 'lens\[tensorboard\]'"
    ):
        need_package('nosuch', 'tensorboard', 'log.tensorboard=True')
