"""Small models of every family on this device against float32 on the CPU: the numbers must be the same.

    python -m benchmarks.agreement

Both have the same weights, which bfloat16 holds exactly. Root mean squares of the differences over those of the values:
logits and hidden states of a text, gradients of the GRPO loss on the same explanations. sampler: the largest difference
between log-probabilities of drawn tokens and those of teacher forcing on the same device, nats.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import full_size
from benchmarks.full_size import Part
from benchmarks.timing import report
from lens import objectives, sharding
from lens.rollout import read
from lens.tools import plan

FAMILIES = {
    'gpt2': 'gpt2',
    'llama': 'Llama-3.1-8B-Instruct',
    'qwen2': 'Qwen2.5-7B-Instruct',
    'qwen3': 'Qwen3-8B',
    'gemma2': 'gemma-2-9b-it',
    'gemma3': 'gemma-3-27b-it',
    'gpt_oss': 'gpt-oss-20b',
}
# Widths that the kernels of a GPU take, no two alike; a text is longer than two of the windows that we give them.
SIZES = {'d_model': 256, 'd_ff': 384, 'n_layers': 4, 'n_heads': 6, 'n_kv_heads': 2, 'head_dim': 64, 'vocab_size': 1024}
WINDOW, TOKENS = 48, 160
VALUES = {
    'layer': 2,
    'explanation_len': 16,
    'decoder.patched_blocks': 2,
    'decoder.train': 'lora',
    'encoder.train': 'lora',
}
BATCH = {'documents': 2, 'vectors': 3, 'group': 4}
MOST = {'float32': 1e-3, 'bfloat16': 0.1}  # that a figure may be
ROUTED = ('gpt_oss',)  # in bfloat16 the router takes other experts at some positions: shown, not judged


def outputs(lens, base, batch, knobs, key, roll, *, phase):
    """Computes (logits, hidden states, gradients on the explanations `roll` or on its own; sampler; its own)."""
    hp = phase.hparams
    own = phase.objective.rollout(lens, base, read(base, batch, **phase.reading), key, hp)
    gradient = functools.partial(objectives.gradient, phase.objective, lens, base)
    _, metrics = gradient(own, key, hp, knobs, ())
    gradients, _ = gradient(roll or own, key, hp, knobs, ())
    hidden = base.run_layers(base.embed(batch['tokens']), 0, base.config.n_layers)
    values = {'logits': base.logits(hidden), 'hidden': hidden, 'gradients': gradients}
    return values, metrics['logp_diff_max'], own


def run(model: str, dtype: str, device, given=None, roll=None):
    """Returns (what outputs gives, as numpy; the weights and batch of it), made where they are not given."""
    cfg, job = full_size.open_part(Part('', 'gptoss', model, 'step', 'grpo', BATCH, TOKENS, VALUES))
    windows = tuple(min(n, WINDOW) for n in job.c.windows)
    job = job._replace(c=full_size.shrunk(job.c, **SIZES, windows=windows))
    cfg.subject.dtype, mesh = dtype, sharding.make_mesh(1, 1, devices=[device])

    def put(x, like):
        return jax.device_put(np.asarray(x).astype(like.dtype), like.sharding)

    def row(x):
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, sharding.rows(x.ndim)))

    with jax.set_mesh(mesh):
        ((phase, state, base, batch),) = plan.steps(cfg, job, mesh)
    shapes = state.params, base, batch
    args = jax.tree.map(put, given or random_values(shapes), shapes)
    with jax.set_mesh(mesh), jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
        program = jax.jit(functools.partial(outputs, phase=phase))
        out = program(*args, phase.knobs(0), jax.random.key(0), roll and jax.tree.map(row, roll))
    return jax.device_get((out, args))


def random_values(tree):
    """Returns values for shapes that bfloat16 holds: norms about 1, ids that are positions as well."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return rng.integers(0, TOKENS, x.shape)
        scale = 1 if 'norm' in sharding.path(path) else 0
        return (scale + 0.05 * rng.standard_normal(x.shape)).astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def difference(x, want) -> float:
    """Returns the root mean square of the difference of two trees over that of the second."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(want), strict=True)
    sums = [(np.sum((a.astype(np.float64) - b) ** 2), np.sum(b.astype(np.float64) ** 2)) for a, b in pairs]
    above, below = map(sum, zip(*sums, strict=True))
    return float(np.sqrt(above / below))


def main(families=tuple(FAMILIES), dtypes=tuple(MOST)) -> bool:
    """Prints the table; returns whether all figures are small."""
    fine = True
    for family in families:
        (want, sampler, roll), given = run(FAMILIES[family], 'float32', jax.devices('cpu')[0])
        for dtype in dtypes:
            (values, sampler, _), _ = run(FAMILIES[family], dtype, jax.devices()[0], given, roll)
            figures = {k: difference(values[k], want[k]) for k in want} | {'sampler': float(sampler)}
            judged = family not in ROUTED or dtype == 'float32'
            agrees = not judged or all(v < MOST[dtype] for v in figures.values())
            report(
                family=family,
                dtype=dtype,
                **{k: float(f'{v:.2g}') for k, v in figures.items()},
                judged=judged,
                agrees=agrees,
            )
            fine &= agrees
    return fine


if __name__ == '__main__':
    app.run(lambda _: main())
