"""Model FLOPs of a training step, for its utilisation of the devices (MFU).

What the mathematics of a step needs, not what a program does. A product with a weight is 2 FLOPs for each of its
parameters and each token; of experts the top k count. A query meets the keys that it may see: half of them
under the causal mask, at most the window in a sliding layer. The backward pass is one product more to the inputs,
and one more to the weights where they are trained: a frozen base with adapters or maps is 2 F, a trained one 3 F.
Scores have two activations as factors, so theirs is always twice the forward. Nothing counts twice: no
rematerialisation, and no pass that a program repeats with the same inputs and weights. The head counts for the
tokens whose logits are used. Left out is all that is no product of matrices, and the optimizer.
"""

from typing import NamedTuple

import jax

from lens import objectives, sharding
from lens.config import Phase
from lens.models.lens import Lens
from lens.models.transformer import TransformerConfig

# Dense bfloat16 FLOP/s of one chip by a part of jax.Device.device_kind; the first that fits.
PEAK_FLOPS = {
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'H200': 989e12,
    'A100': 312e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,  # what v5p calls itself
    'TPU v4': 275e12,
}
# Parts of a step that MFU counts. Sampling is bound by memory: state tokens per second of it.
IN_MFU = ('extraction', 'scoring')


class Passes(NamedTuple):
    """How often a product counts, by its second factor: a weight of the stack, an activation, a trained side's
    weight (adapters and the like)."""

    weights: int = 1
    scores: int = 1
    extras: int = 1

    def __sub__(self, other: 'Passes') -> 'Passes':
        return Passes(*(a - b for a, b in zip(self, other, strict=True)))


FORWARD = Passes()


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a chip, None where it is not known."""
    return next((v for k, v in PEAK_FLOPS.items() if k.lower() in device_kind.lower()), None)


def block_flops(c: TransformerConfig) -> int:
    """Of the products with the weights of one block, for one token."""
    attention = c.d_model * c.head_dim * 2 * (c.n_heads + c.n_kv_heads)
    mlp = (2 if c.mlp == 'gelu_plain' else 3) * c.d_model * c.d_ff
    if c.n_experts:
        mlp = c.d_model * c.n_experts + c.top_k * mlp
    return 2 * (attention + mlp)


def head_flops(c: TransformerConfig) -> int:
    """Of the logits of one token."""
    return 2 * c.d_model * c.vocab_size


def score_flops(c: TransformerConfig, lo: int, hi: int, start: int, stop: int) -> int:
    """Of scores and mixed values of blocks lo..hi-1 for one row's queries at positions start..stop-1."""
    windows = [c.windows[i % len(c.windows)] for i in range(lo, hi)]
    pairs = sum(_visible_pairs(w, stop) - _visible_pairs(w, start) for w in windows)
    return 4 * c.n_heads * c.head_dim * pairs


def _visible_pairs(window: int, n: int) -> int:
    """Pairs of a query among the first n positions and a key that it sees; window 0: all before it."""
    full = min(n, window) if window else n
    return full * (full + 1) // 2 + (n - full) * window


def stack_flops(
    c: TransformerConfig, lo: int, hi: int, start: int, stop: int, *, logits: int = 0, passes: Passes = FORWARD
) -> int:
    """Of blocks lo..hi-1 for one row's tokens at positions start..stop-1, and of `logits` of them."""
    weights = (hi - lo) * (stop - start) * block_flops(c) + logits * head_flops(c)
    return passes.weights * weights + passes.scores * score_flops(c, lo, hi, start, stop)


def step_flops(c: TransformerConfig, phase: Phase, lens: Lens, seq_len: int) -> dict[str, float]:
    """FLOPs of one micro-step on all devices together, by part.

    extraction: reading the activations, all `seq_len` tokens of a row. sampling: drawing explanations.
    scoring: all passes of the loss, forward and backward. c: of the subject. lens: arrays or their shapes.
    """
    texts = phase.documents * phase.vectors
    samples = texts * phase.hparams.group * phase.hparams.mean_of
    return {
        'extraction': phase.documents * stack_flops(c, 0, phase.hparams.layer + 1, 0, seq_len),
        'sampling': _sampling(c, phase, lens, texts, samples),
        'scoring': _scoring(c, phase, lens, seq_len, samples),
    }


def in_mfu(parts: dict[str, float]) -> float:
    """FLOPs of the parts of a step that its utilisation is measured on."""
    return sum(parts[name] for name in IN_MFU)


def _sampling(c: TransformerConfig, phase: Phase, lens: Lens, texts: int, samples: int) -> int:
    """Prompts once per activation, tokens for every sample; the last token is fed to nobody."""
    if phase.labelled:
        return 0
    prompt, length = lens.decoder.prompt_len, phase.hparams.length
    stop = prompt + length - 1
    prefill = stack_flops(c, 0, c.n_layers, 0, prompt, logits=1) + prompt * _adapters(lens.decoder)
    steps = stack_flops(c, 0, c.n_layers, prompt, stop, logits=length - 1) + (length - 1) * _adapters(lens.decoder)
    return texts * (prefill + _weight(lens.decoder.maps_w)) + samples * steps


def _scoring(c: TransformerConfig, phase: Phase, lens: Lens, seq_len: int, samples: int) -> float:
    hp, loss = phase.hparams, phase.objective.loss
    decoder, encoder = _passes('decoder', phase, lens), _passes('encoder', phase, lens)
    relaxed = 0
    if loss is objectives.gumbel:
        encoder = encoder._replace(weights=max(encoder.weights, 2), scores=3, extras=max(encoder.extras, 2))
        relaxed = _relaxed_words(c, hp.form, hp.length)
        if hp.form != 'two_pass':  # its forward is the sampling
            decoder -= FORWARD
    row = _decoder_row(c, lens, hp.length, decoder) + _encoder_row(c, lens, hp.length, encoder) + relaxed
    fixed = 0
    if loss is not objectives.sft:
        if hp.lm_weight or (hp.beta and hp.kl_to == 'natural'):
            fixed += stack_flops(c, 0, c.n_layers, 0, len(hp.natural_prefix) + hp.length - 1, logits=hp.length)
        if hp.needs_reference:
            fixed += _decoder_row(c, lens, hp.length, FORWARD)
    total = samples * (hp.updates * row + fixed)
    if hp.kl_weight:
        total += _functional_kl(c, phase, seq_len, samples)
    return total


def _passes(name: str, phase: Phase, lens: Lens) -> Passes:
    """Of one side of the lens: a backward pass through all of it where any leaf of it is trained."""
    paths = [sharding.path(kp) for kp, _ in jax.tree_util.tree_leaves_with_path(lens)]
    trained = [p for p in paths if p.startswith(f'{name}/') and phase.tx.trained(p)]
    if not trained:
        return FORWARD
    return Passes(2 + any(p.startswith(f'{name}/base/') for p in trained), 3, 3)


def _weight(w) -> int:
    """Of a product of one vector with a matrix or a stack of them."""
    return 0 if w is None else 2 * w.size


def _adapters(side) -> int:
    """Of the adapters of all blocks, for one token."""
    return sum(2 * x.size for x in jax.tree.leaves(side.adapters))


def _decoder_row(c: TransformerConfig, lens: Lens, length: int, passes: Passes) -> int:
    """One explanation after its prompt, teacher-forced. The maps' input is data unless positions are taken off it."""
    d = lens.decoder
    tokens = d.prompt_len + length - 1
    maps = passes.extras - (passes.extras > 1 and d.positions is None)
    extras = passes.extras * tokens * _adapters(d) + maps * _weight(d.maps_w)
    return stack_flops(c, 0, c.n_layers, 0, tokens, logits=length, passes=passes) + extras


def _encoder_row(c: TransformerConfig, lens: Lens, length: int, passes: Passes) -> int:
    """One explanation in its prompt, through the read-out."""
    e = lens.encoder
    tokens = len(e.prompt_left) + length + len(e.prompt_right) + e.config.current_token
    extras = passes.extras * (tokens * _adapters(e) + _weight(e.readout_w))
    return stack_flops(c, 0, e.config.output_layer + 1, 0, tokens, passes=passes) + extras


def _relaxed_words(c: TransformerConfig, form: str, length: int) -> int:
    """Straight-through words of one explanation. In value they are rows of a table; the gradient is a product
    with that table, in the full form also for the rows that the decoder is fed back."""
    return (length + (length - 1) * (form == 'full')) * head_flops(c)


def _functional_kl(c: TransformerConfig, phase: Phase, seq_len: int, samples: int) -> float:
    """The subject behind the read block: its stream once, of the last block keys and values alone, and beside
    it the tokens with an activation and, with a backward pass to them, those with a reconstruction.

    Positions are taken as uniform. The stream has no gradient, so that scores have the backward pass of a weight.
    """
    lo, hi = phase.hparams.layer + 1, c.n_layers
    stream = 0
    if lo < hi:
        keys_values = seq_len * 4 * c.d_model * c.n_kv_heads * c.head_dim
        stream = stack_flops(c, lo, hi - 1, 0, seq_len) + keys_values
    beside = stack_flops(c, lo, hi, 0, seq_len, logits=seq_len) / seq_len
    return phase.documents * stream + samples * beside * (1 + 2 * phase.hparams.updates)
