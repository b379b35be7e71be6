"""What a run says of itself: metrics.jsonl over kills and full disks, one clock, figures one step behind, the trace."""

import contextlib
import gzip
import json
import pathlib
import resource
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from lens import config, feed, files, flops, logger
from lens.collapse import WINDOW
from lens.errors import LensError
from lens.logger import Clock, Lines, Logger, Profile
from tests.curves import curve


class Time:
    """A clock that goes when it is told to."""

    def __init__(self, t=1000.0):
        self.t = t

    def __call__(self):
        return self.t

    def spend(self, clock, part, seconds):
        with clock.part(part):
            self.t += seconds


def line(step, **more):
    row = {'step': step, 'phase': 'sft', 'kind': 'train', 'fve': 0.1 + 0.2 + step, 'wall_s': 1.5 * step}
    return json.dumps(row | more) + '\n'


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def phase(name, start, end, log=1, labelled=False):
    objective = types.SimpleNamespace(samples=not labelled, shows=(('reward', 'reward'),))
    every = config.Intervals(log=log)
    return types.SimpleNamespace(
        name=name, start=start, end=end, documents=4, labelled=labelled, objective=objective, every=every
    )


def log_of(workdir, now, collapse='off', log=1):
    """The log of a run of 4 and 96 steps on one device."""
    cfg = ml_collections.ConfigDict(
        {'log': {'tensorboard': False, 'wandb_project': ''}, 'health': {'collapse': collapse}}
    )
    phases = (phase('sft', 0, 4, log, labelled=True), phase('grpo', 4, 100, log))
    run = types.SimpleNamespace(
        steps=100,
        phases=phases,
        phase_of=lambda step: next(p for p in phases if step <= p.end),
        mesh=types.SimpleNamespace(size=2),
        train='the training split',
        seed=7,
    )
    return Logger(cfg, run, workdir, now(), now)


def out(**values):
    return {k: jnp.float32(v) for k, v in ({'loss_encoder': 0.5, 'fve': 0.25} | values).items()}


def test_a_full_disk_lets_lines_wait(tmp_path):
    path, said = tmp_path / 'metrics.jsonl', []
    lines = Lines(path, [], said.append)
    lines.write(json.loads(line(1)))
    assert path.read_text() == line(1), 'on disk at once'
    with full_disk(len(line(1)) + 7):
        for step in (2, 3):
            lines.write(json.loads(line(step)))
            assert path.read_text() == line(1), 'not a part of a line'
    assert len(said) == 1 and said[0].startswith(f'warning: {path} cannot be written (File too large); its lines wait')
    lines.write(json.loads(line(4)))
    assert path.read_text() == ''.join(map(line, (1, 2, 3, 4))) and len(said) == 1
    with full_disk(path.stat().st_size):
        for step in (5, 6):
            lines.write(json.loads(line(step)))
        lines.close()
    assert path.read_text() == ''.join(map(line, (1, 2, 3, 4))) and len(said) == 3
    assert said[2] == f'warning: {path} lacks the last 2 lines: the disk is full.'


def test_a_small_file_on_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    files.write_json(tmp_path / 'a.json', {'old': 1})
    with full_disk(5), pytest.raises(OSError, match=rf"File too large: '{tmp_path}/a\.json'"):
        files.write_json(tmp_path / 'a.json', {'new': 2})
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']
    assert json.loads((tmp_path / 'a.json').read_text()) == {'old': 1}


def test_figures_that_are_written_already_are_not_written_again(tmp_path, capsys):
    """The last evaluation is done again by a process that goes on after the last step."""
    path = tmp_path / 'metrics.jsonl'
    path.write_text(line(50, kind='eval', full=False) + line(90, kind='eval', full=True) + line(100))
    for _ in range(3):
        with log_of(tmp_path, Time()) as log:
            log.open(100, None)
            for step in (90, 100):
                log.held_out(log.run.phases[1], step, {'fve': 0.5}, full=True)
        rows = [r['step'] for r in files.read_jsonl(path) if r['kind'] == 'eval']
        assert rows == [50, 90, 100]
        assert capsys.readouterr().out.count('held out at step') == 2


def test_lines_that_wait_are_written_at_the_end(tmp_path):
    said = []
    lines = Lines(tmp_path / 'a.jsonl', [], said.append)
    with full_disk(1):
        lines.write(json.loads(line(1)))
    lines.close()
    assert (tmp_path / 'a.jsonl').read_text() == line(1) and len(said) == 1


def test_a_console_on_a_full_disk_ends_nothing(tmp_path):
    log = log_of(tmp_path, Time())
    with (tmp_path / 'console').open('w', buffering=1) as console:
        log.console.file = console
        with full_disk(5):
            log.say('held out at step 1')
        log.say('held out at step 2')
    assert 'held out at step 2\n' in (tmp_path / 'console').read_text()


def test_later_lines_are_dropped_on_resume_and_earlier_ones_stay_byte_identical(tmp_path):
    path, now = tmp_path / 'metrics.jsonl', Time()
    kept = line(10) + line(20) + line(20, kind='eval', full=True, phase='\u00e9', tiny=1.0000000000000002e-300)
    path.write_text(kept + line(30) + line(40) + '{"step": 50, "pha')
    with log_of(tmp_path, now) as log:
        assert path.read_text() == kept + line(30) + line(40) + '{"step": 50, "pha', 'opens nothing yet'
        log.open(20, None)
        now.t += 2
        log.write(25, log.run.phases[1], 'eval', {'fve': 0.5})
    text = path.read_bytes()
    assert text.startswith(kept.encode())
    lost, new = (json.loads(x) for x in text[len(kept.encode()) :].splitlines())
    assert (lost['kind'], lost['step'], lost['lost_part_s']) == ('time', 20, 30)
    assert new == {'step': 25, 'phase': 'grpo', 'kind': 'eval', 'fve': 0.5, 'wall_s': 32.0}
    with log_of(tmp_path, now) as log:
        log.open(0, None)  # a fresh run
    assert [r['kind'] for r in files.read_jsonl(path)] == ['time'] and curve(tmp_path) == []


def test_parts_lost_and_other_are_the_wall_time():
    now = Time()
    clock = Clock(now(), now)
    now.t += 3
    assert clock.seconds['start'] == 3
    clock.go_on([], 0)
    for part, s in (('compile', 7), ('step', 20), ('data', 1), ('step', 10), ('log', 0.5)):
        now.spend(clock, part, s)
    now.t += 8.5
    expected = dict.fromkeys((*logger.PARTS, 'lost', 'other'), 0)
    expected |= {'start': 3, 'compile': 7, 'step': 30, 'data': 1, 'log': 0.5, 'other': 8.5}
    assert clock.seconds == expected and clock.wall_s == 50
    assert clock.goodput == 30 / 50
    with clock.part('checkpoint'):  # what is written into a checkpoint counts the part that is open
        now.t += 10
        assert clock.seconds == expected | {'checkpoint': 10}
        assert clock.goodput == 30 / 60
    assert clock.seconds == expected | {'checkpoint': 10}


def test_parts_do_not_nest():
    now = Time()
    clock = Clock(now(), now)
    clock.go_on([], 0)
    with pytest.raises(RuntimeError, match="'data' begins inside part 'step'"), clock.part('step'):
        now.t += 4
        with clock.part('data'):
            pass
    now.spend(clock, 'data', 2)
    assert (clock.seconds['step'], clock.seconds['data']) == (4, 2)  # an exception ends its part too


@pytest.mark.parametrize('step', [0, 5])
def test_what_several_kills_between_two_checkpoints_cost_is_added(tmp_path, step):
    """Killed 40 s after the checkpoint, again 7 s after that start, again 2 s after the next."""
    path, wall_s = tmp_path / 'metrics.jsonl', 10.0 * bool(step)
    saved = {'step': 5, 'phase': 'grpo', 'kind': 'time', 'start_part_s': 2.0, 'step_part_s': 7.5, 'wall_s': 10.0}
    files.write_jsonl(
        path, [*[saved] * bool(step), {'step': 6, 'phase': 'grpo', 'kind': 'train', 'wall_s': wall_s + 40}]
    )
    for n, (lost_s, work_s) in enumerate(((40, 7), (47, 2), (49, 5)), 1):
        now = Time(77.0 * n)  # another process: another origin of time
        with log_of(tmp_path, now) as log:
            now.t += 3
            log.open(step, None)
            seconds = log.clock.seconds
            assert (seconds['lost'], seconds['other']) == (lost_s, 0.5 * bool(step))
            assert (seconds['step'], seconds['start']) == (7.5 * bool(step), 2.0 * bool(step) + 3 * n)
            assert log.clock.wall_s == wall_s + 3 * n
            last = files.read_jsonl(path)[-1]
            assert (last['kind'], last['step'], last['phase']) == ('time', step, 'grpo' if step else 'sft')
            assert sum(v for k, v in last.items() if k.endswith('_part_s')) == last['wall_s'] + lost_s
            assert curve(tmp_path) == []
            now.spend(log, 'step', work_s)
            log.write(6, log.run.phases[1], 'train', {})


def test_seconds_of_a_step_are_those_of_its_phase_without_pauses():
    now = Time()
    clock = Clock(now(), now)
    for name, step_s, laps in (('sft', 0.25, 60), ('grpo', 2.0, 3)):
        clock.pause()
        medians = []
        for _ in range(laps):
            now.t += step_s
            medians.append(clock.lap(name))
        assert medians == [0.0] + (laps - 1) * [step_s]
    now.t += 100.0  # from one phase to the next nothing is a step, paused or not
    assert clock.lap('sft') == 0.0


def test_figures_are_settled_one_step_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flops, 'peak', lambda kind: 8e12)
    now, path = Time(), tmp_path / 'metrics.jsonl'
    with log_of(tmp_path, now, log=2) as log:
        log.open(0, None)
        sft, grpo = log.run.phases
        for step in (1, 2, 3):
            log.sent(sft, step, out(loss_decoder=2.0), 0.0)
            assert [r['step'] for r in files.read_jsonl(path)] == [2] * (step > 2)
        log.sent(sft, 4, out(loss_decoder=2.0), 0.0)
        for step in range(5, 11):
            now.t += 0.5
            log.sent(grpo, step, out(reward=-0.75), 2e12 * (1 + step % 2 * 2))  # of two widths in turn
        now.t += 0.5
        log.settle(pause=True)
        log.settle()
        now.t += 100
        log.held_out(grpo, 10, {'fve': 0.5, 'cosine': 0.25, 'fve_given': 0.75}, full=True)
    rows = files.read_jsonl(path)
    assert [r['step'] for r in rows] == [2, 4, 6, 8, 10, 10]
    timed = {'loss_encoder', 'fve', 'step_s', 'wall_s', 'step', 'phase', 'kind'}
    assert rows[1].keys() == timed | {'loss_decoder'} and rows[1]['step_s'] == 0.0
    # two devices: 18e12 FLOPs of the last five steps, of half a second each
    assert rows[4] == {
        'step': 10,
        'phase': 'grpo',
        'kind': 'train',
        'loss_encoder': 0.5,
        'fve': 0.25,
        'reward': -0.75,
        'step_s': 0.5,
        'tflops_s': 3.6,
        'mfu': 0.45,
        'wall_s': 3.5,
    }
    assert curve(tmp_path)[4].keys() == {'step', 'phase', 'kind', 'loss_encoder', 'fve', 'reward'}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2  # one line for ten steps
    assert ' 10/100  reward -0.750  encoder loss 0.500  FVE 0.250  ETA 0:45' in said[0]
    assert said[1] == 'held out at step 10: fve 0.500'


def test_slow_steps_are_said_every_minute(tmp_path, capsys):
    now = Time()
    with log_of(tmp_path, now, log=20) as log:
        log.open(0, None)
        for step in range(1, 9):
            now.t += 25
            log.sent(log.run.phases[1], step, out(reward=-0.75), 0.0)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ['2/100', '5/100']


@pytest.mark.parametrize(('good', 'words'), [(3, 'is step 3 in'), (None, 'is none in')])
def test_a_loss_that_is_not_finite_names_step_documents_and_the_last_good_checkpoint(
    tmp_path, monkeypatch, good, words
):
    monkeypatch.setattr(feed, 'batch_documents', lambda *args: args[1:])
    with log_of(tmp_path, Time()) as log:
        log.open(0, None)
        log.last_good = lambda: good
        log.sent(log.run.phases[1], 9, out(reward=float('inf')), 0.0)
        # 4 documents a step, seed 7 + 4, the fifth step of the phase
        with pytest.raises(
            LensError, match=rf'reward is not finite at step 9 \(phase grpo, documents \(4, 11, 4\)\).* {words}'
        ) as e:
            log.settle()
    assert str(tmp_path) in str(e.value) and 'lower the learning rates' in str(e.value)


def test_phases_that_draw_samples_are_watched_also_after_a_restart(tmp_path, capsys):
    now = Time()
    dead = {'reward_group_std': 0.0}
    with log_of(tmp_path, now, 'stop') as log:
        log.open(0, None)
        for step in range(1, WINDOW + 4):
            log.sent(log.run.phases[0], step, out(**dead), 0.0)
        for step in range(5, WINDOW + 6):
            log.sent(log.run.phases[1], step, out(**dead), 0.0)
        log.settle()
        state = json.loads(json.dumps(log.watch.get_state()))
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith('warning: ')]
    assert len(said) == 1 and f'Collapse at step {WINDOW + 4}' in said[0]
    with log_of(tmp_path, now, 'stop') as log:
        log.open(WINDOW + 5, state)
        with pytest.raises(LensError, match=f'Stopped at step {2 * WINDOW + 4}'):
            for step in range(WINDOW + 6, 100):
                log.sent(log.run.phases[1], step, out(**dead), 0.0)


@pytest.mark.parametrize(
    ('seconds', 'text'), [(0, '0:00'), (59.9, '0:59'), (61, '1:01'), (3600, '1:00:00'), (36061, '10:01:01')]
)
def test_clock(seconds, text):
    assert logger.clock(seconds) == text


def test_provenance_says_device_versions_commit_and_command():
    p = logger.provenance()
    assert p.keys() >= {'device', 'versions', 'commit', 'command'}
    assert {'python', 'jax'} <= p['versions'].keys() and p['device'] and p['commit'] and p['command']


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    stats = [{'peak_bytes_in_use': 3_000_000_000, 'bytes_in_use': 9}, {'peak_bytes_in_use': 71_500_000_000}, None]
    monkeypatch.setattr(jax, 'local_devices', lambda: [device(s) for s in stats])
    assert logger.peak_memory_gb() == 71.5


def test_peak_memory_without_device_counts_is_the_resident_peak_of_the_process():
    held = np.ones(30_000_000)  # 0.24 GB
    status = dict(line.split(':', 1) for line in pathlib.Path('/proc/self/status').read_text().splitlines())
    peak_gb, now_gb = (int(status[k].split()[0]) * 1024 / 1e9 for k in ('VmHWM', 'VmRSS'))
    assert now_gb > held.nbytes / 1e9
    # the kernel counts pages per thread and adds them up now and then; a parent's peak may be inherited
    assert 0.99 * peak_gb <= logger.peak_memory_gb() < 1000


@pytest.mark.parametrize(
    'text', ['10', '10:', ':5', '0:5', '5:0', '-1:5', 'a:b', '1:2:3', '1.5:2', ' 1:2', '\u0661:\u0662']
)
def test_a_profile_that_is_no_window_is_refused(text, tmp_path):
    with pytest.raises(LensError, match=r'--profile=.* is not START:COUNT: give two whole numbers from 1 on'):
        Profile(text, tmp_path, print)


@pytest.fixture
def calls(monkeypatch):
    out = []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: out.append(('start', folder)))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: out.append(('stop',)))
    return out


@pytest.mark.parametrize('begin', [1, 201])  # a fresh run, a restarted one
def test_the_window_counts_the_steps_of_this_process(calls, tmp_path, begin):
    said = []
    profile = Profile('3:2', tmp_path, said.append)
    for step in range(begin, begin + 8):
        calls.append(step - begin + 1)
        profile.at(step)
    profile.close()
    folder = str(tmp_path / 'profile')
    assert calls == [1, 2, 3, ('start', folder), 4, 5, ('stop',), 6, 7, 8]
    assert said == [f'Profile of steps {begin + 2} to {begin + 3}: tensorboard --logdir={folder}']


def test_a_run_that_ends_inside_the_window_closes_its_trace_once(calls, tmp_path):
    said = []
    profile = Profile('2:10', tmp_path, said.append)
    for step in range(1, 5):
        profile.at(step)
    profile.close()
    profile.close()
    assert [c[0] for c in calls] == ['start', 'stop'] and 'steps 2 to 4:' in said[0] and len(said) == 1


def test_without_a_window_or_before_it_nothing_is_traced(calls, tmp_path):
    for text in ('', '5:1'):
        profile = Profile(text, tmp_path, print)
        for step in range(1, 4):
            profile.at(step)
        profile.close()
    assert calls == []


def test_the_state_is_waited_for_before_the_trace_begins_and_ends(calls, tmp_path, monkeypatch):
    state = jnp.ones((7, 11, 13))
    jnp.ones((7, 11, 17)).delete()  # as donation does
    monkeypatch.setattr(
        jax, 'block_until_ready', lambda xs: calls.append('waited' if any(x.shape == state.shape for x in xs) else '')
    )
    profile = Profile('2:2', tmp_path, print)
    for step in range(1, 6):
        profile.at(step)
    assert calls == ['waited', ('start', str(tmp_path / 'profile')), 'waited', ('stop',)]


def test_the_trace_holds_the_steps_of_the_window_alone(tmp_path):
    def program(name):
        def f(x):
            return jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ y), x)

        f.__name__ = name
        return jax.jit(f)

    programs = {step: program(f'program_of_step_{step}') for step in range(1, 6)}
    x = jnp.eye(192)
    for f in programs.values():
        f(x).block_until_ready()
    said, states = [], []
    profile = Profile('2:2', tmp_path, said.append)
    for step, f in programs.items():
        profile.at(step)
        states.append(f(x))  # dispatched, not waited for
    profile.close()
    assert len(said) == 1
    (trace,) = (tmp_path / 'profile').rglob('*.trace.json.gz')
    text = gzip.decompress(trace.read_bytes()).decode()
    assert [step for step in programs if f'program_of_step_{step}' in text] == [2, 3]
