"""The embedded default: a lens on a 1.4 M-parameter subject in a world with known answers.

    make demo
    python -m lens.main --config=configs/tiny.py --workdir=runs/tiny
    python -m lens.main --config=configs/tiny.py:sft --workdir=runs/tiny_sft
    python -m lens.main --config=configs/tiny.py:grpo --workdir=runs/tiny_grpo
    python -m lens.main --config=configs/tiny.py:gumbel --workdir=runs/tiny_gumbel
    python -m lens.main --config=configs/tiny.py:nla --workdir=runs/tiny_nla

Hardware: 2 CPU cores, no GPU, no downloads. 3.5 minutes measured; up to 7 on a busy machine.
SFT on templated descriptions (last three words, then the established facts), then a second phase, then
evaluation with controls:

    :grpo     policy gradient on groups of samples; the same as no argument
    :gumbel   one gradient through the words; the encoder stays frozen for the first third of it
    :nla      the recipe of natural language autoencoders: the marker's row is the activation at a fixed norm,
              responses end with a closing token, only directions count, KL to the decoder that SFT has made
    :sft      the first phase alone

Small copies of decoder and encoder are trained in full; cheaper variants: --config.decoder.train=lora,
--config.decoder.train=maps (frozen base), the same for encoder.
"""

import ml_collections
from lens.configs import base

RECIPES = base.RECIPES | {'grpo': ('sft', 'grpo'), 'gumbel': ('sft', 'gumbel'), 'nla': ('sft', 'grpo')}


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.get_config()
    c.phases = base.phases(recipe, RECIPES)
    c.subject.path = 'configs/tiny_subject'
    c.subject.remat = 'dots'
    c.layer = 3  # of 6; where the look-ahead loss sat in pretraining
    c.data.path = 'data/storyworld'
    c.explanation_len = 12  # 3 words, a bar, 8 facts

    c.decoder.prompt = '<|bos|><embed>:'
    c.decoder.patched_blocks = 3
    c.decoder.train = 'full'
    c.encoder.prompt = '<|bos|><text>'
    c.encoder.train = 'full'

    c.sft.steps = 600
    c.sft.documents, c.sft.vectors = 8, 4
    c.sft.learning_rate_decoder = c.sft.learning_rate_encoder = 'cosine 1.5e-3 1.5e-4 warmup 20s'

    c.grpo.steps = 450
    c.grpo.documents, c.grpo.vectors, c.grpo.group = 4, 2, 8
    c.grpo.learning_rate_decoder = 'cosine 3e-4 3e-5 warmup 20s'
    c.grpo.learning_rate_encoder = 'cosine 6e-4 6e-5 warmup 20s'

    c.gumbel.steps = 300
    c.gumbel.documents, c.gumbel.vectors = 8, 4
    c.gumbel.learning_rate_decoder = 'cosine 1e-4 1e-5 warmup 20s'
    c.gumbel.learning_rate_encoder = 'cosine 6e-4 6e-5 warmup 20s'
    c.gumbel.tau = 'linear 1 0.3'
    c.gumbel.table = base.table(encoder_unfreeze='100s')
    if recipe == 'nla':
        _nla(c)
    return c


def _nla(c: ml_collections.ConfigDict) -> None:
    """The chat prompt of the subject's template, numbers of configs/nla_qwen2_5_7b.py where size does not matter."""
    c.explanation_len = 13
    c.explanation_close = '<|end|>'
    c.decoder.prompt = '<|bos|><|user|><embed><|end|><|assistant|>'
    c.decoder.injection, c.decoder.marker, c.decoder.norm = 'replace', '#', 20.0
    c.encoder.prompt = '<|bos|><text><|end|>'
    c.encoder.readout, c.encoder.error = 'linear', 'direction'
    c.grpo.beta, c.grpo.kl_to, c.grpo.kl_skip = 0.01, 'start', 0
