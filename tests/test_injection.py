"""How an activation enters a prompt: formulas on hand numbers, every injection against the stack by hand, a new one."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import base as base_config
from lens import sharding
from lens.errors import LensError
from lens.models import decoder as dec
from lens.models import injection
from lens.models.decoder import Decoder, DecoderConfig, scaled_identity
from lens.models.injection import Add, Affine, Injection, Replace
from tests import programs
from tests.compare import close
from tests.conftest import LAYER, LENGTH, TINY

MARKER = 11
CASES = {
    'input': (Affine(0), ()),
    'two blocks': (Affine(2), ()),
    'shared map and two slots': (Affine(3, True), (0,)),
    'replace': (Replace(5.0), (0,)),
    'add': (Add(), (0,)),
}


def test_overwriting_and_fixed_norms_by_hand():
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, 5, 4)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    want = x.copy()
    want[:, 1] = want[:, 3] = v
    np.testing.assert_array_equal(injection.overwrite(x, (1, 3), jnp.asarray(v)), want)
    close(injection.fixed_norm(v, 30.0), v / np.linalg.norm(v, axis=-1, keepdims=True) * 30)
    assert not np.asarray(injection.fixed_norm(jnp.zeros((1, 4)), 30.0)).any()
    assert np.isfinite(jax.grad(lambda v: injection.fixed_norm(v, 2.0).sum())(jnp.full((1, 4), 1e-20))).all()


def test_norm_matched_addition_by_hand():
    h, v = np.array([[[3.0, 4.0], [1.0, 1.0]]]), np.array([[0.0, 2.0]])
    out, back = jax.vjp(lambda h: injection.add_norm_matched(h, (0,), jnp.asarray(v)), jnp.asarray(h))
    close(out, np.array([[[3.0, 9.0], [1.0, 1.0]]]))
    # d/dh of h + |h| v/|v|: 1 + h_i/|h| in the direction of v
    close(back(jnp.ones_like(out))[0], np.array([[[1.6, 1.8], [1.0, 1.0]]]))


def make_decoder(base, inject, more=(), own_base=False):
    """Nothing of it is at its initial value."""
    maps = None
    if inject.n_maps:
        maps = scaled_identity(inject, LAYER, 1.0, TINY.d_model, np.arange(1, 5, dtype=np.float32))
    config = DecoderConfig(inject, LAYER, more, MARKER)
    rng = np.random.default_rng(2)
    decoder = Decoder(config, [3, 7], [9], base, maps, own_base=own_base, adapters=None)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), decoder)


@pytest.fixture(scope='module')
def given():
    """(activations, explanations)"""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(8, TINY.d_model)).astype(np.float32)
    return a, rng.integers(0, TINY.vocab_size, (8, LENGTH)).astype(np.int32)


@pytest.mark.parametrize('case', CASES)
def test_every_injection_equals_the_stack_by_hand(base, given, case):
    decoder = make_decoder(base, *CASES[case])
    assert decoder.slots == ((0, 1) if CASES[case][1] else (0,))
    logits = programs.decode_by_hand(decoder, base, *given)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    logp, entropy = programs.score(decoder, base, *given)
    close(logp, np.take_along_axis(log_p, given[1][..., None], -1)[..., 0])
    close(entropy, -(np.exp(log_p) * log_p).sum(-1))


@pytest.mark.parametrize('case', ['two blocks', 'replace'])  # with a hook, without
def test_what_stands_left_of_the_slots_may_run_once(base, given, case, monkeypatch):
    """The same stream, and the same gradients of activations and of what a decoder trains."""
    decoder = make_decoder(base, *CASES[case])
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((8, LENGTH, TINY.d_model)), jnp.float32)

    def run():
        def value(decoder, a):
            return (dec.teacher_forced(decoder, base, a, jnp.asarray(given[1])) * weight).sum()

        return jax.jit(jax.value_and_grad(value, (0, 1)))(decoder, jnp.asarray(given[0]))

    among = run()
    monkeypatch.setattr(dec, 'PASS_TOKENS', 0)
    jax.tree.map(lambda x, y: close(x, y, steps=1024), run(), among)


@pytest.mark.parametrize(('case', 'own_base'), [('two blocks', False), ('replace', False), ('add', True)])
def test_a_marked_prompt_is_words_of_the_table_of_the_model_that_reads_it(base, given, case, own_base):
    """Of its own base where it trains one, which is another than the frozen one here."""
    decoder, soft = make_decoder(base, *CASES[case], own_base=own_base), case == 'two blocks'
    names = {sharding.path(kp) for kp, _ in jax.tree_util.tree_leaves_with_path(decoder)}
    assert {n for n in names if n.startswith('prompt')} == ({'prompt_left', 'prompt_right'} if soft else set())
    if own_base:
        first = jax.jit(jax.value_and_grad(lambda d: dec.prefill(d, base, jnp.asarray(given[0]))[0][:, 0].sum()))
        got, grad = first(decoder)
        close(got, programs.decode_by_hand(decoder, decoder.base, *given)[:, 0, 0].sum(), steps=1024)
        moved = np.flatnonzero(np.abs(grad.base.embedding[...]).sum(1))
        assert moved.tolist() == [3, 7, MARKER], 'the prompt and the marker train with the table'


def test_added_while_sampling_as_while_scoring(base, given):
    """Also without remat: the hook is inside the checkpoint."""
    decoder = make_decoder(base, *CASES['add'])
    s = programs.sample(decoder, base, given[0], jax.random.key(3), length=LENGTH)
    close(programs.score(decoder, base, given[0], s.ids_NxT)[0], s.logp_NxT)
    kept = jax.tree.map(lambda x: x, base)
    kept.config = dataclasses.replace(base.config, remat='dots')
    close(programs.score(decoder, kept, given[0], s.ids_NxT)[0], s.logp_NxT)


def config(**changes):
    d = base_config.get_config().decoder
    d.update(changes)
    return d


@pytest.mark.parametrize(
    ('changes', 'want', 'settings'),
    [
        (
            {'patched_blocks': -1},
            Affine(3),
            {'decoder.injection': 'affine', 'decoder.patched_blocks': 3, 'decoder.shared_map': False},
        ),
        ({'injection': 'replace'}, Replace(24**0.5), {'decoder.injection': 'replace', 'decoder.norm': 24**0.5}),
        ({'injection': 'replace', 'norm': 7}, Replace(7.0), {'decoder.injection': 'replace', 'decoder.norm': 7.0}),
        ({'injection': 'add', 'marker': '#'}, Add(), {'decoder.injection': 'add'}),
    ],
)
def test_of_a_configuration_and_back(changes, want, settings):
    got = injection.of_config(config(**changes), TINY)
    assert got == want and hash(got) == hash(want) and got.settings() == settings


@pytest.mark.parametrize(
    ('changes', 'n_layers', 'message'),
    [
        ({'injection': 'spell'}, 3, "decoder.injection='spell' is not one of affine, replace, add"),
        ({'patched_blocks': 4}, 3, r'decoder.patched_blocks=4 is not in -1\.\.3, the blocks of the subject'),
        ({'patched_blocks': -2}, 3, r'decoder.patched_blocks=-2 is not in -1\.\.3'),
        ({'injection': 'replace', 'norm': -1.0}, 3, r'decoder.norm=-1.0 must not be negative'),
        ({'injection': 'add', 'marker': '#'}, 2, r'add writes at block 2, the subject has 2 blocks'),
        ({'injection': 'add', 'marker': ''}, 3, r'add needs decoder.marker, a text of one token for the slot'),
    ],
)
def test_impossible_values_are_refused(changes, n_layers, message):
    with pytest.raises(LensError, match=message):
        injection.of_config(config(**changes), dataclasses.replace(TINY, n_layers=n_layers))


@dataclasses.dataclass(frozen=True)
class Halved(Injection):
    """One map, a share of which is added to the slot at the entrance of a block: not of this package."""

    block: int
    name = 'halved'
    n_maps = 1

    @classmethod
    def from_config(cls, d, c):
        return cls(min(d.block, c.n_layers - 1))

    def enter(self, decoder, model, a_BxD):
        value = 0.5 * (a_BxD @ decoder.maps_w[...][0] + decoder.maps_b[...][0])

        def add(x, block):
            return jnp.where(block == self.block, injection.overwrite(x, decoder.slots, x[:, 2] + value), x)

        return 2 * value, add


def test_a_new_injection_is_one_class_and_one_entry(base, given, monkeypatch):
    monkeypatch.setitem(injection.INJECTIONS, 'halved', Halved)
    c = ml_collections.ConfigDict({'injection': 'halved', 'block': 1})
    decoder = make_decoder(base, injection.of_config(c, TINY))
    assert decoder.config.injection.settings() == {'decoder.injection': 'halved', 'decoder.block': 1}

    @jax.jit
    @jax.value_and_grad
    def run(decoder):
        logits, _ = dec.prefill(decoder, base, jnp.asarray(given[0]))
        return jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    got, grad = run(decoder)
    step = jax.tree.map(jnp.zeros_like, decoder)
    step.maps_w[...] = jnp.asarray(np.random.default_rng(1).normal(size=step.maps_w.shape), jnp.float32)
    ahead, behind = (run(jax.tree.map(lambda x, s, t=t: x + t * s, decoder, step))[0] for t in (1e-2, -1e-2))
    slope = np.vdot(grad.maps_w[...], step.maps_w[...])
    assert np.isfinite(got) and abs(slope - (ahead - behind) / 2e-2) < 0.02 * abs(slope) and abs(slope) > 1e-3


@pytest.mark.slow
def test_sharded_injection_is_unsharded_injection(base, given):
    @jax.jit
    @jax.value_and_grad
    def run(decoder, base, a, ids):
        return jnp.mean(jnp.sin(programs.teacher_forced_logits(decoder, base, a, ids)))

    decoder, mesh = make_decoder(base, *CASES['add']), sharding.make_mesh(2, 2)
    with jax.set_mesh(mesh):
        placed = sharding.put_batch(dict(zip(('a', 'ids'), given, strict=True)), mesh)
        got = run(sharding.place(decoder, mesh), sharding.place(base, mesh), placed['a'], placed['ids'])
        got = jax.tree.map(np.asarray, got)
    close(got, run(decoder, base, *given), steps=1024)


@pytest.mark.parametrize('inject', [Affine(2), Replace(5.0), Add()], ids=lambda x: x.name)
def test_one_vector_for_each_slot(base, inject):
    """Equal ones are one for all; the second alone changes what stands from its slot on, and no row before it."""
    decoder, rng = make_decoder(base, inject, more=(0,)), np.random.default_rng(5)
    a, b = rng.standard_normal((2, 2, TINY.d_model)).astype(np.float32)

    def stream(vectors):
        x, hook = dec.prompt_rows(decoder, base, jnp.asarray(vectors))
        return np.asarray(base.run_layers(base.enter(x), 0, TINY.n_layers, before_block=hook))

    one, same, other, swapped = (stream(v) for v in (a, np.stack([a, a], 1), np.stack([a, b], 1), np.stack([b, a], 1)))
    first, second = decoder.slots
    close(same, one)
    close(other[:, :second], one[:, :second])
    for x, at in ((other, second), (swapped, first), (swapped, second)):
        assert np.abs(x[:, at] - one[:, at]).max() > 1e-2
