"""A family, an objective, an injection, a figure and a schedule key from outside the package, in one run of two steps."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lens import metrics, objectives
from lens.files import read_json, read_jsonl
from lens.metrics import Figure
from lens.models import families, injection, tensors
from lens.models.families import Family
from lens.models.injection import Injection
from lens.objectives import Objective
from tests.small_run import config, train

MODELS = []  # (family, norm_eps) of those that the injection has written into


def toy_family(config: dict):
    """A llama whose file names one number in its own way."""
    return families.FAMILIES['llama'].read(config | {'rms_norm_eps': config['softness']})


def warm_loss(lens, base, roll, key, hp, knobs, reference):
    """The loss of sft with a pull on the read-out whose weight is a schedule."""
    loss, figures = objectives.sft(lens, base, roll, key, hp, knobs, reference)
    pull = jnp.mean(lens.encoder.readout_b[...] ** 2)
    return loss + knobs['warmth'] * pull, figures | {'pull': pull, 'warmth_now': knobs['warmth']}


@dataclasses.dataclass(frozen=True)
class Shifted(Injection):
    """One map, which fills the slot and is added to it again at the entrance of a block."""

    block: int
    name = 'shifted'
    n_maps = 1
    place = 'fills the slot'

    @classmethod
    def from_config(cls, d, c):
        return cls(d.block)

    def enter(self, decoder, model, a_BxD):
        MODELS.append((model.config.family, model.config.norm_eps))
        value = a_BxD @ decoder.maps_w[...][0] + decoder.maps_b[...][0]

        def add(x, block):
            moved = injection.overwrite(x, decoder.slots, x[:, decoder.slots[0]] + value)
            return jnp.where(block == self.block, moved, x)

        return value, add


def widest(collected, text) -> dict:
    return metrics.mean(np.abs(collected.pred[text]).max(1), collected.doc_N)


@pytest.fixture
def added(monkeypatch):
    warm = Objective(objectives.given_rollout, warm_loss, shows=(('pull', 'pull'),), samples=False)
    monkeypatch.setitem(families.FAMILIES, 'toy', Family('ToyForCausalLM', toy_family, tensors.LLAMA, families.LLAMA))
    monkeypatch.setitem(objectives.OBJECTIVES, 'warm', warm)
    monkeypatch.setattr(objectives, 'KNOBS', (*objectives.KNOBS, 'warmth'))
    monkeypatch.setitem(injection.INJECTIONS, 'shifted', Shifted)
    monkeypatch.setitem(metrics.FIGURES, 'widest', Figure('lens', 'widest coordinate', widest, quick=True))


def test_all_of_them_at_once(world, tmp_path, added):
    subject = shutil.copytree(world / 'subject', tmp_path / 'subject')
    its = read_json(subject / 'config.json', 'of the fixture')
    its |= {'model_type': 'toy', 'architectures': ['ToyForCausalLM'], 'softness': 0.125}
    (subject / 'config.json').write_text(json.dumps(its))

    c = config(world, phases=('sft',), decoder__train='maps', encoder__train='maps', eval__every='0')
    c.subject.path = str(subject)
    c.decoder.injection, c.decoder.block, c.decoder.init = 'shifted', 1, 'identity'
    c.sft.objective, c.sft.steps, c.sft.warmth = 'warm', 2, 'linear 1 0.5'
    train(c, tmp_path / 'w')

    assert set(MODELS) == {('toy', 0.125)}
    rows = read_jsonl(tmp_path / 'w/metrics.jsonl')
    steps = [r for r in rows if r['kind'] == 'train']
    assert [r['warmth_now'] for r in steps] == [1, 0.5]
    assert steps[0]['pull'] == 0 < steps[1]['pull']  # it is a loss: the second step sees the first one's update
    (held_out,) = [r['widest'] for r in rows if r['kind'] == 'eval']
    figure = read_json(tmp_path / 'w/evaluation.json', 'of the run')['figures']['widest']
    assert held_out == figure['value'] > 0
    assert figure['meaning'] == 'widest coordinate' and figure['ci95'][0] <= figure['value'] <= figure['ci95'][1]
    assert 'widest coordinate' in (tmp_path / 'w/report.html').read_text()
