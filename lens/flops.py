"""Model FLOPs of a training step, for its utilisation of the devices (MFU), counted in the traced program.

What the mathematics of a step needs: 2 FLOPs for each pair of numbers that a product of matrices multiplies, loops
times their length; of experts the rows that are routed, whatever runs. A query meets the keys that it may see: half of them under the
causal mask, at most the window in a sliding layer. What the backward pass computes again does not count, nor what
nothing reads (gradients of frozen parameters). Left out: all that is no product of matrices, loops without a known
length. A kernel counts what it says of itself.
"""

import math
import re
from collections.abc import Iterator

import jax
from jax.interpreters import partial_eval

from lens.models.transformer import TransformerConfig

# Dense bfloat16 FLOP/s of one chip by a part of jax.Device.device_kind; the first that fits.
PEAK_FLOPS = {
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'H200': 989e12,
    'A100': 312e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,  # what v5p calls itself
    'TPU v4': 275e12,
}
# jax.named_scope -> part of a step
PARTS = {'read': 'read', 'prefill': 'sample', 'decode': 'sample', 'encode': 'encode', 'update': 'update'}
PARTS |= dict.fromkeys(('score', 'natural', 'patch'), 'score')


def peak(device_kind: str) -> float | None:
    """Returns dense bfloat16 FLOP/s of a chip, None where it is not known."""
    return next((v for k, v in PEAK_FLOPS.items() if k.lower() in device_kind.lower()), None)


def by_scope(jaxpr, c: TransformerConfig) -> dict[str, float]:
    """Returns the FLOPs of one call of a program on all devices: read, sample, score, encode, update, other.

    jaxpr: `jitted.trace(...).jaxpr`. c: of the models in it. The outermost scope counts; a gradient through sampling is
    scoring.
    """
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    out = dict.fromkeys([*PARTS.values(), 'other'], 0.0)
    for scopes, flops in _products(used, c, '', 1):
        found = re.search(rf'\b({"|".join(PARTS)})\b', scopes)
        part = PARTS[found[1]] if found else 'other'
        out['score' if part == 'sample' and 'transpose(' in scopes else part] += flops
    return out


def bound_by_compute(jaxpr, c: TransformerConfig) -> float:
    """Returns the FLOPs of `by_scope` that utilisation is measured with: all but those of sampling."""
    return sum(n for part, n in by_scope(jaxpr, c).items() if part != 'sample')


def _products(jaxpr, c: TransformerConfig, scopes: str, times: int) -> Iterator[tuple[str, float]]:
    """(scopes, FLOPs of `times` runs) of every product that counts."""
    for eqn in jaxpr.eqns:
        name, inside, n = eqn.primitive.name, f'{scopes}/{eqn.source_info.name_stack}', times
        if name in ('dot_general', 'ragged_dot_general', 'pallas_call') and not _again(inside):
            yield inside, times * _flops(eqn, c) * _routed(inside, c)
        if name == 'pallas_call':
            continue
        if name == 'scan':
            n = times * eqn.params['length']
        elif name == 'shard_map':  # shapes of one device; those of `model` have the same rows
            n = times * math.prod(size for axis, size in eqn.params['mesh'].shape.items() if axis != 'model')
        for x in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
        ):
            if hasattr(getattr(x, 'jaxpr', x), 'eqns') and name != 'while':
                yield from _products(getattr(x, 'jaxpr', x), c, inside, n)


def _again(scopes: str) -> bool:
    """Whether it is a forward pass inside a backward pass: of jax.checkpoint, or of jax.vjp in a custom gradient."""
    before, _, _ = scopes.rpartition('jvp(')
    return 'rematted_computation' in scopes or ('transpose(' in before and not before.endswith('transpose('))


def _routed(scopes: str, c: TransformerConfig) -> float:
    """The share of a product by every expert at hand (lens.models.moe) that the tokens are routed to."""
    every = re.search(r'all_(\d+)_experts', scopes)
    return c.top_k / int(every[1]) if every else 1


def _flops(eqn, c: TransformerConfig) -> float:
    if eqn.primitive.name == 'pallas_call':
        return eqn.params['cost_estimate'].flops
    left, right, out = (x.aval.shape for x in (*eqn.invars[:2], *eqn.outvars))
    if eqn.primitive.name == 'ragged_dot_general':
        numbers = eqn.params['ragged_dot_dimension_numbers']
        (contracted, _), _ = numbers.dot_dimension_numbers
        groups = eqn.invars[2].aval.shape[-1] if set(numbers.lhs_ragged_dimensions) & set(contracted) else 1
        return 2 * math.prod(out) * math.prod(left[i] for i in contracted) / groups
    (contracted, _), (batch, batch_right) = eqn.params['dimension_numbers']
    flops = 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    if len(batch) != 2:
        return flops
    # Of attention: batched over rows and heads. Keys, values or their gradient have two more dimensions, the others
    # three. Queries are taken as spread evenly over the keys.
    rest = [[n for i, n in enumerate(s) if i not in b] for s, b in ((left, batch), (right, batch_right), (out, (0, 1)))]
    keys = math.prod(min(rest, key=len)) // c.head_dim
    seen = [min(keys, window) if window else keys for window in c.windows]
    return flops * sum(n * (n + 1) / 2 + (keys - n) * n for n in seen) / len(seen) / keys**2
