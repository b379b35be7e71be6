"""How a process finds out who it is, takes its folder, is stopped, and ends."""

import ctypes
import errno
import fcntl
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from lens import cli
from lens.distributed import check_flags, initialize, tasks
from lens.errors import LensError
from lens.main import begin
from lens.signals import OF_TERMINALS, SIGNALS, Stop

LIMIT_S = 60

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
def ended(monkeypatch):
    """Exit codes of this process, which does not end and hears every signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    codes = queue.Queue()
    monkeypatch.setattr(os, '_exit', codes.put)
    return codes


NAMES = ['SIGTERM', 'SIGUSR1', 'SIGHUP', 'SIGINT']


@pytest.mark.parametrize('name', NAMES)
def test_signals_are_noted_and_ignored_after_they_were_heeded(ended, name):
    before = {s: signal.getsignal(s) for s in SIGNALS + OF_TERMINALS}
    with Stop() as stop:
        stop.begin()
        assert not stop.asked(1)
    assert {s: signal.getsignal(s) for s in before} == before
    with Stop() as stop:
        stop.begin()
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.asked(2) and stop.name == name
    os.kill(os.getpid(), signal.SIGTERM)  # ends nothing
    assert ended.empty()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('saved', [False, True])
def test_before_the_first_step_and_after_the_last_a_signal_ends_at_once(ended, capfd, name, saved):
    with Stop() as stop:
        if saved:
            stop.begin()
            stop.saved()
        os.kill(os.getpid(), signal.Signals[name])
        assert ended.get(timeout=LIMIT_S) == 128 + signal.Signals[name] and not stop.asked(1)
    where = 'after the last step, whose weights are saved' if saved else 'before the first step'
    assert f'Stopped by {name} {where}: the same command goes on' in capfd.readouterr().err


def test_a_signal_is_heard_while_no_instruction_of_python_runs(ended):
    """As in a compilation or in a step of minutes: here within a lock of C that the end of the process opens."""
    libc, lock, codes = ctypes.CDLL(None), ctypes.create_string_buffer(64), []

    def send():
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            codes.append(ended.get(timeout=LIMIT_S))
        finally:
            libc.pthread_mutex_unlock(lock)

    with Stop():
        libc.pthread_mutex_lock(lock)
        thread = threading.Thread(target=send)
        thread.start()
        libc.pthread_mutex_lock(lock)
        thread.join()
    assert codes == [143]


def test_a_second_ctrl_c_ends_a_training_at_once(ended, capfd):
    with Stop() as stop:
        stop.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        while 'a second one ends it at once' not in capfd.readouterr().err:
            time.sleep(0.01)
        assert ended.empty()
        os.kill(os.getpid(), signal.SIGINT)
        assert ended.get(timeout=LIMIT_S) == 130
    assert 'Stopped by SIGINT at once: ' in capfd.readouterr().err


def test_what_nohup_ignores_stays_ignored(ended):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        stop.begin()
        assert not stop.asked(1)
    assert ended.empty()


def test_work_that_is_done_again_is_given_up_at_a_signal(ended):
    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(LIMIT_S):
            time.sleep(1)

    with Stop() as stop:
        stop.begin()
        assert stop.attempt(lambda: 5) == 5 and not stop.asked(1)
        assert stop.attempt(work) is None and stop.asked(2)
        assert stop.attempt(lambda: pytest.fail('begun after the signal')) is None


def test_of_several_processes_jax_is_told_by_sigterm(ended, monkeypatch):
    """It takes that signal for itself, which a handler of ours plays, and spreads it."""
    heard = []
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda step: step == 2)
    with Stop() as stop:
        signal.signal(signal.SIGTERM, lambda *_: heard.append('SIGTERM'))
        for count, s in enumerate((signal.SIGUSR1, signal.SIGHUP, signal.SIGINT), 1):
            os.kill(os.getpid(), s)
            while len(heard) < count:
                time.sleep(0.01)
        assert stop.attempt(lambda: 5) == 5, 'the others work on'
        assert not stop.asked(1) and stop.asked(2) and stop.name == 'SIGTERM'
    assert ended.empty()


PROGRAM = """
import contextlib, os, pathlib, sys
from lens import cli
def main(_):
    kept = pathlib.Path(os.environ['KEPT']).open('w')
    print(*range(99999), sep=chr(10))
    print('late', file=sys.stderr)
    with contextlib.suppress(OSError):
        os.write(1, b'from a library')
    kept.write('work')
cli.run(main)
"""


@pytest.mark.parametrize('to', ['| head -n 1', '>&- 2>&-', '>/dev/full 2>/dev/full'])
def test_an_output_that_nobody_takes_ends_no_work(tmp_path, to):
    run = ['bash', '-c', f'"$0" -c "$1" {to}; exit "${{PIPESTATUS[0]}}"', sys.executable, PROGRAM]
    env = os.environ | {'KEPT': str(tmp_path / 'x')}
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr.replace('late\n', '')) == (0, '')
    assert (tmp_path / 'x').read_text() == 'work'


def raised(act) -> Exception:
    with pytest.raises(Exception) as e:
        act()
    return e.value


@pytest.mark.parametrize(
    ('error', 'sentence'),
    [
        (LensError('a=1 is wrong.'), 'a=1 is wrong.'),
        (
            OSError(28, 'No space left on device', 'w/report.html'),
            'w/report.html cannot be read or written: No space left',
        ),
        (MemoryError(), 'The memory is not enough'),
        (
            jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'),
            'The memory is not enough (RESOURCE_EXHAUSTED',
        ),
        (raised(lambda: jax.devices('nosuch')), 'JAX finds no device (JAX_PLATFORMS='),
        (ValueError('RESOURCE_EXHAUSTED'), ''),
        (AssertionError(), ''),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(error, sentence):
    said = cli.sentence(error)
    assert said.startswith(sentence) and bool(said) == bool(sentence)


# --- the folder of a run ---------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_told_which_process_holds_it(tmp_path, capsys):
    with begin(f'{tmp_path}/w'):
        assert capsys.readouterr().out == f'Planning the run in {tmp_path}/w\n'
        message = (
            rf'{tmp_path}/w is in use by process {os.getpid()} on \S+: wait for it, stop it, or choose another --wo'
        )
        with pytest.raises(LensError, match=message), begin(f'{tmp_path}/w'):
            pass
        (tmp_path / 'w/config.json').touch()
    with begin(f'{tmp_path}/w'):
        pass
    assert sorted(p.name for p in (tmp_path / 'w').iterdir()) == ['.lock', 'config.json']


def test_a_run_that_is_refused_leaves_no_folder_and_takes_none_away(tmp_path):
    (tmp_path / 'old').mkdir()
    for name in ('old', 'new'):
        with pytest.raises(LensError, match='layer=9'), begin(f'{tmp_path}/{name}'):
            raise LensError('layer=9')
    assert [p.name for p in tmp_path.iterdir()] == ['old']


def test_a_file_system_without_locks_stops_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, 'flock', lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, 'No locks available')))
    with begin(f'{tmp_path}/w'):
        (tmp_path / 'w/config.json').touch()


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('', "--workdir='' is no folder"),
        (' ', "--workdir=' ' is no folder"),
        ('a\0b', r"--workdir='a\\x00b' is no folder"),
        ('{tmp}/file', r'--workdir=\S+/file cannot be written \(File exists\)'),
        ('{tmp}/file/x', r'cannot be written \(Not a directory\)'),
        ('{tmp}/' + 'x' * 300, r'cannot be written \(File name too long\)'),
        ('/proc/nowhere', r'--workdir=/proc/nowhere cannot be written'),
    ],
)
def test_a_workdir_that_is_none_is_refused(tmp_path, name, message):
    (tmp_path / 'file').touch()
    with pytest.raises(LensError, match=message), begin(name.replace('{tmp}', str(tmp_path))):
        pass
