"""Every recipe's train step at full size, as shapes on eight fake devices: no recipe may rot. And `lens.main --plan`."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks import full_size
from benchmarks.full_size import RECIPES
from lens import config, flops, sharding
from lens.errors import LensError
from lens.tools import plan, targets
from lens.train import trace

ROOT = pathlib.Path(__file__).parent.parent
MODELS = ROOT / 'tests/hf_configs'
# recipe -> published parameters of its subject in billions, where they are known
BILLIONS = {
    'gptoss': 20.915,
    'gptoss:gumbel': 20.915,
    'gptoss:120b': 116.83,
    'gemma3_27b': 27.009,
    'gemma2_9b': 9.242,
    'qwen2_5_14b': 14.770,
    'qwen2_5_7b': 7.616,
    'nla_qwen2_5_7b': 7.616,
    'nla_qwen2_5_7b:full': 7.616,
    'gpt2': 0.1244,
}
H100_BYTES = 80e9
KEY = jax.eval_shape(jax.random.key, 0)


def open_recipe(recipe):
    """(configuration, job, mesh)"""
    cfg, job = full_size.open_recipe(recipe)
    return cfg, job, sharding.make_mesh(cfg.mesh.data, cfg.mesh.model)


def test_every_recipe_is_here():
    here = {r.partition(':')[0] for r in RECIPES}
    files = {p.stem for p in (ROOT / 'configs').glob('*.py')}
    assert here == files - {'__init__', 'base', 'tiny', 'tiny_subject', 'smollm2'}  # the last is a laptop's


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_fits_at_full_size(recipe):
    cfg, job, mesh = open_recipe(recipe)
    for name, n in plan.needs(cfg, job, mesh).items():
        assert n.optimizer >= 1.99 * n.trained > 0, name  # two moments; of prompts that are fixed none
        assert n.total < H100_BYTES, name
    if billions := BILLIONS.get(recipe):
        whole = plan.per_device(config.abstract_base(cfg, job.c, sharding.make_mesh(1, 1)))
        assert whole / {'bfloat16': 2, 'float32': 4}[cfg.subject.dtype] == pytest.approx(billions * 1e9, rel=1e-3)


FAST = {'gptoss:120b', 'nla_qwen2_5_7b:full'}  # experts and tensor parallel, a split base
SLOW = {'gptoss:gumbel', 'gemma3_27b', 'gpt2'}  # other recipes differ from these by numbers alone


@pytest.mark.parametrize('recipe', [*sorted(FAST), *(pytest.param(r, marks=pytest.mark.slow) for r in sorted(SLOW))])
def test_the_train_step_of_a_recipe_traces_at_full_size(recipe):
    cfg, job, mesh = open_recipe(recipe)
    with jax.set_mesh(mesh):
        for step in plan.steps(cfg, job, mesh):
            trace(*step, KEY)


def test_tensor_parallel_splits_the_base():
    """The alternative of the docstring: eight-way tensor parallel holds an eighth, but for replicated vectors."""
    cfg, job, mesh = open_recipe('gptoss')
    whole = plan.per_device(config.abstract_base(cfg, job.c, mesh))
    assert plan.needs(cfg, job, sharding.make_mesh(1, 8))['sft'].base == pytest.approx(whole / 8, rel=0.001)


def test_packed_experts_save_what_the_notes_say():
    """gpt-oss-20b: 41.8 GB in bfloat16, 13.8 as shipped."""
    cfg, job, mesh = open_recipe('gptoss')
    assert plan.needs(cfg, job, mesh)['sft'].base == pytest.approx(41.8e9, rel=0.002)
    cfg.subject.packed = True
    assert plan.needs(cfg, job, mesh)['sft'].base == pytest.approx(13.8e9, rel=0.005)


def test_the_decoder_of_the_start_of_a_phase_counts():
    cfg, job, mesh = open_recipe('gpt2')
    without = plan.needs(cfg, job, mesh)['grpo']
    cfg.grpo.beta, cfg.grpo.kl_to = 0.1, 'start'
    n = plan.needs(cfg, job, mesh)['grpo']
    assert without.reference == 0 < n.reference < n.trained
    assert n.total == without.total + n.reference


def test_a_step_that_cannot_run_raises():
    cfg, job, mesh = open_recipe('gpt2')
    cfg.layer = job.c.n_layers
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r'are not all in 0\.\.11'):
        trace(*next(plan.steps(cfg, job, mesh)), KEY)


# A small gpt-oss: d 64, 3 blocks, 4 query and 2 kv heads of 8, 4 experts of width 32; every size of a leaf is known.
SMALL = {
    'num_hidden_layers': 3,
    'hidden_size': 64,
    'intermediate_size': 32,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'num_local_experts': 4,
    'num_experts_per_tok': 2,
    'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention'],
    'vocab_size': 96,
}
SMALL_EXPERTS = 4 * (3 * 64 * 32 + 2 * 32 + 64) + 64 * 4 + 4  # of a layer: matrices, biases, router
SMALL_BASE = (
    3 * (SMALL_EXPERTS + 2 * 64 * 32 + 2 * 64 * 16 + 32 + 16 + 16 + 64 + 4 + 2 * 64)  # q o, k v, biases, sinks, norms
    + 2 * 96 * 64
    + 64
)


def small(folder, phases=('sft',)):
    """Configuration of the gpt-oss recipe on SMALL, whose config.json is written."""
    file = folder / 'small.json'
    file.write_text(json.dumps(json.loads((MODELS / 'gpt-oss-20b.json').read_text()) | SMALL))
    cfg = importlib.import_module('configs.gptoss').get_config('')
    cfg.subject.path, cfg.data.path, cfg.layer, cfg.phases = str(file), str(folder / 'data'), 1, phases
    cfg.decoder.patched_blocks = 2
    cfg.mesh.data = 4
    return cfg


@pytest.fixture
def opened(tmp_path):
    """(configuration, job, mesh) of `small`; rows of 40 tokens."""
    cfg = small(tmp_path)
    job, _ = plan.open_job(cfg)
    assert job.ships_packed
    return cfg, job._replace(seq_len=40), sharding.make_mesh(4, 1)


def test_bytes_of_the_base_are_those_of_its_shapes(opened):
    live = len(jax.live_arrays())
    assert plan.needs(*opened)['sft'].base == 2 * SMALL_BASE  # bfloat16
    assert sum(x.nbytes for x in jax.live_arrays()[live:]) < 1e6, 'nothing is allocated'


def test_what_is_compiled_for_experts_is_no_dense_product(opened, monkeypatch):
    monkeypatch.setattr(flops, '_routed', lambda *_: 1)  # counts what runs
    cfg, job, mesh = opened

    def work(experts):
        cfg.subject.experts = experts
        with jax.set_mesh(mesh):
            _, step = trace(*next(plan.steps(cfg, job, mesh)), KEY)
            return sum(flops.by_scope(step.jaxpr, job.c).values())

    assert work('planned') < 0.8 * work('dense')


CHANGED = [
    {'mesh.shard_base': True},
    {'subject.packed': True},
    {'sft.documents': 12},
    {'mesh.model': 2, 'mesh.data': 2},
]


@pytest.mark.parametrize('values', CHANGED)
def test_a_change_is_what_the_changed_configuration_needs(opened, values):
    cfg, job, _ = opened
    compiled = []

    def compiling(changed, job, mesh, name):
        compiled.append((changed, mesh, name))
        return 1000, {}

    phase, found = plan.after(values, cfg, job, ['sft'], 1e12, compiling)
    ((changed, mesh, name),) = compiled
    flat = {f'{block}.{key}': changed[block][key] for block, key in (k.split('.') for k in values)}
    assert flat == values and name == phase == 'sft'
    assert (mesh.shape['data'], mesh.shape['model']) == (changed.mesh.data, changed.mesh.model)
    assert found == plan.needs(changed, job, mesh)['sft']._replace(temporaries=1000)
    assert cfg.sft.documents == 24 and cfg.mesh.data == 4 and not cfg.mesh.shard_base, 'the configuration has changed'


def test_phases_that_did_not_fit_are_compiled_first(opened):
    cfg, job, _ = opened
    cfg.phases, compiled = ('sft', 'grpo'), []

    def compiling(changed, job, mesh, name):
        compiled.append(name)
        return int(1e9), {}

    plan.after({'sft.documents': 12}, cfg, job, ['grpo'], 2e9, compiling)
    assert compiled == ['grpo', 'sft']
    assert plan.after({'sft.documents': 12}, cfg, job, ['grpo'], 5e8, compiling)[0] == 'grpo'
    assert compiled == ['grpo', 'sft', 'grpo']  # too much already: the other is left out


def test_what_cannot_fit_is_not_compiled(opened):
    cfg, job, _ = opened
    values, given = {'mesh.model': 4, 'mesh.data': 1}, plan.needs(cfg, job, sharding.make_mesh(1, 4))['sft']

    def compiling(*_):
        raise AssertionError('compiled')

    assert plan.after(values, cfg, job, ['sft'], given.total - 1, compiling) == ('sft', given)
    with pytest.raises(AssertionError, match='compiled'):
        plan.after(values, cfg, job, ['sft'], given.total, compiling)


def test_which_changes_are_tried(opened):
    cfg, _, mesh = opened
    split = [{'mesh.model': 2, 'mesh.data': 2}, {'mesh.model': 4, 'mesh.data': 1}]
    slices = {'sft.slices': 2, 'grpo.slices': 2}
    assert list(plan.changes(cfg, mesh, ['sft', 'grpo'], True)) == [
        {'mesh.shard_base': True},
        {'subject.packed': True},
        *split,
        slices,
    ]
    cfg.grpo.resample = True  # needs the next document
    assert list(plan.changes(cfg, mesh, ['sft', 'grpo'], True))[-1] == {'sft.slices': 2, 'grpo.documents': 4}
    cfg.grpo.resample = False
    cfg.grpo.documents, cfg.decoder.train, cfg.mesh.shard_base = 4, 'full', True  # 2 documents on 4 devices
    assert list(plan.changes(cfg, mesh, ['sft', 'grpo'], True)) == split
    assert list(plan.changes(cfg, sharding.make_mesh(1, 1), ['grpo'], False)) == [{'grpo.slices': 4}]


def test_words_stand_in_for_tokens():
    ids = plan.WordTokenizer()('<|start|>user<|message|>Is it <embed>, or 12?<|end|>')['input_ids']
    assert len(ids) == len(set(ids)) == 11
    assert plan.WordTokenizer()('a b a')['input_ids'] == [0, 1, 0]


@pytest.fixture
def planned(tmp_path, capsys, monkeypatch):
    """plan.run of `small` with given temporaries on the devices of this process: (exit code, what is printed)."""
    monkeypatch.setattr(plan, 'pretend_devices', lambda cfg, target: None)

    def run(device_gb, temporaries, change=lambda cfg, folder: None):
        cfg = small(tmp_path)
        change(cfg, tmp_path)
        code = plan.run(cfg, 'cpu', device_gb, lambda *_: (int(temporaries), {'read': 2e12, 'sample': 1e12}))
        return code, capsys.readouterr().out

    return run


def test_a_plan_says_what_is_to_spare(planned):
    def data(cfg, folder):
        cfg.sft.steps = '2e'
        (folder / 'data/train').mkdir(parents=True)
        np.save(folder / 'data/train/tokens.npy', np.zeros((50, 36), np.int32))

    code, text = planned(10.0, 8e9, data)
    assert code == 0 and 'rows of 36 tokens, 50 documents' in text
    assert 'on 4 devices (data 4)' in text and 'total at most 8.00 GB, 1.2 GB (13%) to spare' in text
    assert 'FLOPs of a step, all devices: read 2e+12, sample 1e+12' in text
    assert 'Fits in 9.2 GB (0.92 of 10.0): phase sft needs most, at most 8.00' in text and 'Under 10%' not in text


def stored(cfg, folder, layer=1):
    """50 documents of 3 activations each in place of texts."""
    d = folder / 'data/train'
    d.mkdir(parents=True, exist_ok=True)
    width = json.loads((folder / 'small.json').read_text())['hidden_size']
    meta = {'format': 'lens-tokens/1', 'vocab_size': 8, 'activations': {'layer': layer}}
    (d / 'meta.json').write_text(json.dumps(meta))
    rng = np.random.default_rng(0)
    np.save(d / 'activations.npy', rng.standard_normal((50, 3, width)).astype(np.float32))
    np.save(d / 'positions.npy', np.tile(np.arange(20, 23, dtype=np.int32), (50, 1)))
    np.save(d / 'doc_id.npy', np.arange(50))
    np.save(d / 'explanations.npy', np.ones((50, 3, cfg.explanation_len), np.int32))
    cfg.sft.vectors = 3
    cfg.decoder.init = cfg.encoder.init = 'identity'
    cfg.data.positions, cfg.encoder.context_tokens, cfg.sft.kl_weight = 'any', 0, 0.0


def test_stored_activations_are_planned_in_place_of_texts(planned, monkeypatch):
    batches = []
    kept = plan.steps
    monkeypatch.setattr(plan, 'steps', lambda *a: (batches.append(x[3]) or x for x in kept(*a)))
    code, text = planned(10.0, 8e9, stored)
    assert code == 0 and 'stored activations of 50 documents, 3 a row' in text and 'assumed' not in text
    for batch in batches:
        assert 'tokens' not in batch and batch['activations'].shape[:2] == batch['positions'].shape
    with pytest.raises(LensError, match=r'layer=1, but .*activations.npy was read after block 2: set layer=2'):
        planned(10.0, 8e9, lambda cfg, folder: stored(cfg, folder, layer=2))
    with pytest.raises(LensError, match=r'sft.documents=52, but .*train holds only 50 documents'):
        planned(10.0, 8e9, lambda cfg, folder: (stored(cfg, folder), set_('sft.documents', 52)(cfg, folder)))


def test_little_to_spare_is_a_warning(planned):
    assert 'Under 10% to spare' in planned(9.0, 8e9)[1]


def test_a_plan_says_what_helps(planned):
    code, text = planned(7.0, 8e9)
    assert code == 1 and 'Does not fit in 6.4 GB (0.92 of 7.0): phase sft needs 8.00 GB, 1.6 GB too much' in text
    assert text.count('  with ') == 5 and 'rows of 4096 tokens and 100000 documents are assumed' in text
    assert 'with sft.slices=2: base 0.00, phase sft 8.00 GB, 1.6 GB too much' in text
    assert 'None of the changes' in text
    code, text = planned(1e-4, 8e9)  # holds nothing
    assert 'Phase sft: too much before it computes anything' in text and 'total at least 0.00 GB' in text
    assert 'with mesh.model=4 mesh.data=1: base 0.00, phase sft without temporaries' in text


def set_(key, value):
    return lambda cfg, folder: cfg.update_from_flattened_dict({key: value})


def no_model(cfg, folder):
    cfg.subject.path = str(folder / 'absent')


def broken_data(cfg, folder):
    (folder / 'data/train').mkdir(parents=True)
    (folder / 'data/train/tokens.npy').write_bytes(b'no array')


def unpacked(cfg, folder):
    stored = json.loads((folder / 'small.json').read_text())
    del stored['quantization_config']
    (folder / 'small.json').write_text(json.dumps(stored))
    cfg.subject.packed = True


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (no_model, r'absent is no folder, and the Hub gave none: set --config.subject.path= to a folder'),
        (set_('subject.path', 'absent.json'), r'absent.json does not exist'),
        (set_('layer', 3), r'layer=3 is not a block of the subject'),
        (set_('sft.documents', 22), r'sft.documents=22 cannot be split over'),
        (set_('subject.experts', 'planned'), r"subject.experts='planned' is not one of auto, dense, ragged, triton"),
        (set_('mesh.model', 0), r'mesh.model=0 must be at least 1'),
        (set_('sft.steps', 0), r'sft.steps=0 must be positive'),
        (set_('phases', ()), r'phases is empty'),
        (set_('decoder.prompt', 'nothing'), r"decoder.prompt='nothing' must contain <embed>"),
        (
            set_('data.path', __file__),
            r'test_plan.py is a file: data.path is a folder, which data_gen.import_stages makes',
        ),
        (broken_data, r'tokens.npy is truncated or not a .npy array'),
        (unpacked, r'does not say that its experts are MXFP4'),
    ],
)
def test_what_a_configuration_alone_shows_is_refused(planned, change, message):
    with pytest.raises(LensError, match=message) as e:
        planned(80.0, 0, change)
    assert '\n' not in str(e.value)


def test_what_the_compiler_refuses_for_its_size_counts_with_the_size_that_it_names(opened, monkeypatch):
    said = [
        'RESOURCE_EXHAUSTED: Ran out of memory, the total for HLO temporaries (21.50G) exceeds available HBM (15.75G).'
    ]

    def refuse(*_):
        raise jax.errors.JaxRuntimeError(said[0])

    monkeypatch.setattr(plan, 'compile_step', refuse)
    assert plan.compile_phase(*opened, 'sft') == (21.5 * 2**30, {})
    said[0] = 'INTERNAL: something else (1.00G) exceeds what there is'
    with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
        plan.compile_phase(*opened, 'sft')


def test_the_first_compiler_that_is_installed_is_asked(monkeypatch):
    for plugins, want in (
        (['jax', 'libtpu', 'jax_cuda13_plugin'], 'h100'),
        (['jax', 'libtpu'], 'v5e'),
        (['jax'], 'cpu'),
    ):
        found = dict.fromkeys(plugins, types.SimpleNamespace(origin='here'))
        monkeypatch.setattr(importlib.util, 'find_spec', found.get)
        assert targets.default() == want


def test_devices_that_cannot_be_compiled_for_are_refused(tmp_path, monkeypatch):
    with pytest.raises(LensError, match=r"--device='h200' is not one of h100, v5e, v5p, cpu"):
        plan.run(small(tmp_path), 'h200')
    monkeypatch.setattr(targets, 'installed', lambda name: False)
    with pytest.raises(LensError, match=r'no compiler for v5p: install libtpu'):
        targets.devices('v5p', 8)
    monkeypatch.setattr(targets, 'installed', lambda name: True)
    with pytest.raises(LensError, match=r'no slice of v5e has 6 devices: 1, 4, 8, 16, 32'):
        targets.devices('v5e', 6)


@pytest.mark.slow
def test_gpt_oss_fits_eight_devices_of_80_gb():
    """The command itself, on the devices of mesh.data=-1 and without a workdir."""
    words = [f'--config.subject.path={MODELS}/gpt-oss-20b.json', '--config.mesh.data=-1', '--plan', '--device_gb=80']
    words = [sys.executable, '-m', 'lens.main', '--config=configs/gptoss.py:sft', *words]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'mesh.data=-1: 8 is taken, for 8 devices' in run.stdout
    assert ' 41.83 GB  frozen, bfloat16' in run.stdout
    last = run.stdout.strip().splitlines()[-1]
    assert last.startswith('Fits in 73.6 GB (0.92 of 80.0)')
    assert int(last.rpartition('(')[2].partition('%')[0]) >= 30
