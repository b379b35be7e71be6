"""benchmarks.h100 in small: the programs of its parts are made, read and timed."""

import jax
import numpy as np
import pytest

from benchmarks import agreement, full_size, h100
from lens import sharding


@pytest.fixture(scope='module')
def mesh():
    return sharding.make_mesh(1, 1)


@pytest.mark.parametrize(
    'name',
    ['llama_sft', *(pytest.param(n, marks=pytest.mark.slow) for n in ('qwen_grpo',))],
)
def test_a_part_runs_in_small(mesh, name):
    part = full_size.small(full_size.PARTS[name])
    row = h100.run_part(part, mesh, runs=True)
    assert 'failed' not in row, row
    assert row['memory_gb'] > row['temporaries_gb'] > 0 and row['launches'] > 0 and len(row['kernels']) == 5
    if part.work != 'step':
        return
    assert row['explanations_s'] == pytest.approx((12 if part.phase == 'grpo' else 6) / row['seconds'])
    assert row['mfu'] == pytest.approx(row['model_tflop'] * 1e12 / row['seconds'] / 989e12)


def test_rates_of_reading_and_sampling():
    parts, kernels = full_size.PARTS, [kernel('jit(f)/prefill/dot', 3e9), kernel('jit(f)/decode/dot', 6e9)]
    compiled = h100.Compiled([], [], kernels, {'model_tflop': 0.0}, 150)
    rates = h100.rates(parts['qwen_sample'], compiled, 0.003)
    assert rates == pytest.approx({'explanations_s': 256 / 0.003, 'tokens_s': 38400 / 0.003, 'token_ms': 2 / 149})
    assert h100.rates(parts['qwen_read'], compiled, 0.5) == {'tokens_s': 4 * 4096 / 0.5}


def kernel(source, moved):
    return h100.roofline.Kernel('k', 'fusion', (), 1.0, moved, 0.0, 0.0, False, source)


def test_a_part_that_fails_says_why(mesh):
    part = full_size.small(full_size.PARTS['gptoss_read'])
    row = h100.run_part(part._replace(values={'layer': 99}), mesh, runs=True)
    assert row == {'failed': 'LensError: layer=99 is not a block of the subject, which has blocks 0..23.'}


def test_the_table_leaves_out_what_no_part_has():
    rows = {'a': {'roof_ms': 12.3, 'mfu': 0.5}, 'b': {'failed': 'x'}, 'c': {'roof_ms': 1234.5}}
    assert h100.table(rows).splitlines() == [
        'part  roof ms    MFU',
        'a          12  50.0%',
        'b                   ',
        'c        1234       ',
    ]


def test_what_is_filled_has_the_placement_and_type_of_its_shape(mesh):
    place = jax.sharding.NamedSharding(mesh, sharding.P())
    shapes = {
        'blocks': {'w': jax.ShapeDtypeStruct((3, 5, 7), np.float32, sharding=place)},
        'norm': jax.ShapeDtypeStruct((7,), jax.numpy.bfloat16, sharding=place),
        'ids': jax.ShapeDtypeStruct((4, 2), np.int32, sharding=place),
        'opt': {'mu': jax.ShapeDtypeStruct((5,), np.float32, sharding=place)},
        'rate': np.float32(0.5),
    }
    x = full_size.fill(shapes)
    assert all(
        (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(*map(jax.tree.leaves, (x, shapes)), strict=True)
    )
    assert 0.01 < np.std(x['blocks']['w']) < 0.03 and np.allclose(x['norm'].astype(np.float32), 1, atol=0.1)
    assert not x['opt']['mu'].any() and x['rate'] == 0.5 and x['ids'].min() >= 0 and x['ids'].max() < 24


def test_the_difference_of_trees_is_relative():
    want = {'a': np.full(3, 2.0, np.float32), 'b': np.zeros(2, np.float32)}
    assert agreement.difference(want, want) == 0
    assert agreement.difference(
        {'a': np.full(3, 2.2, np.float32), 'b': np.zeros(2, np.float32)}, want
    ) == pytest.approx(0.1)


@pytest.mark.slow
def test_a_small_model_on_this_device_is_the_one_on_the_cpu(capsys):
    assert agreement.main(['llama'], ['float32'])
    assert '"family": "llama", "dtype": "float32"' in capsys.readouterr().out
