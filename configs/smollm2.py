"""SmolLM2-135M-Instruct, read after block 15 of 30: a real language model on a laptop.

    make smollm2
    python -m lens.main --config=configs/smollm2.py --workdir=runs/smollm2
"""

import ml_collections
from lens.configs import base

RECIPES = base.RECIPES | {'gumbel': ('sft', 'gumbel'), 'nla': ('sft', 'grpo')}


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.get_config()
    c.phases = base.phases(recipe, RECIPES)
    c.subject.path = 'data/smollm2/model'
    c.subject.remat = 'dots'
    c.layer = 15
    c.data.path = 'configs/smollm2_chats'
    c.data.min_pos = 40
    c.explanation_len = 16

    c.decoder.prompt = '<|im_start|>Explanation of <embed>:'
    c.decoder.patched_blocks = 4
    c.encoder.prompt = '<|im_start|>Text: <text>\n'
    c.decoder.train = c.encoder.train = 'lora'
    return c
