"""The five layers of the package, read from the imports of every file, and what nobody may use."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From top to bottom. A module imports its own layer and those below, never above, and nothing in a circle.
LAYERS = {
    'commands': 'commands main tools export explain serve web api schemas',
    'a run': 'train config checks keys places checkpoint reopen lens_init logger collapse evaluate texts study batches report reader steer '
    'interchange prompted',
    'objectives': 'objectives rollout gumbel sampling flops instrument',
    'models': 'models hf tensor_files lens_folder translators',
    'ground': 'response joints losses policy draws data feed optimizer schedules sharding distributed signals metrics truth words charts files cli errors '
    'spoken reading page jobs plots widths',
}
LEVEL = {name: level for level, names in enumerate(LAYERS.values()) for name in names.split()}
KNOW_NO_MODEL = ('data', 'feed', 'optimizer', 'schedules', 'metrics', 'truth', 'words', 'files', 'widths')
# package -> who may import it
ONLY = {
    'transformers': ('lens.hf', 'data_gen'),
    'safetensors': ('lens.tensor_files', 'data_gen'),
    'tokenizers': ('lens.hf', 'data_gen'),
    'orbax': ('lens.checkpoint',),
    'yaml': ('lens.interchange', 'data_gen'),
    'grain': ('lens.feed',),
    'pydantic': ('lens.schemas', 'lens.web'),
    'starlette': ('lens.web',),
    'uvicorn': ('lens.serve',),
    'absl': ('lens.cli', 'lens.commands', 'data_gen'),  # who imports lens gets no flags
}
BANNED = ('vllm', 'torch', 'clu', 'pickle', 'dill', 'cloudpickle', 'tests', 'benchmarks')
EXAMPLES = ('lens.card_code', 'lens.card_nla')  # code that a card shows, run by those who read it


def imports(module: str, tree: ast.Module) -> dict[str, bool]:
    """Dotted name -> whether it is imported relatively; also of imports inside functions, not of what a file does as a
    command."""
    out = {}
    as_command = [x for x in tree.body if isinstance(x, ast.If) and ast.unparse(x.test) == "__name__ == '__main__'"]
    for node in (x for statement in tree.body if statement not in as_command for x in ast.walk(statement)):
        if isinstance(node, ast.Import):
            out |= {a.name: False for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split('.')[: -node.level] if node.level else []
            out |= {'.'.join(filter(None, [*above, node.module, a.name])): node.level > 0 for a in node.names}
    return out


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + '.')


def part(name: str) -> str:
    """'models' for lens.models.decoder: what stands in LAYERS."""
    return name.split('.')[1] if '.' in name else ''


def problems(module: str, source: str) -> list[str]:
    """Every violation of a source file as a sentence."""
    tree, mine, out = ast.parse(source), part(module), []
    for name, relative in imports(module, tree).items():
        top, theirs = name.split('.')[0], part(name)
        if relative != (top == 'data_gen'):
            out.append(
                f'{module} imports {name}: data_gen, which is lens.data_gen where it is installed, imports itself '
                'relatively, and nothing else does'
            )
        if top in BANNED and not inside(module, top):
            out.append(f'{module} imports {name}')
        if top in ONLY and not any(inside(module, who) for who in ONLY[top]):
            out.append(f'{module} imports {name}: only {", ".join(ONLY[top])} may')
        if inside(module, 'configs') and not (top == 'ml_collections' or inside(name, 'lens.configs')):
            out.append(f'{module} imports {name}: configs import only ml_collections and lens.configs')
        if inside(module, 'lens') and top == 'data_gen':
            out.append(f'{module} imports {name}')
        if top != 'lens' or not inside(module, 'lens') or theirs not in LEVEL or not mine:
            continue
        if LEVEL[theirs] < LEVEL[mine]:
            out.append(f'{module} imports {name}, which is above it')
        if mine in KNOW_NO_MODEL and LEVEL[theirs] < LEVEL['files']:
            out.append(f'{module} imports {name}: it knows no model')
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            'nnx.jit',
            'nnx.grad',
            'nnx.scan',
            'nnx.set_graph_mode',
        ):
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
    names = {m: imports(m, ast.parse(s)) for m, s in found.items()}
    graph = {m: {n for x in names[m] for n in (x, x.rpartition('.')[0]) if n in found and n != m} for m in found}
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
        ('configs.tiny', 'from configs import base'),
        ('data_gen.label', 'from data_gen import servers'),
        ('data_gen.storyworld.probe', 'def f():\n    import data_gen.arrays'),
        ('lens.evaluate', 'from . import data'),
        ('lens.evaluate', 'from absl import flags'),
        ('lens.train', 'from data_gen import storyworld'),
        ('lens.train', 'from flax import nnx\n@nnx.jit\ndef f(x): return x'),
        ('lens.data', 'import numpy as np\nnp.load("x", allow_pickle=True)'),
        ('lens.hf', 'f(x, trust_remote_code=True)'),
    ],
)
def test_the_checker_finds(module, source):
    assert problems(module, source)


def test_the_listing_has_a_phrase_for_every_file():
    listing = (ROOT / 'README.md').read_text('utf-8').split('```text\nlens/ ')[1].split('```')[0]
    files = {
        p.name
        for folder in ('lens', 'data_gen')
        for p in (ROOT / folder).rglob('*.*')
        if p.suffix != '.pyc' and p.stat().st_size
    }
    assert {f for f in files if not f.startswith('__') and f not in listing} == set()
