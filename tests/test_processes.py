"""Two processes on this machine: the steps of one device, and a run that is killed, fails, is stopped and goes on."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from lens import signals
from lens.files import read_jsonl
from lens.train import Stopped
from tests import mesh_runs, small_run

ROOT = pathlib.Path(__file__).parents[1]
LIMIT_S = 600


def environment(devices: int) -> dict[str, str]:
    """NPROC: XLA's threads, of which a collective blocks one for each device; see conftest."""
    return os.environ | {'JAX_NUM_CPU_DEVICES': str(devices), 'NPROC': '64', 'JAX_PLATFORMS': 'cpu'}


def free_port() -> str:
    command = [sys.executable, ROOT / 'launch' / 'endpoint.py', 'free-port', '127.0.0.1']
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_steps_in_two_processes_equal_those_on_one_device(tmp_path):
    case, steps = 'frozen-grpo', 3
    mesh_runs.save(tmp_path / f'{case}.npz', mesh_runs.run(case, steps=steps))
    out = tmp_path / 'out'
    out.mkdir()
    argv = [sys.executable, '-m', 'tests.mesh_runs', '--mesh=1,2,4', f'--steps={steps}', f'--given={tmp_path}']
    argv += [f'--out={out}', case, f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2']
    processes = [subprocess.Popen([*argv, f'--process_id={i}'], env=environment(4)) for i in range(2)]
    try:
        assert [p.wait(LIMIT_S) for p in processes] == [0, 0]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    want = mesh_runs.load(tmp_path / f'{case}.npz')
    first, second = (mesh_runs.load(out / f'{case}-{i}.npz') for i in range(2))
    mesh_runs.assert_same(first, want)
    assert np.array_equal(first.ids, second.ids)
    for a, b in zip(first[1:], second[1:], strict=True):
        assert {k: x.tobytes() for k, x in a.items()} == {k: x.tobytes() for k, x in b.items()}


RECIPE = """
import pathlib
from tests import small_run

def get_config():
    c = small_run.config(pathlib.Path({world!r}), sft__steps={steps}, checkpoint__keep=9, eval__every=0)
    c.phases, c.mesh.data, c.eval.documents = ('sft',), {devices}, 2
    return c
"""


@pytest.mark.slow
def test_a_run_that_is_killed_fails_is_stopped_and_damaged_ends_as_an_undisturbed_one(world, tmp_path, monkeypatch):
    """The launcher starts both processes again after a kill, and not after an error of the user in one, for which the
    other waits. A signal to one stops both after the same step. Of a checkpoint that one cannot read both go
    to the one before; within its reading one would wait for the other for minutes."""
    workdir, python, steps = tmp_path / 'w', tmp_path / 'python', 12
    recipe = tmp_path / 'recipe.py'
    recipe.write_text(RECIPE.format(world=str(world), steps=steps, devices=2))
    python.write_text(f'#!/bin/sh\n[ "$1" != -m ] || set -- -m tests.faulty_main "$@"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = environment(1) | {'PYTHON': str(python), 'FAULTY_WORKDIR': str(workdir), 'PAUSE_S': '0'}

    def launch(code: int) -> str:
        """What both processes print."""
        command = ['launch/train_local.sh', '-n', '2', f'--config={recipe}', f'--workdir={workdir}']
        run = subprocess.run(
            command, cwd=ROOT, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S
        )
        assert run.returncode == code, run.stdout
        return run.stdout

    printed = launch(1)
    assert 'error: process 1 has failed' in printed and 'process 1 ended with code 1\n' in printed
    assert 'Restart' not in printed and 'error that no restart mends' in printed
    printed = launch(0)
    assert 'process 1 ended with code 137' in printed and 'Restart 1 of 10, from checkpoint 3, in 0 s' in printed
    stopped = int(re.search(r'Stopped at step (\d+) of \d+ by SIGTERM', printed)[1])
    assert stopped < steps
    parts = [p for p in (workdir / 'checkpoints' / str(stopped)).rglob('ocdbt.process_1/d/*') if p.is_file()]
    assert parts, 'process 1 has written a part'
    for part in parts:
        os.truncate(part, part.stat().st_size // 2)
    printed = launch(0)
    assert f'checkpoints/{stopped} is damaged' in printed and f'continuing at step {stopped}' not in printed

    undisturbed = tmp_path / 'undisturbed'
    one = {}
    exec(RECIPE.format(world=str(world), steps=steps, devices=1), one)
    monkeypatch.setattr(signals.Stop, 'asked', lambda _, step: step == steps - 1)  # before the last evaluation
    with pytest.raises(Stopped):
        small_run.train(one['get_config'](), undisturbed)
    got, want = ([r for r in read_jsonl(w / 'metrics.jsonl') if r['kind'] == 'train'] for w in (workdir, undisturbed))
    assert [r['step'] for r in got] == [*range(1, steps + 1)] and len(want) == steps - 1
    del got[-1]
    for name in ('loss_encoder', 'fve', 'entropy_nats', 'grad_norm_decoder', 'grad_norm_encoder'):
        np.testing.assert_allclose([r[name] for r in got], [r[name] for r in want], rtol=1e-4, err_msg=name)
