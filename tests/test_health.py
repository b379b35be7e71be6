"""Goodput against sums by hand, collapse rules against means by numpy, the profiler's window against its trace."""

import gzip
import json
import pathlib
import time
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from lens import files, health, record
from lens.errors import LensError
from lens.health import WINDOW, Collapse, CollapseError, Goodput, Profile


class Time:
    """A clock that goes when it is told to."""

    def __init__(self, t=1000.0):
        self.t = t

    def __call__(self):
        return self.t

    def spend(self, clock, part, seconds):
        with clock.part(part):
            self.t += seconds


def test_parts_lost_and_other_are_the_wall_time():
    now = Time()
    clock = Goodput(now=now)
    assert clock.goodput == 0 and set(clock.seconds.values()) == {0}
    for part, s in (('start', 3), ('compile', 7), ('step', 20), ('data', 1), ('step', 10), ('log', 0.5)):
        now.spend(clock, part, s)
    now.t += 8.5
    expected = dict.fromkeys((*health.PARTS, 'lost', 'other'), 0) | {
        'start': 3,
        'compile': 7,
        'step': 30,
        'data': 1,
        'log': 0.5,
        'other': 8.5,
    }
    assert clock.seconds == expected
    assert clock.goodput == 30 / 50
    with clock.part('checkpoint'):  # what is written into a checkpoint counts the part that is open
        now.t += 10
        assert clock.seconds == expected | {'checkpoint': 10}
        assert clock.goodput == 30 / 60
    assert clock.seconds == expected | {'checkpoint': 10}


def test_a_restart_goes_on_from_the_checkpoint_and_counts_what_was_lost():
    now = Time()
    first = Goodput(now=now)
    now.spend(first, 'step', 40)
    now.t += 2
    saved = json.loads(json.dumps(first.seconds))
    now = Time(7.0)  # another process: another origin of time
    second = Goodput(saved, lost_s=11, now=now)
    now.spend(second, 'start', 5)
    now.spend(second, 'step', 22)
    now.t += 1
    s = second.seconds
    assert (s['step'], s['start'], s['lost'], s['other']) == (62, 5, 11, 3)
    assert sum(s.values()) == 42 + 11 + 28
    assert second.goodput == 62 / 81
    assert Goodput(s, lost_s=2, now=now).seconds == s | {'lost': 13}


def test_parts_do_not_nest_and_have_known_names():
    now = Time()
    clock = Goodput(now=now)
    with pytest.raises(RuntimeError, match="'data' begins inside part 'step'"), clock.part('step'):
        now.t += 4
        with clock.part('data'):
            pass
    now.spend(clock, 'data', 2)
    assert (clock.seconds['step'], clock.seconds['data']) == (4, 2)  # an exception ends its part too
    with pytest.raises(ValueError, match="'sampling' is none of start, compile"), clock.part('sampling'):
        pass


def test_lost_seconds_are_those_of_the_rows_after_the_checkpoint():
    rows = [{'step': s, 'wall_s': w} for s, w in ((10, 4.0), (20, 9.0), (20, 9.5), (30, 13.0), (40, 17.25))]
    assert health.lost_seconds(rows, 20) == 7.75
    assert health.lost_seconds(rows, 40) == 0
    assert health.lost_seconds(rows, 0) == 17.25
    assert health.lost_seconds([], 0) == 0


def reopened(workdir, step):
    """The record of a run of 9 steps that goes on after a kill."""
    log = {'tensorboard': False, 'wandb_project': ''}
    cfg = ml_collections.ConfigDict({'log': log, 'health': {'collapse': 'off'}})
    phases = [types.SimpleNamespace(name='sft', start=0, end=4), types.SimpleNamespace(name='grpo', start=4, end=9)]
    run = types.SimpleNamespace(steps=9, phases=phases)
    return record.Record(cfg, run, workdir, time.monotonic(), None, step, None, None)


@pytest.mark.parametrize('step', [0, 5])
def test_what_several_kills_between_two_checkpoints_cost_is_added(tmp_path, step):
    """Killed 40 s after the checkpoint, again 7 s after that start, again 2 s after the next."""
    path = tmp_path / 'metrics.jsonl'
    saved = {'step': 5, 'phase': 'grpo', 'kind': 'time', 'start_part_s': 2.0, 'step_part_s': 7.5, 'wall_s': 10.0}
    kept = [saved] if step else []
    files.write_jsonl(path, [*kept, {'step': 6, 'kind': 'train', 'wall_s': 10.0 * len(kept) + 40}])
    for lost_s, work_s in ((40, 7), (47, 2), (49, None)):
        with reopened(tmp_path, step) as r:
            seconds = r.clock.seconds
        assert seconds['lost'] == pytest.approx(lost_s, abs=0.3)
        assert seconds['step'] == 7.5 * len(kept)
        last = files.read_jsonl(path)[-1]
        assert (last['kind'], last['step'], last['phase']) == ('time', step, 'grpo' if step else 'sft')
        assert sum(v for k, v in last.items() if k.endswith('_part_s')) == pytest.approx(
            last['wall_s'] + lost_s, abs=0.6
        )
        assert record.curve(tmp_path) == []
        if work_s:
            path.write_text(
                path.read_text() + json.dumps({'step': 6, 'kind': 'train', 'wall_s': last['wall_s'] + work_s}) + '\n'
            )


HEALTHY = {
    'reward_group_std': 0.2,
    'entropy_nats': 0.7,
    'text_len': 12.0,
    'extracted': 1.0,
    'repeated': 0.1,
    'fve': 0.5,
}
# metric, its value from step 31 on, and when a mean of the last steps is a collapse
CASES = {
    'spread': ('reward_group_std', 0.0, lambda now, first: now < 1e-4),
    'entropy': ('entropy_nats', 0.001, lambda now, first: now < 0.05 * first and now < 0.05),
    'length': ('text_len', 3.0, lambda now, first: now < 0.3 * first),
    'failed': ('extracted', 0.0, lambda now, first: now == 0),
    'repeated': ('repeated', 0.9, lambda now, first: now > 0.5),
}


def course(metric, bad, good=30, steps=120):
    """Figures of every step: healthy ones, then `metric` at `bad`."""
    return [HEALTHY | ({metric: bad} if s > good else {}) for s in range(1, steps + 1)]


def feed(watch, rows, phase='grpo', start=1):
    """{step: warnings} of the steps that gave any."""
    out = {start + i: watch.feed(phase, start + i, row) for i, row in enumerate(rows)}
    return {s: w for s, w in out.items() if w}


@pytest.mark.parametrize('case', CASES)
def test_a_collapse_warns_once_and_stops_when_the_next_window_agrees(case):
    metric, bad, collapsed = CASES[case]
    rows = course(metric, bad)
    values = np.array([r[metric] for r in rows])
    means = np.convolve(values, np.ones(WINDOW) / WINDOW, 'valid')  # [i] is that of steps i+1..i+WINDOW
    begin = WINDOW + next(i for i, m in enumerate(means) if collapsed(m, means[0]))
    found = feed(Collapse('warn'), rows)
    assert list(found) == [begin] and len(found[begin]) == 1
    assert f'at step {begin}:' in found[begin][0] and 'phase grpo' in found[begin][0]
    watch = Collapse('stop')
    assert feed(watch, rows[: begin + WINDOW - 1]) == found
    with pytest.raises(
        CollapseError, match=rf'^Stopped at step {begin + WINDOW}: .*lower .*grpo\.learning_rate_decoder'
    ):
        watch.feed('grpo', begin + WINDOW, rows[begin + WINDOW - 1])


def test_warnings_say_the_figures():
    rows = course('entropy_nats', 0.0, steps=70)
    (step, (text,)), *_ = feed(Collapse('warn'), rows).items()
    now = np.mean([r['entropy_nats'] for r in rows[step - WINDOW : step]])
    assert f'from 0.7 to {now:.3g} nats per token' in text


@pytest.mark.parametrize(
    'change',
    [
        {'reward_group_std': (0.2, 2e-4)},
        {'entropy_nats': (0.7, 0.042)},  # 6%
        {'entropy_nats': (0.3, 0.02)},  # low from the start: a decoder that is sure of itself
        {'entropy_nats': (4.0, 0.1)},  # 2.5%, and still not fixed
        {'text_len': (12.0, 3.8)},
        {'extracted': (1.0, 0.01)},
        {'repeated': (0.1, 0.49)},
        {'repeated': (0.3, 0.95)},  # short texts repeat from the start
    ],
    ids=str,
)
def test_what_is_no_collapse_gives_no_warning(change):
    rng = np.random.default_rng(0)
    rows = []
    for s in range(200):
        row = {k: v[s >= 30] for k, v in change.items()}
        rows.append({k: v * rng.uniform(0.99, 1) for k, v in (HEALTHY | row).items()})
    assert feed(Collapse('stop'), rows) == {}


def test_steps_without_any_explanation_say_nothing_of_their_length():
    failed = HEALTHY | {'extracted': 0.0, 'text_len': 0.0}
    found = feed(Collapse('warn'), [HEALTHY] * 30 + [failed] * 30)
    assert list(found) == [50] and len(found[50]) == 1 and 'no response holds an explanation' in found[50][0]
    mixed = [HEALTHY, failed, failed, failed] * 30
    assert feed(Collapse('stop'), mixed) == {}
    # a fifth of the steps hold explanations, all short
    short = [HEALTHY | {'text_len': 1.0}] + [failed] * 4
    found = feed(Collapse('warn'), [HEALTHY] * 20 + short * 20)
    assert [w for (w,) in found.values() if 'have shrunk from 12 to' in w]


def test_a_collapse_is_reported_again_after_it_has_been_gone_for_a_window():
    bad, good = HEALTHY | {'extracted': 0.0}, HEALTHY
    # the rule holds while all of the window is bad; one good step ends that for WINDOW steps, which is no recovery
    flicker = [good] * 20 + [bad] * 25 + [good] + [bad] * 22
    assert list(feed(Collapse('warn'), flicker)) == [40]
    again = [good] * 20 + [bad] * 25 + [good] * 2 + [bad] * 22
    assert list(feed(Collapse('warn'), again)) == [40, 67]
    watch = Collapse('stop')  # interrupted alarms do not add up
    feed(watch, again)


def test_a_new_phase_starts_afresh():
    watch = Collapse('warn')
    short = HEALTHY | {'text_len': 2.0}
    assert list(feed(watch, [HEALTHY] * 30 + [short] * 30)) != []
    assert feed(watch, [short] * 60, phase='second', start=61) == {}
    dead = HEALTHY | {'reward_group_std': 0.0}
    assert list(feed(watch, [dead] * 30, phase='third', start=121)) == [121 + WINDOW - 1]
    assert list(feed(watch, [dead] * 30, phase='fourth', start=151)) == [151 + WINDOW - 1]


def test_metrics_that_a_phase_does_not_have_are_no_collapse():
    row = {'entropy_nats': 0.7, 'repeated': 0.0, 'loss_encoder': 0.4}  # gumbel without tags
    assert feed(Collapse('stop'), [row] * 100) == {}
    assert list(feed(Collapse('warn'), [row] * 30 + [row | {'repeated': 1.0}] * 30)) != []


def test_off_says_nothing_and_another_action_is_refused():
    assert feed(Collapse('off'), course('extracted', 0.0)) == {}
    with pytest.raises(LensError, match="'halt' is no answer to a collapse: use one of off, warn, stop"):
        Collapse('halt')


@pytest.mark.parametrize('cut', [7, 20, 35, 45, 62, 80])
def test_a_restarted_watch_warns_and_stops_where_an_uninterrupted_one_does(cut):
    rows = [HEALTHY] * 30 + [HEALTHY | {'text_len': 1.0}] * 18 + [HEALTHY] * 5 + [HEALTHY | {'text_len': 1.0}] * 60

    def until_stop(watch, start):
        found = {}
        for s in range(start, len(rows) + 1):
            try:
                w = watch.feed('grpo', s, rows[s - 1])
            except CollapseError as e:
                return found | {s: [str(e)]}
            found |= {s: w} if w else {}
        return found

    whole = until_stop(Collapse('stop'), 1)
    assert len(whole) >= 2 and 'Stopped' in whole[max(whole)][0]
    first, second = Collapse('stop'), Collapse('stop')
    found = feed(first, rows[:cut])
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert found | until_stop(second, cut + 1) == whole


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    stats = [{'peak_bytes_in_use': 3_000_000_000, 'bytes_in_use': 9}, {'peak_bytes_in_use': 71_500_000_000}, None]
    monkeypatch.setattr(jax, 'local_devices', lambda: [device(s) for s in stats])
    assert health.peak_memory_gb() == 71.5


def test_peak_memory_without_device_counts_is_the_resident_peak_of_the_process():
    held = np.ones(30_000_000)  # 0.24 GB
    status = dict(line.split(':', 1) for line in pathlib.Path('/proc/self/status').read_text().splitlines())
    peak_gb, now_gb = (int(status[k].split()[0]) * 1024 / 1e9 for k in ('VmHWM', 'VmRSS'))
    assert now_gb > held.nbytes / 1e9
    # the kernel counts pages per thread and adds them up now and then; a parent's peak may be inherited
    assert 0.99 * peak_gb <= health.peak_memory_gb() < 1000


@pytest.mark.parametrize(
    'text', ['10', '10:', ':5', '0:5', '5:0', '-1:5', '1:-2', 'a:b', '1:2:3', '1.5:2', ' 1:2', '\u0661:\u0662']
)
def test_a_profile_that_is_no_window_is_refused(text, tmp_path):
    with pytest.raises(LensError, match=r'--profile=.* is not START:COUNT: give two whole numbers from 1 on'):
        Profile.parse(text, tmp_path)


@pytest.fixture
def calls(monkeypatch):
    out = []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: out.append(('start', folder)))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: out.append(('stop',)))
    return out


@pytest.mark.parametrize('begin', [1, 201])  # a fresh run, a restarted one
def test_the_window_counts_the_steps_of_this_process(calls, tmp_path, begin):
    said, ended = [], []
    profile = Profile.parse('3:2', tmp_path, said.append)
    for step in range(begin, begin + 8):
        calls.append(step - begin + 1)
        ended += [step] if profile.at(step) else []
    profile.close()
    assert ended == [begin + 4]
    folder = str(tmp_path / 'profile')
    assert calls == [1, 2, 3, ('start', folder), 4, 5, ('stop',), 6, 7, 8]
    assert said == [f'Profile of steps {begin + 2} to {begin + 3}: tensorboard --logdir={folder}']


def test_a_run_that_ends_inside_the_window_closes_its_trace_once(calls, tmp_path):
    said = []
    profile = Profile.parse('2:10', tmp_path, said.append)
    for step in range(1, 5):
        profile.at(step)
    profile.close()
    profile.close()
    assert [c[0] for c in calls] == ['start', 'stop'] and 'steps 2 to 4:' in said[0] and len(said) == 1


def test_without_a_window_or_before_it_nothing_is_traced(calls, tmp_path):
    for text in ('', '5:1'):
        profile = Profile.parse(text, tmp_path)
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
    profile = Profile.parse('2:2', tmp_path)
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
    profile = Profile.parse('2:2', tmp_path, said.append)
    for step, f in programs.items():
        profile.at(step)
        states.append(f(x))  # dispatched, not waited for
    profile.close()
    assert len(said) == 1
    (trace,) = (tmp_path / 'profile').rglob('*.trace.json.gz')
    text = gzip.decompress(trace.read_bytes()).decode()
    assert [step for step in programs if f'program_of_step_{step}' in text] == [2, 3]
