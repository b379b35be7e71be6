"""How a process finds out who it is, and how it is stopped."""

import os
import signal
import socket
import subprocess
import sys

import jax
import pytest
from jax._src.clusters import ClusterEnv

from lens import distributed
from lens.distributed import Stop, check_flags, initialize, tasks
from lens.errors import LensError

STEP = {'SLURM_JOB_ID': '4097', 'SLURM_STEP_NODELIST': 'gpu[03-05,9],other', 'SLURM_STEP_NUM_NODES': '4'}
MPI = {'OMPI_COMM_WORLD_SIZE': '6', 'OMPI_COMM_WORLD_RANK': '5', 'OMPI_COMM_WORLD_LOCAL_SIZE': '3'}
MPI |= {'OMPI_COMM_WORLD_LOCAL_RANK': '2', 'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'}


def task(count: int, index: int, local: int = 0) -> dict[str, str]:
    return (
        STEP
        | {'SLURM_NTASKS': str(count), 'SLURM_STEP_NUM_TASKS': str(count)}
        | {
            'SLURM_PROCID': str(index),
            'SLURM_LOCALID': str(local),
        }
    )


@pytest.mark.parametrize(
    ('environment', 'wanted'),
    [
        ({}, (1, 1)),
        ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, (1, 1)),  # a shell of salloc is no step
        (task(1, 0) | {'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_NODES': '1'}, (1, 1)),  # or a step of one task
        (task(4, 1), (4, 1)),
        (task(8, 5, 1), (8, 2)),
        (MPI, (6, 3)),
    ],
)
def test_who_has_started_several_processes(environment, wanted):
    assert tasks(environment) == wanted


@pytest.mark.parametrize(
    ('given', 'environment', 'wanted'),
    [
        (('h:1', 3, 2), {}, ('h:1', 3, 2, None)),
        (('h:1', 3, 2), task(4, 1), ('h:1', 3, 2, None)),  # flags win
        (('h:1', 1, 0), {}, None),
        ((None, None, None), {}, None),
        ((None, None, None), task(1, 0), None),
        ((None, None, None), task(4, 1), ('gpu03:61441', 4, 1, [])),  # one task a node sees all of its devices
        ((None, None, None), task(8, 5, 1), ('gpu03:61441', 8, 5, [1])),
        ((None, None, None), MPI, ('10.96.0.1:62624', 6, 5, [2])),
    ],
)
def test_what_jax_makes_of_flags_and_environments(given, environment, wanted, monkeypatch):
    found = []

    def played(*place, local_device_ids=None, cluster_detection_method=None, coordinator_bind_address=None):
        place = (*(place or (None,) * 3), local_device_ids)
        if cluster_detection_method != 'deactivate':
            place = ClusterEnv.auto_detect_unset_distributed_params(*place, None, 300)
        found.append(place)
        raise RuntimeError('no answer')

    for k, v in environment.items():
        monkeypatch.setenv(k, v)
    monkeypatch.setattr(jax.distributed, 'initialize', played)
    if wanted is None:
        initialize(*given)
    else:
        with pytest.raises(LensError, match='The processes of this run cannot join, see --coordinator: no answer'):
            initialize(*given)
    assert found == ([wanted] if wanted else [])


@pytest.mark.parametrize(
    ('given', 'sentence'),
    [
        (('h:1', None, 0), r'--coordinator=h:1 needs --num_processes and --process_id below it, not None and 0'),
        (('h:1', 2, 2), r'not 2 and 2'),
        (('h', 2, 0), r'--coordinator=h is not HOST:PORT'),
        ((None, 2, 0), r'need --coordinator=HOST:PORT'),
    ],
)
def test_what_is_missing_is_named(given, sentence):
    with pytest.raises(LensError, match=sentence):
        initialize(*given)


@pytest.mark.parametrize('host', ['127.0.0.1', 'localhost', 'a-host-of-many'])
def test_a_port_that_is_in_use_is_named(host):
    """On another host than this one process 0 listens on all addresses, so that any of them is in the way."""
    with socket.create_server(('127.0.0.1', 0)) as other:
        address = f'{host}:{other.getsockname()[1]}'
        with pytest.raises(LensError, match=rf'process 0 cannot listen on {address} \(.*in use.*give --coord'):
            initialize(address, 2, 0)
        assert check_flags(address, 2, 1) == (host != 'a-host-of-many')


@pytest.fixture
def handlers():
    before = {s: signal.getsignal(s) for s in Stop.SIGNALS + Stop.OF_TERMINALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1', 'SIGHUP', 'SIGINT'])
def test_signals_are_noted_and_ignored_after_they_were_heeded(handlers, name):
    before = {s: signal.getsignal(s) for s in Stop.SIGNALS + Stop.OF_TERMINALS}
    with Stop() as stop:
        assert not stop.asked(1)
    assert {s: signal.getsignal(s) for s in before} == before
    with Stop() as stop:
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.asked(2) and stop.name == name
        assert (signal.getsignal(signal.SIGINT) == signal.SIG_DFL) == (name == 'SIGINT'), 'the second one ends it'
    os.kill(os.getpid(), signal.SIGTERM)  # ends nothing


def test_what_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked(1)


def test_of_several_processes_jax_is_told_by_sigterm(handlers, monkeypatch):
    """It takes that signal for itself, which a handler of ours plays, and spreads it."""
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append('SIGTERM'))
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, 'reached_preemption_sync_point', lambda step: step == 2)
    with Stop() as stop:
        for s in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), s)
        assert not stop.asked(1) and stop.asked(2) and stop.name == 'SIGTERM'
    assert heard == ['SIGTERM'] * 3


@pytest.mark.parametrize(('to', 'code'), [('| head -n 1', 141), ('>&-', 0)])
def test_a_closed_output_is_no_error_of_its_own(to, code):
    program = 'from lens import cli\ncli.run(lambda _: print(*range(99999), sep=chr(10)))'
    run = ['bash', '-c', f'"$0" -c "$1" {to}; exit "${{PIPESTATUS[0]}}"', sys.executable, program]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, '')
