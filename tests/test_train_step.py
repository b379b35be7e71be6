"""One micro-step: what compiles it, what it moves and what it leaves."""

import jax
import numpy as np
import pytest

from lens import objectives
from lens.sharding import make_mesh, path, put_batch
from lens.train import init_state, micro_step, trace, train_step
from tests.phases import RATES, phase_of
from tests.tiny_world import make_base, make_lens

KEY = jax.random.key(7)
TERMS = {
    'sft': {'mse_weight': 1.0, 'kl_weight': 0.1},
    'grpo': {'mse_weight': 1.0, 'beta': 0.1, 'lm_weight': 0.1, 'entropy_weight': 0.1},
    'gumbel': {'mse_weight': 1.0, 'beta': 0.1, 'tau': 0.7},
}
GROUP = {'grpo': {'group': 2}}


def phase(objective, weights=None, **changes):
    return phase_of(
        objective,
        weights=TERMS[objective] | (weights or {}),
        natural_prefix=(3, 1),
        **GROUP.get(objective, {}) | changes,
    )


@pytest.fixture(scope='module')
def mesh():
    return make_mesh(1, 1)


@pytest.fixture(scope='module')
def run(base, batch, mesh):
    """Steps of a phase from the same lens: the state after them, and the figures of each."""

    def run(p, steps=1, own_base=False):
        with jax.set_mesh(mesh):
            state, out = init_state(make_lens(base, own_base=own_base), p, mesh, p.start), []
            for t in range(steps):
                state, metrics = micro_step(p, state, base, batch, KEY, p.knobs(t))
                out.append({k: float(v) for k, v in metrics.items()})
        return state, out

    return run


@pytest.mark.parametrize(
    'objective', [pytest.param(x, marks=[pytest.mark.slow] * (x != 'sft')) for x in objectives.OBJECTIVES]
)
def test_numbers_do_not_compile_another_program(run, objective):
    """Learning rates, every weight, tau, clipping, the start of the phase: one program; and each number has an effect."""
    _, (plain,) = run(phase(objective))
    programs = train_step._cache_size()
    sweeps = [{'rates': {k: 3 * v for k, v in RATES.items()}}, {'start': 40}, {'clip_norm': 1e-3}]
    sweeps += [{'weights': {k: 3 * v}} for k, v in TERMS[objective].items()]
    for sweep in sweeps:
        _, (other,) = run(phase(objective, **sweep))
        assert (objective == 'sft' and 'start' in sweep) or other != plain, f'{sweep} changes nothing'
    assert train_step._cache_size() == programs


@pytest.mark.parametrize('objective', objectives.OBJECTIVES)
def test_one_document_makes_a_batch(base, batch, mesh, objective):
    """All terms, traced: where a row of a batch lives is part of its type."""
    p = phase(objective, {'kl_weight': 0.1}, documents=1)
    with jax.set_mesh(mesh):
        one = put_batch({k: x[:1] for k, x in batch.items()}, mesh)
        _, step = trace(p, init_state(make_lens(base), p, mesh), base, one, KEY)
    assert step.out_info[1]['loss_encoder'].shape == ()


def test_what_changes_the_program_compiles_another(run):
    before = train_step._cache_size()
    run(phase('sft'))
    run(phase('sft', {'kl_weight': 0.0}))  # the term is not in it
    assert train_step._cache_size() <= before + 2


def test_the_base_stays_byte_identical_and_every_trainable_leaf_moves(base, run):
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(base)]
    state, _ = run(phase('sft'), steps=2)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(base)] == before
    start = jax.tree_util.tree_leaves_with_path(make_lens(base))
    moved = {
        path(kp): not np.array_equal(x, y) for (kp, x), y in zip(start, jax.tree.leaves(state.params), strict=True)
    }
    assert all(moved.values()), [k for k, v in moved.items() if not v]
    assert state.step == 2


def test_equal_runs_are_equal_and_steps_draw_other_texts(run):
    _, once = run(phase('grpo'), steps=2)
    _, again = run(phase('grpo'), steps=2)
    assert once == again
    assert once[0]['entropy_nats'] != once[1]['entropy_nats']


@pytest.mark.slow
def test_several_updates_of_one_rollout(batch, mesh):
    """Two optimizer steps on the same explanations, all of it trained: twice as far, the base untouched."""
    base = make_base()
    p = phase_of('grpo', group=4, updates=2)
    with jax.set_mesh(mesh):
        state = init_state(make_lens(base, own_base=True), p, mesh)
        start = jax.tree.map(np.asarray, state.params)
        state, out = micro_step(p, state, base, batch, KEY, p.knobs(0))
    counts = [int(x) for kp, x in jax.tree_util.tree_leaves_with_path(state.opt) if path(kp).endswith('count')]
    assert set(counts) == {2} and state.step == 1 and out['logp_diff_max'] < 1e-4
    moved = [
        not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(start), jax.tree.leaves(state.params), strict=True)
    ]
    assert all(moved)
