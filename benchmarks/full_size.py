"""The programs that a run spends its time in, at full size: sampling, reading and steps of the recipes, traced on shapes."""

import dataclasses
import functools
import importlib
import math
import pathlib
import re
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import flops, sharding
from lens.models.transformer import TransformerConfig
from lens.rollout import read
from lens.tools import plan
from lens.train import results, trace

MODELS = pathlib.Path(__file__).parent.parent / 'tests/hf_configs'
# recipe, NAME or NAME:ARGUMENT -> tokens of a row of its data
RECIPES = {
    'gptoss': 4096,
    'gptoss:gumbel': 4096,
    'gptoss:120b': 4096,
    'gemma3_27b': 1024,
    'gemma2_9b': 1024,
    'qwen2_5_14b': 1024,
    'qwen2_5_7b': 1024,
    'nla_qwen2_5_7b': 2048,
    'nla_qwen2_5_7b:full': 2048,
    'gpt2': 128,
    'simplestories': 64,
}
# --size=tiny: every dimension differs.
SMALL = {'d_model': 64, 'd_ff': 96, 'n_layers': 3, 'n_heads': 4, 'n_kv_heads': 2, 'head_dim': 8, 'vocab_size': 1000}
SMALL_EXPERTS = {'n_experts': 5, 'top_k': 2}
SMALL_VALUES = {'layer': 1, 'explanation_len': 12, 'lora.rank': 10, 'decoder.patched_blocks': 2}
SMALL_BATCH = (2, 3, 2)
SMALL_LEN = 48


class Part(NamedTuple):
    """One piece of work. work: sample | read | step, of a phase of a recipe whose dotted keys have other values.

    batch: documents, vectors and group of the phase; tokens: of a document; tiny: of a model that is made up.
    """

    name: str
    recipe: str
    model: str
    work: str
    phase: str
    batch: dict[str, int]
    tokens: int
    values: Mapping[str, object] = MappingProxyType({})
    tiny: bool = False

    @property
    def explanations(self) -> int:
        """Returns how many it works on, 0 where it only reads."""
        return 0 if self.work == 'read' else math.prod(self.batch.values())


class Program(NamedTuple):
    """args: shapes with placements, and numbers. carries: its first result is its first argument next time."""

    traced: jax.stages.Traced
    args: tuple
    carries: bool = False


def batch(documents: int, vectors: int, group: int = 1) -> dict[str, int]:
    return {'documents': documents, 'vectors': vectors, 'group': group}


NLA, QWEN = ('nla_qwen2_5_7b', 'Qwen2.5-7B-Instruct'), ('qwen2_5_7b', 'Qwen2.5-7B-Instruct')
GPT_OSS, LLAMA = ('gptoss', 'gpt-oss-20b'), ('qwen2_5_7b', 'Llama-3.1-8B-Instruct')
PARTS = {
    p.name: p
    for p in (
        Part('qwen_sample', *NLA, 'sample', 'grpo', batch(8, 4, 8), 2048),
        Part('qwen_sample_maps', *QWEN, 'sample', 'grpo', batch(32, 1, 8), 1024, {'explanation_len': 150}),
        Part('qwen_read', *NLA, 'read', 'sft', batch(4, 8), 4096),
        Part('qwen_sft', *NLA, 'step', 'sft', batch(8, 8), 2048, {'sft.slices': 2}),
        Part('qwen_grpo', *NLA, 'step', 'grpo', batch(16, 4, 8), 2048, {'grpo.slices': 8}),
        Part('gptoss_sample', *GPT_OSS, 'sample', 'grpo', batch(16, 2, 8), 4096, {'explanation_len': 64}),
        Part('gptoss_read', *GPT_OSS, 'read', 'sft', batch(2, 10), 4096),
        Part('gptoss_sft', *GPT_OSS, 'step', 'sft', batch(3, 10), 4096),
        Part('llama_sample', *LLAMA, 'sample', 'grpo', batch(32, 1, 8), 1024, {'explanation_len': 150}),
        Part('llama_sft', *LLAMA, 'step', 'sft', batch(32, 8), 1024),
    )
}


def small(part: Part) -> Part:
    """Returns a part that any machine runs in seconds."""
    sizes = batch(*map(min, part.batch.values(), SMALL_BATCH))
    return part._replace(batch=sizes, tokens=SMALL_LEN, values=SMALL_VALUES | {f'{part.phase}.slices': 1}, tiny=True)


def open_recipe(recipe: str, model: str = '', values: Mapping[str, object] = MappingProxyType({}), tokens: int = 0):
    """Returns (configuration, job) of 'name' or 'name:argument', as it is but for `values` of dotted keys, the model and the
    tokens of a document that are given."""
    name, _, argument = recipe.partition(':')
    cfg = importlib.import_module(f'configs.{name}').get_config(argument)
    cfg.update_from_flattened_dict(dict(values))
    model = (model or cfg.subject.path.rpartition('/')[2]).lower()
    cfg.subject.path, cfg.data.path = str(next(f for f in MODELS.glob('*.json') if f.stem.lower() == model)), 'absent'
    return cfg, plan.open_job(cfg)[0]._replace(seq_len=tokens or RECIPES[recipe])


def open_part(part: Part):
    """Returns (configuration, job) of a part: one optimizer step a micro-step, one device where it does not say more."""
    values = {'mesh.data': 1, 'mesh.model': 1, f'{part.phase}.accumulate': 1} | part.values
    values |= {f'{part.phase}.{k}': n for k, n in part.batch.items()}
    cfg, job = open_recipe(f'{part.recipe}:{part.phase}', part.model, values, part.tokens)
    return cfg, job._replace(c=shrunk(job.c, **SMALL)) if part.tiny else job


def shrunk(c: TransformerConfig, **sizes) -> TransformerConfig:
    """Returns the same kind of model in other sizes, of experts a few where it has some."""
    return dataclasses.replace(c, **sizes, **(SMALL_EXPERTS if c.n_experts else {}))


def programs(part: Part, cfg, job, mesh) -> list[Program]:
    """Traces what a part runs, in its order. Call under jax.set_mesh(mesh)."""
    ((phase, state, base, batch),) = plan.steps(cfg, job, mesh)
    key = jax.eval_shape(jax.random.key, 0)
    if part.work == 'step':
        reading, step = trace(phase, state, base, batch, key)
        args = state, base, results(reading), key, phase.knobs(0)
        return [Program(reading, (base, batch)), Program(step, args, carries=True)]
    reading = read.trace(base, batch, **phase.reading)
    if part.work == 'read':
        return [Program(reading, (base, batch))]
    args = state.params, base, results(reading), key
    return [Program(jax.jit(lambda *args: phase.objective.rollout(*args, phase.hparams)).trace(*args), args)]


def model_flops(traced: list[Program], c: TransformerConfig) -> float:
    """Returns what utilisation is measured with: the products that the mathematics needs, but those of sampling."""
    return sum(flops.bound_by_compute(p.traced.jaxpr, c) for p in traced)


def memory(compiled: jax.stages.Compiled) -> int:
    """Returns bytes of a device that a program needs: arguments, results and temporaries, what is donated once."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def keep(text: str, folder: str, name: str) -> None:
    """Writes the text of a compiled program into a folder, which is made where it is not there."""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    pathlib.Path(folder, f'{name}.txt').write_text(text)


@functools.cache
def _filler(shape, dtype, place, norm: bool):
    def make(key):
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(key, shape, 0, SMALL_LEN // 2).astype(dtype)
        if len(shape) < 3 or norm:
            return norm + 0.02 * jax.random.normal(key, shape, dtype)
        # a layer at a time: the random bits of a stack would not fit
        return jax.lax.map(lambda k: 0.02 * jax.random.normal(k, shape[1:], dtype), jax.random.split(key, shape[0]))

    return jax.jit(make, out_shardings=place)


def fill(tree):
    """Makes arrays of shapes on their devices: weights and activations random, norms about 1, ids below SMALL_LEN / 2; keys
    and what is an array already as they are. Call without a mesh."""

    def leaf(path, x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        name = sharding.path(path)
        if re.search(r'(^|/)(opt|step|count)\b', name):
            return jnp.zeros(x.shape, x.dtype, device=x.sharding)
        key = jax.random.key(zlib.crc32(name.encode()))
        return _filler(x.shape, x.dtype, x.sharding, 'norm' in name)(key)

    return jax.tree_util.tree_map_with_path(leaf, tree)
