"""Runs of two processes with four fake devices each, as users start them, against one process with eight; how they
end when one of them fails, and a checkpoint that one of them cannot read."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from lens.cli import BROKEN
from lens.files import read_jsonl
from tests import mesh_runs
from tests.small_run import figures
from tests.test_train import command

LIMIT_S = 1500
ROWS = 8  # documents of a step: every mesh of eight devices divides them
SMALL = [
    '--config.sft.steps=4',
    '--config.grpo.steps=4',
    f'--config.sft.documents={ROWS}',
    f'--config.grpo.documents={ROWS}',
    '--config.grpo.group=3',
    '--config.sft.learning_rate_decoder=1e-3',
    '--config.sft.learning_rate_encoder=1e-3',
    '--config.grpo.learning_rate_decoder=3e-4',
    '--config.grpo.learning_rate_encoder=6e-4',
    '--config.eval.documents=6',
    '--config.eval.quick_documents=4',
    '--config.log.every=1',
]
ENDLESS = [*SMALL, "--config.phases=('sft',)", '--config.sft.steps=2000', '--config.eval.every=0']


def start(argv: list[str], devices: int) -> subprocess.Popen:
    """NPROC: XLA's threads, of which a collective blocks one for each device; see conftest."""
    env = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices), 'NPROC': '64', 'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    """Beyond those that the system gives to connections: still free when process 0 listens on it."""
    for port in random.SystemRandom().sample(range(61440, 65536), 99):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(('127.0.0.1', port))
            return port
    raise OSError('no port is free')


def start_two(argv: list[str], workdirs=(), devices: int = 4) -> list[subprocess.Popen]:
    """Both processes of `argv`, on a port of their own; workdirs: one for each instead of the same for both."""
    where = [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2']
    own = [[f'--workdir={w}'] for w in workdirs] or [[], []]
    return [start([*argv, *where, f'--process_id={i}', *own[i]], devices) for i in range(2)]


def finish(processes: list[subprocess.Popen], code: int = 0, limit_s: float = LIMIT_S) -> list[tuple[str, str]]:
    """(stdout, stderr) of each, which must exit with `code`; none is left behind."""
    deadline = time.monotonic() + limit_s
    try:
        out = [p.communicate(timeout=deadline - time.monotonic()) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert [p.returncode for p in processes] == [code] * len(processes), '\n'.join(e[-3000:] for _, e in out)
    return out


def said(stdout: str) -> list[str]:
    """What a process printed itself. Gloo greets its peers, from threads that write into each other's lines."""
    pieces = r'\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :'
    return [line for line in stdout.splitlines() if re.search('[A-Za-z]', re.sub(pieces, '', line))]


def mesh(data: int, model: int) -> list[str]:
    return [f'--config.mesh.data={data}', f'--config.mesh.model={model}']


def steps_of(workdir: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit())


def parity(tmp_path, cases: list[str], mesh_shape: str, steps: int, *more: str):
    """Runs of tests.mesh_runs in two processes against those on one device; yields both processes' traces by case."""
    given, out = tmp_path / 'given', tmp_path / 'out'
    given.mkdir()
    out.mkdir()
    for case in cases:
        mesh_runs.save(given / f'{case}.npz', mesh_runs.run(case, steps=steps))
    argv = [sys.executable, '-m', 'tests.mesh_runs', f'--mesh={mesh_shape}', f'--steps={steps}', *more]
    finish(start_two([*argv, f'--given={given}', f'--out={out}', *cases]))
    for case in cases:
        want = mesh_runs.load(given / f'{case}.npz')
        first, second = (mesh_runs.load(out / f'{case}-{i}.npz') for i in range(2))
        mesh_runs.assert_same(first, want)
        for a, b in zip(first[1:], second[1:], strict=True):
            assert {k: x.tobytes() for k, x in a.items()} == {k: x.tobytes() for k, x in b.items()}
        assert np.array_equal(first.ids, second.ids)


@pytest.mark.slow
def test_a_few_steps_in_two_processes_equal_those_on_one_device(tmp_path):
    parity(tmp_path, ['frozen-sft'], '2,2,2', 3, '--split')


@pytest.mark.slow
def test_twenty_steps_in_two_processes_equal_those_on_one_device(tmp_path):
    parity(tmp_path, list(mesh_runs.CASES), '1,2,4', 20)


@pytest.fixture(scope='module')
def undisturbed(world, tmp_path_factory):
    """A run on 8x1 with every third step saved."""
    workdir = tmp_path_factory.mktemp('undisturbed') / 'w'
    argv = command(world, workdir, *SMALL, *mesh(8, 1), '--config.checkpoint.every=3s', '--config.checkpoint.keep=9')
    finish([start(argv, 8)])
    return workdir


def continued(undisturbed, workdir: pathlib.Path, world, extra: list[str], devices: int | None):
    """The run goes on from step 3 on another mesh, in one process with `devices` or in two; returns its workdir."""
    shutil.copytree(undisturbed, workdir)
    for step in [s for s in steps_of(workdir) if s > 3]:
        shutil.rmtree(workdir / f'checkpoints/{step}')
    (workdir / 'summary.json').unlink()
    argv = command(world, workdir, *SMALL, *extra, '--config.checkpoint.every=3s', '--config.checkpoint.keep=9')
    out = finish([start(argv, devices)] if devices else start_two(argv))
    assert 'continuing at step 3' in out[0][0] and steps_of(workdir) == steps_of(undisturbed)
    assert all(not said(stdout) for stdout, _ in out[1:]), 'only the first process speaks'
    return workdir


def training(workdir: pathlib.Path) -> dict[int, dict]:
    return {r['step']: r for r in read_jsonl(workdir / 'metrics.jsonl') if r['kind'] == 'train'}


def assert_goes_on_alike(workdir: pathlib.Path, calm: pathlib.Path) -> None:
    got, want = training(workdir), training(calm)
    assert list(got) == list(want) == list(range(1, 9))
    for step, row in want.items():
        for k in ('loss_decoder', 'loss_encoder', 'fve', 'entropy_nats', 'grad_norm_decoder', 'grad_norm_encoder'):
            if (k, row['phase']) != ('loss_decoder', 'grpo'):  # its value is rounding, see mesh_runs.NOUGHT
                np.testing.assert_allclose(got[step][k], row[k], rtol=1e-5, err_msg=f'{k} of step {step}')


@pytest.mark.slow
def test_a_checkpoint_of_8x1_goes_on_elsewhere_with_the_same_losses(world, undisturbed, tmp_path):
    """On one device, on 2x4 in one process, and on 2x4 in two. The sums over two processes are added in another order."""
    one = continued(undisturbed, tmp_path / 'one', world, mesh(1, 1), 1)
    eight = continued(undisturbed, tmp_path / 'eight', world, mesh(2, 4), 8)
    two = continued(undisturbed, tmp_path / 'two', world, mesh(2, 4), None)
    for workdir in (one, eight, two):
        assert_goes_on_alike(workdir, undisturbed)
    a, b = (figures(json.loads((w / 'summary.json').read_text())) for w in (two, eight))
    assert a == pytest.approx(b, rel=1e-5)


def wait_for(workdir: pathlib.Path, step: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while max(training(workdir), default=0) < step:
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_after_the_same_step(world, tmp_path):
    """SIGUSR1 to the second process, then SIGTERM to the first one. The second one writes checkpoints alone."""
    workdirs = [tmp_path / 'first', tmp_path / 'second']
    for w in workdirs:
        w.mkdir()
    (workdirs[0] / 'checkpoints').mkdir()
    (workdirs[1] / 'checkpoints').symlink_to(workdirs[0] / 'checkpoints')
    argv = [a for a in command(world, tmp_path, *ENDLESS, *mesh(4, 2)) if not a.startswith('--workdir')]
    at = 0
    for number, whom in ((signal.SIGUSR1, 1), (signal.SIGTERM, 0)):
        processes = start_two(argv, workdirs)
        wait_for(workdirs[0], at + 3, processes)
        processes[whom].send_signal(number)
        out = finish(processes)
        stopped = re.search(r'Stopped at step (\d+) of 2000 by SIGTERM: saved in \S+first;', out[0][0])
        assert stopped and not said(out[1][0]), out
        assert ('continuing at step' in out[0][0]) == (at > 0)
        before, at = at, int(stopped[1])
        assert at > before and steps_of(workdirs[0])[-1] == max(training(workdirs[0])) == at
        assert list(training(workdirs[0])) == list(range(1, at + 1))
    assert [p.name for p in workdirs[1].iterdir()] == ['checkpoints']


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_both_with_the_same_sentence(world, tmp_path):
    argv = command(world, tmp_path / 'w', *ENDLESS, *mesh(8, 1), '--config.sft.learning_rate_decoder=1e30')
    out = finish(start_two(argv), code=1)
    errors = [re.findall(r'^error: .*$', stderr, re.MULTILINE) for _, stderr in out]
    assert len(errors[0]) == 1 and errors[0] == errors[1], out
    found = re.search(r'is not finite at step \d+ \(phase sft, documents \[([\d, ]+)\]\)', errors[0][0])
    assert len(set(found[1].split(', '))) == ROWS
    assert not list((tmp_path / 'w').glob('checkpoints/[0-9]*')) and not (tmp_path / 'w/summary.json').exists()


PLAYED = """
import pathlib, sys
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from lens import cli, distributed
from lens.errors import LensError

def main(argv):
    place = [flags.FLAGS[k].value for k in ('coordinator', 'num_processes', 'process_id')]
    distributed.initialize(*place)
    meet = lambda: multihost_utils.process_allgather(np.ones(1))
    meet()
    if str(place[2]) in argv[1]:
        raise LensError(f'process {place[2]} has failed')
    meet()

flags.DEFINE_string('coordinator', None, '')
flags.DEFINE_integer('num_processes', None, '')
flags.DEFINE_integer('process_id', None, '')
cli.run(main)
"""


@pytest.mark.parametrize(
    'who', ['1', pytest.param('0', marks=pytest.mark.slow), pytest.param('01', marks=pytest.mark.slow)]
)
def test_an_error_ends_with_its_code_though_others_wait(who):
    """JAX alone would let the one that failed wait for the other for five minutes, and abort both."""
    processes = start_two([sys.executable, '-c', PLAYED, who], devices=1)
    try:
        out = [p.communicate(timeout=200) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    for i, p in enumerate(processes):
        failed = str(i) in who
        assert (p.returncode == 1) if failed else (p.returncode in (BROKEN, -signal.SIGABRT)), out
        assert re.findall(r'^error: .*$', out[i][1], re.MULTILINE) == failed * [f'error: process {i} has failed']


@pytest.mark.slow
def test_what_the_first_alone_cannot_write_ends_the_launcher_without_a_restart(world, tmp_path):
    (tmp_path / 'w/config.json/in the way').mkdir(parents=True)
    argv = command(world, tmp_path / 'w', *ENDLESS, *mesh(2, 1))
    launcher = ['launch/train_local.sh', '-n', '2', *argv[argv.index('lens.main') + 1 :]]
    run = subprocess.run(
        launcher,
        env=os.environ | {'PYTHON': sys.executable, 'JAX_NUM_CPU_DEVICES': '1', 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert run.returncode == 1, run
    assert re.search(r'^error: .*Is a directory.*config\.json', run.stderr, re.MULTILINE), run
    assert 'process 0 ended with code 1' in run.stdout and 'Restart' not in run.stdout


def test_a_file_that_one_cannot_read_sends_both_to_the_checkpoint_before(tmp_path):
    """Neither waits for the other within the reading: Orbax's barrier there would last five minutes."""
    argv = [sys.executable, '-m', 'tests.damaged_part', str(tmp_path / 'c')]
    out = [said(stdout) for stdout, _ in finish(start_two(argv, devices=1), limit_s=200)]
    assert out[0] == out[1] and len(out[0]) == 2 and out[0][1] == 'read 1 1 True', out
    assert re.fullmatch(r'warning: \S+/c/2 is damaged \(process 1: .+\)\.', out[0][0])
