"""Small files: atomic, torn lines left out, one sentence for what is damaged."""

import os

import pytest

from lens import files
from lens.errors import LensError, need_package, shown


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
    [(None, 'does not exist: run it.'), ('{', 'is not valid JSON'), ('[]', 'holds no JSON object')],
)
def test_read_json_says_what_is_wrong_and_what_to_do(tmp_path, content, words):
    path = tmp_path / 'a.json'
    if content is not None:
        path.write_text(content)
    with pytest.raises(LensError) as e:
        files.read_json(path, 'run it')
    assert str(path) in str(e.value) and words in str(e.value) and str(e.value).endswith(': run it.')


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"a": 1}\n[2]\n')
    with pytest.raises(LensError, match='line 2 is no JSON object'):
        files.read_jsonl(tmp_path / 'a.jsonl')


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
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
