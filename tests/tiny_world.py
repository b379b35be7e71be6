"""A tiny random subject and lens in which every dimension is distinct. Importing it touches no device."""

import jax
import numpy as np
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


def make_base(config=TINY, seed=0):
    """A random model whose norms are not ones, so that a forgotten norm shows."""
    model = Transformer(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)

    def shake(kp, x):
        return x * (1 + 0.3 * rng.standard_normal(x.shape).astype(np.float32)) if 'norm' in sharding.path(kp) else x

    return jax.tree_util.tree_map_with_path(shake, model)


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
