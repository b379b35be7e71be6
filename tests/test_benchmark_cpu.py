"""The benchmark against PyTorch: both sides give the same numbers, and it says what they are and what failed."""

import jax
import numpy as np
import pytest
import torch

from benchmarks import cpu, timing
from lens import hf, sharding
from lens.models.rope import Rope
from lens.models.transformer import TransformerConfig

torch.set_num_threads(1)  # tiny matrices
# vocabulary 56, d 24, 4 blocks, 6 query and 2 kv heads of 10, feed-forward 40
TINY = TransformerConfig(
    family='llama',
    vocab_size=56,
    d_model=24,
    n_layers=4,
    n_heads=6,
    n_kv_heads=2,
    head_dim=10,
    d_ff=40,
    norm_eps=1e-5,
    tied=True,
    max_positions=64,
    ropes=(Rope(500.0),),
)
SHAPE = cpu.Shape(documents=3, width=11, activations=9, length=5, prompt=8)


@pytest.fixture(scope='module')
def sides(tmp_path_factory):
    """(our programs by work, the same in PyTorch)"""
    g, mesh = cpu.given(TINY, SHAPE, tmp_path_factory.mktemp('model')), sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
        base = hf.load_model(g.directory, mesh=mesh)
        lens = cpu.make_lens(base, TINY.n_layers // 2, g.left, g.right)
        yield cpu.ours(base, SHAPE, g, mesh), cpu.Theirs(TINY, SHAPE, g, lens, compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize('work', cpu.WORKS)
def test_both_sides_give_the_same_numbers(sides, work):
    ours, theirs = sides
    for _ in range(2):  # the second training step sees what the optimizer did in the first
        numbers = jax.device_get(ours[work].numbers(ours[work].run()))
        assert cpu.difference(numbers, getattr(theirs, work)()) < 1e-5


@pytest.mark.slow
def test_floor_counts_the_products_of_the_model(sides):
    c, (b, t, n, length, layer) = TINY, (3, 11, 9, 5, 2)
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    matrices = 2 * (2 * c.d_model * heads + 2 * c.d_model * kv + 3 * c.d_model * c.d_ff)
    adapters = 2 * cpu.RANK * (4 * c.d_model + 2 * heads + 2 * kv)
    head = 2 * c.d_model * c.vocab_size
    score, encode = SHAPE.prompt + length - 1, SHAPE.prompt - 1 + length  # rows of each side

    def stack(blocks, rows, width, times=(1, 1, 0), before=0):
        """times: of the matrices, of attention (a query sees half of the keys, its own, those before), of the adapters."""
        each = np.array([matrices, 2 * 2 * heads * (before + (width + 1) / 2), adapters])
        return blocks * rows * width * np.dot(times, each)

    left = SHAPE.prompt // 2  # of the slot: the same for all rows, so that sampling runs it once
    # a gradient costs as much again in a frozen matrix, twice as much where both factors have one
    trained = (2, 3, 3)
    want = {
        'forward': stack(4, b, t) + b * t * head,
        'read': stack(layer + 1, b, t),
        'sft': stack(4, n, score, trained)
        + stack(layer + 1, n, encode, trained)
        + n * length * head * 2
        + 2 * n * c.d_model**2 * 3,
        'sample': stack(4, 1, left) + stack(4, n, score - left, before=left) + n * length * head,
    }
    np.testing.assert_allclose([sides[0][k].gflop * 1e9 for k in want], list(want.values()), rtol=1e-6)


def test_a_difference_is_seen():
    x = np.arange(12.0).reshape(4, 3)
    assert cpu.difference({'x': x}, {'x': x}) == 0
    assert cpu.difference({'x': x, 'y': x}, {'x': x, 'y': torch.tensor(x * 1.01)}) == pytest.approx(0.01)
    ids = np.arange(80).reshape(40, 2)
    one, many = ids.copy(), ids.copy()
    one[3, 1] += 1
    many[:3] += 1
    logp = -1.0 - ids
    changed = np.where(np.arange(40)[:, None] == 3, 0, logp)
    assert cpu.difference({'ids': ids, 'logp': logp}, {'ids': one, 'logp': changed}) == 0
    with pytest.raises(ValueError, match='only 92% of the rows'):
        cpu.difference({'ids': ids, 'logp': logp}, {'ids': many, 'logp': logp})


def test_programs_run_in_turn():
    order = []
    times = timing.in_turn({k: lambda k=k: order.append(k) for k in 'abc'}, 3)
    assert ''.join(order) == 'abcabcabc' and set(times) == set('abc')


class Other:
    def __init__(self, result):
        self.result = result

    def forward(self):
        if isinstance(self.result, Exception):
            raise self.result
        return {'x': self.result}


def test_what_pytorch_cannot_do_is_said_and_left_out(monkeypatch):
    monkeypatch.setattr(cpu, 'SIDE', 8)
    x, said = np.ones(3), []
    mine = cpu.Program(lambda: x, lambda x: {'x': x})
    others = {'eager': Other(x), 'compiled': Other(RuntimeError('no compiler\nmore'))}
    times = cpu.measure('forward', mine, others, 2, said.append)
    assert set(times) == {'lens', 'eager', 'JAX float32', 'PyTorch float32', 'PyTorch bfloat16'}
    assert said[1] == 'forward: PyTorch compiled does not run: no compiler'
    with pytest.raises(ValueError, match='the numbers of PyTorch eager'):
        cpu.measure('forward', mine, {'eager': Other(x + 1e-3)}, 2, said.append)


def test_table_gives_shares_and_ratios():
    product = 2 * cpu.SIDE**3 / 1e9
    times = {'JAX float32': 2.0, 'PyTorch float32': 1.0, 'PyTorch bfloat16': 0.5, 'lens': 4.0, 'eager': 6.0}
    last = cpu.table({'sft': times}, {'sft': 3 * product}).splitlines()[-1]
    cells = [x.strip() for x in last.strip('|').split('|')]
    assert cells == ['sft', f'{3 * product / 1e3:.3g}', '3', '1.5', '4', '0.75', '6', '', '1.5', '']
