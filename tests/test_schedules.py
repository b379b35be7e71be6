"""Durations and schedules against plain numpy formulas at every step."""

import json

import ml_collections
import numpy as np
import pytest

from configs import base
from lens import schedules
from lens.errors import LensError
from lens.schedules import Units, constant, duration, parse

CLOCK = Units(accumulation=3, steps_per_epoch=14, total=90)
STEPS = np.arange(120)


def values(text, clock=CLOCK, steps=STEPS):
    return parse(text, clock, 'sft.tau')(steps)


def check(text, want, clock=CLOCK):
    """`want`: numpy values by step up to the end of the phase."""
    np.testing.assert_allclose(values(text, clock, np.arange(clock.total)), want, rtol=2e-6, atol=1e-7)


def fraction(first, last):
    """0 up to `first`, 1 from `last` on, linear between."""
    return np.clip((np.arange(CLOCK.total) - first) / (last - first), 0, 1)


@pytest.mark.parametrize(
    ('value', 'steps'),
    [
        (600, 600),
        ('600', 600),
        ('600s', 600),
        ('1steps', 1),
        ('7os', 21),
        ('5e', 70),
        ('0.5e', 7),
        ('1.25epochs', 18),  # 17.5 rounded to even
        ('0.01e', 1),  # never rounded down to off
        (-1, 90),
        ('-1', 90),
        (0, 0),
        ('0', 0),
        ('0e', 0),
        (' 4s ', 4),
    ],
)
def test_durations(value, steps):
    assert duration(value, CLOCK, 'eval.every') == steps


def test_never():
    assert duration(None, CLOCK, 'eval.every') is None


@pytest.mark.parametrize(
    'value', ['', 's', '5x', '1.5s', '0.5os', '-2', '-1s', '1e-3', '1e5', 2.5, True, '5 e', 'None']
)
def test_bad_durations_name_the_key_and_the_forms(value):
    with pytest.raises(LensError, match=r'eval.every=.* is not a duration; accepted: 600, "600s" .*"0.5e"') as e:
        duration(value, CLOCK, 'eval.every')
    assert '\n' not in str(e.value)


def test_units_that_are_not_known_here():
    with pytest.raises(LensError, match=r"sft.steps='5e' counts epochs, but the data is not known here"):
        duration('5e', Units(), 'sft.steps')
    with pytest.raises(LensError, match=r'sft.steps=-1 has no phase to fill'):
        duration(-1, Units(steps_per_epoch=3), 'sft.steps')


def test_a_number_is_constant():
    for text in (0.3, '0.3', 'constant 0.3', '3e-1'):
        assert (values(text) == np.float32(0.3)).all()


def test_linear():
    check('linear 2 0.5', 2 + fraction(0, 87) * (0.5 - 2))  # 87: the last optimizer step of 90 micro-steps


def test_cosine():
    check('cosine 2 0.5', 0.5 + 0.75 * (1 + np.cos(np.pi * fraction(0, 87))))


def test_after_and_over_and_the_order_of_clauses():
    want = 0.5 + 0.75 * (1 + np.cos(np.pi * fraction(21, 21 + 30 - 3)))
    for text in ('cosine 2 0.5 after 7os over 30s', 'cosine 2 0.5 over 10os after 21'):
        check(text, want)


def test_over_minus_one_is_what_remains():
    for text in ('cosine 2 0.5 after 7os warmup 9s', 'linear 1 0.1 warmup 5s'):
        np.testing.assert_array_equal(values(f'{text} over -1'), values(text))


@pytest.mark.parametrize('text', ['constant 2', 'linear 2 0.5', 'cosine 2 0.5'])
def test_warm_up_of_every_kind(text):
    got = values(f'{text} warmup 6os')
    want = 2 * (1e-7 + (1 - 1e-7) * np.arange(18) / 18)
    np.testing.assert_allclose(got[:18], want, rtol=1e-6, atol=2 * np.finfo(np.float32).eps)
    assert got[18] == 2
    if text != 'constant 2':
        assert got[87] == np.float32(0.5) and (np.diff(got[18:88]) < 0).all()


def test_warm_up_comes_before_the_constant_part():
    got = values('linear 2 0.5 after 12s over 30s warmup 9s')
    assert (got[9:22] == 2).all() and got[22] < 2 and got[48] == np.float32(0.5)


@pytest.mark.parametrize('accumulation', [1, 3, 4, 7])
@pytest.mark.parametrize('kind', ['linear', 'cosine'])
def test_the_floor_is_exact_at_the_last_optimizer_step_and_not_before(kind, accumulation):
    clock = Units(accumulation, None, 12 * accumulation)
    at = np.arange(12) * accumulation  # where optimizer steps begin
    floor = np.float32(0.07)
    whole = values(f'{kind} 0.3 0.07', clock, at)
    assert whole[-1] == floor and (whole[:-1] > floor).all() and whole[0] == np.float32(0.3)
    part = values(f'{kind} 0.3 0.07 after 2os over 5os', clock, at)
    assert part[6] == floor and part[5] > floor and (part[6:] == floor).all() and (part[:3] == np.float32(0.3)).all()


def test_a_warm_up_longer_than_the_phase_is_cut_off():
    got = values('cosine 2 0.5 warmup 100s', Units(1, None, 5), np.arange(5))
    np.testing.assert_allclose(got, 2 * np.arange(5) / 100, rtol=1e-5, atol=3e-7)


def test_one_step_phases():
    assert values('cosine 2 0.5', Units(1, None, 1), np.arange(1)) == np.float32(0.5)


def test_one_step_at_a_time_as_all_at_once():
    """Also across the blocks that values are made in."""
    schedule = parse('cosine 2 0.5 warmup 6s', Units(1, None, 3000), 'sft.tau')
    at = np.array([0, 5, 6, 1023, 1024, 2999, 4000])
    assert [schedule(int(t)) for t in at] == schedule(at).tolist()
    assert schedule(7).dtype == np.float32 and schedule(at).dtype == np.float32


def test_what_is_zero_everywhere_is_off():
    assert not parse('linear 0 0', CLOCK, 'k') and not constant(0)
    assert parse('linear 0 1', CLOCK, 'k') and parse('cosine 1 0', CLOCK, 'k')


@pytest.mark.parametrize(
    ('value', 'problem'),
    [
        ('', 'is not a value'),
        (None, 'is not a value'),
        (True, 'is not a value'),
        ('exponential 1 0.1', 'is not a value'),
        ('cosine 1', 'is not a value'),
        ('cosine one 0', 'is not a value'),
        ('1 2', 'is not a value'),
        ('nan', 'is not a value'),
        (np.nan, 'is not a value'),
        (-np.inf, 'is not a value'),
        ('1e400', 'is not a value'),
        ('1e39', 'is not a value'),  # infinite in float32
        ('-1e39', 'is not a value'),
        (10**40, 'is not a value'),
        ('linear 1 1e999', 'is not a value'),
        ('cosine inf 1', 'is not a value'),
        ('cosine 1 0' + ' x' * 99_998, 'has a clause'),
        ('cosine 1 0 warmup', 'is not a value'),
        ('cosine 1 0 power 2', "has a clause 'power' that cosine does not take"),
        ('constant 1 over 5s', "has a clause 'over'"),
        ('linear 1 0 over 5s over 6s', "has a clause 'over'"),
    ],
)
def test_bad_values_name_the_key_and_the_forms(value, problem):
    with pytest.raises(LensError, match=r'^grpo.tau=.*accepted: a number, "constant 1", "linear 1 0.1".*"0.5e"') as e:
        parse(value, CLOCK, 'grpo.tau')
    assert problem in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 1000


@pytest.mark.parametrize('value', [10**12, str(2**31), '1' * 400, f'{10**12}e', '1073741824os', '200000000.5e'])
def test_durations_beyond_the_counter_of_steps(value):
    with pytest.raises(LensError, match=r'sft.steps=.* is longer than 2147483647 micro-steps') as e:
        duration(value, CLOCK, 'sft.steps')
    assert len(str(e.value)) < 400
    assert duration(2**31 - 1, CLOCK, 'sft.steps') == 2**31 - 1


def test_phases_that_are_longer_together_than_the_counter_of_steps():
    c = base.get_config()
    c.sft.steps = c.grpo.steps = 2**30
    with pytest.raises(LensError, match=r'sft.steps, grpo.steps make more than 2147483647 micro-steps'):
        schedules.clocks(c, None)


def test_values_of_the_longest_phase_are_finite():
    clock = Units(3, None, 2**31 - 1)
    for text in ('cosine 1e30 -1e30 warmup 2147483647s', 'linear 1e30 -1e30 warmup 2000000000s after 2000000000s'):
        assert np.isfinite(values(text, clock, np.array([0, 1, 2**31 - 2]))).all()


def test_a_bad_duration_inside_a_value_names_its_clause():
    with pytest.raises(LensError, match=r"grpo.tau: over='5x' is not a duration; accepted"):
        parse('cosine 1 0 over 5x', CLOCK, 'grpo.tau')


def test_clocks_of_phases():
    c = base.get_config()
    c.sft.documents, c.sft.steps, c.sft.accumulate = 8, '2e', 4
    c.grpo.documents, c.grpo.steps = 3, 11
    sft, grpo = schedules.clocks(c, 50)
    assert sft == Units(4, 7, 16)  # 14 micro-steps, rounded up to whole optimizer steps
    assert grpo == Units(1, 17, 11)
    c.grpo.steps = 0
    with pytest.raises(LensError, match=r'grpo.steps=0 must be positive; drop the phase'):
        schedules.clocks(c, 50)


@pytest.mark.parametrize('value', [600, '600s', '5e', -1, None, 0.5])
def test_keys_take_numbers_and_strings_and_survive_json(value):
    c = base.get_config()
    c.sft.steps = value
    assert ml_collections.ConfigDict(c.to_dict()).sft.steps == value
    again = ml_collections.ConfigDict(json.loads(c.to_json()))
    assert again.sft.steps == value and type(again.sft.steps) is type(value)
