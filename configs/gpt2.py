"""gpt2 (124 M parameters), read after block 6 of 12: explanations of 10 tokens, on one small GPU.

    python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=openai-community/gpt2 --out=data/gpt2 --seq_len=128
    python -m data_gen.label --data=data/gpt2 --tokenizer=openai-community/gpt2 --method=self --bare \
        --parts=topic:2,next:2,now:2 --explanation_len=10 --min_position=8
    python -m lens.main --config=configs/gpt2.py --workdir=runs/gpt2
    python -m lens.main --config=configs/gpt2.py:sft --workdir=runs/gpt2_sft
    python -m lens.main --config=configs/gpt2.py:grpo --workdir=runs/gpt2_grpo

Prepare: the model in the folder openai-community/gpt2 (elsewhere: --config.subject.path), and web texts in
texts.jsonl (the original recipe: openwebtext) in a field "text". The second command makes the labels
of the sft phase: of the texts, and of what the model would write next.

Hardware: meant for one small GPU. Not yet run on this hardware; memory computed from shapes: base
0.5 GB in float32; 1.2 M parameters (one map, read-out) with gradient and Adam 19 MB; logits of the sft phase
0.3 GB a copy.

One map at the input alone, and an encoder that is read out after the last block, as in the original recipe,
whose objective was another one (Gumbel, 128 x 16 activations a step). sft 32 documents x 4 = 128 activations;
grpo 16 activations x 8 explanations = 128 rollouts. All blocks patched instead:
--config.decoder.patched_blocks=12 --config.decoder.shared_map=false --config.encoder.output_layer=6
"""

import ml_collections
from lens.configs import base


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.consistency_lens(recipe, 'openai-community/gpt2', 6, '<|endoftext|>')
    c.subject.dtype = 'float32'
    c.explanation_len = 10
    c.decoder.patched_blocks, c.decoder.shared_map = 0, True
    c.encoder.output_layer = 11
    c.sft.steps, c.grpo.steps = 5000, 10000
    c.sft.vectors = 4
    for p in (c.sft, c.grpo):
        p.learning_rate_decoder = p.learning_rate_encoder = 'cosine 1e-3 1e-4 warmup 100s'
    c.eval.batch = 250
    return c
