"""What a run keeps of itself, and how it and others go on from there."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from lens import places
from lens.checkpoint import Checkpoints, Keep
from lens.errors import LensError
from lens.files import read_jsonl
from lens.reopen import reopen
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


def spelled(cfg, **places):
    """The same configuration with other places."""
    out = cfg.copy_and_resolve_references()
    out.update_from_flattened_dict({k.replace('__', '.'): str(x) for k, x in places.items()})
    return out


def test_a_moved_run_goes_on_from_another_folder(settings, calm, world, tmp_path, monkeypatch, capsys):
    """The workdir, the subject and the data are copies, named from another current folder and with a slash."""
    for name in ('subject', 'data'):
        shutil.copytree(world / name, tmp_path / 'elsewhere' / name)
    shutil.copytree(calm[0], tmp_path / 'elsewhere/runs/w')
    monkeypatch.chdir(tmp_path / 'elsewhere/runs')
    summary = train(spelled(settings, subject__path='../subject/', data__path='data'), pathlib.Path('w'))
    assert 'continuing at step 8' in capsys.readouterr().out
    assert figures(summary) == figures(calm[1])
    monkeypatch.chdir(tmp_path)
    shutil.rmtree('elsewhere/data/train')
    again = reopen(pathlib.Path('elsewhere/runs/w'), subject_path='elsewhere/subject')
    assert again.run.train is None and len(again.run.validation) == 12 and again.config['data']['path'] == 'data'
    shutil.rmtree('elsewhere/data')
    again = reopen(pathlib.Path('elsewhere/runs/w'), needs=(), subject_path='elsewhere/subject')
    assert again.run.validation is None and again.subject == 'elsewhere/subject'
    with pytest.raises(
        LensError, match=r'data/validation/meta.json does not exist.+--data.+counts from the current folder'
    ):
        reopen(pathlib.Path('elsewhere/runs/w'), subject_path='elsewhere/subject')


@pytest.mark.parametrize(
    ('file', 'content'),
    [('config.json', b'{ '), ('tokenizer.json', b' '), ('model.safetensors', b'\0')],
)
def test_a_subject_of_other_content_is_refused(settings, world, tmp_path, file, content):
    shutil.copytree(world / 'subject', tmp_path / 'subject')
    path = tmp_path / 'subject' / file
    before, after = (
        spelled(settings, subject__path=world / 'subject'),
        spelled(settings, subject__path=tmp_path / 'subject'),
    )
    identity = {'config': json.loads(before.to_json()), 'phase_ends': [8], 'documents': {}}
    stored = identity | {'contents': places.contents(before)}
    places.check_identity(stored, identity | {'contents': places.contents(after)}, tmp_path)
    path.write_bytes(path.read_bytes()[: -len(content)] + content)
    with pytest.raises(LensError, match=r'holds a run with another subject.path: .+ has not the content'):
        places.check_identity(stored, identity | {'contents': places.contents(after)}, tmp_path)


def test_a_start_may_be_gone_and_not_another(settings, calm, tmp_path):
    shutil.copytree(calm[0], tmp_path / 'a', ignore=shutil.ignore_patterns('checkpoints'))
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    cfg = {name: spelled(settings, init_from=tmp_path / name if name else '') for name in ('a', 'b', 'gone', '')}
    identity = {'config': json.loads(settings.to_json()), 'phase_ends': [8], 'documents': {}}
    of = {name: identity | {'contents': places.contents(c)} for name, c in cfg.items()}
    for name in ('b', 'gone'):
        places.check_identity(of['a'], of[name], tmp_path)
    (tmp_path / 'b/config.json').write_text('{"seed": 1}')
    for other in (of[''], identity | {'contents': places.contents(cfg['b'])}):
        with pytest.raises(LensError, match='another init_from'):
            places.check_identity(of['a'], other, tmp_path)
    with pytest.raises(LensError, match='another init_from'):  # a fresh start, and one from a place that is none
        places.check_identity(of[''], of['gone'], tmp_path)


@pytest.mark.parametrize('damage', ['[1]', '', '{"seed":', '{"a":' * 100_000])
def test_a_damaged_configuration_is_read_from_a_checkpoint(calm, tmp_path, capsys, damage):
    shutil.copytree(calm[0], tmp_path / 'w')
    (tmp_path / 'w/config.json').write_text(damage)
    assert reopen(tmp_path / 'w', needs=()).config == json.loads((calm[0] / 'config.json').read_text())
    assert f'{tmp_path}/w/config.json' in (said := capsys.readouterr().out) and 'is that of checkpoint 8' in said
    cfg = {'config': json.loads((calm[0] / 'config.json').read_text())}
    assert places.has_begun(cfg, tmp_path / 'w', print) and f'{tmp_path}/w/config.json' in capsys.readouterr().out
    shutil.rmtree(tmp_path / 'w/checkpoints')
    with pytest.raises(LensError, match=r'config.json .+: --workdir and init_from must be the folder of a run'):
        reopen(tmp_path / 'w')


@pytest.mark.parametrize(
    ('key', 'value'),
    [('layer', 'one'), ('phases', ['nosuch']), ('decoder', 3), ('data', None), ('mesh', {'model': 'x'})],
)
def test_a_configuration_of_no_run_is_one_sentence(calm, tmp_path, key, value):
    shutil.copytree(calm[0], tmp_path / 'w', ignore=shutil.ignore_patterns('checkpoints'))
    stored = json.loads((tmp_path / 'w/config.json').read_text()) | {key: value}
    (tmp_path / 'w/config.json').write_text(json.dumps(stored))
    with pytest.raises(LensError) as e:
        reopen(tmp_path / 'w')
    assert '\n' not in str(e.value)


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
