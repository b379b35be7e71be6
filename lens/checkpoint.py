"""Checkpoints with Orbax: asynchronous, atomic, restored onto any mesh and process count. `Checkpoints` is the folder of
one run; what it says of its run is places.identity."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from lens import distributed, files, places, sharding
from lens.errors import LensError

T = TypeVar('T')
# What Orbax and the libraries under it raise for files that cannot be read or written.
FILE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # said in the middle of what TensorStore says
SHOWN = 3  # differing leaves in a message
UNREAD = 'the checkpoint is passed over'
TEXT_BYTES = 200  # of a cause that another process tells


class DamagedError(LensError):
    """The files of a checkpoint cannot be read."""


def _to_dict(tree) -> dict:
    """Leaves by path: readable without our classes, in part too. Orbax refuses empty arrays (a prompt of no tokens)."""
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


def _seal(info: dict) -> str:
    """A digest of JSON values: a flipped bit in them may be JSON still."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()[:16]


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:150]


class Keep(NamedTuple):
    """Which checkpoints stay: the newest `keep` and the `best` by held-out FVE."""

    keep: int = 1
    best: int = 0


@dataclasses.dataclass(frozen=True)
class Always(ocp.training.preservation_policies.PreservationPolicy):
    """Keeps the checkpoints of the steps for which `keeps` holds: no list of them, a run may have 2^31."""

    keeps: Callable[[int], bool]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [self.keeps(c.step) for c in checkpoints]


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving waits for writes. All processes make every call.

    keep: a Keep, or a block of a configuration with its keys. always: whether the checkpoint of a step stays.
    say: receives sentences for the user about what went wrong and was survived.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        keep,
        always: Callable[[int], bool] | None = None,
        say: Callable[[str], None] = print,
    ):
        self.directory, self._say, self._writing, self._best = directory.absolute(), say, None, keep.best
        self._keep, self._always = keep, always

    @functools.cached_property
    def _ckpt(self) -> ocp.training.Checkpointer:
        """What writes. It reads what every checkpoint says of itself and fails at one that is damaged: those are moved
        out of the way first. Reading needs none, and moves nothing."""
        self._set_aside_damaged()
        p = ocp.training.preservation_policies
        policies = [p.LatestN(self._keep.keep), *([Always(self._always)] if self._always else [])]
        if self._best:
            best = p.BestN(get_metric_fn=lambda m: m['fve'], n=self._best, keep_checkpoints_without_metrics=False)
            policies.append(best)
        return ocp.training.Checkpointer(self.directory, preservation_policy=p.AnyPreservationPolicy(policies))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if '_ckpt' in vars(self):
            self.wait()
            with contextlib.suppress(*FILE_ERRORS):  # of a write of which `_lost` has told
                self._ckpt.close()
            self.clean()  # threads of a failed write may have gone on after `_lost`

    @property
    def steps(self) -> list[int]:
        """Returns those of the finished checkpoints, ascending."""
        return sorted(int(p.name) for p in self.directory.glob('*') if p.name.isdecimal())

    @property
    def latest_step(self) -> int | None:
        return max(self.steps, default=None)

    @property
    def _fve(self) -> dict[int, float]:
        """By step, of those that were evaluated, the one that is being written too."""
        if '_ckpt' in vars(self):
            return {c.step: c.metrics['fve'] for c in self._ckpt.checkpoints if c.metrics}
        found = {}
        for step in self.steps:
            with contextlib.suppress(DamagedError):  # `newest` tells
                found[step] = self.info(step)['fve']
        return {step: fve for step, fve in found.items() if fve is not None}

    @property
    def best_step(self) -> int | None:
        """Returns the one with the highest held-out FVE, where any was evaluated."""
        return max(self._fve, key=self._fve.get, default=None)

    def is_best(self, fve: float | None) -> bool:
        """Returns whether a step with this held-out FVE is to be saved for it."""
        return fve is not None and self._best > 0 and fve > max(self._fve.values(), default=-np.inf)

    def save(self, step: int, state, info: dict, fve: float | None = None, needed: bool = False) -> None:
        """Writes in the background; the arrays may be donated as soon as this returns.

        info: JSON values stored beside (data iterator, config). fve: held-out, where this step was evaluated.
        A full disk or another failure of the files costs this checkpoint alone: a warning, the ones before stay.
        needed: the run ends with this checkpoint; waits until it is complete. Raises LensError where it is lost.
        """
        self.wait()
        if step in self.steps:
            return
        metrics, leaves = None if fve is None else {'fve': fve}, _to_dict(state)
        info = info | {'checksums': {k: int(v) for k, v in sharding.fetch(_checksums(leaves)).items()}, 'fve': fve}
        self._writing = step
        try:
            self._ckpt.save_checkpointables_async(
                step, {'state': leaves}, metrics=metrics, custom_metadata=info | {'seal': _seal(info)}
            )
        except FILE_ERRORS as e:
            self._lost(e, needed)
        if needed:
            self.wait(needed)

    def wait(self, needed: bool = False) -> None:
        """Waits until what is being written is complete, or has failed. needed: as in `save`."""
        try:
            self._ckpt.wait()
        except FILE_ERRORS as e:
            self._lost(e, needed)
        self._writing = None

    def _lost(self, e: Exception, needed: bool) -> None:
        """Tells of a checkpoint that could not be written and removes what there is of it."""
        step, self._writing = self._writing, None
        self.clean()
        self._ckpt.reload()
        last = 'none' if self.latest_step is None else f'step {self.latest_step}'
        reason = next((text for text in map(os.strerror, DISK_ERRORS) if text in str(e)), _first_line(e))
        what = f'the checkpoint of step {step} could not be written to {self.directory} ({reason}'
        if needed:
            raise LensError(f'{what}), the last good one is {last}: free some disk, the same command goes on.') from e
        self._say(f'warning: {what}); training goes on, the last good one is {last}: free some disk.')

    def clean(self) -> None:
        """Removes what killed or failed writes have left. Not while another process writes there."""
        if distributed.is_first():
            for rest in self.directory.glob('*.orbax-checkpoint-tmp*'):
                shutil.rmtree(rest, ignore_errors=True)

    def newest(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """Returns (step, read(step)) of the newest checkpoint that can be read; None where there is none at all.

        read: raises DamagedError on all processes or on none, as `info` and `restore` do.
        Raises DamagedError when there are some and none can be read.
        """
        damaged = None
        for step in reversed(self.steps):
            try:
                return step, read(step)
            except DamagedError as e:
                damaged = e
                self._say(f'warning: {e}')
        if damaged:
            raise damaged
        return None

    def resume(self, here: dict, like: Callable[[int], T]) -> tuple[T, dict] | None:
        """Returns (state, info) of the newest checkpoint that can be read, damaged ones after it moved away.

        None where the run has not begun. here: the identity of this run. like: abstract state of a step. Raises
        LensError when the folder holds another run.
        """

        def read(step: int) -> tuple[T, dict]:
            info = self.info(step)
            if missing := here.keys() - info.keys():
                raise self._damaged(step, f'it does not say its {min(missing)}')
            places.check_identity(info, here, self.directory.parent)
            return self.restore(step, like(step)), info

        try:
            found = self.newest(read)
        except DamagedError as e:
            raise LensError(f'{e} None of the others can be read either: start in another --workdir.') from e
        if found is None:
            return None
        step, (state, info) = found
        self.set_aside(after=step)
        _ = self._ckpt  # here, where all processes are together
        return state, info

    def set_aside(self, after: int) -> None:
        """Moves the checkpoints after a step out of the way: newer ones that are damaged. Not after a save."""
        for step in [s for s in self.steps if s > after]:
            self._move(self.directory / str(step))
        multihost_utils.sync_global_devices('set_aside')

    def _move(self, path: pathlib.Path) -> None:
        """Moves a checkpoint, or what is in one, to a folder beside all of them."""
        place = self.directory.with_name(f'{self.directory.name}-damaged')
        to = place / path.relative_to(self.directory)
        if distributed.is_first():
            shutil.rmtree(to, ignore_errors=True)
            to.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, to)
        self._say(f'warning: {path} was moved to {to.parent}.')

    def _set_aside_damaged(self) -> None:
        """Moves what Orbax fails at or misjudges: checkpoints with a damaged description, damaged figures."""
        names = ocp.path.step.standard_name_format()
        for step in self.steps:
            try:
                info = self.info(step)
                self._together(step, lambda step=step: names.find_step(self.directory, step).commit_timestamp)
            except DamagedError as e:
                self._say(f'warning: {e}')
                self._move(self.directory / str(step))
            else:
                self._mend_figures(self.directory / str(step) / 'metrics', info['fve'])
        multihost_utils.sync_global_devices('set_aside_damaged')

    def _mend_figures(self, folder: pathlib.Path, fve: float | None) -> None:
        """Writes again what Orbax ranks a checkpoint by, where it is not what was saved."""
        try:
            found = files.read_json(folder / 'metrics', '', keys={'fve': float})['fve'] if folder.exists() else None
        except LensError:
            found = 'damaged'
        if found == fve:
            return
        self._say(f'warning: {folder} is damaged; what it said is known and written again.')
        if distributed.is_first():
            shutil.rmtree(folder, ignore_errors=True)
            if fve is not None:
                folder.mkdir()
                files.write_json(folder / 'metrics', {'fve': fve})

    def info(self, step: int) -> dict:
        """Returns what was given to save as `info`. Raises DamagedError, on all processes."""

        def read() -> dict:
            file = self.directory / str(step) / '_CHECKPOINT_METADATA'
            info = files.read_json(file, UNREAD, keys={'custom_metadata': dict})['custom_metadata']
            if info.pop('seal', '') != _seal(info):
                raise ValueError('its description is not what was written')
            return info

        return self._together(step, read)

    def _together(self, step: int, read: Callable[[], T]) -> T:
        """read(), in which no process waits for another. Raises DamagedError on all where a file fails one."""
        value, cause = None, None
        try:
            value = read()
        except Exception as e:  # Orbax raises this very class, too
            cause = e
        for i, what in enumerate(_of_all(_first_line(cause) if cause else '')):
            if what:
                raise self._damaged(step, f'process {i}: {what}' if jax.process_count() > 1 else what) from cause
        return value

    def _damaged(self, step: int, what: str) -> DamagedError:
        return DamagedError(f'{self.directory}/{step} is damaged ({what}).')

    def restore(self, step: int, like):
        """Returns the state of a checkpoint in the structure and placement of `like`; of a part of it, that part.

        like: tree of arrays or ShapeDtypeStructs that carry shardings. Raises LensError.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _to_dict(like))
        self._check_shapes(step, abstract)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        # Each process reads what its devices hold and waits for nobody: a file may fail one alone.
        me = ocp.multihost.process_index()
        context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}

        def read() -> dict:
            with context:
                return ocp.load_checkpointables(self.directory / str(step), {'state': abstract})['state']

        stored, loaded = self.info(step).get('checksums', {}), self._together(step, read)
        for k, found in sharding.fetch(_checksums(loaded)).items():
            if int(found) != stored.get(k):
                raise self._damaged(step, f'{k} is not what was written')
        return _from_dict(like, loaded)

    def _check_shapes(self, step: int, abstract: dict) -> None:
        def read() -> dict:
            files.read_json(self.directory / str(step) / 'state/_METADATA', UNREAD)  # Orbax warns in lines of its own
            stored = ocp.metadata(self.directory / str(step), 'state').metadata
            return {k: tuple(x.shape) for k, x in stored.items()}

        have = self._together(step, read)
        wrong = [
            f'{k} {have.get(k, "none")} instead of {x.shape}' for k, x in abstract.items() if have.get(k) != x.shape
        ]
        if wrong:
            shown = '; '.join(wrong[:SHOWN]) + (f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else '')
            raise LensError(
                f'{self.directory}/{step} has other parameters than this configuration ({shown}): use the configuration of '
                'that run, or another workdir.'
            )


def _of_all(text: str) -> list[str]:
    """The text of each process, at most TEXT_BYTES of it in UTF-8."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b'\0'), np.uint8)
    return [bytes(row).rstrip(b'\0').decode(errors='replace') for row in multihost_utils.process_allgather(mine)]


def size(tree) -> int:
    """Returns the bytes of all leaves, which may be abstract."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_disk(workdir: pathlib.Path, needed: int, say: Callable[[str], None]) -> None:
    """Raises LensError where the disk has no room for a checkpoint of `needed` bytes; tells where it has none for a
    second one, since the next is complete before the last goes."""
    disk = shutil.disk_usage(workdir)
    if not disk.total:  # unknown
        return
    what = f'a checkpoint takes {needed / 1e9:.3g} GB, the disk of {workdir} has {disk.free / 1e9:.3g} GB left'
    if disk.free < needed:
        raise LensError(f'{what}: free some, or choose a --workdir on another one.')
    begun = any(p.name.isdigit() for p in workdir.glob('checkpoints/*'))
    if disk.free < 2 * needed and not begun:
        say(f'warning: {what}, and each is complete before the one before it goes: free some.')
