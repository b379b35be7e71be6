"""Every supported family against transformers: logits, hidden states, files, caches, packed experts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from lens import hf
from tests import hf_models
from tests.hf_models import FULL, SLIDING

T = 13  # three windows
IDS = np.random.default_rng(1).integers(0, 97, (2, T)).astype(np.int32)
# The other way round than the family's default.
RETIED = {
    'gpt2': False,
    'llama': True,
    'qwen2': True,
    'qwen3': True,
    'gemma2': False,
    'gemma3_text': False,
    'gpt_oss': True,
}
families = pytest.mark.parametrize('family', hf_models.FAMILIES)
distinct = pytest.mark.parametrize('family', hf_models.DISTINCT)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    return hf_models.pairs(tmp_path_factory.mktemp('families'))


def reloaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, **hf_models.EAGER).eval()


FACTS = [
    ('gpt2', {'layer_norm_epsilon': 1e-5}),
    ('llama', {'rms_norm_eps': 1e-5}),
    ('llama3', {'rope_parameters': hf_models.PLAIN_ROPE}),
    ('llama_linear', {'rope_parameters': hf_models.PLAIN_ROPE}),
    ('qwen2', {'layer_types': [FULL] * 6}),
    ('qwen2', {'layer_types': [FULL] * 3 + [SLIDING] * 3}),
    ('gemma2', {'attn_logit_softcapping': None}),
    ('gemma2', {'final_logit_softcapping': None}),
    ('gemma2', {'query_pre_attn_scalar': 16}),
    ('gemma2', {'layer_types': [SLIDING, FULL] * 3}),
    ('gemma3_text', {'sliding_window': 5}),
    ('gemma3_text', {'rope_parameters': dict.fromkeys((SLIDING, FULL), hf_models.PLAIN_ROPE)}),
    ('gpt_oss', {'rope_parameters': hf_models.YARN_ROPE | {'truncate': True}}),
    ('gpt_oss', {'rope_parameters': hf_models.YARN_ROPE | {'attention_factor': 1.0}}),
    ('gpt_oss', {'swiglu_limit': 100.0}),
    ('gpt_oss', {'sliding_window': 5}),
    ('gpt_oss', {'num_experts_per_tok': 3}),
]


@pytest.mark.parametrize(('family', 'change'), FACTS, ids=[f'{f}-{next(iter(c))}' for f, c in FACTS])
def test_every_fact_of_the_random_models_shows_in_their_logits(tmp_path, family, change):
    """Parity to 1e-4 would mean nothing for a window, cap or rotary table that changes nothing."""
    model = hf_models.build(family, tmp_path / 'model')
    logits = hf_models.forward(model, IDS)[0]
    assert np.abs(hf_models.forward(hf_models.altered(model, **change), IDS)[0] - logits).max() > 0.1


@jax.jit  # one program: compiling is all the time there is
def block_by_block(model, ids):
    streams = [model.embed(ids)]
    for k in range(model.config.n_layers):
        streams.append(model.run_layers(streams[-1], k, k + 1))
    return streams


@families
def test_logits_and_every_hidden_state_equal_transformers(pair, family):
    p = pair(family)
    logits, streams = hf_models.forward(p.torch, IDS)
    for ours, theirs in zip(block_by_block(p.jax, IDS), streams, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(p.jax(IDS), logits, atol=1e-4)


@pytest.mark.parametrize(('family', 'tied'), RETIED.items())
def test_tied_and_untied(pair, tmp_path, family, tied):
    p = pair(family, tie_word_embeddings=tied)
    logits = hf_models.forward(p.torch, IDS)[0]
    assert (p.jax.head is None) == tied
    np.testing.assert_allclose(p.jax(IDS), logits, atol=1e-4)
    hf.save_model(p.jax, tmp_path / 'copy', source=p.directory)
    np.testing.assert_allclose(hf_models.forward(reloaded(tmp_path / 'copy'), IDS)[0], logits, atol=1e-5)


@distinct
def test_bfloat16_stays_close(pair, family):
    """Root mean square error of a position relative to the spread of the logits; the median position,
    because where rounding makes a router pick another expert the whole row moves, in PyTorch too."""
    p = pair(family)
    logits = hf_models.forward(p.torch, IDS)[0]
    model = hf.load_model(p.directory, dtype=jnp.bfloat16)
    assert model.blocks.attn.q[...].dtype == jnp.bfloat16
    error = np.median(np.sqrt(np.mean((model(IDS) - logits) ** 2, axis=-1))) / logits.std()
    assert error < 0.05, error


@families
def test_saved_directory_is_the_same_model_to_transformers(pair, tmp_path, family):
    p = pair(family)
    hf.save_model(p.jax, tmp_path / 'copy', source=p.directory)
    copy = reloaded(tmp_path / 'copy')
    np.testing.assert_allclose(
        hf_models.forward(copy, IDS)[0], hf_models.forward(p.torch, IDS)[0], rtol=1e-5, atol=1e-5
    )
    config = json.loads((tmp_path / 'copy' / 'config.json').read_text())
    text = pair('gemma3_text' if family == 'gemma3' else family).torch  # a multimodal model saves as its text model
    assert (config['architectures'], config['model_type']) == ([type(text).__name__], text.config.model_type)
    assert copy.state_dict().keys() == text.state_dict().keys()


@distinct
def test_cached_decoding_equals_teacher_forcing_past_the_window(pair, family):
    model, n, prompt = pair(family).jax, pair(family).jax.config.n_layers, 3
    cache = model.empty_cache(len(IDS), T)
    x, cache = model.run_layers_cached(model.embed(IDS[:, :prompt]), 0, n, cache, 0)
    steps = [x]
    for t in range(prompt, T):
        x, cache = model.run_layers_cached(model.embed(IDS[:, t : t + 1], start=t), 0, n, cache, t)
        steps.append(x)
    np.testing.assert_allclose(model.logits(jnp.concatenate(steps, 1)), model(IDS), atol=1e-4)


@distinct
def test_stack_cut_at_even_and_odd_blocks_composes_to_the_whole(pair, family):
    model = pair(family).jax
    x = start = model.embed(IDS)
    for lo, hi in ((0, 2), (2, 5), (5, 6)):
        x = model.run_layers(x, lo, hi)
    np.testing.assert_allclose(x, model.run_layers(start, 0, 6), atol=1e-5)


@distinct
def test_a_token_changes_nothing_before_it(pair, family):
    model, at = pair(family).jax, 7
    changed = IDS.copy()
    changed[:, at] = (changed[:, at] + 1) % 97
    change = np.abs(model(changed) - model(IDS)).max(-1)
    assert change[:, :at].max() < 1e-6 and change[:, at].min() > 0.1


def test_dense_and_grouped_experts_agree(pair):
    p = pair('gpt_oss')
    dense = hf.load_model(p.directory, experts='dense')
    np.testing.assert_allclose(dense(IDS), hf_models.forward(p.torch, IDS)[0], atol=1e-4)


@pytest.fixture(scope='module')
def mxfp4(tmp_path_factory):
    directory = tmp_path_factory.mktemp('mxfp4') / 'model'
    return directory, hf_models.forward(hf_models.mxfp4(directory), IDS)[0]


@pytest.mark.parametrize('packed', [False, True])
def test_mxfp4_directory_gives_the_logits_of_its_dequantised_weights(mxfp4, packed):
    directory, logits = mxfp4
    np.testing.assert_allclose(hf.load_model(directory, packed=packed)(IDS), logits, atol=1e-4)


def test_mxfp4_directory_saves_as_a_model_that_transformers_reads(mxfp4, tmp_path):
    directory, logits = mxfp4
    hf.save_model(hf.load_model(directory), tmp_path / 'copy', source=directory)
    np.testing.assert_allclose(hf_models.forward(reloaded(tmp_path / 'copy'), IDS)[0], logits, atol=1e-4)
