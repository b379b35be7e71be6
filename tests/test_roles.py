"""Subject, decoder and encoder: read, patch, sample, score, read out. What is injected how: test_injection."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import sampling
from lens.models import lora, subject
from lens.models.encoder import encode
from tests import programs
from tests.compare import close, differs
from tests.conftest import LAYER, LENGTH, TINY, make_lens

L = TINY.n_layers
KEY = jax.random.key(0)


@pytest.fixture(scope='module')
def activations(base, batch):
    a = programs.activations(base, batch['tokens'], batch['positions'], layer=LAYER)
    return a.reshape(-1, TINY.d_model)[:8]


@pytest.mark.parametrize('layer', [LAYER, L - 1])
def test_activations_are_the_output_of_the_block_before_any_norm(base, batch, layer):
    stream = programs.hidden(base, batch['tokens'])[1][layer + 1]
    want = np.take_along_axis(np.asarray(stream), batch['positions'][..., None], axis=1)
    close(programs.activations(base, batch['tokens'], batch['positions'], layer=layer), want)


def test_reading_has_no_gradient(base, batch):
    @jax.jit
    @jax.grad
    def gradient(model):
        return subject.activations(model, batch['tokens'], batch['positions'], LAYER).sum()

    assert all(not np.any(g) for g in jax.tree.leaves(gradient(base)))


def test_patching_changes_this_and_later_positions_only_and_nothing_by_the_activation_itself(base, batch):
    tokens, position = batch['tokens'], batch['positions'][:, 0]
    natural = programs.hidden(base, tokens)[0]
    own = programs.activations(base, tokens, batch['positions'], layer=LAYER)[:, 0]
    close(programs.patch(base, tokens, position, own, layer=LAYER), natural)
    patched = programs.patch(base, tokens, position, jnp.ones_like(own), layer=LAYER)
    for b, p in enumerate(position):
        close(patched[b, :p], natural[b, :p])
        for t in range(p, tokens.shape[1]):
            differs(patched[b, t], natural[b, t])


def test_stream_norms_match_a_loop(base, tokens):
    lengths = np.array([11, 7, 9, 11, 8, 10, 11, 0], np.int32)
    streams = np.asarray(programs.hidden(base, tokens)[1], np.float64)
    want = [np.mean([np.linalg.norm(x[b, t]) for b in range(8) for t in range(3, lengths[b])]) for x in streams]
    got = jax.jit(subject.stream_norms, static_argnames='skip')(base, tokens, lengths, skip=3)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('own_base', [False, True])
def test_samples_are_the_scorers_exact_draws(base, lens, activations, own_base):
    """Token t is the argmax of the scorer's logits and the noise of the token, rows of one activation side by side;
    rows at temperature 0 are greedy. A decoder with a base of its own never looks at the other one."""
    group, temperature = 3, np.linspace(0, 1.4, 8, dtype=np.float32)
    d = make_lens(base, own_base=True).decoder if own_base else lens.decoder
    model = d.base if own_base else base
    given = jax.tree.map(jnp.zeros_like, base) if own_base else base
    s = programs.sample(d, given, activations, KEY, length=LENGTH, group=group, temperature=temperature)
    ids = np.asarray(s.ids_NxT)
    a, temperature = (np.repeat(np.asarray(x), group, axis=0) for x in (activations, temperature))
    logits = programs.decode_by_hand(d, model, a, ids)
    close(s.logp_NxT, np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[..., None], -1)[..., 0])
    noise = np.stack([sampling.noise(KEY, t, (len(ids), TINY.vocab_size)) for t in range(LENGTH)], axis=1)
    best = logits + temperature[:, None, None] * noise
    chosen = np.take_along_axis(best, ids[..., None], -1)[..., 0]
    close(chosen, best.max(-1))
    assert all(len(np.unique(rows, axis=0)) > 1 for rows in ids.reshape(-1, group, LENGTH)[1:])


def test_samples_repeat_with_the_key_and_change_with_it(base, lens, activations):
    draw = [
        programs.sample(
            lens.decoder,
            base,
            activations,
            jax.random.key(k),
            length=LENGTH,
            group=3,
            temperature=np.ones(8, np.float32),
        ).ids_NxT
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()


def test_frequencies_of_draws_are_the_softmax():
    n, logits = 20000, np.random.default_rng(0).normal(size=9).astype(np.float32)
    rows = jnp.broadcast_to(logits, (n, 9))
    draws = jnp.argmax(sampling.perturbed(rows, KEY, 0, jnp.ones(n)), axis=-1)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    z = (np.bincount(np.asarray(draws), minlength=9) / n - p) / np.sqrt(p * (1 - p) / n)
    assert np.abs(z).max() < 4.5 and p.max() < 0.9


def test_natural_logits_are_the_untouched_bases(base):
    ids = np.random.default_rng(5).integers(0, TINY.vocab_size, (8, 11))
    ids[:, :3] = [3, 1, 9]
    got = programs.natural_logits(base, jnp.asarray([3, 1, 9]), ids[:, 3:])
    close(got, programs.hidden(base, ids)[0][:, 2:-1])


def test_encoder_by_hand_and_stops_at_its_block(base, lens):
    ids = np.random.default_rng(6).integers(0, TINY.vocab_size, (8, LENGTH))
    close(programs.encode(lens.encoder, base, ids), programs.encode_by_hand(lens.encoder, base, ids))
    grads = jax.jit(jax.grad(lambda m: encode(lens.encoder, m, ids).sum()))(base)
    assert not np.any(grads.blocks.mlp.up[...][LAYER + 1 :]) and np.any(grads.blocks.mlp.up[...][LAYER])


def test_adapters_are_neutral_at_the_start_and_equal_merged_weights(base, tokens):
    """Every matrix at once, each with an update of its own; merged by hand and by lora.merge."""
    adapters = lora.init_adapters(base.blocks, L, '.*', 2, 4.0, KEY)
    assert set(adapters) == set(lora.MATRICES)
    x = base.embed(tokens)
    plain = programs.layers(base, x)
    close(programs.layers(base, x, adapters), plain)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda w: w + 0.3 * rng.standard_normal(w.shape).astype(np.float32), adapters)
    merged = jax.tree.map(lambda w: w, base)
    for name, ab in adapters.items():
        group = getattr(merged.blocks, lora.MATRICES[name][0])
        w = getattr(group, name)
        a, b = np.asarray(ab['a']), np.asarray(ab['b'])
        assert a.ndim == w.ndim + 1 - lora.MATRICES[name][1]
        delta = np.einsum('lir,lro->lio', a.reshape(L, -1, 2), b.reshape(L, 2, -1))
        setattr(group, name, type(w)(w[...] + delta.reshape(w.shape)))
    got = programs.layers(base, x, adapters)
    close(got, programs.layers(merged, x), steps=1024)
    close(lora.merge(base, adapters), merged)
    differs(got, plain)


def test_adapter_pattern_that_matches_nothing_is_refused(base):
    with pytest.raises(ValueError, match='matches none of the matrices of this model: q, k, v'):
        lora.init_adapters(base.blocks, L, 'query', 2, 4.0, KEY)


def products(jaxpr, outside=''):
    """The scopes of every matrix product below a jaxpr, those of the programs around it included."""
    for e in jaxpr.eqns:
        names = f'{outside}/{e.source_info.name_stack}'
        if e.primitive.name == 'dot_general':
            yield set(re.findall(r'\w+', names))
        for value in e.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    yield from products(inner, names)


def test_scopes_name_the_work_through_jit_scan_and_gradient(base, lens, batch):
    """Every product belongs to one of them, forwards and backwards; in blocks, to attention or an MLP."""

    @jax.jit
    def loss(lens):
        a = subject.activations(base, batch['tokens'], batch['positions'], LAYER).reshape(-1, TINY.d_model)
        ids = sampling.sample(jax.lax.stop_gradient(lens.decoder), base, a, KEY, length=LENGTH).ids_NxT
        logp, _ = programs.score(lens.decoder, base, a, ids)
        return jnp.sum(logp) + jnp.sum((encode(lens.encoder, base, ids) - a) ** 2)

    found = list(products(jax.make_jaxpr(jax.grad(loss))(lens).jaxpr))
    work = {'read', 'prefill', 'decode', 'score', 'encode'}
    assert all(len(names & work) == 1 for names in found), [n for n in found if len(n & work) != 1]
    inside = [names for names in found if 'block' in names]
    assert all(len(names & {'attention', 'mlp'}) == 1 for names in inside)
    for part in work:
        assert {'attention', 'mlp'} <= set.union(*(names for names in inside if part in names)), part
    assert {'score', 'encode'} == {p for p in work if any('transpose' in n for n in found if p in n)}


def test_every_token_and_every_row_has_noise_of_its_own():
    """Else a decoder would like the same words at each token of a text."""
    noise_TxNxV = np.stack([sampling.noise(jax.random.key(3), t, (4, 500)) for t in range(3)]).astype(np.float64)
    rows = noise_TxNxV.reshape(12, 500)
    correlation = np.corrcoef(rows)[~np.eye(12, dtype=bool)]
    assert np.abs(correlation).max() < 0.3  # 500 independent pairs: 0.045 is one standard deviation
    assert abs(rows.mean() - np.euler_gamma) < 0.1, 'standard Gumbel'
