"""The dependency direction of DESIGN.md section 3, read from the imports of every file."""

import ast
import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A module of lens may import modules of a lower level only. A module that is not here fails: place it.
LEVELS = {
    'lens': 0,
    'lens.errors': 0,
    'lens.cli': 1,
    'lens.losses': 1,
    'lens.sharding': 1,
    'lens.charts': 1,
    'lens.tools.hlo': 1,
    'lens.schedules': 3,  # its command reads data
    'lens.statistics': 1,
    'lens.extraction': 1,
    'lens.data': 2,
    'lens.checkpoint': 2,
    'lens.optimizer': 4,
    'lens.metrics': 2,
    'lens.health': 2,
    'lens.models': 2,
    'lens.models.lora': 2,
    'lens.models.rope': 2,
    'lens.models.norm': 2,
    'lens.models.mxfp4': 2,
    'lens.models.injection': 2,
    'lens.models.attention': 3,
    'lens.models.moe': 3,
    'lens.models.transformer': 4,
    'lens.models.tensors': 5,
    'lens.models.families': 6,
    'lens.models.subject': 5,
    'lens.models.decoder': 6,
    'lens.models.encoder': 6,
    'lens.models.lens': 7,
    'lens.prompts': 8,
    'lens.hf': 8,
    'lens.sampling': 8,
    'lens.gumbel': 8.5,  # above sampling, below objectives
    'lens.objectives': 9,
    'lens.lens_folder': 9,
    'lens.translators': 9,
    'lens.distributed': 1,
    'lens.resume': 12,
    'lens.record': 12,
    'lens.timing': 10,  # train calls it and gives it the step
    'lens.checks': 9.5,
    'lens.build': 10,
    'lens.tools.flops': 11,
    'lens.state': 11,
    'lens.tools.plan': 14,
    'lens.tools.plan_text': 15,
    'lens.tools.plan_command': 16,
    'lens.report': 10,  # of files alone; evaluate writes it anew
    'lens.evaluate': 12,
    'lens.export': 13,
    'lens.explain': 13,
    'lens.serve': 14,
    'lens.train': 13,
    'data_gen.storyworld.pretrain': 13,
    'data_gen.storyworld.probe': 13,
    'lens.tools.tuned_lens': 13,
    'lens.main': 17,
}
NOBODY_IMPORTS = ('lens.main', 'data_gen.storyworld.probe', 'lens.serve', 'lens.tools.tuned_lens')
KNOW_NO_MODEL = ('lens.data', 'lens.checkpoint', 'lens.optimizer', 'lens.schedules', 'lens.metrics', 'lens.health')
MODEL_SIDE = ('lens.models', 'lens.hf', 'lens.sampling', 'lens.gumbel', 'lens.objectives')
# package -> who may import it; data_gen as a whole where named
ONLY = {
    'transformers': ('lens.hf', 'data_gen'),
    'safetensors': ('lens.hf', 'data_gen'),
    'tokenizers': ('lens.hf', 'data_gen'),
    'orbax': ('lens.checkpoint',),
    'grain': ('lens.data',),
}
BANNED_PACKAGES = ('vllm', 'torch', 'clu', 'pickle', 'cPickle', '_pickle', 'dill', 'cloudpickle')
BANNED_NNX = ('jit', 'grad', 'scan')


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + '.')


def imports(module: str, tree: ast.AST, is_package: bool = False) -> list[str]:
    """Dotted names that the source imports, also inside functions, relatively, or by a call.

    `from a import b` gives a.b: it may be a module. Names that are none are cut by `resolve`.
    """
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ''
            if node.level:
                parts = module.split('.')
                parts = parts[: len(parts) - node.level + is_package]
                source = '.'.join([*parts, source] if source else parts)
            out += [f'{source}.{a.name}' for a in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            if name in ('import_module', '__import__') and isinstance(node.args[0].value, str):
                out.append(node.args[0].value)
    return out


def resolve(name: str) -> str:
    """'lens.build.Phase' -> 'lens.build': the longest known prefix that is a module of lens."""
    parts = name.split('.')
    for n in range(len(parts), 1, -1):
        if '.'.join(parts[:n]) in LEVELS:
            return '.'.join(parts[:n])
    # `from lens import new` of a module that LEVELS lacks stays visible; __version__ and the like do not
    return name if len(parts) > 1 and (ROOT / 'lens' / f'{parts[1]}.py').exists() else parts[0]


def import_problems(module: str, names: list[str]) -> list[str]:
    out = []
    for name in names:
        top = name.split('.')[0]
        if top in BANNED_PACKAGES:
            out.append(f'{module} imports {name}')
        if top in ONLY and not any(inside(module, who) for who in ONLY[top]):
            out.append(f'{module} imports {name}: only {", ".join(ONLY[top])} may')
        if inside(module, 'configs') and top not in ('ml_collections', 'configs'):
            out.append(f'{module} imports {name}: configs import only ml_collections')
        if inside(module, 'lens') and top in ('data_gen', 'tests', 'benchmarks'):
            out.append(f'{module} imports {name}')
        if top != 'lens':
            continue
        target = resolve(name)
        if target in NOBODY_IMPORTS:
            out.append(f'{module} imports {target}: nobody does')
        if module in KNOW_NO_MODEL and any(inside(target, m) for m in MODEL_SIDE):
            out.append(f'{module} imports {target}: it knows no model')
        if inside(module, 'lens') and target != 'lens':
            if target not in LEVELS:
                out.append(f'{module} imports {target}, which has no place in LEVELS')
            elif LEVELS.get(target, 0) >= LEVELS.get(module, 99):
                out.append(f'{module} imports {target}, which is not below it')
    return out


def use_problems(module: str, tree: ast.AST) -> list[str]:
    """nnx transforms, pickles and remote code, by attribute, name, keyword or string."""
    out = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in BANNED_NNX
            and ast.unparse(node.value) in ('nnx', 'flax.nnx')
        ):
            out.append(f'{module} uses nnx.{node.attr}: plain jax.{node.attr} or lax everywhere')
        if isinstance(node, ast.ImportFrom) and node.module == 'flax.nnx':
            out += [f'{module} uses nnx.{a.name}' for a in node.names if a.name in BANNED_NNX]
        if (
            isinstance(node, ast.keyword)
            and node.arg == 'allow_pickle'
            and getattr(node.value, 'value', None) is not False
        ):
            out.append(f'{module} allows pickles')
        if (isinstance(node, ast.keyword) and node.arg == 'trust_remote_code') or (
            isinstance(node, ast.Constant) and node.value in ('trust_remote_code', 'allow_pickle')
        ):
            out.append(f'{module} uses trust_remote_code or allow_pickle')
    return out


def problems(module: str, source: str, is_package: bool = False) -> list[str]:
    """Every violation of a source file as a sentence."""
    tree = ast.parse(source)
    placed = [] if module in LEVELS or not inside(module, 'lens') else [f'{module} has no place in LEVELS']
    return placed + import_problems(module, imports(module, tree, is_package)) + use_problems(module, tree)


def files():
    for folder in ('lens', 'configs', 'data_gen'):
        for path in sorted((ROOT / folder).rglob('*.py')):
            parts = path.relative_to(ROOT).with_suffix('').parts
            package = parts[-1] == '__init__'
            yield pytest.param(
                '.'.join(parts[:-1] if package else parts), path, package, id=str(path.relative_to(ROOT))
            )


@pytest.mark.parametrize(('module', 'path', 'package'), list(files()))
def test_dependency_direction(module, path, package):
    assert problems(module, path.read_text('utf-8'), package) == []


def test_the_design_names_what_is_below_what():
    """main → train → {objectives, evaluate} → {sampling, models.*} → {losses, sharding}."""
    order = (
        'lens.main',
        'lens.train',
        'lens.evaluate',
        'lens.objectives',
        'lens.sampling',
        'lens.models.lens',
        'lens.losses',
    )
    assert [LEVELS[m] for m in order] == sorted({LEVELS[m] for m in order}, reverse=True)
    assert LEVELS['lens.hf'] > LEVELS['lens.models.lens'] and LEVELS['lens.sharding'] == LEVELS['lens.losses']


@pytest.mark.parametrize(
    ('module', 'source'),
    [
        ('lens.losses', 'from lens import data'),
        ('lens.models.subject', 'import lens.train'),
        ('lens.models.subject', 'from lens.hf import load_model as f'),
        ('lens.objectives', 'from lens.build import Phase'),
        ('lens.evaluate', 'def f():\n    from lens import train'),
        ('lens.report', 'from lens import evaluate'),
        ('lens.sampling', 'from . import evaluate'),
        ('lens.models.lora', 'from .decoder import Decoder'),
        ('lens.models.lora', 'from ..hf import load_model'),
        ('lens.hf', 'import importlib\nimportlib.import_module("lens.train")'),
        ('lens.train', 'from lens import pretrain'),
        ('lens.main', 'from lens.probe import main'),
        ('lens.data', 'from lens.models import subject'),
        ('lens.checkpoint', 'from lens import hf'),
        ('lens.optimizer', 'import lens.models.lens'),
        ('lens.metrics', 'from lens.sampling import sample'),
        ('lens.brand_new', 'import jax'),
        ('lens.train', 'import transformers'),
        ('lens.train', 'def f():\n    from safetensors.flax import save_file'),
        ('lens.train', 'import orbax.checkpoint as ocp'),
        ('lens.hf', 'from orbax.checkpoint import v1'),
        ('lens.train', 'if True:\n    import grain.python'),
        ('data_gen.generate', 'import vllm'),
        ('data_gen.generate', 'import grain'),
        ('lens.hf', 'import torch.nn'),
        ('lens.train', 'from clu import metric_writers'),
        ('lens.train', '__import__("pickle")'),
        ('configs.tiny', 'import jax'),
        ('configs.tiny', 'from lens import losses'),
        ('lens.train', 'from data_gen import storyworld'),
        ('lens.train', 'from flax import nnx\n@nnx.jit\ndef f(x): return x'),
        ('lens.train', 'import flax\ng = flax.nnx.grad(f)'),
        ('lens.train', 'from flax.nnx import scan'),
        ('lens.data', 'import numpy as np\nnp.load("x", allow_pickle=True)'),
        ('lens.hf', 'f(x, trust_remote_code=True)'),
        ('lens.hf', 'f(x, **{"trust_remote_code": True})'),
    ],
)
def test_the_checker_finds(module, source):
    assert problems(module, source)


@pytest.mark.parametrize(
    ('module', 'source'),
    [
        (
            'lens.train',
            'from lens import __version__, build, data\nfrom lens.build import Phase\nfrom lens.models.lens import Lens',
        ),
        (
            'lens.models.decoder',
            'from lens import losses, sharding\nfrom lens.models import lora\nfrom .subject import overwrite',
        ),
        ('lens.hf', 'import safetensors\ndef f():\n    from transformers import AutoTokenizer'),
        ('lens.data', 'import grain, numpy as np\nnp.load("x", allow_pickle=False)'),
        ('lens.checkpoint', 'from orbax.checkpoint import v1 as ocp'),
        ('lens.models.attention', 'import jax\nfrom flax import nnx\nnnx.Param(0)\njax.lax.scan(f, 0, x)\njax.jit(f)'),
        ('data_gen.extract', 'import transformers\nfrom lens import hf'),
        ('configs.tiny', 'import ml_collections\nfrom configs import base'),
    ],
)
def test_the_checker_lets_pass(module, source):
    assert problems(module, source) == []


def test_every_level_that_exists_is_a_module():
    planned = {'lens.explain', 'lens.serve'}  # DESIGN.md, not yet written
    assert {m for m in LEVELS.keys() - planned if importlib.util.find_spec(m) is None} == set()
