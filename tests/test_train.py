"""The loop as a user meets it: determinism, resume, what it keeps."""

import errno
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from configs import base
from lens import data, evaluate, files, hf, lens_init, sharding
from lens.checkpoint import Checkpoints
from lens.config import load, plan
from lens.errors import LensError
from lens.files import read_jsonl
from lens.models import subject
from lens.reopen import reopen
from lens.signals import Stop
from lens.train import Stopped, train_step
from tests.curves import curve
from tests.small_run import config, figures, train


@pytest.fixture(scope='module')
def finished(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run') / 'w'
    return workdir, train(config(world), workdir)


def test_workdir_holds_what_the_contract_names(finished):
    workdir, summary = finished
    names = {p.name for p in workdir.iterdir()}
    assert names == {
        'config.json',
        'metrics.jsonl',
        'checkpoints',
        'summary.json',
        'samples.jsonl',
        'evaluation.json',
        'report.html',
    }
    written = json.loads((workdir / 'summary.json').read_text())
    assert written == json.loads(json.dumps(summary))
    for key in (
        'fve',
        'fve_greedy',
        'fve_sft',
        'fve_shuffled',
        'fve_mean_baseline',
        'fve_no_activation',
        'cosine',
        'steps',
        'wall_s',
        'config',
        'subject',
        'layer',
        'facts_recall',
        'facts_hallucinated',
        'facts_recall_sampled',
        'facts_hallucinated_sampled',
    ):
        assert key in written, key
    rows = read_jsonl(workdir / 'metrics.jsonl')
    assert [r['step'] for r in rows if r['kind'] == 'train'] == list(range(1, 9))
    assert [(r['step'], r['full']) for r in rows if r['kind'] == 'eval'] == [
        (3, False),
        (4, True),
        (6, False),
        (8, True),
    ]
    assert written['fve_sft'] == next(r['fve'] for r in rows if r['kind'] == 'eval' and r['step'] == 4)
    assert written['fve'] == next(r['fve'] for r in rows if r['kind'] == 'eval' and r['step'] == 8)
    assert all(r['logp_diff_max'] < 1e-4 for r in rows if r['phase'] == 'grpo' and r['kind'] == 'train')
    assert len(read_jsonl(workdir / 'samples.jsonl')) == 2


def test_two_runs_write_identical_metrics_and_compile_once(world, finished, tmp_path):
    """The second one, and one with other numbers, find the programs of the first."""
    programs = train_step._cache_size()
    summary = train(config(world), tmp_path / 'w')
    assert curve(tmp_path / 'w') == curve(finished[0])
    assert figures(summary) == figures(finished[1])
    rates = {'sft__learning_rate_decoder': 2e-3, 'grpo__learning_rate_encoder': 'cosine 1e-3 1e-4 warmup 2s'}
    other = train(config(world, seed=1, **rates), tmp_path / 'other')
    assert figures(other) != figures(summary)
    assert train_step._cache_size() == programs


def train_until(stop, cfg, workdir, monkeypatch):
    """A run that dies once the checkpoint of step `stop` is saved."""

    class Stop(Exception):
        pass

    save = Checkpoints.save

    def save_and_stop(self, step, *rest):
        save(self, step, *rest)
        if step == stop:
            raise Stop

    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(Checkpoints, 'save', save_and_stop)
        train(cfg, workdir)


@pytest.mark.parametrize('stop', [6, pytest.param(4, marks=pytest.mark.slow)])
def test_resume_is_bit_identical(world, finished, tmp_path, monkeypatch, stop):
    """Stopped after step `stop` (inside grpo, at the end of sft) and continued by the same command."""
    train_until(stop, config(world), tmp_path / 'w', monkeypatch)
    with (tmp_path / 'w/metrics.jsonl').open('a') as f:  # lines after the checkpoint, the last one torn
        f.write('{"step": 7, "phase": "grpo", "kind": "train", "fve": 9.0, "wall_s": 1}\n{"step": 8, "ph')
    summary = train(config(world), tmp_path / 'w')
    assert curve(tmp_path / 'w') == curve(finished[0])
    assert figures(summary) == figures(finished[1])
    assert final_parameters(tmp_path / 'w') == final_parameters(finished[0])


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run without its last checkpoint and what follows."""
    shutil.copytree(finished[0], tmp_path / 'w')
    shutil.rmtree(tmp_path / 'w/checkpoints/8')
    (tmp_path / 'w/summary.json').unlink()
    return tmp_path / 'w'


def test_a_run_that_is_stopped_in_its_last_evaluation_goes_on_there(world, finished, unfinished, monkeypatch):
    full = evaluate.Evaluator.full

    def interrupted(evaluator, lens):
        os.kill(os.getpid(), signal.SIGUSR1)
        return full(evaluator, lens)

    with monkeypatch.context() as m, Stop() as stop, pytest.raises(Stopped, match='Stopped at step 8 of 8 by SIGUSR1'):
        m.setattr(evaluate.Evaluator, 'full', interrupted)
        train(config(world), unfinished, stop=stop)
    assert not (unfinished / 'summary.json').exists()
    assert figures(train(config(world), unfinished)) == figures(finished[1])
    assert curve(unfinished) == curve(finished[0])


def test_the_scale_of_a_start_is_measured_on_the_first_texts(world):
    """As long as they are; of longer ones the beginning."""
    run = load(config(world), plan(config(world)))
    first = {k: getattr(run.train, k)[: lens_init.NORM_DOCUMENTS] for k in ('tokens', 'lengths')}
    with jax.set_mesh(run.mesh):
        batch = sharding.put_batch(first, run.mesh)
        want = jax.jit(subject.stream_norms)(run.base, batch['tokens'], batch['lengths'])
        got = lens_init._stream_norms(run)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_there_is_no_summary_without_its_weights(world, unfinished, monkeypatch):
    def full(*args, **kw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.training.Checkpointer, 'save_checkpointables_async', full)
    with pytest.raises(LensError, match=r'of step 8 could not be written to .*No space left.*last good one is step'):
        train(config(world), unfinished)
    assert not (unfinished / 'summary.json').exists()


@pytest.mark.slow
def test_resume_inside_an_accumulation_before_the_unfreezing(world, tmp_path, monkeypatch):
    """Mean gradient, sleeping moments and frozen rows come back; an epoch is a pass over the 60 documents."""
    table = (('embedding$', None), ('^encoder/', 1.0, 0.0, 'encoder', '4s'), ('^decoder/', 1.0, 0.1, 'decoder', '0'))
    keys = {'phases': ('sft',), 'sft__steps': '0.5e', 'sft__accumulate': 2, 'sft__table': table, 'log__drift': '2os'}
    calm, killed = tmp_path / 'calm', tmp_path / 'killed'
    summary = train(config(world, **keys), calm)
    assert summary['steps'] == 8  # 60 documents, 4 a step, half of it, whole optimizer steps
    rows = read_jsonl(calm / 'metrics.jsonl')
    moved = {k: [r[f'update_norm_{k}'] > 0 for r in rows if r['kind'] == 'train'] for k in ('decoder', 'encoder')}
    assert moved == {'decoder': [False, True] * 4, 'encoder': [False] * 5 + [True, False, True]}
    assert [(r['step'], r['drift_encoder'] > 0) for r in rows if r['kind'] == 'drift'] == [(4, False), (8, True)]
    train_until(3, config(world, **keys), killed, monkeypatch)
    assert figures(train(config(world, **keys), killed)) == figures(summary)
    assert curve(killed) == curve(calm)
    assert final_parameters(killed) == final_parameters(calm)


def final_parameters(workdir):
    state = ocp.training.Checkpointer((workdir / 'checkpoints').absolute()).load_checkpointables(8)['state']
    return {k: np.asarray(v).tobytes() for k, v in state.items() if k.startswith('params')}


def test_a_finished_run_only_rewrites_its_summary(world, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / 'w')
    assert figures(train(config(world), tmp_path / 'w')) == figures(finished[1])


def test_checkpoints_hold_no_base_weights(finished):
    """Only the trainable tree; the base of `tiny` is a trained copy, the frozen one is not stored."""
    state = ocp.training.Checkpointer((finished[0] / 'checkpoints').absolute()).load_checkpointables(8)['state']
    assert {k.split('/')[1] for k in state if k.startswith('params')} == {'decoder', 'encoder'}
    assert {k.split('/')[0] for k in state} == {'step', 'params', 'opt'}


@pytest.mark.slow
def test_resume_onto_another_mesh(world, finished, tmp_path, monkeypatch):
    """Checkpoint of 1x1 continued on 2x2: the same losses up to float reordering."""
    half = config(world)
    half.phases = ('sft',)
    train(half, tmp_path / 'a')
    longer = config(world, mesh__data=2, mesh__model=2)
    longer.phases = ('sft',)
    rows = {}
    for name, cfg in (('a', longer), ('b', longer)):
        if name == 'a':
            shutil.rmtree(tmp_path / 'a/checkpoints/4')  # go back to step 3
        train(cfg, tmp_path / name)
        rows[name] = [r for r in read_jsonl(tmp_path / name / 'metrics.jsonl') if r['kind'] == 'train']
    for a, b in zip(rows['a'], rows['b'], strict=True):
        for k in ('loss_decoder', 'loss_encoder', 'fve', 'entropy_nats'):
            np.testing.assert_allclose(a[k], b[k], rtol=1e-4, err_msg=k)


def test_another_configuration_in_the_same_workdir_is_refused(world, finished, monkeypatch):
    before = curve(finished[0])
    monkeypatch.setattr(hf, 'load_model', lambda *args, **kw: pytest.fail('the base was read'))
    with pytest.raises(match=r'another configuration \(differing keys: grpo.learning_rate_decoder\)'):
        train(config(world, grpo__learning_rate_decoder=1.0), finished[0])
    with pytest.raises(match=r'differing keys: decoder.patched_blocks'):
        train(config(world, decoder__patched_blocks=1), finished[0])
    assert curve(finished[0]) == before


def test_other_documents_under_the_same_path_are_refused(world, finished, monkeypatch):
    monkeypatch.setattr(data, 'fingerprint', lambda split: 'another')
    with pytest.raises(match=r'holds a run on other documents or labels than those that .*/data has'):
        train(config(world), finished[0])


def test_weights_of_a_run_that_reads_elsewhere_are_refused(world, finished, tmp_path):
    for key, value, theirs in (
        ('layer', 2, 'layer=1'),
        ('encoder__context_tokens', 1, 'encoder.context_tokens=0'),
    ):
        with pytest.raises(LensError, match=f'init_from={finished[0]} holds a lens with {theirs}'):
            train(config(world, init_from=str(finished[0]), **{key: value}), tmp_path / 'w')


def test_a_run_is_reopened_on_the_devices_that_are_here(finished, tmp_path):
    """Eight of them; the training batch could not be split over so many."""
    workdir = tmp_path / 'w'
    shutil.copytree(finished[0], workdir)
    settings = json.loads((workdir / 'config.json').read_text())
    settings['mesh']['model'], settings['grpo']['documents'] = 6, 5
    (workdir / 'config.json').write_text(json.dumps(settings))
    again = reopen(workdir)
    assert dict(again.run.mesh.shape) == {'replica': 1, 'data': 4, 'model': 2} and again.step == 8


@pytest.mark.slow
def test_the_pieces_of_the_other_recipes_train_together(world, tmp_path, capsys):
    """Marker and closing token, direction error, KL to the start, clipped updates, straight-through words."""
    c = config(world, explanation_len=13, explanation_close='<|end|>', phases=('sft', 'grpo', 'gumbel'))
    c.decoder.prompt, c.decoder.injection, c.decoder.marker = '<|bos|><|user|><embed><|end|>', 'replace', '#'
    c.encoder.readout, c.encoder.error = 'linear', 'direction'
    c.sft.table = (('^decoder/prompt_', None), *c.sft.table)
    c.grpo.beta, c.grpo.kl_to, c.grpo.updates = 'linear 0 0.1', 'start', 2
    c.gumbel.steps, c.gumbel.documents, c.gumbel.vectors, c.gumbel.kl_weight = 2, 2, 2, 0.1
    summary = train(c, tmp_path / 'w')
    assert {'extracted', 'extracted_greedy', 'fve', 'fve_shuffled'} <= summary.keys()
    assert 'fve_direction' not in summary  # fve is of directions
    rows = {r['phase']: r for r in files.read_jsonl(tmp_path / 'w/metrics.jsonl') if r['kind'] == 'train'}
    assert rows['grpo'].keys() >= {'kl_start_nats', 'logp_diff_max', 'extracted', 'reward'}
    assert rows['gumbel'].keys() >= {'kl_functional_nats', 'tau', 'extracted'}
    assert 'entropy' in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_ended_with_a_phase_goes_on_into_one_with_another_optimizer(world, tmp_path):
    """Killed between the checkpoint at the end of SFT and the next: the state on disk is that of SFT."""
    c = config(world)
    c.checkpoint.keep = 9
    c.grpo.beta, c.grpo.kl_to, c.grpo.table = 0.1, 'start', base.table(encoder_unfreeze='2s')
    c.grpo.reward_ema = 0.75
    calm = train(c, tmp_path / 'calm')
    train(c, tmp_path / 'w')
    for last in (4, 6):
        for step in (tmp_path / 'w/checkpoints').iterdir():
            if int(step.name) > last:
                shutil.rmtree(step)
        again = train(c, tmp_path / 'w')
        assert figures(again) == figures(calm)
        assert curve(tmp_path / 'w') == curve(tmp_path / 'calm')


def test_non_finite_loss_stops_and_names_the_step(world, tmp_path):
    with pytest.raises(LensError, match=r'is not finite at step \d+ \(phase sft, documents \[\d+'):
        train(config(world, sft__learning_rate_decoder=1e30), tmp_path / 'w')
    assert not (tmp_path / 'w/summary.json').exists()
