"""The optimizer against AdamW in float64 numpy: rows of the table, clip groups, unfreezing, accumulation."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from lens import optimizer, sharding
from lens.errors import LensError
from lens.optimizer import Row, parse_table
from lens.schedules import Units, constant, parse
from tests.conftest import make_base, make_lens

L, D, K, G, H, F, V, P, R = 2, 6, 2, 2, 3, 5, 11, 4, 2
SHAPES = {
    'decoder/maps_w': (3, D, D),
    'decoder/maps_b': (3, D),
    'decoder/prompt_left': (P, D),
    'decoder/base/embedding': (V, D),
    'decoder/base/blocks/attn/q': (L, D, K, G, H),
    'decoder/base/blocks/attn_norm/scale': (L, D),
    'decoder/base/blocks/mlp/up': (L, D, F),
    'encoder/prompt_left': (P, D),
    'encoder/readout_w': (D, D),
    'encoder/adapters/q/a': (L, D, R),
    'encoder/adapters/q/b': (L, R, K, G, H),
    'encoder/base/blocks/mlp/up': (L, D, F),
}
RATES = {
    'decoder': parse('linear 2e-3 1e-3 warmup 2s', Units(total=9), 'lr'),
    'encoder': parse('cosine 5e-2 1e-2', Units(total=9), 'lr'),
}
TABLE = (
    Row('embedding$', None),
    Row('prompt', 0.3, 0.0, 'small'),  # of both sides
    Row('^decoder/.*blocks/(attn|mlp)/', 0.5, 0.2, 'decoder'),
    Row('^decoder/', 1.0, 0.0, 'decoder'),
    Row('^encoder/', 2.0, 0.1, 'encoder'),
)
CLIP = {'small': 0.4, 'decoder': 2.0, 'encoder': 1e6}


def nest(flat):
    tree = {}
    for path, x in flat.items():
        *folders, name = path.split('/')
        at = tree
        for f in folders:
            at = at.setdefault(f, {})
        at[name] = x
    return tree


def flatten(tree):
    return {sharding.path(kp): np.asarray(x) for kp, x in jax.tree_util.tree_leaves_with_path(tree)}


def random_flat(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: (scale * rng.normal(size=s)).astype(np.float32) for k, s in SHAPES.items()}


@functools.partial(jax.jit, static_argnums=0)
def init(tx, params):
    return tx.init(params)


@functools.partial(jax.jit, static_argnums=0)
def update(tx, *args):
    return tx.update(*args)


def run(gradients, table=TABLE, clip=None, rates=RATES, accumulation=1):
    """Updates by path of every step, and the last optimizer state; parameters follow the updates."""
    clip = CLIP if clip is None else clip
    norms = optimizer.parse_clip(tuple(clip.items()) if isinstance(clip, dict) else clip, 'clip', table)
    tx, params, out = optimizer.make(table, accumulation), nest(random_flat(1)), []
    state = init(tx, params)
    for t, g in enumerate(gradients):
        updates, state = update(tx, nest(g), state, params, optimizer.numbers(table, rates, norms, t, accumulation))
        params = jax.tree.map(jnp.add, params, updates)
        out.append(flatten(updates))
    return out, state


def row_of(table, path):
    return next(r for r in table if re.search(r.pattern, path))


def adamw(gradients, table=TABLE, clip=CLIP, rates=RATES, accumulation=1):
    """The updates in float64; a leaf's moments and their count start at its unfreeze step."""
    params = {k: x.astype(float) for k, x in random_flat(1).items()}
    m, v = ({k: np.zeros(s) for k, s in SHAPES.items()} for _ in range(2))
    out = []
    for step, grads in enumerate(gradients):
        at = step * accumulation
        rows = {k: row_of(table, k) for k in SHAPES}
        awake = [k for k, r in rows.items() if r.multiplier is not None and at >= r.unfreeze]
        updates = {k: np.zeros(s) for k, s in SHAPES.items()}
        for k in awake:
            r = rows[k]
            members = [grads[j].astype(float) for j in awake if rows[j].clip == r.clip]
            norm = np.sqrt(sum((x**2).sum() for x in members))
            g = grads[k].astype(float) * min(1, clip[r.clip] / norm)
            n = step - -(-r.unfreeze // accumulation) + 1
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g * g
            direction = m[k] / (1 - 0.9**n) / (np.sqrt(v[k] / (1 - 0.999**n)) + 1e-8)
            rate = float(rates[k[:7]](at)) * r.multiplier
            updates[k] = -rate * (direction + r.weight_decay * params[k])
            params[k] = params[k] + updates[k]
        out.append(updates)
    return out


def compare(got, want):
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for k in SHAPES:
            # a ten-thousandth of the largest entry: 1 - 0.999**n costs float32 three digits
            np.testing.assert_allclose(a[k], b[k], rtol=1e-4, atol=1e-4 * np.abs(b[k]).max(), err_msg=f'{step} {k}')


GRADIENTS = [random_flat(10 + i, 0.3 * 3.0**i) for i in range(5)]  # below and above the norms of CLIP


def test_five_steps_against_numpy():
    """Multipliers, decay, a clip group across both sides, a frozen leaf, schedules of each side."""
    got, _ = run(GRADIENTS)
    compare(got, adamw(GRADIENTS))


def test_groups_are_clipped_apart():
    """A huge gradient in one group changes nothing in another; the same in one common group does."""
    loud = [g | {'decoder/maps_w': 1e6 * g['decoder/maps_w']} for g in GRADIENTS[:2]]
    (plain, _), (apart, _) = run(GRADIENTS[:2]), run(loud)
    for k in SHAPES:
        if row_of(TABLE, k).clip in ('small', 'encoder'):
            np.testing.assert_array_equal(plain[1][k], apart[1][k], err_msg=k)
    one = (Row('.', 1.0, 0.0, 'all'),)
    together, calm = (run(g, one, {'all': 1.0})[0][1]['encoder/readout_w'] for g in (loud, GRADIENTS[:2]))
    assert np.abs(together - calm).max() > 1e-3


def test_one_norm_for_all_groups():
    got, _ = run(GRADIENTS[:2], clip=0.7)
    compare(got, adamw(GRADIENTS[:2], clip=dict.fromkeys(CLIP, 0.7)))


def with_unfreeze(unfreeze):
    return tuple(Row(*(*r.__dict__.values(),)[:4], unfreeze) if r.clip == 'encoder' else r for r in TABLE)


def test_unfreezing_is_training_fresh_from_that_step():
    """Nothing moves or decays before; then moments and bias correction start at zero, the rate where it is."""
    table = with_unfreeze(2)
    got, _ = run(GRADIENTS, table)
    compare(got, adamw(GRADIENTS, table))
    late = {
        s: functools.partial(lambda t, f: f(t + 2), f=RATES[s]) for s in optimizer.SIDES
    }  # the schedule from step 2 on
    fresh, _ = run(GRADIENTS[2:], TABLE, rates=late)
    for k in SHAPES:
        if k.startswith('encoder') and 'prompt' not in k:
            assert not got[0][k].any() and not got[1][k].any() and got[2][k].any()
            for a, b in zip(got[2:], fresh, strict=True):
                np.testing.assert_allclose(a[k], b[k], rtol=1e-5, atol=1e-6 * np.abs(b[k]).max(), err_msg=k)


def test_sleeping_leaves_do_not_count_in_the_norm_of_their_group():
    table = (Row('maps_w', 1.0, 0.0, 'all', 1), Row('.', 1.0, 0.0, 'all'))
    loud = [g | {'decoder/maps_w': 1e3 * g['decoder/maps_w']} for g in GRADIENTS[:2]]
    (a, _), (b, _) = (run(g, table, 0.1) for g in (loud, GRADIENTS[:2]))
    np.testing.assert_array_equal(a[0]['encoder/readout_w'], b[0]['encoder/readout_w'])
    assert np.abs(a[1]['encoder/readout_w'] - b[1]['encoder/readout_w']).max() > 1e-4


@pytest.mark.parametrize('unfreeze', [0, 4])
def test_accumulation_is_one_step_on_the_mean(unfreeze):
    """The schedules and the unfreeze time go on counting micro-steps: 4 is inside the second optimizer step."""
    micro = [random_flat(30 + i) for i in range(9)]
    table = with_unfreeze(unfreeze)
    mean = [{k: np.mean([g[k] for g in micro[i : i + 3]], 0) for k in SHAPES} for i in (0, 3, 6)]
    got, _ = run(micro, table, accumulation=3)
    compare(got[2::3], adamw(mean, table, accumulation=3))
    assert not any(u.any() for i in (0, 1, 3, 4, 6, 7) for u in got[i].values())


def test_frozen_leaves_have_no_state_and_do_not_move():
    got, state = run(GRADIENTS, accumulation=2)
    assert all((u['decoder/base/embedding'] == 0).all() for u in got)
    arrays = {k: x for k, x in flatten(state).items() if x.ndim}
    assert not any('embedding' in k for k in arrays)
    trained = sum(int(np.prod(s)) for k, s in SHAPES.items() if not k.endswith('embedding'))
    assert sum(x.size for x in arrays.values()) == 3 * trained  # two moments and the mean gradient
    assert {x.dtype for x in arrays.values()} == {np.dtype('float32')}


def test_moments_are_float32_whatever_the_gradient():
    tree = {'decoder': {'w': jnp.ones((3, 2), jnp.bfloat16)}}
    table = (Row('.', 1.0, 0.0, 'g'),)
    tx, values = optimizer.make(table), optimizer.numbers(table, {'decoder': constant(1e-3)}, {'g': 1.0}, 0, 1)
    updates, state = tx.update(tree, tx.init(tree), tree, values)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves((updates, state)))


def test_a_leaf_without_a_row_is_named():
    tx = optimizer.make(TABLE[:4])
    with pytest.raises(LensError, match=r'no row of the optimizer table covers encoder/adapters/q/a: add one'):
        tx.init(nest(random_flat(1)))


def test_a_group_without_a_norm_is_named():
    with pytest.raises(LensError, match=r"grad_clip has no norm for the clip group 'small': it has decoder, encoder"):
        optimizer.parse_clip((('decoder', 1.0), ('encoder', 1.0)), 'sft.grad_clip', TABLE)


def test_tables_of_configurations():
    table = (['a$', None], ('b', 2, 0.1, 'g', '2os'), ('c', 1.0, 0.0, 'h', None))
    assert parse_table(table, Units(accumulation=5), 'sft.table') == (
        Row('a$', None),
        Row('b', 2.0, 0.1, 'g', 10),
        Row('c', None),
    )


ROW = ('a', 1.0, 0.0, 'g', 0)


@pytest.mark.parametrize('row', ['x', ('a',), ('a', 1.0), ('a', 1.0, 0.0, 'g'), (*ROW, 1), 5, None])
def test_rows_of_another_form_name_the_key_and_the_form(row):
    with pytest.raises(LensError, match=r'sft.table: .* is not a row; accepted: \(regex, multiplier') as e:
        parse_table((row,), Units(), 'sft.table')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('table', ['^decoder', 5, None, {'a': 1}])
def test_a_table_that_holds_no_rows(table):
    with pytest.raises(LensError, match=r'sft.table=.* holds no rows; accepted: \(regex, multiplier'):
        parse_table(table, Units(), 'sft.table')


@pytest.mark.parametrize(
    ('place', 'value', 'message'),
    [
        (0, '(', r"sft.table: regex='\(' is not a regular expression: missing \)"),
        (0, '(' * 99999, r'sft.table: regex=.* is not a regular expression'),
        (0, 'a{99999999999}', r'is not a regular expression: the repetition number is too large'),
        (0, 3, r'sft.table: regex=3 must be a text'),
        (0, b'a', r'must be a text'),
        (0, 'a\0', r'must be Unicode without NUL'),
        (1, 'fast', r"sft.table: a: multiplier='fast' must be a number"),
        (1, '1.0', r"multiplier='1.0' must be a number"),
        (1, True, r'multiplier=True must be a number'),
        (1, -1.0, r'sft.table: a: multiplier=-1.0 must be at least 0'),
        (1, np.nan, r'multiplier=nan must be finite'),
        (1, np.inf, r'multiplier=inf must be at most 1e\+30'),
        (2, np.nan, r'sft.table: a: weight decay=nan must be finite'),
        (2, -0.1, r'weight decay=-0.1 must be at least 0'),
        (2, None, r'weight decay=None must be a number'),
        (3, None, r'sft.table: a: clip group=None must be a text'),
        (4, 'soon', r"sft.table: a='soon' is not a duration; accepted"),
        (4, '9' * 400, r'sft.table: a=.* is longer than 2147483647 micro-steps'),
    ],
)
def test_bad_values_of_a_row_are_named(place, value, message):
    row = [*ROW[:place], value, *ROW[place + 1 :]]
    with pytest.raises(LensError, match=message) as e:
        parse_table((row,), Units(), 'sft.table')
    assert '\n' not in str(e.value) and len(str(e.value)) < 800


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        (np.nan, r'sft.grad_clip of .*=nan must be finite'),
        (np.inf, r'sft.grad_clip of .*=inf must be at most'),
        ('1.0', r"sft.grad_clip='1.0' is neither a norm nor pairs"),
        (None, r'sft.grad_clip of .*=None must be a number'),
        (-1, r'sft.grad_clip=-1 must be positive'),
        ((('a', 1.0, 2.0),), r'is neither a norm nor pairs'),
        ((5,), r'is neither a norm nor pairs'),
        ((('small', np.nan),), r'sft.grad_clip of small=nan must be finite'),
        (((5, 1.0),), r'sft.grad_clip=5 must be a text'),
    ],
)
def test_bad_clip_norms_are_named(value, message):
    with pytest.raises(LensError, match=message):
        optimizer.parse_clip(value, 'sft.grad_clip', TABLE)


def test_the_table_of_the_recipes_trains_everything_and_decays_matrices_alone():
    lens = make_lens(make_base(), own_base=True)
    rows = parse_table(base.table(weight_decay=0.25, encoder_unfreeze='3s'), Units(), 'sft.table')
    decayed = set()
    for path in flatten(lens):
        row = row_of(rows, path)
        assert row.multiplier == 1 and row.clip == path[:7] and row.unfreeze == (3 if path[:7] == 'encoder' else 0)
        decayed |= {path} if row.weight_decay else set()
    matrices = [*(f'attn/{x}' for x in 'qkvo'), *(f'mlp/{x}' for x in ('gate', 'up', 'down'))]
    maps = {'decoder/maps_w', 'encoder/readout_w'}
    assert decayed == maps | {f'{s}/base/blocks/{m}' for s in optimizer.SIDES for m in matrices}
    for path, want in {
        'encoder/adapters/q/a': 0.25,
        'decoder/base/blocks/moe/gate_up': 0.25,
        'decoder/base/blocks/moe/gate_up_bias': 0,
        'decoder/base/blocks/attn/q_bias': 0,
    }.items():
        assert row_of(rows, path).weight_decay == want, path


def test_no_number_of_the_table_compiles_another_program():
    """Rates, multipliers, decays, norms, unfreeze times and steps are arguments."""
    before = update._cache_size()
    for change in range(4):
        table = tuple(
            dataclasses.replace(r, multiplier=r.multiplier and 0.1 * (change + 1), weight_decay=0.1 * change)
            for r in with_unfreeze(2 + change)
        )
        run(GRADIENTS[:1], table, clip=dict.fromkeys(CLIP, 1.0 + change), rates={s: constant(change) for s in RATES})
    assert update._cache_size() - before <= 1


def side_norm(flat, name):
    return np.sqrt(sum(np.sum(x.astype(float) ** 2) for k, x in flat.items() if k.startswith(name)))


def test_step_norms_count_the_gradient_of_trained_leaves_only():
    tx = optimizer.make(TABLE)
    grads, updates, params = random_flat(5, 3.0), random_flat(6, 0.2), random_flat(7)
    got = optimizer.step_norms(nest(grads), nest(updates), nest(params), tx.trained)
    trained = {k: x for k, x in grads.items() if k != 'decoder/base/embedding'}
    for s in optimizer.SIDES:
        np.testing.assert_allclose(got[f'grad_norm_{s}'], side_norm(trained, s), rtol=1e-5)
        np.testing.assert_allclose(got[f'update_norm_{s}'], side_norm(updates, s), rtol=1e-5)
        np.testing.assert_allclose(got[f'update_ratio_{s}'], side_norm(updates, s) / side_norm(params, s), rtol=1e-5)
    assert len(got) == 6
    assert optimizer.norms_by_side({'decoder': {'w': jnp.ones(4)}})['encoder'] == 0


def test_norms_sum_in_float32():
    """bfloat16 sums stall at 256 ones."""
    got = optimizer.norms_by_side({'decoder': {'w': jnp.ones((40, 40), jnp.bfloat16)}, 'encoder': {'w': jnp.zeros(3)}})
    assert got['decoder'] == 40 and got['encoder'] == 0


def test_drift():
    now, start = random_flat(8), random_flat(9)
    got = optimizer.drift(nest(now), nest(start))
    for s in optimizer.SIDES:
        mine = [k for k in SHAPES if k.startswith(s)]
        moved = sum(np.linalg.norm(now[k].astype(float) - start[k]) for k in mine)
        np.testing.assert_allclose(
            got[f'drift_{s}'], moved / sum(np.linalg.norm(start[k].astype(float)) for k in mine), rtol=1e-5
        )
    assert optimizer.drift(nest(now), nest(now)) == {'drift_decoder': 0, 'drift_encoder': 0}
