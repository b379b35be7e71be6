"""Checkpoints of the trained state with Orbax: asynchronous, atomic, restored onto any mesh."""

import pathlib

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from lens import sharding
from lens.errors import LensError


class CheckpointError(LensError):
    """A checkpoint does not fit this run or cannot be read."""


def _to_dict(tree) -> dict:
    """Plain dict keyed by leaf path: readable without our classes, loadable in part. Orbax refuses
    arrays without elements (an empty soft prompt), so they are left out."""
    return {sharding.path(kp): x for kp, x in jax.tree_util.tree_leaves_with_path(tree) if x.size}


def _from_dict(like, leaves: dict):
    def leaf(kp, x):
        return leaves[sharding.path(kp)] if x.size else jnp.zeros(x.shape, x.dtype, device=x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)


class Checkpoints:
    """The checkpoints of one run, newest `keep` kept. Use as a context manager: leaving waits for writes."""

    def __init__(self, directory: pathlib.Path, keep: int):
        policy = ocp.training.preservation_policies.LatestN(keep)
        self.directory = directory.absolute()
        self._ckpt = ocp.training.Checkpointer(self.directory, preservation_policy=policy)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._ckpt.close()

    @property
    def latest_step(self) -> int | None:
        return self._ckpt.latest.step if self._ckpt.latest else None

    def save(self, step: int, state, info: dict) -> None:
        """Writes in the background; the arrays may be donated as soon as this returns.

        info: JSON values stored beside (data iterator, config).
        """
        self._ckpt.save_checkpointables_async(step, {'state': _to_dict(state)}, custom_metadata=info)

    def info(self, step: int) -> dict:
        """What was given to save as `info`."""
        return self._ckpt.metadata(step).custom_metadata

    def restore(self, step: int, like):
        """The state of a checkpoint, in the structure and placement of `like`.

        like: tree of arrays or ShapeDtypeStructs that carry shardings. Raises CheckpointError.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _to_dict(like))
        try:
            loaded = self._ckpt.load_checkpointables(step, {'state': abstract})['state']
        except (ValueError, KeyError, OSError) as e:
            first = str(e).strip().splitlines()[0][:300]
            raise CheckpointError(
                f'{self.directory}/{step} cannot be restored into this configuration ({first}): '
                'use the configuration of that run, or another workdir.'
            ) from e
        return _from_dict(like, loaded)
