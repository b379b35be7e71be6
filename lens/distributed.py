"""Several processes: how they find each other, and how they agree to stop.

A process is told by the flags --coordinator, --num_processes and --process_id, by Slurm or by Open MPI; without any
of them it is alone. --coordinator=auto leaves everything to JAX (TPU pods).
"""

import dataclasses
import ipaddress
import os
import re
import signal
import socket
from collections.abc import Mapping

import jax
from jax.experimental import multihost_utils

from lens.errors import LensError

FIRST_PORT, PORTS = 61440, 4096  # of Slurm jobs, by job id: as JAX chooses


class DistributedError(LensError):
    """The processes of a run cannot be told who they are."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among `count`. devices: which of its host's it takes; None: all that it sees."""

    coordinator: str
    count: int
    index: int
    devices: list[int] | None = None


def place(
    coordinator: str | None, count: int | None, index: int | None, environment: Mapping[str, str]
) -> Place | None:
    """Who this process is, by its flags or else by its environment; None when it is alone. Raises DistributedError."""
    if coordinator is not None:
        if count is None or index is None or not 0 <= index < count:
            raise DistributedError(
                f'--coordinator={coordinator} needs --num_processes and --process_id below it, not {count} and {index}.'
            )
        _check_address(coordinator, '--coordinator')
        return Place(coordinator, count, index) if count > 1 else None
    if count is not None or index is not None:
        raise DistributedError('--num_processes and --process_id need --coordinator=HOST:PORT, where process 0 runs.')
    return _slurm(environment) or _open_mpi(environment)


def _check_address(address: str, name: str) -> None:
    if not re.fullmatch(r'.+:\d+', address):
        raise DistributedError(f'{name}={address} is not HOST:PORT.')


def _slurm(environment: Mapping[str, str]) -> Place | None:
    """Of a job step with several tasks; with several on one node each takes the GPU of its number."""
    count = int(environment.get('SLURM_NTASKS', 1))
    if count == 1 or 'SLURM_STEP_NODELIST' not in environment or 'SLURM_PROCID' not in environment:
        return None
    # node001 | node001,node2 | node[001-004,007],other3
    prefix, number = re.match(r'([^,\[]+)(?:\[(\w+))?', environment['SLURM_STEP_NODELIST']).groups()
    port = FIRST_PORT + int(environment['SLURM_JOB_ID']) % PORTS
    several = count > int(environment.get('SLURM_STEP_NUM_NODES', count))
    devices = [int(environment['SLURM_LOCALID'])] if several else None
    return Place(f'{prefix}{number or ""}:{port}', count, int(environment['SLURM_PROCID']), devices)


def _open_mpi(environment: Mapping[str, str]) -> Place | None:
    count = int(environment.get('OMPI_COMM_WORLD_SIZE', 1))
    if count == 1:
        return None
    address = environment.get('JAX_COORDINATOR_ADDRESS')
    if address is None:
        raise DistributedError('Under mpirun, set JAX_COORDINATOR_ADDRESS=HOST:PORT to where rank 0 runs.')
    _check_address(address, 'JAX_COORDINATOR_ADDRESS')
    several = int(environment.get('OMPI_COMM_WORLD_LOCAL_SIZE', 1)) > 1
    devices = [int(environment['OMPI_COMM_WORLD_LOCAL_RANK'])] if several else None
    return Place(address, count, int(environment['OMPI_COMM_WORLD_RANK']), devices)


def initialize(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the other processes of this run, if there are any. Before any use of a device. Raises LensError."""
    if coordinator == 'auto':
        jax.distributed.initialize()
        return
    me = place(coordinator, count, index, os.environ)
    if me is None:
        return
    if me.index == 0:
        _check_free(me.coordinator)
    try:
        jax.distributed.initialize(
            me.coordinator,
            me.count,
            me.index,
            local_device_ids=me.devices,
            cluster_detection_method='deactivate',
            coordinator_bind_address=me.coordinator if _is_loopback(me.coordinator) else None,
        )
    except RuntimeError as e:
        first = str(e).splitlines()[0]
        raise DistributedError(f'process {me.index} of {me.count} cannot join {me.coordinator}: {first}') from e


def _check_free(address: str) -> None:
    """That process 0 can listen there: JAX would end by a segmentation fault. Raises DistributedError."""
    host, port = _host(address) if _is_loopback(address) else '', int(address.rpartition(':')[2])
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET).close()
    except (OSError, OverflowError) as e:
        raise DistributedError(
            f'process 0 cannot listen on {address} ({e}): give --coordinator (PORT of launch/hosts.sh) a port that no '
            'other program uses.'
        ) from e


def _host(address: str) -> str:
    return address.rpartition(':')[0].strip('[]')


def _is_loopback(address: str) -> bool:
    host = _host(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


def is_first() -> bool:
    """Whether this process writes the files of the run and speaks for it."""
    return jax.process_index() == 0


class Stop:
    """Within it, SIGTERM and SIGUSR1 no longer end the process: `asked` tells, in all processes after the same step.

    JAX spreads a SIGTERM that reaches one process of several, and takes the signal for itself then.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.name = ''

    def __enter__(self):
        several = jax.process_count() > 1
        mine = (signal.SIGUSR1,) if several else self.SIGNALS
        self._before = {s: signal.signal(s, self._forward if several else self._note) for s in mine}
        return self

    def __exit__(self, *exc):
        for s, handler in self._before.items():  # a second signal must not end a process that has just saved
            signal.signal(s, signal.SIG_IGN if self.name else handler)

    def _note(self, number, frame):
        self.name = signal.Signals(number).name

    def _forward(self, number, frame):
        os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`. Call it once for each step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = 'SIGTERM'
        return bool(self.name)
