"""What trains and how: a table of rows over leaf paths, AdamW, clipping by group, accumulation, norms."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from lens import schedules, sharding
from lens.errors import LensError
from lens.schedules import Clock, Schedule

SIDES = ('decoder', 'encoder')
B1, B2, EPSILON = 0.9, 0.999, 1e-8
FROZEN = 'frozen'
ROW_FORM = '(regex, multiplier, weight decay, clip group, unfreeze duration), or (regex, None) for frozen parameters'


class TableError(LensError):
    """The optimizer table is malformed or leaves a parameter out; the message names the key or the path."""


@dataclasses.dataclass(frozen=True)
class Row:
    """How the leaves whose path `pattern` finds (re.search, first row wins) are trained.

    multiplier: of the learning rate of the leaf's side; None = frozen. weight_decay: decoupled, times the
    learning rate. clip: name of the group whose global norm is clipped. unfreeze: micro-steps of the phase
    before which nothing happens to the leaf.
    """

    pattern: str
    multiplier: float | None
    weight_decay: float = 0.0
    clip: str = ''
    unfreeze: int = 0


def parse_table(table, clock: Clock, key: str) -> tuple[Row, ...]:
    """The rows of a table of a configuration (tuples or lists). Raises LensError naming `key`."""

    def row(entry) -> Row:
        entry = tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
        try:
            pattern, multiplier, *rest = entry
            re.compile(pattern)
            if multiplier is None and not rest:
                return Row(pattern, None)
            weight_decay, clip, unfreeze = rest
            multiplier, weight_decay = float(multiplier), float(weight_decay)
        except (ValueError, TypeError, re.error) as e:
            raise TableError(f'{key}: {entry!r} is not a row; accepted: {ROW_FORM}.') from e
        if multiplier < 0 or weight_decay < 0:
            raise TableError(f'{key}: {entry!r} has a negative multiplier or weight decay.')
        first = schedules.duration(unfreeze, clock, f'{key}: {pattern}')
        return Row(pattern, None) if first is None else Row(pattern, multiplier, weight_decay, str(clip), first)

    return tuple(row(entry) for entry in table)


def side(path: str) -> str:
    """'decoder' or 'encoder' for a leaf path of the trainable tree."""
    return path.split('/')[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """An optax.GradientTransformation that also says which leaves it trains: trained(path) -> bool."""

    init: Callable
    update: Callable
    trained: Callable[[str], bool]


def _paths(tree):
    """The tree with every leaf's path in its place."""
    return jax.tree_util.tree_map_with_path(lambda kp, _: sharding.path(kp), tree)


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def make(
    table: tuple[Row, ...],
    learning_rates: Mapping[str, Schedule],
    clip: float | Mapping[str, float],
    accumulation: int = 1,
    updates: int = 1,
) -> Optimizer:
    """AdamW (0.9, 0.999, 1e-8; moments in float32) for a tree whose first path element is a side.

    learning_rates: by side, of the micro-step. clip: global norm of each clip group, one number or
    by group. accumulation: micro-steps whose mean gradient makes one update; updates: how many a micro-step
    makes. Before its unfreeze time a leaf is neither updated nor decayed nor counted in a norm, and its moments
    start from zero there. Frozen leaves have no state. Raises LensError for a leaf
    that no row covers and for a clip group without a norm.
    """

    def row_of(path: str) -> int:
        found = next((i for i, r in enumerate(table) if re.search(r.pattern, path)), None)
        if found is None:
            raise TableError(f'no row of the optimizer table covers {path}: add one, ({path!r}, None) to freeze it.')
        return found

    def trained(path: str) -> bool:
        return table[row_of(path)].multiplier is not None

    def labels(of: Callable[[str], str]):
        return lambda tree: jax.tree.map(of, _paths(tree))

    def group(path: str) -> str:
        return f'clip_{table[row_of(path)].clip}' if trained(path) else FROZEN

    def row_and_side(path: str) -> str:
        return f'{side(path)}_{row_of(path)}'

    def asleep_until(unfreeze: int, inner):
        first = -(-unfreeze * updates // accumulation)  # optimizer step
        return optax.conditionally_mask(inner, lambda step: step >= first) if first else inner

    def one(row: Row, name: str):
        def rate(count):
            return -row.multiplier * learning_rates[name](count * accumulation // updates)

        adam = optax.chain(
            optax.scale_by_adam(B1, B2, EPSILON, mu_dtype=jnp.float32), optax.add_decayed_weights(row.weight_decay)
        )
        return optax.chain(asleep_until(row.unfreeze, adam), optax.scale_by_schedule(rate))

    def clipped(name: str):
        rows = {f'{s}_{i}': (row, s) for i, row in enumerate(table) for s in SIDES if row.clip == name}
        awake = {k: asleep_until(row.unfreeze, optax.identity()) for k, (row, _) in rows.items()}
        norm = clip.get(name) if isinstance(clip, Mapping) else clip
        if norm is None:
            raise TableError(f'grad_clip has no norm for the clip group {name!r}: it has {", ".join(clip)}.')
        return optax.chain(
            optax.partition(awake, labels(row_and_side)),
            optax.clip_by_global_norm(norm),
            optax.partition({k: one(*v) for k, v in rows.items()}, labels(row_and_side)),
        )

    names = dict.fromkeys(row.clip for row in table if row.multiplier is not None)
    groups = {f'clip_{name}': accumulated(clipped(name), accumulation) for name in names}
    tx = optax.partition(groups | {FROZEN: optax.set_to_zero()}, labels(group))
    return Optimizer(
        lambda params: tx.init(_float32(params)),
        lambda grads, state, params: tx.update(_float32(grads), state, _float32(params)),
        trained,
    )


def accumulated(tx: optax.GradientTransformation, micro_steps: int) -> optax.GradientTransformation:
    """`tx` applied to the mean gradient of every `micro_steps` micro-steps; zero updates between."""
    return optax.MultiSteps(tx, micro_steps).gradient_transformation() if micro_steps > 1 else tx


def norms_by_side(tree, counted: Callable[[str], bool] = lambda path: True) -> dict[str, jax.Array]:
    """Global L2 norm of the decoder's and of the encoder's leaves for whose path `counted` holds."""
    leaves = [(sharding.path(kp), x) for kp, x in jax.tree_util.tree_leaves_with_path(tree)]
    return {
        name: jnp.sqrt(
            sum(
                (jnp.sum(x.astype(jnp.float32) ** 2) for path, x in leaves if side(path) == name and counted(path)),
                start=jnp.float32(0),
            )
        )
        for name in SIDES
    }


def step_norms(grads, updates, params, trained: Callable[[str], bool]) -> dict[str, jax.Array]:
    """Metrics of one step by side: norm of the gradient of trained leaves, of the update, and the ratio of the
    update to the parameters after it."""
    update, after = norms_by_side(updates), norms_by_side(params)
    return (
        {f'grad_norm_{k}': v for k, v in norms_by_side(grads, trained).items()}
        | {f'update_norm_{k}': v for k, v in update.items()}
        | {f'update_ratio_{k}': v / (after[k] + 1e-12) for k, v in update.items()}
    )


def drift(params, start) -> dict[str, jax.Array]:
    """Sum over leaves of |theta - theta_0| by the sum of |theta_0|, of each side. start: theta_0, the same tree."""

    def total(tree):
        out = dict.fromkeys(SIDES, jnp.float32(0))
        for kp, x in jax.tree_util.tree_leaves_with_path(tree):
            out[side(sharding.path(kp))] += jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2))
        return out

    moved = jax.tree.map(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), params, start)
    moved, size = total(moved), total(start)
    return {name: moved[name] / (size[name] + 1e-12) for name in SIDES}
