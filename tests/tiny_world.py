"""A tiny random subject and lens in which every dimension is distinct. Importing it touches no device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lens import sharding
from lens.models.decoder import Decoder, DecoderConfig, scaled_identity
from lens.models.encoder import Encoder, EncoderConfig
from lens.models.injection import Affine
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


@functools.partial(jax.jit, static_argnums=0)
def _random(config, key):
    return Transformer(config, rngs=nnx.Rngs(key))


def make_base(config=TINY, seed=0):
    """A random model whose norms are not ones, so that a forgotten norm shows."""
    rng = np.random.default_rng(seed)

    def shake(kp, x):
        x = np.asarray(x)
        if 'norm' in sharding.path(kp):
            x = x * (1 + 0.3 * rng.standard_normal(x.shape).astype(np.float32))
        return jnp.asarray(x)

    return jax.tree_util.tree_map_with_path(shake, _random(config, jax.random.key(seed)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _lens(base, injection, own_base, adapters):
    norms = np.arange(1, 5, dtype=np.float32)
    decoder = Decoder(
        DecoderConfig(injection, LAYER),
        [3, 7],
        [9],
        base,
        scaled_identity(injection, LAYER, 1.0, base.config.d_model, norms),
        own_base=own_base,
        adapters=adapters[0],
    )
    encoder = Encoder(EncoderConfig(LAYER, 'affine'), [5], [6, 8], base, own_base=own_base, adapters=adapters[1])
    return Lens(decoder, encoder)


def make_lens(base, *, own_base=False, patched=2, shared=False, adapters=(None, None), seed=2):
    """A lens with random maps, prompts and read-out: nothing is at its initial value."""
    rng = np.random.default_rng(seed)
    start = _lens(base, Affine(patched, shared), own_base, adapters)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32)), start
    )
