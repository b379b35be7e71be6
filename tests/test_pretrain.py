"""The look-ahead loss against loops, and pretraining end to end at tiny size."""

import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

from configs import tiny_subject
from data_gen.storyworld import pretrain, world
from lens import hf
from lens.checkpoint import Checkpoints
from lens.errors import LensError

FACT_IDS = np.array([3, 5, 8])


def test_fact_targets_are_the_fact_words_of_the_next_tokens():
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 9, (5, 17)), np.array([17, 9, 1, 12, 17])
    mask = np.arange(17) < lengths[:, None]
    got = jax.jit(pretrain.fact_targets, static_argnums=3)(tokens, mask, FACT_IDS, 4)
    for b in range(5):
        for s in range(17):
            ahead = set(tokens[b, s + 1 : min(s + 5, lengths[b])].tolist()) if s < lengths[b] else set()
            if s < lengths[b]:
                assert got[b, s].tolist() == [float(i in ahead) for i in FACT_IDS.tolist()]


def test_lookahead_loss_is_a_softmax_within_each_field():
    rng = np.random.default_rng(1)
    head, x = rng.standard_normal((6, 5)), rng.standard_normal((2, 3, 6))
    targets = rng.integers(0, 2, (2, 3, 5)).astype(np.float32)
    total = 0.0
    for b in range(2):
        for s in range(3):
            logits = x[b, s] / np.sqrt((x[b, s] ** 2).mean() + 1e-6) @ head
            for field in (slice(0, 2), slice(2, 5)):
                p = np.exp(logits[field]) / np.exp(logits[field]).sum()
                total -= (np.log(p) * targets[b, s, field]).sum()
    loss = jax.jit(pretrain.lookahead_loss, static_argnums=3)
    got = loss(np.float32(head), np.float32(x), targets, (2, 3))
    np.testing.assert_allclose(got, total / targets.sum(), rtol=1e-5)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world') / 'data'
    world.write_arrays(folder, 'configs/tiny_subject', world.Settings(train=40, validation=64, positions=1))
    c = tiny_subject.get_config()
    c.data, c.steps, c.documents, c.warmup_steps, c.checkpoint_every_steps = str(folder), 2, 3, 0, 1
    c.model.update({'d_model': 24, 'n_layers': 2, 'n_heads': 6, 'n_kv_heads': 2, 'head_dim': 8, 'd_ff': 36})
    c.lookahead.layer = 0
    return c


@pytest.fixture(scope='module')
def pretrainer(config):
    return pretrain.Pretrainer(config)


@pytest.mark.slow
def test_pretraining_resumes_bit_identically_and_ships_a_hugging_face_model(pretrainer, tmp_path, monkeypatch):
    figures = pretrainer.run(tmp_path / 'calm')
    save = Checkpoints.save

    def save_and_stop(self, step, state, info):
        save(self, step, state, info)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, 'save', save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        pretrainer.run(tmp_path / 'cut')
    monkeypatch.setattr(Checkpoints, 'save', save)
    assert pretrainer.run(tmp_path / 'cut') == figures
    weights = [(tmp_path / run / 'model/model.safetensors').read_bytes() for run in ('calm', 'cut')]
    assert weights[0] == weights[1]
    with pytest.raises(LensError, match='this run is finished; use another --workdir'):
        pretrainer.run(tmp_path / 'cut')
    ids = np.arange(12)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'cut/model', dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    got = jax.jit(lambda m, t: m(t))(hf.load_model(tmp_path / 'cut/model'), ids)
    np.testing.assert_allclose(got, expected, atol=2e-5 * expected.std(), rtol=0)


@pytest.mark.slow
def test_both_losses_reach_the_weights(pretrainer):
    """Also those before the block whose output carries the facts, and the head of the facts."""
    state = pretrainer.init()
    before = jax.tree.map(np.array, state['trainable'])
    rows = np.arange(3)
    for _ in range(2):  # the head of the facts begins at zero: its gradient reaches the block in the second step
        state, out = pretrainer.step(state, pretrainer.train.tokens[rows], pretrainer.train.lengths[rows])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, state['trainable'])
    assert all(jax.tree.leaves(moved)) and all(float(x) > 0 for x in out.values())


def test_lookahead_that_cannot_be_is_refused(config, tmp_path):
    c = config.copy_and_resolve_references()
    c.lookahead.layer = 2
    with pytest.raises(LensError, match=r'lookahead.layer=2 is not a block of the model \(0..1\)'):
        pretrain.Pretrainer(c)
    c = config.copy_and_resolve_references()
    c.data = str(tmp_path / 'data')
    shutil.copytree(config.data, c.data)
    for meta in (tmp_path / 'data').glob('*/meta.json'):
        meta.write_text(meta.read_text().replace('"facts"', '"other"'))
    message = 'has no known facts: the look-ahead loss needs them, or set lookahead.weight=0'
    with pytest.raises(LensError, match=message):
        pretrain.Pretrainer(c)
