"""The step on 8x1, 4x2 and 2x4 fake devices equals the step on one device."""

import jax
import numpy as np
import pytest

from lens import objectives, optimizer, sampling, sharding
from lens.build import Phase, init_state
from lens.models import lora
from lens.train import train_step
from tests.conftest import LAYER, LENGTH, make_base, make_lens

OPT = optimizer.OptimizerConfig(
    steps=10,
    warmup_steps=0,
    final_fraction=0.1,
    learning_rate_decoder=1e-3,
    learning_rate_encoder=2e-3,
    weight_decay=0.01,
    grad_clip=1.0,
)
HP = objectives.Hparams(
    layer=LAYER, length=LENGTH, group=4, beta=0.1, natural_prefix=(3, 1), entropy_weight=0.1, entropy_clamp=9.0
)
TX = optimizer.make(OPT)


def make(kind, base):
    if kind == 'lora':
        adapters = tuple(
            lora.init_adapters(b, '.*', 2, 4.0, jax.random.key(i))
            for i, b in enumerate((base.blocks, base.truncated(LAYER + 1).blocks))
        )
        return make_lens(base, adapters=adapters)
    return make_lens(base, own_base=kind == 'full')


def two_steps(kind, objective, batch, data, model):
    """(metrics of both steps, parameters, base) after two updates on a data x model mesh."""
    mesh = sharding.make_mesh(data, model)
    base = make_base()
    lens = make(kind, base)
    with jax.set_mesh(mesh):
        base, lens = sharding.place(base, mesh), sharding.place(lens, mesh)
        state = init_state(lens, Phase('p', 0, 10, objective, HP, TX, 8, 2, True), mesh)
        rows, out = sharding.put_batch(batch, mesh), []
        for _ in range(2):
            state, metrics = train_step(state, base, rows, jax.random.key(7), objective=objective, hparams=HP, tx=TX)
            out.append(jax.device_get(metrics))
    return out, state.params


@pytest.mark.parametrize('kind', ['maps', 'lora', 'full'])
@pytest.mark.parametrize('objective', [objectives.sft, objectives.grpo])
def test_sharded_step_equals_the_unsharded_step(kind, objective, batch):
    metrics, params = two_steps(kind, objective, batch, 1, 1)
    expected = jax.tree.map(np.asarray, params)
    for shape in ((8, 1), (4, 2), (2, 4)) if kind == 'full' else ((4, 2),):
        got, sharded = two_steps(kind, objective, batch, *shape)
        for a, b in zip(got, metrics, strict=True):
            for name in b:
                np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=2e-5, err_msg=f'{shape} {name}')
        for (kp, x), y in zip(jax.tree_util.tree_leaves_with_path(sharded), jax.tree.leaves(expected), strict=True):
            name = f'{shape} {sharding.path(kp)}'
            for shard in x.addressable_shards:  # replicas agree, and every shard is right
                np.testing.assert_allclose(shard.data, y[shard.index], atol=5e-5, err_msg=name)


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
    assert split['final_norm'] == split['blocks/attn_norm'] == 1


def test_the_same_key_draws_the_same_tokens_on_every_mesh(batch):
    texts = []
    for shape in ((1, 1), (8, 1), (2, 4)):
        mesh = sharding.make_mesh(*shape)
        base = make_base()
        lens = make_lens(base)
        with jax.set_mesh(mesh):
            base, lens = sharding.place(base, mesh), sharding.place(lens, mesh)
            a = objectives.read_activations(base, sharding.put_batch(batch, mesh), LAYER)
            draw = jax.jit(lambda d, b, a: sampling.sample(d, b, a, jax.random.key(0), length=LENGTH, group=4).ids_NxT)
            texts.append(np.asarray(draw(lens.decoder, base, a)))
    assert all((t == texts[0]).mean() > 0.999 for t in texts)


def test_unknown_parameter_and_bad_meshes_are_refused():
    mesh = sharding.make_mesh(2, 4)
    with pytest.raises(KeyError, match=r"no placement rule .* 'mystery'"):
        sharding.place({'mystery': np.zeros(3)}, mesh)
    with pytest.raises(sharding.MeshError, match=r'mesh.data=4 x mesh.model=3 needs 12 devices, but JAX sees 8'):
        sharding.make_mesh(4, 3)
    with pytest.raises(sharding.MeshError, match=r'sft.documents=3 cannot be split over mesh.data=2'):
        sharding.check_divides(3, 'sft.documents', mesh)
