"""Trains a lens: python -m lens.main --config=configs/tiny.py --workdir=runs/tiny"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from absl import flags
from ml_collections import config_flags

from lens import cli, files
from lens.errors import LensError
from lens.signals import Stop

# JAX and what needs it take seconds to import: main() does, when signals count and the user has read a first line.

HEADLINE = ('facts_recall', 'facts_hallucinated', 'fve', 'fve_greedy', 'fve_sft', 'fve_shuffled', 'fve_no_activation')
CACHE = '~/.cache/lens/xla'  # programs that this machine has compiled before; JAX_COMPILATION_CACHE_DIR moves it


def main(_):
    with Stop() as stop, contextlib.ExitStack() as held:
        if PLAN.value:
            prepare()
            from lens.tools import plan  # a command of its own that shares the flags of this one

            return plan.run(CONFIG.value, DEVICE_GB.value)
        ranks = PROCESS_ID.value, os.environ.get('SLURM_PROCID'), os.environ.get('OMPI_COMM_WORLD_RANK')
        name = WORKDIR.value, config_flags.get_config_filename(flags.FLAGS['config'])
        unknown = COORDINATOR.value == 'auto'  # JAX knows which process this is
        if not unknown and not any(int(rank or 0) for rank in ranks):
            held.enter_context(begin(*name))
        prepare()
        from lens import distributed
        from lens.train import Stopped, train

        distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        if unknown and distributed.is_first():
            held.enter_context(begin(*name))
        workdir = pathlib.Path(WORKDIR.value)
        try:
            summary = train(CONFIG.value, workdir, PROFILE.value, stop)
        except Stopped as e:
            summary = None
            if distributed.is_first():
                print(f'{e}: saved in {workdir}; the same command goes on from there.')
        if summary:
            print('  '.join(f'{k} {summary[k]:.3f}' for k in HEADLINE if k in summary))
            print(f'Done in {summary["wall_s"]:.0f} s. Figures: {workdir}/summary.json  Report: {workdir}/report.html')


@contextlib.contextmanager
def begin(name: str, config: str) -> Iterator[None]:
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
        print(f'Planning {name}: {config}', flush=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if new and list(workdir.iterdir()) == [lock]:
                    shutil.rmtree(workdir)


def prepare() -> None:
    """Imports JAX as the flags and the environment want it."""
    import jax

    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser(CACHE))
    if cli.DEBUG.value:
        jax.config.update('jax_debug_nans', True)


if __name__ == '__main__':
    CONFIG = config_flags.DEFINE_config_file(
        'config', None, 'Recipe, e.g. configs/tiny.py; override keys with --config.a.b=value.'
    )
    WORKDIR = flags.DEFINE_string(
        'workdir', None, 'Folder of this run: checkpoints, metrics, summary, report. Continues if it exists.'
    )
    PROFILE = flags.DEFINE_string('profile', '', 'START:COUNT, steps of this process: trace them in WORKDIR/profile.')
    COORDINATOR = flags.DEFINE_string(
        'coordinator', None, 'HOST:PORT of process 0 of several; "auto": JAX finds all of it out (TPU pods).'
    )
    NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Processes of this run, with --coordinator.')
    PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this one is, from 0.')
    PLAN = flags.DEFINE_bool(
        'plan',
        False,
        'Print what each device would need, and what helps where it does not fit (exit code 1); no training.',
    )
    DEVICE_GB = flags.DEFINE_float('device_gb', 80.0, 'Memory of one device in 1e9 bytes, for --plan.', lower_bound=0.0)
    flags.mark_flag_as_required('config')
    flags.register_validator(
        'workdir', lambda x: x is not None or PLAN.value, 'Flag --workdir must have a value other than None.'
    )
    cli.run(main)
