"""One compiled train step of a small plan: its bytes and FLOPs, and what it moves between devices."""

import collections

import jax
import pytest

from benchmarks import roofline
from lens import sharding
from lens.tools import plan
from tests.test_plan import SMALL_EXPERTS, small


def moved(text):
    """Kind of collective -> elements of an array that it gives -> how often the text of a program names such."""
    found = collections.defaultdict(collections.Counter)
    for x in roofline.collectives(text):
        found[x.kind].update(a.size for a in x.arrays)
    return found


def compiled_step(folder, phase, **mesh):
    """(configuration, job, state, base, its two programs, traced and compiled) on four devices that split the batch."""
    cfg = small(folder, (phase,))
    cfg.mesh.update(**mesh)
    devices, job = sharding.make_mesh(4, 1), plan.open_job(cfg)[0]._replace(seq_len=40)
    with jax.set_mesh(devices):
        ((_, state, base, _),) = plan.steps(cfg, job, devices)
    return cfg, job, state, base, plan.compile_step(cfg, job, devices, phase)


@pytest.mark.slow
@pytest.mark.parametrize('phase', ['sft', 'grpo'])
def test_a_data_parallel_step_moves_the_gradients_of_what_is_trained_alone(tmp_path, monkeypatch, phase):
    """No weight of the base and no activation: of the rest, scalars, two means of figures [d], hashes of texts."""
    cfg, job, state, _, programs = compiled_step(tmp_path, phase)
    (_, reading), (_, compiled) = programs
    assert not moved(reading.as_text())
    gradients = collections.Counter(x.size for x in jax.tree.leaves(state.params))
    found = moved(compiled.as_text())
    assert not gradients - found['all-reduce'], 'a gradient is not summed'
    rest = found.pop('all-reduce') - gradients
    assert set(rest) <= {1, job.c.d_model} and rest[job.c.d_model] == 2
    texts = cfg[phase].documents * cfg[phase].vectors * (cfg.grpo.group if phase == 'grpo' else 1)
    assert found == ({} if phase == 'sft' else {'all-gather': {texts: 2}})

    monkeypatch.setattr(plan, 'compile_step', lambda *_: programs)
    temporaries, work = plan.compile_phase(cfg, job, sharding.make_mesh(4, 1), phase)
    logits = texts // 4 * cfg.explanation_len * job.c.vocab_size * 4
    assert temporaries > logits + 2 * SMALL_EXPERTS  # bfloat16
    token = 2 * (2 * 64 * 32 + 2 * 64 * 16 + 64 * 4 + 2 * 3 * 64 * 32)  # of q o, k v, router and 2 of 4 experts
    assert 6 * texts * cfg.explanation_len * token < sum(work.values()) < 60 * texts * cfg.explanation_len * token
    assert cfg.subject.dtype == 'bfloat16' and cfg.subject.experts == 'auto', 'the configuration has changed'


@pytest.mark.slow
def test_a_split_base_is_gathered_a_layer_at_a_time(tmp_path):
    """Whole matrices of one layer; nothing but the tables is gathered whole, and gradients are those of the maps."""
    _, job, state, base, (_, (_, compiled)) = compiled_step(tmp_path, 'sft', shard_base=True)
    found = moved(compiled.as_text())
    one_layer = {x.size // job.c.n_layers for x in jax.tree.leaves(base.blocks)}
    tables = job.c.vocab_size * job.c.d_model
    assert max(one_layer) in found['all-gather'] and set(found['all-gather']) <= one_layer | {tables}
    gradients = collections.Counter(x.size for x in jax.tree.leaves(state.params))
    assert not gradients - found['all-reduce'] and tables not in found['all-reduce']
