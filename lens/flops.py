"""Model FLOPs of a training step, for its utilisation of the devices (MFU), counted in the traced program.

What the mathematics of a step needs: 2 FLOPs for each pair of numbers that a product of matrices multiplies, loops
times their length (of one that may end early, sampling, the most); of experts the rows that are routed, whatever runs. A
query meets the keys that it may see: half of those beside it or of a cache that is filled, all before it, at most the
window in a sliding layer. What the backward pass computes again does not count, nor what nothing reads (gradients of
frozen parameters). A kernel counts what it says of itself. Left out: all that is no product of matrices, loops without
a known bound.
"""

import math
import re
from collections.abc import Iterator

import jax
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from lens.models import flash
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
# kernel of models/flash.py -> products in it that count
KERNELS = {flash.FORWARD: 2, flash.BACKWARD: 4}
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
            yield inside, times * _flops(eqn, inside, c) * _routed(inside, c)
        kernel = eqn.params.get('target_name')
        if kernel in KERNELS and not _again(inside):
            yield inside, times * KERNELS[kernel] * _flash_product(eqn, c)
        if name == 'pallas_call':
            continue
        if name == 'scan':
            n = times * eqn.params['length']
        elif name == 'while':
            n = times * _most_runs(eqn.params['cond_jaxpr'].jaxpr)
        elif name == 'shard_map':  # shapes of one device; those of `model` have the same rows
            n = times * math.prod(size for axis, size in eqn.params['mesh'].shape.items() if axis != 'model')
        for x in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
        ):
            if hasattr(getattr(x, 'jaxpr', x), 'eqns'):
                yield from _products(getattr(x, 'jaxpr', x), c, inside, n)


def _most_runs(condition) -> int:
    """The number that the counter of a loop stays below; 0 where there is none."""
    less = (eqn for eqn in condition.eqns if eqn.primitive.name == 'lt')
    return next((int(eqn.invars[1].val) for eqn in less if isinstance(eqn.invars[1], Literal)), 0)


def _again(scopes: str) -> bool:
    """Whether it is a forward pass inside a backward pass: of jax.checkpoint, or of jax.vjp in a custom gradient."""
    before, _, _ = scopes.rpartition('jvp(')
    return 'rematted_computation' in scopes or ('transpose(' in before and not before.endswith('transpose('))


def _routed(scopes: str, c: TransformerConfig) -> float:
    """The share of a product by every expert at hand (lens.models.moe) that the tokens are routed to."""
    every = re.search(r'all_(\d+)_experts', scopes)
    return c.top_k / int(every[1]) if every else 1


def _flops(eqn, scopes: str, c: TransformerConfig) -> float:
    if eqn.primitive.name == 'pallas_call':
        return eqn.params['cost_estimate'].flops
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.primitive.name == 'ragged_dot_general':
        numbers = eqn.params['ragged_dot_dimension_numbers']
        (contracted, _), _ = numbers.dot_dimension_numbers
        groups = eqn.invars[2].aval.shape[-1] if set(numbers.lhs_ragged_dimensions) & set(contracted) else 1
        return 2 * math.prod(out) * math.prod(left[i] for i in contracted) / groups
    (contracted, _), _ = eqn.params['dimension_numbers']
    flops = 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    of_attention = re.findall(r'\b(before|filling|beside)_(\d+)_keys\b', scopes)  # models/attention.py
    if not of_attention:
        return flops
    where, keys = of_attention[-1][0], int(of_attention[-1][1])
    return flops * (sum(_windows(keys, c)) / len(c.windows) / keys if where == 'before' else _seen(keys, c))


def _windows(keys: int, c: TransformerConfig) -> list[int]:
    """How many of so many keys a query sees at most in each kind of layer."""
    return [min(keys, window) if window else keys for window in c.windows]


def _seen(keys: int, c: TransformerConfig) -> float:
    """Which share of so many keys a query among them sees, in the mean over queries, spread evenly, and layers."""
    seen = _windows(keys, c)
    return sum(n * (n + 1) / 2 + (keys - n) * n for n in seen) / len(seen) / keys**2


def _flash_product(eqn, c: TransformerConfig) -> float:
    """One product of a kernel, in the mean over layers: it stands in the program once for every kind of them."""
    b, t, _, h = eqn.invars[0].aval.shape
    windows, _ = flash.kinds(c, t)
    return 2 * b * c.n_heads * t * t * h * _seen(t, c) / len(windows)
