"""Eight fake CPU devices and a tiny random world in which every dimension is distinct."""

import gc
import itertools
import os
import pathlib

os.environ.setdefault('HF_HUB_OFFLINE', '1')
# Tiny shapes: compiling is all the time there is.
os.environ['XLA_FLAGS'] = (
    '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_enable_concurrency_optimized_scheduler=false'
)
# Many tests compile the same programs, in processes of their own too: compile each once.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.pytest_cache/xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# A collective of eight devices blocks eight threads, and several that do not depend on each other run at once:
# XLA's pools have one thread per core and would deadlock on two.
os.environ['NPROC'] = '64'
jax.devices()
del os.environ['NPROC']

import numpy as np
import pytest
from flax import nnx

from lens import sharding
from lens.models.decoder import Decoder, DecoderConfig, scaled_identity
from lens.models.encoder import Encoder, EncoderConfig
from lens.models.lens import Lens
from lens.models.rope import Rope
from lens.models.transformer import Transformer, TransformerConfig

# vocabulary 56, d 24, 3 blocks, 8 query and 4 kv heads of 6 (48 wide), feed-forward 40
TINY = TransformerConfig(
    family='llama',
    vocab_size=56,
    d_model=24,
    n_layers=3,
    n_heads=8,
    n_kv_heads=4,
    head_dim=6,
    d_ff=40,
    norm_eps=1e-5,
    tied=False,
    max_positions=64,
    ropes=(Rope(500.0),),
)
LAYER = 1
LENGTH = 5


MAPS, MOST_MAPS, LOOK_EVERY = pathlib.Path('/proc/self/maps'), 30_000, 20
_tests_run = itertools.count(1)


def pytest_runtest_teardown():
    """Compiled programs hold memory maps, of which Linux lets a process have 65,530: beyond that XLA aborts."""
    if next(_tests_run) % LOOK_EVERY == 0 and MAPS.exists() and MAPS.read_bytes().count(b'\n') > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope='session')
def base():
    return make_base()


def make_base(config=TINY, seed=0):
    """A random model whose norms are not ones, so that a forgotten norm shows."""
    model = Transformer(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)

    def shake(kp, x):
        return x * (1 + 0.3 * rng.standard_normal(x.shape).astype(np.float32)) if 'norm' in sharding.path(kp) else x

    return jax.tree_util.tree_map_with_path(shake, model)


@pytest.fixture(scope='session')
def tokens():
    return np.random.default_rng(1).integers(0, TINY.vocab_size, (8, 11)).astype(np.int32)


def make_lens(base, *, own_base=False, patched=2, shared=False, adapters=(None, None), seed=2):
    """A lens with random maps, prompts and read-out: nothing is at its initial value."""
    c = DecoderConfig(patched, shared, LAYER)
    decoder = Decoder(
        c,
        [3, 7],
        [9],
        base,
        scaled_identity(c, 1.0, TINY.d_model, np.arange(1, 5, dtype=np.float32)),
        own_base=own_base,
        adapters=adapters[0],
    )
    encoder = Encoder(EncoderConfig(LAYER, 'affine'), [5], [6, 8], base, own_base=own_base, adapters=adapters[1])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), Lens(decoder, encoder))


@pytest.fixture(scope='session')
def lens(base):
    return make_lens(base)


@pytest.fixture(scope='session')
def batch(tokens):
    """8 documents, 2 activations each, with given explanations."""
    rng = np.random.default_rng(3)
    return {
        'tokens': tokens,
        'positions': np.sort(rng.permuted(np.tile(np.arange(2, 11), (8, 1)), axis=1)[:, :2]).astype(np.int32),
        'explanations': rng.integers(0, TINY.vocab_size, (8, 2, LENGTH)).astype(np.int32),
    }
