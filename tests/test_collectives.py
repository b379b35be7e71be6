"""What the train step of the tiny model moves between eight devices, read from the compiled program."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import pytest

from configs.base import table
from lens import objectives, optimizer, sharding
from lens.config import Phase
from lens.lens_init import abstract_state
from lens.schedules import Clock, constant
from lens.train import train_step
from tests.tiny_world import LAYER, LENGTH, TINY, make_base, make_lens

DOCUMENTS, VECTORS, ROW, GROUP = 8, 2, 11, 4
RATES = {'decoder': constant(1e-3), 'encoder': constant(2e-3)}
TX = optimizer.make(optimizer.parse_table(table(weight_decay=0.01), Clock(), 'table'), RATES, 1.0)
COLLECTIVE = re.compile(r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(')


def moved(text):
    """Kind of collective -> elements of an array that it gives -> how often the text of a program names such."""
    found = collections.defaultdict(collections.Counter)
    for shapes, kind in COLLECTIVE.findall(text):
        sizes = re.findall(r'[a-z]+\d*\[([\d,]*)\]', shapes)
        found[kind].update(math.prod(int(n) for n in s.split(',') if n) for s in sizes)
    return dict(found)


def collectives(objective, split_above=float('inf')):
    """(moved, lens) of a step on eight devices that split the batch."""
    mesh, base = sharding.make_mesh(8, 1), make_base()
    lens = make_lens(base)
    hp = objectives.Hparams(LAYER, LENGTH, group=GROUP if objective == 'grpo' else 1)
    o, key = objectives.OBJECTIVES[objective], jax.eval_shape(lambda: jax.random.key(0))
    shapes = {'tokens': (DOCUMENTS, ROW), 'positions': (DOCUMENTS, VECTORS)}
    if objective in objectives.NEEDS_EXPLANATIONS:
        shapes['explanations'] = (DOCUMENTS, VECTORS, LENGTH)
    with jax.set_mesh(mesh):
        place = {k: jax.sharding.NamedSharding(mesh, sharding.rows(len(s))) for k, s in shapes.items()}
        batch = {k: jax.ShapeDtypeStruct(s, jnp.int32, sharding=place[k]) for k, s in shapes.items()}
        phase = Phase('p', 0, 10, o, hp, TX, DOCUMENTS, VECTORS, 'explanations' in shapes)
        state = abstract_state(sharding.with_placement(lens, mesh, sharding.SPLIT_ABOVE), phase, mesh)
        base = sharding.with_placement(base, mesh, split_above)
        lowered = train_step.lower(state, base, batch, key, objective=o, hparams=hp, tx=TX)
    return moved(lowered.compile().as_text()), lens


def leaves(lens):
    """Elements -> how many arrays of a lens have them."""
    return collections.Counter(x.size for x in jax.tree.leaves(lens))


@pytest.mark.parametrize('objective', ['sft', pytest.param('grpo', marks=pytest.mark.slow)])
def test_a_data_parallel_step_moves_the_gradients_of_what_is_trained_alone(objective):
    """No weight of the base and no activation: of the rest, scalars, two means of figures [d], hashes of texts."""
    found, lens = collectives(objective)
    assert not leaves(lens) - found['all-reduce'], 'a gradient is not summed'
    rest = found.pop('all-reduce') - leaves(lens)
    assert set(rest) <= {1, TINY.d_model} and rest[TINY.d_model] == 2
    texts = DOCUMENTS * VECTORS * GROUP
    assert found == ({} if objective == 'sft' else {'all-gather': {texts: 2}})


@pytest.mark.slow
def test_a_split_base_is_gathered_a_layer_at_a_time():
    """Whole matrices of one layer; nothing but the tables is gathered whole, and gradients are those of the maps."""
    found, lens = collectives('sft', split_above=0)
    blocks = {x[0].size for x in jax.tree.leaves(make_base().blocks) if x.ndim > 2}
    tables = TINY.vocab_size * TINY.d_model
    assert blocks < set(found['all-gather']) <= blocks | {tables}
    assert not leaves(lens) - found['all-reduce'] and tables not in found['all-reduce']
