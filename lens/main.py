"""Trains a lens: python -m lens.main --config=configs/tiny.py --workdir=runs/tiny"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from lens import commands

    commands.train()

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from lens import files
from lens.errors import LensError
from lens.signals import Stop

# JAX and what needs it take seconds to import: main() does, when signals count and the user has read a first line.

HEADLINE = ('fve_beyond_greedy', 'fve_beyond_given', 'fve_beyond_shuffled', 'facts_recall', 'facts_hallucinated', 'fve')
HEADLINE += ('fve_greedy', 'fve_sft', 'fve_shuffled', 'fve_no_activation')
CACHE = '~/.cache/lens/xla'  # programs that this machine has compiled before; JAX_COMPILATION_CACHE_DIR moves it


def main(
    config,
    workdir: str,
    profile: str,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    plan: bool,
    device: str,
    device_gb: float | None,
    debug: bool,
) -> int | None:
    with Stop() as stop, contextlib.ExitStack() as held:
        if plan:
            prepare(debug)
            from lens.tools import plan  # a command of its own that shares the flags of this one

            return plan.run(config, device, device_gb)
        ranks = process_id, os.environ.get('SLURM_PROCID'), os.environ.get('OMPI_COMM_WORLD_RANK')
        unknown = coordinator == 'auto'  # JAX knows which process this is
        if not unknown and not any(int(rank or 0) for rank in ranks):
            held.enter_context(begin(workdir))
        prepare(debug)
        from lens import distributed, metrics
        from lens.train import Stopped, train

        distributed.initialize(coordinator, num_processes, process_id)
        if unknown and distributed.is_first():
            held.enter_context(begin(workdir))
        try:
            summary = train(config, pathlib.Path(workdir), profile, stop)
        except Stopped as e:
            summary = None
            if distributed.is_first():
                print(f'{e}: saved in {workdir}; the same command goes on from there.')
        if summary:
            names = *metrics.headline(summary), *HEADLINE
            print('  '.join(f'{k} {summary[k]:.3f}' for k in names if k in summary))
            print(f'Done in {summary["wall_s"]:.0f} s. Figures: {workdir}/summary.json  Report: {workdir}/report.html')


@contextlib.contextmanager
def begin(name: str) -> Iterator[None]:
    """Makes the folder of a run, keeps other runs out of it and says what begins; a folder in which nothing has come to
    be goes again. Raises LensError."""
    if not name.strip() or '\0' in name:
        raise LensError(f'--workdir={name!r} is no folder: name one, e.g. --workdir=runs/tiny.')
    workdir, lock = pathlib.Path(name), pathlib.Path(name, '.lock')
    with contextlib.ExitStack() as held:
        try:
            new = not workdir.exists()
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.lock(lock, name, 'wait for it, stop it, or choose another --workdir'))
        except OSError as e:
            raise LensError(f'--workdir={name} cannot be written ({e.strerror}): choose another one.') from e
        print(f'Planning the run in {name}', flush=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if new and list(workdir.iterdir()) == [lock]:
                    shutil.rmtree(workdir)


def prepare(debug: bool) -> None:
    """Imports JAX as the flags and the environment want it."""
    import jax

    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser(CACHE))
    if debug:
        jax.config.update('jax_debug_nans', True)
