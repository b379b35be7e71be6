"""What the train step of the tiny model moves between eight devices, read from the compiled program."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import table
from lens import objectives, optimizer, sharding
from lens.config import Phase
from lens.lens_init import abstract_state
from lens.models import lora
from lens.schedules import Clock, constant
from lens.tools import hlo
from lens.train import train_step
from tests.tiny_world import LAYER, LENGTH, TINY, make_base, make_lens

FLOAT = 4  # bytes
DOCUMENTS, VECTORS, ROW, GROUP = 8, 2, 11, 4
RATES = {'decoder': constant(1e-3), 'encoder': constant(2e-3)}
TX = optimizer.make(optimizer.parse_table(table(weight_decay=0.01), Clock(), 'table'), RATES, 1.0)
# experts of width 40, 2 of 8 for a token
EXPERTS = dataclasses.replace(TINY, family='gpt_oss', n_experts=8, top_k=2, sinks=True, qkv_bias=True, o_bias=True)


def moved(objective, kind, *, config=TINY, split_above=float('inf'), form='two_pass'):
    """(collectives of one step between several devices, the lens). kind: what is trained, maps | lora | full."""
    mesh, base = sharding.make_mesh(8, 1), make_base(config)
    adapters = (None, None)
    if kind == 'lora':
        layers = (base.config.n_layers, LAYER + 1)
        adapters = tuple(
            lora.init_adapters(base.blocks, n, '.*', 2, 4.0, jax.random.key(i)) for i, n in enumerate(layers)
        )
    lens = make_lens(base, own_base=kind == 'full', adapters=adapters)
    hp = objectives.Hparams(LAYER, LENGTH, group=GROUP if objective == 'grpo' else 1, form=form)
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
    return [c for c in hlo.collectives(lowered.compile().as_text()) if c.group_size > 1], lens


def sizes(found, kind):
    """Elements of an array -> how often such arrays go through collectives of one kind in a step."""
    out = collections.Counter()
    for c in (c for c in found if c.kind == kind):
        for shape in c.shapes:
            out[elements(shape)] += c.count
    return out


def elements(shape):
    return int(np.prod([int(n) for n in shape.rstrip(']').partition('[')[2].split(',') if n]))


def trained(lens):
    """The same of the leaves of a lens; those of blocks and adapters a layer at a time."""
    out = collections.Counter()
    for kp, x in jax.tree_util.tree_leaves_with_path(lens):
        layers = x.shape[0] if {'blocks', 'adapters'} & set(sharding.path(kp).split('/')) else 1
        out[x.size // layers] += layers
    return out


FAST = {('sft', 'full')}
CASES = [
    pytest.param(o, k, marks=() if (o, k) in FAST else pytest.mark.slow)
    for o in ('sft', 'grpo', 'gumbel')
    for k in ('maps', 'lora', 'full')
]


def check_data_parallel(found, lens, objective):
    """The gradient of every trained leaf is summed once, in float32; besides them only statistics of the batch."""
    summed = sizes(found, 'all-reduce')
    rest = summed - trained(lens)
    assert not trained(lens) - summed, 'a gradient is not summed'
    d = TINY.d_model
    assert rest.pop(d) == 2, 'the two means of the variance explained'
    assert set(rest) == {1} and rest[1] < 20, 'scalars'
    bytes_summed = sum(c.payload_bytes * c.count for c in found if c.kind == 'all-reduce')
    leaves = sum(x.size for x in jax.tree.leaves(lens))
    assert bytes_summed == FLOAT * (leaves + 2 * d + rest[1])
    # two hashes of every sampled text, of which repetitions are counted
    texts = DOCUMENTS * VECTORS * (GROUP if objective == 'grpo' else 1)
    gathered = [c.shapes for c in found if c.kind != 'all-reduce']
    assert gathered == ([] if objective == 'sft' else [(f'u32[{texts}]',)] * 2)


@pytest.mark.parametrize(('objective', 'kind'), CASES)
def test_a_data_parallel_step_moves_the_gradients_and_no_weights(objective, kind):
    check_data_parallel(*moved(objective, kind), objective)


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['sft', 'grpo', 'gumbel'])
def test_experts_move_nothing_more(objective):
    check_data_parallel(*moved(objective, 'maps', config=EXPERTS), objective)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['full', 'truncated'])
def test_every_gradient_through_words_moves_nothing_more(form):
    """Of maps and prompts; those of blocks are summed word by word in these forms."""
    check_data_parallel(*moved('gumbel', 'maps', form=form), 'gumbel')


def test_a_split_base_is_gathered_a_layer_at_a_time():
    """Whole matrices of one layer, in every pass as often as it runs layers; nothing but tables is gathered whole."""
    found, lens = moved('sft', 'maps', split_above=0)
    expected = collections.Counter(x[0].size for x in jax.tree.leaves(make_base().blocks) if x.ndim > 2)
    subject, decoder, encoder = LAYER + 1, TINY.n_layers, LAYER + 1
    passes = [subject, decoder, decoder, encoder, encoder]  # both trained sides run their blocks again backwards
    gathers = [c for c in found if c.kind == 'all-gather']
    in_loops = [c for c in gathers if c.count > 1]
    assert all('/while/body/' in c.op_name for c in in_loops)
    assert sorted({c.count for c in in_loops}) == sorted(set(passes))
    counted = sizes(in_loops, 'all-gather')
    assert counted == collections.Counter({n: k * sum(passes) for n, k in expected.items()})
    one_layer = FLOAT * sum(n * k for n, k in expected.items())
    assert sum(c.payload_bytes * c.count for c in in_loops) == one_layer * sum(passes)
    tables = TINY.vocab_size * TINY.d_model
    assert [elements(s) for c in gathers if c.count == 1 for s in c.shapes] == [tables] * 2
    assert sizes(found, 'all-reduce')[tables] == 0 and trained(lens) - sizes(found, 'all-reduce') == {}
