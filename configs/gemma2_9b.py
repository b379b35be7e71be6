"""gemma-2-9b-it, read after block 30 of 42: explanations of 8 tokens, on one GPU.

    PRETOKENIZE_ARGS='--seq_len=1024' launch/generate_local.sh google/gemma-2-9b-it \
        --input_dataset=HuggingFaceH4/ultrachat_200k --input_split=train_sft --output_path=data/rollouts/gemma-2-9b-it
    python -m data_gen.label --data=data/rollouts/gemma-2-9b-it/tokens --tokenizer=google/gemma-2-9b-it --method=self \
        --next=text --bare --parts=topic:2,next:2,now:2 --explanation_len=8 --out=data/gemma-2-9b-it
    python -m lens.main --config=configs/gemma2_9b.py --workdir=runs/gemma2_9b
    python -m lens.main --config=configs/gemma2_9b.py:sft --workdir=runs/gemma2_9b_sft
    python -m lens.main --config=configs/gemma2_9b.py:grpo --workdir=runs/gemma2_9b_grpo

Prepare: the model in the folder google/gemma-2-9b-it (elsewhere: --config.subject.path). The first command
serves it and lets it answer a chat data set (the original recipe read WildChat-1M as it is), the second makes the labels
of the sft phase from these chats alone.

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
