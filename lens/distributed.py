"""Several processes: how they find each other, and which of them speaks for all.

A process is told by the flags --coordinator, --num_processes and --process_id; without them JAX asks Slurm or Open MPI
where these have started several; else the process is alone. --coordinator=auto leaves everything to JAX (TPU pods).
"""

import os
import re
import socket
from collections.abc import Mapping

import jax

from lens.errors import LensError


def tasks(environment: Mapping[str, str]) -> tuple[int, int]:
    """Returns how many processes Slurm or Open MPI has started for this run, and how many on this machine."""
    if 'SLURM_STEP_NODELIST' in environment:  # the shell of an salloc has none, or a step of one task
        count = int(environment.get('SLURM_STEP_NUM_TASKS', 1))
        return count, -(-count // int(environment.get('SLURM_STEP_NUM_NODES', 1)))
    return tuple(int(environment.get(f'OMPI_COMM_WORLD_{name}', 1)) for name in ('SIZE', 'LOCAL_SIZE'))


def initialize(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the other processes of this run, if there are any. Before any use of a device. Raises LensError."""
    if coordinator == 'auto':
        return jax.distributed.initialize()
    if coordinator is None:
        if (count, index) != (None, None):
            raise LensError('--num_processes and --process_id need --coordinator=HOST:PORT, where process 0 runs.')
        count, here = tasks(os.environ)
        # one of several on a machine takes the device of its number, one alone takes all
        place, options = (), {'local_device_ids': None if here > 1 else []}
    else:
        place, options = (coordinator, count, index), {'cluster_detection_method': 'deactivate'}
        if check_flags(coordinator, count, index):
            options['coordinator_bind_address'] = coordinator
    if count > 1:
        try:
            jax.distributed.initialize(*place, **options)
        except (RuntimeError, ValueError, TypeError) as e:
            reason = str(e).splitlines()[0]
            raise LensError(f'The processes of this run cannot join, see --coordinator: {reason}') from e


def check_flags(coordinator: str, count: int | None, index: int | None) -> bool:
    """Returns whether the processes are all on this machine. Raises LensError for flags that do not fit together and
    for a port that process 0 cannot listen on, by which JAX would end in a segmentation fault."""
    if count is None or index is None or not 0 <= index < count:
        raise LensError(
            f'--coordinator={coordinator} needs --num_processes and --process_id below it, not {count} and {index}.'
        )
    if not (address := re.fullmatch(r'\[?(.+?)\]?:(\d+)', coordinator)):
        raise LensError(f'--coordinator={coordinator} is not HOST:PORT.')
    loopback = bool(re.fullmatch(r'localhost|127\..*|::1', address[1]))
    if index == 0 and count > 1:
        family = socket.AF_INET6 if ':' in address[1] else socket.AF_INET
        try:
            socket.create_server((address[1] if loopback else '', int(address[2])), family=family).close()
        except (OSError, OverflowError) as e:
            raise LensError(
                f'process 0 cannot listen on {coordinator} ({e}): give --coordinator (PORT of launch/hosts.sh) a port '
                'that no other program uses.'
            ) from e
    return loopback


def is_first() -> bool:
    """Returns whether this process writes the files of the run and speaks for it."""
    return jax.process_index() == 0
