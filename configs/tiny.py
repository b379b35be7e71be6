"""The embedded default: a lens on a 1.4 M-parameter subject in a world with known answers.

    make demo
    python -m lens.main --config=configs/tiny.py --workdir=runs/tiny

Hardware: 2 CPU cores, no GPU, no downloads. 3.5 minutes measured; up to 7 on a busy machine.
SFT on templated descriptions (last three words, then the established facts), then GRPO, then
evaluation with controls. Small copies of decoder and encoder are trained in full; cheaper variants:
--config.decoder.train=lora, --config.decoder.train=maps (frozen base), the same for encoder.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    c = base.get_config()
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
    c.sft.learning_rate_decoder = c.sft.learning_rate_encoder = 1.5e-3

    c.grpo.steps = 450
    c.grpo.documents, c.grpo.vectors, c.grpo.group = 4, 2, 8
    c.grpo.learning_rate_decoder, c.grpo.learning_rate_encoder = 3e-4, 6e-4
    return c
