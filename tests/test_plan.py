"""Every recipe's train step at full size, as shapes on eight fake devices: no recipe may rot. And `lens.main --plan`."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from lens import config, sharding
from lens.errors import LensError
from lens.models import families
from lens.tools import plan_command, plan_text
from lens.tools.hlo import Collective
from lens.tools.plan import (
    Job,
    Needs,
    Program,
    Remedy,
    WordTokenizer,
    changes,
    compile_phase,
    needs,
    per_device,
    plan,
    read_texts,
    remedy,
    steps,
)

ROOT = pathlib.Path(__file__).parent.parent
MODELS = ROOT / 'tests/hf_configs'
# recipe -> (published parameters of its subject in billions, tokens of a row of its data)
RECIPES = {
    'gptoss': (20.915, 4096),
    'gptoss:sft': (20.915, 4096),
    'gptoss:grpo': (20.915, 4096),
    'gptoss:gumbel': (20.915, 4096),
    'gptoss:120b': (116.83, 4096),
    'gemma3_27b': (27.009, 1024),
    'gemma2_9b': (9.242, 1024),
    'qwen2_5_14b': (14.770, 1024),
    'qwen2_5_7b': (7.616, 1024),
    'nla_qwen2_5_7b': (7.616, 2048),
    'nla_qwen2_5_7b:full': (7.616, 2048),
    'gpt2': (0.1244, 128),
    'simplestories': (None, 64),
}
H100_BYTES = 80e9
GB = 1e9


def open_recipe(recipe):
    """(configuration, job, mesh) of 'name' or 'name:argument'."""
    name, _, argument = recipe.partition(':')
    cfg = importlib.import_module(f'configs.{name}').get_config(argument)
    file = next(f for f in MODELS.glob('*.json') if f.stem.lower() == cfg.subject.path.rpartition('/')[2].lower())
    c = families.from_hf(json.loads(file.read_text()))
    job = Job(c, read_texts(cfg, WordTokenizer()), RECIPES[recipe][1])
    return cfg, job, sharding.make_mesh(cfg.mesh.data, cfg.mesh.model)


def test_every_recipe_is_here():
    here = {r.partition(':')[0] for r in RECIPES}
    files = {p.stem for p in (ROOT / 'configs').glob('*.py')}
    assert here == files - {'__init__', 'base', 'tiny', 'tiny_subject'}


@pytest.mark.parametrize('recipe', RECIPES)
def test_train_step_at_full_size(recipe):
    cfg, job, mesh = open_recipe(recipe)
    billions = RECIPES[recipe][0]
    for phase, n in plan(cfg, job, mesh).items():
        parts = f'base {n.base / GB:.2f}, trainable {n.trainable / GB:.2f}, optimizer {n.optimizer / GB:.2f}'
        print(
            f'{recipe} {phase} on {mesh.shape["data"]}x{mesh.shape["model"]}, GB a device: {parts}, cache {n.cache / GB:.2f}'
        )
        assert n.optimizer >= 2 * n.trainable > 0  # two moments
        assert (n.cache > 0) == (phase != 'sft')
        assert n.given + n.cache < H100_BYTES
    whole = per_device(config.abstract_base(cfg, job.c, sharding.make_mesh(1, 1)))
    if billions:
        assert whole / {'bfloat16': 2, 'float32': 4}[cfg.subject.dtype] == pytest.approx(billions * 1e9, rel=1e-3)


def test_tensor_parallel_splits_the_base():
    """The alternative of the docstring: eight-way tensor parallel holds an eighth, but for replicated vectors."""
    cfg, job, mesh = open_recipe('gptoss:sft')
    cfg.mesh.data, cfg.mesh.model = 1, 8
    whole = per_device(config.abstract_base(cfg, job.c, mesh))
    assert plan(cfg, job, sharding.make_mesh(1, 8))['sft'].base == pytest.approx(whole / 8, rel=0.001)


def test_packed_experts_save_what_the_notes_say():
    """gpt-oss-20b: 41.8 GB in bfloat16, 13.8 as shipped."""
    cfg, job, mesh = open_recipe('gptoss:sft')
    assert needs(cfg, job, mesh)['sft'].base == pytest.approx(41.8e9, rel=0.002)
    cfg.subject.packed = True
    assert plan(cfg, job, mesh)['sft'].base == pytest.approx(13.8e9, rel=0.005)


def test_the_decoder_of_the_start_of_a_phase_counts():
    cfg, job, mesh = open_recipe('gpt2')
    without = needs(cfg, job, mesh)['grpo']
    cfg.grpo.beta, cfg.grpo.kl_to = 0.1, 'start'
    n = needs(cfg, job, mesh)['grpo']
    assert without.reference == 0 < n.reference < n.trainable
    assert n.given == n.base + n.trainable + n.optimizer + n.reference == without.given + n.reference


def test_a_step_that_cannot_run_raises():
    cfg, job, mesh = open_recipe('gpt2')
    cfg.layer = job.c.n_layers
    with pytest.raises(ValueError, match=r'are not all in 0\.\.11'):
        plan(cfg, job, mesh)


def test_nothing_is_allocated():
    before = len(jax.live_arrays())
    plan(*open_recipe('qwen2_5_7b'))
    assert sum(x.nbytes for x in jax.live_arrays()[before:]) < 1e6


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
    job, packed, _ = plan_command._open(cfg)
    assert packed
    return cfg, dataclasses.replace(job, seq_len=40), sharding.make_mesh(4, 1)


def test_bytes_and_collectives_of_a_compiled_step(opened):
    cfg, job, mesh = opened
    n = needs(cfg, job, mesh)['sft']
    assert n.base == 2 * SMALL_BASE  # bfloat16
    program = compile_phase(cfg, job, mesh, 'sft')
    assert program.experts == 2 * SMALL_EXPERTS
    assert cfg.subject.dtype == 'bfloat16' and cfg.subject.experts == 'ragged'
    assert {c.group_size for c in program.collectives} == {4}
    summed = sum(c.payload_bytes * c.count for c in program.collectives if c.kind == 'all-reduce')
    means_and_scalars = 2 * 64 * 4 + 8 * 4
    assert n.trainable < summed <= n.trainable + means_and_scalars
    logits = 24 // 4 * 10 * cfg.explanation_len * 96 * 4
    assert program.temporaries - program.experts > logits


@pytest.mark.slow
def test_what_is_compiled_for_experts_is_no_dense_product(opened):
    """2 of 4 experts are multiplied with, and twice the documents need twice the temporaries."""
    cfg, job, mesh = opened

    def compiled(experts, documents):
        cfg.subject.experts, cfg.subject.dtype, cfg.sft.documents = experts, 'float32', documents
        with jax.set_mesh(mesh):
            (step,) = steps(cfg, job, mesh)
            return step.lower().compile()

    planned, dense, more = compiled('planned', 24), compiled('dense', 24), compiled('planned', 48)
    assert planned.cost_analysis()['flops'] < 0.8 * dense.cost_analysis()['flops']
    sizes = [x.memory_analysis().temp_size_in_bytes for x in (planned, more)]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.2)


CHANGED = [
    {'mesh.shard_base': True},
    {'subject.packed': True},
    {'sft.documents': 12},
    {'mesh.model': 2, 'mesh.data': 2},
]


@pytest.mark.parametrize('values', CHANGED)
def test_a_remedy_is_what_the_changed_configuration_needs(opened, values):
    cfg, job, _ = opened
    compiled = []

    def compiling(changed, job, mesh, name):
        compiled.append((changed, mesh, name))
        return Program(1000, 0, ())

    found = remedy('x', values, cfg, job, ['sft'], 1e12, compiling)
    ((changed, mesh, name),) = compiled
    flat = {f'{block}.{key}': changed[block][key] for block, key in (k.split('.') for k in values)}
    assert flat == values and name == 'sft'
    assert (mesh.shape['data'], mesh.shape['model']) == (changed.mesh.data, changed.mesh.model)
    assert (found.phase, found.total, found.compiled) == ('sft', needs(changed, job, mesh)['sft'].given + 1000, True)
    assert cfg.sft.documents == 24 and cfg.mesh.data == 4 and not cfg.mesh.shard_base, 'the configuration has changed'


def test_phases_that_did_not_fit_are_compiled_first(opened):
    cfg, job, _ = opened
    cfg.phases, compiled = ('sft', 'grpo'), []

    def compiling(changed, job, mesh, name):
        compiled.append(name)
        return Program(int(1e9), 0, ())

    remedy('x', {'sft.documents': 12}, cfg, job, ['grpo'], 2e9, compiling)
    assert compiled == ['grpo', 'sft']
    assert remedy('x', {'sft.documents': 12}, cfg, job, ['grpo'], 5e8, compiling).phase == 'grpo'
    assert compiled == ['grpo', 'sft', 'grpo']  # too much already: the other is left out


def test_what_cannot_fit_is_not_compiled(opened):
    cfg, job, _ = opened
    given = needs(cfg, job, sharding.make_mesh(1, 4))['sft'].given

    def compiling(*_):
        raise AssertionError('compiled')

    values = {'mesh.model': 4, 'mesh.data': 1}
    found = remedy('x', values, cfg, job, ['sft'], given - 1, compiling)
    assert (found.total, found.compiled) == (given, False)
    with pytest.raises(AssertionError, match='compiled'):
        remedy('x', values, cfg, job, ['sft'], given, compiling)


def test_which_changes_are_tried(opened):
    cfg, _, mesh = opened
    assert [change for change, _ in changes(cfg, mesh, ['sft', 'grpo'], True)] == [
        'mesh.shard_base=True',
        'subject.packed=True',
        'mesh.model=2 mesh.data=2',
        'mesh.model=4 mesh.data=1',
        'sft.documents=12 grpo.documents=4',
    ]
    cfg.grpo.documents, cfg.decoder.train, cfg.mesh.shard_base = 4, 'full', True  # 2 documents on 4 devices
    assert [c for c, _ in changes(cfg, mesh, ['sft', 'grpo'], True)] == [
        'mesh.model=2 mesh.data=2',
        'mesh.model=4 mesh.data=1',
    ]
    assert list(changes(cfg, sharding.make_mesh(1, 1), ['grpo'], False)) == [
        ('grpo.documents=2', {'grpo.documents': 2})
    ]


def test_words_stand_in_for_tokens():
    ids = WordTokenizer()('<|start|>user<|message|>Is it <embed>, or 12?<|end|>')['input_ids']
    assert len(ids) == len(set(ids)) == 11
    assert WordTokenizer()('a b a')['input_ids'] == [0, 1, 0]


def collective(kind='all-reduce', count=1, payload=8_000_000, size=8, name='jit(train_step)/add', bounded=True):
    return Collective(kind, count, (f'f32[{payload // 4}]',), payload, size, name, bounded)


def test_memory_says_what_is_to_spare():
    n, program = Needs(int(5e9), int(2e8), int(4e8), 0, int(1e8)), Program(int(3e9), int(1e9), ())
    lines = plan_text.memory(n, program, 'bfloat16', 10e9)
    assert [line.split()[:2] for line in lines[1:4]] == [['base', '5.00'], ['trained', '0.20'], ['optimizer', '0.40']]
    assert 'with 0.10 for its keys and values, bfloat16' in lines[5]
    assert lines[-1].split() == ['total', 'at', 'most', '8.60', 'of', '10.0:', '1.4', 'GB', '(14%)', 'to', 'spare']
    assert '1.6 GB too much' in plan_text.memory(n, program, 'bfloat16', 7e9)[-1]


def test_little_to_spare_is_a_warning():
    assert len(plan_text.verdict({'a': 89e9, 'b': 1e9}, 100e9)) == 1
    assert 'Under 10% to spare' in plan_text.verdict({'a': 1e9, 'b': 91e9}, 100e9)[1]
    assert 'phase b needs at most 101.00' in plan_text.verdict({'a': 1e9, 'b': 101e9}, 100e9)[0]


def test_collectives_are_listed_by_what_they_move_and_add_up():
    many = [collective(payload=1_000_000 * i) for i in range(1, 16)]
    lines = plan_text.traffic(Program(0, 0, (*many, collective('all-gather', 24, 4_000_000, 4, bounded=False))))
    assert lines[1].split()[:5] == ['all-gather', '24+', '4', '4.000', '0.0720']  # 24 * 3/4 * 4 MB
    assert lines[2].split()[:5] == ['all-reduce', '1', '8', '15.000', '0.0262']  # 2 * 7/8 * 15 MB
    total = 0.072 + 2 * 7 / 8 * sum(range(1, 16)) / 1000
    assert lines[-3].split()[:4] == ['4', 'smaller', 'ones', '4'] and lines[-2].split()[:3] == [
        'total',
        '39',
        f'{total:.4f}',
    ]
    assert 'counted as one pass' in lines[-1]
    assert plan_text.traffic(Program(0, 0, ())) == ['Collectives of a step: none']


def test_where_a_collective_is_from_fits():
    name = (
        'jit(train_step)/transpose(jvp(jit(_run_blocks)))/while/body/closed_call/checkpoint/btkgh,kghd->btd/dot_general'
    )
    assert plan_text.place(name, 60) == 'btkgh,kghd->btd/dot_general (backward)'
    assert plan_text.place(name, 20) == '…_general (backward)'
    assert plan_text.place('jit(train_step)/jvp(jit(_var))/reduce_sum', 60) == '_var/reduce_sum'


def test_remedies_that_fit_come_first():
    before = {'sft': Needs(int(40e9), 0, 0, 0, 0)}

    def found(change, base, total, compiled=True):
        return Remedy(change, {'sft': Needs(int(base), 0, 0, 0, 0)}, 'sft', int(total), compiled)

    lines = plan_text.changes([found('a=1', 40e9, 40e9, False), found('b=1', 5e9, 12e9)], before, 24e9)
    assert lines[1] == '  b=1'
    assert lines[2] == '    base 5.00 GB instead of 40.00, total at most 12.00 (sft): fits, 12.0 GB (50%) to spare'
    assert lines[4] == '    without temporaries 40.00 (sft): 16.0 GB too much'
    assert 'None of the changes' in plan_text.changes([found('a=1', 40e9, 40e9)], before, 24e9)[-1]
    assert len(plan_text.changes([], before, 24e9)) == 1


def run_here(cfg, device_gb=80.0):
    """plan_command.run on the devices of this process."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(plan_command, '_pretend_devices', lambda cfg: None)
        return plan_command.run(cfg, device_gb)


def test_rows_and_documents_are_those_of_the_data(tmp_path, capsys, monkeypatch):
    cfg = small(tmp_path)
    monkeypatch.setattr(plan_command.plan, 'compile_phase', lambda *args: Program(1000, 0, ()))
    cfg.sft.steps = '2e'
    cfg.mesh.data = 1
    (tmp_path / 'data/train').mkdir(parents=True)
    np.save(tmp_path / 'data/train/tokens.npy', np.zeros((50, 36), np.int32))
    assert run_here(cfg) == 0
    printed = capsys.readouterr().out
    assert 'rows of 36 tokens, 50 documents' in printed and 'Collectives of a step: none' in printed
    assert max(map(len, printed.splitlines()[4:])) <= plan_text.WIDTH


def set_(key, value):
    return lambda cfg, folder: cfg.update_from_flattened_dict({key: value})


def no_model(cfg, folder):
    cfg.subject.path = str(folder / 'absent')


def broken_data(cfg, folder):
    (folder / 'data/train').mkdir(parents=True)
    (folder / 'data/train/tokens.npy').write_bytes(b'no array')


def unpacked(cfg, folder):
    config = json.loads((folder / 'small.json').read_text())
    del config['quantization_config']
    (folder / 'small.json').write_text(json.dumps(config))
    cfg.subject.packed = True


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (no_model, r'absent is no folder, and the Hub gave none: set --config.subject.path= to a folder'),
        (set_('subject.path', 'absent.json'), r'absent.json does not exist'),
        (set_('layer', 3), r'layer=3 is not a block of the subject'),
        (set_('sft.documents', 22), r'sft.documents=22 cannot be split over'),
        (set_('subject.experts', 'planned'), r"subject.experts='planned' is not one of dense, ragged, tokamax"),
        (set_('mesh.model', 0), r'mesh.model=0 must be positive'),
        (set_('sft.steps', 0), r'sft.steps=0 must be positive'),
        (set_('phases', ()), r'phases is empty'),
        (set_('decoder.prompt', 'nothing'), r"decoder.prompt='nothing' must contain <embed>"),
        (broken_data, r'tokens.npy is no array of rows of tokens'),
        (unpacked, r'does not say that its experts are MXFP4'),
    ],
)
def test_what_a_configuration_alone_shows_is_refused(tmp_path, change, message):
    cfg = small(tmp_path)
    change(cfg, tmp_path)
    with pytest.raises(LensError, match=message) as e:
        run_here(cfg)
    assert '\n' not in str(e.value)


def command(*arguments):
    words = [sys.executable, '-m', 'lens.main', *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
def test_the_command_plans_without_a_workdir_and_says_what_helps(tmp_path):
    """On the devices of mesh.data=-1; 0.1 MB hold nothing."""
    small(tmp_path)
    arguments = [
        '--config=configs/gptoss.py:sft',
        f'--config.subject.path={tmp_path}/small.json',
        '--config.layer=1',
        '--config.decoder.patched_blocks=2',
        '--config.mesh.data=-1',
        '--config.mesh.model=4',
    ]
    run = command(*arguments, '--plan', '--device_gb=0.0001')
    assert run.returncode == 1 and 'Traceback' not in run.stderr, run.stderr
    assert 'mesh.data=-1: 2 is taken, for 8 devices' in run.stdout
    assert 'small.json on 8 devices (data 2, model 4)' in run.stdout
    assert 'rows of 4096 tokens and 100000 documents are assumed' in run.stdout
    assert 'Does not fit' in run.stdout and 'None of the changes' in run.stdout
    for change in ('mesh.shard_base=True', 'subject.packed=True', 'mesh.model=8 mesh.data=1', 'sft.documents=12'):
        assert f'  {change}\n' in run.stdout
    run = command(*arguments)
    assert run.returncode == 1
    assert run.stderr.strip() == 'error: flag --workdir=None: Flag --workdir must have a value other than None.'


# arguments after --config=configs/gptoss.py -> (model, GB of the base on one device, least margin of 80 GB)
LARGE = {
    ':sft': ('20b', 41.83, 0.3),
    ':sft --config.mesh.data=1 --config.mesh.model=8': ('20b', 5.23, 0.6),
    ':120b': ('120b', 29.23, 0.25),
}


@pytest.mark.slow
@pytest.mark.parametrize('arguments', LARGE)
def test_gpt_oss_fits_eight_devices_of_80_gb(arguments):
    size, base, margin = LARGE[arguments]
    words = f'--config=configs/gptoss.py{arguments} --config.subject.path=tests/hf_configs/gpt-oss-{size}.json'.split()
    run = command(*words, '--plan', '--device_gb=80')
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    assert f' {base:.2f}  frozen, bfloat16' in run.stdout
    last = run.stdout.strip().splitlines()[-1]
    assert last.startswith('Fits in 80.0 GB')
    assert int(last.rpartition('(')[2].partition('%')[0]) >= 100 * margin
