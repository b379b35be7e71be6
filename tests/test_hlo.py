"""Collectives read from HLO text: real programs on eight devices, and snippets in XLA's other notations."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lens import sharding
from lens.errors import LensError
from lens.tools.hlo import Collective, collectives

D, F = 24, 10
FLOAT = 4  # bytes


def compiled(f, *args, data=8, model=1, specs=None):
    """Text of f on a data x model mesh; args are (shape, spec)."""
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        structs = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
            for shape, spec in args
        ]
        g = f if specs is None else jax.shard_map(f, in_specs=specs[0], out_specs=specs[1])
        return jax.jit(g).lower(*structs).compile().as_text()


def facts(text):
    return [(c.kind, c.count, c.payload_bytes, c.group_size) for c in collectives(text)]


def test_a_data_parallel_gradient_is_one_all_reduce_of_its_bytes():
    def loss(w_DxF, x_BxD):
        return jnp.sum(jnp.tanh(x_BxD @ w_DxF))

    text = compiled(jax.grad(loss), ((D, F), P(None, None)), ((16, D), P('data', None)))
    (c,) = collectives(text)
    assert (c.kind, c.count, c.payload_bytes, c.group_size, c.bounded) == ('all-reduce', 1, D * F * FLOAT, 8, True)
    assert c.shapes == (f'f32[{D},{F}]',) or c.shapes == (f'f32[{F},{D}]',)
    assert 'dot_general' in c.op_name
    assert c.wire_bytes == 2 * 7 / 8 * D * F * FLOAT


def gathered_layers(x_BxD, length):
    """Each layer gathers the rows of all devices."""

    def layer(x, _):
        rows = jax.lax.all_gather(x, 'data', tiled=True)
        return jnp.tanh(x + rows.sum(0)), None

    return jax.lax.scan(layer, x_BxD, None, length=length)[0]


ROWS = ((16, D), P('data', None))
SAME = (P('data', None), P('data', None))


def test_a_collective_of_a_scan_counts_once_per_iteration():
    text = compiled(functools.partial(gathered_layers, length=7), ROWS, specs=SAME)
    assert facts(text) == [('all-gather', 7, 16 * D * FLOAT, 8)]


def test_trip_counts_of_nested_scans_multiply():
    def outer(x, _):
        x = gathered_layers(x, 5)
        return x + jax.lax.ppermute(x, 'data', [(i, (i + 1) % 8) for i in range(8)]), None

    text = compiled(lambda x: jax.lax.scan(outer, x, None, length=3)[0], ROWS, specs=SAME)
    assert sorted(facts(text)) == [
        ('all-gather', 15, 16 * D * FLOAT, 8),
        ('collective-permute', 3, 2 * D * FLOAT, 8),
    ]


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    def body(x):
        return x + jax.lax.all_gather(x, 'data', tiled=True).sum(0)

    def f(x):
        x = jax.lax.while_loop(lambda x: jax.lax.pmax(jnp.max(x), 'data') < 100, body, x)
        return jax.lax.ppermute(x, 'data', [(0, 1), (1, 0)])

    found = {c.kind: c for c in collectives(compiled(f, ROWS, specs=SAME))}
    assert (found['all-gather'].count, found['all-gather'].bounded) == (1, False)
    assert found['all-reduce'].bounded is False  # of the condition
    assert found['collective-permute'].bounded is True
    assert found['collective-permute'].group_size == 2


@pytest.mark.parametrize(('axis', 'size'), [('data', 4), ('model', 2), (('data', 'model'), 8)])
def test_groups_over_the_axes_of_a_mesh(axis, size):
    text = compiled(
        lambda x: jax.lax.psum(x, axis),
        ((4, 2, D), P('data', 'model', None)),
        data=4,
        model=2,
        specs=(P('data', 'model', None), P(*(None if a in axis or a == axis else a for a in ('data', 'model')), None)),
    )
    assert facts(text) == [('all-reduce', 1, D * FLOAT, size)]


def test_reduce_scatter_is_measured_by_its_operand():
    text = compiled(lambda x: jax.lax.psum_scatter(x, 'data', tiled=True), ((16, D), P()), specs=(P(), P('data')))
    (c,) = collectives(text)
    assert (c.kind, c.payload_bytes, c.group_size) == ('reduce-scatter', 16 * D * FLOAT, 8)
    assert c.wire_bytes == 7 / 8 * 16 * D * FLOAT


def test_all_to_all():
    text = compiled(
        lambda x: jax.lax.all_to_all(x, 'data', 1, 0, tiled=True),
        ((16, D), P('data', None)),
        data=4,
        model=2,
        specs=SAME,
    )
    (c,) = collectives(text)
    assert (c.kind, c.count, c.payload_bytes, c.group_size) == ('all-to-all', 1, 4 * D * FLOAT, 4)
    assert c.wire_bytes == 3 / 4 * 4 * D * FLOAT


def test_branches_of_a_conditional_all_count():
    def f(x):
        rows = jax.lax.all_gather(x, 'data', tiled=True)
        shift = functools.partial(jax.lax.ppermute, axis_name='data', perm=[(i, (i + 1) % 8) for i in range(8)])
        return jax.lax.cond(
            jax.lax.pmax(jnp.sum(rows), 'data') > 0, shift, lambda x: jax.lax.ppermute(x, 'data', [(0, 5)]), x
        )

    sizes = [c.group_size for c in collectives(compiled(f, ROWS, specs=SAME)) if c.kind == 'collective-permute']
    assert sorted(sizes) == [2, 8]


def program(body, *, before='', header='num_partitions=8'):
    """A module whose entry holds the given lines; the entry's parameter is %p = f32[2,24]."""
    lines = ''.join(f'  {line}\n' for line in body)
    return (
        f'HloModule jit_step, is_scheduled=true, {header}\n\n'
        '%sum (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  %y = f32[] parameter(1)\n'
        '  ROOT %add = f32[] add(%x, %y)\n}\n\n'
        f'{before}ENTRY %main (p: f32[2,24]) -> f32[2,24] {{\n  %p = f32[2,24]{{1,0}} parameter(0)\n{lines}}}\n'
    )


ASYNC = {
    'all-gather': (
        [
            '%s = (f32[2,24]{1,0}, f32[16,24]{1,0}) all-gather-start(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}',
            '%d = f32[16,24]{1,0} all-gather-done(%s)',
        ],
        ('all-gather', 1, 16 * 24 * 4, 8),
    ),
    'all-gather of two arrays': (
        [
            '%q = bf16[3]{0} parameter(1)',
            '%s = ((f32[2,24]{1,0}, bf16[3]{0}), (f32[8,24]{1,0}, bf16[12]{0})) all-gather-start(%p, %q), '
            'replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}',
            '%d = (f32[8,24]{1,0}, bf16[12]{0}) all-gather-done(%s)',
        ],
        ('all-gather', 1, 8 * 24 * 4 + 12 * 2, 4),
    ),
    'all-reduce': (
        [
            '%s = (f32[2,24]{1,0}, f32[5]{0}) all-reduce-start(%p, %q), replica_groups={}, to_apply=%sum',
            '%d = (f32[2,24]{1,0}, f32[5]{0}) all-reduce-done((f32[2,24]{1,0}, f32[5]{0}) %s)',
        ],
        ('all-reduce', 1, (48 + 5) * 4, 8),
    ),
    'collective-permute': (
        [
            '%s = (f32[2,24]{1,0}, f32[2,24]{1,0}, u32[], u32[]) collective-permute-start(%p), '
            'source_target_pairs={{0,2},{2,4},{4,0},{1,3},{3,1}}',
            '%d = f32[2,24]{1,0} collective-permute-done(%s)',
        ],
        ('collective-permute', 1, 48 * 4, 3),
    ),
    'reduce-scatter': (
        [
            '%s = ((f32[2,24]{1,0}), f32[2,6]{1,0}) reduce-scatter-start(%p), replica_groups=[2,4]<=[8], '
            'dimensions={1}, to_apply=%sum',
            '%u = ((f32[2,24]{1,0}), f32[2,6]{1,0}) reduce-scatter-update(%s)',
            '%d = f32[2,6]{1,0} reduce-scatter-done(%u)',
        ],
        ('reduce-scatter', 1, 48 * 4, 4),
    ),
}


@pytest.mark.parametrize('kind', ASYNC)
def test_an_asynchronous_pair_counts_once(kind):
    lines, expected = ASYNC[kind]
    others = ['%s.2 = f32[9]{0} all-reduce-start(%z), replica_groups={{0}}', '%e = f32[9]{0} all-reduce-done(%s.2)']
    assert facts(program(others + lines)) == [('all-reduce', 1, 36, 1), expected]


def test_a_collective_in_an_asynchronous_computation():
    wrapped = (
        '%async (q: f32[2,24]) -> f32[2,3] {\n  %q = f32[2,24]{1,0} parameter(0)\n'
        '  ROOT %r = f32[2,3]{1,0} reduce-scatter(%q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum\n}\n\n'
    )
    lines = [
        '%s = ((f32[2,24]{1,0}), f32[2,3]{1,0}, s32[]) async-start(%p), calls=%async',
        '%u = ((f32[2,24]{1,0}), f32[2,3]{1,0}, s32[]) async-update(%s)',
        '%d = f32[2,3]{1,0} async-done(%u)',
    ]
    assert facts(program(lines, before=wrapped)) == [('reduce-scatter', 1, 48 * 4, 8)]


@pytest.mark.parametrize(
    ('groups', 'size'),
    [
        ('{{0,1},{2,3},{4,5},{6,7}}', 2),
        ('{{0,1,2},{3,4,5},{6,7}}', 3),
        ('[4,2]<=[8]', 2),
        ('[2,4]<=[4,2]T(1,0)', 4),
        ('{}', 8),
        ("mesh['data'=4,'model'=2] {'data'}", 4),
        ("mesh['data'=4,'model'=2], device_ids=([8]) {'data','model'}", 8),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
    ],
)
def test_notations_of_replica_groups(groups, size):
    line = f'ROOT %r = f32[2,24]{{1,0}} all-reduce(%p), channel_id=3, replica_groups={groups}, to_apply=%sum'
    assert facts(program([line])) == [('all-reduce', 1, 192, size)]


@pytest.mark.parametrize(
    ('kind', 'shape', 'payload'),
    [
        ('all-reduce', 'bf16[3,5]{1,0:T(8,128)(2,1)S(1)}', 30),
        ('all-reduce', '(f32[7]{0}, /*index=1*/ pred[2,24]{1,0})', 28 + 48),
        ('all-reduce', 's4[3,5]{1,0:T(8,128)E(4)}', 8),
        ('all-reduce', 'f8e4m3fn[<=6]{0}', 6),
        ('all-reduce', 'c64[]', 8),
        ('all-to-all', '(f32[1,24]{1,0}, f32[1,24]{1,0}, f32[1,24]{1,0}, f32[1,24]{1,0})', 4 * 96),
    ],
)
def test_bytes_of_result_types(kind, shape, payload):
    assert facts(program([f'%r = {shape} {kind}(%p), replica_groups=[2,4]<=[8]'])) == [(kind, 1, payload, 4)]


CALLED = (
    '%inner (q: (s32[], f32[2,24])) -> (s32[], f32[2,24]) {\n'
    '  %g = f32[8,24]{1,0} all-gather(%q), replica_groups=[2,4]<=[8], metadata={op_name="jit(f)/a (b), calls=%sum, \\"c\\""}\n}\n\n'
    '%test (q: (s32[], f32[2,24])) -> pred[] {\n  ROOT %t = pred[] constant(true)\n}\n\n'
)


@pytest.mark.parametrize(
    ('line', 'counts'),
    [
        ('%c = f32[8,24]{1,0} call(%p), to_apply=%inner', [(1, True)]),
        ('%c = f32[8,24]{1,0} fusion(%p), kind=kCustom, calls=%inner', [(1, True)]),
        ('%c = f32[8,24]{1,0} conditional(%i, %p, %p), branch_computations={%inner, %inner}', [(1, True)] * 2),
        (
            '%c = f32[8,24]{1,0} conditional(%i, %p, %p), true_computation=%inner, false_computation=%inner',
            [(1, True)] * 2,
        ),
        ('%c = (s32[], f32[2,24]) while(%p), condition=%test, body=%inner', [(1, False)]),
        (
            '%c = (s32[], f32[2,24]) while(%p), condition=%test, body=%inner, backend_config={"known_trip_count":{"n":"24"}}',
            [(24, True)],
        ),
        (
            '%c = (s32[], f32[2,24]) while(%p), condition=%test, body=%inner, '
            'backend_config="{\\"known_trip_count\\":{\\"n\\":\\"24\\"}}"',
            [(24, True)],
        ),
    ],
)
def test_called_computations(line, counts):
    found = collectives(program([line], before=CALLED))
    assert [(c.count, c.bounded) for c in found] == counts
    assert {(c.payload_bytes, c.op_name) for c in found} == {(8 * 24 * 4, 'jit(f)/a (b), calls=%sum, \\"c\\"')}


@pytest.mark.parametrize(
    ('kind', 'sent'),
    [
        ('all-reduce', 1.5),
        ('all-gather', 0.75),
        ('reduce-scatter', 0.75),
        ('all-to-all', 0.75),
        ('collective-permute', 1),
    ],
)
def test_bytes_on_the_wire(kind, sent):
    assert Collective(kind, 5, ('f32[30]',), 120, 4, '').wire_bytes == sent * 120 * 5
    alone = Collective(kind, 5, ('f32[30]',), 120, 1, '')
    assert alone.wire_bytes == (600 if kind == 'collective-permute' else 0)


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ('HloModule x\n\n%f (p: f32[]) -> f32[] {\n}\n', 'no ENTRY computation'),
        (program(['%r = f32[3]{0} all-reduce(%p), replica_groups=@groups']), 'replica groups of r are in an unknown'),
        (program(['%r = (f32[3]{0}, f32[4]']), 'the text of the program is cut'),
        (program(['%r = f32[3]{0} all-reduce-start(%p), replica_groups={}']), 'r is started and never done'),
    ],
)
def test_what_cannot_be_read_is_named(text, sentence):
    with pytest.raises(LensError, match=sentence):
        collectives(text)
