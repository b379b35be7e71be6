"""gemma-3-27b-it (its text model), read after block 45 of 62: explanations of 8 tokens.

    python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=google/gemma-3-27b-it --out=data/gemma-3-27b-it \
        --seq_len=1024
    python -m lens.main --config=configs/gemma3_27b.py --workdir=runs/gemma3_27b
    python -m lens.main --config=configs/gemma3_27b.py:sft --workdir=runs/gemma3_27b_sft
    python -m lens.main --config=configs/gemma3_27b.py:grpo --workdir=runs/gemma3_27b_grpo

Prepare: the model in the folder google/gemma-3-27b-it (elsewhere: --config.subject.path), and chats in
texts.jsonl (the original recipe: WildChat-1M), rendered with the chat template in a field "text" without the
leading <bos>, which the tokenizer adds. The sft phase also reads positions.npy and explanations.npy
(lens/data.py) in the data folder, 8 tokens each; pretokenize does not write them: without them run `:grpo`.

Hardware: 8 GPUs of 80 GB, the batch split, a copy of the model on each; tensor parallel instead:
--config.mesh.model=8 --config.mesh.data=1. Not yet run on this hardware; memory computed from shapes. Per
device: base 54.0 GB in bfloat16 (6.8 tensor parallel); 173.4 M parameters (5 maps 144.5 M, read-out 28.9 M)
with gradient and Adam 2.8 GB; logits of the sft phase 0.3 GB a copy.

Batches: grpo 64 activations (8 a device) x 4 explanations = 256 rollouts a step, as in the original recipe;
sft 32 documents x 8 = 256 activations. A few tokens of this model have very large norms; the original recipe
left out activations above 3e5, this one does not. The entropy bonus acts below 0.1 nats only: where the
original schedule (2.0 to 0.1) ends.
"""

import ml_collections

from configs import base


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.get_config()
    c.phases = base.phases(recipe)
    c.subject.path = 'google/gemma-3-27b-it'
    c.subject.dtype = 'bfloat16'
    c.layer = 45
    c.data.path = 'data/gemma-3-27b-it'
    c.explanation_len = 8
    c.mesh.data = 8

    c.decoder.prompt = '<bos>Short explanation of <embed>. Language, topic, sentiment, claims, speaker, style, etc:'
    c.decoder.patched_blocks = 5
    c.encoder.prompt = '<bos>Summary of the text, encapsulating the main points and message, style and details:<text>'
    c.encoder.readout = 'affine'

    c.sft.documents, c.sft.vectors = 32, 8
    c.sft.learning_rate_decoder = 'cosine 1e-3 1e-5 warmup 10s'
    c.sft.learning_rate_encoder = 'cosine 1e-4 1e-6 warmup 10s'

    c.grpo.steps = 20000
    c.grpo.documents, c.grpo.vectors, c.grpo.group = 64, 1, 4
    c.grpo.learning_rate_decoder = 'cosine 1e-3 1e-5 warmup 100s'
    c.grpo.learning_rate_encoder = 'cosine 1e-4 1e-6 warmup 100s'
    c.grpo.entropy_weight, c.grpo.entropy_clamp = 1.0, 0.1

    c.eval.batch = 128  # 32 documents, as in a training step
    c.eval.every = c.checkpoint.every = '500s'
    return c
