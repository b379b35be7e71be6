"""Model FLOPs against published numbers, and against the products in the traced train step, to the last one.

The program does more than its mathematics needs; every case says what more it does, and the rest must be equal.
"""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import partial_eval

from configs import base as settings
from lens import config
from lens.lens_init import Start, State, configs, make_lens
from lens.models import families
from lens.models.decoder import Prompt
from lens.models.transformer import Transformer
from lens.response import NO_TAGS
from lens.tools import flops
from lens.train import train_step
from tests.conftest import TINY

MODELS = pathlib.Path(__file__).parent / 'hf_configs'
GFLOP = 1e9


def published(name):
    return families.from_hf(json.loads((MODELS / f'{name}.json').read_text()))


def test_gpt_oss_20b_has_the_numbers_of_its_shapes():
    c = published('gpt-oss-20b')
    token = 24 * flops.block_flops(c) + flops.head_flops(c)
    assert token / GFLOP == pytest.approx(7.214, abs=5e-4)
    assert flops.head_flops(c) / GFLOP == pytest.approx(1.158, abs=5e-4)
    experts = 24 * (flops.block_flops(c) - flops.block_flops(dataclasses.replace(c, top_k=0)))
    assert experts / GFLOP == pytest.approx(4.778, abs=5e-4)
    assert 17 * flops.block_flops(c) / GFLOP == pytest.approx(4.29, abs=5e-3)  # encoder read after block 16
    assert 13 * flops.block_flops(c) / GFLOP == pytest.approx(3.28, abs=5e-3)


@pytest.mark.parametrize(('tokens', 'gflop'), [(256, 0.04), (1024, 0.12), (4096, 0.43), (8192, 0.83)])
def test_gpt_oss_20b_scores_per_token(tokens, gflop):
    c = published('gpt-oss-20b')
    assert flops.score_flops(c, 0, 24, 0, tokens) / tokens / GFLOP == pytest.approx(gflop, abs=5e-3)


@pytest.mark.parametrize(
    ('name', 'parameters'), [('gpt2', 123.5e6), ('Qwen2.5-7B-Instruct', 7.07e9), ('gemma-2-9b-it', 9.24e9)]
)
def test_dense_models_are_two_flops_for_each_parameter(name, parameters):
    """Parameters of matrices, an untied embedding table left out. GPT-2: 124 M less 0.8 M of positions."""
    c = published(name)
    assert c.n_layers * flops.block_flops(c) + flops.head_flops(c) == pytest.approx(2 * parameters, rel=2e-3)


@pytest.mark.parametrize(
    ('kind', 'tflops'),
    [
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA H200', 989),
        ('NVIDIA A100-SXM4-80GB', 312),
        ('TPU v4', 275),
        ('TPU v5 lite', 197),
        ('TPU v5e', 197),
        ('TPU v5', 459),
        ('TPU v5p', 459),
        ('TPU v6 lite', 918),
        ('TPU v6e', 918),
    ],
)
def test_peaks(kind, tflops):
    assert flops.peak(kind) == tflops * 1e12


def test_an_unknown_device_has_no_peak():
    assert flops.peak('cpu') is None


# No two passes have as many tokens.
SEQ, DOCUMENTS, VECTORS, LENGTH, GROUP = 11, 2, 3, 6, 5
PROMPT, ENCODED, PREFIX = 8, 12, 4  # tokens of the decoder's prompt, of all the encoder's rows, of the natural prefix
LAYER, OUTPUT_LAYER = 1, 2
TEXT = PROMPT + LENGTH - 1  # the last token is fed to nobody
CACHE = PROMPT + LENGTH
PROMPTS = Prompt([1] * 3, [2] * 4), ([3] * 2, [4] * 3)  # one more token each: the slot; the token that was read
LLAMA = dataclasses.replace(TINY, n_layers=5, windows=(4, 0), remat='dots')
GPT2 = dataclasses.replace(LLAMA, ropes=(), mlp='gelu_plain', tied=True, windows=(0,))
GPT_OSS = dataclasses.replace(LLAMA, n_experts=5, top_k=2)


def setting(objective, **changes):
    """Configuration of one phase; block__key=value."""
    cfg = settings.get_config()
    cfg.phases, cfg.layer, cfg.explanation_len = (objective,), LAYER, LENGTH
    cfg.decoder.patched_blocks, cfg.encoder.output_layer, cfg.encoder.current_token = 2, OUTPUT_LAYER, True
    cfg.lora.pattern, cfg.lora.rank = 'q|k|o|down', 7
    p = cfg[objective]
    p.documents, p.vectors, p.group, p.kl_skip = DOCUMENTS, VECTORS, GROUP, 0
    for key, value in changes.items():
        block, _, name = key.rpartition('__')
        (cfg[block] if block else cfg)[name] = value
    return cfg


def abstract(c, cfg):
    """(phase, lens, base, arguments of its train step), all shapes."""
    base = jax.eval_shape(lambda: Transformer(c, rngs=nnx.Rngs(0)))
    maps = configs(cfg, PROMPTS[0], c)[0].n_maps
    d = c.d_model
    start = Start((jnp.zeros((maps, d, d)), jnp.zeros((maps, d))), (jnp.zeros((d, d)), jnp.zeros(d)))
    lens = jax.eval_shape(lambda b: make_lens(cfg, PROMPTS, b, start, jax.random.key(0)), base)
    (phase,) = config.make_phases(cfg, [5] * PREFIX, NO_TAGS)
    shapes = {'tokens': (DOCUMENTS, SEQ), 'positions': (DOCUMENTS, VECTORS)}
    if phase.labelled:
        shapes['explanations'] = (DOCUMENTS, VECTORS, LENGTH)
    batch = {k: jax.ShapeDtypeStruct(s, jnp.int32) for k, s in shapes.items()}
    reference = lens.decoder if phase.hparams.needs_reference else ()
    state = State(jax.ShapeDtypeStruct((), jnp.int32), lens, jax.eval_shape(phase.tx.init, lens), reference)
    return phase, lens, (state, base, batch, jax.eval_shape(lambda: jax.random.key(0)))


def products(jaxpr):
    """FLOPs of all products of matrices in a program, scans times their length.

    Left out are those in highest precision: they put vectors into the slots of a prompt, by ones and zeros.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ('dot_general', 'ragged_dot_general'):
            numbers = (
                eqn.params.get('dimension_numbers') or eqn.params['ragged_dot_dimension_numbers'].dot_dimension_numbers
            )
            highest = eqn.params['precision'] and jax.lax.Precision.HIGHEST in eqn.params['precision']
            contracted = math.prod(eqn.invars[0].aval.shape[i] for i in numbers[0][0])
            total += 0 if highest else 2 * math.prod(eqn.outvars[0].aval.shape) * contracted
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'))
        inner = [getattr(x, 'jaxpr', x) for x in inner]
        total += eqn.params.get('length', 1) * sum(products(x) for x in inner if hasattr(x, 'eqns'))
    return total


def traced(phase, arguments):
    step = functools.partial(train_step, objective=phase.objective, hparams=phase.hparams, tx=phase.tx)
    jaxpr = jax.make_jaxpr(step)(*arguments).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return products(used)


def hidden(c, layers, at, slots):
    """FLOPs of scores and values of keys that one row's queries at positions `at` meet and must not see."""
    q, k = np.asarray(at)[:, None], np.arange(slots)
    total = 0
    for i in layers:
        window = c.windows[i % len(c.windows)]
        seen = (k <= q) & ((q - k < window) if window else True)
        total += (~seen).sum() * 4 * c.n_heads * c.head_dim
    return int(total)


def hidden_in_a_text(c, last, tokens):
    return hidden(c, range(last), range(tokens), tokens)


def hidden_in_the_basics(c, samples, passes=3):
    """Of extraction and of the decoder and the encoder with their gradients."""
    sides = hidden_in_a_text(c, c.n_layers, TEXT) + hidden_in_a_text(c, OUTPUT_LAYER + 1, ENCODED)
    return DOCUMENTS * hidden_in_a_text(c, LAYER + 1, SEQ) + passes * samples * sides


def hidden_in_sampling(c, texts, samples):
    """Prompts and tokens look at the whole cache."""
    prompts = texts * hidden(c, range(c.n_layers), range(PROMPT), CACHE)
    return prompts + samples * hidden(c, range(c.n_layers), range(PROMPT, TEXT), CACHE)


TEXTS = DOCUMENTS * VECTORS


SIDES = {
    'maps': {},
    'lora': {'decoder__train': 'lora', 'encoder__train': 'lora'},
    'full': {'decoder__train': 'full', 'encoder__train': 'full', 'decoder__shared_map': True},
    'mixed': {
        'decoder__train': 'lora',
        'encoder__train': 'full',
        'encoder__readout': 'none',
        'decoder__injection': 'replace',
    },
}


@pytest.mark.parametrize(
    ('c', 'changes'),
    [pytest.param(LLAMA, v, id=f'llama-{k}') for k, v in SIDES.items()]
    + [pytest.param(GPT2, SIDES[k], id=f'gpt2-{k}') for k in ('lora', 'full')],
)
def test_sft(c, changes):
    phase, lens, arguments = abstract(c, setting('sft', **changes))
    parts = flops.step_flops(c, phase, lens, SEQ)
    assert parts['sampling'] == 0
    assert traced(phase, arguments) == sum(parts.values()) + hidden_in_the_basics(c, TEXTS)


def test_position_vectors_are_trained_through_the_maps():
    phase, lens, arguments = abstract(GPT2, setting('sft', position_vectors=True))
    more = traced(phase, arguments) - sum(flops.step_flops(GPT2, phase, lens, SEQ).values())
    assert more == hidden_in_the_basics(GPT2, TEXTS)


def test_top_k_experts():
    """The policy that keeps products keeps no grouped ones: experts run once more in the backward pass."""
    phase, lens, arguments = abstract(GPT_OSS, setting('sft'))
    c, d, k = GPT_OSS, GPT_OSS.d_model, GPT_OSS.top_k
    layers_tokens = TEXTS * (c.n_layers * TEXT + (OUTPUT_LAYER + 1) * ENCODED)
    again = layers_tokens * k * 3 * 2 * d * c.d_ff
    weighted = (3 * layers_tokens + DOCUMENTS * (LAYER + 1) * SEQ) * 2 * k * d  # sums over the chosen experts
    total = sum(flops.step_flops(c, phase, lens, SEQ).values())
    assert traced(phase, arguments) == total + hidden_in_the_basics(c, TEXTS) + again + weighted


@pytest.mark.parametrize(
    ('changes', 'train'),
    [
        ({}, 'maps'),
        ({'beta': 0.1, 'updates': 2}, 'maps'),
        ({'lm_weight': 0.1, 'beta': 0.1, 'kl_to': 'start'}, 'lora'),
        ({'updates': 3, 'mean_of': 2}, 'full'),
    ],
    ids=['plain', 'natural', 'start', 'updates'],
)
def test_grpo(changes, train):
    c, changes = LLAMA, {f'grpo__{k}': v for k, v in changes.items()}
    phase, lens, arguments = abstract(c, setting('grpo', decoder__train=train, encoder__train=train, **changes))
    hp = phase.hparams
    samples = TEXTS * GROUP * hp.mean_of
    parts = flops.step_flops(c, phase, lens, SEQ)
    more = hidden_in_the_basics(c, samples, 3 * hp.updates) + hidden_in_sampling(c, TEXTS, samples)
    more += hp.needs_reference * samples * hidden_in_a_text(c, c.n_layers, TEXT)
    if hp.lm_weight or hp.beta:
        more += more_for_the_natural_prefix(c, samples, hp.updates)
    assert traced(phase, arguments) == sum(parts.values()) + more
    assert 0 < parts['sampling'] < parts['scoring']
    assert flops.in_mfu(parts) == parts['extraction'] + parts['scoring']


def more_for_the_natural_prefix(c, samples, updates=1):
    """The program makes the whole pass anew for every update."""
    tokens = PREFIX + LENGTH - 1
    needed = flops.stack_flops(c, 0, c.n_layers, 0, tokens, logits=LENGTH)
    return samples * (updates * hidden_in_a_text(c, c.n_layers, tokens) + (updates - 1) * needed)


@pytest.mark.parametrize('train', ['maps', 'lora', 'full'])
def test_gumbel_in_two_passes(train):
    """The program makes the relaxed rows themselves, too, and takes them off again."""
    c = LLAMA
    cfg = setting('gumbel', gumbel__lm_weight=0.1, decoder__train=train, encoder__train=train)
    phase, lens, arguments = abstract(c, cfg)
    more = hidden_in_the_basics(c, TEXTS) + hidden_in_sampling(c, TEXTS, TEXTS) + more_for_the_natural_prefix(c, TEXTS)
    more += TEXTS * LENGTH * flops.head_flops(c)
    assert traced(phase, arguments) == sum(flops.step_flops(c, phase, lens, SEQ).values()) + more


@pytest.mark.parametrize(
    ('form', 'train'), [('full', 'maps'), ('full', 'lora'), ('full', 'full'), ('truncated', 'lora')]
)
def test_gumbel_through_the_sampling(form, train):
    """Backwards, every step of the sampling runs once more, which is rematerialisation."""
    c = LLAMA
    phase, lens, arguments = abstract(
        c, setting('gumbel', gumbel__form=form, decoder__train=train, encoder__train=train)
    )
    parts = flops.step_flops(c, phase, lens, SEQ)
    more = DOCUMENTS * hidden_in_a_text(c, LAYER + 1, SEQ) + TEXTS * 3 * hidden_in_a_text(c, OUTPUT_LAYER + 1, ENCODED)
    more += hidden_in_sampling(c, TEXTS, TEXTS) + parts['sampling']
    more += TEXTS * 3 * hidden_in_a_text(c, c.n_layers, PROMPT)
    more += TEXTS * 3 * hidden(c, range(c.n_layers), range(PROMPT, TEXT), CACHE + 1)
    more += (form == 'full') * TEXTS * flops.head_flops(c)  # of a zero gradient: the last token is fed to nobody
    assert traced(phase, arguments) == sum(parts.values()) + more


@pytest.mark.parametrize(
    ('c', 'objective', 'changes'),
    [
        (LLAMA, 'sft', {}),
        (dataclasses.replace(LLAMA, n_layers=LAYER + 2), 'sft', {}),
        (LLAMA, 'grpo', {'grpo__updates': 2}),
    ],
    ids=['sft', 'one block behind', 'two updates'],
)
def test_functional_kl(c, objective, changes):
    """For each update the program reads the texts anew and runs the stream behind them, beside it the natural and the
    replaced activations, both with a gradient; that of the stream's keys and values is thrown away."""
    plain, lens, arguments = abstract(c, setting(objective, **changes))
    phase, _, _ = abstract(c, setting(objective, **changes, **{f'{objective}__kl_weight': 0.1}))
    updates, samples = phase.hparams.updates, TEXTS * phase.hparams.group
    lo, hi = LAYER + 1, c.n_layers
    stream = flops.stack_flops(c, lo, hi - 1, 0, SEQ) + SEQ * 4 * c.d_model * c.n_kv_heads * c.head_dim
    again = flops.stack_flops(c, 0, lo, 0, SEQ) + hidden_in_a_text(c, lo, SEQ)
    again += hidden(c, range(lo, hi - 1), range(SEQ), SEQ)
    more = DOCUMENTS * (updates * again + (updates - 1) * stream)
    more += samples * (2 * updates - 1) * ((hi - lo) * flops.block_flops(c) + flops.head_flops(c))
    windows = [c.windows[i % len(c.windows)] or SEQ for i in range(lo, hi)]
    seen = sum(min(p + 1, w) for w in windows for p in range(SEQ)) / SEQ
    met = (SEQ + 2 * samples // DOCUMENTS) * (hi - lo)
    more += samples * 4 * c.n_heads * c.head_dim * (6 * updates * met - (1 + 2 * updates) * seen)
    needed = [sum(flops.step_flops(c, x, lens, SEQ).values()) for x in (phase, plain)]
    difference = traced(phase, arguments) - traced(plain, arguments)
    assert difference == pytest.approx(needed[0] - needed[1] + more, rel=1e-12)


FREEZE = {side: (f'^{side}/', None) for side in ('decoder', 'encoder')}
FREEZE['decoder/base'] = ('^decoder/base/', None)
REST = ('.', 1.0, 0.0, 'all', '0')


@pytest.mark.parametrize('train', ['lora', 'full'])
@pytest.mark.parametrize('frozen', FREEZE)
def test_what_the_table_freezes_has_no_backward_pass(frozen, train):
    c = LLAMA
    cfg = setting('sft', decoder__train=train, encoder__train=train, sft__table=(FREEZE[frozen], REST))
    phase, lens, arguments = abstract(c, cfg)
    more = DOCUMENTS * hidden_in_a_text(c, LAYER + 1, SEQ)
    more += (1 if frozen == 'decoder' else 3) * TEXTS * hidden_in_a_text(c, c.n_layers, TEXT)
    more += (1 if frozen == 'encoder' else 3) * TEXTS * hidden_in_a_text(c, OUTPUT_LAYER + 1, ENCODED)
    assert traced(phase, arguments) == sum(flops.step_flops(c, phase, lens, SEQ).values()) + more


@pytest.mark.parametrize('train', ['lora', 'full'])
def test_a_frozen_encoder_still_leads_the_gradient_to_the_words(train):
    c = LLAMA
    cfg = setting('gumbel', decoder__train=train, encoder__train=train, gumbel__table=(FREEZE['encoder'], REST))
    phase, lens, arguments = abstract(c, cfg)
    more = hidden_in_the_basics(c, TEXTS) + hidden_in_sampling(c, TEXTS, TEXTS) + TEXTS * LENGTH * flops.head_flops(c)
    assert traced(phase, arguments) == sum(flops.step_flops(c, phase, lens, SEQ).values()) + more
