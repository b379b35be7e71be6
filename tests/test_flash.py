"""Flash attention against the plain one, in value and gradient. cuDNN's kernels run on no CPU: others of their contract
stand in for them, and that they themselves are called is read in the program that is lowered for a GPU."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding

from lens import flops, sharding
from lens.models import attention, flash, transformer
from lens.sharding import P
from tests.compare import close
from tests.tiny_world import TINY, make_base

B, T, H = 4, 13, 8
SCALE = 0.3


def forward(q, k, v, *, scale, window):
    near = (window - 1, 0) if window else None
    how = {'scale': scale, 'is_causal': True, 'local_window_size': near, 'implementation': 'xla'}
    o, lse_BxTxN = jax.nn.dot_product_attention(q, k, v, **how, return_residual=True)
    return o, jnp.swapaxes(lse_BxTxN, 1, 2).astype(jnp.float32)


def backward(q, k, v, lse_BxNxT, o, do, *, scale, window):
    """Algorithm 2 of FlashAttention-2 in one piece: it believes the lse and o that it is given."""
    b, t, n, h = q.shape
    q, o, do = (x.reshape(b, t, k.shape[2], -1, h) for x in (q, o, do))
    at = jnp.arange(t)
    seen = (at <= at[:, None]) & (at > at[:, None] - (window or t))
    lse = lse_BxNxT.reshape(b, k.shape[2], -1, t, 1)
    p = jnp.where(seen, jnp.exp(scale * jnp.einsum('btkgh,bskh->bkgts', q, k) - lse), 0)
    dp = jnp.einsum('btkgh,bskh->bkgts', do, v)
    ds = scale * p * (dp - jnp.einsum('btkgh,btkgh->bkgt', do, o)[..., None])
    dq = jnp.einsum('bkgts,bskh->btkgh', ds, k).reshape(b, t, n, h)
    return dq, jnp.einsum('bkgts,btkgh->bskh', ds, q), jnp.einsum('bkgts,btkgh->bskh', p, do)


@pytest.fixture
def stand_ins(monkeypatch):
    """Every text is long enough, every dtype right, and the kernels run here."""
    monkeypatch.setattr(flash, 'CUDNN', flash.Kernels(forward, backward))
    monkeypatch.setattr(flash, 'takes', lambda q, c: True)
    transformer._run_blocks.clear_cache()
    yield
    transformer._run_blocks.clear_cache()


def operands(n_kv, group, sinks=True):
    rng = np.random.default_rng(n_kv)
    q = rng.normal(size=(B, T, n_kv, group, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, T, n_kv, H)).astype(np.float32)
    s = 3 * rng.normal(size=(n_kv, group)).astype(np.float32)
    s[1, 0] = 20.0  # a head that looks at nothing
    return q, k, v, s if sinks else None


def plain(q, k, v, sinks, window):
    part = (
        f'beside_{T}_keys',
        jnp.moveaxis(k, 1, 2),
        jnp.moveaxis(v, 1, 2),
        attention.seen_beside(jnp.arange(T), T, True, window),
    )
    return attention.attend(q, [part], scale=SCALE, sinks_KxG=sinks)


def with_gradients(attend, q, k, v, sinks):
    """(values, gradients in all operands) of a loss that is no symmetric function of the output."""

    def loss(q, k, v, sinks):
        o = attend(q, k, v, sinks)
        return jnp.sum(jnp.sin(3 * o)), o

    return jax.grad(loss, argnums=(0, 1, 2, 3) if sinks is not None else (0, 1, 2), has_aux=True)(q, k, v, sinks)


def by_flash(q, k, v, sinks, layer, c):
    """The layer is traced, as in a scan, and the block is computed again in the backward pass."""
    run = jax.checkpoint(lambda *x: flash.attend(*x[:3], layer, c, scale=SCALE, sinks_KxG=x[3]))
    return with_gradients(run, q, k, v, sinks)


FLASH = jax.jit(by_flash, static_argnames='c')
PLAIN = jax.jit(lambda *x: with_gradients(functools.partial(plain, window=x[4]), *x[:4]))


@pytest.mark.parametrize(('windows', 'sinks'), [((0,), False), ((5,), True), ((0, 3, 5), False), ((T, 0, 5), True)])
def test_equals_plain_attention(stand_ins, windows, sinks):
    c = dataclasses.replace(TINY, windows=windows)
    x = operands(2, 3, sinks)
    for layer in range(len(windows) + 1):
        close(FLASH(*x, layer, c), PLAIN(*x, windows[layer % len(windows)]))


@pytest.mark.parametrize('n_kv', [2, 3])
def test_equals_plain_attention_on_a_mesh(stand_ins, n_kv):
    """Two kv heads are split over `model`, three are not. Sinks, which every row shares, get the sum of all rows."""
    c = dataclasses.replace(TINY, windows=(5, 0))
    x = operands(n_kv, 5)
    want = [PLAIN(*x, window) for window in c.windows]
    mesh = sharding.make_mesh(2, 2, 2)
    heads = 'model' if n_kv == 2 else None
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, P(sharding.ROW_AXES, None, heads))) for a in x[:3]]
        placed.append(jax.device_put(x[3], NamedSharding(mesh, P(heads))))
        for layer in (0, 1):
            got = FLASH(*placed, layer, c)
            close(got, want[layer])
            (*_, ds), _ = got
            copies = {str(part.index): [] for part in ds.addressable_shards}
            for part in ds.addressable_shards:
                copies[str(part.index)].append(np.asarray(part.data))
            assert len(copies) == (2 if heads else 1)
            assert all(np.array_equal(a[0], b) for a in copies.values() for b in a)


def gradients(model, ids):
    """(gradients of all weights, the stream) of a loss of the stream."""

    def loss(model):
        x = model.run_layers(model.embed(ids), 0, model.config.n_layers)
        return jnp.sum(jnp.sin(3 * x)), x

    transformer._run_blocks.clear_cache()
    return jax.jit(lambda model: jax.grad(loss, has_aux=True)(model))(model)


def test_a_model_runs_it_for_tokens_that_see_each_other(monkeypatch):
    """Through remat, the scan and a mesh; every kind of layer has its window."""
    model = make_base(dataclasses.replace(TINY, sinks=True, windows=(5, 0)))
    rng = np.random.default_rng(0)
    model.blocks.attn.sinks = nnx.Param(3 * rng.normal(size=(3, 4, 2)).astype(np.float32))
    ids = rng.integers(0, TINY.vocab_size, (8, T)).astype(np.int32)
    want = gradients(model, ids)
    calls = []
    counted = flash.Kernels(lambda *x, window, **y: calls.append(window) or forward(*x, window=window, **y), backward)
    monkeypatch.setattr(flash, 'CUDNN', counted)
    monkeypatch.setattr(flash, 'takes', lambda q, c: True)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        got = gradients(sharding.place(model, mesh), sharding.put_batch({'ids': ids}, mesh)['ids'])
    transformer._run_blocks.clear_cache()
    assert set(calls) == {5, 0}
    close(got[1], want[1])
    close(got[0], want[0], steps=1024)


def test_tokens_after_a_cache_do_without(stand_ins, monkeypatch, base, tokens):
    x, past = base.run_cached(base.embed(tokens[:, :6]), 0, 2)
    monkeypatch.setattr(flash, 'attend', None)
    y, _ = base.run_cached(base.embed(tokens[:, 6:9], 6), 0, 2, (past,), 6)
    assert np.isfinite(np.asarray(x)).all() and np.isfinite(np.asarray(y)).all()


@pytest.mark.parametrize(
    ('takes', 'length', 'head', 'dtype', 'changes'),
    [
        (True, flash.LONG, 64, jnp.bfloat16, {'windows': (128, 0), 'sinks': True}),
        (False, flash.LONG - 1, 64, jnp.bfloat16, {}),
        (False, flash.LONG, 64, jnp.float32, {}),
        (False, flash.LONG, 60, jnp.bfloat16, {}),
        (False, flash.LONG, 256, jnp.bfloat16, {}),
        (False, flash.LONG, 64, jnp.bfloat16, {'attn_softcap': 50.0}),
    ],
)
def test_takes_what_the_kernels_can(monkeypatch, takes, length, head, dtype, changes):
    q, c = jax.ShapeDtypeStruct((2, length, 4, 2, head), dtype), dataclasses.replace(TINY, **changes)
    assert not flash.takes(q, c)  # this is no GPU
    monkeypatch.setattr(flash, 'on_nvidia', lambda: True)
    assert flash.takes(q, c) == takes


@pytest.mark.parametrize(
    ('platform', 'kind', 'found'),
    [
        ('gpu', 'NVIDIA H100 80GB HBM3', True),
        ('gpu', 'Tesla T4', False),
        ('gpu', 'AMD Instinct MI300X', False),
        ('tpu', 'TPU v5 lite', False),
    ],
)
def test_knows_the_devices_of_a_mesh(platform, kind, found):
    device = dataclasses.replace(jax.make_mesh((1,), ('x',)).abstract_mesh.abstract_device, device_kind=kind)
    device = dataclasses.replace(device, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert flash.on_nvidia() == found
    assert not flash.on_nvidia()


def for_gpu(traced) -> list[tuple[str, dict]]:
    """(the line without names of intermediate results, the configuration) of every kernel that a program calls."""
    lines = [x for x in traced.lower(lowering_platforms=('cuda',)).as_text().splitlines() if '@__cudnn' in x]
    parts = [re.split(r'backend_config = "(.*?)"', re.sub(r'%\d+', '%', x)) for x in lines]
    return [(a + b, json.loads(config.replace(r'\22', '"'))['cudnn_fmha_backend_config']) for a, config, b in parts]


@pytest.mark.parametrize('window', [0, 128])
def test_calls_cudnn_as_jax_does(monkeypatch, window):
    monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 92300)
    how = {'is_causal': True, 'local_window_size': (window - 1, 0) if window else None, 'implementation': 'cudnn'}

    def ours(q, k, v):
        return flash._attend((window,), SCALE, flash.CUDNN, q, k, v, None, 0)

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, scale=SCALE, **how)

    def calls(attend):
        gradients = jax.jit(lambda *x: jax.vjp(attend, *x[:3])[1](x[3]))
        q, kv = (jax.ShapeDtypeStruct((B, flash.LONG, n, H), jnp.bfloat16) for n in (6, 3))
        return for_gpu(gradients.trace(q, kv, kv, q))

    got, want = calls(ours), calls(theirs)
    for _, config in want:
        del config['seed']  # of a dropout that there is not
        layout = config['intermediate_tensor_shape']['layout']
        config['intermediate_tensor_shape']['layout'] = {'minor_to_major': layout['minor_to_major']}
    assert [x.split('(')[0].split('@')[1] for x, _ in got] == [flash.FORWARD, flash.BACKWARD]
    assert got == want


def traced_gradient(monkeypatch, c, mesh):
    """Of a loss of the stream of an abstract model on GPUs."""
    monkeypatch.setattr(flash, 'on_nvidia', lambda: True)
    model = jax.eval_shape(lambda: transformer.Transformer(c, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    place = NamedSharding(mesh, sharding.ACT)
    x = jax.ShapeDtypeStruct((8, flash.LONG, c.d_model), jnp.bfloat16, sharding=place)

    def loss(x, model):
        return jnp.sum(model.run_layers(x, 0, c.n_layers).astype(jnp.float32) ** 2)

    transformer._run_blocks.clear_cache()
    traced = jax.jit(jax.grad(loss)).trace(x, sharding.with_placement(model, mesh, np.inf))
    transformer._run_blocks.clear_cache()
    return traced


def test_a_device_runs_kernels_on_its_own_rows_and_heads(monkeypatch):
    c = dataclasses.replace(TINY, sinks=True, head_dim=H, windows=(128, 0))
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        calls = for_gpu(traced_gradient(monkeypatch, c, mesh))
    # Of both windows: forward and, in the backward pass, forward again and backward.
    assert [config['sliding_window_length'] for _, config in calls].count(128) == 3
    assert len(calls) == 6
    for line, _ in calls:
        assert f'tensor<2x{flash.LONG}x4x{H}xbf16>' in line and f'tensor<2x{flash.LONG}x2x{H}xbf16>' in line


@pytest.mark.parametrize('windows', [(0,), (128, 0), (2 * flash.LONG, 128, 0)])
def test_its_flops_are_those_of_the_plain_one(monkeypatch, windows):
    c = dataclasses.replace(TINY, head_dim=H, windows=windows, n_layers=len(windows))
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        fast = traced_gradient(monkeypatch, c, mesh)
        monkeypatch.setattr(flash, 'takes', lambda q, c: False)
        slow = traced_gradient(monkeypatch, c, mesh)
    assert for_gpu(fast) and not for_gpu(slow)
    assert flops.by_scope(fast.jaxpr, c) == pytest.approx(flops.by_scope(slow.jaxpr, c))
