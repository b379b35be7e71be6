"""An encoder that also reads the last tokens of the source: against explicit rows, one at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import losses, objectives, policy, response, sharding
from lens.models.encoder import Source, encode, encode_context
from lens.rollout import read
from tests import programs
from tests.compare import close, differs, size
from tests.tiny_world import LAYER, LENGTH, make_lens

CONTEXT = 4
KEY = jax.random.key(7)
ON = frozenset({'mse_weight', 'copy_price'})
HP = objectives.Hparams(layer=LAYER, length=LENGTH, group=3, context=CONTEXT, on=ON)
KNOBS = dict.fromkeys(objectives.KNOBS, np.float32(0)) | {'mse_weight': np.float32(1.5), 'tau': np.float32(1)}
KNOBS |= {'copy_price': np.float32(0.3), 'kl_skip': np.int32(0), 'clip': np.float32(0.2)}
GRADIENT = jax.jit(objectives.gradient, static_argnums=(0, 5))
ENCODE, ENCODE_CONTEXT = jax.jit(encode), jax.jit(encode_context)


@pytest.fixture(scope='module')
def lens(base):
    out = make_lens(base)
    out.encoder.config = dataclasses.replace(out.encoder.config, context_tokens=CONTEXT)
    return out


@pytest.fixture(scope='module')
def early(batch):
    """Activations from the very beginning of texts on."""
    return batch | {'positions': np.stack([np.arange(8) % 5, 3 + np.arange(8)], axis=1).astype(np.int32)}


@pytest.fixture(scope='module')
def roll(base, early):
    return read(base, early, layer=LAYER, recent=HP.recent)


@functools.cache
def rollout_of(name):
    return jax.jit(objectives.OBJECTIVES[name].rollout, static_argnums=4)


def rollout(name, lens, base, roll):
    return rollout_of(name)(lens, base, roll, KEY, HP)


def rows_of(batch):
    """(tokens of the text, position) of every activation."""
    return [(row, p) for row, ps in zip(batch['tokens'], batch['positions'], strict=True) for p in ps]


def rows_by_hand(encoder, words, shown, batch):
    """Which row of `stack` stands at each place of the explicit row of every activation, and its last place; what follows it
    is noughts."""
    left, right = (np.arange(len(x[...])) for x in (encoder.prompt_left, encoder.prompt_right))
    index, last = np.full((len(words), 20), -1), []
    for at, ids, n, (text, p) in zip(index, words, shown, rows_of(batch), strict=True):
        context, table = text[max(0, p + 1 - n) : p + 1], len(left) + len(right)
        row = np.concatenate([left, table + np.asarray(ids, int), len(left) + right, table + np.asarray(context, int)])
        at[: len(row)] = row
        last.append(len(row) - 1)
    return index, np.asarray(last)


@jax.jit
def by_index(encoder, base, index_NxT, last_N):
    """Reconstructions from explicit rows."""
    table = base.embedding[...]
    stack = jnp.concatenate([encoder.prompt_left[...], encoder.prompt_right[...], table, 0 * table[:1]])
    x = stack[index_NxT].at[np.arange(len(last_N)), last_N].add(encoder.special_last[...])
    x = base.run_layers(x, 0, LAYER + 1)[np.arange(len(last_N)), last_N]
    return x @ encoder.readout_w[...] + encoder.readout_b[...]


def by_hand(encoder, base, words, shown, batch):
    return by_index(encoder, base, *rows_by_hand(encoder, words, shown, batch))


def test_the_source_is_what_stands_before_the_token_that_was_read(early, roll):
    for (text, p), got, at in zip(rows_of(early), roll.source.tokens_NxR, roll.source.position_N, strict=True):
        want = text[: p + 1]
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
    again = read(base, early | {'tokens': later}, layer=LAYER, recent=HP.recent)
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


@pytest.mark.parametrize('name', ['sft', pytest.param('grpo', marks=pytest.mark.slow)])
def test_the_encoder_learns_the_context_alone_and_nothing_else_does(base, lens, early, roll, name):
    objective = objectives.OBJECTIVES[name]
    whole = rollout(name, lens, base, roll)
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

    copied = np.mean([np.isin(x, y) for x, y in zip(ids, np.asarray(whole.source.tokens_NxR), strict=True)], axis=1)
    if name == 'grpo':
        assert 0 < copied.mean() < 1
        close(metrics['copied'], copied.mean())
        close(metrics['reward'], -rows.mean() - 0.3 * copied.mean())

    def decoder(d):
        logp = programs.score(d, base, whole.a_NxD, ids)[0]
        worth = policy.advantages(-rows - 0.3 * copied, 3)[:, None] if name == 'grpo' else 1
        return -jnp.mean(logp * worth)

    close(grads.decoder, jax.jit(jax.grad(decoder))(lens.decoder), steps=1024)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['sft', 'grpo'])
def test_slices_add_up(base, lens, roll, name):
    objective = objectives.OBJECTIVES[name]
    whole = rollout(name, lens, base, roll)
    want, figures = GRADIENT(objective, lens, base, whole, KEY, HP, KNOBS, ())
    got, metrics = GRADIENT(objective, lens, base, whole, KEY, dataclasses.replace(HP, slices=4), KNOBS, ())
    close(got, want, steps=1024)
    for key in {'loss_encoder', 'loss_quote', 'fve_quote', 'fve_beyond', 'reward', 'copied'} & figures.keys():
        close(metrics[key], figures[key], steps=1024)


@pytest.mark.slow
def test_on_a_mesh_as_on_one_device(base, lens, early, roll):
    objective = objectives.OBJECTIVES['grpo']
    want, figures = GRADIENT(objective, lens, base, rollout('grpo', lens, base, roll), KEY, HP, KNOBS, ())
    mesh = sharding.make_mesh(2, 2, 1)
    with jax.set_mesh(mesh):
        placed = sharding.place(lens, mesh, 0), sharding.place(base, mesh, 0)
        made = read(placed[1], sharding.put_batch(early, mesh), layer=LAYER, recent=HP.recent)
        whole = rollout('grpo', *placed, made)
        sliced = dataclasses.replace(HP, slices=2)
        got, metrics = jax.tree.map(np.asarray, GRADIENT(objective, *placed, whole, KEY, sliced, KNOBS, ()))
    close(got, want, steps=2048)
    for key in ('loss_encoder', 'loss_quote', 'fve_quote', 'fve_beyond', 'reward', 'copied'):
        close(metrics[key], figures[key], steps=2048)


@pytest.mark.slow
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


def test_words_that_stand_in_the_source_are_counted_between_the_tags():
    """Not the tags, not what follows them, not tokens from before the last 32."""
    tags = response.Tags((8,), (9,))
    ids = np.array([[8, 1, 2, 2, 9, 2], [7, 8, 1, 9, 2, 2], [8, 1, 2, 3, 4, 5]])
    recent = np.concatenate([np.full((3, 2), 1), np.tile([2, 9], (3, 16))], axis=1)
    found = response.find(jnp.asarray(ids), tags)
    counted = objectives.Counted(found, *(None,) * 6)
    roll = objectives.Rollout(None, Source(jnp.asarray(recent), None), {}, jnp.asarray(ids), counted=counted)
    np.testing.assert_allclose(
        objectives._copied(roll, dataclasses.replace(HP, length=6)), [2 / 6, 0, 1 / 6], rtol=1e-6
    )
