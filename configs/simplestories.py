"""SimpleStories-35M, read after block 8 of 12: explanations of 16 tokens, on one small GPU or a CPU.

    python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=SimpleStories/SimpleStories-35M \
        --out=data/simplestories --seq_len=64
    python -m data_gen.label --data=data/simplestories --tokenizer=SimpleStories/SimpleStories-35M --method=self \
        --bare --parts=topic:3,next:3,now:3 --explanation_len=16 --min_position=8
    python -m lens.main --config=configs/simplestories.py --workdir=runs/simplestories
    python -m lens.main --config=configs/simplestories.py:sft --workdir=runs/simplestories_sft
    python -m lens.main --config=configs/simplestories.py:grpo --workdir=runs/simplestories_grpo

Prepare: the model in the folder SimpleStories/SimpleStories-35M (elsewhere: --config.subject.path), and the
stories of the dataset SimpleStories/SimpleStories in texts.jsonl in a field "text". The second
command makes the labels of the sft phase: of the stories, and of what the model would write next.

Hardware: meant for one small GPU or a CPU. Not yet run on this hardware; memory computed from shapes: base 0.14 GB in
float32; 3.2 M parameters of 12 maps and an encoder of its own of 26.9 M (embedding and 9 blocks) with gradient
and Adam 0.5 GB; logits of the sft phase 17 MB a copy.

All blocks patched and the encoder trained in full, as in the original recipe, whose objective was another one
(Gumbel, 256 x 16 activations a step). sft 16 documents x 4 = 64 activations; grpo 16 activations x 8
explanations = 128 rollouts.
"""

import ml_collections
from lens.configs import base


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.consistency_lens(recipe, 'SimpleStories/SimpleStories-35M', 8)
    c.subject.dtype = 'float32'
    c.data.path = 'data/simplestories'
    c.explanation_len = 16
    c.decoder.prompt = '[EOS]short explanation of <embed>, main character, setting, mood, mission, etc:'
    c.decoder.patched_blocks = 12
    c.encoder.prompt = '[EOS]summary of the text, main character, setting, mood, mission, etc:<text>'
    c.encoder.readout, c.encoder.train = 'none', 'full'
    c.sft.steps, c.grpo.steps = 5000, 10000
    c.sft.documents, c.sft.vectors = 16, 4
    for p in (c.sft, c.grpo):
        p.learning_rate_decoder = p.learning_rate_encoder = 'cosine 2e-3 2e-4 warmup 100s'
        p.table = base.table(weight_decay=0.01)
    c.eval.batch = 250
    return c
