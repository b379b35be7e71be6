"""Learning rates by step."""

import math

import jax
import numpy as np
import pytest

from lens.schedules import warmup_cosine

PEAK, STEPS, WARMUP, FINAL = 3e-3, 50, 7, 0.1


def rates(steps=STEPS, warmup=WARMUP, final=FINAL):
    return np.asarray(warmup_cosine(PEAK, steps, warmup, final)(np.arange(steps + 1)))


def test_end_value_is_exact():
    assert rates()[-1] == np.float32(PEAK * FINAL)
    assert rates(final=0.0)[-1] == 0
    assert warmup_cosine(PEAK, STEPS, WARMUP, FINAL)(STEPS + 1000) == np.float32(PEAK * FINAL)


def test_peak_is_at_the_end_of_the_warm_up_and_nowhere_else():
    r = rates()
    assert r[WARMUP] == np.float32(PEAK)
    assert np.delete(r, WARMUP).max() < np.float32(PEAK)


def test_warm_up_is_linear_and_its_first_step_is_not_lost():
    want = [PEAK * (i + 1) / (WARMUP + 1) for i in range(WARMUP + 1)]
    np.testing.assert_allclose(rates()[: WARMUP + 1], want, rtol=1e-6)


def test_monotone_up_then_down():
    r = rates()
    assert (np.diff(r[: WARMUP + 1]) > 0).all()
    assert (np.diff(r[WARMUP:]) < 0).all()


def test_cosine_between():
    floor = PEAK * FINAL
    for step in (WARMUP, 20, 33, STEPS):
        angle = math.pi * (step - WARMUP) / (STEPS - WARMUP)
        want = floor + (PEAK - floor) * math.cos(angle / 2) ** 2  # (1 + cos x) / 2
        np.testing.assert_allclose(rates()[step], want, rtol=1e-5)


def test_no_warm_up_starts_at_the_peak():
    assert rates(warmup=0)[0] == np.float32(PEAK)


def test_final_fraction_1_is_constant_after_the_warm_up():
    np.testing.assert_array_equal(rates(final=1.0)[WARMUP:], np.float32(PEAK))


@pytest.mark.parametrize('step', [0, 3, 7, 30, 50])
def test_same_under_jit(step):
    f = warmup_cosine(PEAK, STEPS, WARMUP, FINAL)
    np.testing.assert_allclose(jax.jit(f)(step), f(step), rtol=1e-6)
