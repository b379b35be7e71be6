"""Every recipe loads, has exactly the keys of base, and says how to run it."""

import ast
import importlib
import inspect
import json
import pathlib
import re

import ml_collections
import pytest

from configs import base

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem != '__init__')
RECIPES = [n for n in NAMES if n not in ('base', 'tiny_subject')]  # those that start from base
DOCUMENTED = [n for n in NAMES if n != 'base']
PHASE_KEYS = frozenset(base.phase('sft').keys())
HF_CONFIGS = ROOT / 'tests' / 'hf_configs'


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
    file = shipped if shipped.exists() else HF_CONFIGS / f'{pathlib.Path(c.subject.path).name}.json'
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
