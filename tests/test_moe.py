"""The experts of gpt-oss against numpy, against transformers, and on meshes. Every dimension is distinct."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from lens import sharding
from lens.errors import LensError
from lens.models import grouped, moe, mxfp4
from lens.models.moe import MoE
from lens.sharding import P
from tests.compare import close


@dataclasses.dataclass(frozen=True)
class Config:
    d_model: int = 24
    d_ff: int = 40
    n_layers: int = 3
    n_experts: int = 6
    top_k: int = 3
    packed: bool = False
    experts: str = 'ragged'


SIX = Config()
FOUR = Config(n_experts=4, top_k=2)
PACKED = Config(d_model=96, d_ff=64, packed=True)
EMPTY, FULL = 1, 2  # experts that no token and that every token chooses


def random_moe(c, *, one_sided=False, dtype=jnp.float32, seed=0):
    """Biases are random and wide enough for the clips to bind. one_sided: EMPTY and FULL are what they say."""
    m = MoE(c, rngs=nnx.Rngs(seed), dtype=dtype)
    rng = np.random.default_rng(seed)
    for name, size in (('router_bias', 0.5), ('gate_up_bias', 5.0), ('down_bias', 1.0)):
        bias = size * rng.standard_normal(getattr(m, name).shape)
        if name == 'router_bias' and one_sided:
            bias[EMPTY], bias[FULL] = -50, 50
        setattr(m, name, nnx.Param(jnp.asarray(bias, dtype)))
    return m


def random_x(c, batch=4, length=5, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(7).standard_normal((batch, length, c.d_model)), dtype)


def numpy_moe(m, c, x):
    """One token and one choice at a time, in float64. Returns (y, clipped, counts of tokens by expert)."""
    w = {
        k: np.asarray(getattr(m, k)[...]).astype(np.float64)
        for k in ('router_w', 'router_bias', 'gate_up_bias', 'down_bias')
    }
    gate_up, down = (np.asarray(a).astype(np.float64) for a in matrices(m, c))
    dtype = x.dtype
    x = np.asarray(x).astype(np.float64)
    y = np.zeros_like(x)
    clipped, counts = np.zeros(3, int), np.zeros(c.n_experts, int)
    for at in np.ndindex(x.shape[:2]):
        logits = (x[at] @ w['router_w'] + w['router_bias']).astype(dtype).astype(np.float64)
        chosen = np.argsort(-logits, kind='stable')[: c.top_k]
        weights = np.exp(logits[chosen] - logits[chosen].max())
        for e, weight in zip(chosen, weights / weights.sum(), strict=True):
            gate = gate_up[e, 0] @ x[at] + w['gate_up_bias'][e, 0]
            up = gate_up[e, 1] @ x[at] + w['gate_up_bias'][e, 1]
            clipped += [(gate > 7).sum(), (up > 7).sum(), (up < -7).sum()]
            counts[e] += 1
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            h = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            y[at] += weight * (h @ down[e] + w['down_bias'][e])
    return y, clipped, counts


def matrices(m, c):
    """gate_up [E, 2, F, D] and down [E, F, D], whichever way they are stored."""
    if not c.packed:
        return m.gate_up[...], m.down[...]
    gate_up = mxfp4.dequantise(m.gate_up_blocks[...], m.gate_up_scales[...], jnp.float32)
    down = mxfp4.dequantise(m.down_blocks[...], m.down_scales[...], jnp.float32)
    return gate_up, down.transpose(0, 2, 1)


@functools.partial(jax.jit, static_argnames='c')
def apply(m, x, c):
    return m(x, c)


@functools.partial(jax.jit, static_argnames='c')
def outcome(m, x, c):
    """(y, gradients by the module's leaves and x) of a fixed weighted sum of the output."""

    def loss(m, x):
        y = m(x, c)
        cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(sharding.reshard(cotangent, sharding.ACT) * y), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(m, x)
    return y, grads


def assert_same_outcome(got, want):
    """The output and every gradient, equal on all devices."""
    close(got, want)
    leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(got)}
    assert len(leaves) == 8
    for name, value in leaves.items():
        assert np.abs(np.asarray(value)).max() > 0, name
        copies = {}
        for shard in value.addressable_shards:
            first = copies.setdefault(str(shard.index), np.asarray(shard.data))
            assert np.array_equal(first, np.asarray(shard.data)), f'{name} differs between devices'


@functools.cache
def dense_outcome(c, one_sided):
    """The oracle: every expert for every token, unsharded."""
    c = dataclasses.replace(c, experts='dense')
    return jax.device_get(outcome(random_moe(c, one_sided=one_sided), random_x(c), c))


def place(m, mesh):
    """Experts over `model` where it divides them, as sharding.RULES do."""

    def put(kp, w):
        split = 'router' not in sharding.path(kp) and w.shape[0] % mesh.shape['model'] == 0
        return jax.device_put(w, NamedSharding(mesh, P('model') if split else P()))

    return jax.tree_util.tree_map_with_path(put, m)


EVERY = pytest.mark.parametrize('how', ['dense', 'ragged', 'triton'])


@EVERY
def test_equals_numpy(how):
    m, x, c = random_moe(SIX), random_x(SIX), dataclasses.replace(SIX, experts=how)
    want, clipped, counts = numpy_moe(m, SIX, x)
    assert (clipped > 20).all() and (counts > 0).all()
    close(outcome(m, x, c)[0], want)


@EVERY
def test_equals_transformers_with_every_gradient(how):
    import torch
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    c = dataclasses.replace(SIX, experts=how)
    m, x = random_moe(c), random_x(c)
    e, d, f = c.n_experts, c.d_model, c.d_ff
    theirs = GptOssMLP(
        GptOssConfig(hidden_size=d, intermediate_size=f, num_local_experts=e, num_experts_per_tok=c.top_k)
    )

    def interleaved(w):  # [..., 2, F] -> [..., 2F] with gates at even and ups at odd places
        return np.asarray(w).swapaxes(-1, -2).reshape(*w.shape[:-2], 2 * f)

    def as_theirs(m):
        return {
            'router.weight': np.asarray(m.router_w[...]).T,
            'router.bias': m.router_bias[...],
            'experts.gate_up_proj': interleaved(np.moveaxis(np.asarray(m.gate_up[...]), -1, 1)),
            'experts.gate_up_proj_bias': interleaved(m.gate_up_bias[...]),
            'experts.down_proj': m.down[...],
            'experts.down_proj_bias': m.down_bias[...],
        }

    theirs.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in as_theirs(m).items()})
    their_x = torch.tensor(np.asarray(x), requires_grad=True)
    their_y = theirs(their_x)[0]
    (their_y * torch.cos(torch.arange(their_y.numel(), dtype=torch.float32)).reshape(their_y.shape)).sum().backward()

    y, (m_grads, x_grads) = outcome(m, x, c)
    close(y, their_y.detach())
    close(x_grads, their_x.grad)
    their_grads = {k: p.grad for k, p in theirs.named_parameters()}
    for name, g in as_theirs(m_grads).items():
        close(g, their_grads[name])


@pytest.mark.parametrize('how', ['ragged', 'triton'])
@pytest.mark.parametrize('one_sided', [False, True])
def test_groups_equal_dense(how, one_sided):
    m, x, c = random_moe(SIX, one_sided=one_sided), random_x(SIX), dataclasses.replace(SIX, experts=how)
    counts = numpy_moe(m, SIX, x)[2]
    assert not one_sided or (counts[EMPTY] == 0 and counts[FULL] == 20)
    assert_same_outcome(outcome(m, x, c), dense_outcome(SIX, one_sided))


def plain_product(x_AxI, stack, layer, sizes_E, out_first):
    w = stack[layer]
    return _poison(jax.lax.ragged_dot(x_AxI, w.swapaxes(1, 2) if out_first else w, sizes_E), sizes_E)


def plain_of_matrices(a_AxM, b_AxN, sizes_E):
    """Written out, so that nothing sums it over `data` unless the caller's types say so."""
    ends, row = jnp.cumsum(sizes_E)[:, None], jnp.arange(a_AxM.shape[0])
    group = (row < ends) & (row >= ends - sizes_E[:, None])
    return jnp.einsum('ea,am,an->emn', group.astype(a_AxM.dtype), a_AxM, b_AxN)


# Pallas' interpreter knows no mesh: there, what the kernels compute stands in for them.
def without_kernels(monkeypatch):
    monkeypatch.setattr(grouped, '_product', plain_product)
    monkeypatch.setattr(grouped, '_of_matrices', plain_of_matrices)


@pytest.mark.parametrize(
    ('platform', 'kernel', 'length'),
    [('gpu', 'triton', 3), ('gpu', 'triton', 4), ('tpu', 'ragged', 4), ('cpu', 'dense', 4)],
)
def test_auto_changes_its_product_with_the_tokens_of_a_shard(monkeypatch, platform, kernel, length):
    """Two of eight rows on each shard: 6 tokens, and 8. Equal to dense on one device in value and gradients."""
    monkeypatch.setattr(moe, 'DENSE_TOKENS', 7)
    monkeypatch.setattr(sharding, 'platform', lambda: platform)
    without_kernels(monkeypatch)
    runs = []
    for name, run in moe.IMPLEMENTATIONS.items():
        monkeypatch.setitem(moe.IMPLEMENTATIONS, name, lambda *a, n=name, r=run: (runs.append(n), r(*a))[1])
    c = dataclasses.replace(FOUR, experts='auto')
    m, x, mesh = random_moe(c), random_x(c, 8, length), sharding.make_mesh(2, 2, 2)
    fresh = jax.jit(lambda m, x: outcome.__wrapped__(m, x, c))  # nothing of it is traced already
    with jax.set_mesh(mesh):
        got = fresh(place(m, mesh), jax.device_put(x, NamedSharding(mesh, sharding.ACT)))
    assert set(runs) == {'auto', 'dense' if length == 3 else kernel}
    assert_same_outcome(got, jax.device_get(outcome(m, x, dataclasses.replace(c, experts='dense'))))


# A shard of the 2x4 mesh has one of four experts; six experts are on every device there.
@pytest.mark.slow
@pytest.mark.parametrize('c', [FOUR, SIX], ids=['one each', 'replicated'])
def test_on_a_mesh_equals_dense_on_one_device(c):
    mesh = sharding.make_mesh(2, 4)
    m = place(random_moe(c, one_sided=True), mesh)
    assert m.down.addressable_shards[0].data.shape[0] == (1 if c == FOUR else 6)
    with jax.set_mesh(mesh):
        got = outcome(m, jax.device_put(random_x(c), NamedSharding(mesh, sharding.ACT)), c)
    assert got[0].sharding.spec == sharding.ACT
    assert_same_outcome(got, dense_outcome(c, True))


def _poison(rows, sizes):
    """Rows beyond the groups, as a kernel may leave them."""
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < sizes.sum(), rows, jnp.nan)


@pytest.mark.parametrize('c', [FOUR, SIX], ids=['split', 'replicated'])
def test_kernels_on_a_mesh_may_leave_rows_of_other_shards_undefined(monkeypatch, c):
    """NaN there, in the product and in the gradient by the rows. `model` divides four experts and, of 4, not six."""
    without_kernels(monkeypatch)
    mesh = sharding.make_mesh(2, 2, 2) if c == FOUR else sharding.make_mesh(2, 4)
    run = dataclasses.replace(c, experts='triton')
    with jax.set_mesh(mesh):
        got = outcome(place(random_moe(c), mesh), jax.device_put(random_x(c), NamedSharding(mesh, sharding.ACT)), run)
    assert_same_outcome(got, dense_outcome(c, False))


@pytest.mark.parametrize('how', moe.IMPLEMENTATIONS)
def test_a_layer_in_its_stack_equals_the_layer_alone(how):
    """In value and gradients, of the stack as well."""
    c = dataclasses.replace(SIX, experts=how)
    layers = [random_moe(c, seed=i) for i in range(c.n_layers)]
    stack, x = jax.tree.map(lambda *w: jnp.stack(w), *layers), random_x(c)

    @jax.jit
    def of_stack(stack, x, i):
        y, back = jax.vjp(lambda stack, x: stack.at_layer(i)(x, c), stack, x)
        return y, back(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    for i, layer in enumerate(layers):
        y, (of_layer, of_x) = outcome(layer, x, c)
        got, (of_layers, got_of_x) = of_stack(stack, x, i)
        close((got, got_of_x), (y, of_x))
        close(jax.tree.map(lambda w, i=i: w[i], of_layers), of_layer)
        assert all(not np.delete(np.asarray(w), i, axis=0).any() for w in jax.tree.leaves(of_layers))


@pytest.mark.parametrize('out_first', [False, True])
@pytest.mark.parametrize('rows', [5 * grouped.MANY + 3, 200])
def test_kernels_equal_one_product_per_group(out_first, rows):
    """With more and with fewer rows than fill large tiles, widths that no tile divides, an empty group, and rows beyond
    all groups; by numpy in float64."""
    rng = np.random.default_rng(3)
    sizes = np.array([rows // 2, 0, 1, rows // 4 + 1, 7])
    i, o, ends = 70, grouped.COLUMNS + 22, np.cumsum(sizes)
    x, w = rng.standard_normal((rows, i)), rng.standard_normal((2, 5, i, o))
    g = rng.standard_normal((rows, o))
    stored = w.swapaxes(2, 3) if out_first else w

    def product(x, w):
        return grouped.dot(x, grouped.pick(w[1], w, 1), jnp.asarray(sizes, jnp.int32), out_first)

    y, back = jax.vjp(product, jnp.asarray(x, jnp.float32), jnp.asarray(stored, jnp.float32))
    d_x, d_w = back(jnp.asarray(g, jnp.float32))
    d_w = np.asarray(d_w).swapaxes(2, 3) if out_first else d_w
    at = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    want = [
        np.concatenate([a[s] @ of(w[1, e]) for e, s in enumerate(at)]) for a, of in ((x, np.asarray), (g, np.transpose))
    ]
    close((y[: ends[-1]], d_x[: ends[-1]]), tuple(want))
    close(d_w[1], np.stack([x[s].T @ g[s] for s in at]))
    assert not np.asarray(d_w[0]).any()
    assert np.unique(y[ends[-1] :]).size == 1, 'a tile has written rows that are not of its group'


def test_says_what_is_slow(monkeypatch):
    assert moe.slow('auto', 6) == moe.slow('ragged', 6) == ''
    assert 'subject.experts=triton interprets' in moe.slow('triton', 6)
    monkeypatch.setattr(sharding, 'platform', lambda: 'gpu')
    assert 'by all 6 experts' in moe.slow('ragged', 6) and moe.slow('auto', 6) == moe.slow('triton', 6) == ''


@EVERY
def test_bfloat16(how):
    """The result is within two roundings of float64 on the same rounded weights, choices included."""
    m, x = random_moe(SIX, dtype=jnp.bfloat16), random_x(SIX, dtype=jnp.bfloat16)
    y = apply(m, x, dataclasses.replace(SIX, experts=how))
    assert y.dtype == jnp.bfloat16
    close(y, numpy_moe(m, SIX, x)[0], jnp.bfloat16, steps=2)


def test_bfloat16_logits_are_rounded_once():
    """Expert 1 is ahead of 0 by less than bfloat16 shows: a tie, which the first wins. Expert 3 is ahead of 2
    by as much as bfloat16 shows, but only when its product is not rounded before its bias is added."""
    import torch
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    w, b = np.zeros((24, 6), np.float32), np.full(6, -50, np.float32)
    w[0, :4], w[1, 1] = [2, 2, 1, 1], 2**-8
    w[1, 3], b[:4] = 2**-8, [0, 0, 0, 2**-8]
    x = np.zeros((1, 2, 24), np.float32)
    x[0, :, :2] = 1
    m = random_moe(SIX, dtype=jnp.bfloat16)
    m.router_w, m.router_bias = (nnx.Param(jnp.asarray(a, jnp.bfloat16)) for a in (w, b))
    choice, weights = m.route(jnp.asarray(x, jnp.bfloat16), 4)
    assert choice[0].tolist() == [[0, 1, 3, 2]] * 2

    router = GptOssTopKRouter(GptOssConfig(hidden_size=24, num_local_experts=6, num_experts_per_tok=4))
    router.load_state_dict({'weight': torch.tensor(w.T), 'bias': torch.tensor(b)})
    logits, their_weights, _ = router.bfloat16()(torch.tensor(x[0]).bfloat16())
    assert logits[0, :4].tolist() == [2, 2, 1, 1 + 2**-7]
    assert weights.dtype == jnp.float32
    close(weights[0], their_weights.detach().float(), jnp.bfloat16, steps=2)


def test_packed_equals_its_dequantised_weights():
    m, x = random_moe(PACKED), random_x(PACKED)
    assert m.gate_up_blocks.shape == (6, 2, 64, 3, 16) and m.gate_up_scales.shape == (6, 2, 64, 3)
    assert m.down_blocks.shape == (6, 96, 2, 16) and m.down_scales.shape == (6, 96, 2)
    want, clipped, _ = numpy_moe(m, PACKED, x)
    assert (clipped > 0).all()
    close(apply(m, x, PACKED), want)


@pytest.mark.slow
def test_the_gradient_of_packed_experts_on_a_mesh_is_that_of_their_dequantised_weights():
    m, x = random_moe(PACKED), random_x(PACKED)
    unpacked_c = dataclasses.replace(PACKED, packed=False, experts='dense')
    unpacked = random_moe(unpacked_c)
    unpacked.gate_up, unpacked.down = (nnx.Param(w) for w in matrices(m, PACKED))
    unpacked.router_w = m.router_w

    @functools.partial(jax.jit, static_argnames='c')
    def y_and_gradient(m, x, c):
        y, back = jax.vjp(lambda x: m(x, c), x)
        cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, back(sharding.reshard(cotangent, sharding.ACT))[0]

    want = jax.device_get(y_and_gradient(unpacked, x, unpacked_c))
    mesh = sharding.make_mesh(2, 2)
    with jax.set_mesh(mesh):
        got = y_and_gradient(place(m, mesh), jax.device_put(x, NamedSharding(mesh, sharding.ACT)), PACKED)
    close(jax.device_get(got), want)


def test_initial_values_are_moderate_either_way():
    for c in (PACKED, dataclasses.replace(PACKED, packed=False)):
        gate_up, down = (np.asarray(w) for w in matrices(MoE(c, rngs=nnx.Rngs(0), dtype=jnp.float32), c))
        assert 0.5 < gate_up.std() * 96**0.5 < 2
        assert 0.5 < down.std() * (64 * 2 * c.n_layers) ** 0.5 < 2


def test_a_stack_is_made_by_vmap():
    for c, layer in ((SIX, (6, 2, 40, 24)), (PACKED, (6, 2, 64, 3, 16))):
        keys = jax.random.split(jax.random.key(0), c.n_layers)
        stack = jax.eval_shape(jax.vmap(lambda k, c=c: MoE(c, rngs=nnx.Rngs(k), dtype=jnp.float32)), keys)
        assert (stack.gate_up_blocks if c.packed else stack.gate_up).shape == (c.n_layers, *layer)


def test_packed_widths_must_be_multiples_of_the_block():
    with pytest.raises(LensError, match='d_model=24'):
        MoE(dataclasses.replace(SIX, packed=True), rngs=nnx.Rngs(0), dtype=jnp.float32)
