"""The loop as a user meets it: determinism, resume, refusals."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from configs import base
from lens import data, errors, evaluate, files, hf, lens_init, sharding
from lens.checkpoint import Checkpoints
from lens.config import check_held_out, check_values, load, plan
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
        ('encoder__current_token', True, 'encoder.current_token=False'),
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
    calm = train(c, tmp_path / 'calm')
    train(c, tmp_path / 'w')
    for step in (tmp_path / 'w/checkpoints').iterdir():
        if int(step.name) > 4:
            shutil.rmtree(step)
    again = train(c, tmp_path / 'w')
    assert figures(again) == figures(calm)
    assert curve(tmp_path / 'w') == curve(tmp_path / 'calm')


def test_non_finite_loss_stops_and_names_the_step(world, tmp_path):
    with pytest.raises(LensError, match=r'is not finite at step \d+ \(phase sft, documents \[\d+'):
        train(config(world, sft__learning_rate_decoder=1e30), tmp_path / 'w')
    assert not (tmp_path / 'w/summary.json').exists()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'layer': 3}, r'layer=3 is not a block of the subject, which has blocks 0..2'),
        ({'encoder__output_layer': 5}, r'encoder.output_layer=5 is not a block'),
        ({'decoder__patched_blocks': 4}, r'decoder.patched_blocks=4 is not in -1..3'),
        ({'decoder__train': 'all'}, r"decoder.train='all' is not one of maps, lora, full"),
        ({'decoder__prompt': '<bos><embed>'}, r'decoder.prompt holds <bos>, which is no token of the subject'),
        ({'encoder__prompt': '<|start|>a<text>'}, r'encoder.prompt holds <\|start\|>, which is no token'),
        ({'phases': ()}, r'phases is empty: .* or give init_from'),
        ({'init_from': '/nowhere'}, r'/nowhere/lens.json does not exist'),
        ({'subject__experts': 'fast'}, r"subject.experts='fast' is not one of dense, ragged, tokamax"),
        ({'subject__packed': True}, r'subject.packed=True keeps the experts as bytes'),
        ({'decoder__init': 'tuned_lens', 'tuned_lens': '/nowhere'}, r'/nowhere/tuned_lens.json does not exist'),
        ({'decoder__prompt': 'no slot'}, r"decoder.prompt='no slot' must contain <embed>"),
        ({'grpo__group': 1}, r'grpo.group=1 must be at least 2'),
        ({'grpo__objective': 'ppo'}, r"grpo.objective='ppo' is not one of sft, grpo, gumbel"),
        ({'phases': ('sft', 'rl')}, r"phases names 'rl', but there is no phase block of that name"),
        ({'sft__steps': 0}, r'sft.steps=0 must be positive'),
        ({'sft__steps': '5x'}, r"sft.steps='5x' is not a duration; accepted: 600, .*\"0.5e\""),
        ({'eval__every': '1.5s'}, r"eval.every='1.5s' is not a duration; accepted"),
        ({'grpo__tau': 'cosine 1'}, r"grpo.tau='cosine 1' is not a value; accepted: a number, .*\"cosine 1 0.1\""),
        ({'sft__accumulate': 0}, r'sft.accumulate=0 must be at least 1'),
        ({'sft__grad_clip': 'much'}, r"sft.grad_clip='much' is neither a norm nor pairs"),
        ({'sft__table': (('^decoder/', 1.0, 0.0, 'd', '0'),)}, r'no row of the optimizer table covers encoder/'),
        ({'sft__table': (('.', 1.0),)}, r"sft.table: \('.', 1.0\) is not a row; accepted"),
        ({'sft__grad_clip': 0}, r'sft.grad_clip=0 must be positive'),
        ({'sft__grad_clip': (('decoder', 1.0), ('encoder', 1.0), ('maps', 1.0))}, r'grad_clip names maps, which is no'),
        ({'sft__learning_rate_decoder': 'cosine 1e-3 -1e-4'}, r"sft.learning_rate_decoder='cosine 1e-3 -1e-4' is neg"),
        ({'sft__lm_weight': 0.1}, r'sft.lm_weight=0.1 does nothing under the sft objective: use 0'),
        ({'phases': ('gumbel',), 'gumbel__mean_of': 2}, r'gumbel.mean_of=2 does nothing under the gumbel objective'),
        ({'encoder__init': 'scale', 'encoder__readout': 'none'}, r'encoder.init=scale starts a map that'),
        ({'subject__experts': 'tokamax'}, r'subject.experts=tokamax needs the package tokamax: pip install'),
        ({'checkpoint__keep_every': '2.5s'}, r"checkpoint.keep_every='2.5s' is not a duration"),
        ({'data__min_pos': 100}, r'positions.npy row 0 has no labelled position from data.min_pos=100 on: sft needs'),
        ({'explanation_len': 200}, r'decoder.prompt and explanation_len=200 make 2\d\d tokens, the subject reads 128'),
        ({'sft__documents': 99}, r'sft.documents=99, but .*train holds only 60 documents'),
        ({'explanation_len': 7}, r'explanation_len=7, but the given explanations in .* have 12 tokens'),
        (
            {'mesh__data': 2, 'sft__documents': 3},
            r'sft.documents=3 cannot be split over mesh.replica x mesh.data = 2 devices: use a multiple of 2',
        ),
        ({'mesh__data': 16}, r'mesh.data=16 x mesh.model=1 needs 16 devices, but JAX sees 8'),
        ({'subject__path': '/nowhere'}, r'/nowhere does not exist'),
        ({'data__path': '/nowhere'}, r'/nowhere/train/meta.json does not exist'),
        ({'subject__dtype': 'int8'}, r"subject.dtype='int8' is not one of float32, bfloat16"),
        ({'subject__path': ''}, r'subject.path is empty: give a directory in Hugging Face layout'),
        ({'data__path': ' '}, r'data.path is empty: give a folder of tokens'),
        ({'seed': -1}, r'seed=-1 must be at least 0'),
        ({'sft__steps': 10**12}, r'sft.steps=1000000000000 is longer than 2147483647 micro-steps'),
        ({'sft__steps': 2**31 - 2}, r'sft.steps, grpo.steps make more than 2147483647 micro-steps'),
        ({'sft__vectors': 10**6}, r'sft: documents x vectors make 4000000 texts in a micro-step, more than 1048576'),
        ({'grpo__group': 10**9}, r'grpo: documents x vectors x group x mean_of make \d+ texts in a micro-step'),
        ({'sft__vectors': 999}, r'sft.vectors=999, but the rows of .*/train have \d+ tokens'),
        ({'eval__vectors': 10**9}, r'eval.vectors=1000000000, but the rows of .*/validation have \d+ tokens'),
        ({'eval__quick_documents': 1, 'eval__vectors': 1}, r'eval.quick_documents x eval.vectors is one activation'),
        (
            {'lora__rank': 10**9, 'decoder__train': 'lora'},
            r'lora.rank=1000000000 is above the width of the subject, 24',
        ),
        ({'lora__pattern': '('}, r"lora.pattern='\(' is not a regular expression"),
        ({'explanation_len': 10**9}, r'explanation_len=1000000000 make \d+ tokens, the subject reads 128'),
        ({'mesh__data': 10**9}, r'mesh.data=1000000000 must be at most 65536'),
        ({'sft__grad_clip': np.nan}, r'sft.grad_clip=nan must be finite'),
        ({'sft__learning_rate_decoder': '1e39'}, r"sft.learning_rate_decoder='1e39' is not a value"),
        ({'decoder__prompt': '\ud800<embed>'}, r'decoder.prompt=.* halves of characters'),
        (
            {'explanation_len': 1, 'explanation_close': '<|end|>', 'phases': ('grpo',)},
            r'explanation_len=1 leaves no room between tags of 1 tokens',
        ),
    ],
)
def test_bad_configurations_are_refused_in_one_sentence_before_weights_are_read(
    world, tmp_path, change, message, monkeypatch
):
    monkeypatch.setattr(hf, 'load_model', lambda *args, **kw: pytest.fail('the base was read'))
    with pytest.raises(LensError, match=message) as e:
        train(config(world, **change), tmp_path / 'w')
    assert '\n' not in str(e.value)
    assert not list(tmp_path.glob('w/*.json')), 'nothing half-written'


@pytest.mark.parametrize(
    ('key', 'value', 'extra'), [('tensorboard', True, 'tensorboard'), ('wandb_project', 'lens', 'wandb')]
)
def test_packages_that_the_log_needs_are_there_before_anything_is_read(monkeypatch, key, value, extra):
    monkeypatch.setattr(errors.importlib.util, 'find_spec', lambda name: None)
    c = base.get_config()
    check_values(c)
    c.log[key] = value
    with pytest.raises(LensError, match=rf"log.{key}=.* needs the package .*: pip install 'lens\[{extra}\]'"):
        check_values(c)


def test_ids_that_the_subject_has_no_embeddings_for_are_refused(world, tmp_path):
    """A tokenizer with more tokens than the model has rows."""
    shutil.copytree(world / 'subject', tmp_path / 'subject', ignore=shutil.ignore_patterns('*.safetensors'))
    file = tmp_path / 'subject/config.json'
    c = config(world, subject__path=str(file.parent))
    colon = hf.load_tokenizer(file.parent)(':')['input_ids'][-1]
    for size, message in (
        (colon, rf"decoder.prompt has the token ':', id {colon}, and the subject has embeddings 0..{colon - 1} alone"),
        (colon + 1, r"decoder.prompt with 'something' in its slot has the token '"),
        (900, r'train/meta.json: filler_id=\d+ must be at most 899'),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | {'vocab_size': size}))
        with pytest.raises(LensError, match=message):
            plan(c)


@pytest.mark.parametrize(
    ('ids', 'message'),
    [
        ([5, 5, 5, 5], 'holds one document: controls need at least 2'),
        ([5, 5, 5, 6], r'doc_id.npy: 5 is the id of more than half of the documents that are evaluated, 3'),
        ([5, 5, 6, 7], None),
        ([5, 6, 7, 8, 8, 8, 8], None),  # 4 are read
    ],
)
def test_controls_need_other_documents(ids, message):
    c = base.get_config()
    c.eval.documents = 4
    ids = np.array(ids)
    split = SimpleNamespace(
        directory='d/validation', doc_id=ids, read_rows=np.arange(len(ids)), tokens=np.zeros((len(ids), 9))
    )
    with pytest.raises(LensError, match=message) if message else contextlib.nullcontext():
        check_held_out(c, split)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        (
            'mesh',
            'all',
            r'config.json cannot be used \(the configuration lacks the key mesh.data: .*\): it is of another',
        ),
        ('layer', '1', r"config.json cannot be used \(layer='1' must be a whole number\): it is of another version or"),
        ('a.b', 1, r'config.json cannot be used'),
        ('seed', None, r'config.json cannot be used \(seed=None must be a whole number\)'),
    ],
)
def test_a_stored_configuration_of_other_types_is_named(tmp_path, key, value, message):
    stored = json.loads(base.get_config().to_json()) | {key: value}
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    with pytest.raises(LensError, match=message) as e:
        reopen(tmp_path)
    assert '\n' not in str(e.value)


def test_data_without_explanations_is_refused(world, tmp_path):
    shutil.copytree(world / 'data', tmp_path / 'data')
    for name in ('positions', 'explanations'):
        (tmp_path / f'data/train/{name}.npy').unlink()
    with pytest.raises(LensError, match=r'explanations.npy does not exist: the sft objective of sft needs given'):
        train(config(world, data__path=str(tmp_path / 'data')), tmp_path / 'w')


def test_tokens_beyond_the_vocabulary_are_refused(world, tmp_path):
    shutil.copytree(world / 'data', tmp_path / 'data')
    tokens = np.load(tmp_path / 'data/train/tokens.npy')
    tokens[7, 3] = 99999
    np.save(tmp_path / 'data/train/tokens.npy', tokens)
    with pytest.raises(LensError, match=r'train/tokens.npy row 7 holds token ids outside 0..939'):
        train(config(world, data__path=str(tmp_path / 'data')), tmp_path / 'w')


def command(world, workdir, *extra):
    return [
        sys.executable,
        '-m',
        'lens.main',
        '--config=configs/tiny.py',
        f'--workdir={workdir}',
        f'--config.subject.path={world}/subject',
        f'--config.data.path={world}/data',
        '--config.layer=1',
        '--config.decoder.patched_blocks=2',
        *extra,
    ]


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        (['--config.grpo.lerning_rate_decoder=1'], 'learning_rate_decoder'),
        (['--config.layer=9'], 'layer=9 is not a block'),
    ],
)
def test_the_command_prints_one_sentence_and_fails(world, tmp_path, extra, message):
    run = subprocess.run(command(world, tmp_path / 'w', *extra), capture_output=True, text=True)
    assert run.returncode != 0 and 'Traceback' not in run.stderr
    lines = [line for line in run.stderr.strip().splitlines() if not re.match(r'[IWE]\d{4}', line)]
    assert len(lines) == 1 and message in lines[0], run.stderr
