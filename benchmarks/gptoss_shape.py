"""The shape of gpt-oss with random weights made on the device: correctness, then speed and memory.

    python -m benchmarks.gptoss_shape                # tiny, any machine: that the script runs, compile times
    python -m benchmarks.gptoss_shape --size=20b     # one GPU of 80 GB: the figures of BUILD_NOTES.md

Prints one JSON object a line. Floors on one H100 (bf16): a decode step reads 40.1 GB of weights at batch 32 and
40.7 at 64 and more, 12.1 ms at 3.35 TB/s; a prefilled token costs 7.2 GFLOP, 137k tokens/s at 989 TFLOP/s.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks.timing import report, seconds
from lens.models import moe, subject
from lens.models.moe import MoE
from lens.models.rope import Rope
from lens.models.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(
    family='gpt_oss',
    vocab_size=97,
    d_model=64,
    n_layers=24,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    d_ff=96,
    norm_eps=1e-5,
    tied=False,
    max_positions=131072,
    ropes=(Rope(150000.0, 'yarn', 32.0, 4096, truncate=False, attention_factor=1.346574),),
    windows=(128, 0),
    qkv_bias=True,
    o_bias=True,
    sinks=True,
    n_experts=5,
    top_k=2,
)
FULL = dataclasses.replace(
    TINY, vocab_size=201088, d_model=2880, n_heads=64, n_kv_heads=8, head_dim=64, d_ff=2880, n_experts=32, top_k=4
)
# (prefill batch, prefill length, decode batches, decoded tokens, rows of the grouped product)
WORK = {'tiny': (2, 64, (4, 8), 8, 256), '20b': (8, 1024, (32, 256), 64, 65536)}


def compiled(function, *args):
    """Returns the program and the seconds of tracing and compiling."""
    begin = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - begin


@functools.partial(jax.jit, donate_argnums=0)
def _fill(stack, key, i):
    layer = 0.02 * jax.random.normal(key, stack.shape[1:], stack.dtype)
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


def random_model(c: TransformerConfig, dtype) -> Transformer:
    """Makes every leaf random, one layer at a time: no more than one layer of temporaries."""

    def make(kp, leaf):
        key = jax.random.fold_in(jax.random.key(0), hash(str(kp)) % 2**31)
        stacked = leaf.ndim and leaf.shape[0] == c.n_layers
        rows = leaf.shape if stacked else (1, *leaf.shape)
        x = jnp.zeros(rows, leaf.dtype)
        for i in range(rows[0]):
            x = _fill(x, jax.random.fold_in(key, i), i)
        return x if stacked else x[0]

    abstract = jax.eval_shape(lambda: Transformer(c, rngs=nnx.Rngs(0), dtype=dtype))
    return jax.tree_util.tree_map_with_path(make, abstract)


def check(dtype) -> None:
    """Asserts of a tiny model on this device: grouped experts equal every-expert ones, cached equals uncached."""
    model = random_model(TINY, dtype)
    ids = jax.random.randint(jax.random.key(1), (2, 150), 0, TINY.vocab_size)
    logits = model(ids)
    dense = jax.tree.map(lambda x: x, model)
    dense.config = dataclasses.replace(TINY, experts='dense')
    x, cache = model.run_cached(model.embed(ids[:, :140]), 0, TINY.n_layers)
    cache, streams = cache.with_room(10), [x]
    for t in range(140, 150):
        x, new = model.run_cached(model.embed(ids[:, t : t + 1], t), 0, TINY.n_layers, cache, jnp.asarray([t]))
        cache, streams = cache.written(new, t), [*streams, x]
    cached = model.logits(jnp.concatenate(streams, axis=1))
    spread = float(jnp.std(logits))
    for name, other in (('dense', dense(ids)), ('cached', cached)):
        difference = float(jnp.sqrt(jnp.mean((other - logits) ** 2))) / spread
        report(check=name, dtype=jnp.dtype(dtype).name, rms_difference_of_spread=difference)
        assert difference < (1e-4 if dtype == jnp.float32 else 0.1), name


def grouped_products(c: TransformerConfig, rows: int, dtype) -> None:
    """Measures one layer of experts, forward and gradient in the input, per implementation."""
    x = jax.random.normal(jax.random.key(2), (1, rows // c.top_k, c.d_model), dtype)
    for name in moe.IMPLEMENTATIONS:
        each = dataclasses.replace(c, experts=name)
        layer = jax.jit(lambda each=each: MoE(each, rngs=nnx.Rngs(0), dtype=dtype))()
        try:
            forward, compile_s = compiled(lambda layer, x, c=each: layer(x, c), layer, x)
            backward, _ = compiled(jax.grad(lambda x, layer, c=each: layer(x, c).astype(jnp.float32).sum()), x, layer)
            report(
                experts=name,
                rows=rows,
                forward_ms=1e3 * seconds(forward, layer, x),
                forward_and_input_gradient_ms=1e3 * seconds(backward, x, layer),
                compile_s=compile_s,
            )
        except Exception as e:  # a package that is missing, or memory: the others are measured all the same
            report(experts=name, rows=rows, failed=str(e).splitlines()[0][:200])


def whole_model(c: TransformerConfig, size: str, dtype) -> None:
    batch, length, decode_batches, steps, _ = WORK[size]
    model = random_model(c, dtype)
    bytes_of_model = sum(x.nbytes for x in jax.tree.leaves(model))
    ids = jax.random.randint(jax.random.key(3), (batch, length), 0, c.vocab_size)

    program, compile_s = compiled(
        lambda m, ids: m.logits(m.run_layers(m.embed(ids), 0, c.n_layers)[:, -1:]), model, ids
    )
    prefill_s = seconds(program, model, ids)
    report(size=size, weights_gb=bytes_of_model / 1e9, prefill_tokens_s=batch * length / prefill_s, compile_s=compile_s)
    positions = jnp.full((batch, 1), length - 1)
    program, compile_s = compiled(lambda m, i, p: subject.activations(m, i, p, 16), model, ids, positions)
    report(read_tokens_s=batch * length / seconds(program, model, ids, positions), compile_s=compile_s)
    short, at = ids[:, :64], jnp.full(batch, 30)
    value = jnp.zeros((batch, c.d_model), dtype)
    program, compile_s = compiled(lambda m, *a: subject.patch(m, *a, 16), model, short, at, value)
    report(patch_tokens_s=short.size / seconds(program, model, short, at, value), compile_s=compile_s)

    def decode(model, ids_N, cache):
        def body(carry, t):
            ids, cache = carry
            x, new = model.run_cached(model.embed(ids[:, None], t), 0, c.n_layers, cache, t[None])
            return (jnp.argmax(model.logits(x)[:, 0], -1).astype(jnp.int32), cache.written(new, t)), None

        return jax.lax.scan(body, (ids_N, cache), jnp.arange(steps))[0][0]

    for n in decode_batches:
        first = jnp.zeros(n, jnp.int32)
        cache = model.run_cached(model.embed(first[:, None]), 0, c.n_layers)[1].with_room(255)
        program, compile_s = compiled(decode, model, first, cache)
        step_s = seconds(program, model, first, cache) / steps
        report(decode_batch=n, step_ms=1e3 * step_s, tokens_s=n / step_s, compile_s=compile_s)


def main(_):
    size = SIZE.value
    c, dtype = (TINY, jnp.float32) if size == 'tiny' else (FULL, jnp.bfloat16)
    device = jax.devices()[0]
    report(device=device.device_kind, jax=jax.__version__, size=size)
    for kind in (jnp.float32, jnp.bfloat16):
        check(kind)
    grouped_products(c, WORK[size][4], dtype)
    whole_model(c, size, dtype)
    stats = device.memory_stats() or {}
    report(peak_gb=stats.get('peak_bytes_in_use', 0) / 1e9)
    if size == 'tiny':
        model = random_model(c, dtype)
        ids = jnp.ones((2, 13), jnp.int32)
        _, compile_s = compiled(jax.grad(lambda m: jnp.mean(m(ids) ** 2)), model)
        report(what='24 layers of experts, forward and backward', compile_s=compile_s)


if __name__ == '__main__':
    SIZE = flags.DEFINE_enum('size', 'tiny', list(WORK), 'Widths: tiny, or those of gpt-oss-20b.')
    app.run(main)
