"""gpt2 (124 M parameters), read after block 6 of 12: explanations of 10 tokens, on one small GPU.

    python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=openai-community/gpt2 --out=data/gpt2 --seq_len=128
    python -m lens.main --config=configs/gpt2.py --workdir=runs/gpt2
    python -m lens.main --config=configs/gpt2.py:sft --workdir=runs/gpt2_sft
    python -m lens.main --config=configs/gpt2.py:grpo --workdir=runs/gpt2_grpo

Prepare: the model in the folder openai-community/gpt2 (elsewhere: --config.subject.path), and web texts in
texts.jsonl (the original recipe: openwebtext) in a field "text". The sft phase also reads positions.npy and
explanations.npy (lens/data.py) in the data folder, 10 tokens each; pretokenize does not write them: without
them run `:grpo`.

Hardware: meant for one small GPU. Not yet run on this hardware; memory computed from shapes: base
0.5 GB in float32; 1.2 M parameters (one map, read-out) with gradient and Adam 19 MB; logits of the sft phase
0.3 GB a copy.

One map at the input alone, and an encoder that is read out after the last block, as in the original recipe,
whose objective was another one (Gumbel, 128 x 16 activations a step). sft 32 documents x 4 = 128 activations;
grpo 16 activations x 8 explanations = 128 rollouts. All blocks patched instead:
--config.decoder.patched_blocks=12 --config.decoder.shared_map=false --config.encoder.output_layer=6
"""

import ml_collections

from configs import base


def get_config(recipe: str = '') -> ml_collections.ConfigDict:
    c = base.get_config()
    c.phases = base.phases(recipe)
    c.subject.path = 'openai-community/gpt2'
    c.layer = 6
    c.data.path = 'data/gpt2'
    c.explanation_len = 10

    c.decoder.prompt = (
        '<|endoftext|>Short explanation of <embed>. Language, topic, sentiment, claims, speaker, style, etc:'
    )
    c.decoder.patched_blocks = 0
    c.decoder.shared_map = True
    c.encoder.prompt = (
        '<|endoftext|>Summary of the text, encapsulating the main points and message, style and details:<text>'
    )
    c.encoder.output_layer = 11
    c.encoder.readout = 'affine'

    c.sft.steps = 5000
    c.sft.documents, c.sft.vectors = 32, 4
    c.sft.learning_rate_decoder = c.sft.learning_rate_encoder = 'cosine 1e-3 1e-4 warmup 100s'

    c.grpo.steps = 10000
    c.grpo.documents, c.grpo.vectors, c.grpo.group = 16, 1, 8
    c.grpo.learning_rate_decoder = c.grpo.learning_rate_encoder = 'cosine 1e-3 1e-4 warmup 100s'
    c.grpo.entropy_weight, c.grpo.entropy_clamp = 1.0, 0.1

    c.eval.every = c.checkpoint.every = '500s'
    return c
