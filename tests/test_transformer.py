"""The stack against transformers/PyTorch and against itself: cutting, caching, causality, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lens import hf, sharding
from tests import config_json
from tests.conftest import TINY, make_base

SUBJECT = 'configs/tiny_subject'


def torch_outputs(directory, tokens):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        out = model(torch.tensor(tokens), output_hidden_states=True)
    return out.logits.numpy(), [h.numpy() for h in out.hidden_states]


@pytest.mark.parametrize('tied', [False, True])
def test_logits_and_every_hidden_state_equal_transformers(tmp_path, tokens, tied):
    model = make_base(dataclasses.replace(TINY, tied=tied))
    hf.save_model(model, tmp_path / 'model', config=config_json.llama(model.config))
    logits, hidden = torch_outputs(tmp_path / 'model', tokens)
    np.testing.assert_allclose(model(tokens), logits, atol=1e-4)
    for k in range(TINY.n_layers):  # hidden[-1] has the final norm applied
        x = model.run_layers(model.embed(tokens), 0, k)
        np.testing.assert_allclose(x, hidden[k], atol=1e-4)
    x = model.run_layers(model.embed(tokens), 0, TINY.n_layers)
    np.testing.assert_allclose(model.final_norm(x, TINY.norm_eps), hidden[-1], atol=1e-4)


def test_shipped_subject_gives_the_logits_of_transformers():
    model = hf.load_model(SUBJECT)
    ids = hf.load_tokenizer(SUBJECT)('Near the meadow was a compass. The compass kept Freya cheerful.')['input_ids']
    logits, _ = torch_outputs(SUBJECT, [ids])
    np.testing.assert_allclose(model(np.asarray([ids])), logits, atol=1e-4)


def test_cut_stack_composes_to_the_whole(base, tokens):
    x = base.embed(tokens)
    whole = base.run_layers(x, 0, TINY.n_layers)
    for cut in range(TINY.n_layers + 1):
        np.testing.assert_array_equal(base.run_layers(base.run_layers(x, 0, cut), cut, TINY.n_layers), whole)


def test_truncated_copy_runs_the_same_first_blocks(base, tokens):
    cut = base.truncated(2)
    assert cut.config.n_layers == 2
    np.testing.assert_array_equal(cut.run_layers(cut.embed(tokens), 0, 2), base.run_layers(base.embed(tokens), 0, 2))
    kept = {sharding.path(kp) for kp, _ in jax.tree_util.tree_leaves_with_path(cut)}
    assert not kept & {'head', 'final_norm'}


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_layer_ranges_and_their_gradient_copy_no_weights(remat):
    """Temporary memory stays far below the stack: slicing it or indexing it outside the checkpoint
    would cost the size of the slice or of the whole."""
    config = dataclasses.replace(TINY, d_model=64, d_ff=384, n_layers=16, remat=remat)
    model = make_base(config)
    stack_bytes = sum(w.nbytes for w in jax.tree.leaves(model.blocks))
    x = jnp.ones((2, 3, 64))

    def loss(x, model):
        return model.run_layers(x, 3, 15).sum()

    for fn in (loss, jax.grad(loss)):
        temp = jax.jit(fn).lower(x, model).compile().memory_analysis().temp_size_in_bytes
        assert temp < 0.25 * stack_bytes, (temp, stack_bytes)


def test_cached_decoding_equals_teacher_forcing_position_by_position(base, tokens):
    n, prompt = TINY.n_layers, 4
    cache = base.empty_cache(len(tokens), tokens.shape[1])
    x, cache = base.run_layers_cached(base.embed(tokens[:, :prompt]), 0, n, cache, 0)
    steps = [base.logits(x)]
    for t in range(prompt, tokens.shape[1]):
        x, cache = base.run_layers_cached(base.embed(tokens[:, t : t + 1]), 0, n, cache, t)
        steps.append(base.logits(x))
    np.testing.assert_allclose(jnp.concatenate(steps, 1), base(tokens), atol=1e-5)


def test_causality_by_gradient(base, tokens):
    """The output at position t depends on inputs 0..t, on all of them, and on no later one."""
    x = base.embed(tokens[:1])
    jacobian = jax.jacobian(lambda x: base.run_layers(x, 0, TINY.n_layers)[0].sum(-1))(x)[:, 0]
    reach = np.abs(np.asarray(jacobian)).max(-1) > 0
    np.testing.assert_array_equal(reach, np.tril(np.ones_like(reach)))


def test_before_block_sees_every_block_once_and_in_order(base, tokens):
    def hook(x, i):
        return x.at[:, 0, 0].set(i.astype(x.dtype))

    x = base.run_layers(base.embed(tokens), 1, 3, before_block=hook)
    expected = base.embed(tokens)
    for i in (1, 2):
        expected = base.run_layers(expected.at[:, 0, 0].set(i), i, i + 1)
    np.testing.assert_allclose(x, expected, atol=1e-6)


def test_works_without_a_mesh_and_on_a_mesh(base, tokens):
    plain = base(tokens)
    mesh = sharding.make_mesh(4, 2)
    with jax.set_mesh(mesh):
        placed = sharding.place(base, mesh)
        sharded = jax.jit(lambda m, t: m(t))(placed, sharding.put_batch({'t': tokens}, mesh)['t'])
    np.testing.assert_allclose(plain, np.asarray(sharded), atol=1e-5)
