"""Checkpoints of the trained state with Orbax: asynchronous, atomic, restored onto any mesh and process count."""

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from lens import distributed, sharding
from lens.errors import LensError

T = TypeVar('T')
# What Orbax and the libraries under it raise for files that cannot be read or written.
FILE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
SHOWN = 3  # differing leaves in a message


class CheckpointError(LensError):
    """A checkpoint does not fit this run or cannot be read."""


class DamagedError(CheckpointError):
    """The files of a checkpoint cannot be read."""


def _to_dict(tree) -> dict:
    """Plain dict keyed by leaf path: readable without our classes, loadable in part. Orbax refuses
    arrays without elements (an empty soft prompt), so they are left out."""
    return {sharding.path(kp): x for kp, x in jax.tree_util.tree_leaves_with_path(tree) if x.size}


def _from_dict(like, leaves: dict):
    def leaf(kp, x):
        return leaves[sharding.path(kp)] if x.size else jnp.zeros(x.shape, x.dtype, device=x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)


@jax.jit
def _checksums(leaves: dict) -> dict:
    """Sum of the bits of each leaf as uint32, modulo 2^32: the same on every mesh. Orbax's arrays have none."""

    def bits(x):
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(jnp.uint32)

    return jax.tree.map(lambda x: jnp.sum(bits(x), dtype=jnp.uint32), leaves)


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:150]


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving waits for writes. All processes make every call.

    Kept are the newest `keep`, the `best` by held-out FVE, and every one at a multiple of `every` steps (0: none).
    say: receives sentences for the user about what went wrong and was survived.
    """

    def __init__(
        self, directory: pathlib.Path, keep: int, best: int = 0, every: int = 0, say: Callable[[str], None] = print
    ):
        p = ocp.training.preservation_policies
        policies = [p.LatestN(keep)]
        if best:
            by_fve = p.BestN(get_metric_fn=lambda m: m['fve'], n=best, keep_checkpoints_without_metrics=False)
            policies.append(by_fve)
        if every:
            policies.append(p.EveryNSteps(every))
        self.directory, self._say, self._writing = directory.absolute(), say, None
        policy = p.AnyPreservationPolicy(policies)
        self._ckpt = ocp.training.Checkpointer(self.directory, preservation_policy=policy)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.wait()
        self._ckpt.close()

    @property
    def steps(self) -> list[int]:
        """Of the finished checkpoints, ascending."""
        return sorted(c.step for c in self._ckpt.checkpoints if (self.directory / str(c.step)).exists())

    @property
    def latest_step(self) -> int | None:
        return max(self.steps, default=None)

    @property
    def _fve(self) -> dict[int, float]:
        """By step, of those that were evaluated."""
        return {c.step: c.metrics['fve'] for c in self._ckpt.checkpoints if c.metrics}

    @property
    def best_step(self) -> int | None:
        """The one with the highest held-out FVE, where any was evaluated."""
        return max(self._fve, key=self._fve.get, default=None)

    @property
    def best_fve(self) -> float:
        return max(self._fve.values(), default=-np.inf)

    def save(self, step: int, state, info: dict, fve: float | None = None) -> None:
        """Writes in the background; the arrays may be donated as soon as this returns.

        info: JSON values stored beside (data iterator, config). fve: held-out, where this step was evaluated.
        A full disk or another failure of the files costs this checkpoint alone: a warning, the ones before stay.
        """
        self.wait()
        if step in self.steps:
            return
        metrics, leaves = None if fve is None else {'fve': fve}, _to_dict(state)
        info = info | {'checksums': {k: int(v) for k, v in sharding.fetch(_checksums(leaves)).items()}}
        self._writing = step
        try:
            self._ckpt.save_checkpointables_async(step, {'state': leaves}, metrics=metrics, custom_metadata=info)
        except FILE_ERRORS as e:
            self._lost(e)

    def wait(self) -> None:
        """Until what is being written is complete, or has failed."""
        try:
            self._ckpt.wait()
        except FILE_ERRORS as e:
            self._lost(e)
        self._writing = None

    def _lost(self, e: Exception) -> None:
        """Warns of a checkpoint that could not be written and removes what there is of it."""
        step, self._writing = self._writing, None
        self.clean()
        self._ckpt.reload()
        last = self.latest_step
        self._say(
            f'warning: the checkpoint of step {step} could not be written to {self.directory} ({_first_line(e)}); training '
            f'goes on, the last good one is {"none" if last is None else f"step {last}"}: free some disk.'
        )

    def clean(self) -> None:
        """Removes what killed or failed writes have left. Not while another process writes there."""
        if distributed.is_first():
            for rest in self.directory.glob('*.orbax-checkpoint-tmp*'):
                shutil.rmtree(rest, ignore_errors=True)

    def newest(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """(step, read(step)) of the newest checkpoint that can be read; None where there is none at all.

        Raises DamagedError when there are some and none can be read.
        """
        damaged = None
        for step in reversed(self.steps):
            value, error = None, None
            try:
                value = read(step)
            except DamagedError as e:
                error = e
            if _all_agree(error is None):
                return step, value
            damaged = error or DamagedError(f'{self.directory}/{step} cannot be read by another process.')
            self._say(f'warning: {damaged}')
        if damaged:
            raise damaged
        return None

    def set_aside(self, after: int) -> None:
        """Moves the checkpoints after a step out of the way: newer ones that are damaged."""
        for step in [s for s in self.steps if s > after]:
            place = self.directory.with_name(f'{self.directory.name}-damaged')
            if distributed.is_first():
                place.mkdir(exist_ok=True)
                shutil.rmtree(place / str(step), ignore_errors=True)
                os.replace(self.directory / str(step), place / str(step))
            self._say(f'warning: {self.directory}/{step} was moved to {place}.')
        _all_agree(True)
        self._ckpt.reload()

    def info(self, step: int) -> dict:
        """What was given to save as `info`. Raises DamagedError."""
        try:
            info = self._ckpt.metadata(step).custom_metadata
        except FILE_ERRORS as e:
            raise self._damaged(step, e) from e
        if not info:  # what Orbax makes of an unreadable file
            raise self._damaged(step, ValueError('its description is not valid JSON'))
        return dict(info)

    def _damaged(self, step: int, e: Exception) -> DamagedError:
        return DamagedError(f'{self.directory}/{step} is damaged ({_first_line(e)}).')

    def restore(self, step: int, like):
        """The state of a checkpoint, in the structure and placement of `like`; of a part of the state, that part.

        like: tree of arrays or ShapeDtypeStructs that carry shardings. Raises CheckpointError.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _to_dict(like))
        self._check_shapes(step, abstract)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                loaded = self._ckpt.load_checkpointables(step, {'state': abstract})['state']
            stored = self.info(step)['checksums']
            found = sharding.fetch(_checksums(loaded))
        except FILE_ERRORS as e:
            raise self._damaged(step, e) from e
        changed = next((k for k, v in found.items() if int(v) != stored.get(k)), None)
        if changed:
            raise self._damaged(step, ValueError(f'{changed} is not what was written'))
        return _from_dict(like, loaded)

    def _check_shapes(self, step: int, abstract: dict) -> None:
        try:
            stored = self._ckpt.checkpointables_metadata(step).metadata['state']
            have = {k: tuple(x.shape) for k, x in stored.items()}
        except FILE_ERRORS as e:
            raise self._damaged(step, e) from e
        wrong = [
            f'{k} {have.get(k, "none")} instead of {x.shape}' for k, x in abstract.items() if have.get(k) != x.shape
        ]
        if wrong:
            more = f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else ''
            raise CheckpointError(
                f'{self.directory}/{step} has other parameters than this configuration ({"; ".join(wrong[:SHOWN])}{more}): '
                'use the configuration of that run, or another workdir.'
            )


def _all_agree(yes: bool) -> bool:
    """Whether it is so on every process."""
    return yes if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(yes)).all())
