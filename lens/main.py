"""Trains a lens: python -m lens.main --config=configs/tiny.py --workdir=runs/tiny"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from lens import commands

    commands.train()

import os
import pathlib

import jax

from lens import distributed
from lens.train import Stopped, train

HEADLINE = ('facts_recall', 'facts_hallucinated', 'fve', 'fve_greedy', 'fve_sft', 'fve_shuffled', 'fve_no_activation')
CACHE = '~/.cache/lens/xla'  # programs that this machine has compiled before; JAX_COMPILATION_CACHE_DIR moves it


def main(
    config,
    workdir: str,
    profile: str,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    plan: bool,
    device_gb: float,
    debug: bool,
) -> int | None:
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser(CACHE))
    if debug:
        jax.config.update('jax_debug_nans', True)
    if plan:
        from lens.tools import plan  # a command of its own that shares the flags of this one

        return plan.run(config, device_gb)
    workdir = pathlib.Path(workdir)
    distributed.initialize(coordinator, num_processes, process_id)
    try:
        summary = train(config, workdir, profile)
    except Stopped as e:
        summary = None
        if distributed.is_first():
            print(f'{e}: saved in {workdir}; the same command goes on from there.')
    if summary:
        print('  '.join(f'{k} {summary[k]:.3f}' for k in HEADLINE if k in summary))
        print(f'Done in {summary["wall_s"]:.0f} s. Figures: {workdir}/summary.json  Report: {workdir}/report.html')
