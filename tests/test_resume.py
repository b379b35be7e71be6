"""What a run keeps of itself, and how it and others go on from there."""

import shutil

import numpy as np
import pytest

from lens.checkpoint import Checkpoints, Keep, reopen
from lens.files import read_jsonl
from tests.curves import curve
from tests.small_run import config, figures, train
from tests.test_checkpoint import largest_file


@pytest.fixture(scope='module')
def settings(world):
    """Eight steps of SFT; evaluated at 3 and 6, saved at 3, 6 and 8."""
    cfg = config(world)
    cfg.phases, cfg.sft.steps, cfg.checkpoint.keep = ('sft',), 8, 3
    return cfg


@pytest.fixture(scope='module')
def calm(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('calm') / 'w'
    return workdir, train(settings, workdir)


def test_a_damaged_newest_checkpoint_is_moved_away_and_its_steps_are_made_again(settings, calm, tmp_path, capsys):
    workdir = tmp_path / 'w'
    shutil.copytree(calm[0], workdir)
    file = largest_file(workdir / 'checkpoints/8')
    file.write_bytes(file.read_bytes()[:100])
    summary = train(settings, workdir)
    said = capsys.readouterr().out
    assert 'checkpoints/8 is damaged' in said and 'continuing at step 6' in said
    assert (workdir / 'checkpoints-damaged/8').is_dir()
    assert figures(summary) == figures(calm[1]) and curve(workdir) == curve(calm[0])
    with Checkpoints(workdir / 'checkpoints', Keep(3)) as checkpoints:
        assert checkpoints.steps == [3, 6, 8]


def test_a_new_best_is_saved_and_kept_and_can_be_asked_for(settings, tmp_path):
    cfg = settings.copy_and_resolve_references()
    cfg.checkpoint.every, cfg.checkpoint.keep, cfg.checkpoint.keep_every, cfg.eval.every = 0, 1, '5s', 2
    workdir = tmp_path / 'w'
    train(cfg, workdir)
    fve = {r['step']: r['fve'] for r in read_jsonl(workdir / 'metrics.jsonl') if r['kind'] == 'eval'}
    best = max(fve, key=fve.get)
    with Checkpoints(workdir / 'checkpoints', Keep()) as checkpoints:
        assert checkpoints.steps == sorted({best, 5, 8}) and checkpoints.best_step == best
    for step, wanted in (('best', best), ('newest', 8), ('5', 5)):
        assert reopen(workdir, step).step == wanted


def test_weights_of_another_run_start_one_without_its_optimizer(settings, calm, tmp_path):
    cfg = settings.copy_and_resolve_references()
    cfg.init_from, cfg.phases = str(calm[0]), ()
    summary = train(cfg, tmp_path / 'evaluated')
    assert summary['fve'] == calm[1]['fve'] and summary['steps'] == 0
    cfg.phases, cfg.sft.steps = ('sft',), 1
    train(cfg, tmp_path / 'on')
    first = read_jsonl(tmp_path / 'on/metrics.jsonl')[0]
    began = read_jsonl(calm[0] / 'metrics.jsonl')[0]
    assert first['step'] == 1 and first['loss_decoder'] < began['loss_decoder']


@pytest.mark.slow
def test_the_window_of_the_profiler(settings, calm, tmp_path, capsys):
    """A trace of its steps; nothing else differs."""
    train(settings, tmp_path / 'w', profile='2:2')
    assert list((tmp_path / 'w/profile').rglob('*.xplane.pb'))
    assert 'Profile of steps 2 to 3' in capsys.readouterr().out
    assert curve(tmp_path / 'w') == curve(calm[0])


def test_the_clock_accounts_for_every_second(calm):
    workdir, summary = calm
    rows = [r for r in read_jsonl(workdir / 'metrics.jsonl') if r['kind'] == 'time']
    assert [r['step'] for r in rows] == [3, 6, 8]
    for row in [*rows, summary]:
        parts = {k: v for k, v in row.items() if k.endswith('_part_s')}
        assert len(parts) == 9 and min(parts.values()) >= 0
        # the wall time of a row is read a moment after its parts, by one clock; parts are rounded to milliseconds
        assert 0 < sum(parts.values()) <= row['wall_s'] + 0.1
        assert row['goodput'] == pytest.approx(parts['step_part_s'] / sum(parts.values()), rel=0.05)
    speeds = [r['tflops_s'] for r in read_jsonl(workdir / 'metrics.jsonl') if 'tflops_s' in r]
    assert speeds and np.all(np.array(speeds) > 0)
