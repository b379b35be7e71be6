"""Qwen2.5-14B-Instruct, read after block 36 of 48: explanations of 8 tokens, on one GPU.

    python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=Qwen/Qwen2.5-14B-Instruct \
        --out=data/Qwen2.5-14B-Instruct --seq_len=1024
    python -m lens.main --config=configs/qwen2_5_14b.py --workdir=runs/qwen2_5_14b
    python -m lens.main --config=configs/qwen2_5_14b.py:sft --workdir=runs/qwen2_5_14b_sft
    python -m lens.main --config=configs/qwen2_5_14b.py:grpo --workdir=runs/qwen2_5_14b_grpo

Prepare: the model in the folder Qwen/Qwen2.5-14B-Instruct (elsewhere: --config.subject.path), and chats in
texts.jsonl (the original recipe: WildChat-1M), rendered with the chat template in a field "text". The sft
phase also reads positions.npy and explanations.npy (lens/data.py) in the data folder, 8 tokens each;
pretokenize does not write them: without them run `:grpo`.

Hardware: 1 GPU of 80 GB. Not yet run on this hardware; memory computed from shapes: base 29.5 GB in bfloat16;
157.3 M parameters (5 maps 131.1 M, read-out 26.2 M) with gradient and Adam 2.5 GB; logits of the sft phase
1.2 GB a copy.

Batches: grpo 16 activations, as in the original recipe, x 8 explanations = 128 rollouts a step; sft 32
documents x 8 = 256 activations. The entropy bonus acts below 0.1 nats only: where the original schedule
(2.0 to 0.1 over 6000 steps) ends. This tokenizer has no <bos>, so the prompts begin with their words.
"""

import ml_collections

from configs import base


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.get_config()
    c.phases = base.phases(recipe)
    c.subject.path = 'Qwen/Qwen2.5-14B-Instruct'
    c.subject.dtype = 'bfloat16'
    c.layer = 36
    c.data.path = 'data/Qwen2.5-14B-Instruct'
    c.explanation_len = 8

    c.decoder.prompt = 'Short explanation of <embed>. Language, topic, sentiment, claims, speaker, style, etc:'
    c.decoder.patched_blocks = 5
    c.encoder.prompt = 'Summary of the text, encapsulating the main points and message, style and details:<text>'
    c.encoder.readout = 'affine'

    c.sft.documents, c.sft.vectors = 32, 8
    c.sft.learning_rate_decoder = 'cosine 1e-3 1e-5 warmup 10s'
    c.sft.learning_rate_encoder = 'cosine 1e-4 1e-6 warmup 10s'

    c.grpo.steps = 20000
    c.grpo.documents, c.grpo.vectors, c.grpo.group = 16, 1, 8
    c.grpo.learning_rate_decoder = 'cosine 1e-3 1e-5 warmup 100s'
    c.grpo.learning_rate_encoder = 'cosine 1e-4 1e-6 warmup 100s'
    c.grpo.entropy_weight, c.grpo.entropy_clamp = 1.0, 0.1

    c.eval.batch = 128  # 32 documents, as in a training step
    c.eval.every = c.checkpoint.every = '500s'
    return c
