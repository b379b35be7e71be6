"""Every recipe loads, has exactly the keys of base, and says how to run it."""

import ast
import importlib
import inspect
import json
import math
import pathlib
import re

import ml_collections
import pytest
from absl import flags

from configs import base
from lens import cli, places
from lens import keys as keys_of
from lens.errors import LensError

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem != '__init__')
RECIPES = [n for n in NAMES if n not in ('base', 'tiny_subject')]  # those that start from base
DOCUMENTED = [n for n in NAMES if n != 'base']
PHASE_KEYS = frozenset(base.phase('sft').keys())
HF_CONFIGS = ROOT / 'tests' / 'hf_configs'
MADE = {'data/smollm2/model': 'SmolLM2-135M-Instruct'}  # by `make smollm2`


def load(name):
    return importlib.import_module(f'configs.{name}')


def arguments(name) -> dict[str, tuple[str, ...]]:
    """What may follow configs/NAME.py: and the phases that it selects; empty for a file without arguments."""
    module = load(name)
    takes = inspect.signature(module.get_config).parameters
    return getattr(module, 'RECIPES', base.RECIPES) if takes else {}


WITH_ARGUMENTS = [n for n in RECIPES if arguments(n)]
CASES = [(n, a) for n in WITH_ARGUMENTS for a in arguments(n)]


def keys(config, prefix=''):
    out = set()
    for k in config:
        value = config[k]
        out |= keys(value, f'{prefix}{k}.') if isinstance(value, ml_collections.ConfigDict) else {prefix + k}
    return out


def key_problems(config) -> list[str]:
    """Keys of `config` that base has not or has and `config` lacks; blocks of a further phase are allowed."""
    want, have = keys(base.get_config()), keys(config)
    phases = [k for k in config if k not in base.get_config() and isinstance(config[k], ml_collections.ConfigDict)]
    for p in phases:
        have = {k for k in have if not k.startswith(f'{p}.')}
        if frozenset(config[p].keys()) != PHASE_KEYS:
            have.add(p)
    return [f'unknown {k}' for k in sorted(have - want)] + [f'missing {k}' for k in sorted(want - have)]


def test_there_are_recipes():
    assert 'tiny' in RECIPES


@pytest.mark.parametrize('name', NAMES)
def test_config_loads(name):
    one, two = load(name).get_config(), load(name).get_config()
    assert isinstance(one, ml_collections.ConfigDict)
    assert one == two and one is not two  # no state is shared between two calls


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_has_exactly_the_keys_of_base(name):
    assert key_problems(load(name).get_config()) == []


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_names_phases_that_it_has(name):
    config = load(name).get_config()
    assert config.phases and all(p in config and 'objective' in config[p] for p in config.phases)


def test_key_problems_finds_them():
    config = base.get_config()
    assert key_problems(config) == []
    config.warm = base.phase('sft')  # a further phase
    assert key_problems(config) == []
    config.layers = 3
    config.warm.learning_rat = 1.0
    del config.decoder.prompt
    assert key_problems(config) == ['unknown layers', 'unknown warm', 'missing decoder.prompt']


@pytest.mark.parametrize('name', DOCUMENTED)
def test_docstring_holds_a_command_that_exists(name):
    text = load(name).__doc__
    assert text and 'python -m' in text and f'configs/{name}.py' in text
    for module in re.findall(r'python -m ([\w.]+)', text):
        path = ROOT / module.replace('.', '/')
        assert path.with_suffix('.py').exists() or (path / '__main__.py').exists(), module


@pytest.mark.parametrize('name', DOCUMENTED)
def test_docstring_overrides_name_keys_that_exist(name):
    config = load(name).get_config()
    for key in re.findall(r'--config\.([\w.]+)', load(name).__doc__):
        assert key in keys(config), key


@pytest.mark.parametrize('name', WITH_ARGUMENTS)
def test_docstring_names_every_argument_and_no_other(name):
    assert set(re.findall(rf'configs/{name}\.py:(\w+)', load(name).__doc__)) == set(arguments(name)) - {''}


@pytest.mark.parametrize(('name', 'argument'), CASES)
def test_recipe_argument(name, argument):
    config = load(name).get_config(argument)
    assert key_problems(config) == []
    assert config.phases == arguments(name)[argument]
    assert all('objective' in config[p] for p in config.phases)


@pytest.mark.parametrize('name', WITH_ARGUMENTS)
def test_unknown_recipe_argument_names_the_accepted_ones(name):
    with pytest.raises(ValueError, match="'sftt' is not a recipe") as e:
        load(name).get_config('sftt')
    assert all(a in str(e.value) for a in arguments(name)) and '\n' not in str(e.value)


@pytest.mark.parametrize(('name', 'argument'), CASES)
def test_recipe_fits_its_model(name, argument):
    c = load(name).get_config(argument)
    shipped = ROOT / c.subject.path / 'config.json'
    file = (
        shipped
        if shipped.exists()
        else HF_CONFIGS / f'{MADE.get(c.subject.path, pathlib.Path(c.subject.path).name)}.json'
    )
    hf = json.loads(file.read_text())
    hf = hf.get('text_config', hf)
    layers, heads = hf.get('num_hidden_layers', hf.get('n_layer')), hf.get('num_key_value_heads', hf.get('n_head'))
    assert 0 <= c.layer < layers and -1 <= c.encoder.output_layer < layers
    assert -1 <= c.decoder.patched_blocks <= layers
    assert heads % c.mesh.model == 0
    assert c.decoder.prompt.count('<embed>') == 1 and '<text>' in c.encoder.prompt
    for p in c.phases:
        assert c[p].documents % c.mesh.data == 0
    assert c.eval.batch // c.eval.vectors % c.mesh.data == 0  # documents of an evaluation step


def uncommented_keys(source: str) -> list[int]:
    """Lines that set a key to a value without a comment; lines that open a block, and recipes, are free."""
    lines, out = source.splitlines(), []
    declaring = [f for f in ast.parse(source).body if getattr(f, 'name', '') in ('phase', 'get_config')]
    for node in (x for f in declaring for x in ast.walk(f)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        called = node.value.func if isinstance(node.value, ast.Call) else None
        block = getattr(called, 'attr', getattr(called, 'id', None)) in ('ConfigDict', 'phase')
        if not block and not re.search(r'  # \S', lines[node.end_lineno - 1]):
            out.append(node.lineno)
    return sorted(out)


def test_every_key_of_base_carries_a_comment():
    source = (ROOT / 'configs' / 'base.py').read_text()
    lines = source.splitlines()
    assert [lines[i - 1].strip() for i in uncommented_keys(source)] == []


def test_uncommented_keys_finds_them():
    lines = (
        'c = ConfigDict()',
        'c.a = 1  # metres',
        'c.b = ConfigDict()',
        'c.b.x = 2',
        'c.p = phase("")',
        'c.d = "# no"',
    )
    source = '\n    '.join(('def get_config():', *lines)) + '\n\n\ndef recipe(c):\n    c.x = 1\n'
    assert uncommented_keys(source) == [5, 7]


# ---- what a key may hold: lens/keys.py ----


@pytest.mark.parametrize(('name', 'argument'), [*CASES, *((n, None) for n in RECIPES if n not in WITH_ARGUMENTS)])
def test_every_recipe_passes_the_check_of_keys(name, argument):
    keys_of.check(load(name).get_config(*([] if argument is None else [argument])))


def test_the_table_of_keys_has_the_keys_and_types_of_base():
    c = base.get_config()
    phases = ('sft', 'grpo', 'gumbel')
    assert keys_of.KEYS.keys() == {k for k in keys(c) if k.partition('.')[0] not in phases}
    assert keys_of.PHASE_KEYS.keys() == PHASE_KEYS
    for key, kind in keys_of.KEYS.items():
        types = {keys_of.Whole: int, keys_of.Real: float, bool: bool, tuple: tuple, object: object}
        want = types.get(kind if isinstance(kind, type) else type(kind), str)  # choices and paths are texts
        want = str if isinstance(kind, tuple) and want is tuple else want
        want = tuple if kind == keys_of.WHOLES else want
        assert isinstance(keys_of.get(c, key), want), key


def changed(key, value):
    """base with a value of any type at a dotted key."""
    c = base.get_config()
    block, _, name = key.rpartition('.')
    (keys_of.get(c, block) if block else c)._fields[name] = value
    return c


HUGE = 10**5000
WRONG = [
    ('seed', -1, 'seed=-1 must be at least 0'),
    ('seed', 2**80, f'seed={2**80} must be at most 2147483647'),
    ('seed', 2**31, 'must be at most 2147483647'),
    ('seed', HUGE, 'seed=an integer of many digits, must be at most'),
    ('seed', '3', "seed='3' must be a whole number"),
    ('seed', 1.0, 'seed=1.0 must be a whole number'),
    ('seed', True, 'seed=True must be a whole number'),
    ('seed', None, 'seed=None must be a whole number'),
    ('seed', [1], r'seed=\[1\] must be a whole number'),
    ('layer', 'two', "layer='two' must be a whole number"),
    ('layer', 2**40, 'layer=.* must be at most'),
    ('data.min_pos', 10**12, 'data.min_pos=.* must be at most'),
    ('explanation_len', 0, 'explanation_len=0 must be at least 1'),
    ('decoder.norm', math.nan, 'decoder.norm=nan must be finite'),
    ('decoder.norm', math.inf, 'decoder.norm=inf must be at most'),
    ('decoder.norm', '1', "decoder.norm='1' must be a number"),
    ('decoder.norm', -1.0, 'decoder.norm=-1.0 must be at least 0'),
    ('lora.alpha', 0, 'lora.alpha=0 must be at least 1e-06'),
    ('lora.alpha', 10**400, 'lora.alpha=an integer of many digits, must be at most'),
    ('lora.rank', 0, 'lora.rank=0 must be at least 1'),
    ('lora.pattern', '(', r"lora.pattern='\(' is not a regular expression: missing \)"),
    ('lora.pattern', '(' * 50_000, 'lora.pattern=.* is not a regular expression'),
    ('lora.pattern', 7, 'lora.pattern=7 must be a text'),
    ('lora.rs', 'yes', "lora.rs='yes' must be True or False"),
    ('lora.rs', 1, 'lora.rs=1 must be True or False'),
    ('mesh.data', 10**9, 'mesh.data=1000000000 must be at most 65536'),
    ('mesh.data', -2, 'mesh.data=-2 must be at least -1'),
    ('mesh.model', 0, 'mesh.model=0 must be at least 1'),
    ('eval.documents', 1, 'eval.documents=1 must be at least 2'),
    ('eval.documents', 10**12, 'eval.documents=.* must be at most'),
    ('eval.samples', -1, 'eval.samples=-1 must be at least 0'),
    ('eval.every', math.nan, 'eval.every=nan must be finite'),
    ('eval.every', HUGE, 'eval.every=an integer of many digits'),
    ('eval.every', '1s\0', 'eval.every=.* must be Unicode without NUL'),
    ('eval.every', {1}, 'eval.every=.* must be a number'),
    ('checkpoint.keep', 0.5, 'checkpoint.keep=0.5 must be a whole number'),
    ('subject.path', 'a\0b', r"subject.path='a\\x00b' must be Unicode without NUL"),
    ('data.path', 'a' * 5000, 'data.path has 5000 characters, it must have at most 4096'),
    ('subject.path', 5, 'subject.path=5 must be a text'),
    ('subject.dtype', ['float32'], r"subject.dtype=\['float32'\] must be a text"),
    ('subject.dtype', 'int8', "subject.dtype='int8' is not one of float32, bfloat16"),
    ('decoder.prompt', 'a\ud800<embed>', 'decoder.prompt=.* halves of characters'),
    ('decoder.prompt', 'a' * 10**6, 'decoder.prompt has 1000000 characters, it must have at most 100000'),
    ('health.collapse', 'never', "health.collapse='never' is not one of off, warn, stop"),
    ('phases', 'sft', "phases='sft' must be a tuple of texts"),
    ('phases', ('sft', 3), 'phases=3 must be a text'),
    ('sft.objective', 'ppo', "sft.objective='ppo' is not one of sft, grpo, gumbel"),
    ('sft.steps', [math.inf], 'sft.steps=inf must be at most'),
    ('sft.documents', 10**12, 'sft.documents=.* must be at most'),
    ('sft.vectors', 0, 'sft.vectors=0 must be at least 1'),
    ('grpo.group', math.nan, 'grpo.group=nan must be a whole number'),
    ('grpo.updates', 10**6, 'grpo.updates=1000000 must be at most 64'),
    ('grpo.clip', 0, 'grpo.clip=0 must be at least'),
    ('grpo.clip', math.inf, 'grpo.clip=inf must be at most'),
    ('grpo.kl_skip', -1, 'grpo.kl_skip=-1 must be at least 0'),
    ('grpo.beta', math.nan, 'grpo.beta=nan must be finite'),
    ('grpo.beta', True, 'grpo.beta=True must be a number'),
    ('gumbel.form', None, 'gumbel.form=None must be a text'),
    ('gumbel.table', (('a', math.nan),), 'gumbel.table=nan must be finite'),
]


@pytest.mark.parametrize(('key', 'value', 'message'), WRONG, ids=[f'{i}-{row[0]}' for i, row in enumerate(WRONG)])
def test_what_no_run_can_mean_is_refused_with_its_key(key, value, message):
    with pytest.raises(LensError, match=message) as e:
        keys_of.check(changed(key, value))
    assert '\n' not in str(e.value) and len(str(e.value)) < 500 and str(e.value).startswith(key)
    str(e.value).encode()


@pytest.mark.parametrize('key', sorted(keys(base.get_config())))
def test_no_key_takes_what_is_no_value(key):
    for value in (math.nan, -math.inf, 2**120, 'a\0', '\udfff', b'x', object()):
        with pytest.raises(LensError):
            keys_of.check(changed(key, value))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c.eval.__delattr__('batch'), 'the configuration lacks the key eval.batch: start it from get_config'),
        (lambda c: c.sft.__delattr__('steps'), 'lacks the key sft.steps'),
        (lambda c: c.__delattr__('mesh'), 'lacks the key mesh.data'),
        (lambda c: c.__delattr__('subject'), 'lacks the key subject.compute'),
        (lambda c: c.__delattr__('tuned_lens'), 'lacks the key tuned_lens'),
        (lambda c: c._fields.__setitem__('init_from', 5), 'init_from=5 must be a text'),
        (
            lambda c: c.sft.__setattr__('learning_rat', 1.0),
            'has a key sft.learning_rat, which nobody reads; .* sft.lea',
        ),
        (lambda c: c.__setattr__('layers', 2), 'has a key layers, which nobody reads; the nearest is layer'),
        (lambda c: c._fields.__setitem__('eval', 5), 'lacks the key eval.batch'),
        (lambda c: c._fields.__setitem__('sft', 5), 'has a key sft, which nobody reads'),
    ],
)
def test_keys_that_are_missing_and_keys_that_nobody_reads(tmp_path, change, message):
    c = base.get_config()
    change(c)
    with pytest.raises(LensError, match=message):
        keys_of.check(c)
    with pytest.raises(LensError, match=message):
        places.locate(c, tmp_path)  # looks at folders first of all


@pytest.mark.parametrize('value', [{}, None, 'sft', [], ml_collections.ConfigDict()])
def test_what_is_no_configuration(value):
    with pytest.raises(LensError, match=r'get_config returned|lacks the key'):
        keys_of.check(value)


# ---- flags ----


@pytest.mark.parametrize(
    ('word', 'message'),
    [
        ('--share=nan', '--share=nan must be finite'),
        ('--share=inf', '--share=inf must be at most 1e'),
        ('--share=-1e400', '--share=-inf must be at least -1e'),
        ('--count=1' + 30 * '0', '--count=10+ must be at most 9007199254740992'),
        ('--count=-1' + 30 * '0', '--count=-10+ must be at least -9007199254740992'),
        ('--place=a\0b', r"--place='a\\x00b' must be Unicode"),
        ('--place=\udcff', '--place=.* must be Unicode'),
        ('--places=a,b\0', '--places=.* must be Unicode'),
        ('--counts=99999999999999999999', '--counts=9+ must be at most'),
    ],
)
def test_no_flag_takes_a_number_or_text_that_cannot_be_meant(word, message):
    values = flags.FlagValues()
    flags.DEFINE_float('share', 0.5, '', flag_values=values)
    flags.DEFINE_integer('count', None, '', flag_values=values)
    flags.DEFINE_multi_integer('counts', [1], '', flag_values=values)
    flags.DEFINE_string('place', None, '', flag_values=values)
    flags.DEFINE_list('places', [], '', flag_values=values)

    def check():
        for name in values:
            cli.check_value(values[name].value, f'--{name}')

    values(['command', '--share=1e-3', '--count=9007199254740992', '--place=\u00e9'])
    check()
    values(['command', word])
    with pytest.raises(LensError, match=message):
        check()


def test_values_inside_a_configuration_of_any_command():
    c = ml_collections.ConfigDict({'a': {'b': (1, [2.5, 'x'])}, 'yes': True, 'none': None})
    cli.check_value(c, '--config')
    for value in (math.nan, 2**80, '\0'):
        c.a.b = (1, [value])
        with pytest.raises(LensError, match=r'--config.a.b=.* must be'):
            cli.check_value(c, '--config')


@pytest.mark.parametrize('form', ['--config={}', '-config={}'])
@pytest.mark.parametrize(
    ('body', 'message'),
    [
        ('return {"seed": 1}', 'get_config returns dict, it must return a ConfigDict'),
        ('return None', 'get_config returns NoneType'),
        ('raise IndexError', 'does not load: IndexError'),
        ('raise ValueError("one\\n  two")', 'does not load: two'),
        ('raise ValueError("x" * 9999)', 'does not load: ValueError: x+ …'),
        ('import sys; sys.exit(0)', 'does not load: 0'),
    ],
)
def test_a_configuration_file_that_gives_no_configuration(tmp_path, form, body, message):
    file = tmp_path / 'c.py'
    file.write_text(f'def get_config():\n    {body}\n')
    with pytest.raises(LensError, match=message) as e:
        cli.check_config(cli.find_config([form.format(file)]))
    assert '\n' not in str(e.value) and len(str(e.value)) < 800
    with pytest.raises(LensError, match=message):
        cli.check_config(cli.find_config(['--workdir=w', '--config', str(file)]))


def test_a_configuration_file_that_is_none(tmp_path):
    for file, reason in ((tmp_path / 'none.py', 'No such file'), (tmp_path, 'Is a directory')):
        with pytest.raises(LensError, match=f'--config={file} does not load: .*{reason}'):
            cli.check_config([f'--config={file}'])
