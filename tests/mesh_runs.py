"""A few steps of an objective on a mesh, with what they drew and what became of the parameters.

In process: `run`. In one process of several, with the files of other runs to compare with:
python -m tests.mesh_runs --coordinator=127.0.0.1:PORT --num_processes=2 --process_id=0 --mesh=1,2,4 --out=DIR
    --given=FILE.npz llama-grpo ...
"""

import argparse
import dataclasses
import functools
import pathlib
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from lens import distributed, objectives, optimizer, sampling, sharding
from lens.models import lora
from lens.train import init_state, micro_step
from tests.phases import phase_of
from tests.tiny_world import LAYER, LENGTH, TINY, make_base, make_lens

# Experts that every model axis divides; 12 query heads of 4 kv heads, which 8 devices do not divide.
GPT_OSS = dataclasses.replace(
    TINY,
    family='gpt_oss',
    n_heads=12,
    windows=(4, 0),
    qkv_bias=True,
    o_bias=True,
    sinks=True,
    n_experts=8,
    top_k=3,
)
# the model, and whether both sides train a copy of it beside maps, prompts and adapters
MODELS = {'llama': (TINY, True), 'frozen': (TINY, False), 'gpt_oss': (GPT_OSS, True)}
DOCUMENTS, VECTORS, SEQUENCE, GROUP = 8, 2, 11, 3
WEIGHTS = {'mse_weight': 1.0, 'beta': 0.1, 'entropy_weight': 0.1}
PHASES = {
    'sft': {'weights': {'mse_weight': 1.0}},
    'grpo': {'weights': WEIGHTS, 'group': GROUP},
    'gumbel': {'weights': WEIGHTS | {'tau': 0.7, 'kl_weight': 0.2}},
}
PHASES['grpo_field'] = PHASES['grpo'] | {
    'weights': WEIGHTS | {'mismatch': 9.0},
    **{'reward': 'log_error', 'policy': 'cispo', 'aggregate': 'responses', 'kl_top': 4, 'encoder_texts': 'best'},
    **{'drop_equal': True, 'prefix': (1, 4), 'judged': True},
}
PHASES['gumbel_full'] = PHASES['gumbel'] | {'form': 'full'}
# Adam divides by the size of a gradient plus EPSILON, 1e-8, about the rounding of gradients of this size: one entry with
# a gradient of 4e-10 took another first step on every mesh, by a third of the learning rate, while all others agreed to
# 1e-8; twenty steps later figures differed by 2e-5. With this epsilon rounding stays rounding.
EPSILON = 1e-5


class Trace(NamedTuple):
    """What a run leaves. ids: [steps, N, T], drawn from the parameters of that step; params: by leaf path, at the
    start and at the end."""

    ids: np.ndarray
    metrics: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    params: dict[str, np.ndarray]


@functools.cache
def objective(name: str) -> objectives.Objective:
    """The objective on the tokens of batch['given'] where they are not -1; metric 'ids': those that it draws itself.

    The loss of gumbel draws inside: it is handed the tokens in place of the sampler in its default form. In the other
    it draws what the sampler draws, which test_gumbel_rollout asserts.
    """
    plain = objectives.OBJECTIVES[name.partition('_')[0]]

    def rollout(lens, base, read, key, hp):
        roll = plain.rollout(lens, base, read, key, hp)
        if roll.ids_NxT is None:
            drawn = sampling.sample(jax.lax.stop_gradient(lens.decoder), base, roll.a_NxD, key, length=hp.length)
            roll = roll._replace(ids_NxT=drawn.ids_NxT)
        given = read.batch['given'].reshape(roll.ids_NxT.shape)
        batch = roll.batch | {'drawn': roll.ids_NxT}
        return roll._replace(ids_NxT=jnp.where(given < 0, roll.ids_NxT, given), batch=batch)

    def loss(lens, base, roll, *rest):
        given = sampling.Samples(roll.ids_NxT, roll.logp_NxT)
        with mock.patch.object(sampling, 'sample', lambda *_, **__: given):
            value, metrics = plain.loss(lens, base, roll, *rest)
        return value, metrics | {'loss': value, 'ids': roll.batch['drawn']}

    return objectives.Objective(rollout, loss)


def batch_of(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100 + step)
    places = np.tile(np.arange(2, SEQUENCE), (DOCUMENTS, 1))
    return {
        'tokens': rng.integers(0, TINY.vocab_size, (DOCUMENTS, SEQUENCE)).astype(np.int32),
        'positions': np.sort(rng.permuted(places, axis=1)[:, :VECTORS]).astype(np.int32),
        'explanations': rng.integers(0, TINY.vocab_size, (DOCUMENTS, VECTORS, LENGTH)).astype(np.int32),
    }


def by_path(tree) -> dict[str, np.ndarray]:
    """The leaves whole, on the host, the same on every device that holds a copy. All processes must call it."""
    whole = {sharding.path(kp): np.asarray(x) for kp, x in jax.tree_util.tree_leaves_with_path(sharding.fetch(tree))}
    for (name, x), leaf in zip(whole.items(), jax.tree.leaves(tree), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, x[shard.index], err_msg=f'{name} on {shard.device}')
    return whole


def run(case: str, mesh_shape=(1, 1, 1), *, split=False, steps=3, given: np.ndarray | None = None) -> Trace:
    """`steps` updates of MODEL-OBJECTIVE on a (replica, data, model) mesh.

    split: everything that can be is split over `data`. given: ids to go on with instead of those drawn.
    """
    model, _, name = case.partition('-')
    replica, *data_and_model = mesh_shape
    mesh = sharding.make_mesh(*data_and_model, replica)
    above = 0 if split else np.inf
    config, own_base = MODELS[model]
    base = make_base(config)
    adapters = tuple(
        lora.init_adapters(base.blocks, n, 'q|down', 2, 4.0, jax.random.key(i))
        for i, n in enumerate((base.config.n_layers, LAYER + 1))
    )
    lens = make_lens(base, own_base=own_base, adapters=adapters)
    phase = phase_of(name.partition('_')[0], natural_prefix=(3, 1), **PHASES[name])
    phase = dataclasses.replace(phase, objective=objective(name))
    rows, metrics = (DOCUMENTS, VECTORS * phase.hparams.group, LENGTH), []
    mine = sharding.local_rows(mesh, DOCUMENTS)
    settings = mock.patch.multiple(sharding, SPLIT_ABOVE=above), mock.patch.multiple(optimizer, EPSILON=EPSILON)
    with jax.set_mesh(mesh), settings[0], settings[1]:
        base, lens = sharding.place(base, mesh, above), sharding.place(lens, mesh, above)
        state, start = init_state(lens, phase, mesh), by_path(lens)
        placed = jax.tree.map(lambda x: x.sharding, state)
        for step in range(steps):
            ids = np.full(rows, -1, np.int32) if given is None else given[step].reshape(rows)
            batch = {k: x[mine] for k, x in (batch_of(step) | {'given': ids}).items()}
            batch = sharding.put_batch(batch, mesh, DOCUMENTS)
            state, out = micro_step(phase, state, base, batch, jax.random.key(7), phase.knobs(step))
            metrics.append(sharding.fetch(out))
        stayed = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), state, placed)
        assert all(jax.tree.leaves(stayed)), 'a step leaves everything where it was'
        params = by_path(state.params)
    stacked = {k: np.stack([m[k] for m in metrics]) for k in metrics[0]}
    return Trace(stacked.pop('ids'), stacked, start, params)


# Figures of grpo that are rounding errors themselves, with the size that they may have: differences of what is computed
# twice, and the policy gradient, whose value is the mean advantage of a group (its gradient is not zero).
NOUGHT = {'logp_diff_max': 1e-5, 'logp_diff_mean': 1e-5, 'loss_decoder': 1e-6}


def assert_same(got: Trace, want: Trace, relative: float = 1e-5) -> None:
    """The same tokens but for one in a thousand; given the same, the same figures and leaves, by their norm.

    Of a leaf's way from the start, a few per cent of it, ten times as much is let off. A leaf that did not move must not.
    """
    assert (got.ids == want.ids).mean() >= 0.999
    assert got.metrics.keys() == want.metrics.keys() and got.params.keys() == want.params.keys()
    for name, x in want.metrics.items():
        weighed = name == 'loss_decoder' and 'mismatched' in want.metrics  # tokens by more than advantages: no nought
        if name in NOUGHT and 'reward' in want.metrics and not weighed:
            # of the steps whose tokens are the sampler's own
            drawn = (got.ids == want.ids).all((1, 2))
            assert max(np.abs(got.metrics[name][drawn]).max(), np.abs(x).max()) < NOUGHT[name], name
        else:
            np.testing.assert_allclose(got.metrics[name], x, rtol=relative, err_msg=name)
    for name, x in want.params.items():
        off, way = (np.linalg.norm(x - y) for y in (got.params[name], want.start[name]))
        assert off <= relative * min(np.linalg.norm(x), 10 * way), f'{name} is off by {off:.1e} after {way:.1e}'


def save(path: pathlib.Path, trace: Trace) -> None:
    with path.with_suffix('.part').open('wb') as f:
        np.savez(f, ids=trace.ids, **{f'{k}:{n}': x for k in Trace._fields[1:] for n, x in getattr(trace, k).items()})
    path.with_suffix('.part').rename(path)


def load(path: pathlib.Path) -> Trace:
    with np.load(path) as f:
        parts = ({n.partition(':')[2]: f[n] for n in f.files if n.startswith(f'{k}:')} for k in Trace._fields[1:])
        return Trace(f['ids'], *parts)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument('cases', nargs='+', help='MODEL-OBJECTIVE')
    p.add_argument('--coordinator', required=True)
    p.add_argument('--num_processes', type=int, required=True)
    p.add_argument('--process_id', type=int, required=True)
    p.add_argument('--mesh', required=True, help='replica,data,model')
    p.add_argument('--split', action='store_true')
    p.add_argument('--steps', type=int, required=True)
    p.add_argument('--given', type=pathlib.Path, required=True, help='folder of CASE.npz whose tokens to go on with')
    p.add_argument('--out', type=pathlib.Path, required=True, help='folder for CASE-PROCESS.npz')
    args = p.parse_args()
    distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    mesh = tuple(map(int, args.mesh.split(',')))
    for case in args.cases:
        given = load(args.given / f'{case}.npz').ids
        trace = run(case, mesh, split=args.split, steps=args.steps, given=given)
        save(args.out / f'{case}-{args.process_id}.npz', trace)


if __name__ == '__main__':
    main()
