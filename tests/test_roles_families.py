"""The three roles in every family against PyTorch hooks: read, patch, inject, score, sample, read out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lens import sampling
from lens.models import decoder as dec
from lens.models import subject
from lens.models.decoder import Decoder, DecoderConfig, scaled_identity
from lens.models.encoder import Encoder, EncoderConfig, encode
from tests import hf_models

LAYER, LAST = 2, 5
LEFT, RIGHT = [3, 7], [9]
LENGTH = 10  # of an explanation: with the prompt three windows
rng = np.random.default_rng(1)
IDS = rng.integers(0, 97, (2, 13)).astype(np.int32)
POSITIONS = np.array([[5, 11], [2, 12]], np.int32)
WORDS = rng.integers(0, 97, (2, LENGTH)).astype(np.int32)
families = pytest.mark.parametrize('family', hf_models.DISTINCT)
layers = pytest.mark.parametrize('layer', [LAYER, LAST])


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    return hf_models.pairs(tmp_path_factory.mktemp('roles'))


def shaken(module):
    """No trained value at its initial one."""
    noise = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.1 * noise.standard_normal(x.shape).astype(np.float32), module)


def make_decoder(base, patched):
    norms = np.linspace(1, 2, base.config.n_layers + 1, dtype=np.float32)
    c = DecoderConfig(patched, False, LAYER)
    maps = scaled_identity(c, base.config.embed_scale, base.config.d_model, norms)
    return shaken(Decoder(c, LEFT, RIGHT, base, maps, own_base=False, adapters=None))


def inputs_embeds(model, rows):
    """Rows in units of the embedding table as inputs_embeds, which transformers does not scale for Gemma."""
    scale = model.config.get_text_config().hidden_size ** 0.5 if 'gemma' in model.config.model_type else 1.0
    return scale * rows


def table(p):
    return p.torch.get_input_embeddings().weight.detach().numpy()


@families
@layers
def test_read_equals_the_output_of_the_block(pair, family, layer):
    p = pair(family)
    stream = hf_models.forward(p.torch, IDS)[1][layer + 1]
    expected = np.take_along_axis(stream, POSITIONS[..., None], axis=1)
    np.testing.assert_allclose(subject.read(p.jax, IDS, POSITIONS, layer), expected, atol=1e-4)


@families
@layers
def test_patch_equals_a_hook_on_the_block(pair, family, layer):
    p, position = pair(family), POSITIONS[:, 0]
    natural, streams = hf_models.forward(p.torch, IDS)
    own = streams[layer + 1][np.arange(2), position]
    np.testing.assert_allclose(subject.patch(p.jax, IDS, position, own, layer), natural, atol=1e-4)

    other = np.random.default_rng(3).standard_normal(own.shape).astype(np.float32)

    def after(k, x):
        if k == layer:
            x[np.arange(2), position] = torch.tensor(other)
        return x

    logits = hf_models.forward(p.torch, IDS, after=after)[0]
    assert np.abs(logits - natural).max() > 0.1
    np.testing.assert_allclose(subject.patch(p.jax, IDS, position, other, layer), logits, atol=1e-4)


@families
@pytest.mark.parametrize('patched', [0, 2])
def test_decoder_equals_hooks_at_the_entrance_of_the_blocks(pair, family, patched):
    p = pair(family)
    decoder = make_decoder(p.jax, patched)
    a = np.random.default_rng(4).standard_normal((2, 48)).astype(np.float32)
    maps = [a @ np.asarray(w) + np.asarray(b) for w, b in zip(decoder.maps_w[...], decoder.maps_b[...], strict=True)]
    left, right = (np.tile(x[...], (2, 1, 1)) for x in (decoder.prompt_left, decoder.prompt_right))
    rows = np.concatenate([left, maps[0][:, None], right, table(p)[WORDS[:, :-1]]], axis=1)

    def before(k, x):
        if k < patched:
            x[:, len(LEFT)] = torch.tensor(maps[k])
        return x

    logits = hf_models.forward(p.torch, embeds=inputs_embeds(p.torch, rows), before=before)[0]
    logits = logits[:, decoder.prompt_len - 1 :]
    np.testing.assert_allclose(dec.prefill(decoder, p.jax, a, LENGTH)[0], logits[:, 0], atol=1e-4)
    logp, entropy = dec.score(decoder, p.jax, a, WORDS)
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    np.testing.assert_allclose(logp, np.take_along_axis(expected, WORDS[..., None], -1)[..., 0], atol=1e-4)
    np.testing.assert_allclose(entropy, -(np.exp(expected) * expected).sum(-1), atol=1e-4)


@families
def test_encoder_equals_the_block_output_at_the_last_position(pair, family):
    p = pair(family)
    e = shaken(Encoder(EncoderConfig(LAYER, 'affine'), [5], [6, 8], p.jax, own_base=False, adapters=None))
    left, right = (np.tile(x[...], (2, 1, 1)) for x in (e.prompt_left, e.prompt_right))
    rows = np.concatenate([left, table(p)[WORDS], right], axis=1)
    rows[:, -1] += e.special_last[...]
    stream = hf_models.forward(p.torch, embeds=inputs_embeds(p.torch, rows))[1][LAYER + 1]
    expected = stream[:, -1] @ np.asarray(e.readout_w[...]) + np.asarray(e.readout_b[...])
    np.testing.assert_allclose(encode(e, p.jax, WORDS), expected, atol=1e-4)


@pytest.mark.parametrize('family', ['gpt2', 'gemma3_text', 'gpt_oss'])
def test_sampler_and_scorer_agree_past_the_window(pair, family):
    base = pair(family).jax
    decoder = make_decoder(base, 2)
    a = np.random.default_rng(4).standard_normal((2, 48)).astype(np.float32)
    s = sampling.sample(decoder, base, a, jax.random.key(0), length=LENGTH, group=2)
    logp, _ = dec.score(decoder, base, subject.tile_rows(jnp.asarray(a), 2), s.ids_NxT)
    np.testing.assert_allclose(s.logp_NxT, logp, atol=1e-4)
