"""Lens as a guest: what an installation holds, where shipped files are found, what --help says, what importing changes."""

import dataclasses
import importlib
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxlib import xla_client
from setuptools.dist import Distribution

import lens
from lens import cli, config, files
from lens.errors import LensError
from lens.models.transformer import Transformer
from tests.tiny_world import TINY

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = {
    'lens': 'lens',
    'configs': 'lens/configs',
    'data_gen': 'lens/data_gen',
    'lenses': 'lens/lenses',
}  # in a checkout: where installed
COMMANDS = sorted(
    '.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__main__')
    for folder in FOLDERS
    for p in (ROOT / folder).rglob('*.py')
    if "__name__ == '__main__'" in p.read_text('utf-8')
)
WRONG = {  # arguments of lens.report -> what is said
    ('--workdri=x',): 'error: --workdri is no flag of this command; the nearest is --workdir.',
    ('--workdir=x', '--qqqq'): 'error: --qqqq is no flag of this command; --help lists them.',
    ('--flagfile=x',): 'error: --flagfile=x is no flag of this command; --help lists them.',
    ('--' + 'q' * 3000,): f'error: --{"q" * 56} \u2026 is no flag of this command; --help lists them.',
    ('--workdir=x', 'y'): 'error: y is no flag of this command: flags are --NAME=VALUE, and --help lists them.',
}
# Runs every command in one fresh process, to where its flags are parsed.
ASK = """
import contextlib, io, json, runpy, sys
from absl import app, flags
app.define_help_flags()
before, out = set(flags.FLAGS), []
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv[1:], said, code = arguments, io.StringIO(), None
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_module(module, run_name='__main__', alter_sys=True)
        except SystemExit as e:
            code = e.code
    own = {n: flags.FLAGS[n].default for n in flags.FLAGS if n not in before}
    out.append({'code': code, 'said': said.getvalue(), 'flags': own, 'jax': 'jax' in sys.modules})
    for name in set(own) - {'debug'}:
        delattr(flags.FLAGS, name)
print(json.dumps(out, default=str))
"""


@pytest.fixture(scope='module')
def asked():
    cases = [(m, '--help') for m in COMMANDS] + [('lens.report', *a) for a in WRONG]
    run = [sys.executable, '-c', ASK, json.dumps(cases)]
    out = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return dict(zip(cases, (types.SimpleNamespace(**x) for x in json.loads(out)), strict=True))


@pytest.mark.parametrize('command', COMMANDS)
def test_help_names_the_flags_of_its_command_before_jax_is_loaded(asked, command):
    answer = asked[command, '--help']
    assert answer.code == 0 and not answer.jax
    assert len(answer.flags) > 1
    assert [
        n for n in answer.flags if f'\n  --{n}: ' not in answer.said and f'\n  --[no]{n}: ' not in answer.said
    ] == []
    assert '--alsologtostderr' not in answer.said and '--help:' not in answer.said


@pytest.mark.parametrize('arguments', WRONG)
def test_an_unknown_flag_is_answered_with_the_nearest(asked, arguments):
    assert asked['lens.report', *arguments].code == WRONG[arguments]


def test_help_of_training_says_what_keys_mean(asked):
    said = asked['lens.main', '--help'].said
    assert "--config.data.positions='any'  # tokens that may be read" in said
    assert '--config.PHASE.tau=1.0  # V, gumbel: temperature' in said
    assert '--config.lookahead.window=32  # tokens ahead' in asked['data_gen.storyworld.pretrain', '--help'].said


def test_flags_begin_with_the_settings_that_they_are_for(asked):
    from data_gen.storyworld.tiny_chat import RECIPES
    from lens.tools.tuned_lens import TunedLensSettings

    answer = asked['lens.tools.tuned_lens', '--help']
    settings = dataclasses.asdict(TunedLensSettings())
    assert {n: answer.flags[n] for n in settings} == settings
    assert f'<{"|".join(config.DTYPES)}>' in answer.said
    assert f'<{"|".join(RECIPES)}>' in asked['data_gen.storyworld.tiny_chat', '--help'].said


@pytest.mark.parametrize('recipe', ['base', 'tiny', 'gptoss'])
def test_every_key_of_a_recipe_has_a_line_with_its_meaning(recipe):
    file = f'configs/{recipe}.py'
    found, config = cli.key_lines(file), cli.load_config(file)
    names = {line.partition('=')[0].removeprefix('  --config.') for line in found}
    blocks = ('sft', 'grpo', 'gumbel')
    wanted = {f'PHASE.{k.partition(".")[2]}' if k.partition('.')[0] in blocks else k for k in cli.flat_keys(config)}
    assert names == wanted and len(found) == len(names)
    assert [line for line in found if not line.partition('  # ')[2]] == []


def test_values_of_a_recipe_stand_beside_the_meanings_of_base():
    found = cli.key_lines('configs/tiny.py:nla')
    assert '  --config.layer=3  # 0-based block whose output is read' in found
    assert any(line.startswith('  --config.PHASE.steps=600 | 450  # D') for line in found)
    assert any(line.startswith('  --config.PHASE.clip=0.2  # grpo') for line in found)  # the same in both phases


def test_keys_of_a_recipe_that_does_not_load():
    with pytest.raises(LensError, match=r'--config=configs/tiny.py:x does not load: .*not a recipe'):
        cli.key_lines('configs/tiny.py:x')


@pytest.mark.parametrize(
    'given, wanted',
    [
        (['--config=configs/tiny.py:sft', '--plan'], ['--config=HOME/configs/tiny.py:sft', '--plan']),
        (['--plan', '-config', 'configs/tiny.py'], ['--plan', '--config=HOME/configs/tiny.py']),
        (['--config=mine.py'], ['--config=mine.py']),
        (['--config=configs/mine.py:a:b'], ['--config=configs/mine.py:a:b']),
        (['--config.layer=3', '--workdir=configs/tiny.py'], ['--config.layer=3', '--workdir=configs/tiny.py']),
        (['--config'], ['--config']),
    ],
)
def test_a_shipped_recipe_is_found_from_any_folder(given, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs/mine.py').touch()
    assert cli.find_config(given) == [x.replace('HOME', str(ROOT)) for x in wanted]


def test_a_recipe_of_ones_own_starts_from_a_shipped_one_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = (
        'from lens.configs import tiny\n\n\ndef get_config():\n    c = tiny.get_config("sft")\n    c.sft.steps = 2\n'
    )
    (tmp_path / 'mine.py').write_text(f'{source}    return c\n')
    config = cli.load_config('mine.py')
    assert (config.sft.steps, config.phases, config.layer) == (2, ('sft',), 3)


@pytest.mark.parametrize('installed', [False, True])
def test_where_relative_paths_are(installed, tmp_path, monkeypatch):
    package, here, root = tmp_path / 'site/lens', tmp_path / 'here', tmp_path / 'root'
    shipped = package / 'configs' if installed else tmp_path / 'site/configs'
    for folder in (
        shipped / 'subject',
        package / 'models',
        here / 'configs',
        root / 'data',
        tmp_path / 'site/data',
        tmp_path / 'site/configs/theirs',
    ):
        folder.mkdir(parents=True)
    monkeypatch.setattr(files, '__file__', str(package / 'files.py'))
    monkeypatch.chdir(here)
    assert files.find('configs') == pathlib.Path('configs')
    assert files.find('configs/subject', root) == shipped / 'subject'
    assert files.find('data', root) == root / 'data'
    assert files.find(root / 'data') == root / 'data'
    assert files.find('configs/theirs').is_absolute() is not installed  # then it is the folder of another package
    for nowhere in ('data', 'models', 'configs/none', 'openai/gpt-oss-20b'):  # packages beside lens are not its files
        assert files.find(nowhere) == pathlib.Path(nowhere)


def test_a_wheel_puts_lens_alone_at_the_top(monkeypatch):
    monkeypatch.chdir(ROOT)
    about = Distribution({'script_name': 'setup.py'})
    about.parse_config_files(['setup.cfg'])
    build = about.get_command_obj('build_py')
    build.build_lib = 'top'
    build.ensure_finalized()
    found = {pathlib.Path(p).relative_to('top').as_posix() for p in build.get_outputs(include_bytecode=False)}
    wanted = {'lens/py.typed'}
    for folder, inside in FOLDERS.items():
        sources = (p for p in (ROOT / folder).rglob('*') if p.is_file() and '__pycache__' not in p.parts)
        wanted |= {f'{inside}/{p.relative_to(ROOT / folder).as_posix()}' for p in sources}
    assert found == wanted
    assert about.get_version() == lens.__version__
    for script in about.entry_points['console_scripts']:
        module, _, function = script.partition(' = ')[2].partition(':')
        assert callable(getattr(importlib.import_module(module), function)), script


def test_a_checkout_has_the_names_of_an_installation():
    from configs import tiny
    from data_gen import arrays

    for here, installed in ((tiny, 'lens.configs.tiny'), (arrays, 'lens.data_gen.arrays')):
        assert importlib.import_module(installed).__file__ == here.__file__
    assert importlib.import_module('lens.configs.tiny').get_config() == tiny.get_config()


class Tied(nnx.Module):
    def __init__(self):
        self.a = nnx.Param(jnp.ones(3))
        self.b = self.a


def test_importing_lens_leaves_flax_as_it_is():
    with nnx.set_graph_mode(True):
        before = len(jax.tree.leaves(nnx.split(Tied())[1]))
        importlib.reload(lens)
        assert len(jax.tree.leaves(nnx.split(Tied())[1])) == before == 1  # shared as in graphs, not twice as in trees


@pytest.mark.parametrize('graph', [False, True])
def test_models_are_plain_trees_whatever_mode_others_chose(graph, tokens):
    with nnx.set_graph_mode(graph):
        model = jax.eval_shape(lambda: Transformer(TINY, rngs=nnx.Rngs(0)))
        gradient = jax.eval_shape(jax.grad(lambda m: m(tokens).sum()), model)
    assert jax.tree.structure(gradient) == jax.tree.structure(model)
    assert len(jax.tree.leaves(model)) > 10


@pytest.mark.slow
def test_an_installation_works_in_an_empty_folder(tmp_path):
    source, site, here = tmp_path / 'source', tmp_path / 'site', tmp_path / 'here'
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    here.mkdir()
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation', '--no-index']
    subprocess.run([*pip, f'--target={site}', source], check=True, cwd=here)
    assert [p.name for p in site.iterdir() if p.suffix != '.dist-info' and p.name != 'bin'] == ['lens']

    def command(*arguments):
        path = f'import sys; sys.path[:1] = [{str(site)!r}]; sys.argv = {list(arguments)}'
        run = [
            sys.executable,
            '-c',
            f'{path}; import runpy; runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)',
        ]
        return subprocess.run(run, capture_output=True, text=True, check=True, cwd=here).stdout

    assert 'Arrays written' in command('lens.data_gen.storyworld', '--train=8', '--validation=4')
    assert "subject.path='configs/tiny_subject'" in command('lens.main', '--config=configs/tiny.py', '--help')


def test_what_orbax_gave_up_is_not_told_by_tracebacks():
    told = []
    for e in (RuntimeError('Event loop is closed'), RuntimeError('another')):
        cli._tell_unraisable(told.append, types.SimpleNamespace(exc_value=e))
    assert [str(x.exc_value) for x in told] == ['another']


@pytest.mark.parametrize('told', [{}, *({key: '.5'} for key in cli.MEMORY_KEYS)])
def test_a_command_takes_most_of_a_gpu_unless_told_how_much(monkeypatch, told):
    """What jaxlib hands to its client; it raises where both keys are set."""
    monkeypatch.setattr(cli, 'run', lambda *_: None)
    monkeypatch.setattr(cli.os, 'environ', dict(told))
    cli.start('lens.main')
    handed = xla_client.generate_pjrt_gpu_plugin_options()
    assert handed['memory_fraction'] == float(told.popitem()[1] if told else cli.MEMORY_FRACTION)
