"""Qwen2.5-7B-Instruct, read after block 20 of 28: explanations of 8 tokens, on one GPU.

    PRETOKENIZE_ARGS='--seq_len=1024' launch/generate_local.sh Qwen/Qwen2.5-7B-Instruct \
        --input_dataset=HuggingFaceH4/ultrachat_200k --input_split=train_sft --output_path=data/rollouts/Qwen2.5-7B-Instruct
    python -m data_gen.label --data=data/rollouts/Qwen2.5-7B-Instruct/tokens --tokenizer=Qwen/Qwen2.5-7B-Instruct --method=self \
        --next=text --bare --parts=topic:2,next:2,now:2 --explanation_len=8 --out=data/Qwen2.5-7B-Instruct
    python -m lens.main --config=configs/qwen2_5_7b.py --workdir=runs/qwen2_5_7b
    python -m lens.main --config=configs/qwen2_5_7b.py:sft --workdir=runs/qwen2_5_7b_sft
    python -m lens.main --config=configs/qwen2_5_7b.py:grpo --workdir=runs/qwen2_5_7b_grpo

Block 20 is the one that the public lens kitft/nla-qwen2.5-7b-L20-av reads; preparations, batches and the rest are
those of configs/qwen2_5_14b.py, since no recipe of this kind is known for this model.

Hardware: meant for 1 GPU of 40 GB or more. Not yet run on this hardware; memory computed from shapes: base 15.2 GB in
bfloat16; 77.1 M parameters (5 maps 64.2 M, read-out 12.8 M) with gradient and Adam 1.2 GB; logits of the sft
phase 1.2 GB a copy.
"""

import ml_collections
from lens.configs import base


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    return base.consistency_lens(recipe, 'Qwen/Qwen2.5-7B-Instruct', 20)
