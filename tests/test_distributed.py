"""How a process finds out who it is."""

import os
import signal
import socket

import pytest

from lens.distributed import DistributedError, Place, Stop, initialize, place

STEP = {'SLURM_JOB_ID': '4097', 'SLURM_STEP_NODELIST': 'gpu[03-05,9],other', 'SLURM_STEP_NUM_NODES': '4'}
MPI = {'OMPI_COMM_WORLD_SIZE': '6', 'OMPI_COMM_WORLD_RANK': '5', 'OMPI_COMM_WORLD_LOCAL_SIZE': '3'}
MPI |= {'OMPI_COMM_WORLD_LOCAL_RANK': '2'}


def task(count, index, local=0, **more):
    return STEP | {'SLURM_NTASKS': str(count), 'SLURM_PROCID': str(index), 'SLURM_LOCALID': str(local)} | more


@pytest.mark.parametrize(
    ('given', 'environment', 'wanted'),
    [
        ((None, None, None), {}, None),
        (('h:1', 3, 2), {}, Place('h:1', 3, 2)),
        (('h:1', 3, 2), task(4, 1), Place('h:1', 3, 2)),  # flags win
        (('h:1', 1, 0), {}, None),
        ((None, None, None), task(1, 0), None),
        ((None, None, None), {'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4'}, None),  # a shell of salloc is no step
        ((None, None, None), task(4, 1), Place('gpu03:61441', 4, 1)),  # one task a node sees all of its devices
        ((None, None, None), task(8, 5, 1), Place('gpu03:61441', 8, 5, [1])),
        ((None, None, None), task(4, 0, SLURM_STEP_NODELIST='a-b1,a-b2'), Place('a-b1:61441', 4, 0)),
        ((None, None, None), MPI | {'JAX_COORDINATOR_ADDRESS': 'h:5'}, Place('h:5', 6, 5, [2])),
    ],
)
def test_flags_then_slurm_then_open_mpi(given, environment, wanted):
    assert place(*given, environment) == wanted


@pytest.mark.parametrize(
    ('given', 'environment', 'sentence'),
    [
        (('h:1', None, 0), {}, r'--coordinator=h:1 needs --num_processes and --process_id below it, not None and 0'),
        (('h:1', 2, 2), {}, r'not 2 and 2'),
        (('h', 2, 0), {}, r'--coordinator=h is not HOST:PORT'),
        ((None, 2, 0), {}, r'need --coordinator=HOST:PORT'),
        ((None, None, None), MPI, r'set JAX_COORDINATOR_ADDRESS=HOST:PORT'),
    ],
)
def test_what_is_missing_is_named(given, environment, sentence):
    with pytest.raises(DistributedError, match=sentence):
        place(*given, environment)


@pytest.mark.parametrize('host', ['127.0.0.1', 'localhost', 'a-host-of-many'])
def test_a_port_that_is_in_use_is_named(host):
    """On another host than this one process 0 listens on all addresses, so that any of them is in the way."""
    with socket.create_server(('127.0.0.1', 0)) as other:
        address = f'{host}:{other.getsockname()[1]}'
        with pytest.raises(DistributedError, match=rf'process 0 cannot listen on {address} \(.*in use.*give --coord'):
            initialize(address, 2, 0)


def test_signals_are_noted_and_ignored_after_they_were_heeded():
    before = {s: signal.getsignal(s) for s in Stop.SIGNALS}
    with Stop() as stop:
        assert not stop.asked(1)
    assert {s: signal.getsignal(s) for s in Stop.SIGNALS} == before
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.asked(2) and stop.name == 'SIGUSR1'
        os.kill(os.getpid(), signal.SIGTERM)  # ends nothing
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
