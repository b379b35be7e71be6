"""What loading costs the host: a synthetic checkpoint of 500 MB, measured in a process of its own."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

D, F, LAYERS, V = 1024, 4096, 14, 4096
SHAPES = {
    'input_layernorm': (D,),
    'post_attention_layernorm': (D,),
    'self_attn.q_proj': (D, D),
    'self_attn.k_proj': (D // 2, D),
    'self_attn.v_proj': (D // 2, D),
    'self_attn.o_proj': (D, D),
    'mlp.gate_proj': (F, D),
    'mlp.up_proj': (F, D),
    'mlp.down_proj': (D, F),
}
CONFIG = {
    'model_type': 'llama',
    'vocab_size': V,
    'hidden_size': D,
    'intermediate_size': F,
    'num_hidden_layers': LAYERS,
    'num_attention_heads': 16,
    'num_key_value_heads': 8,
    'tie_word_embeddings': False,
}
# VmHWM is the peak of a process; the device of a CPU is host memory too, so the model itself counts.
PROGRAM = """
import re, sys, pathlib, jax, jax.numpy as jnp
from lens import hf
def peak():
    return int(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]) * 1024
jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
before = peak()
model = hf.load_model(sys.argv[1], dtype=jnp.bfloat16)
size = sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(model)))
print(before, size, peak(), float(model.blocks.mlp.down[...][3, 5, 7]))
"""


@pytest.fixture
def checkpoint(tmp_path):
    """Four shards; every tensor is another cut of one row of random numbers, so that writing takes seconds."""
    row = np.random.default_rng(0).normal(size=D * F + 500).astype(ml_dtypes.bfloat16)
    shapes = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,), 'lm_head.weight': (V, D)}
    shapes |= {f'model.layers.{i}.{n}.weight': s for i in range(LAYERS) for n, s in SHAPES.items()}
    names, weight_map = list(shapes), {}
    for k in range(4):
        shard = names[k::4]
        arrays = {n: row[names.index(n) :][: np.prod(shapes[n])].reshape(shapes[n]) for n in shard}
        file = f'model-{k}.safetensors'
        safetensors.numpy.save_file(arrays, tmp_path / file)
        weight_map |= dict.fromkeys(shard, file)
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.slow
def test_host_memory_stays_below_one_shard_and_one_stacked_tensor(checkpoint):
    env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}  # as users have it: unoptimised programs copy more
    command = [sys.executable, '-c', PROGRAM, str(checkpoint)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    before, size, peak, value = (float(x) for x in run.stdout.split())
    shard = max(f.stat().st_size for f in checkpoint.glob('*.safetensors'))
    stacked = LAYERS * D * F * 2
    extra = peak - before - size
    print(
        f'model {size / 1e9:.2f} GB, above it {extra / 1e6:.0f} MB; a shard {shard / 1e6:.0f}, a stack {stacked / 1e6:.0f}'
    )
    assert size > 4e8
    assert extra < shard + stacked
    assert value == stored(checkpoint, 'model.layers.3.mlp.down_proj.weight')[7, 5]  # our axes: [in, out]


def stored(checkpoint, name):
    weight_map = json.loads((checkpoint / 'model.safetensors.index.json').read_text())['weight_map']
    return safetensors.numpy.load_file(checkpoint / weight_map[name])[name]
