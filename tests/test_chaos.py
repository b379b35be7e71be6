"""The harness of `make chaos` in small, and what it checks with."""

import contextlib
import random
import re

import pytest

from tests.chaos import Chaos, chaos, compare
from tests.chaos_runs import GOES_ON, Disturbance, Fault, Trial, plan


def disturb(tmp_path, processes, *disturbances):
    """The lines of the table, and the last one."""
    said = []
    given = [Disturbance(*d.split()) for d in disturbances]
    last = chaos(tmp_path, given, processes, random.Random(1), ('sft',), 0, said.append)
    assert len(said) == 2 + len(given), said
    assert re.search(r'steps repeated at most \d+ \(checkpoint interval 5\); curve identical$', last)
    return said[2:], last


@pytest.mark.slow
def test_one_process_is_killed_and_stopped(tmp_path):
    rows, last = disturb(tmp_path, 1, 'kill writing', 'SIGUSR1 step')
    stopped = rows[1].split()
    assert stopped[2] == stopped[3] == stopped[4], 'a signal saves that very step'
    assert last.startswith('chaos: 2 disturbances, 1 of them kill -9, of 1 process in ')


@pytest.mark.parametrize(('kills', 'processes'), [(20, 1), (4, 2), (1, 1), (0, 2)])
def test_a_plan_has_its_kills_and_half_as_many_others(kills, processes):
    for seed in range(20):
        made = plan(kills, processes, random.Random(seed))
        killed = [d.kind in ('kill', 'damage') for d in made]
        assert (sum(killed), len(made)) == (kills, kills + kills // 2)
        starts = [i for i, d in enumerate(made) if d.instant == 'start']
        assert not any(made[i - 1].kind in GOES_ON for i in starts if i)
        assert made == plan(kills, processes, random.Random(seed))


RUN = {
    'metrics.jsonl': '{"step": 1, "kind": "train", "loss": 2.5, "wall_s": 3.5}\n{"step": 1, "kind": "time", "x": 1}\n',
    'summary.json': '{"fve": 0.5, "steps": 1, "wall_s": 4.5, "best_step": 1}',
    'samples.jsonl': '{"text": "a"}\n',
}


@pytest.mark.parametrize(
    ('file', 'old', 'new', 'message'),
    [
        ('metrics.jsonl', '3.5', '4.5', None),
        ('metrics.jsonl', '"x": 1', '"x": 2', None),
        ('summary.json', '4.5', '5.5', None),
        ('metrics.jsonl', '2.5', '2.5000001', r"the curves differ in \['loss'\]"),
        ('metrics.jsonl', RUN['metrics.jsonl'], '', 'the curves differ in .*: disturbed None'),
        ('summary.json', '0.5', '0.6', r"the figures at the end differ: \['fve'\]"),
        ('samples.jsonl', 'a', 'b', r"the figures at the end differ: \['samples'\]"),
    ],
)
def test_what_differs_between_two_runs_is_named(tmp_path, file, old, new, message):
    for name in ('calm', 'disturbed'):
        (tmp_path / name).mkdir()
        for other, text in RUN.items():
            assert other != file or old in text
            changed = text.replace(old, new, 1) if (name, other) == ('disturbed', file) else text
            (tmp_path / name / other).write_text(changed)
    with contextlib.nullcontext() if message is None else pytest.raises(Fault, match=message):
        compare(tmp_path / 'disturbed', tmp_path / 'calm')


class Played(Trial):
    """A run that goes on from `step` with the newest checkpoint at 10."""

    def __init__(self, tmp_path, step, printed=''):
        super().__init__([], tmp_path / 'w', tmp_path / 'output', 1)
        self.step, self.starts = step, 1
        (self.output / '1').write_text(printed)

    def begins_again(self):
        return self.step


@pytest.mark.parametrize(
    ('reached', 'step', 'kind', 'printed', 'message'),
    [
        (14, 10, 'kill', '', None),
        (14, 5, 'kill', '', 'went on from step 5, and the newest checkpoint was of step 10'),
        (14, 0, 'kill', '', 'went on from step 0'),
        (21, 10, 'kill', '', '11 steps are lost'),
        (14, 10, 'kill', 'warning: 15 is damaged', 'a checkpoint that nobody has damaged cannot be read'),
        (14, 5, 'damage', 'warning: 10 is damaged', None),
        (14, 5, 'damage', '', 'went on from step 5'),
        (21, 5, 'damage', 'warning: 10 is damaged', '16 steps are lost'),
    ],
)
def test_where_a_run_goes_on_is_checked(tmp_path, reached, step, kind, printed, message):
    harness = Chaos(Played(tmp_path, step, printed), [], random.Random(0), 1.0, say=lambda text: None)
    d = Disturbance(kind, 'step', reached, kept=10)
    harness.pending = [d]
    if message is None:
        harness._begins()
        assert d.resumed == step and d.repeated == reached - step
    else:
        with pytest.raises(Fault, match=message):
            harness._begins()
