"""Natural language autoencoder of Qwen2.5-7B-Instruct, block 20 of 28: the recipe of kitft/nla-qwen2.5-7b-L20-av.

    python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=Qwen/Qwen2.5-7B-Instruct \
        --out=data/nla-qwen2.5-7b --seq_len=2048
    python -m data_gen.label --data=data/nla-qwen2.5-7b --tokenizer=Qwen/Qwen2.5-7B-Instruct --model=NAME \
        --explanation_len=122 --words=100
    python -m lens.main --config=configs/nla_qwen2_5_7b.py --workdir=runs/nla_qwen2_5_7b
    python -m lens.main --config=configs/nla_qwen2_5_7b.py:sft --workdir=runs/nla_qwen2_5_7b_sft
    python -m lens.main --config=configs/nla_qwen2_5_7b.py:grpo --workdir=runs/nla_qwen2_5_7b_grpo
    python -m lens.main --config=configs/nla_qwen2_5_7b.py:full --workdir=runs/nla_qwen2_5_7b_full

Prepare: the model in the folder Qwen/Qwen2.5-7B-Instruct (elsewhere: --config.subject.path), texts in
texts.jsonl (the released run: Ultra-FineWeb, then WildChat as well), and labels of 2-3 features for the sft phase. Without
a server that writes them, in place of --model and --words: --method=self --parts=topic:24,next:24,now:24.

From the released run: templates, marker, norm 150, positions from 50 on, head without bias on 21 blocks,
2 - 2 cosine, SFT of 1000 steps of 256 (2e-5 to 2e-6), then 4200 steps of 128 x 8 responses of at most 150 tokens with
KL 0.01 to the decoder that SFT has made, failed responses at -2: without a closed tag, or cut before their end.

Different: adapters of
rank 128 (rank-stabilised, alpha 16, of all matrices) in place of training in full, and the rates that such adapters
take (1e-4, 8e-5). `:full` trains both sides in full at the released rates (SFT 2e-5; GRPO 1.41e-5 and 7.07e-5),
everything split over the 8 devices; the decoder is put together once for a rollout, in bfloat16.

Hardware: meant for 8 GPUs of 80 GB. Not yet run on this hardware; memory by --plan: base 15.2 GB in
bfloat16, 0.6 B parameters of adapters and head with gradient, its sum and Adam 11 GB; `:full` 57 GB in grpo by the
compiler for an H100 (a plan without it takes float32 products: at most 87 GB, which would not fit).
"""

import ml_collections
from lens.configs import base

OPEN, CLOSE = '<explanation>\n', '\n</explanation>'  # what an explanation stands between
SUMMARY = 'Summary of the following text: <text><text></text> <summary>'
RECIPES = base.RECIPES | {'full': ('sft', 'grpo')}
SYSTEM = '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n'
EXPLAIN = """You are a meticulous AI researcher conducting an important investigation into activation vectors from a \
language model. Your overall task is to describe the semantic content of that activation vector.

We will pass the vector enclosed in <concept> tags into your context. You must then produce an explanation for the \
vector, enclosed within <explanation> tags. The explanation consists of 2-3 text snippets describing that vector.

Here is the vector:

<concept><embed></concept>

Please provide an explanation."""


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.get_config()
    c.phases = base.phases(recipe, RECIPES)
    c.subject.path = 'Qwen/Qwen2.5-7B-Instruct'
    c.subject.dtype = 'bfloat16'
    c.subject.remat = 'projections'
    c.layer = 20
    c.data.path = 'data/nla-qwen2.5-7b'
    c.data.min_pos = 50
    c.explanation_len = 150
    c.explanation_open, c.explanation_close = OPEN, CLOSE
    c.explanation_end = '<|im_end|>'
    c.mesh.data = 8

    c.decoder.prompt = f'{SYSTEM}<|im_start|>user\n{EXPLAIN}<|im_end|>\n<|im_start|>assistant\n'
    c.decoder.injection, c.decoder.marker, c.decoder.norm = 'replace', '㈎', 150.0
    c.encoder.prompt = SUMMARY
    c.encoder.readout, c.encoder.error = 'linear', 'direction'
    c.decoder.train = c.encoder.train = 'lora'
    c.lora.pattern, c.lora.rank, c.lora.alpha, c.lora.rs = '.*', 128, 16.0, True

    c.sft.documents, c.sft.vectors, c.sft.steps = 32, 8, 1000
    c.sft.learning_rate_decoder = c.sft.learning_rate_encoder = 'cosine 1e-4 1e-5 warmup 50s'
    c.grpo.documents, c.grpo.vectors, c.grpo.group, c.grpo.slices, c.grpo.steps = 32, 4, 8, 4, 4200
    c.grpo.learning_rate_decoder, c.grpo.learning_rate_encoder = 'constant 1e-4', 'constant 8e-5'
    c.grpo.beta, c.grpo.kl_to, c.grpo.kl_skip = 0.01, 'start', 0

    if recipe == 'full':
        c.decoder.train = c.encoder.train = 'full'
        c.mesh.shard_base = True
        c.subject.remat, c.sft.slices = 'full', 4
        c.sft.learning_rate_decoder = c.sft.learning_rate_encoder = 'cosine 2e-5 2e-6 warmup 50s'
        c.grpo.learning_rate_decoder, c.grpo.learning_rate_encoder = 'constant 1.41e-5', 'constant 7.07e-5'

    c.eval.documents, c.eval.vectors, c.eval.batch = 200, 4, 128
    c.eval.every = c.checkpoint.every = '100s'
    return c
