"""The optimizer against AdamW in float64 numpy: each side has its own learning rate and clip."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens import optimizer

L, D, K, G, H, F, V, P, R = 2, 6, 2, 2, 3, 5, 11, 4, 2
BLOCK_MATRICES = {
    'attn/q': (L, D, K, G, H),
    'attn/k': (L, D, K, H),
    'attn/v': (L, D, K, H),
    'attn/o': (L, K, G, H, D),
    'mlp/gate': (L, D, F),
    'mlp/up': (L, D, F),
    'mlp/down': (L, F, D),
}
BLOCK_NORMS = {'attn_norm': (L, D), 'mlp_norm': (L, D)}
SHAPES = {
    'decoder/maps_w': (3, D, D),
    'decoder/maps_b': (3, D),
    'decoder/prompt_left': (P, D),
    'decoder/base/embedding': (V, D),
    'decoder/base/final_norm': (D,),
    'decoder/base/head': (D, V),
    **{f'decoder/base/blocks/{k}': s for k, s in (BLOCK_MATRICES | BLOCK_NORMS).items()},
    'encoder/prompt_left': (P, D),
    'encoder/special_last': (D,),
    'encoder/readout_w': (D, D),
    'encoder/readout_b': (D,),
    'encoder/adapters/q/a': (L, D, R),
    'encoder/adapters/q/b': (L, R, K, G, H),
    'encoder/base/blocks/mlp/up': (L, D, F),
    'encoder/base/blocks/mlp_norm': (L, D),
}
CONFIG = optimizer.OptimizerConfig(
    steps=10,
    warmup_steps=0,
    final_fraction=1.0,
    learning_rate_decoder=2e-3,
    learning_rate_encoder=5e-2,
    weight_decay=0.0,
    grad_clip=1.0,
)


def nest(flat):
    tree = {}
    for path, x in flat.items():
        *folders, name = path.split('/')
        at = tree
        for f in folders:
            at = at.setdefault(f, {})
        at[name] = x
    return tree


def flatten(tree, prefix=''):
    out = {}
    for k, v in tree.items():
        out |= flatten(v, f'{prefix}{k}/') if isinstance(v, dict) else {prefix + k: np.asarray(v)}
    return out


def random_flat(seed, scale=None):
    rng = np.random.default_rng(seed)
    scale = scale or {'decoder': 1.0, 'encoder': 1.0}
    return {k: (scale[k[:7]] * rng.normal(size=s)).astype(np.float32) for k, s in SHAPES.items()}


@functools.cache
def jitted(config):
    tx = optimizer.make(config)
    return jax.jit(tx.init), jax.jit(tx.update)


def update(config, grads, params, state=None):
    """One step: (updates by path, optimizer state)."""
    init, step = jitted(config)
    updates, state = step(nest(grads), init(nest(params)) if state is None else state, nest(params))
    return flatten(updates), state


def side_norm(flat, name):
    return np.sqrt(sum(np.sum(x.astype(float) ** 2) for k, x in flat.items() if k.startswith(name)))


def test_each_side_takes_its_own_learning_rate():
    updates, _ = update(CONFIG, random_flat(0), random_flat(1))
    for path, u in updates.items():
        rate = {'decoder': 2e-3, 'encoder': 5e-2}[path[:7]]
        # the first step of Adam has length lr in every entry; rtol 1e-3: epsilon beside clipped gradients near 0
        np.testing.assert_allclose(np.median(np.abs(u)), rate, rtol=1e-3, err_msg=path)


def test_three_steps_against_numpy_with_each_side_clipped_alone():
    """Decoder gradients far above the clip, encoder gradients below it, of a different size every step."""
    config = dataclasses.replace(CONFIG, grad_clip=2.0, weight_decay=0.3)
    params, state = random_flat(1), None
    m, v = ({k: np.zeros(s) for k, s in SHAPES.items()} for _ in range(2))
    for step in (1, 2, 3):
        grads = random_flat(10 + step, {'decoder': 100.0**step, 'encoder': 0.01 * step})
        norms = {s: side_norm(grads, s) for s in ('decoder', 'encoder')}
        assert norms['decoder'] > 2 > norms['encoder']
        updates, state = update(config, grads, params, state)
        for k, g in grads.items():
            g = g.astype(float) * min(1, 2.0 / norms[k[:7]])
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g * g
            want = m[k] / (1 - 0.9**step) / (np.sqrt(v[k] / (1 - 0.999**step)) + 1e-8)
            if k.split('/blocks/')[-1] in BLOCK_MATRICES:
                want = want + 0.3 * params[k]
            if 'adapters' in k:
                continue  # see test_weight_decay_acts_on_adapters
            rate = {'decoder': 2e-3, 'encoder': 5e-2}[k[:7]]
            # atol: a millionth of a step where the terms cancel; 1 - 0.999**step costs float32 three digits
            np.testing.assert_allclose(updates[k], -rate * want, rtol=1e-4, atol=rate * 1e-4, err_msg=k)


def test_clipping_one_side_leaves_the_other_alone():
    params = random_flat(1)

    def encoder_updates(decoder_scale):
        state = None
        for seed, scale in ((2, 1.0), (3, decoder_scale)):
            updates, state = update(CONFIG, random_flat(seed, {'decoder': scale, 'encoder': 0.01}), params, state)
        return {k: u for k, u in updates.items() if k.startswith('encoder')}

    for k, u in encoder_updates(1e6).items():
        np.testing.assert_array_equal(u, encoder_updates(1e-6)[k], err_msg=k)


@pytest.fixture(scope='module')
def decay_updates():
    params = random_flat(1)
    zero = {k: np.zeros_like(x) for k, x in params.items()}
    config = dataclasses.replace(CONFIG, weight_decay=0.3)
    return params, update(config, zero, params)[0]


def test_weight_decay_shrinks_the_block_matrices(decay_updates):
    params, updates = decay_updates
    for path, u in updates.items():
        if path.split('/blocks/')[-1] in BLOCK_MATRICES:
            rate = {'decoder': 2e-3, 'encoder': 5e-2}[path[:7]]
            np.testing.assert_allclose(u, -rate * 0.3 * params[path], rtol=1e-5, err_msg=path)


def test_weight_decay_leaves_maps_prompts_norms_and_tables_alone(decay_updates):
    moved = {k for k, u in decay_updates[1].items() if u.any()}
    assert {k for k in moved if 'adapters' not in k and k.split('/blocks/')[-1] not in BLOCK_MATRICES} == set()


def test_weight_decay_acts_on_adapters(decay_updates):
    """configs/base.py: weight decay acts "on matrices of trained bases and adapters"."""
    params, updates = decay_updates
    for path in ('encoder/adapters/q/a', 'encoder/adapters/q/b'):
        np.testing.assert_allclose(updates[path], -5e-2 * 0.3 * params[path], rtol=1e-5, err_msg=path)


def test_the_schedule_counts_the_steps():
    config = dataclasses.replace(CONFIG, steps=3, warmup_steps=1, final_fraction=0.0)
    params, state, lengths = random_flat(1), None, []
    for _ in range(4):
        updates, state = update(config, random_flat(2), params, state)  # the same gradient: Adam's step is lr
        lengths.append(np.median(np.abs(updates['decoder/maps_w'])))
    # warm-up half, peak, cosine half way, end; rtol 1e-3: epsilon as above
    np.testing.assert_allclose(lengths, [1e-3, 2e-3, 1e-3, 0], rtol=1e-3, atol=1e-9)


def test_norms_by_side():
    flat = random_flat(5, {'decoder': 3.0, 'encoder': 0.2})
    got = optimizer.norms_by_side(nest(flat))
    assert set(got) == {'decoder', 'encoder'}
    for name, norm in got.items():
        np.testing.assert_allclose(norm, side_norm(flat, name), rtol=1e-5)


def test_norms_by_side_sums_in_float32():
    """bfloat16 sums stall at 256 ones."""
    got = optimizer.norms_by_side({'decoder': {'w': jnp.ones((40, 40), jnp.bfloat16)}, 'encoder': {'w': jnp.zeros(3)}})
    assert got['decoder'] == 40 and got['encoder'] == 0


def test_side_is_the_first_path_element():
    assert optimizer.side('encoder/base/blocks/attn/q') == 'encoder'
    assert optimizer.side('decoder/maps_w') == 'decoder'
