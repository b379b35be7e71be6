"""Every recipe's train step at full size, as shapes on eight fake devices: no recipe may rot."""

import importlib
import json
import pathlib
import re

import jax
import pytest

from lens import sharding
from lens.models import families
from lens.models.decoder import Prompt
from lens.plan import abstract_base, per_device, plan

MODELS = pathlib.Path(__file__).parent / 'hf_configs'
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
    'gpt2': (0.1244, 128),
    'simplestories': (None, 64),
}
H100_BYTES = 80e9
GB = 1e9


def open_recipe(recipe):
    """(configuration, TransformerConfig, mesh) of 'name' or 'name:argument'."""
    name, _, argument = recipe.partition(':')
    cfg = importlib.import_module(f'configs.{name}').get_config(argument)
    file = next(f for f in MODELS.glob('*.json') if f.stem.lower() == cfg.subject.path.rpartition('/')[2].lower())
    return cfg, families.from_hf(json.loads(file.read_text())), sharding.make_mesh(cfg.mesh.data, cfg.mesh.model)


def prompt_ids(text, mark):
    """As many ids as the text has words, signs and special tokens, without any tokenizer."""
    return tuple([1] * len(re.findall(r'<[^>]+>|\w+|[^\w\s]', part)) for part in text.rsplit(mark, 1))


def needs(cfg, c, mesh, seq_len):
    prompts = Prompt(*prompt_ids(cfg.decoder.prompt, '<embed>')), prompt_ids(cfg.encoder.prompt, '<text>')
    return plan(cfg, c, mesh, prompts, seq_len)


def test_every_recipe_is_here():
    here = {r.partition(':')[0] for r in RECIPES}
    files = {p.stem for p in (MODELS.parent.parent / 'configs').glob('*.py')}
    assert here == files - {'__init__', 'base', 'tiny', 'tiny_subject'}


@pytest.mark.parametrize('recipe', RECIPES)
def test_train_step_at_full_size(recipe):
    cfg, c, mesh = open_recipe(recipe)
    billions, seq_len = RECIPES[recipe]
    for phase, n in needs(cfg, c, mesh, seq_len).items():
        parts = f'base {n.base / GB:.2f}, trainable {n.trainable / GB:.2f}, optimizer {n.optimizer / GB:.2f}'
        print(
            f'{recipe} {phase} on {mesh.shape["data"]}x{mesh.shape["model"]}, GB a device: {parts}, cache {n.cache / GB:.2f}'
        )
        assert n.optimizer >= 2 * n.trainable > 0  # two moments
        assert (n.cache > 0) == (phase != 'sft')
        assert n.base + n.trainable + n.optimizer + n.cache < H100_BYTES
    whole = per_device(abstract_base(cfg, c, sharding.make_mesh(1, 1)))
    if billions:
        assert whole / {'bfloat16': 2, 'float32': 4}[cfg.subject.dtype] == pytest.approx(billions * 1e9, rel=1e-3)


def test_tensor_parallel_splits_the_base():
    """The alternative of the docstring: eight-way tensor parallel holds an eighth, but for replicated vectors."""
    cfg, c, _ = open_recipe('gptoss')
    cfg.mesh.data, cfg.mesh.model = 1, 8
    cfg.phases = ('sft',)
    mesh = sharding.make_mesh(1, 8)
    whole = per_device(abstract_base(cfg, c, sharding.make_mesh(8, 1)))
    assert needs(cfg, c, mesh, 4096)['sft'].base == pytest.approx(whole / 8, rel=0.001)


def test_packed_experts_save_what_the_notes_say():
    """gpt-oss-20b: 41.8 GB in bfloat16, 13.8 as shipped."""
    cfg, c, mesh = open_recipe('gptoss')
    cfg.phases = ('sft',)
    assert per_device(abstract_base(cfg, c, mesh)) == pytest.approx(41.8e9, rel=0.002)
    cfg.subject.packed = True
    assert needs(cfg, c, mesh, 4096)['sft'].base == pytest.approx(13.8e9, rel=0.005)


def test_a_step_that_cannot_run_raises():
    cfg, c, mesh = open_recipe('gpt2')
    cfg.layer = c.n_layers
    with pytest.raises(ValueError, match=r'are not all in 0\.\.11'):
        needs(cfg, c, mesh, 128)


def test_nothing_is_allocated():
    before = len(jax.live_arrays())
    cfg, c, mesh = open_recipe('qwen2_5_7b')
    needs(cfg, c, mesh, 256)
    assert sum(x.nbytes for x in jax.live_arrays()[before:]) < 1e6
