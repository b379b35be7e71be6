"""What a run refuses before weights are read, in one sentence."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from configs import base
from lens import errors, hf
from lens.checks import check_held_out, check_values
from lens.config import plan
from lens.errors import LensError
from lens.reopen import reopen
from tests.small_run import config, train


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
        ({'subject__experts': 'fast'}, r"subject.experts='fast' is not one of auto, dense, ragged, triton"),
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
        ({'checkpoint__keep_every': '2.5s'}, r"checkpoint.keep_every='2.5s' is not a duration"),
        ({'data__min_pos': 100}, r'positions.npy row 0 has no labelled position from data.min_pos=100 on: sft needs'),
        ({'explanation_len': 200}, r'decoder.prompt and explanation_len=200 make 2\d\d tokens, the subject reads 128'),
        ({'encoder__context_tokens': 120}, r'encoder.context_tokens=120, encoder.prompt and .* the subject reads 128'),
        (
            {'phases': ('sft',), 'encoder__context_tokens': 2, 'sft__mse_weight': 0},
            r'sft.mse_weight=0 with encoder.context_tokens=2: the encoder would never learn',
        ),
        ({'sft__copy_price': 0.1}, r'sft.copy_price=0.1 does nothing under the sft objective: use 0'),
        ({'sft__reward': 'log_error'}, r"sft.reward='log_error' does nothing under the sft objective: use error"),
        ({'grpo__reward': 'mse'}, r"grpo.reward='mse' is not one of error, log_error"),
        ({'grpo__reward_ema': 1.0}, r'grpo.reward_ema=1.0 must be .*0.999999'),
        ({'grpo__reward_ema': 0.9, 'grpo__reward_lag': 3}, r'grpo.reward_ema=0.9 does not go with grpo.reward_lag=3'),
        ({'grpo__mismatch': 0.1, 'grpo__updates': 2}, r'grpo.mismatch does not go with grpo.updates=2: later updates'),
        ({'grpo__length_price': 0.1}, r'grpo.length_price needs an explanation_close: without one all responses are'),
        (
            {'grpo__prefix_min': 3},
            r'grpo.prefix_min=3 and grpo.prefix_max=0 must be 0 and 0, or 1 <= prefix_min <= .* 12,',
        ),
        ({'sft__prefix_min': 3, 'sft__prefix_max': 13}, r'sft.prefix_min=3 and sft.prefix_max=13 must be 0 and 0, or'),
        ({'sft__documents': 99}, r'sft.documents=99, but .*train holds only 60 documents'),
        ({'explanation_len': 7}, r'explanation_len=7, but the given explanations in .* have 12 tokens'),
        (
            {'mesh__data': 2, 'sft__documents': 3},
            r'sft.documents=3 cannot be split over mesh.replica x mesh.data = 2 devices: use a multiple of 2',
        ),
        (
            {'grpo__documents': 6, 'grpo__slices': 4},
            r'grpo.documents=6 cannot be split into grpo.slices=4 equal parts on every device: use a multiple of 4',
        ),
        ({'grpo__slices': 2, 'grpo__resample': True}, r'grpo.resample=True needs grpo.slices=1: the next document'),
        ({'phases': ('gumbel',), 'gumbel__slices': 2}, r'gumbel.slices=2 does nothing under the gumbel objective'),
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
    split = SimpleNamespace(directory='d/validation', doc_id=ids, read_rows=np.arange(len(ids)), width=9)
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


def test_the_command_prints_one_sentence_and_fails(world, tmp_path):
    misspelt = command(world, tmp_path / 'w', '--config.grpo.lerning_rate_decoder=1')
    run = subprocess.run(misspelt, capture_output=True, text=True)
    assert run.returncode != 0 and 'Traceback' not in run.stderr
    lines = [line for line in run.stderr.strip().splitlines() if not re.match(r'[IWE]\d{4}', line)]
    assert len(lines) == 1 and 'learning_rate_decoder' in lines[0], run.stderr
