"""An encoder that also reads the last tokens of the source: against explicit rows, one at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import losses, objectives
from lens.models.encoder import encode, encode_context
from tests import programs
from tests.compare import close, differs, size
from tests.tiny_world import LAYER, LENGTH, make_lens

CONTEXT = 4
KEY = jax.random.key(7)
HP = objectives.Hparams(layer=LAYER, length=LENGTH, group=3, context=CONTEXT)
KNOBS = dict.fromkeys(objectives.KNOBS, np.float32(0)) | {'mse_weight': np.float32(1.5), 'tau': np.float32(1)}
KNOBS |= {'kl_skip': np.int32(0), 'clip': np.float32(0.2)}
GRADIENT = jax.jit(objectives.gradient, static_argnums=(0, 5))
ENCODE, ENCODE_CONTEXT = jax.jit(encode), jax.jit(encode_context)


@pytest.fixture(scope='module')
def lens(base):
    out = make_lens(base, own_base=True)
    out.encoder.config = dataclasses.replace(out.encoder.config, context_tokens=CONTEXT)
    return out


@pytest.fixture(scope='module')
def early(batch):
    """Activations from the very beginning of texts on."""
    return batch | {'positions': np.stack([np.arange(8) % 5, 3 + np.arange(8)], axis=1).astype(np.int32)}


@pytest.fixture(scope='module')
def roll(base, early):
    return objectives.read(base, early, layer=LAYER, recent=CONTEXT + 2)


def rows_of(batch):
    """(tokens of the text, position) of every activation."""
    return [(row, p) for row, ps in zip(batch['tokens'], batch['positions'], strict=True) for p in ps]


def by_hand(encoder, base, words, shown, batch):
    """Reconstructions from explicit rows, each at its place in a padded batch: what follows a row is not seen."""
    left, right, special = (x[...] for x in (encoder.prompt_left, encoder.prompt_right, encoder.special_last))
    model, rows, last = encoder.base, [], []
    for ids, n, (text, p) in zip(words, shown, rows_of(batch), strict=True):
        context = text[max(0, p + 1 - n) : p + 1]
        table = model.embedding[...]
        row = jnp.concatenate([left, table[np.asarray(ids, int)], right, table[np.asarray(context, int)]])
        last.append(len(row) - 1)
        rows.append(jnp.pad(row.at[-1].add(special), ((0, 20 - len(row)), (0, 0))))
    x = model.run_layers(jnp.stack(rows), 0, LAYER + 1)[np.arange(len(rows)), np.asarray(last)]
    return x @ encoder.readout_w[...] + encoder.readout_b[...]


def test_the_source_is_what_stands_before_the_token_that_was_read(early, roll):
    for (text, p), got, at in zip(rows_of(early), roll.source.tokens_NxR, roll.source.position_N, strict=True):
        want = text[max(0, p - CONTEXT - 1) : p + 1]
        assert at == p
        np.testing.assert_array_equal(got[-len(want) :], want)


def test_words_and_context_are_read_as_one_row(base, lens, early, roll):
    ids = early['explanations'].reshape(-1, LENGTH)
    full = [CONTEXT] * 16
    got = ENCODE(lens.encoder, base, ids, roll.source)
    close(got, by_hand(lens.encoder, base, ids, full, early))
    start, length = np.arange(16) % 3, 1 + np.arange(16) % 3
    cut = [row[a : a + n] for row, a, n in zip(ids, start, length, strict=True)]
    close(ENCODE(lens.encoder, base, ids, roll.source, (start, length)), by_hand(lens.encoder, base, cut, full, early))
    shown = np.arange(16) % (CONTEXT + 1)
    close(ENCODE_CONTEXT(lens.encoder, base, roll.source, shown), by_hand(lens.encoder, base, [()] * 16, shown, early))
    e = jax.tree.map(lambda x: x, lens.encoder)
    e.config = dataclasses.replace(e.config, context_tokens=1)
    close(ENCODE(e, base, ids, roll.source), by_hand(e, base, ids, [1] * 16, early))
    differs(ENCODE(e, base, ids, roll.source), got)


def test_no_later_token_is_seen(base, lens, early, roll):
    later = np.array(early['tokens'])
    for row, ps in zip(later, early['positions'], strict=True):
        row[max(ps) + 1 :] = (row[max(ps) + 1 :] + 1) % 56
    assert (later != early['tokens']).any()
    again = objectives.read(base, early | {'tokens': later}, layer=LAYER, recent=CONTEXT + 2)
    last = slice(1, None, 2)  # of each document
    ids = early['explanations'].reshape(-1, LENGTH)
    got, want = (ENCODE(lens.encoder, base, ids, r.source)[last] for r in (again, roll))
    np.testing.assert_array_equal(got, want)


def test_contexts_without_words_are_whole_half_of_the_time():
    shown = np.stack([objectives._shown(17, CONTEXT, jax.random.key(i)) for i in range(40)])
    assert set(shown.ravel()) == set(range(CONTEXT + 1))
    whole = shown == CONTEXT
    assert (whole.sum(1) >= 8).all() and 0.5 < whole.mean() < 0.75
    assert (whole.mean(0) < 1).all(), 'no place of a batch has the whole context always'


@pytest.mark.parametrize('name', ['sft', 'grpo'])
def test_the_encoder_learns_the_context_alone_and_nothing_else_does(base, lens, early, roll, name):
    objective = objectives.OBJECTIVES[name]
    whole = objective.rollout(lens, base, roll, KEY, HP)
    grads, metrics = GRADIENT(objective, lens, base, whole, KEY, HP, KNOBS, ())
    group, ids = len(whole.a_NxD) // 16, np.asarray(whole.ids_NxT)
    shown = np.asarray(objectives._shown(16, CONTEXT, KEY))
    again = {k: np.repeat(early[k], group, axis=1) if k == 'positions' else early[k] for k in ('tokens', 'positions')}

    def error(e):
        rows = losses.normalised_mse_rows(by_hand(e, base, ids, [CONTEXT] * len(ids), again), whole.a_NxD)
        quote = by_hand(e, base, [()] * 16, shown, early)
        alone = losses.normalised_mse_rows(quote, roll.a_NxD)
        return 1.5 * (rows.mean() + alone.mean()), (rows, alone, quote)

    (_, (rows, alone, quote)), want = jax.jit(jax.value_and_grad(error, has_aux=True))(lens.encoder)
    close(grads.encoder, want, steps=1024)
    close(metrics['loss_encoder'], rows.mean())
    close(metrics['loss_quote'], alone.mean())
    a, full = np.asarray(roll.a_NxD, np.float64), shown == CONTEXT
    fve = 1 - ((a - quote)[full] ** 2).sum(1).mean() / a.var(0, ddof=1).sum()
    np.testing.assert_allclose(metrics['fve_quote'], fve, rtol=1e-4)
    np.testing.assert_allclose(metrics['fve_beyond'], 1 - (1 - metrics['fve']) / (1 - fve), rtol=1e-4)

    def decoder(d):
        logp = programs.score(d, base, whole.a_NxD, ids)[0]
        worth = losses.advantages(-rows, 3)[:, None] if name == 'grpo' else 1
        return -jnp.mean(logp * worth)

    close(grads.decoder, jax.jit(jax.grad(decoder))(lens.decoder), steps=1024)


@pytest.mark.parametrize('name', ['sft', 'grpo'])
def test_slices_add_up(base, lens, roll, name):
    objective = objectives.OBJECTIVES[name]
    whole = objective.rollout(lens, base, roll, KEY, HP)
    want, figures = GRADIENT(objective, lens, base, whole, KEY, HP, KNOBS, ())
    got, metrics = GRADIENT(objective, lens, base, whole, KEY, dataclasses.replace(HP, slices=4), KNOBS, ())
    close(got, want, steps=1024)
    for key in ('loss_encoder', 'loss_quote', 'fve_quote', 'fve_beyond'):
        close(metrics[key], figures[key], steps=1024)


def test_gumbel_has_it_too(base, lens, roll):
    grads, metrics = GRADIENT(objectives.OBJECTIVES['gumbel'], lens, base, roll, KEY, HP, KNOBS, ())
    blind = dataclasses.replace(HP, context=0)  # the same words, and no term without them
    other, before = GRADIENT(objectives.OBJECTIVES['gumbel'], lens, base, roll, KEY, blind, KNOBS, ())
    close(grads.decoder, other.decoder, steps=1024)
    assert size(grads.decoder) > 0 and not {'fve_quote', 'loss_quote', 'fve_beyond'} & before.keys()
    close(metrics['loss_encoder'], before['loss_encoder'])

    def alone(e):
        shown = objectives._shown(16, CONTEXT, KEY)
        return 1.5 * losses.normalised_mse_rows(encode_context(e, base, roll.source, shown), roll.a_NxD).mean()

    want = jax.jit(jax.grad(alone))(lens.encoder)
    close(jax.tree.map(lambda x, y: x - y, grads.encoder, other.encoder), want, steps=4096)
