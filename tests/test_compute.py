"""A base that trains has float32 weights, and products in the dtype of subject.compute."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from lens import export, gumbel, hf, lens_init, sampling, sharding
from lens.models.transformer import Transformer, cast
from lens.train import init_state, micro_step
from tests import programs
from tests.compare import close, differs
from tests.curves import curve
from tests.phases import phase_of
from tests.small_run import config, figures, train
from tests.tiny_world import LENGTH, TINY, make_base, make_lens

KEY = jax.random.key(7)
BF16 = 'bfloat16'
# what families differ in where a dtype could leak; all experts, since which are chosen may turn on a rounding
CONFIGS = {
    'llama': TINY,
    'gemma': dataclasses.replace(TINY, tied=True, norm='rms_offset', post_norms=True, qk_norm=True, embed_scale=5.0),
    'gpt2': dataclasses.replace(
        TINY, norm='layer', ropes=(), mlp='gelu_plain', qkv_bias=True, o_bias=True, mlp_bias=True
    ),
    'gptoss': dataclasses.replace(TINY, n_experts=4, top_k=4, sinks=True, qkv_bias=True, o_bias=True, windows=(4, 0)),
}


def with_compute(tree, dtype):
    """A copy of a model or of a lens whose own bases have their products in `dtype`."""
    copy = jax.tree.map(lambda x: x, tree)
    for model in [copy] if isinstance(copy, Transformer) else [copy.decoder.base, copy.encoder.base]:
        model.config = dataclasses.replace(model.config, compute=dtype)
    return copy


def like(tree, other):
    """The leaves of a tree in another one's structure."""
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(tree))


def steps(lens, n):
    """The state after n micro-steps on one batch, and the figures of each."""
    mesh, p = sharding.make_mesh(1, 1), phase_of('sft', steps=n)
    with jax.set_mesh(mesh):
        state, out = init_state(jax.tree.map(jnp.copy, lens), p, mesh), []
        rng = np.random.default_rng(3)
        batch = {
            'tokens': rng.integers(0, TINY.vocab_size, (8, 11)).astype(np.int32),
            'positions': np.tile(np.arange(4, 6, dtype=np.int32), (8, 1)),
            'explanations': rng.integers(0, TINY.vocab_size, (8, 2, LENGTH)).astype(np.int32),
        }
        for t in range(n):
            state, metrics = micro_step(p, state, make_base(), sharding.put_batch(batch, mesh), KEY, p.knobs(t))
            out.append({k: float(x) for k, x in metrics.items()})
    return state, out


@pytest.fixture(scope='module')
def own():
    return make_lens(make_base(), own_base=True)


@pytest.mark.parametrize('family', [pytest.param(f, marks=() if f == 'gemma' else pytest.mark.slow) for f in CONFIGS])
def test_logits_are_those_of_float32_up_to_roundings_of_the_stream(family, tokens):
    """And norms, the sums of a table's gradient and all that is returned to the weights are float32."""
    model = make_base(CONFIGS[family])
    low = with_compute(model, BF16)
    want, _ = programs.hidden(model, tokens)
    logits, streams = programs.hidden(low, tokens)
    assert logits.dtype == jnp.float32 and streams.dtype == jnp.bfloat16 == low.dtype
    close(logits, want, jnp.bfloat16, steps=4)
    differs(logits, want, 1e-3)

    def loss(model):
        return jnp.mean(jax.nn.logsumexp(model(tokens), axis=-1))

    grads, exact = jax.jit(jax.grad(loss))(low), jax.jit(jax.grad(loss))(model)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
    assert optax.tree.norm(jax.tree.map(jnp.subtract, grads, like(exact, grads))) < 0.05 * optax.tree.norm(exact)


def test_every_product_of_matrices_is_of_the_dtype(tokens):
    model = with_compute(make_base(), BF16)
    text = jax.jit(jax.value_and_grad(lambda m: m(tokens).mean())).lower(model).as_text()
    products = [line for line in text.splitlines() if 'stablehlo.dot_general' in line]
    operands = [line.rpartition(': (')[2].partition(')')[0] for line in products]
    assert len(products) > 20
    # but the two with cotangents of what is wanted in float32: the scores of attention
    assert sum('xf32>' in x for x in operands) == 2


def test_norms_and_bytes_stay_as_they_are():
    model = make_base(CONFIGS['gemma'])
    low = cast((model, jnp.ones(3, jnp.uint8)), BF16)
    for (kp, x), y in zip(jax.tree_util.tree_leaves_with_path(low[0]), jax.tree.leaves(model), strict=True):
        assert x.dtype == (jnp.float32 if 'norm' in sharding.path(kp) else jnp.bfloat16), sharding.path(kp)
        np.testing.assert_array_equal(x, y.astype(x.dtype))
    assert low[1].dtype == jnp.uint8
    assert cast(model, '') is model


def test_the_gradient_of_a_table_is_summed_in_float32():
    """A word that comes 1000 times: sums of ones in bfloat16 end at 256."""
    model, ids = with_compute(make_base(), BF16), jnp.full((10, 100), 7)
    grad = jax.grad(lambda m: m.lookup(ids).astype(jnp.float32).sum())(model)
    assert (grad.embedding[7] == 1000).all()


def test_float32_changes_nothing(tokens):
    one, other = make_base(), with_compute(make_base(), 'float32')
    np.testing.assert_array_equal(programs.hidden(one, tokens)[0], programs.hidden(other, tokens)[0])


@pytest.mark.slow
def test_thirty_steps_follow_those_of_float32(own):
    """All that is trained, its moments too, is float32; the losses go down the same way."""
    (_, want), (state, got) = steps(own, 30), steps(with_compute(own, BF16), 30)
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype('float32')}
    for name in ('loss_decoder', 'loss_encoder'):
        want_T, got_T = (np.array([m[name] for m in run]) for run in (want, got))
        assert want_T[-1] < 0.9 * want_T[0]
        np.testing.assert_allclose(got_T, want_T, rtol=0, atol=0.1 * np.ptp(want_T))
        assert (got_T != want_T).any()


@pytest.mark.slow
@pytest.mark.parametrize('form', ['full', 'two_pass'])
def test_gradients_through_words_are_those_of_float32_up_to_rounding(own, form):
    """Of the rows that draw the same words: a rounding may choose another one."""
    rng, n, base = np.random.default_rng(0), 16, make_base()
    a, up = (rng.standard_normal(s, np.float32) for s in ((n, TINY.d_model), (n, LENGTH, TINY.vocab_size)))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(decoder, weight_N):
        out = gumbel.rollout(decoder, base, a, base.table, KEY, length=LENGTH, tau=0.7, form=form)
        rows_N = jnp.sum(jnp.sin(out.words_NxTxW) * up[..., : TINY.d_model], (1, 2))
        rows_N += 0.1 * jnp.sum(jax.nn.log_softmax(out.stream.logits()) * up, (1, 2))
        return weight_N @ rows_N, out.ids_NxT

    sides = own.decoder, with_compute(own, BF16).decoder
    want_ids, got_ids = (gradient(x, jnp.zeros(n))[1] for x in sides)
    same_N = (want_ids == got_ids).all(axis=1)
    assert same_N.mean() > 0.7
    want, got = (gradient(x, same_N.astype(jnp.float32))[0] for x in sides)
    for (kp, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == jnp.float32 and 0 < jnp.linalg.norm(x - y) < 0.1 * jnp.linalg.norm(y), sharding.path(kp)


def test_a_sampler_with_weights_rounded_once_draws_what_the_scorer_scores(own):
    decoder, base = with_compute(own, BF16).decoder, make_base()
    a = np.random.default_rng(0).standard_normal((8, TINY.d_model)).astype(np.float32)
    s = programs.sample(decoder, base, a, KEY, length=LENGTH, group=3, temperature=jnp.ones(8))
    logp, _ = programs.score(decoder, base, np.repeat(a, 3, axis=0), s.ids_NxT)
    close(s.logp_NxT, logp, jnp.bfloat16, steps=4)
    once = jax.tree.map(lambda x: x, decoder)
    once.base = cast(decoder.base, decoder.base.dtype)
    again = programs.sample(once, base, a, KEY, length=LENGTH, group=3, temperature=jnp.ones(8))
    np.testing.assert_array_equal(s.ids_NxT, again.ids_NxT)
    np.testing.assert_array_equal(s.logp_NxT, again.logp_NxT)
    assert isinstance(s, sampling.Samples)


def test_no_second_copy_of_the_weights_is_made():
    c = dataclasses.replace(TINY, d_model=64, d_ff=384, n_layers=16, compute=BF16)
    model = jax.eval_shape(lambda: Transformer(c, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 3, 64), jnp.bfloat16)

    def loss(model, x):
        return model.run_layers(x, 3, 15).astype(jnp.float32).sum()

    for fn in (loss, jax.grad(loss)):
        memory = jax.jit(fn).lower(model, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.25 * sum(w.size * 4 for w in jax.tree.leaves(model.blocks))


@pytest.mark.parametrize(
    ('asked', 'platform', 'want'),
    [
        ('auto', 'cpu', 'float32'),
        ('auto', 'gpu', BF16),
        ('auto', 'tpu', BF16),
        ('float32', 'gpu', 'float32'),
        (BF16, 'cpu', BF16),
    ],
)
def test_auto_is_bfloat16_on_accelerators(world, asked, platform, want):
    cfg = config(world)
    cfg.subject.compute = asked
    device = jax.sharding.AbstractDevice(platform, None, platform)
    mesh = AbstractMesh((1, 1, 1), sharding.AXES, (jax.sharding.AxisType.Explicit,) * 3, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert lens_init.compute_of(cfg) == want
    assert lens_init.compute_of(config(world)) == 'float32'  # without a mesh: what JAX has


@pytest.mark.slow
def test_a_run_resumes_bit_by_bit_and_exports_its_float32_weights(world, tmp_path):
    cfg = config(world)
    cfg.phases, cfg.sft.steps, cfg.subject.compute = ('sft',), 6, BF16
    calm = train(cfg, tmp_path / 'calm')
    shutil.copytree(tmp_path / 'calm', tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again/checkpoints/6')
    assert figures(train(cfg, tmp_path / 'again')) == figures(calm)
    assert curve(tmp_path / 'again') == curve(tmp_path / 'calm')
    export.main(str(tmp_path / 'calm'), 'newest', str(tmp_path / 'out'), '', 'hf', False)
    model = hf.load_model(tmp_path / 'out/decoder')
    fine = model.blocks.mlp.up[...]
    assert fine.dtype == jnp.float32 and (fine != fine.astype(jnp.bfloat16)).any()
