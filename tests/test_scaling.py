"""What a step sends between devices: the gradients of what trains, and nothing while it samples."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import scaling
from benchmarks.roofline import collectives
from lens import sharding
from lens.tools import plan

SIZES = {'rows': 8, 'tokens': 5, 'vectors': 1, 'group': 2, 'text': 12, 'layers': 2}


def test_loops_are_multiplied_out_and_rings_counted():
    """A 4 x 2 mesh: kinds and bytes by hand."""
    mesh = jax.make_mesh((4, 2), ('a', 'b'))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P('a', 'b'), out_specs=P('a', 'b'))
    def program(x_2x3):
        def outer(x, _):
            x = jax.lax.scan(lambda x, _: (jnp.sin(x) + jax.lax.psum(x, 'a'), None), x, None, length=5)[0]
            whole_2x6 = jax.lax.all_gather(x, 'b', axis=1, tiled=True)
            return jax.lax.psum_scatter(whole_2x6 * whole_2x6, 'b', scatter_dimension=1, tiled=True), None

        x, _ = jax.lax.scan(outer, x_2x3, None, length=7)
        return jax.lax.ppermute(x, 'a', [(i, (i + 1) % 4) for i in range(4)])

    place = NamedSharding(mesh, P('a', 'b'))
    x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=place)
    found = {x.kind: (x.sent, x.times) for x in collectives(jax.jit(program).lower(x).compile().as_text())}
    share = 2 * 3 * 4  # bytes on a device
    assert found == {
        'all-reduce': (2 * 3 / 4 * share, 35),
        'all-gather': (share, 7),
        'reduce-scatter': (share, 7),
        'collective-permute': (share, 1),
    }


@pytest.mark.slow
def test_nothing_is_sent_while_a_data_parallel_step_samples(monkeypatch):
    """Adapters that are split over the devices are put together before the loop."""
    monkeypatch.setattr(sharding, 'SPLIT_ABOVE', 0)
    cfg, job = scaling.small('grpo', 'lora', SIZES)
    (_, reading), (_, step) = plan.compile_step(cfg, job, sharding.make_mesh(8, 1), 'grpo')
    assert not collectives(reading.as_text())
    found = collectives(step.as_text())
    assert found and not [x for x in found if '/decode/' in x.source]
