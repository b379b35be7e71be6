"""The parts of a step: arithmetic on a clock that is told what to say, and the beginnings of a real step."""

import functools

import jax
import numpy as np
import pytest

from lens import objectives, optimizer, schedules, timing
from lens.config import Phase
from lens.lens_init import init_state
from lens.sharding import make_mesh, put_batch
from lens.train import train_step
from tests.conftest import LAYER, LENGTH, make_base, make_lens

NAMES = ('extraction', 'sampling', 'scoring', 'update')


def measured(durations):
    """split_step of programs whose n-th run takes durations[name][n] seconds; the first is compilation."""
    t, runs = [0.0], {name: iter(values) for name, values in durations.items()}

    def program(name):
        def run():
            t[0] += next(runs[name])

        return run

    out = timing.split_step({name: program(name) for name in durations}, now=lambda: t[0])
    assert all(next(r, None) is None for r in runs.values())
    return out


def test_parts_are_differences_of_medians_without_compilation():
    durations = {
        'extraction': (50, 1.0, 9.0, 1.25),
        'sampling': (60, 4.0, 4.5, 0.5),
        'scoring': (70, 8.0, 8.5, 30.0),
        'update': (80, 9.5, 9.25, 9.0),
    }
    medians = [np.median(v[1:]) for v in durations.values()]
    parts = dict(zip((f'{n}_s' for n in NAMES), np.diff([0, *medians]), strict=True))
    assert measured(durations) == parts | {'step_s': 9.25}


@pytest.mark.parametrize('ends', [(3, 2, 7, 5), (9, 8, 7, 6), (1, 1, 1, 1), (2, 6, 5, 9)])
def test_noise_makes_no_part_negative_and_leaves_the_whole_as_measured(ends):
    out = measured({name: (99, e, e, e) for name, e in zip(NAMES, ends, strict=True)})
    parts = [out[f'{n}_s'] for n in NAMES]
    assert min(parts) >= 0 and sum(parts) == out['step_s'] == ends[-1]
    # each beginning takes the least that anything which contains it has taken
    np.testing.assert_array_equal(np.cumsum(parts), [min(ends[i:]) for i in range(4)])


@pytest.mark.slow
def test_the_beginnings_compute_what_the_step_does_and_leave_the_state(batch):
    objective = objectives.OBJECTIVES['grpo']
    hp = objectives.Hparams(layer=LAYER, length=LENGTH, group=3, updates=2, clip=0.2)
    rates = {s: schedules.constant(1e-2) for s in optimizer.SIDES}
    tx = optimizer.make((optimizer.Row('.*', 1.0, 0.0, 'all'),), rates, 1.0, updates=hp.updates)
    static = {'objective': objective, 'hparams': hp, 'tx': tx, 'start': 4}
    mesh, base, key = make_mesh(1, 1), make_base(), jax.random.key(7)
    with jax.set_mesh(mesh):
        phase = Phase('p', 4, 10, objective, hp, tx, 8, 2, False)
        state, rows = init_state(make_lens(base), phase, mesh, 6), put_batch(batch, mesh)
        prefixes = timing.step_prefixes(train_step, state, base, rows, key, **static)
        assert tuple(prefixes) == NAMES
        seconds = timing.split_step(prefixes)
        out = {n: f() for n, f in prefixes.items()}
        state_after, figures = train_step(state, base, rows, key, **static)  # donates: the state was still there

    parts = [seconds[f'{n}_s'] for n in NAMES]
    assert min(parts) >= 0 and 0 < seconds['step_s'] < 60
    np.testing.assert_allclose(sum(parts), seconds['step_s'], rtol=1e-9)

    expected = objectives.read(base, batch, LAYER).a_NxD
    np.testing.assert_allclose(out['extraction'].a_NxD, expected, rtol=1e-5, atol=1e-6)
    assert out['sampling'].a_NxD.shape == (16 * 3, 24)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, out['update'], (state_after, figures))
    scored = out['scoring'][1]
    assert scored.keys() <= figures.keys()
    for k in ('loss_encoder', 'entropy_nats', 'fve', 'repeated'):  # of the same texts, so the same randomness
        np.testing.assert_allclose(scored[k], figures[k], rtol=1e-4, err_msg=k)
    for side in optimizer.SIDES:
        squares = (np.sum(np.square(g)) for g in jax.tree.leaves(getattr(out['scoring'][0], side)))
        np.testing.assert_allclose(np.sqrt(sum(squares)), figures[f'grad_norm_{side}'], rtol=1e-3, err_msg=side)
