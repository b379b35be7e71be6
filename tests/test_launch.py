"""The launch scripts: against a scripted server (tests/fake_vllm.py), and Slurm and Ray played by tests/fake_slurm."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import datasets
import pytest

from tests.marked import MARK, marked

ROOT = pathlib.Path(__file__).parents[1]
FAKES = ROOT / 'tests' / 'fake_slurm'
SUBJECT = 'configs/tiny_subject'
LIMIT_S = 200


class Launch:
    """Starts scripts whose processes are all known by a mark in the environment; what they print goes to `file`."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.file, self.value = folder, folder / 'printed', str(folder)
        self.slurm = folder / 'slurm'
        self.slurm.mkdir()
        python = {'PYTHON': sys.executable, 'LENS_PYTHON': sys.executable}
        self.env = os.environ | python | {'VLLM_COMMAND': f'{sys.executable} -m tests.fake_vllm', MARK: self.value}
        self.env |= {'FAKE_SLURM': str(self.slurm), 'HOST': '127.0.0.1', 'HEAD_IP': '127.0.0.1', 'POLL_S': '1'}
        self.env['PRETOKENIZE_ARGS'] = '--seq_len=256 --min_tokens=4 --num_proc=1'

    def start(self, script: str, *args, fakes: bool = False, **env) -> subprocess.Popen:
        env = self.env | env
        if fakes:
            env['PATH'] = f'{FAKES}:{env["PATH"]}'
        # a shell that runs the tests in the background has SIGINT ignored
        command = ['env', '--default-signal', f'launch/{script}', *map(str, args)]
        with self.file.open('w') as f:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=f, stderr=f)

    def serve(self, *args, **env) -> subprocess.Popen:
        return self.start('serve_vllm.sh', SUBJECT, '--log', self.folder / 'log', *args, **env)

    def failure(self, script: str, *args, **env) -> str:
        assert self.start(script, *args, **env).wait(LIMIT_S) == 1
        self.none_left()
        return self.printed()

    def printed(self) -> str:
        return self.file.read_text()

    def until(self, condition):
        last = time.monotonic() + LIMIT_S
        while not (value := condition()):
            assert time.monotonic() < last, self.printed()
            time.sleep(0.05)
        return value

    def ready(self) -> str:
        """The URL, when it is printed."""
        return self.until(lambda: re.search(r'^Ready after \d+ s: (http://.+/v1)$', self.printed(), re.M))[1]

    def none_left(self) -> None:
        """No process of the scripts remains; the system may need a moment."""
        last = time.monotonic() + LIMIT_S
        while left := marked(self.value):
            assert time.monotonic() < last, left
            time.sleep(0.05)


@pytest.fixture
def launch(tmp_path):
    it = Launch(tmp_path)
    yield it
    for pid in marked(it.value):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_code(process: subprocess.Popen) -> int:
    return process.wait(LIMIT_S)


# --- one server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_a_server_is_ready_and_ends_with_its_children(launch, name):
    registry, number = launch.folder / 'servers.txt', signal.Signals[name]
    registry.write_text('http://elsewhere:1/v1  # job 5\n')
    arguments = ('--registry', registry, '--max-model-len=77', '--served-model-name', 'small')
    process = launch.serve(*arguments, FAKE_VLLM='child' if name == 'SIGTERM' else '')
    url = launch.ready()
    others, ours = registry.read_text().splitlines()
    assert others == 'http://elsewhere:1/v1  # job 5' and ours.split('#')[0].strip() == url
    assert re.fullmatch(r'http://127\.0\.0\.1:\d+/v1', url)
    with urllib.request.urlopen(url + '/models') as response:
        assert json.load(response)['data'][0]['id'] == 'small'
    assert (launch.folder / 'log').read_text() == 'options: --max-model-len=77\n'
    assert any('sleep 1000' in c for c in marked(launch.value).values()) == (name == 'SIGTERM')
    process.send_signal(number)
    assert wait_code(process) == 128 + number
    assert registry.read_text() == others + '\n'
    launch.none_left()


def test_a_signal_before_the_server_is_ready(launch):
    process = launch.serve(FAKE_VLLM='loading')
    launch.until(lambda: any('fake_vllm' in c for c in marked(launch.value).values()))
    process.terminate()
    assert wait_code(process) == 143
    launch.none_left()


@pytest.mark.parametrize('mode', ['', 'child', 'away', 'loading'])
def test_kill_of_the_script_leaves_nothing(launch, mode):
    registry = launch.folder / 'servers.txt'
    process = launch.serve('--registry', registry, FAKE_VLLM=mode)
    if mode == 'loading':
        lines = lambda: ' '.join(marked(launch.value).values())  # noqa: E731
        launch.until(lambda: 'endpoint.py wait' in lines() and '-m tests.fake_vllm' in lines())
    else:
        launch.ready()
        launch.until(registry.read_text)
    process.kill()
    process.wait()
    launch.none_left()
    assert not registry.read_text()


def test_kill_of_the_script_while_it_makes_the_environment(launch):
    python = launch.folder / 'python'
    python.write_text('#!/bin/sh\nsleep 1000; true\n')
    python.chmod(0o755)
    process = launch.serve('--port=61440', VLLM_COMMAND='', VENV=str(launch.folder / 'venv'), PYTHON=str(python))
    launch.until(lambda: 'sleep 1000 ' in marked(launch.value).values())
    process.kill()
    process.wait()
    launch.none_left()


@pytest.mark.parametrize(
    ('mode', 'log', 'message'),
    [
        (
            'die',
            'RuntimeError: the engine could not start',
            'ended before it was ready. The first error of its log: RuntimeError: a bad weight\n',
        ),
        ('first', 'head_dim 12 is not supported', 'ended before it was ready.'),
        ('refusing', 'options:', 'refuses a completion (HTTP 400: {"error"'),
    ],
)
def test_a_server_that_does_not_come_up(launch, mode, log, message):
    assert message in not_ready(launch, mode, log, LIMIT_S)


def test_a_server_that_loads_for_too_long(launch):
    """However slowly it starts: once it answers, it answers that it is not ready."""
    for seconds in (1, 4, 16, LIMIT_S):
        printed = not_ready(launch, 'loading', 'options:', seconds)
        if 'HTTP 503' in printed:
            break
    assert f'is not ready after {seconds} s (HTTP 503 from http://' in printed


def not_ready(launch, mode: str, log: str, seconds: int) -> str:
    """What the launcher prints of a server in `mode` that does not become ready, with the end of its log."""
    registry = launch.folder / 'servers.txt'
    arguments = (SUBJECT, '--log', launch.folder / 'log', '--registry', registry, '--ready-timeout', seconds)
    printed = launch.failure('serve_vllm.sh', *arguments, FAKE_VLLM=mode)
    assert log in printed.split('The last lines of')[1] and 'nanobind' not in printed
    assert printed.splitlines()[-1].startswith(f'error: The server of {SUBJECT} ') and not registry.read_text()
    return printed


def test_a_server_that_dies_later(launch):
    registry = launch.folder / 'servers.txt'
    process = launch.serve('--registry', registry)
    launch.ready()
    assert registry.read_text()
    (server,) = (pid for pid, c in marked(launch.value).items() if 'tests.fake_vllm' in c and 'bash' not in c)
    os.kill(server, signal.SIGKILL)
    assert wait_code(process) == 1 and not registry.read_text()
    assert launch.printed().splitlines()[-1] == f'error: The server of {SUBJECT} ended.'
    launch.none_left()


def test_arguments_that_are_refused_before_anything_starts(launch, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        port = s.getsockname()[1]
        printed = launch.failure('serve_vllm.sh', SUBJECT, '--port', port)
        assert printed.startswith(f'error: Port {port} of 127.0.0.1 is in use: give another --port')
    (tmp_path / 'empty').mkdir()
    rows = ('--input_dataset=in.jsonl', '--output-path', tmp_path / 'out')
    for script, arguments, message in (
        ('serve_vllm.sh', [tmp_path / 'none'], f'{tmp_path}/none has no config.json: give'),
        ('serve_vllm.sh', ['configs/none'], 'configs/none has no config.json'),
        ('serve_vllm.sh', [tmp_path / 'empty'], f'{tmp_path}/empty has no config.json: give'),
        ('serve_vllm.sh', ['--port=80'], 'The first argument is the model'),
        ('serve_vllm.sh', [SUBJECT, '--port', 'x'], '--port=x is no port: give'),
        ('serve_vllm.sh', [SUBJECT, '--api-key=hush'], 'All users of a machine see its command lines: give the key'),
        ('serve_vllm.sh', [SUBJECT, '--host'], '--host needs a value.'),
        *(
            ('serve_vllm.sh', [SUBJECT, f'--host={h}'], f'--host={h} is no address')
            for h in ('-x', 'a b', 'a/b', '"', '')
        ),
        ('generate_local.sh', [SUBJECT, '--input-dataset', 'in.jsonl'], '--output_path is needed'),
        ('generate_local.sh', ['configs/none', *rows], 'configs/none has no config.json'),
        ('generate_slurm.sh', [SUBJECT, *rows], 'sbatch is missing: generate_slurm.sh needs it.'),
    ):
        printed = launch.failure(script, *arguments)
        assert printed.startswith(f'error: {message}') and printed.count('\n') == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'printed', 'slurm']


def test_the_registry_loses_no_line_of_servers_that_write_together(launch):
    registry = launch.folder / 'servers.txt'

    def together(*commands, **env):
        use = f'set -euo pipefail; root={ROOT}; . launch/common.sh; . launch/generation.sh; register "$@"'
        run = ['bash', '-c', use, 'x', registry]
        writers = [subprocess.Popen([*run, *c], cwd=ROOT, env=launch.env | env, stderr=-3) for c in commands]
        assert [p.wait(LIMIT_S) for p in writers] == [0] * len(commands)
        return sorted(registry.read_text().splitlines())

    lines = together(*((f'job {i}', f'http://n{i}:1/v1') for i in range(8)))
    assert lines == [f'http://n{i}:1/v1  # job {i}' for i in range(8)]
    lines = together(('job 7', 'http://n9:1/v1'), *((f'job {i}',) for i in range(6)))
    assert lines == ['http://n6:1/v1  # job 6', 'http://n9:1/v1  # job 7']
    no_locks = without_locks(launch)
    assert together(('job 70', 'http://n0:1/v1'), **no_locks) == ['http://n0:1/v1  # job 70', *lines]


def without_locks(launch: Launch) -> dict[str, str]:
    """The environment of a file system where flock fails."""
    fake = launch.folder / 'bin'
    fake.mkdir(exist_ok=True)
    (fake / 'flock').write_text('#!/bin/sh\necho "flock: 9: No locks available" >&2\nexit 71\n')
    (fake / 'flock').chmod(0o755)
    return {'PATH': f'{FAKES}:{fake}:{launch.env["PATH"]}'}


@pytest.fixture(scope='module')
def endpoint():
    spec = importlib.util.spec_from_file_location('endpoint', ROOT / 'launch' / 'endpoint.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    'answer',
    [
        b'nonsense\r\n\r\n',
        *(b'HTTP/1.1 %d X\r\nContent-Length: 9\r\n\r\ncut' % n for n in (200, 503)),
        b'HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:1/elsewhere\r\nContent-Length: 0\r\n\r\n',
        *(
            b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % len(text) + text
            for text in (
                b'no JSON',
                b'[' * 10**5,
                b' ' * 2**21,
                b'[]',
                b'null',
                b'{"data": []}',
                b'{"data": null}',
                b'{"data": ["tiny"]}',
            )
        ),
    ],
)
def test_a_server_that_answers_nonsense_is_waited_for(endpoint, answer, monkeypatch):
    """Until it lists a model and completes."""
    monkeypatch.setattr(endpoint, 'PAUSE_S', 0)
    body = b'{"data": [{"id": "tiny"}]}'
    good = b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % len(body) + body
    with socket.create_server(('127.0.0.1', 0)) as listening:

        def serve():
            for sent in (answer, good, good):  # the last is a completion
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):  # who has read enough goes
                    connection.recv(9999)
                    connection.sendall(sent)

        thread = threading.Thread(target=serve)
        thread.start()
        assert endpoint.wait(f'http://127.0.0.1:{listening.getsockname()[1]}/v1', LIMIT_S) == 'tiny'
        thread.join()


def test_what_a_server_says_is_printed_plainly_and_only_its_beginning(endpoint, monkeypatch):
    asked = []

    def fail(url, *_):
        asked.append(url)
        if url.endswith('/models'):
            return {'data': [{'id': 'tiny'}]}
        text = io.BytesIO(b'\x1b[2J no ' * 2**20)
        raise endpoint.urllib.error.HTTPError(url, 400, 'x', {}, text)

    monkeypatch.setattr(endpoint, 'ask', fail)
    with pytest.raises(SystemExit, match='refuses a completion') as e:
        endpoint.wait('http://a/v1', 9)
    assert str(e.value).isprintable() and len(str(e.value)) < 400 and len(asked) == 2


@pytest.mark.parametrize('locks', [True, False])
def test_the_environment_of_the_server_is_made_once(launch, locks):
    """Two jobs that start together, by a stand-in of Python; without locks each may make it."""
    venv = launch.folder / 'venv'
    python = launch.folder / 'python'
    python.write_text(
        '#!/bin/sh\nsleep 0.2\nmkdir -p "$3/bin"\necho x >>"$3/made"\n'
        'for f in pip uv python; do printf \'#!/bin/sh\\n[ "$1" != config ] || exit 1\\necho "$0 $*" >>%s/calls\\n\' '
        '"$3" >"$3/bin/$f"; chmod +x "$3/bin/$f"; done\n'
    )
    python.chmod(0o755)
    env = launch.env | {'VENV': str(venv), 'PYTHON': str(python), 'PIP_FIND_LINKS': '/wheels /more'}
    env |= {} if locks else without_locks(launch)
    jobs = [subprocess.Popen(['launch/vllm_env.sh'], cwd=ROOT, env=env, stdout=-3, stderr=-3) for _ in range(2)]
    assert [j.wait(LIMIT_S) for j in jobs] == [0, 0]
    assert len((venv / 'made').read_text().split()) in ({1} if locks else {1, 2})
    install = next(c for c in (venv / 'calls').read_text().splitlines() if '/uv pip install' in c)
    assert '--find-links /wheels --find-links /more' in install and 'vllm' in install
    (venv / 'ready').unlink()
    python.write_text('#!/bin/sh\nexit 3\n')
    failed = launch.failure('serve_vllm.sh', SUBJECT, '--port=1', VLLM_COMMAND='', VENV=str(venv), PYTHON=str(python))
    assert f'error: {venv} could not be made: ' in failed


# --- generation -----------------------------------------------------------------------------------------------


class Generation:
    """`n` chats, and what a script makes of them."""

    def __init__(self, launch: Launch, n: int):
        self.launch, self.n, self.out = launch, n, launch.folder / 'out'
        source = launch.folder / 'in.jsonl'
        pairs = [
            ({'role': 'user', 'content': f'Tell {i}.'}, {'role': 'assistant', 'content': 'Old.'}) for i in range(n)
        ]
        source.write_text(''.join(json.dumps({'messages': pair}) + '\n' for pair in pairs))
        self.arguments = [SUBJECT, f'--input_dataset={source}', '--output-path', self.out, '--max_concurrency=4']
        self.arguments += ['--registry_refresh_interval=1']
        self.hold = launch.folder / 'hold'
        self.hold.touch()
        self.some = {'FAKE_VLLM': f'hold={self.hold}'}  # a server answers a few rows, the others when the file is gone

    def rows(self) -> list[int]:
        data = self.out / 'data.jsonl'
        text = data.read_text() if data.exists() else ''
        return [json.loads(line)['index'] for line in text[: text.rfind('\n') + 1].splitlines()]

    def check(self) -> None:
        assert sorted(self.rows()) == list(range(self.n)), 'every row exactly once'
        assert len(datasets.load_from_disk(str(self.out / 'dataset'))) == self.n
        metas = [json.loads((self.out / 'tokens' / s / 'meta.json').read_text()) for s in ('train', 'validation')]
        assert sum(m['documents'] for m in metas) == self.n and {m['seq_len'] for m in metas} == {256}
        assert all(m['role_tokens']['thinking'] for m in metas)


@pytest.mark.slow
def test_local_generation_stops_and_goes_on(launch):
    generation, log = Generation(launch, 20), launch.folder / 'log'
    env = {'VLLM_ARGS': f'--log {log} --max-model-len 77'} | generation.some
    process = launch.start('generate_local.sh', *generation.arguments, **env)
    launch.until(lambda: len(generation.rows()) >= 4)
    process.send_signal(signal.SIGINT)
    assert wait_code(process) == 130
    launch.none_left()
    assert 4 <= len(generation.rows()) < 20 and not (generation.out / 'tokens').exists()
    generation.hold.unlink()
    process = launch.start('generate_local.sh', *generation.arguments, **env)
    assert wait_code(process) == 0, launch.printed()
    generation.check()
    assert log.read_text() == 'options: --max-model-len 77\n'
    launch.none_left()


def test_local_generation_without_a_server(launch):
    generation = Generation(launch, 3)
    arguments = {'VLLM_ARGS': f'--log {launch.folder}/log', 'FAKE_VLLM': 'die'}
    printed = launch.failure('generate_local.sh', *generation.arguments, **arguments)
    assert 'error: There is no server: what was answered is kept' in printed.splitlines()[-1]
    assert f'error: The server of {SUBJECT} ended before it was ready.' in printed


def calls(launch: Launch, name: str) -> list[str]:
    file = launch.slurm / 'calls'
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.partition(' ')[2] for line in lines if line.split()[0] == name]


def registered(launch: Launch) -> list[str]:
    file = launch.folder / 'out.slurm' / 'servers.txt'
    return re.findall(r'# job (\d+)', file.read_text()) if file.exists() else []


@pytest.mark.slow
def test_slurm_jobs_that_are_lost_come_back(launch):
    """Two servers of two nodes each, of which one loses a node."""
    generation = Generation(launch, 20)
    env = {'SERVERS': '2', 'NODES_PER_SERVER': '2', 'GPUS_PER_SERVER': '3', 'SBATCH_ARGS': '--partition=gpu --time=9'}
    env |= {'VLLM_ARGS': '--dtype auto'} | generation.some
    process = launch.start('generate_slurm.sh', *generation.arguments, fakes=True, **env)
    launch.until(lambda: registered(launch) and len(generation.rows()) >= 4)
    os.kill(int((launch.slurm / 'job-101' / 'ray' / 'node2').read_text()), signal.SIGKILL)
    launch.until(lambda: sorted(registered(launch)) == ['102', '103'])
    assert len(generation.rows()) < 20
    generation.hold.unlink()
    assert wait_code(process) == 0, launch.printed()
    generation.check()
    launch.none_left()
    assert 'Job 101 has ended' in launch.printed() and 'Job 102 has ended' not in launch.printed()
    submitted = calls(launch, 'sbatch')
    assert len(submitted) == 3 and all('--nodes=2 --ntasks-per-node=1 --gres=gpu:3 ' in c for c in submitted)
    assert all(f'--output={generation.out}.slurm/server-%j.log --partition=gpu --time=9' in c for c in submitted)
    log = (launch.folder / 'out.slurm' / 'vllm-103.log').read_text()
    assert log.startswith('options: --tensor-parallel-size=6 --dtype auto --distributed-executor-backend=ray\n')
    assert not registered(launch)


def test_slurm_coordinator_that_is_stopped_cancels_its_jobs_and_no_others(launch):
    generation, before = Generation(launch, 20), launch.folder / 'before'
    sbatch = [FAKES / 'sbatch', '--job-name=other', f'--output={before}']
    subprocess.run(sbatch, input='sleep 1000', env=launch.env, text=True, check=True, stdout=-3)
    env = {'SERVERS': '2', 'GPUS_PER_SERVER': '0'} | generation.some
    process = launch.start('generate_slurm.sh', *generation.arguments, fakes=True, **env)
    launch.until(lambda: sorted(registered(launch)) == ['102', '103'])
    second = [ROOT / 'launch' / 'generate_slurm.sh', *generation.arguments]
    path = {'PATH': f'{FAKES}:{launch.env["PATH"]}'}
    beside = subprocess.run(second, cwd=ROOT, env=launch.env | path, capture_output=True, text=True)
    assert beside.returncode == 1
    assert beside.stderr.startswith(f'error: Another coordinator is writing {generation.out}: wait for it')
    process.kill()  # the jobs go on, and the same command cancels them
    process.wait()
    env |= {'MAX_RESUBMITS': '1', 'FAKE_VLLM': 'die'}
    assert launch.start('generate_slurm.sh', *generation.arguments, fakes=True, **env).wait(LIMIT_S) == 1
    assert 'RuntimeError: the engine could not start' in launch.printed()
    assert 'error: There is no server job (SBATCH_ARGS, MAX_RESUBMITS); logs: ' in launch.printed()
    assert len(calls(launch, 'sbatch')) == 1 + 2 + 3 and all('--gres' not in c for c in calls(launch, 'sbatch'))
    assert {c.split()[0] for c in marked(launch.value).values()} <= {'sleep', 'bash'} and not registered(launch)
    subprocess.run([FAKES / 'scancel', '101'], env=launch.env, check=True)
    launch.none_left()


def test_slurm_refuses_jobs_and_the_file_system_has_no_locks(launch):
    (launch.slurm / 'closed').touch()
    printed = launch.failure('generate_slurm.sh', *Generation(launch, 3).arguments, **without_locks(launch))
    assert 'flock: 9: No locks available' in printed and 'Another coordinator' not in printed
    assert 'sbatch: error: Batch job submission failed' in printed
    assert printed.splitlines()[-1].startswith('error: There is no server job (SBATCH_ARGS, MAX_RESUBMITS); logs:')
