"""gpt-oss-20b, read after block 16 of 24: explanations of 8 tokens. `:120b` reads gpt-oss-120b after block 24 of 36.

    PRETOKENIZE_ARGS='--seq_len=4096 --min_tokens=32' launch/generate_local.sh openai/gpt-oss-20b \
        --input_dataset=HuggingFaceH4/ultrachat_200k --input_split=train_sft --output_path=data/rollouts/gpt-oss-20b
    python -m data_gen.label --data=data/rollouts/gpt-oss-20b/tokens --tokenizer=openai/gpt-oss-20b --method=self \
        --next=text --bare --parts=topic:2,next:2,now:2 --explanation_len=8 --out=data/gpt-oss-20b
    python -m lens.main --config=configs/gptoss.py --workdir=runs/gptoss
    python -m lens.main --config=configs/gptoss.py:sft --workdir=runs/gptoss_sft
    python -m lens.main --config=configs/gptoss.py:grpo --workdir=runs/gptoss_grpo
    python -m lens.main --config=configs/gptoss.py:gumbel --workdir=runs/gptoss_gumbel
    python -m lens.main --config=configs/gptoss.py:120b --workdir=runs/gptoss_120b

Prepare: the model in the folder openai/gpt-oss-20b (config.json, safetensors, tokenizer; elsewhere:
--config.subject.path). The first command serves it and lets it answer a chat data set with thinking, VLLM_ARGS has the
options of vLLM; the second makes the labels of the sft phase from these chats alone. `:120b` reads
openai/gpt-oss-120b and data/gpt-oss-120b. `make demo-data` is the same chain on a tiny gpt-oss.

Hardware: 8 GPUs of 80 GB, the batch split, a copy of the model on each; tensor parallel instead:
--config.mesh.model=8 --config.mesh.data=1, which `:120b` sets by itself. Not yet run on this hardware;
memory computed from shapes. Per device: base 41.8 GB in bfloat16 (41.8 / 8 = 5.2 tensor parallel; 120b
233.7 / 8 = 29.2); 41.5 M parameters of 5 maps with gradient and Adam 0.7 GB; logits of the sft phase
0.2 GB a copy. Less: --config.subject.packed=true keeps the experts in MXFP4, as published 13.8 GB.

Batches: sft 24 documents x 10 activations = 240, near the 256 of the original recipe and 3 documents
a device. grpo 8 documents (one a device) x 2 activations x 8 explanations = 128 rollouts, the number that
the original recipe of configs/gemma2_9b.py drew; none is known for this model. gumbel has the
batch of sft and a constant tau of 1 (original: 5 to 0.1).
"""

import ml_collections
from lens.configs import base

RECIPES = base.RECIPES | {'gumbel': ('gumbel',), '120b': ('sft', 'grpo')}
CHAT = (  # system, user, analysis
    '<|start|>system<|message|>{}<|end|><|start|>user<|message|>{}<|end|>'
    '<|start|>assistant<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>'
)


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    size, layer, mesh = ('120b', 24, (1, 8)) if recipe == '120b' else ('20b', 16, (8, 1))
    c = base.consistency_lens(recipe, f'openai/gpt-oss-{size}', layer, recipes=RECIPES)
    c.data.min_pos = 3
    c.mesh.data, c.mesh.model = mesh

    aspects = 'Language topic sentiment claims speaker style'
    c.decoder.prompt = CHAT.format('Explainer', 'Short explanation of <embed>', aspects)
    c.encoder.prompt = CHAT.format('Analyzer', 'Discuss<text>', 'points message style details')
    c.encoder.readout = 'none'

    c.sft.documents, c.sft.vectors = 24, 10
    c.grpo.documents, c.grpo.vectors = 8, 2
    c.gumbel.steps = 20000
    c.gumbel.documents, c.gumbel.vectors = 24, 10
    c.gumbel.learning_rate_decoder = c.grpo.learning_rate_decoder
    c.gumbel.learning_rate_encoder = c.grpo.learning_rate_encoder
    c.eval.batch = 96  # 24 documents, as in a training step
    return c
