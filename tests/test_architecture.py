"""The five layers of the package, read from the imports of every file, and what nobody may use."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From top to bottom. A module imports its own layer and those below, never above, and nothing in a circle.
LAYERS = {
    'commands': 'main tools export',
    'a run': 'train config checkpoint lens_init logger collapse evaluate report',
    'objectives': 'objectives gumbel sampling flops',
    'models': 'models hf lens_folder translators',
    'ground': 'response losses data optimizer schedules sharding distributed metrics charts files cli errors',
}
LEVEL = {name: level for level, names in enumerate(LAYERS.values()) for name in names.split()}
KNOW_NO_MODEL = ('data', 'optimizer', 'schedules', 'metrics', 'files')
# package -> who may import it
ONLY = {
    'transformers': ('lens.hf', 'data_gen'),
    'safetensors': ('lens.hf', 'data_gen'),
    'tokenizers': ('lens.hf', 'data_gen'),
    'orbax': ('lens.checkpoint',),
    'grain': ('lens.data',),
}
BANNED = ('vllm', 'torch', 'clu', 'pickle', 'dill', 'cloudpickle', 'tests', 'benchmarks')
EXAMPLES = ('lens.card_code',)  # code that a card shows, run by those who read it


def imports(tree: ast.AST) -> set[str]:
    """Dotted names, also of imports inside functions; the project imports absolutely."""
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, 'relative import'
            out |= {f'{node.module}.{a.name}' for a in node.names}
    return out


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + '.')


def part(name: str) -> str:
    """'models' for lens.models.decoder: what stands in LAYERS."""
    return name.split('.')[1] if '.' in name else ''


def problems(module: str, source: str) -> list[str]:
    """Every violation of a source file as a sentence."""
    tree, mine, out = ast.parse(source), part(module), []
    for name in imports(tree):
        top, theirs = name.split('.')[0], part(name)
        if top in BANNED and not inside(module, top):
            out.append(f'{module} imports {name}')
        if top in ONLY and not any(inside(module, who) for who in ONLY[top]):
            out.append(f'{module} imports {name}: only {", ".join(ONLY[top])} may')
        if inside(module, 'configs') and top not in ('ml_collections', 'configs'):
            out.append(f'{module} imports {name}: configs import only ml_collections')
        if inside(module, 'lens') and top == 'data_gen':
            out.append(f'{module} imports {name}')
        if top != 'lens' or not inside(module, 'lens') or theirs not in LEVEL or not mine:
            continue
        if LEVEL[theirs] < LEVEL[mine]:
            out.append(f'{module} imports {name}, which is above it')
        if mine in KNOW_NO_MODEL and LEVEL[theirs] < LEVEL['files']:
            out.append(f'{module} imports {name}: it knows no model')
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ('nnx.jit', 'nnx.grad', 'nnx.scan'):
            out.append(f'{module} uses {ast.unparse(node)}: plain jax everywhere')
        runs_code = isinstance(node, ast.keyword) and node.arg in ('allow_pickle', 'trust_remote_code')
        if runs_code and getattr(node.value, 'value', None) is not False:
            out.append(f'{module} runs code of files')
    return out


def modules() -> dict[str, str]:
    """Dotted name -> source."""
    out = {}
    for folder in ('lens', 'configs', 'data_gen'):
        for path in sorted((ROOT / folder).rglob('*.py')):
            parts = path.relative_to(ROOT).with_suffix('').parts
            out['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path.read_text('utf-8')
    return {k: v for k, v in out.items() if k not in EXAMPLES}


@pytest.mark.parametrize('module', modules())
def test_layers(module):
    assert problems(module, modules()[module]) == []
    assert not inside(module, 'lens') or part(module) in LEVEL or module == 'lens', f'{module} has no place in LAYERS'


def test_nothing_imports_in_a_circle():
    found = modules()
    graph = {
        m: {n for n in (*imports(ast.parse(s)), *(x.rpartition('.')[0] for x in imports(ast.parse(s)))) if n in found}
        - {m}
        for m, s in found.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_every_layer_names_what_exists():
    assert [n for n in LEVEL if not list((ROOT / 'lens').glob(f'{n}*'))] == []


@pytest.mark.parametrize(
    ('module', 'source'),
    [
        ('lens.losses', 'from lens import data, train'),
        ('lens.models.subject', 'import lens.train'),
        ('lens.objectives', 'from lens.config import Phase'),
        ('lens.evaluate', 'def f():\n    from lens import main'),
        ('lens.train', 'from lens.tools import plan'),
        ('lens.data', 'from lens.models import subject'),
        ('lens.train', 'import transformers'),
        ('lens.train', 'import orbax.checkpoint as ocp'),
        ('data_gen.generate', 'import vllm'),
        ('lens.hf', 'import torch.nn'),
        ('configs.tiny', 'from lens import losses'),
        ('lens.train', 'from data_gen import storyworld'),
        ('lens.train', 'from flax import nnx\n@nnx.jit\ndef f(x): return x'),
        ('lens.data', 'import numpy as np\nnp.load("x", allow_pickle=True)'),
        ('lens.hf', 'f(x, trust_remote_code=True)'),
    ],
)
def test_the_checker_finds(module, source):
    assert problems(module, source)


@pytest.mark.parametrize('page', ['README.md', 'BUILD_NOTES.md'])
def test_the_listing_has_a_phrase_for_every_file(page):
    listing = (ROOT / page).read_text('utf-8').split('```text\nlens/ ')[1].split('```')[0]
    files = {p.name for folder in ('lens', 'data_gen') for p in (ROOT / folder).rglob('*.*') if p.suffix != '.pyc'}
    assert {f for f in files if not f.startswith('__') and f not in listing} == set()
