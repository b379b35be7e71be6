"""Qwen2.5-7B-Instruct, read after block 20 of 28: explanations of 8 tokens, on one GPU.

    python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=Qwen/Qwen2.5-7B-Instruct \
        --out=data/Qwen2.5-7B-Instruct --seq_len=1024
    python -m lens.main --config=configs/qwen2_5_7b.py --workdir=runs/qwen2_5_7b
    python -m lens.main --config=configs/qwen2_5_7b.py:sft --workdir=runs/qwen2_5_7b_sft
    python -m lens.main --config=configs/qwen2_5_7b.py:grpo --workdir=runs/qwen2_5_7b_grpo

Block 20 is the one that the public lens kitft/nla-qwen2.5-7b-L20-av reads; the rest follows
configs/qwen2_5_14b.py, since no recipe of this kind is known for this model.

Prepare: the model in the folder Qwen/Qwen2.5-7B-Instruct (elsewhere: --config.subject.path), and chats in
texts.jsonl, rendered with the chat template in a field "text". The sft phase also reads positions.npy and
explanations.npy (lens/data.py) in the data folder, 8 tokens each; pretokenize does not write them: without
them run `:grpo`.

Hardware: meant for 1 GPU of 40 GB or more. Not yet run on this hardware; memory computed from shapes: base 15.2 GB in
bfloat16; 77.1 M parameters (5 maps 64.2 M, read-out 12.8 M) with gradient and Adam 1.2 GB; logits of the sft
phase 1.2 GB a copy.

Batches: grpo 16 activations x 8 explanations = 128 rollouts a step; sft 32 documents x 8 = 256 activations.
The entropy bonus acts below 0.1 nats only: where the original schedule (2.0 to 0.1 over 6000 steps) ends.
This tokenizer has no <bos>, so the prompts begin with their words.
"""

import ml_collections

from configs import qwen2_5_14b


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = qwen2_5_14b.get_config(recipe)
    c.subject.path = 'Qwen/Qwen2.5-7B-Instruct'
    c.layer = 20
    c.data.path = 'data/Qwen2.5-7B-Instruct'
    return c
