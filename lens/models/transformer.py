"""The decoder-only Flax stack: embed, run_layers(lo, hi), logits. One module for every family.

Blocks are stacked on a leading layer axis and run by a scan over layer *indices*, with the
indexing inside `jax.checkpoint`: slicing the stack would copy the weights, and indexing outside
the checkpoint would keep a second copy of them for the gradient.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lens import sharding
from lens.models import lora
from lens.models.attention import Attention, KVCache

REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a model. `remat` is how a block's activations reach the backward pass: 'full'
    recomputes them (least memory), 'dots' keeps the matrix products (least work)."""

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float
    norm_eps: float
    tied: bool
    max_positions: int
    remat: str = 'full'


def rms_norm(x_BxTxD, scale_D, eps: float):
    x = x_BxTxD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * scale_D.astype(jnp.float32)).astype(x_BxTxD.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, c: TransformerConfig, *, rngs: nnx.Rngs, dtype):
        def init(shape, fan_in):
            return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)

        self.gate = init((c.d_model, c.d_ff), c.d_model)
        self.up = init((c.d_model, c.d_ff), c.d_model)
        self.down = init((c.d_ff, c.d_model), c.d_ff * 2 * c.n_layers)

    def __call__(self, x_BxTxD, adapters):
        gate = lora.project('btd,df->btf', x_BxTxD, self.gate[...], adapters, 'gate')
        up = lora.project('btd,df->btf', x_BxTxD, self.up[...], adapters, 'up')
        return lora.project('btf,fd->btd', jax.nn.silu(gate) * up, self.down[...], adapters, 'down', sharding.ACT)


class Block(nnx.Module):
    def __init__(self, c: TransformerConfig, *, rngs: nnx.Rngs, dtype):
        self.attn_norm = nnx.Param(jnp.ones(c.d_model, dtype))
        self.attn = Attention(c, rngs=rngs, dtype=dtype)
        self.mlp_norm = nnx.Param(jnp.ones(c.d_model, dtype))
        self.mlp = GatedMLP(c, rngs=rngs, dtype=dtype)

    def __call__(self, x_BxTxD, layer, start, c, cache, adapters):
        mixed, cache = self.attn(rms_norm(x_BxTxD, self.attn_norm[...], c.norm_eps), layer, start, c, cache, adapters)
        x_BxTxD = x_BxTxD + mixed
        return x_BxTxD + self.mlp(rms_norm(x_BxTxD, self.mlp_norm[...], c.norm_eps), adapters), cache


@functools.partial(jax.jit, static_argnames=('lo', 'hi', 'c', 'before_block'))
def _run_blocks(blocks, adapters, x_BxTxD, cache, start, *, lo, hi, c, before_block):
    """Blocks lo..hi-1; returns (x_BxTxD, cache). Jitted so that calls outside jit compile once."""
    if not 0 <= lo <= hi <= c.n_layers:  # an index beyond the stack would silently repeat the last block
        raise ValueError(f'blocks {lo}..{hi - 1} are not all in 0..{c.n_layers - 1}')

    def layer(carry, i):
        x, cache = carry
        block, adapter = jax.tree.map(lambda w: w[i], (blocks, adapters))
        if before_block is not None:
            x = before_block(x, i)
        return block(x, i, start, c, cache, adapter), None

    layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat])
    return jax.lax.scan(layer, (x_BxTxD, cache), jnp.arange(lo, hi))[0]


class Transformer(nnx.Module):
    """A causal language model as a pytree of stacked arrays."""

    def __init__(self, c: TransformerConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = c
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (c.vocab_size, c.d_model), dtype))
        keys = jax.random.split(rngs.params(), c.n_layers)
        self.blocks = jax.vmap(lambda k: Block(c, rngs=nnx.Rngs(k), dtype=dtype))(keys)
        self.final_norm = nnx.Param(jnp.ones(c.d_model, dtype))
        head = jax.random.normal(rngs.params(), (c.d_model, c.vocab_size), dtype) * c.d_model**-0.5
        self.head = nnx.data(None if c.tied else nnx.Param(head))

    def embed(self, ids_BxT):
        """Token embeddings BxTxD as they enter block 0."""
        return self.embedding[...].at[ids_BxT].get(out_sharding=sharding.out(sharding.ACT))

    def embedding_rows(self, ids: list[int]):
        """Rows of the embedding table as they are, len(ids) x D: where a soft prompt starts."""
        ids = jnp.asarray(ids, jnp.int32)
        return self.embedding[...].at[ids].get(out_sharding=sharding.out(sharding.P(None, None)))

    def truncated(self, n: int) -> 'Transformer':
        """A copy of the first n blocks and the embedding; it has no final norm and no head."""
        copy = jax.tree.map(lambda x: x, self)
        copy.config = dataclasses.replace(self.config, n_layers=n)
        copy.blocks = jax.tree.map(lambda w: w[:n], self.blocks)
        copy.final_norm = copy.head = None
        return copy

    def run_layers(self, x_BxTxD, lo: int, hi: int, *, adapters=None, before_block: Callable | None = None):
        """Residual stream after blocks lo..hi-1, positions 0..T-1.

        before_block(x_BxTxD, layer_index) -> x_BxTxD is applied at the entrance of every block.
        """
        return _run_blocks(
            self.blocks, adapters, x_BxTxD, None, 0, lo=lo, hi=hi, c=self.config, before_block=before_block
        )[0]

    def run_layers_cached(
        self, x_BxTxD, lo: int, hi: int, cache: KVCache, start, *, adapters=None, before_block: Callable | None = None
    ):
        """As run_layers for positions start..start+T-1 after those already in `cache`.

        Returns (x_BxTxD, cache with the new positions written).
        """
        return _run_blocks(
            self.blocks, adapters, x_BxTxD, cache, start, lo=lo, hi=hi, c=self.config, before_block=before_block
        )

    def logits(self, x_BxTxD):
        """Final norm and output head; BxTxV in float32."""
        x = rms_norm(x_BxTxD, self.final_norm[...], self.config.norm_eps)
        if self.head is None:
            return jnp.einsum('btd,vd->btv', x, self.embedding[...], preferred_element_type=jnp.float32)
        return jnp.einsum('btd,dv->btv', x, self.head[...], preferred_element_type=jnp.float32)

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A zero cache for `batch` rows and `length` positions."""
        c = self.config
        shape = (c.n_layers, batch, length, c.n_kv_heads, c.head_dim)
        zero = jnp.zeros(shape, self.embedding.dtype, out_sharding=sharding.out(self._cache_spec()))
        return KVCache(zero, zero)

    def _cache_spec(self):
        heads = jax.typeof(self.blocks.attn.k[...]).sharding.spec[2]
        return sharding.P(None, 'data', None, heads, None)

    def __call__(self, ids_BxT):
        """Next-token logits BxTxV (float32) of token ids BxT."""
        return self.logits(self.run_layers(self.embed(ids_BxT), 0, self.config.n_layers))
