"""The look-ahead loss against loops, and pretraining end to end at tiny size."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

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
    got = pretrain.fact_targets(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(FACT_IDS), 4)
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
    got = pretrain.lookahead_loss(
        jnp.asarray(head, jnp.float32), jnp.asarray(x, jnp.float32), jnp.asarray(targets), (2, 3)
    )
    np.testing.assert_allclose(got, total / targets.sum(), rtol=1e-5)


@pytest.fixture
def config(tmp_path):
    world.write_arrays(tmp_path / 'data', 'configs/tiny_subject', world.Settings(train=40, validation=70, positions=1))
    c = tiny_subject.get_config()
    c.data, c.steps, c.documents, c.warmup_steps, c.checkpoint_every_steps = str(tmp_path / 'data'), 4, 3, 1, 2
    c.model.update({'d_model': 24, 'n_layers': 2, 'n_heads': 6, 'n_kv_heads': 2, 'head_dim': 8, 'd_ff': 36})
    c.lookahead.layer = 0
    return c


@pytest.mark.slow
def test_pretraining_resumes_bit_identically_and_ships_a_hugging_face_model(config, tmp_path, monkeypatch):
    figures = pretrain.Pretrainer(config, tmp_path / 'calm').run()
    save = Checkpoints.save

    def save_and_stop(self, step, state, info):
        save(self, step, state, info)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, 'save', save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.Pretrainer(config, tmp_path / 'cut').run()
    monkeypatch.setattr(Checkpoints, 'save', save)
    assert pretrain.Pretrainer(config, tmp_path / 'cut').run() == figures
    weights = [(tmp_path / run / 'model/model.safetensors').read_bytes() for run in ('calm', 'cut')]
    assert weights[0] == weights[1]
    ids = np.arange(12)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'cut/model', dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(hf.load_model(tmp_path / 'cut/model')(ids), expected, atol=1e-4)


@pytest.mark.slow
def test_both_losses_reach_the_weights(config, tmp_path):
    trainer = pretrain.Pretrainer(config, tmp_path)
    before = jax.tree.map(np.asarray, trainer.state['trainable'])
    state, _ = trainer._step(trainer.state, trainer.train.tokens[:3], trainer.train.lengths[:3])
    state, _ = trainer._step(state, trainer.train.tokens[:3], trainer.train.lengths[:3])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, state['trainable'])
    assert all(jax.tree.leaves(moved))


def test_lookahead_without_known_facts_is_refused(config, tmp_path):
    for split in ('train', 'validation'):
        meta = pathlib.Path(config.data, split, 'meta.json')
        meta.write_text(meta.read_text().replace('"facts"', '"other"'))
    with pytest.raises(
        LensError, match=r'has no known facts: the look-ahead loss needs them, or set lookahead.weight=0'
    ):
        pretrain.Pretrainer(config, tmp_path)
