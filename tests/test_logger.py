"""metrics.jsonl and the JSON files: atomic, append-only, safe to continue after a kill."""

import contextlib
import json
import resource

import pytest

from lens import files, logger


def line(step, **more):
    return (
        json.dumps(
            {'step': step, 'phase': 'sft', 'kind': 'train', 'fve': 0.1 + 0.2 + step, 'wall_s': 1.5 * step} | more
        )
        + '\n'
    )


def writer(workdir, resume_step, say=print):
    return logger.Writer(workdir, resume_step, False, '', {}, say)


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_read_jsonl_of_a_missing_file_is_empty(tmp_path):
    assert files.read_jsonl(tmp_path / 'metrics.jsonl') == []


@pytest.mark.parametrize('torn', ['', '{"step": 3', '{"step": 3, "fve": 0.5}', '{', '"'])
def test_read_jsonl_leaves_a_torn_last_line_out(tmp_path, torn):
    """A line counts once its newline is there: `{"step": 1` of `{"step": 12}` must not be read either."""
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2, "name": "\\u00e9"}\n' + torn)
    assert files.read_jsonl(path) == [{'step': 1}, {'step': 2, 'name': 'é'}]


def test_write_jsonl_reads_back(tmp_path):
    rows = [{'step': 1, 'text': 'a\nb "c" é\u2028'}, {'step': 2, 'x': 1e-17}]
    files.write_jsonl(tmp_path / 'a.jsonl', iter(rows))
    assert files.read_jsonl(tmp_path / 'a.jsonl') == rows


def test_write_json_reads_back_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / 'summary.json'
    for value in ({'fve': 0.1}, {'fve': 0.2, 'nested': [1, None, 'é']}):
        files.write_json(path, value)
        assert json.loads(path.read_text()) == value
    assert [p.name for p in tmp_path.iterdir()] == ['summary.json']


def test_write_json_keeps_the_old_file_when_the_value_cannot_be_written(tmp_path):
    path = tmp_path / 'summary.json'
    files.write_json(path, {'fve': 0.1})
    old = path.read_bytes()
    with pytest.raises(TypeError):
        files.write_json(path, {'fve': 0.2, 'bad': object()})
    with pytest.raises(TypeError):
        files.write_jsonl(path, [{'fve': 0.2}, {'bad': object()}])
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ['summary.json']


def test_write_text_keeps_the_old_file_when_the_rename_does_not_happen(tmp_path, monkeypatch):
    """Killed between write and rename: the old content stands, and the next run replaces it."""
    path = tmp_path / 'summary.json'
    files.write_json(path, {'fve': 0.1})
    old = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(logger.os, 'replace', killed)
        files.write_json(path, {'fve': 0.2})
    assert path.read_bytes() == old
    files.write_json(path, {'fve': 0.3})
    assert json.loads(path.read_text()) == {'fve': 0.3}
    assert [p.name for p in tmp_path.iterdir()] == ['summary.json']


def test_writer_appends_lines_that_are_on_disk_at_once(tmp_path):
    w = writer(tmp_path, 0)
    assert w.elapsed_s == 0
    rows = [json.loads(line(s)) for s in (1, 2)]
    for i, row in enumerate(rows):
        w.write(row)
        assert files.read_jsonl(tmp_path / 'metrics.jsonl') == rows[: i + 1]
    w.close()
    assert (tmp_path / 'metrics.jsonl').read_text() == line(1) + line(2)


def test_writer_drops_later_lines_on_resume_and_keeps_earlier_ones_byte_identical(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    kept = line(10) + line(20) + line(20, kind='eval', full=True, name='\u00e9', tiny=1.0000000000000002e-300)
    path.write_text(kept + line(30) + line(40) + '{"step": 50, "pha')
    w = writer(tmp_path, 20)
    assert path.read_bytes() == kept.encode()
    assert w.elapsed_s == 30  # wall_s of the last kept line
    w.write(json.loads(line(25)))
    w.close()
    assert path.read_bytes() == (kept + line(25)).encode()
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_writer_at_step_0_starts_over(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text(line(1) + line(2))
    w = writer(tmp_path, 0)
    w.close()
    assert (tmp_path / 'metrics.jsonl').read_text() == '' and w.elapsed_s == 0


def test_a_full_disk_lets_lines_wait(tmp_path):
    path, said = tmp_path / 'metrics.jsonl', []
    w = writer(tmp_path, 0, said.append)
    w.write(json.loads(line(1)))
    with full_disk(len(line(1)) + 7):
        for step in (2, 3):
            w.write(json.loads(line(step)))
            assert path.read_text() == line(1), 'not a part of a line'
    assert len(said) == 1 and said[0].startswith(f'warning: {path} cannot be written (File too large); its lines wait')
    w.write(json.loads(line(4)))
    assert path.read_text() == ''.join(map(line, (1, 2, 3, 4))) and len(said) == 1
    with full_disk(path.stat().st_size):
        for step in (5, 6):
            w.write(json.loads(line(step)))
        w.close()
    assert path.read_text() == ''.join(map(line, (1, 2, 3, 4))) and len(said) == 3
    assert said[2] == f'warning: {path} lacks the last 2 lines: the disk is full.'


def test_lines_that_wait_are_written_at_the_end(tmp_path):
    said = []
    w = writer(tmp_path, 0, said.append)
    with full_disk(1):
        w.write(json.loads(line(1)))
    w.close()
    assert (tmp_path / 'metrics.jsonl').read_text() == line(1) and len(said) == 1


def test_a_log_on_a_full_disk_ends_nothing(tmp_path):
    with (tmp_path / 'log').open('w', buffering=1) as log:
        bar = logger.ProgressBar(total=2, every=1)
        bar.console.file = log
        with full_disk(5):
            bar.print('held out at step 1')
        bar.print('held out at step 2')
    assert 'held out at step 2\n' in (tmp_path / 'log').read_text()


def test_seconds_of_a_step_are_those_of_its_phase():
    now = 50.0
    clock = logger.StepClock(lambda: now)
    for phase, step_s, laps in (('sft', 0.25, 60), ('grpo', 2.0, 3)):
        clock.pause()
        medians = []
        for _ in range(laps):
            now += step_s
            medians.append(clock.lap(phase))
        assert medians == [0.0] + (laps - 1) * [step_s]
    now += 100.0  # from one phase to the next nothing is a step, paused or not
    assert clock.lap('sft') == 0.0


@pytest.mark.parametrize(
    ('seconds', 'text'), [(0, '0:00'), (59.9, '0:59'), (61, '1:01'), (3600, '1:00:00'), (36061, '10:01:01')]
)
def test_clock(seconds, text):
    assert logger.clock(seconds) == text


def test_provenance_says_device_versions_commit_and_command():
    p = logger.provenance()
    assert p.keys() >= {'device', 'versions', 'commit', 'command'}
    assert {'python', 'jax'} <= p['versions'].keys() and p['device'] and p['commit'] and p['command']
