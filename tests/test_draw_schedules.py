"""The drawing of a configuration's schedules: panels and curves."""

import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from configs import tiny
from lens.errors import LensError
from lens.tools import draw_schedules


def test_the_drawing_has_a_panel_for_every_value_of_every_phase(tmp_path, monkeypatch):
    seen = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (seen.append(self), save(self, *a, **k))[1])
    c = tiny.get_config()
    c.grpo.tau = 'cosine 5 0.1 after 100s'
    c.grpo.table = (('^encoder/base/', None), ('^encoder/', 0.5, 0.0, 'encoder', '90s'), ('.', 1.0, 0.0, 'all', '0'))
    draw_schedules.draw(c, None, tmp_path / 'new/s.png')
    assert (tmp_path / 'new/s.png').read_bytes().startswith(b'\x89PNG')
    axes = {a.get_title().split(' = ')[0]: a for a in seen[0].axes}
    shown = {v for v in draw_schedules.VALUES if any(c[p][v] != 0 for p in c.phases)}
    assert set(axes) == {f'{p}.{v}' for p in c.phases for v in shown} and len(shown) < len(draw_schedules.VALUES)
    t, tau = axes['grpo.tau'].lines[0].get_data()
    want = np.where(t < 100, 5, 0.1 + 2.45 * (1 + np.cos(math.pi * np.clip((t - 100) / 349, 0, 1))))
    np.testing.assert_allclose(tau, want, rtol=1e-4)
    rates = {line.get_label(): line.get_data() for line in axes['grpo.learning_rate_encoder'].lines}
    assert set(rates) == {'x 0.5 from 90 on: ^encoder/', 'x 1 from 0 on: .'}
    (t, half), (_, whole) = rates['x 0.5 from 90 on: ^encoder/'], rates['x 1 from 0 on: .']
    np.testing.assert_allclose(half, np.where(t < 90, 0, whole / 2), rtol=1e-6)


def test_documents_are_those_that_may_be_read(tmp_path):
    c = tiny.get_config()
    c.data.path = str(tmp_path)
    assert draw_schedules.count_documents(c) is None
    folder = tmp_path / 'train'
    folder.mkdir()
    (folder / 'meta.json').write_text(json.dumps({'format': 'lens-tokens/1', 'vocab_size': 9}))
    np.save(folder / 'tokens.npy', np.zeros((5, 12), np.int32))
    np.save(folder / 'lengths.npy', np.full(5, 12, np.int32))
    np.save(folder / 'doc_id.npy', np.arange(5))
    assert draw_schedules.count_documents(c) == 5


def test_nothing_to_draw_is_refused(tmp_path):
    c = tiny.get_config()
    c.phases = ()
    with pytest.raises(LensError, match='phases is empty'):
        draw_schedules.draw(c, None, tmp_path / 's.png')
