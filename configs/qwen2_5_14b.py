"""Qwen2.5-14B-Instruct, read after block 36 of 48: explanations of 8 tokens, on one GPU.

    PRETOKENIZE_ARGS='--seq_len=1024' launch/generate_local.sh Qwen/Qwen2.5-14B-Instruct \
        --input_dataset=HuggingFaceH4/ultrachat_200k --input_split=train_sft --output_path=data/rollouts/Qwen2.5-14B-Instruct
    python -m data_gen.label --data=data/rollouts/Qwen2.5-14B-Instruct/tokens --tokenizer=Qwen/Qwen2.5-14B-Instruct --method=self \
        --next=text --bare --parts=topic:2,next:2,now:2 --explanation_len=8 --out=data/Qwen2.5-14B-Instruct
    python -m lens.main --config=configs/qwen2_5_14b.py --workdir=runs/qwen2_5_14b
    python -m lens.main --config=configs/qwen2_5_14b.py:sft --workdir=runs/qwen2_5_14b_sft
    python -m lens.main --config=configs/qwen2_5_14b.py:grpo --workdir=runs/qwen2_5_14b_grpo

Prepare: the model in the folder Qwen/Qwen2.5-14B-Instruct (elsewhere: --config.subject.path). The first
command serves it and lets it answer a chat data set (the original recipe read WildChat-1M as it is), the second makes
the labels of the sft phase from these chats alone.

Hardware: 1 GPU of 80 GB. Not yet run on this hardware; memory computed from shapes: base 29.5 GB in bfloat16;
157.3 M parameters (5 maps 131.1 M, read-out 26.2 M) with gradient and Adam 2.5 GB; logits of the sft phase
1.2 GB a copy.

Batches: grpo 16 activations, as in the original recipe, x 8 explanations = 128 rollouts a step; sft 32
documents x 8 = 256 activations. This tokenizer has no <bos>, so the prompts begin with their words.
"""

import ml_collections
from lens.configs import base


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    return base.consistency_lens(recipe, 'Qwen/Qwen2.5-14B-Instruct', 36)
