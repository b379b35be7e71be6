"""Rules of collapse against means by numpy, and a watch that goes on from a checkpoint."""

import json

import numpy as np
import pytest

from lens.collapse import WINDOW, Collapse
from lens.errors import LensError

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
    with pytest.raises(LensError, match=rf'^Stopped at step {begin + WINDOW}: .*lower .*grpo\.learning_rate_decoder'):
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


def test_off_says_nothing():
    assert feed(Collapse('off'), course('extracted', 0.0)) == {}


@pytest.mark.parametrize('cut', [7, 35, 45, 62, 80])
def test_a_restarted_watch_warns_and_stops_where_an_uninterrupted_one_does(cut):
    rows = [HEALTHY] * 30 + [HEALTHY | {'text_len': 1.0}] * 18 + [HEALTHY] * 5 + [HEALTHY | {'text_len': 1.0}] * 60

    def until_stop(watch, start):
        found = {}
        for s in range(start, len(rows) + 1):
            try:
                w = watch.feed('grpo', s, rows[s - 1])
            except LensError as e:
                return found | {s: [str(e)]}
            found |= {s: w} if w else {}
        return found

    whole = until_stop(Collapse('stop'), 1)
    assert len(whole) >= 2 and 'Stopped' in whole[max(whole)][0]
    first, second = Collapse('stop'), Collapse('stop')
    found = feed(first, rows[:cut])
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert found | until_stop(second, cut + 1) == whole
