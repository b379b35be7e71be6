"""The training launchers: tests/fake_lens plays lens.main, tests/fake_bin ssh and gcloud, tests/fake_slurm Slurm."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.marked import MARK, marked

ROOT = pathlib.Path(__file__).parents[1]
LIMIT_S = 120
SCRIPTS = ['train_local.sh', 'hosts.sh', 'train_slurm.sh', 'train_tpu.sh']
OVERRIDES = ['--config.phases=(\'sft\', "grpo")', '--config.text=$HOME `id` * \\ a  b;', '--config.empty=']


class Launch:
    """Starts launchers in a repository whose lens.main is played; its runs are in `workdir`."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.repository, self.value = folder, folder / 'a repository', str(folder)
        self.repository.mkdir()
        (self.repository / 'launch').symlink_to(ROOT / 'launch')
        (self.repository / 'lens').symlink_to(ROOT / 'tests' / 'fake_lens')
        self.hosts, self.slurm, self.workdir = folder / 'hosts', folder / 'slurm', self.repository / 'runs' / 'x'
        self.hosts.mkdir()
        self.slurm.mkdir()
        fakes = f'{ROOT}/tests/fake_bin:{ROOT}/tests/fake_slurm'
        self.env = os.environ | {'PATH': f'{fakes}:{os.environ["PATH"]}', 'PYTHON': sys.executable, MARK: self.value}
        self.env |= {'FAKE_HOSTS': str(self.hosts), 'FAKE_SLURM': str(self.slurm), 'PAUSE_S': '0.1'}
        self.env |= {'HOSTS': 'node1 me@node2', 'REPO_DIR': str(self.repository), 'TPU_NAME': 'pod', 'ZONE': 'zone-b'}
        self.env |= {'PROJECT': 'mine', 'SBATCH_ARGS': f'--nodes=2 --output={folder}/printed'}
        self.printed_file = folder / 'printed'

    def start(self, script: str, *arguments, **env) -> subprocess.Popen:
        command = ['env', '--default-signal', f'launch/{script}', *map(str, arguments)]
        with self.printed_file.open('w') as f:
            return subprocess.Popen(
                command, cwd=self.repository, env=self.env | env, stdin=subprocess.DEVNULL, stdout=f, stderr=f
            )

    def train(self, script: str, *arguments, **env) -> subprocess.Popen:
        """Two processes unless the first argument says otherwise, by -n."""
        if script == 'train_local.sh' and '-n' not in arguments[:1]:
            arguments = ('-n', 2, *arguments)
        own = arguments[:2] if '-n' in arguments[:1] else ()
        return self.start(script, *own, '--config=c.py:sft', '--workdir=runs/x', *arguments[len(own) :], **env)

    def run(self, script: str, *arguments, **env) -> int:
        """The exit code of a run to its end, of which no process is left; 0 for a job of Slurm."""
        code = self.train(script, *arguments, **env).wait(LIMIT_S)
        if script == 'train_slurm.sh':
            self.until(lambda: not marked(self.value))
        self.none_left()
        return code

    def printed(self) -> str:
        return self.printed_file.read_text()

    def until(self, condition):
        last = time.monotonic() + LIMIT_S
        while not (value := condition()):
            assert time.monotonic() < last, self.printed()
            time.sleep(0.02)
        return value

    def none_left(self) -> None:
        last = time.monotonic() + LIMIT_S
        while left := marked(self.value):
            assert time.monotonic() < last, left
            time.sleep(0.02)

    def starts(self, index: int) -> list[dict]:
        file = self.workdir / f'starts-{index}'
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def begun(self) -> list[int]:
        """The step at which process 0 began, for each start."""
        return [int(n) for n in re.findall(r'^process 0 of \d begins at step (\d+)$', self.printed(), re.M)]

    def met(self, step: int, count: int = 2) -> bool:
        """Whether all processes of the first start have reached this step."""
        return all((self.workdir / 'meetings' / '0' / f'{step}-{i}').exists() for i in range(count))

    def newest(self) -> int:
        return max((int(p.name) for p in (self.workdir / 'checkpoints').glob('*')), default=-1)

    def finished(self) -> bool:
        return (self.workdir / 'summary.json').exists()

    def calls(self, folder: pathlib.Path, name: str) -> list[str]:
        lines = (folder / 'calls').read_text().splitlines()
        return [line.partition(' ')[2] for line in lines if line.startswith(name + ' ')]


@pytest.fixture
def launch(tmp_path):
    it = Launch(tmp_path)
    yield it
    for pid in marked(it.value):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- all four -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('script', SCRIPTS)
def test_arguments_arrive_untouched_and_the_command_is_printed(launch, script):
    assert launch.run(script, *OVERRIDES) == 0, launch.printed()
    assert launch.finished()
    own = ['--config=c.py:sft', '--workdir=runs/x', *OVERRIDES]
    arrived = [launch.starts(i)[0]['arguments'] for i in range(2)]
    assert [a[: len(own)] for a in arrived] == [own, own]
    flags = [a[len(own) :] for a in arrived]
    if script == 'train_slurm.sh':
        assert flags == [[], []]
    elif script == 'train_tpu.sh':
        assert flags == [['--coordinator=auto']] * 2
        (call,) = (launch.hosts / 'calls').read_text().splitlines()
        where = 'pod --zone=zone-b --project=mine --worker=all'
        assert call.startswith(f'compute tpus tpu-vm ssh {where} --command=cd ') and ' -- -oBatchMode=yes ' in call
    else:
        address = flags[0][0]
        assert re.fullmatch(r'--coordinator=(127\.0\.0\.1|node1):\d+', address)
        assert flags == [[address, '--num_processes=2', f'--process_id={i}'] for i in range(2)]
    words = shlex.split(re.search(r'^\+ (.*lens\.main.*)$', launch.printed(), re.M)[1])
    if script in ('hosts.sh', 'train_tpu.sh'):  # one word is the command for a shell
        words = shlex.split(next(w for w in words if 'lens.main' in w))
    at = words.index('-m')
    assert words[at : at + 2] == ['-m', 'lens.main'] and words[at + 2 :] == arrived[0]


@pytest.mark.parametrize('script', SCRIPTS)
def test_when_one_process_dies_all_start_again_from_the_last_checkpoint(launch, script):
    """The other one waits for it, deaf to SIGTERM. For a pod JAX ends it, which is played."""
    faults = '--fault=kill:1:0' + (',abort:0:0' if script == 'train_tpu.sh' else '')
    assert launch.run(script, faults) == 0, launch.printed()
    assert launch.finished() and [len(launch.starts(i)) for i in range(2)] == [2, 2]
    assert launch.begun() == [0, 2], 'process 1 died at step 3, a checkpoint comes every 2 steps'
    assert re.search(r'^process [01] ended with code [1-9]', launch.printed(), re.M)
    assert 'Restart 1 of 10, from checkpoint 2, in 0.1 s' in launch.printed()


@pytest.mark.parametrize('script', ['train_local.sh', 'train_slurm.sh'])
def test_an_error_of_the_user_is_not_tried_again(launch, script):
    code = launch.run(script, '--fault=error:1:0')
    assert code == (0 if script == 'train_slurm.sh' else 1) and not launch.finished()
    assert [len(launch.starts(i)) for i in range(2)] == [1, 1]
    assert 'error: step 3 is not possible.' in launch.printed()
    assert launch.printed().splitlines()[-1].startswith('error: The training ended with an error that no restart mends')
    if script == 'train_slurm.sh':
        assert not launch.calls(launch.slurm, 'scontrol')


@pytest.mark.parametrize(
    ('script', 'name', 'count'),
    [
        ('train_local.sh', 'SIGUSR1', 2),
        ('train_local.sh', 'SIGHUP', 1),
        ('hosts.sh', 'SIGTERM', 2),
        ('train_tpu.sh', 'SIGUSR1', 2),
    ],
)
def test_a_signal_stops_all_and_the_same_command_goes_on(launch, script, name, count):
    """Also those that the signal reaches only when they have stopped, which JAX has told them."""
    count_words = ('-n', count) if script == 'train_local.sh' else ()
    process = launch.train(script, *count_words, '--endless=0', '--save_every=1000', '--fault=late:0:0')
    launch.until(lambda: launch.met(3, count))
    process.send_signal(signal.Signals[name])
    assert process.wait(LIMIT_S) == 0, launch.printed()
    launch.none_left()
    stopped, sent = launch.newest(), 'SIGUSR1' if name == 'SIGUSR1' else 'SIGTERM'
    assert stopped >= 3 and f'Stopped at step {stopped} by {sent}' in launch.printed() and not launch.finished()
    assert launch.run(script, *count_words, f'--steps={stopped + 5}') == 0
    assert launch.finished() and launch.begun() == [stopped]


# --- one machine ----------------------------------------------------------------------------------------------


def test_a_signal_before_the_training_handles_it(launch):
    process = launch.train('train_local.sh', '--imports_s=99')
    launch.until(lambda: 'importing' in launch.printed())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(LIMIT_S) == 0
    launch.none_left()
    assert 'Restart' not in launch.printed()


def test_output_of_the_others_and_one_process_without_flags(launch):
    arguments = ('-n', 3, '--config=c', '--workdir', 'w', '--workdir=runs/x')
    assert launch.start('train_local.sh', *arguments).wait(LIMIT_S) == 0
    logs = {p.name: p.read_text() for p in (launch.workdir / 'logs').glob('*.log')}
    assert logs == {f'process-{i}.log': f'process {i} of 3 begins at step 0\n' for i in (1, 2)}
    assert launch.begun() == [0] and not (launch.repository / 'w').exists()
    assert launch.run('train_local.sh', '-n', 1) == 0
    assert launch.starts(0)[1]['arguments'] == ['--config=c.py:sft', '--workdir=runs/x']


@pytest.mark.parametrize(
    ('faults', 'starts', 'code'),
    [
        ('error:0:0,abort:1:0', 1, 1),
        ('broken:0:0,error:1:0', 1, 1),
        ('error:0:0,kill:1:0', 2, 0),
    ],
)
def test_what_came_first_decides_when_several_die(launch, faults, starts, code):
    """A peer aborts or is broken after an error of the user, and ends with an error after a death."""
    assert launch.run('train_local.sh', f'--fault={faults}') == code
    assert len(launch.starts(0)) == starts


def test_restarts_are_bounded_and_a_checkpoint_resets_the_count(launch):
    always = '--fault=' + ','.join(f'kill:0:{k}' for k in range(9))
    assert launch.run('train_local.sh', '-n', 1, always, '--save_every=100', MAX_RESTARTS='1') == 1
    assert launch.begun() == [0, 0]
    assert launch.printed().splitlines()[-1] == 'error: No new checkpoint in runs/x after 1 restarts: given up.'
    assert launch.run('train_local.sh', '-n', 1, always, '--steps=6', MAX_RESTARTS='1', PAUSE_S='0') == 0, (
        launch.printed()
    )
    assert launch.begun() == [0, 2, 4] and launch.finished()


def test_a_second_ctrl_c_ends_a_process_that_hangs(launch):
    process = launch.train('train_local.sh', '--fault=hang:1:0')
    launch.until(lambda: (launch.workdir / 'meetings' / '0' / '3-0').exists())
    process.send_signal(signal.SIGINT)
    launch.until(lambda: 'SIGINT: SIGTERM to all processes' in launch.printed())
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 1
    launch.none_left()
    last = launch.printed().splitlines()[-1]
    assert last == 'error: Ended without saving; the same command goes on from the last checkpoint.'


def test_kill_of_the_launcher_and_a_second_one_beside_it(launch):
    process = launch.train('train_local.sh', '--endless=0')
    launch.until(lambda: launch.met(1))
    beside = subprocess.run(
        ['launch/train_local.sh', '--config=c', f'--workdir={launch.workdir}'],
        cwd=launch.repository,
        env=launch.env,
        capture_output=True,
        text=True,
    )
    assert beside.returncode == 1 and beside.stderr.startswith('error: Another launcher is training in ')
    process.kill()
    process.wait()
    launch.none_left()
    assert launch.newest() > 0, 'they were told, and have saved'


def test_each_process_has_its_part_of_the_gpus(launch):
    assert launch.run('train_local.sh', DEVICES_PER_PROCESS='2', CUDA_VISIBLE_DEVICES='7,5,3,1') == 0
    assert [launch.starts(i)[0]['environment']['CUDA_VISIBLE_DEVICES'] for i in range(2)] == ['7,5', '3,1']
    assert launch.run('train_local.sh', DEVICES_PER_PROCESS='3', CUDA_VISIBLE_DEVICES='7,5,3,1') == 1
    assert 'error: CUDA_VISIBLE_DEVICES=7,5,3,1 has 4 devices, and 2 processes' in launch.printed()


# --- several machines -----------------------------------------------------------------------------------------


def test_hosts_of_a_file_with_their_options(launch):
    file = launch.folder / 'hosts.txt'
    file.write_text('# ours\nnode1  # first\n\nme@node2\nnode3\n')
    assert launch.run('hosts.sh', HOSTS=str(file), REMOTE_ENV="NOTE='a b'", PORT='7777') == 0
    assert all(launch.starts(i)[0]['environment'] == {'NOTE': 'a b'} for i in range(3))
    assert launch.starts(2)[0]['arguments'][-3:] == ['--coordinator=node1:7777', '--num_processes=3', '--process_id=2']
    calls = (launch.hosts / 'calls').read_text().splitlines()
    assert sorted(re.search(r'-oServerAliveCountMax=4 -- (\S+) cd', c)[1] for c in calls) == [
        'me@node2',
        'node1',
        'node3',
    ]
    assert all(c.startswith('-oBatchMode=yes ') for c in calls)
    assert (launch.workdir / 'logs' / 'process-2.log').read_text() == 'process 2 of 3 begins at step 0\n'


@pytest.mark.parametrize('script', ['hosts.sh', 'train_tpu.sh'])
def test_values_of_variables_are_on_no_command_line(launch, script):
    process = launch.train(script, '--endless=0', REMOTE_ENV='NOTE="my \'hush\' $((1+1))" OTHER=hush')
    launch.until(lambda: launch.met(3))
    lines = [*marked(launch.value).values(), launch.printed(), (launch.hosts / 'calls').read_text()]
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_S) == 0, launch.printed()
    launch.none_left()
    assert any('--process_id' in line or '--coordinator=auto' in line for line in lines)
    assert 'hush' not in ''.join(lines) + launch.printed()
    for i in range(2):
        assert launch.starts(i)[0]['environment']['NOTE'] == "my 'hush' 2"
    if script == 'train_tpu.sh':
        assert (launch.repository / '.remote-env').stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize('value', ['bad-name=hush', "NOTE='hush", '=hush', '(hush'])
def test_variables_that_are_none_are_an_error_without_their_values(launch, value):
    assert launch.run('hosts.sh', REMOTE_ENV=value) == 1
    assert 'error: REMOTE_ENV has to be words NAME=VALUE' in launch.printed() and 'hush' not in launch.printed()
    assert not launch.starts(0)


def test_a_connection_that_is_lost(launch):
    """What it leaves on the host is ended, and all start again."""
    process = launch.train('hosts.sh', '--endless=0')
    launch.until(lambda: launch.met(3))
    for pid, line in marked(launch.value).items():
        if line.startswith('setsid --wait') and '--process_id=1' in line:
            os.kill(pid, signal.SIGKILL)
    assert process.wait(LIMIT_S) == 0, launch.printed()
    launch.none_left()
    assert 'process 1 ended with code 137' in launch.printed()
    assert launch.finished() and [len(launch.starts(i)) for i in range(2)] == [2, 2]


def test_what_is_left_on_a_host_is_killed_by_the_next_start(launch):
    words = [ROOT / 'launch' / 'on_host.sh', launch.workdir]
    starts, env = [], launch.env | {'TMPDIR': str(launch.folder)}
    for _ in range(2):
        process = subprocess.Popen(
            [*words, 'sh', '-c', 'echo runs; sleep 1000'], env=env, stdout=-1, text=True, start_new_session=True
        )
        assert process.stdout.readline() == 'runs\n'
        starts.append(process)
    assert starts[0].wait(LIMIT_S) == -signal.SIGKILL
    subprocess.run([*words, '-TERM'], env=env, check=True)
    assert starts[1].wait(LIMIT_S) == 128 + signal.SIGTERM, 'by which ssh tells it from a lost connection'
    subprocess.run([*words, '-TERM'], env=env, check=True)  # nothing runs


def test_a_host_that_cannot_be_reached(launch):
    (launch.hosts / 'node2').mkdir()
    (launch.hosts / 'node2' / 'down').touch()
    assert launch.run('hosts.sh', MAX_RESTARTS='0') == 1
    assert 'No route to host' in launch.printed() and launch.printed().count('process 1 ended with code 255') == 1


# --- Slurm ----------------------------------------------------------------------------------------------------


def slurm(launch: Launch, *words: str) -> None:
    subprocess.run([ROOT / 'tests' / 'fake_slurm' / words[0], *words[1:]], env=launch.env, check=True)


def requeues(launch: Launch) -> list[str]:
    return [c for c in launch.calls(launch.slurm, 'scontrol') if c.startswith('requeue')]


def begin_job(launch: Launch, *arguments: str) -> None:
    assert launch.train('train_slurm.sh', *arguments).wait(LIMIT_S) == 0
    launch.until(lambda: launch.met(1))


@pytest.mark.parametrize('signalled', ['--batch', '--steps'])
def test_a_job_that_is_preempted_is_queued_again_until_it_is_finished(launch, signalled):
    begin_job(launch, '--endless=0', '--save_every=1000')
    slurm(launch, 'scancel', *(['--batch'] if signalled == '--batch' else []), '--signal=USR1', '101')
    launch.until(launch.finished)
    launch.until(lambda: not marked(launch.value))
    begun, stopped = launch.begun(), re.search(r'^Stopped at step (\d+) by SIGUSR1$', launch.printed(), re.M)
    assert begun[0] == 0 < begun[-1] == int(stopped[1]), launch.printed()
    assert requeues(launch) == ['requeue 101'] and '+ scontrol requeue 101\n' in launch.printed(), launch.printed()
    submitted = launch.calls(launch.slurm, 'sbatch')
    assert len(submitted) == 1 and submitted[0].startswith(f'--nodes=2 --output={launch.folder}/printed ')
    assert launch.starts(1)[0]['environment'] == {'SLURMD_NODENAME': 'node2'}


def test_a_job_that_is_cancelled_is_not_queued_again(launch):
    begin_job(launch, '--endless=0')
    slurm(launch, 'scancel', '101')
    launch.until(lambda: not marked(launch.value))
    assert f'Stopped at step {launch.newest()} by SIGTERM' in launch.printed()
    assert 'Job 101 is being ended (COMPLETING), not queued again' in launch.printed() and not requeues(launch)


def test_the_options_of_the_job_and_a_copy_of_the_script(launch):
    text = (ROOT / 'launch' / 'train_slurm.sh').read_text()
    head = text[: text.index('\nset -euo pipefail')]
    options = re.findall(r'^#SBATCH (.*)$', head, re.M)
    assert set(options) >= {'--ntasks-per-node=1', '--signal=B:USR1@300', '--requeue', '--open-mode=append'}
    assert all(line.startswith('#') for line in head.splitlines()), 'sbatch reads options before the first command'
    env = {k: v for k, v in launch.env.items() if k != 'REPO_DIR'}
    words = ['launch/train_slurm.sh', '--config=c', '--workdir=runs/x']
    command = ['sbatch', f'--output={launch.printed_file}', *words]
    subprocess.run(command, cwd=launch.repository, env=env, check=True, stdout=subprocess.DEVNULL)
    launch.until(launch.finished)
    elsewhere = subprocess.run(
        [*command[:2], ROOT / 'launch' / 'train_slurm.sh'], cwd=launch.folder, env=env, stdout=subprocess.DEVNULL
    )
    assert elsewhere.returncode == 0
    launch.until(lambda: 'error: sbatch runs a copy of this script: call sbatch from the repo' in launch.printed())


# --- what is refused ------------------------------------------------------------------------------------------


def test_arguments_that_are_refused_before_anything_starts(launch):
    both = ['--config=c', '--workdir=runs/x']
    for script, arguments, env, message in (
        *((s, ['--config=c'], {}, f'--workdir is needed: see the head of {s}.') for s in SCRIPTS),
        ('train_local.sh', ['--workdir=w', '--config.a=1'], {}, '--config is needed'),
        ('train_local.sh', ['-n'], {}, '-n needs a number of processes: -n 2.'),
        ('train_local.sh', ['-n', '0', *both], {}, '-n needs a number of processes: -n 2.'),
        ('train_local.sh', both, {'PYTHON': 'none/python'}, 'none/python is missing'),
        *(
            ('hosts.sh', both, {'HOSTS': h}, f'HOSTS={h} has to name hosts')
            for h in ('', 'a b a', 'a -oProxyCommand=x', '-x', 'me@-x', '-me@a', 'a;b', 'a "b"', "'a'", '$(id)', '@a')
        ),
        ('hosts.sh', both, {'PORT': 'x'}, 'PORT=x is no port.'),
        ('train_tpu.sh', both, {'ZONE': ''}, 'TPU_NAME and ZONE are needed'),
        ('train_tpu.sh', both, {'TPU_NAME': '--command=x'}, 'TPU_NAME and ZONE are needed'),
    ):
        assert launch.start(script, *arguments, **env).wait(LIMIT_S) == 1
        assert launch.printed().startswith(f'error: {message}') and launch.printed().count('\n') == 1
    assert not launch.workdir.exists() and not (launch.hosts / 'calls').exists()
