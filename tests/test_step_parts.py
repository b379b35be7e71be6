"""The parts of a step: arithmetic on a clock that is told what to say."""

import numpy as np
import pytest

from benchmarks import step_parts

NAMES = ('read', 'sample', 'score', 'update')


def measured(durations):
    """split_step of programs whose n-th run takes durations[name][n] seconds; the first is compilation."""
    t, runs = [0.0], {name: iter(values) for name, values in durations.items()}

    def program(name):
        def run():
            t[0] += next(runs[name])

        return run

    return step_parts.split_step({name: program(name) for name in durations}, now=lambda: t[0])


def test_parts_are_differences_of_medians_without_compilation():
    durations = {
        'read': (50, 1.0, 9.0, 1.25),
        'sample': (60, 4.0, 4.5, 0.5),
        'score': (70, 8.0, 8.5, 30.0),
        'update': (80, 9.5, 9.25, 9.0),
    }
    medians = [np.median(v[1:]) for v in durations.values()]
    assert measured(durations) == dict(zip(NAMES, np.diff([0, *medians]), strict=True))


@pytest.mark.parametrize('ends', [(3, 2, 7, 5), (9, 8, 7, 6), (1, 1, 1, 1), (2, 6, 5, 9)])
def test_noise_makes_no_part_negative_and_leaves_the_whole_as_measured(ends):
    parts = list(measured({name: (99, e, e, e) for name, e in zip(NAMES, ends, strict=True)}).values())
    assert min(parts) >= 0 and sum(parts) == ends[-1]
    # each beginning takes the least that anything which contains it has taken
    np.testing.assert_array_equal(np.cumsum(parts), [min(ends[i:]) for i in range(4)])
