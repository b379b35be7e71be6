"""gemma-3-27b-it (its text model), read after block 45 of 62: explanations of 8 tokens.

    PRETOKENIZE_ARGS='--seq_len=1024' launch/generate_local.sh google/gemma-3-27b-it \
        --input_dataset=HuggingFaceH4/ultrachat_200k --input_split=train_sft --output_path=data/rollouts/gemma-3-27b-it
    python -m data_gen.label --data=data/rollouts/gemma-3-27b-it/tokens --tokenizer=google/gemma-3-27b-it --method=self \
        --next=text --bare --parts=topic:2,next:2,now:2 --explanation_len=8 --out=data/gemma-3-27b-it
    python -m lens.main --config=configs/gemma3_27b.py --workdir=runs/gemma3_27b
    python -m lens.main --config=configs/gemma3_27b.py:sft --workdir=runs/gemma3_27b_sft
    python -m lens.main --config=configs/gemma3_27b.py:grpo --workdir=runs/gemma3_27b_grpo

Prepare: the model in the folder google/gemma-3-27b-it (elsewhere: --config.subject.path); data as for
configs/gemma2_9b.py.

Hardware: 8 GPUs of 80 GB, the batch split, a copy of the model on each; tensor parallel instead:
--config.mesh.model=8 --config.mesh.data=1. Not yet run on this hardware; memory computed from shapes. Per
device: base 54.0 GB in bfloat16 (6.8 tensor parallel); 173.4 M parameters (5 maps 144.5 M, read-out 28.9 M)
with gradient and Adam 2.8 GB; logits of the sft phase 0.3 GB a copy.

Batches: grpo 64 activations (8 a device) x 4 explanations = 256 rollouts a step, as in the original recipe;
sft 32 documents x 8 = 256 activations. A few tokens of this model have very large norms; the original recipe
left out activations above 3e5, this one does not.
"""

import ml_collections
from lens.configs import base


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.consistency_lens(recipe, 'google/gemma-3-27b-it', 45, '<bos>')
    c.mesh.data = 8
    c.grpo.documents, c.grpo.group = 64, 4
    return c
