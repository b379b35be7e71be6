"""Steps of every objective, dense and with experts, on meshes of fake devices against the same steps on one device."""

import functools
import gc

import jax
import pytest

from tests.mesh_runs import CASES, assert_same, run

# (replica, data, model), and whether everything is split over `data`
MESHES = {
    '8x1': ((1, 8, 1), False),
    '4x2': ((1, 4, 2), False),
    '2x4': ((1, 2, 4), False),
    '1x8': ((1, 1, 8), False),
    '2x2x2 split': ((2, 2, 2), True),
}
STEPS, FEW = 20, 3
FORMS = ('llama-gumbel_full', 'llama-gumbel_truncated', 'gpt_oss-gumbel_full')


@pytest.fixture(autouse=True)
def programs_let_go():
    """Those of a dozen tests exhaust the memory maps of a process, see conftest."""
    yield
    jax.clear_caches()
    gc.collect()


@functools.cache
def one_device(case: str, steps: int):
    return run(case, steps=steps)


def check(case: str, mesh: str, steps: int) -> None:
    shape, split = MESHES[mesh]
    want = one_device(case, steps)
    assert_same(run(case, shape, split=split, steps=steps, given=want.ids), want)


@pytest.mark.parametrize('case', ['frozen-grpo', pytest.param('gpt_oss-sft', marks=pytest.mark.slow)])
def test_a_few_steps_on_a_mesh_with_everything_split_equal_those_on_one_device(case):
    check(case, '2x2x2 split', FEW)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('case', CASES)
def test_twenty_steps_on_a_mesh_equal_those_on_one_device(case, mesh):
    check(case, mesh, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize('case', FORMS)
def test_other_gradients_of_sampled_words_on_a_mesh_equal_those_on_one_device(case):
    check(case, '2x2x2 split', FEW)
