"""The three roles against PyTorch hooks, in a family for each mechanism: positions; scale, caps; experts, windows."""

import jax
import numpy as np
import pytest
import torch

from lens.models.decoder import Decoder, DecoderConfig, scaled_identity
from lens.models.encoder import Encoder, EncoderConfig
from lens.models.injection import Affine
from tests import hf_models, programs
from tests.compare import close, differs

LAYER = 2
LEFT, RIGHT = [3, 7], [9]
LENGTH = 10  # of an explanation: with the prompt three windows
rng = np.random.default_rng(1)
IDS = rng.integers(0, 97, (2, 13)).astype(np.int32)
POSITIONS = np.array([[5, 11], [2, 12]], np.int32)
WORDS = rng.integers(0, 97, (4, LENGTH)).astype(np.int32)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    return hf_models.pairs(tmp_path_factory.mktemp('roles'))


def shaken(module):
    """No trained value at its initial one."""
    noise = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.1 * noise.standard_normal(x.shape).astype(np.float32), module)


def make_decoder(base, patched):
    norms = np.linspace(1, 2, base.config.n_layers + 1, dtype=np.float32)
    c = DecoderConfig(Affine(patched), LAYER)
    maps = scaled_identity(c.injection, LAYER, base.config.embed_scale, base.config.d_model, norms)
    return shaken(Decoder(c, LEFT, RIGHT, base, maps, own_base=False, adapters=None))


def inputs_embeds(model, rows):
    """Rows in units of the embedding table as inputs_embeds, which transformers does not scale for Gemma."""
    scale = model.config.get_text_config().hidden_size ** 0.5 if 'gemma' in model.config.model_type else 1.0
    return scale * rows


def table(p):
    return p.torch.get_input_embeddings().weight.detach().numpy()


def test_what_is_read_and_patched_is_the_output_of_the_block(pair):
    p, position = pair('gemma2'), POSITIONS[:, 0]
    natural, streams = hf_models.forward(p.torch, IDS)
    want = np.take_along_axis(streams[LAYER + 1], POSITIONS[..., None], axis=1)
    close(programs.activations(p.jax, IDS, POSITIONS, layer=LAYER), want)
    close(programs.patch(p.jax, IDS, position, want[:, 0], layer=LAYER), natural)
    other = np.random.default_rng(3).standard_normal((2, 48)).astype(np.float32)

    def after(k, x):
        if k == LAYER:
            x[np.arange(2), position] = torch.tensor(other)
        return x

    logits = hf_models.forward(p.torch, IDS, after=after)[0]
    differs(logits, natural)
    close(programs.patch(p.jax, IDS, position, other, layer=LAYER), logits)


@pytest.mark.parametrize(('family', 'patched'), [('gpt2', 2), ('gemma2', 0), ('gpt_oss', 2)])
def test_decoder_equals_hooks_at_the_entrance_of_the_blocks(pair, family, patched):
    """Scores, and samples whose log-probabilities are the scorer's; with the prompt, texts are three windows long."""
    p = pair(family)
    decoder = make_decoder(p.jax, patched)
    two = np.random.default_rng(4).standard_normal((2, 48)).astype(np.float32)
    a = np.repeat(two, 2, axis=0)
    maps = [a @ np.asarray(w) + np.asarray(b) for w, b in zip(decoder.maps_w[...], decoder.maps_b[...], strict=True)]
    left, right = (np.tile(x[...], (4, 1, 1)) for x in (decoder.prompt_left, decoder.prompt_right))
    rows = np.concatenate([left, maps[0][:, None], right, table(p)[WORDS[:, :-1]]], axis=1)

    def before(k, x):
        if k < patched:
            x[:, len(LEFT)] = torch.tensor(maps[k])
        return x

    logits = hf_models.forward(p.torch, embeds=inputs_embeds(p.torch, rows), before=before)[0]
    want = np.asarray(jax.nn.log_softmax(logits[:, decoder.prompt_len - 1 :]))
    logp, entropy = programs.score(decoder, p.jax, a, WORDS)
    close(logp, np.take_along_axis(want, WORDS[..., None], -1)[..., 0])
    close(entropy, -(np.exp(want) * want).sum(-1))
    if patched:
        s = programs.sample(decoder, p.jax, two, jax.random.key(0), length=LENGTH, group=2)
        close(s.logp_NxT, programs.score(decoder, p.jax, a, s.ids_NxT)[0])


@pytest.mark.parametrize('family', ['gpt2', 'gemma2'])
def test_encoder_equals_the_block_output_at_the_last_position(pair, family):
    p = pair(family)
    e = shaken(Encoder(EncoderConfig(LAYER, 'affine'), [5], [6, 8], p.jax, own_base=False, adapters=None))
    left, right = (np.tile(x[...], (4, 1, 1)) for x in (e.prompt_left, e.prompt_right))
    rows = np.concatenate([left, table(p)[WORDS], right], axis=1)
    rows[:, -1] += e.special_last[...]
    stream = hf_models.forward(p.torch, embeds=inputs_embeds(p.torch, rows))[1][LAYER + 1]
    close(programs.encode(e, p.jax, WORDS), stream[:, -1] @ np.asarray(e.readout_w[...]) + np.asarray(e.readout_b[...]))
