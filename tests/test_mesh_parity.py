"""Steps of every objective, dense and with experts, on meshes of fake devices against the same steps on one device."""

import gc

import jax
import pytest

from tests.mesh_runs import assert_same, run

SPLIT = (2, 2, 2)  # (replica, data, model), everything that can be is split over `data`
CASES = [
    ('frozen-sft', SPLIT),
    ('frozen-grpo', SPLIT),
    ('llama-grpo', (1, 2, 4)),
    ('llama-gumbel', (1, 4, 2)),
    ('llama-gumbel_full', SPLIT),
    ('frozen-grpo_field', SPLIT),
    ('gpt_oss-sft', (1, 1, 8)),
    ('gpt_oss-grpo', (1, 4, 2)),
    ('gpt_oss-gumbel', SPLIT),
]


@pytest.fixture(autouse=True)
def programs_let_go(request):
    """Those of a dozen tests exhaust the memory maps of a process, see conftest; one test does not."""
    yield
    if request.node.get_closest_marker('slow'):
        jax.clear_caches()
        gc.collect()


@pytest.mark.parametrize(
    ('case', 'mesh'),
    [CASES[0], *(pytest.param(*c, marks=pytest.mark.slow, id='-'.join(map(str, c))) for c in CASES[1:])],
)
def test_three_steps_on_a_mesh_equal_those_on_one_device(case, mesh):
    want = run(case)
    assert_same(run(case, mesh, split=mesh == SPLIT, given=want.ids), want)
