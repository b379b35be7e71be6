"""Translators: the loss and its step against numpy, compositions, files, and the command."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lens import files, hf, sharding, tensor_files, translators
from lens.errors import LensError
from lens.models.transformer import Transformer
from lens.tools import tuned_lens
from lens.translators import compose
from tests import config_json
from tests.conftest import TINY, make_base

L, D = TINY.n_layers, TINY.d_model
LENGTHS = np.array([11, 4, 7, 11, 1, 9, 10, 5], np.int32)
TX = optax.sgd(1.0)  # a step is the gradient


@pytest.fixture(scope='module')
def state(base, tokens):
    """Random translators: nothing is at its initial value."""
    s = tuned_lens.init_state(base, {'tokens': tokens, 'lengths': LENGTHS}, tx=TX)
    rng = np.random.default_rng(5)
    return s.replace(params={k: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype) for k, x in s.params.items()})


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_kl(base, tokens, translate):
    """Sum of KL(final || translated) over the real tokens by layer: translate(i, h_NxD) -> NxD."""
    mask = np.arange(tokens.shape[1]) < LENGTHS[:, None]
    p = softmax(np.asarray(base(tokens), np.float64))[mask]
    out = []
    for i in range(L):
        h = np.asarray(base.run_layers(base.embed(tokens), 0, i), np.float64)
        y = translate(i, h.reshape(-1, D)).reshape(h.shape).astype(np.float32)
        q = softmax(np.asarray(base.logits(jnp.asarray(y)), np.float64))[mask]
        out.append((p * np.log(p / q)).sum())
    return np.array(out)


def of_state(state):
    """reference_kl's `translate` from the parameters, in float64."""
    weight, bias = (np.asarray(state.params[k], np.float64) for k in ('weight', 'bias'))
    scale = np.asarray(state.scale_L, np.float64)
    return lambda i, h: h + h @ weight[i] + scale[i] * bias[i]


def test_the_loss_is_the_kl_from_the_final_distribution(base, tokens, state):
    got, count = tuned_lens.kl_sums(state, base, {'tokens': tokens, 'lengths': LENGTHS})
    assert count == LENGTHS.sum()
    np.testing.assert_allclose(got, reference_kl(base, tokens, of_state(state)), rtol=1e-4)


def test_identity_translators_are_the_logit_lens(base, tokens):
    batch = {'tokens': tokens, 'lengths': LENGTHS}
    got, _ = tuned_lens.kl_sums(tuned_lens.init_state(base, batch, tx=TX), base, batch)
    np.testing.assert_allclose(got, reference_kl(base, tokens, lambda i, h: h), rtol=1e-4)


def test_a_step_goes_down_the_gradient_of_each_layer(base, tokens, state):
    """Against finite differences of the reference, along one random direction of each layer's parameters."""
    before = jax.tree.map(np.asarray, state.params)
    copy = jax.tree.map(jnp.array, state)
    after, kl = tuned_lens.train_step(copy, base, {'tokens': tokens, 'lengths': LENGTHS}, tx=TX)
    np.testing.assert_allclose(kl, reference_kl(base, tokens, of_state(state)) / LENGTHS.sum(), rtol=1e-4)
    rng, step = np.random.default_rng(6), 2e-2
    way = {k: rng.standard_normal(x.shape) / D for k, x in before.items()}
    sides = [
        reference_kl(
            base, tokens, of_state(state.replace(params={k: x + sign * step * way[k] for k, x in before.items()}))
        )
        for sign in (1, -1)
    ]
    slope_L = (sides[0] - sides[1]) / (2 * step) / LENGTHS.sum()
    got_L = sum(((before[k] - np.asarray(after.params[k])) * way[k]).reshape(L, -1).sum(1) for k in before)
    np.testing.assert_allclose(got_L, slope_L, rtol=2e-3, atol=1e-5)


def test_translated_streams_get_the_final_norm_and_keep_their_logits(base, tokens, state):
    batch = {'tokens': tokens, 'lengths': LENGTHS}
    scaled = tuned_lens.to_final_norm(state, base, batch)
    mask = np.arange(tokens.shape[1]) < LENGTHS[:, None]

    def typical(x):
        return np.exp(np.log(np.linalg.norm(np.asarray(x, np.float64), axis=-1))[mask].mean())

    wanted = typical(base.run_layers(base.embed(tokens), 0, L))
    for i in range(L):
        h = np.asarray(base.run_layers(base.embed(tokens), 0, i), np.float64)
        assert typical(of_state(scaled)(i, h)) == pytest.approx(wanted, rel=1e-4)
        assert typical(of_state(state)(i, h)) != pytest.approx(wanted, rel=0.05)
    np.testing.assert_allclose(
        tuned_lens.kl_sums(scaled, base, batch)[0], tuned_lens.kl_sums(state, base, batch)[0], rtol=1e-3
    )


@pytest.mark.slow
def test_a_step_on_a_mesh_is_the_step_on_one_device(base, tokens, state):
    batch = {'tokens': tokens, 'lengths': LENGTHS}
    expected, kl = tuned_lens.train_step(jax.tree.map(jnp.array, state), base, batch, tx=TX)
    mesh = sharding.make_mesh(4, 2)
    with jax.set_mesh(mesh):
        there = sharding.place(make_base(), mesh), sharding.put_batch(batch, mesh)
        start = tuned_lens.init_state(*there, tx=TX)
        np.testing.assert_allclose(start.scale_L, state.scale_L, rtol=1e-5)
        start = start.replace(params=jax.device_put(jax.device_get(state.params), start.params['bias'].sharding))
        got, kl_there = tuned_lens.train_step(start, *there, tx=TX)
    np.testing.assert_allclose(kl_there, kl, rtol=1e-5)
    for k, x in expected.params.items():
        np.testing.assert_allclose(got.params[k], x, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_logits_of_one_layer_exist_at_a_time(tokens):
    """Six more layers need less memory than the logits of one."""

    def needed(n_layers):
        c = dataclasses.replace(TINY, n_layers=n_layers, vocab_size=4099)
        base = jax.eval_shape(lambda: Transformer(c, rngs=nnx.Rngs(0)))
        args = base, {'tokens': tokens, 'lengths': LENGTHS}
        start = jax.eval_shape(functools.partial(tuned_lens.init_state, tx=TX), *args)
        return tuned_lens.train_step.lower(start, *args, tx=TX).compile().memory_analysis().temp_size_in_bytes

    assert needed(9) - needed(3) < tokens.size * 4099 * 4


# ---- compositions


@pytest.fixture(scope='module')
def maps():
    """(M [4, 6, 6], v [4, 6]): random, singular values 0.5 to 3."""
    rng = np.random.default_rng(7)
    left, right = (np.linalg.qr(rng.standard_normal((4, 6, 6)))[0] for _ in range(2))
    m = left * np.linspace(0.5, 3, 6) @ right
    return m.astype(np.float32), rng.standard_normal((4, 6)).astype(np.float32)


def translated(maps, i, h):
    m, v = maps
    return h if i == len(m) else h @ m[i].astype(np.float64) + v[i]


@pytest.mark.parametrize(('source', 'target'), [(0, 3), (3, 1), (2, 4), (4, 0), (2, 2), (4, 4)])
def test_the_target_translates_a_composed_vector_as_the_source_its_own(maps, source, target):
    h = np.random.default_rng(8).standard_normal((9, 6))
    weight, bias = compose(*maps, source, target)
    assert weight.dtype == bias.dtype == np.float32
    np.testing.assert_allclose(
        translated(maps, target, h @ weight + bias), translated(maps, source, h), rtol=1e-4, atol=1e-4
    )
    if source == target:
        np.testing.assert_allclose(weight, np.eye(6), atol=1e-6)
        np.testing.assert_array_equal(bias, np.zeros(6))


def test_the_weight_is_the_published_formula_in_row_vectors(maps):
    """Columns: pinv(M_target) M_source and pinv(M_target) (v_source - v_target)."""
    (m, v), (weight, bias) = maps, compose(*maps, 3, 1)
    inverse = np.linalg.pinv(m[1].T.astype(np.float64))
    np.testing.assert_allclose(weight.T, inverse @ m[3].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias, inverse @ (v[3] - v[1]), rtol=1e-5, atol=1e-6)


def test_directions_that_the_target_loses_are_left_out(maps):
    m, v = maps[0].copy(), maps[1]
    left, right = np.random.default_rng(9).standard_normal((6, 4)), np.random.default_rng(10).standard_normal((4, 6))
    m[2] = left @ right  # rank 4 up to the rounding of float32
    weight, bias = compose(m, v, 0, 2)
    exact = np.linalg.pinv(left @ right)
    np.testing.assert_allclose(weight, m[0] @ exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, (v[0] - v[2]) @ exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('pair', [(-1, 0), (0, 5)])
def test_streams_that_do_not_exist_are_refused(maps, pair):
    with pytest.raises(ValueError, match=r'not both in 0\.\.4'):
        compose(*maps, *pair)


# ---- files


@pytest.fixture
def folder(tmp_path):
    """A written folder of random translators; tests damage it."""
    rng = np.random.default_rng(11)
    weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((L, D, D), (L, D)))
    subject = {'family': TINY.family, 'd_model': D, 'n_layers': L}
    files.write_json(tmp_path / 'tuned_lens.json', {'format': translators.FORMAT, 'subject': subject})
    tensor_files.write(tmp_path / 'translators.safetensors', {'weight': weight, 'bias': bias})
    return tmp_path


def test_what_is_written_is_read(folder):
    m, v = translators.read(folder, TINY)
    rng = np.random.default_rng(11)
    np.testing.assert_array_equal(m, np.eye(D, dtype=np.float32) + rng.standard_normal((L, D, D)).astype(np.float32))
    np.testing.assert_array_equal(v, rng.standard_normal((L, D)).astype(np.float32))
    assert (m.dtype, v.dtype) == (np.float32, np.float32)


def rewrite(folder, **arrays):
    stored = tensor_files.read_all(folder / 'translators.safetensors') | arrays
    tensor_files.write(folder / 'translators.safetensors', {k: x for k, x in stored.items() if x is not None})


DAMAGES = {
    'pickle': (
        lambda f: ((f / 'tuned_lens.json').rename(f / 'config.json'), (f / 'params.pt').touch()),
        r'params\.pt is a pickle, which may run code and is not read: convert it',
    ),
    'empty': (lambda f: (f / 'tuned_lens.json').unlink(), r'tuned_lens\.json does not exist: give a folder'),
    'torn': (lambda f: (f / 'tuned_lens.json').write_text('{"format'), 'is not valid JSON'),
    'format': (lambda f: (f / 'tuned_lens.json').write_text('{"format": "lens/1"}'), 'is not of format lens-trans'),
    'no subject': (
        lambda f: (f / 'tuned_lens.json').write_text(json.dumps({'format': translators.FORMAT})),
        'no description of it',
    ),
    'missing': (lambda f: rewrite(f, bias=None), rf'holds no bias, the subject needs \({L}, {D}\)'),
    'shape': (
        lambda f: rewrite(f, weight=np.zeros((L, D, D + 1), np.float32)),
        rf'weight of shape \({L}, {D}, {D + 1}\), the subject needs \({L}, {D}, {D}\)',
    ),
    'not finite': (lambda f: rewrite(f, bias=np.full((L, D), np.nan, np.float32)), 'bias holds values that are not'),
    'truncated': (
        lambda f: (f / 'translators.safetensors').write_bytes(b'\x10' * 20),
        r'translators\.safetensors cannot be read',
    ),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_folder_is_refused_in_one_sentence(folder, damage):
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(LensError, match=message):
        translators.read(folder, TINY)


def test_translators_of_another_subject_are_refused(folder):
    file = folder / 'tuned_lens.json'
    file.write_text(file.read_text().replace(f'"d_model": {D}', '"d_model": 99'))
    with pytest.raises(LensError, match=rf'd_model=99, n_layers={L}, this one has family=llama, d_model={D}'):
        translators.read(folder, TINY)


# ---- the command


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with model/ and data/: 40 training and 21 held-out documents of 13 tokens or fewer."""
    root = tmp_path_factory.mktemp('tuned')
    hf.save_model(make_base(), root / 'model', config=config_json.llama(TINY))
    rng = np.random.default_rng(12)
    for split, n in {'train': 40, 'validation': 21}.items():
        d = root / 'data' / split
        d.mkdir(parents=True)
        (d / 'meta.json').write_text(json.dumps({'format': 'lens-tokens/1', 'vocab_size': TINY.vocab_size}))
        np.save(d / 'tokens.npy', rng.integers(0, TINY.vocab_size, (n, 13)).astype(np.int32))
        np.save(d / 'lengths.npy', rng.integers(3, 14, n).astype(np.int32))
        np.save(d / 'doc_id.npy', np.arange(n) + len(split) * 100)
    return root


def check_result(out, steps, seq_len):
    """Held-out KL falls in every layer, and what is stored says what was done."""
    about = json.loads((out / 'tuned_lens.json').read_text())
    before, after = (np.array(about['held_out'][f'kl_{k}_nats']) for k in ('before', 'after'))
    assert before.shape == after.shape == (L,)
    assert (after < 0.8 * before).all()
    assert about['held_out']['documents'] == 21
    assert (about['training']['steps'], about['training']['seq_len']) == (steps, seq_len)
    assert about['subject']['d_model'] == D and 'transpose' in about['convention']
    m, v = translators.read(out, TINY)
    assert m.shape == (L, D, D) and np.abs(v).max(1).min() > 0
    return before, after, m, v


@pytest.mark.slow
def test_the_command(world, tmp_path):
    out = tmp_path / 'new' / 'lens'
    argv = [
        sys.executable,
        '-m',
        'lens.tools.tuned_lens',
        f'--model={world}/model',
        f'--data={world}/data',
        f'--out={out}',
    ]
    env = os.environ | {'JAX_PLATFORMS': 'cpu'}
    root = pathlib.Path(tuned_lens.__file__).parents[2]
    done = subprocess.run(
        [*argv, '--steps=30', '--batch=8'], capture_output=True, text=True, env=env, cwd=root, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == f'Tuned lens: {out}'
    assert 'Worse' not in done.stdout
    assert 'step 30/30  KL ' in done.stdout and ' 0 s left' in done.stdout
    before, after, m, v = check_result(out, 30, 13)
    assert lines[-1 - L :][:L] == [f'| {i} | {before[i]:.4f} | {after[i]:.4f} |' for i in range(L)]
    model, d = hf.load_model(world / 'model'), world / 'data' / 'validation'
    tokens, lengths = np.load(d / 'tokens.npy'), np.load(d / 'lengths.npy')
    mask = np.arange(13) < lengths[:, None]
    p = softmax(np.asarray(model(tokens), np.float64))[mask]
    for i in range(L):
        h = np.asarray(model.run_layers(model.embed(tokens), 0, i))
        q = softmax(np.asarray(model.logits(jnp.asarray(h @ m[i] + v[i])), np.float64))[mask]
        assert (p * np.log(p / q)).sum(-1).mean() == pytest.approx(after[i], rel=1e-3)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'steps': 0}, '--steps=0 must be positive'),
        ({'seq_len': -3}, '--seq_len=-3 must be positive'),
        ({'learning_rate': float('nan')}, '--learning_rate=nan must be positive'),
        ({'batch': 41}, 'holds 40 documents, fewer than --batch=41'),
        ({'batch': 7, 'mesh_data': 2}, '--batch=7 cannot be split over mesh.replica x mesh.data = 2 devices'),
    ],
)
def test_impossible_settings_are_refused(world, tmp_path, changes, message):
    with pytest.raises(LensError, match=message):
        tuned_lens.train(
            str(world / 'model'),
            str(world / 'data'),
            tmp_path / 'lens',
            tuned_lens.TunedLensSettings(**{'batch': 8} | changes),
        )
    assert not any(tmp_path.iterdir())


def test_a_diverging_run_stops():
    with pytest.raises(LensError, match='step 2: the KL of layer 1 is not finite: lower --learning_rate'):
        tuned_lens._check_finite(np.array([1.0, np.nan, np.inf]), 'step 2')


def test_layers_that_became_worse_are_named(world, tmp_path, capsys):
    """In bfloat16, on a mesh, of shorter texts."""
    how = {'batch': 6, 'seq_len': 7, 'dtype': 'bfloat16', 'mesh_data': 3, 'mesh_model': 2}
    settings = tuned_lens.TunedLensSettings(steps=2, learning_rate=1e6, **how)
    tuned_lens.train(str(world / 'model'), str(world / 'data'), tmp_path / 'lens', settings)
    assert 'Worse than the logit lens: layers 0, 1, 2; lower --learning_rate' in capsys.readouterr().out
    about = json.loads((tmp_path / 'lens/tuned_lens.json').read_text())
    assert about['held_out']['documents'] == 21 and how.items() <= about['training'].items()
    assert translators.read(tmp_path / 'lens', TINY)[0].shape == (L, D, D)


def test_a_folder_that_holds_something_is_left_alone(world, tmp_path):
    (tmp_path / 'mine').write_text('precious')
    with pytest.raises(LensError, match='holds something already'):
        tuned_lens.train(str(world / 'model'), str(world / 'data'), tmp_path, tuned_lens.TunedLensSettings())
    assert [p.name for p in tmp_path.iterdir()] == ['mine']
