"""A rollout whose loss is computed in slices of the documents: the gradient and the figures of the whole."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from lens import flops, objectives, response, sharding
from lens.rollout import read
from lens.train import init_state, micro_step, trace
from tests import programs
from tests.compare import close, size
from tests.phases import phase_of
from tests.tiny_world import LAYER, LENGTH, TINY, make_base, make_lens

KEY = jax.random.key(7)
KNOBS = dict.fromkeys(objectives.KNOBS, np.float32(0)) | {
    'mse_weight': np.float32(1),
    'kl_weight': np.float32(0.3),
    'lm_weight': np.float32(0.2),
    'beta': np.float32(0.1),
    'entropy_weight': np.float32(0.5),
    'entropy_clamp': np.float32(3.2),  # of texts whose entropy is 3.0 to 3.4
    'kl_skip': np.int32(1),
    'clip': np.float32(0.2),
}
# of the options of grpo
FIELD_KNOBS = dict.fromkeys(objectives.KNOBS, np.float32(0)) | {'kl_skip': np.int32(1), 'clip': np.float32(0.2)}
FIELD_KNOBS |= {'mse_weight': np.float32(1), 'beta': np.float32(0.1), 'mismatch': np.float32(0.1)}
FIELD_KNOBS |= {'length_price': np.float32(0.3), 'length_free': np.float32(3)}
TAGS = response.Tags((), (17,))
ALL = frozenset({'mse_weight', 'kl_weight', 'lm_weight', 'beta', 'entropy_weight'})
PLAIN = objectives.Hparams(layer=LAYER, length=LENGTH, natural_prefix=(3, 1))
CASES = {
    'sft': {'on': ALL - {'beta', 'lm_weight'}, 'tags': TAGS, 'error': 'direction'},
    'grpo-natural': {'on': ALL, 'tags': TAGS, 'group': 6},
    'grpo-start': {'on': ALL, 'tags': TAGS, 'group': 3, 'kl_to': 'start', 'advantage': 'dr_grpo', 'error': 'direction'},
    'grpo-field': {
        'on': frozenset({'mse_weight', 'beta', 'mismatch', 'length_price', 'length_free'}),
        'tags': TAGS,
        'error': 'direction',
        'group': 3,
        'advantage': 'dr_grpo',
        'reward': 'log_error',
        'policy': 'cispo',
        'aggregate': 'responses',
        'kl_to': 'start',
        'kl_top': 4,
        'drop_equal': True,
        'encoder_texts': 'best',
        'prefix': (1, 3),
        'judged': True,
    },
    'grpo-mean': {'on': ALL - {'kl_weight'}, 'tags': TAGS, 'group': 3, 'mean_of': 2, 'advantage': 'rloo', 'updates': 2},
}
ROUNDING = ('logp_diff_max', 'logp_diff_mean')  # differences of what is computed twice


@pytest.fixture(scope='module')
def full(base):
    return make_lens(base, own_base=True)


def marked(ids_NxT):
    """Texts that end at different places, some nowhere and some before they begin, unlike from slice to slice."""
    end = np.random.default_rng(5).integers(0, LENGTH + 2, len(ids_NxT)) // (1 + np.arange(len(ids_NxT)) // 40)
    return np.where(
        np.arange(LENGTH) == end[:, None], TAGS.closing[0], np.where(ids_NxT == TAGS.closing[0], 1, ids_NxT)
    )


def rollout(case, lens, base, batch):
    """A whole rollout of the case, whose texts are made unlike, and its hyperparameters."""
    objective, hp = objectives.OBJECTIVES[case.partition('-')[0]], dataclasses.replace(PLAIN, **CASES[case])
    roll = read(base, batch, layer=LAYER, again=hp.reads_again)
    roll = jax.jit(objective.rollout, static_argnums=4)(lens, base, roll, KEY, hp)
    old = roll.logp_NxT if roll.logp_NxT is None or hp.updates == 1 else np.asarray(roll.logp_NxT) - 0.3
    roll = roll._replace(ids_NxT=marked(np.asarray(roll.ids_NxT)).astype(np.int32), logp_NxT=old)
    if hp.judged:
        roll = disagreeing(roll, lens, base)
        roll = jax.jit(objectives.judge, static_argnums=3)(
            make_lens(base, own_base=True, seed=9).encoder, base, roll, hp
        )
    return objective, roll, hp


def disagreeing(roll, lens, base):
    """A third of the texts is from another sampler; those of every third activation are the same."""
    ids, n = np.array(roll.ids_NxT).reshape(16, -1, LENGTH), len(roll.ids_NxT)
    ids[::3] = ids[::3, :1]
    ids = ids.reshape(n, LENGTH)
    logp = np.array(programs.score(lens.decoder, base, roll.a_NxD[:: n // 16], ids)[0])
    off = 0.3 * (np.random.default_rng(6).random(n) < 0.3)
    return roll._replace(ids_NxT=ids, logp_NxT=logp + off[:, None].astype(np.float32))


GRADIENT = jax.jit(objectives.gradient, static_argnums=(0, 5))


SLOW = ('grpo-natural', 'grpo-start', 'grpo-mean', 'grpo-field')


@pytest.mark.parametrize('case', [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def test_the_gradient_is_that_of_all_at_once(base, full, batch, case):
    objective, roll, hp = rollout(case, full, base, batch)
    reference = make_lens(base, own_base=True, seed=9).decoder if hp.needs_reference else ()
    knobs = FIELD_KNOBS if case == 'grpo-field' else KNOBS
    want, figures = GRADIENT(objective, full, base, roll, KEY, hp, knobs, reference)
    sliced = dataclasses.replace(hp, slices=4)
    got, metrics = GRADIENT(objective, full, base, roll, KEY, sliced, knobs, reference)
    assert size(want.decoder) > 1e-2 and size(want.encoder) > 1e-2
    close(got, want, steps=1024)
    assert metrics.keys() == figures.keys()
    for name in figures.keys() - ROUNDING:
        close(metrics[name], figures[name], steps=1024)
    if hp.tags:
        assert 0.2 < figures['extracted'] < 0.9


def test_slices_are_shares_of_what_each_device_holds():
    """In order within a device, documents and their rows alike, and back; nothing is sent."""
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        x = sharding.put_batch({'documents': np.arange(24)}, mesh)
        x |= sharding.put_batch({'rows': np.arange(48).reshape(48, 1)}, mesh)
        cut = jax.jit(sharding.slices, static_argnums=1)
        parts = cut(x | {'total': np.float32(3)}, 3)
        text = cut.lower(x, 3).compile().as_text()
        back = jax.jit(sharding.joined)(parts['rows'])
    np.testing.assert_array_equal(parts['documents'], np.arange(24).reshape(4, 3, 2).swapaxes(0, 1).reshape(3, 8))
    np.testing.assert_array_equal(parts['rows'][..., 0] // 2, np.repeat(parts['documents'], 2, axis=1))
    np.testing.assert_array_equal(parts['total'], [3, 3, 3])
    np.testing.assert_array_equal(back, x['rows'])
    assert not re.search(r'all-gather|all-to-all|all-reduce|collective-permute', text)


@pytest.mark.slow
@pytest.mark.parametrize('split', [False, True])
def test_on_a_mesh_as_on_one_device(base, full, batch, split):
    objective, roll, hp = rollout('grpo-natural', full, base, batch)
    want, figures = GRADIENT(objective, full, base, roll, KEY, hp, KNOBS, ())
    mesh, above = sharding.make_mesh(2, 2, 1), 0 if split else np.inf
    with jax.set_mesh(mesh):
        rows = jax.tree.map(lambda x: sharding.put_batch({'x': np.asarray(x)}, mesh)['x'], roll)
        arguments = sharding.place(full, mesh, above), sharding.place(base, mesh, above), rows
        got = GRADIENT(objective, *arguments, KEY, dataclasses.replace(hp, slices=2), KNOBS, ())
        got, metrics = jax.tree.map(np.asarray, got)
    close(got, want, steps=2048)
    for name in figures.keys() - ROUNDING:
        close(metrics[name], figures[name], steps=2048)


def step(phase, mesh, base, batch):
    with jax.set_mesh(mesh):
        return micro_step(phase, init_state(make_lens(base), phase, mesh), base, batch, KEY, phase.knobs(0))


@pytest.mark.slow
def test_a_step_has_the_same_work_in_less_memory():
    """FLOPs of utilisation; temporaries of wide rows, of which the step holds a quarter; the texts are drawn once."""
    mesh = sharding.make_mesh(1, 1)
    work, memory = [], []
    for slices in (1, 4):
        phase = phase_of('grpo', natural_prefix=(3, 1), group=8, length=20, slices=slices)
        shapes = {'tokens': (8, 30), 'positions': (8, 2), 'explanations': (8, 2, 20)}
        batch = {k: jax.ShapeDtypeStruct(s, np.int32) for k, s in shapes.items()}
        with jax.set_mesh(mesh):
            place = {k: jax.sharding.NamedSharding(mesh, sharding.rows(x.ndim)) for k, x in batch.items()}
            batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place[k]) for k, x in batch.items()}
            base = make_base(dataclasses.replace(TINY, vocab_size=560))
            traced = trace(phase, init_state(make_lens(base), phase, mesh), base, batch, KEY)[1]
            work.append(flops.by_scope(traced.jaxpr, base.config))
            memory.append(traced.lower().compile().memory_analysis().temp_size_in_bytes)
    # what stands left of the slot, one row, runs once in each slice
    assert work[0] == pytest.approx(work[1], rel=2e-3) and work[0]['score'] > 0
    assert memory[1] < 0.6 * memory[0]


@pytest.mark.slow
def test_a_step_goes_where_that_of_all_at_once_goes(base, batch):
    mesh = sharding.make_mesh(1, 1)
    whole, sliced = (step(phase_of('sft', group=2, slices=n), mesh, base, batch) for n in (1, 4))
    for name in ('grad_norm_decoder', 'grad_norm_encoder', 'loss_encoder', 'fve', 'entropy_nats'):
        close(sliced[1][name], whole[1][name], steps=2048)
