"""Weights lie where the table of placements says; what does not fit is refused. Steps on meshes: test_mesh_parity.py."""

import dataclasses

import jax
import numpy as np
import pytest

from lens import sharding
from lens.errors import LensError
from lens.models import lora
from lens.models.encoder import encode
from tests import programs
from tests.conftest import LAYER, LENGTH, TINY, make_base, make_lens


def test_weights_are_split_over_the_model_axis():
    mesh = sharding.make_mesh(2, 4)
    base = sharding.place(make_base(), mesh)
    split = {
        sharding.path(kp): x.addressable_shards[0].data.size / x.size
        for kp, x in jax.tree_util.tree_leaves_with_path(base)
    }
    for name in (
        'blocks/attn/q',
        'blocks/attn/k',
        'blocks/attn/v',
        'blocks/attn/o',
        'blocks/mlp/gate',
        'blocks/mlp/up',
        'blocks/mlp/down',
        'embedding',
        'head',
    ):
        assert split[name] == 1 / 4, name
    assert split['final_norm/scale'] == split['blocks/attn_norm/scale'] == 1


def equations(jaxpr):
    """All of them, those of loops and checkpoints too."""
    for e in jaxpr.eqns:
        yield e
        inner = jax.tree.leaves(list(e.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'))
        for x in (getattr(x, 'jaxpr', x) for x in inner):
            if hasattr(x, 'eqns'):
                yield from equations(x)


@pytest.mark.parametrize('tied', [False, True])
def test_what_is_split_over_data_is_whole_where_it_meets_activations(tied):
    """XLA multiplies with a split weight as well, by exchanging activations: as right, and slower. Rows carry both
    ROW_AXES, so `data` alone is a weight's."""
    mesh = sharding.make_mesh(2, 2, 2)
    base = make_base(dataclasses.replace(TINY, tied=tied))
    adapters = {
        n: lora.init_adapters(base.blocks, n, '.*', 2, 4.0, jax.random.key(0)) for n in (TINY.n_layers, LAYER + 1)
    }
    lens = make_lens(base, adapters=tuple(adapters.values()))

    def forward(lens, base, ids, a):
        return programs.teacher_forced_logits(lens.decoder, base, a, ids), encode(lens.encoder, base, ids)

    with jax.set_mesh(mesh):
        base, lens = sharding.place(base, mesh, 0), sharding.place(lens, mesh, 0)
        batch = sharding.put_batch({'ids': np.zeros((8, LENGTH), np.int32), 'a': np.zeros((8, TINY.d_model))}, mesh)
        split = [x for x in jax.tree.leaves((base, lens)) if 'data' in jax.typeof(x).sharding.spec]
        jaxpr = jax.make_jaxpr(forward)(lens, base, batch['ids'], batch['a'].astype(np.float32)).jaxpr
    products = [e for e in equations(jaxpr) if e.primitive.name == 'dot_general']
    assert len(split) > 30 and len(products) > 30
    for e in products:
        assert all('data' not in x.aval.sharding.spec for x in e.invars), f'a product of {[x.aval for x in e.invars]}'


@pytest.mark.parametrize(('data', 'rows', 'places'), [(1, 1, 1), (1, 1, 3), (1, 2, 1), (2, 2, 1), (2, 4, 3)])
def test_each_row_gives_values_at_its_own_places(data, rows, places):
    """One value of one row as well: one explanation of one activation."""
    draw, mesh = np.random.default_rng(0), sharding.make_mesh(data, 1)
    x, at = draw.integers(0, 99, (rows, 7)), draw.integers(0, 7, (rows, places))
    with jax.set_mesh(mesh):
        got = jax.jit(sharding.take)(*sharding.put_batch({'x': x, 'at': at}, mesh).values())
    assert got.sharding.spec == sharding.rows(2)
    np.testing.assert_array_equal(got, np.take_along_axis(x, at, axis=1))


def test_unknown_parameter_and_bad_meshes_are_refused():
    mesh = sharding.make_mesh(2, 4)
    with pytest.raises(KeyError, match=r"no placement rule .* 'mystery'"):
        sharding.place({'mystery': np.zeros(3)}, mesh)
    with pytest.raises(
        LensError, match=r'mesh.replica=1 x mesh.data=4 x mesh.model=3 needs 12 devices, but JAX sees 8'
    ):
        sharding.make_mesh(4, 3)
    with pytest.raises(LensError, match=r'sft.documents=3 cannot be split over mesh.replica x mesh.data = 2 devices'):
        sharding.check_divides(3, 'sft.documents', mesh)
