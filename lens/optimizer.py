"""What trains and how: a table of rows over leaf paths, AdamW, clipping by group, accumulation, norms.

The optax chain is built inside the step, with rates, decays, norms and who is awake as traced numbers: a program
depends on which rows there are, not on their numbers.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lens import schedules, sharding
from lens.errors import LensError, number, shown, text
from lens.schedules import Schedule, Units

SIDES = ('decoder', 'encoder')
B1, B2, EPSILON = 0.9, 0.999, 1e-8
FROZEN = 'frozen'
ROW_FORM = '(regex, multiplier, weight decay, clip group, unfreeze duration), or (regex, None) for frozen parameters'


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


def regex(pattern, key: str) -> str:
    """Returns a regular expression once it is known to be one. Raises LensError naming `key`."""
    try:
        re.compile(text(pattern, key))
    except (re.error, OverflowError, RecursionError) as e:
        raise LensError(f'{key}={shown(repr(pattern))} is not a regular expression: {shown(e)}.') from None
    return pattern


def parse_table(table, clock: Units, key: str) -> tuple[Row, ...]:
    """Returns the rows of a table of a configuration (tuples or lists). Raises LensError naming `key`."""

    def row(entry) -> Row:
        fields = tuple(entry) if isinstance(entry, tuple | list) else ()
        if len(fields) != 5 and (len(fields) != 2 or fields[1] is not None):
            raise LensError(f'{key}: {shown(repr(entry))} is not a row; accepted: {ROW_FORM}.')
        pattern = regex(fields[0], f'{key}: regex')
        if fields[1] is None:
            return Row(pattern, None)
        _, multiplier, weight_decay, clip, unfreeze = fields
        where = f'{key}: {shown(pattern)}'
        number(multiplier, f'{where}: multiplier', 0, whole=False)
        number(weight_decay, f'{where}: weight decay', 0, whole=False)
        first = schedules.duration(unfreeze, clock, where)
        clip = text(clip, f'{where}: clip group')
        return (
            Row(pattern, None) if first is None else Row(pattern, float(multiplier), float(weight_decay), clip, first)
        )

    if not isinstance(table, tuple | list):
        raise LensError(f'{key}={shown(repr(table))} holds no rows; accepted: {ROW_FORM}.')
    return tuple(row(entry) for entry in table)


def parse_clip(value, key: str, table: tuple[Row, ...]) -> dict[str, float]:
    """Returns the global norm of every clip group of the table, from one norm or pairs. Raises LensError."""
    groups = dict.fromkeys(row.clip for row in table if row.multiplier is not None)
    pairs = value if isinstance(value, tuple | list) else [(k, value) for k in groups]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs) or isinstance(value, str):
        form = "neither a norm nor pairs of a clip group and its norm, (('decoder', 0.05), …)"
        raise LensError(f'{key}={shown(repr(value))} is {form}.')
    norms = {text(k, key): float(number(v, f'{key} of {shown(k)}', whole=False)) for k, v in pairs}
    if not min(norms.values(), default=1) > 0:
        raise LensError(f'{key}={shown(repr(value))} must be positive; 1e9 clips nothing.')
    if unknown := ', '.join(norms.keys() - groups.keys()):
        raise LensError(f'{key} names {unknown}, which is no clip group of the table: it has {", ".join(groups)}.')
    if missing := [g for g in groups if g not in norms]:
        raise LensError(f'{key} has no norm for the clip group {missing[0]!r}: it has {", ".join(norms)}.')
    return norms


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (0.9, 0.999, 1e-8; moments in float32) for a tree whose first path element is a side.

    What a program depends on, and so a static argument of a step: (pattern, clip group or None where frozen, whether it
    sleeps at first) of every row, and how many micro-steps make one update, of their mean gradient. Before its unfreeze
    time a leaf is neither updated nor decayed nor counted in a norm, and its moments start from zero there. Frozen
    leaves have no state. Raises LensError for a leaf that no row covers.
    """

    rows: tuple[tuple[str, str | None, bool], ...]
    accumulation: int = 1

    def init(self, params):
        n = len(self.rows)  # the numbers of `update` do not enter a state
        values = {'rate': np.zeros((n, len(SIDES))), 'decay': np.zeros(n), 'awake': np.zeros(n, bool)}
        return self._chain(values | {'clip': dict.fromkeys(self._groups(), 1.0)}).init(_float32(params))

    def update(self, grads, state, params, values: Mapping):
        """Returns (updates, state) of one micro-step. values: of `numbers`."""
        return self._chain(values).update(_float32(grads), state, _float32(params))

    def trained(self, path: str) -> bool:
        return self.rows[self._row_of(path)][1] is not None

    def _row_of(self, path: str) -> int:
        found = next((i for i, (pattern, *_) in enumerate(self.rows) if re.search(pattern, path)), None)
        if found is None:
            raise LensError(f'no row of the optimizer table covers {path}: add one, ({path!r}, None) to freeze it.')
        return found

    def _groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(clip for _, clip, _ in self.rows if clip is not None))

    def _chain(self, values: Mapping) -> optax.GradientTransformation:
        def labels(of: Callable[[str], str]):
            return lambda tree: jax.tree_util.tree_map_with_path(lambda kp, _: of(sharding.path(kp)), tree)

        def group(path: str) -> str:
            return f'clip_{self.rows[self._row_of(path)][1]}' if self.trained(path) else FROZEN

        def row_and_side(path: str) -> str:
            return f'{path.split("/")[0]}_{self._row_of(path)}'

        def awake(i: int, inner):
            return optax.conditionally_mask(inner, lambda step: values['awake'][i]) if self.rows[i][2] else inner

        def one(i: int, s: int):
            adam = optax.scale_by_adam(B1, B2, EPSILON, mu_dtype=jnp.float32)
            decayed = optax.chain(adam, optax.add_decayed_weights(values['decay'][i]))
            return optax.chain(awake(i, decayed), optax.scale(-values['rate'][i, s]))

        def clipped(name: str):
            rows = {f'{s}_{i}': (i, k) for i, r in enumerate(self.rows) for k, s in enumerate(SIDES) if r[1] == name}
            counted = {label: awake(i, optax.identity()) for label, (i, _) in rows.items()}
            return optax.chain(
                optax.partition(counted, labels(row_and_side)),
                optax.clip_by_global_norm(values['clip'][name]),
                optax.partition({label: one(i, k) for label, (i, k) in rows.items()}, labels(row_and_side)),
            )

        groups = {f'clip_{name}': clipped(name) for name in self._groups()}
        if self.accumulation > 1:
            groups = {k: optax.MultiSteps(tx, self.accumulation).gradient_transformation() for k, tx in groups.items()}
        return optax.partition(groups | {FROZEN: optax.set_to_zero()}, labels(group))


def make(table: tuple[Row, ...], accumulation: int = 1) -> Optimizer:
    """Returns the Optimizer of a table."""
    rows = tuple((r.pattern, None if r.multiplier is None else r.clip, r.unfreeze > 0) for r in table)
    return Optimizer(rows, accumulation)


def numbers(
    table: tuple[Row, ...], rates: Mapping[str, Schedule], clip: Mapping[str, float], t: int, accumulation: int
) -> dict:
    """Returns the values of Optimizer.update at micro-step t of the phase, numpy.

    rate [rows, sides], decay [rows], awake [rows], clip by group. All micro-steps of an optimizer step have those of
    its first one; a row wakes at the first optimizer step that begins at its unfreeze time or after it.
    """
    first = t // accumulation * accumulation
    by_side = np.array([rates[s](first) if s in rates else 0.0 for s in SIDES], np.float32)
    scale = np.array([r.multiplier or 0.0 for r in table], np.float32)
    return {
        'rate': scale[:, None] * by_side,
        'decay': np.array([r.weight_decay for r in table], np.float32),
        'awake': np.array([first >= r.unfreeze for r in table]),
        'clip': {k: np.float32(v) for k, v in clip.items()},
    }


def _by_side(tree, counted: Callable[[str], bool] = lambda path: True) -> dict[str, list[jax.Array]]:
    """The leaves of each side for whose path `counted` holds, in float32."""
    leaves = [(sharding.path(kp), x) for kp, x in jax.tree_util.tree_leaves_with_path(_float32(tree))]
    return {s: [x for path, x in leaves if path.startswith(f'{s}/') and counted(path)] for s in SIDES}


def norms_by_side(tree, counted: Callable[[str], bool] = lambda path: True) -> dict[str, jax.Array]:
    """Returns the global L2 norm of the decoder's and of the encoder's leaves for whose path `counted` holds."""
    return {s: optax.tree.norm(leaves) for s, leaves in _by_side(tree, counted).items()}


def step_norms(grads, updates, params, trained: Callable[[str], bool]) -> dict[str, jax.Array]:
    """Returns by side the norm of the gradient of trained leaves, of the update, and its ratio to the new parameters."""
    update, after = norms_by_side(updates), norms_by_side(params)
    return (
        {f'grad_norm_{k}': v for k, v in norms_by_side(grads, trained).items()}
        | {f'update_norm_{k}': v for k, v in update.items()}
        | {f'update_ratio_{k}': v / (after[k] + 1e-12) for k, v in update.items()}
    )


@jax.jit
def drift(params, start) -> dict[str, jax.Array]:
    """Returns the sum over leaves of |theta - theta_0| by the sum of |theta_0|, of each side. start: theta_0."""
    moved = jax.tree.map(jnp.subtract, _float32(params), _float32(start))
    moved, size = ({s: sum(map(optax.tree.norm, x)) for s, x in _by_side(tree).items()} for tree in (moved, start))
    return {f'drift_{s}': moved[s] / (size[s] + 1e-12) for s in SIDES}
