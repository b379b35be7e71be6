"""A run of seconds: a random subject with the shipped tokenizer, stories for it, a recipe of eight steps."""

import pathlib

from configs import tiny
from data_gen.storyworld import world as story_world
from lens import hf
from lens.models.rope import Rope
from lens.models.transformer import TransformerConfig
from lens.train import train as train
from tests.tiny_world import make_base

TOKENIZER = 'configs/tiny_subject'


def make_world(root: pathlib.Path) -> pathlib.Path:
    """root/subject, a random llama of 3 blocks, and root/data, 60 and 12 stories with explanations."""
    vocab = len(hf.load_tokenizer(TOKENIZER))
    config = TransformerConfig('llama', vocab, 24, 3, 8, 4, 6, 40, 1e-5, True, 128, (Rope(10000.0),))
    hf.save_model(make_base(config), root / 'subject', source=TOKENIZER)
    story_world.write_arrays(root / 'data', TOKENIZER, story_world.Settings(train=60, validation=12, positions=4))
    return root


def config(world, **changes):
    c = tiny.get_config()
    c.subject.path, c.data.path, c.layer = str(world / 'subject'), str(world / 'data'), 1
    c.decoder.patched_blocks = 2
    c.sft.steps, c.grpo.steps = 4, 4
    rate = 'cosine {} {} warmup 1s'.format
    c.sft.learning_rate_decoder = c.sft.learning_rate_encoder = rate(1.5e-3, 1.5e-4)
    c.grpo.learning_rate_decoder, c.grpo.learning_rate_encoder = rate(3e-4, 3e-5), rate(6e-4, 6e-5)
    c.sft.documents, c.grpo.documents, c.grpo.group = 4, 2, 3
    c.eval.documents, c.eval.quick_documents, c.eval.every, c.eval.samples = 6, 4, 3, 2
    c.eval.reading = 0
    c.log.every, c.checkpoint.every = 1, 3
    for key, value in changes.items():
        block, _, name = key.rpartition('__')
        (c[block] if block else c)[name] = value
    return c


def figures(summary):
    return {
        k: v
        for k, v in summary.items()
        if isinstance(v, float) and not k.endswith('_s') and k not in ('goodput', 'peak_memory_gb')
    }
