"""Subject, decoder and encoder: read, patch, inject, score, sample, read out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import losses, sampling
from lens.models import decoder as dec
from lens.models import lora, subject
from lens.models.encoder import encode
from tests.conftest import LAYER, LENGTH, TINY, make_lens

K = TINY.n_layers


@pytest.fixture(scope='module')
def activations(base, batch):
    a = subject.read(base, batch['tokens'], batch['positions'], LAYER)
    return a.reshape(-1, TINY.d_model)[:6]


@pytest.mark.parametrize('layer', range(K))
def test_read_is_the_output_of_the_block_before_any_norm(base, batch, layer):
    a = subject.read(base, batch['tokens'], batch['positions'], layer)
    x = np.asarray(base.run_layers(base.embed(batch['tokens']), 0, layer + 1))
    for b, row in enumerate(batch['positions']):
        for v, p in enumerate(row):
            np.testing.assert_array_equal(a[b, v], x[b, p])


def test_read_has_no_gradient(base, batch):
    grads = jax.grad(lambda m: subject.read(m, batch['tokens'], batch['positions'], LAYER).sum())(base)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('layer', range(K))
def test_patching_the_activation_itself_reproduces_the_logits(base, batch, layer):
    position = batch['positions'][:, 0]
    a = subject.read(base, batch['tokens'], batch['positions'], layer)[:, 0]
    np.testing.assert_allclose(
        subject.patch(base, batch['tokens'], position, a, layer), base(batch['tokens']), atol=1e-6
    )


def test_patching_another_vector_changes_this_and_later_positions_only(base, batch):
    position = batch['positions'][:, 0]
    a = np.ones((8, TINY.d_model), np.float32)
    change = np.abs(subject.patch(base, batch['tokens'], position, a, LAYER) - base(batch['tokens'])).max(-1)
    for b, p in enumerate(position):
        assert not change[b, :p].any() and (change[b, p:] > 1e-4).all()


def test_stream_norms_match_a_loop(base, tokens):
    lengths = np.array([11, 7, 9, 11, 8, 10, 11, 0], np.int32)
    got = subject.stream_norms(base, tokens, lengths, skip=3)
    for k in range(K + 1):
        x = np.asarray(base.run_layers(base.embed(tokens), 0, k))
        values = [np.linalg.norm(x[b, t]) for b in range(8) for t in range(3, lengths[b])]
        np.testing.assert_allclose(got[k], np.mean(values), rtol=1e-5)


def decoder_by_hand(lens, base, a_D, ids_T, patched, shared=False):
    """Logits of every explanation token, one block at a time on one row, without cache or scan."""
    d = lens.decoder
    maps = [np.asarray(a_D) @ np.asarray(w) + np.asarray(b) for w, b in zip(d.maps_w[...], d.maps_b[...], strict=True)]
    x = jnp.concatenate([d.prompt_left[...], maps[0][None], d.prompt_right[...], base.embedding[...][ids_T[:-1]]])[None]
    for k in range(K):
        if k < patched:
            x = x.at[0, 2].set(maps[0 if shared else k])
        x = base.run_layers(x, k, k + 1)
    x = base.final_norm(x, TINY.norm_eps)[0, 3:]
    return x @ base.head[...]


@pytest.mark.parametrize(('patched', 'shared'), [(0, False), (1, False), (2, False), (3, True)])
def test_score_equals_the_decoder_written_by_hand(base, activations, patched, shared):
    lens = make_lens(base, patched=patched, shared=shared)
    ids = np.random.default_rng(5).integers(0, TINY.vocab_size, (6, LENGTH))
    logp, entropy = dec.score(lens.decoder, base, activations, ids)
    for i in range(6):
        logits = decoder_by_hand(lens, base, activations[i], ids[i], patched, shared)
        p = np.asarray(jax.nn.softmax(logits, -1), np.float64)
        np.testing.assert_allclose(logp[i], np.log(p[np.arange(LENGTH), ids[i]]), atol=1e-5)
        np.testing.assert_allclose(entropy[i], -(p * np.log(p)).sum(-1), atol=1e-5)


def test_soft_prompts_reach_the_text(base, activations):
    lens = make_lens(base, patched=1)
    ids = np.zeros((6, LENGTH), np.int32)
    a = dec.score(lens.decoder, base, activations, ids)[0]
    moved = jax.tree.map(lambda x: x, lens.decoder)
    moved.prompt_left[...] = moved.prompt_left[...] + 1
    assert np.abs(dec.score(moved, base, activations, ids)[0] - a).max() > 1e-3


@pytest.mark.parametrize('own_base', [False, True])
def test_sampler_and_scorer_agree(base, activations, own_base):
    lens = make_lens(base, own_base=own_base)
    s = sampling.sample(lens.decoder, base, activations, jax.random.key(0), length=LENGTH, group=3)
    assert s.ids_NxT.shape == (18, LENGTH)
    logp, _ = dec.score(lens.decoder, base, subject.tile_rows(activations, 3), s.ids_NxT)
    np.testing.assert_allclose(s.logp_NxT, logp, atol=1e-5)


def test_sampler_uses_its_own_base_when_it_has_one(base, activations):
    lens = make_lens(base, own_base=True)
    zero = jax.tree.map(jnp.zeros_like, base)
    a = sampling.sample(lens.decoder, base, activations, jax.random.key(0), length=LENGTH)
    b = sampling.sample(lens.decoder, zero, activations, jax.random.key(0), length=LENGTH)
    np.testing.assert_array_equal(a.ids_NxT, b.ids_NxT)


def test_group_members_differ_and_share_their_activation(base, lens, activations):
    s = sampling.sample(lens.decoder, base, activations, jax.random.key(0), length=LENGTH, group=4)
    groups = np.asarray(s.ids_NxT).reshape(6, 4, LENGTH)
    assert all(len(np.unique(g, axis=0)) > 1 for g in groups)
    rows, _ = dec.score(lens.decoder, base, activations[2:3], groups[2][:1])
    np.testing.assert_allclose(s.logp_NxT[8:9], rows, atol=1e-5)


def test_greedy_takes_the_most_probable_token(base, lens, activations):
    s = sampling.sample(lens.decoder, base, activations, jax.random.key(0), length=LENGTH, temperature=0.0)
    for i in range(6):
        logits = decoder_by_hand(lens, base, activations[i], np.asarray(s.ids_NxT[i]), 2)
        np.testing.assert_array_equal(np.argmax(logits, -1), s.ids_NxT[i])


def test_temperature_per_activation(base, lens, activations):
    """Rows at temperature 0 are the greedy ones, rows at 1 the sampled ones."""
    draw = functools.partial(sampling.sample, lens.decoder, base, activations, jax.random.key(0), length=LENGTH)
    mixed = draw(temperature=jnp.asarray([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])).ids_NxT
    sampled, greedy = draw().ids_NxT, draw(temperature=0.0).ids_NxT
    np.testing.assert_array_equal(mixed, np.where([[0], [1], [0], [1], [1], [0]], sampled, greedy))
    assert (sampled != greedy).any()


def test_first_token_frequencies_are_the_softmax(base, lens, activations):
    n = 20000
    s = sampling.sample(lens.decoder, base, activations[:1], jax.random.key(4), length=2, group=n)
    logits, _ = dec.prefill(lens.decoder, base, activations[:1], 1)
    p = np.asarray(jax.nn.softmax(logits[0]), np.float64)
    freq = np.bincount(np.asarray(s.ids_NxT[:, 0]), minlength=TINY.vocab_size) / n
    z = (freq - p) / np.sqrt(p * (1 - p) / n)
    assert np.abs(z).max() < 4.5 and p.max() < 0.9


def test_samples_repeat_with_the_key_and_change_with_it(base, lens, activations):
    draw = [
        sampling.sample(lens.decoder, base, activations, jax.random.key(k), length=LENGTH).ids_NxT for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()


def test_natural_log_probs_are_the_untouched_base(base):
    ids = np.random.default_rng(5).integers(0, TINY.vocab_size, (2, LENGTH))
    got = losses.token_log_probs(dec.natural_logits(base, jnp.asarray([3, 1, 9]), ids), ids)
    full = np.concatenate([np.tile([3, 1, 9], (2, 1)), ids], axis=1)
    logp = np.asarray(jax.nn.log_softmax(base(full), -1))
    for b in range(2):
        for t in range(LENGTH):
            np.testing.assert_allclose(got[b, t], logp[b, 2 + t, ids[b, t]], atol=1e-5)


def test_encoder_by_hand_and_stops_at_its_block(base, lens):
    ids = np.random.default_rng(6).integers(0, TINY.vocab_size, (4, LENGTH))
    e = lens.encoder
    for b in range(4):
        x = jnp.concatenate([e.prompt_left[...], base.embedding[...][ids[b]], e.prompt_right[...]])
        x = x.at[-1].add(e.special_last[...])
        y = base.run_layers(x[None], 0, LAYER + 1)[0, -1] @ e.readout_w[...] + e.readout_b[...]
        np.testing.assert_allclose(encode(e, base, ids)[b], y, atol=1e-5)
    grads = jax.grad(lambda m: encode(e, m, ids).sum())(base)
    assert not np.any(grads.blocks.mlp.up[...][LAYER + 1 :]) and np.any(grads.blocks.mlp.up[...][LAYER])


@pytest.mark.parametrize('pattern', ['q|k|v|o', 'gate|up|down', '.*'])
def test_adapters_are_neutral_at_the_start_and_equal_merged_weights(base, tokens, pattern):
    adapters = lora.init_adapters(base.blocks, TINY.n_layers, pattern, 2, 4.0, jax.random.key(0))
    x = base.embed(tokens)
    plain = base.run_layers(x, 0, K)
    np.testing.assert_array_equal(base.run_layers(x, 0, K, adapters=adapters), plain)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda w: w + 0.3 * rng.standard_normal(w.shape).astype(np.float32), adapters)
    merged = jax.tree.map(lambda w: w, base)
    for name, ab in adapters.items():
        group = getattr(merged.blocks, lora.MATRICES[name][0])
        w = getattr(group, name)
        n_in = w.ndim - 1 - lora.MATRICES[name][1]
        a, b = np.asarray(ab['a']), np.asarray(ab['b'])
        delta = np.einsum('lir,lro->lio', a.reshape(K, -1, 2), b.reshape(K, 2, -1))
        assert a.ndim == n_in + 2
        setattr(group, name, type(w)(w[...] + delta.reshape(w.shape)))
    got = base.run_layers(x, 0, K, adapters=adapters)
    np.testing.assert_allclose(got, merged.run_layers(x, 0, K), rtol=1e-4, atol=1e-4)
    assert np.abs(got - plain).max() > 0.1


def test_adapter_pattern_that_matches_nothing_is_refused(base):
    with pytest.raises(ValueError, match='matches none of the matrices of this model: q, k, v'):
        lora.init_adapters(base.blocks, TINY.n_layers, 'query', 2, 4.0, jax.random.key(0))


def test_token_log_probs_on_sharded_vocabulary_need_no_gather(base, tokens):
    logp = losses.token_log_probs(base(tokens)[:, :-1], tokens[:, 1:])
    full = np.asarray(jax.nn.log_softmax(base(tokens)[:, :-1], -1))
    np.testing.assert_allclose(logp, np.take_along_axis(full, tokens[:, 1:, None], -1)[..., 0], atol=1e-5)
