"""The step on 8x1, 4x2 and 2x4 fake devices equals the step on one device."""

import jax
import numpy as np
import pytest

from configs.base import table
from lens import objectives, optimizer, sampling, sharding
from lens.build import Phase
from lens.models import lora
from lens.schedules import Clock, constant
from lens.state import init_state
from lens.train import train_step
from tests.conftest import LAYER, LENGTH, make_base, make_lens

HP = objectives.Hparams(
    layer=LAYER,
    length=LENGTH,
    group=4,
    beta=constant(0.1),
    natural_prefix=(3, 1),
    entropy_weight=constant(0.1),
    entropy_clamp=constant(9.0),
)
RATES = {'decoder': constant(1e-3), 'encoder': constant(2e-3)}
TX = optimizer.make(optimizer.parse_table(table(weight_decay=0.01), Clock(), 'table'), RATES, 1.0)


SFT, GRPO = objectives.OBJECTIVES['sft'], objectives.OBJECTIVES['grpo']


def both_losses(lens, base, rolls, *rest):
    a, sft = SFT.loss(lens, base, rolls[0], *rest)
    b, grpo = GRPO.loss(lens, base, rolls[1], *rest)
    return a + b, {f'sft_{k}': v for k, v in sft.items()} | {f'grpo_{k}': v for k, v in grpo.items()}


# SFT and GRPO in one program: half the compilations
BOTH = objectives.Objective(lambda *a: (SFT.rollout(*a), GRPO.rollout(*a)), both_losses)


def two_steps(batch, data, model):
    """(metrics of both steps, parameters) after two updates on a data x model mesh.

    Every kind of trainable parameter at once: maps, prompts, adapters and own bases.
    """
    mesh = sharding.make_mesh(data, model)
    base = make_base()
    adapters = tuple(
        lora.init_adapters(base.blocks, n, '.*', 2, 4.0, jax.random.key(i))
        for i, n in enumerate((base.config.n_layers, LAYER + 1))
    )
    lens = make_lens(base, own_base=True, adapters=adapters)
    with jax.set_mesh(mesh):
        base, lens = sharding.place(base, mesh), sharding.place(lens, mesh)
        state = init_state(lens, Phase('p', 0, 10, BOTH, HP, TX, 8, 2, True), mesh)
        rows, out = sharding.put_batch(batch, mesh), []
        for _ in range(2):
            state, metrics = train_step(state, base, rows, jax.random.key(7), objective=BOTH, hparams=HP, tx=TX)
            out.append(jax.device_get(metrics))
    return out, state.params


@pytest.fixture(scope='module')
def unsharded(batch):
    metrics, params = two_steps(batch, 1, 1)
    return metrics, jax.tree.map(np.asarray, params)


SLOW = pytest.mark.slow


@pytest.mark.parametrize('shape', [(4, 2), pytest.param((8, 1), marks=SLOW), pytest.param((2, 4), marks=SLOW)])
def test_sharded_step_equals_the_unsharded_step(shape, unsharded, batch):
    metrics, params = two_steps(batch, *shape)
    for a, b in zip(metrics, unsharded[0], strict=True):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=2e-5, err_msg=name)
    for (kp, x), y in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(unsharded[1]), strict=True):
        for shard in x.addressable_shards:  # replicas agree, and every shard is right
            np.testing.assert_allclose(shard.data, y[shard.index], atol=5e-5, err_msg=sharding.path(kp))


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


def test_the_same_key_draws_the_same_tokens_on_every_mesh(batch):
    texts = []
    for shape in ((1, 1), (8, 1), (2, 4)):
        mesh = sharding.make_mesh(*shape)
        base = make_base()
        lens = make_lens(base)
        with jax.set_mesh(mesh):
            base, lens = sharding.place(base, mesh), sharding.place(lens, mesh)
            a = objectives.read(base, sharding.put_batch(batch, mesh), LAYER).a_NxD
            draw = jax.jit(lambda d, b, a: sampling.sample(d, b, a, jax.random.key(0), length=LENGTH, group=4).ids_NxT)
            texts.append(np.asarray(draw(lens.decoder, base, a)))
    assert all((t == texts[0]).mean() > 0.999 for t in texts)


def test_unknown_parameter_and_bad_meshes_are_refused():
    mesh = sharding.make_mesh(2, 4)
    with pytest.raises(KeyError, match=r"no placement rule .* 'mystery'"):
        sharding.place({'mystery': np.zeros(3)}, mesh)
    with pytest.raises(
        sharding.MeshError, match=r'mesh.replica=1 x mesh.data=4 x mesh.model=3 needs 12 devices, but JAX sees 8'
    ):
        sharding.make_mesh(4, 3)
    with pytest.raises(
        sharding.MeshError, match=r'sft.documents=3 cannot be split over mesh.replica x mesh.data = 2 devices'
    ):
        sharding.check_divides(3, 'sft.documents', mesh)
