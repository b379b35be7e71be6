"""gemma-2-9b-it, read after block 30 of 42: explanations of 8 tokens, on one GPU.

    python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=google/gemma-2-9b-it --out=data/gemma-2-9b-it \
        --seq_len=1024
    python -m lens.main --config=configs/gemma2_9b.py --workdir=runs/gemma2_9b
    python -m lens.main --config=configs/gemma2_9b.py:sft --workdir=runs/gemma2_9b_sft
    python -m lens.main --config=configs/gemma2_9b.py:grpo --workdir=runs/gemma2_9b_grpo

Prepare: the model in the folder google/gemma-2-9b-it (elsewhere: --config.subject.path), and chats in
texts.jsonl (the original recipe: WildChat-1M), rendered with the chat template in a field "text" without the
leading <bos>, which the tokenizer adds. The sft phase needs labels of 8 tokens (data_gen.label); without them: `:grpo`.

Hardware: 1 GPU of 80 GB. Not yet run on this hardware; memory computed from shapes: base 18.5 GB in bfloat16;
64.2 M parameters of 5 maps with gradient and Adam 1.0 GB; logits of the sft phase 2.1 GB a copy. All 42
blocks patched (--config.decoder.patched_blocks=42): 539.6 M, 8.6 GB.

Batches: grpo 16 activations x 8 explanations = 128 rollouts a step, as in the original recipe, which kept the
encoder frozen for 20000 steps; here it trains from the start. sft 32 documents x 8 = 256 activations, where
the original took one activation a document.
"""

import ml_collections
from lens.configs import base


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.consistency_lens(recipe, 'google/gemma-2-9b-it', 30, '<bos>')
    c.encoder.readout = 'none'
    c.grpo.learning_rate_decoder = 'cosine 3e-4 9e-6 warmup 1000s'
    c.grpo.learning_rate_encoder = 'cosine 6e-5 1.8e-6 warmup 1000s'
    return c
