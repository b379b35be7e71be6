"""The decoder-only Flax stack: embed, run_layers(lo, hi), logits. One module for every family.

Blocks are stacked on a leading layer axis and run by a scan that counts the layers, with the indexing inside
`jax.checkpoint`: slicing the stack would copy the weights, an index out of an array of indices hides from XLA that it
is the loop's own, so that each layer is copied before it is used, and indexing outside the checkpoint would keep a
second copy of the weights for the gradient.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lens import sharding
from lens.models import lora
from lens.models.attention import KEPT, Attention, KVCache, softcap
from lens.models.moe import MoE
from lens.models.norm import Norm, normal, zeros
from lens.models.rope import Rope

HIDDEN = 'hidden'  # what comes out of gate and up, by name
REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'attention': jax.checkpoint_policies.save_only_these_names(*KEPT),
    'projections': jax.checkpoint_policies.save_only_these_names(*KEPT, HIDDEN),
    'dots': jax.checkpoint_policies.dots_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything that one model differs from another in; `families` derives it from a config.json.

    Layer patterns (`windows`, `layer_rope`) repeat over the depth. The last four are not the model's but
    how it is run: `remat`, how a block's activations reach the backward pass ('full' recomputes them,
    least memory; 'attention' keeps queries, keys, values and their mix; 'projections' also what gate and up
    give, which most of the work is for; 'dots' all products, scores too); `experts`, how experts multiply (a name of
    moe.IMPLEMENTATIONS); `packed`, whether experts stay in MXFP4; `compute`, dtype of the products and of the stream
    ('' is that of the weights), for weights kept more accurately.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int  # of one expert where there are experts
    norm_eps: float
    tied: bool
    max_positions: int
    ropes: tuple[Rope, ...]  # empty: learned positions
    layer_rope: tuple[int, ...] = (0,)  # which of `ropes`
    windows: tuple[int, ...] = (0,)  # keys that a query sees, itself included; 0 = all before it
    norm: str = 'rms'  # rms | rms_offset | layer
    post_norms: bool = False  # a second norm on what a branch adds to the stream
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sinks: bool = False
    query_scale: float | None = None  # of the attention scores; None = head_dim^-1/2
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    embed_scale: float = 1.0  # rounded to the dtype of the weights, as the reference does
    mlp: str = 'silu'  # silu | gelu (gated), gelu_plain (two matrices)
    n_experts: int = 0  # 0: one dense MLP
    top_k: int = 0
    remat: str = 'full'
    experts: str = 'auto'
    packed: bool = False
    compute: str = ''

    def of_layer(self, pattern: tuple[int, ...], layer):
        """Picks the entry of a layer pattern; `layer` may be traced."""
        return pattern[0] if len(set(pattern)) == 1 else jnp.asarray(pattern)[layer % len(pattern)]


class MLP(nnx.Module):
    """down(act(gate x) * up x), or down(gelu(up x)) without a gate."""

    def __init__(self, c: TransformerConfig, *, rngs: nnx.Rngs, dtype):
        d, f, gated = c.d_model, c.d_ff, c.mlp != 'gelu_plain'
        self.gate = nnx.data(normal((d, f), d, rngs, dtype) if gated else None)
        self.up = normal((d, f), d, rngs, dtype)
        self.down = normal((f, d), f * 2 * c.n_layers, rngs, dtype)
        self.gate_bias = zeros(f, dtype, gated and c.mlp_bias)
        self.up_bias = zeros(f, dtype, c.mlp_bias)
        self.down_bias = zeros(d, dtype, c.mlp_bias)

    @jax.named_scope('mlp')
    def __call__(self, x_BxTxD, c: TransformerConfig, adapters):
        act = jax.nn.silu if c.mlp == 'silu' else jax.nn.gelu  # gelu: the tanh approximation
        for_up, for_gate = lora.apart(x_BxTxD, x_BxTxD)
        up = lora.project(for_up, self.up, adapters, 'up', bias=self.up_bias)
        gate = None
        if self.gate is not None:
            gate = lora.project(for_gate, self.gate, adapters, 'gate', bias=self.gate_bias)
        if c.remat == 'projections':
            # Without the barrier XLA makes them twice on a GPU: the second time right where they are kept.
            gate, up = checkpoint_name(jax.lax.optimization_barrier((gate, up)), HIDDEN)
        h = act(up) if gate is None else act(gate) * up
        return lora.project(h, self.down, adapters, 'down', sharding.ACT, bias=self.down_bias)


class Block(nnx.Module):
    def __init__(self, c: TransformerConfig, *, rngs: nnx.Rngs, dtype):
        def norm(wanted=True):
            return nnx.data(Norm(c.d_model, c.norm, dtype) if wanted else None)

        self.attn_norm, self.attn_post_norm = norm(), norm(c.post_norms)
        self.attn = Attention(c, rngs=rngs, dtype=dtype)
        self.mlp_norm, self.mlp_post_norm = norm(), norm(c.post_norms)
        self.mlp = nnx.data(None if c.n_experts else MLP(c, rngs=rngs, dtype=dtype))
        self.moe = nnx.data(MoE(c, rngs=rngs, dtype=dtype) if c.n_experts else None)

    @jax.named_scope('block')
    def __call__(self, x_BxTxD, layer, positions, together, c, past, adapters):
        """(stream after the block, keys and values), with the arguments of Attention."""
        y, out = self.attn(self.attn_norm(x_BxTxD, c.norm_eps), layer, positions, together, c, past, adapters)
        x_BxTxD = x_BxTxD + (self.attn_post_norm(y, c.norm_eps) if c.post_norms else y)
        y = self.mlp_norm(x_BxTxD, c.norm_eps)
        y = self.moe(y, c) if c.n_experts else self.mlp(y, c, adapters)
        return x_BxTxD + (self.mlp_post_norm(y, c.norm_eps) if c.post_norms else y), out


def cast(tree, dtype):
    """Rounds weights to the dtype of their products, None or '' leaves them; norms, which work in float32, and bytes
    stay as they are. Rounding weights once, before a loop that uses them, gives what rounding in it gives."""

    def leaf(kp, w):
        stays = re.search(r'norm/\w+$', sharding.path(kp)) or not jnp.issubdtype(w.dtype, jnp.floating)
        return w if stays else w.astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree) if dtype else tree


def at_layer(stacks, i, dtype=None):
    """Takes layer i of stacks, whole where they are split, in `dtype` as `cast` gives it.

    Call it inside a checkpoint: see the module docstring. Rounded first, so that half the bytes are gathered.
    """

    def pick(w):
        return w.at_layer(i, dtype) if isinstance(w, MoE) else w[i]

    return sharding.gathered(cast(jax.tree.map(pick, stacks, is_leaf=lambda w: isinstance(w, MoE)), dtype))


@functools.partial(jax.jit, static_argnames=('together', 'lo', 'hi', 'c', 'before_block', 'collect'))
def _run_blocks(blocks, adapters, x_BxTxD, positions, past, together, lo, hi, c, before_block, collect):
    """Blocks lo..hi-1: (x_BxTxD, of each block collect(x, keys and values)). Jitted: calls outside jit compile once."""
    if not 0 <= lo <= hi <= c.n_layers:  # an index beyond the stack would silently repeat the last block
        raise ValueError(f'blocks {lo}..{hi - 1} are not all in 0..{c.n_layers - 1}')

    def layer(at, past):
        i, x = at
        block, adapter = at_layer((blocks, adapters), i, c.compute)
        if before_block is not None:
            x = before_block(x, i)
        y, keys_values = block(x, i, positions, together, c, past, adapter)
        return (i + 1, y), collect and collect(x, keys_values)

    layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat])
    (_, x_BxTxD), collected = jax.lax.scan(layer, (jnp.int32(lo), x_BxTxD), past, length=hi - lo)
    return x_BxTxD, collected


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float32_product(spec: str, x, w):
    """An einsum of two arrays in float32, whose gradients are products in their own dtype: for the float32 cotangent
    of 16 bits, XLA would make a float32 copy of the weights at each call."""
    return jnp.einsum(spec, x, w, preferred_element_type=jnp.float32)


def _product_backward(spec: str, operands, d):
    out, transpose = jax.vjp(functools.partial(jnp.einsum, spec), *operands)
    return transpose(d.astype(out.dtype))


_float32_product.defvjp(lambda spec, x, w: (_float32_product(spec, x, w), (x, w)), _product_backward)


def _keys_values(x_BxTxD, keys_values: KVCache) -> KVCache:
    del x_BxTxD
    return keys_values


class Transformer(nnx.Module):
    """A causal language model as a pytree of stacked arrays."""

    def __init__(self, c: TransformerConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = c
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (c.vocab_size, c.d_model), dtype))
        keys = jax.random.split(rngs.params(), c.n_layers)
        self.blocks = jax.vmap(lambda k: Block(c, rngs=nnx.Rngs(k), dtype=dtype))(keys)
        self.final_norm = nnx.data(Norm(c.d_model, c.norm, dtype))
        head = jax.random.normal(rngs.params(), (c.d_model, c.vocab_size), dtype) * c.d_model**-0.5
        self.head = nnx.data(None if c.tied else nnx.Param(head))
        positions = jax.random.normal(rngs.params(), (c.max_positions, c.d_model), dtype)
        self.positions = nnx.data(None if c.ropes else nnx.Param(positions))

    @property
    def dtype(self):
        """Of the stream and of the products."""
        return jnp.dtype(self.config.compute or self.embedding.dtype)

    @property
    def table(self):
        """Gathers the embedding table VxD, in `dtype`."""
        return sharding.gathered(self.embedding[...].astype(self.dtype))

    def _rows(self, ids, spec):
        """Rows of the embedding table as they are stored, so that what they get in the gradient is summed as such."""
        return sharding.gathered(self.embedding[...]).at[ids].get(out_sharding=sharding.out(spec))

    def lookup(self, ids_BxT):
        """Looks rows of the embedding table up, BxTxD in `dtype`."""
        return self._rows(ids_BxT, sharding.ACT).astype(self.dtype)

    def enter(self, x_BxTxD, start=0):
        """Makes what enters block 0 at positions start..start+T-1, of rows in the units of the embedding table:
        times Gemma's scale, plus GPT-2's position vectors."""
        c = self.config
        if c.embed_scale != 1.0:
            x_BxTxD = x_BxTxD * jnp.asarray(c.embed_scale, self.embedding.dtype).astype(x_BxTxD.dtype)
        if self.positions is not None:
            rows = jax.lax.dynamic_slice_in_dim(self.positions[...], start, x_BxTxD.shape[1])
            x_BxTxD = x_BxTxD + rows.astype(x_BxTxD.dtype)
        return x_BxTxD

    def embed(self, ids_BxT, start=0):
        """Embeds token ids as they enter block 0 at positions start..start+T-1, BxTxD."""
        return self.enter(self.lookup(ids_BxT), start)

    def embedding_rows(self, ids: Sequence[int]):
        """Looks rows of the embedding table up for all rows of a batch, len(ids) x D as they are stored."""
        return self._rows(jnp.asarray(ids, jnp.int32), sharding.P(None, None))

    def truncated(self, n: int) -> 'Transformer':
        """Copies the first n blocks and the embedding; it has no final norm and no head."""
        copy = jax.tree.map(lambda x: x, self)
        copy.config = dataclasses.replace(self.config, n_layers=n)
        copy.blocks = jax.tree.map(lambda w: w[:n], self.blocks)
        copy.final_norm = copy.head = None
        return copy

    def _run(
        self, x_BxTxD, lo, hi, positions, past=(), *, together=True, adapters=None, before_block=None, collect=None
    ):
        c = self.config
        how = together, lo, hi, c, before_block, collect
        return _run_blocks(self.blocks, adapters, x_BxTxD, positions, past, *how)

    def run_layers(
        self,
        x_BxTxD,
        lo: int,
        hi: int,
        past: Sequence[KVCache] = (),
        start=0,
        *,
        adapters=None,
        before_block=None,
    ):
        """Runs blocks lo..hi-1: the residual stream after them.

        past: what run_cached kept of the tokens from position 0 on, one part after the other; rows of x that share those
        of a part are contiguous. start: position of the first token here.
        before_block(x_BxTxD, layer_index) -> x_BxTxD is applied at the entrance of every block.
        """
        positions, how = start + jnp.arange(x_BxTxD.shape[1]), {'adapters': adapters, 'before_block': before_block}
        return self._run(x_BxTxD, lo, hi, positions, tuple(past), **how)[0]

    def run_cached(self, x_BxTxD, lo: int, hi: int, past: Sequence[KVCache] = (), start=0, **how):
        """Runs layers with the arguments of run_layers, and keeps: (the stream after them, its keys and values in each of
        them)."""
        positions = start + jnp.arange(x_BxTxD.shape[1])
        return self._run(x_BxTxD, lo, hi, positions, tuple(past), collect=_keys_values, **how)

    def run_apart(self, x_BxTxD, lo: int, hi: int, past: KVCache, positions_BxT):
        """Runs layers for tokens each for itself: it sees what of `past` is before its position, and not the others."""
        return self._run(x_BxTxD, lo, hi, positions_BxT, (past,), together=False)[0]

    def run_cached_apart(self, x_BxTxD, lo: int, hi: int, past: KVCache, positions_BxT):
        """Runs layers as run_apart does, and keeps what run_cached keeps."""
        return self._run(x_BxTxD, lo, hi, positions_BxT, (past,), together=False, collect=_keys_values)

    def collect(self, x_BxTxD, lo: int, hi: int, of: Callable):
        """Runs layers and collects: (the stream after them, of(x_BxTxD) of the stream entering each, stacked)."""
        return self._run(x_BxTxD, lo, hi, jnp.arange(x_BxTxD.shape[1]), collect=lambda x, _: of(x))

    def unembedding(self) -> Callable:
        """Gathers the output head; returns what applies final norm and head to a stream, BxTxD -> BxTxV in float32."""
        c = self.config
        head = None if self.head is None else sharding.gathered(self.head[...].astype(self.dtype))
        spec, w = ('vd', self.table) if head is None else ('dv', head)

        def logits(x_BxTxD):
            x = self.final_norm(x_BxTxD, c.norm_eps)
            return softcap(_float32_product(f'btd,{spec}->btv', x, w), c.final_softcap)

        return logits

    def logits(self, x_BxTxD):
        """Applies final norm and output head: BxTxV in float32."""
        return self.unembedding()(x_BxTxD)

    def __call__(self, ids_BxT):
        """Next-token logits BxTxV (float32) of token ids BxT."""
        return self.logits(self.run_layers(self.embed(ids_BxT), 0, self.config.n_layers))


class Side(nnx.Module):
    """What decoder and encoder both train: with `soft` a prompt that starts as the rows of its words, else none, and, where
    asked for, adapters, a float32 copy of own_base (a part of `base`) whose products are in the dtype `compute`, a copy of
    the table of positions (GPT-2)."""

    def __init__(
        self, left_ids, right_ids, base: Transformer, own_base, adapters, positions: bool, compute: str, soft: bool
    ):
        self.left_ids, self.right_ids = tuple(left_ids), tuple(right_ids)
        self.prompt_left, self.prompt_right = (
            nnx.data(nnx.Param(base.embedding_rows(ids).astype(jnp.float32)) if soft else None)
            for ids in (left_ids, right_ids)
        )
        self.positions = nnx.data(nnx.Param(base.positions[...].astype(jnp.float32)) if positions else None)
        self.base = nnx.data(jax.tree.map(lambda x: x.astype(jnp.float32), own_base))
        if self.base is not None:
            self.base.config = dataclasses.replace(own_base.config, compute=compute)
        self.adapters = nnx.data(adapters)


def model_of(side: Side, base: Transformer) -> Transformer:
    """Picks the model that a side runs: its own base where it trains one, else the frozen one."""
    return base if side.base is None else side.base


def prompt_of(side: Side, model: Transformer):
    """Gives (left, right) of a prompt, QxD each in the units of the embedding table: the rows that a side trains, or those
    that its words have in the table of the model that it runs."""
    if side.prompt_left is None:
        return model.embedding_rows(side.left_ids), model.embedding_rows(side.right_ids)
    return side.prompt_left[...], side.prompt_right[...]


def for_rollout(side: Side, base: Transformer) -> Side:
    """Copies a side for many calls without gradient: its adapters and its own base whole on every device and in the
    dtype of the products, once, not at every call."""
    copy = jax.tree.map(lambda x: x, side)
    copy.adapters, copy.base = sharding.gathered(cast((side.adapters, side.base), model_of(side, base).dtype))
    return jax.lax.stop_gradient(copy)


def rows_for(batch: int, p_QxD, dtype):
    """Repeats the rows of a prompt for every row of a batch, BxQxD in `dtype`."""
    return jnp.broadcast_to(p_QxD, (batch, *p_QxD.shape), out_sharding=sharding.out(sharding.ACT)).astype(dtype)
