"""gpt-oss-20b, read after block 16 of 24: explanations of 8 tokens. `:120b` reads gpt-oss-120b after block 24 of 36.

    python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=openai/gpt-oss-20b --out=data/gpt-oss-20b \
        --seq_len=4096 --min_tokens=32
    python -m lens.main --config=configs/gptoss.py --workdir=runs/gptoss
    python -m lens.main --config=configs/gptoss.py:sft --workdir=runs/gptoss_sft
    python -m lens.main --config=configs/gptoss.py:grpo --workdir=runs/gptoss_grpo
    python -m lens.main --config=configs/gptoss.py:gumbel --workdir=runs/gptoss_gumbel
    python -m lens.main --config=configs/gptoss.py:120b --workdir=runs/gptoss_120b

Prepare: the model in the folder openai/gpt-oss-20b (config.json, safetensors, tokenizer; elsewhere:
--config.subject.path), and chats in texts.jsonl, rendered with the chat template in a field "text". The
sequence length belongs to the data folder. `:120b` reads openai/gpt-oss-120b and data/gpt-oss-120b. The sft
phase also reads positions.npy and explanations.npy (lens/data.py) in the data folder, 8 tokens each;
pretokenize does not write them: without them run `:grpo`.

Hardware: 8 GPUs of 80 GB, the batch split, a copy of the model on each; tensor parallel instead:
--config.mesh.model=8 --config.mesh.data=1, which `:120b` sets by itself. Not yet run on this hardware;
memory computed from shapes. Per device: base 41.8 GB in bfloat16 (41.8 / 8 = 5.2 tensor parallel; 120b
233.7 / 8 = 29.2); 41.5 M parameters of 5 maps with gradient and Adam 0.7 GB; logits of the sft phase
0.2 GB a copy. Less: --config.subject.packed=true keeps the experts in MXFP4, as published 13.8 GB.

Batches: sft 24 documents x 10 activations = 240, near the 256 of the original recipe and 3 documents
a device. grpo 8 documents (one a device) x 2 activations x 8 explanations = 128 rollouts, the number that
the original recipe of configs/gemma2_9b.py drew; none is known for this model. The entropy bonus acts below 0.1 nats
only: where the original schedule (2.0 to 0.1 over 6000 steps) ends. gumbel has the batch of sft and a constant
tau of 1 (original: 5 to 0.1).
"""

import ml_collections

from configs import base

RECIPES = base.RECIPES | {
    'gumbel': ('gumbel',),
    '120b': ('sft', 'grpo'),
}
SYSTEM = '<|start|>system<|message|>{}<|end|>'
USER = '<|start|>user<|message|>{}<|end|>'
ANALYSIS = '<|start|>assistant<|channel|>analysis<|message|>{}<|end|>'
FINAL = '<|start|>assistant<|channel|>final<|message|>'


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.get_config()
    c.phases = base.phases(recipe, RECIPES)
    size = '120b' if recipe == '120b' else '20b'
    c.subject.path = f'openai/gpt-oss-{size}'
    c.subject.dtype = 'bfloat16'
    c.layer = {'20b': 16, '120b': 24}[size]
    c.data.path = f'data/gpt-oss-{size}'
    c.data.min_pos = 3
    c.explanation_len = 8
    c.mesh.data, c.mesh.model = {'20b': (8, 1), '120b': (1, 8)}[size]

    c.decoder.prompt = (
        SYSTEM.format('Explainer')
        + USER.format('Short explanation of <embed>')
        + ANALYSIS.format('Language topic sentiment claims speaker style')
        + FINAL
    )
    c.decoder.patched_blocks = 5
    c.encoder.prompt = (
        SYSTEM.format('Analyzer')
        + USER.format('Discuss<text>')
        + ANALYSIS.format('points message style details')
        + FINAL
    )
    c.encoder.readout = 'none'

    c.sft.documents, c.sft.vectors = 24, 10
    c.sft.learning_rate_decoder = 'cosine 1e-3 1e-5 warmup 10s'
    c.sft.learning_rate_encoder = 'cosine 1e-4 1e-6 warmup 10s'

    c.grpo.steps = 20000
    c.grpo.documents, c.grpo.vectors, c.grpo.group = 8, 2, 8
    c.grpo.learning_rate_decoder = 'cosine 1e-3 1e-5 warmup 100s'
    c.grpo.learning_rate_encoder = 'cosine 1e-4 1e-6 warmup 100s'
    c.grpo.entropy_weight, c.grpo.entropy_clamp = 1.0, 0.1

    c.gumbel.steps = 20000
    c.gumbel.documents, c.gumbel.vectors = 24, 10
    c.gumbel.learning_rate_decoder = 'cosine 1e-3 1e-5 warmup 100s'
    c.gumbel.learning_rate_encoder = 'cosine 1e-4 1e-6 warmup 100s'

    c.eval.batch = 96  # 24 documents, as in a training step
    c.eval.every = c.checkpoint.every = '500s'
    return c
