"""Model FLOPs of traced programs against parameters times tokens: nothing is compiled."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import base as settings
from lens import config, flops, sharding
from lens.lens_init import abstract_lens
from lens.models import families, moe
from lens.models.transformer import Transformer
from lens.response import NO_TAGS, Prompt, Texts
from lens.train import State, trace
from tests.tiny_world import TINY

MODELS = pathlib.Path(__file__).parent / 'hf_configs'
GFLOP = 1e9
ROWS, TEXT = 3, 11


def published(name):
    return families.from_hf(json.loads((MODELS / f'{name}.json').read_text()))


def abstract(c, dtype=jnp.float32):
    return jax.eval_shape(lambda: Transformer(c, rngs=nnx.Rngs(0), dtype=dtype))


def total(f, c, *args):
    return sum(flops.by_scope(jax.jit(f).trace(*args).jaxpr, c).values())


def ids(tokens, rows=1):
    return jax.ShapeDtypeStruct((rows, tokens), jnp.int32)


@functools.cache
def weights(c):
    """Parameters of products for one token: matrices of blocks, of experts the top k, and the head."""
    sizes = {sharding.path(kp): x.size for kp, x in jax.tree_util.tree_leaves_with_path(abstract(c))}
    of_experts = sum(sizes.get(f'blocks/moe/{k}', 0) for k in ('gate_up', 'down'))
    names = [
        f'blocks/{k}'
        for k in ('attn/q', 'attn/k', 'attn/v', 'attn/o', 'mlp/gate', 'mlp/up', 'mlp/down', 'moe/router_w')
    ]
    routed = of_experts * c.top_k // c.n_experts if c.n_experts else 0
    return sum(sizes.get(k, 0) for k in names) + routed + c.d_model * c.vocab_size


def pairs(c, tokens, layers=None):
    """FLOPs of scores and mixed values of one text: every query with the keys that it sees."""
    windows = [c.windows[i % len(c.windows)] or tokens for i in range(layers or c.n_layers)]
    return 4 * c.n_heads * c.head_dim * sum(min(p + 1, w) for w in windows for p in range(tokens))


@pytest.mark.parametrize(
    ('name', 'gflop'),
    [('gpt2', 0.247), ('Qwen2.5-7B-Instruct', 14.14), ('gemma-2-9b-it', 18.48), ('gpt-oss-20b', 7.214)],
)
def test_a_token_is_two_flops_for_each_parameter(name, gflop):
    """124 M less 0.8 M positions of GPT-2; an untied table left out; of gpt-oss 4 of 32 experts."""
    c = published(name)
    assert 2 * weights(c) / GFLOP == pytest.approx(gflop, rel=2e-3)
    base = abstract(c, jnp.bfloat16)
    assert total(Transformer.__call__, c, base, ids(TEXT)) == pytest.approx(TEXT * gflop * GFLOP, rel=5e-3)


@pytest.mark.parametrize(('tokens', 'gflop'), [(256, 0.04), (1024, 0.12), (4096, 0.43), (8192, 0.83)])
def test_a_query_meets_the_keys_that_it_may_see(tokens, gflop):
    """gpt-oss-20b: every other layer sees 128 keys. Long texts are attended to in chunks of queries."""
    c = published('gpt-oss-20b')
    counted = total(Transformer.__call__, c, abstract(c, jnp.bfloat16), ids(tokens))
    extra = 2 * c.n_layers * c.top_k * c.d_model * tokens  # sums over the chosen experts
    of_pairs = counted - 2 * weights(c) * tokens - extra
    assert of_pairs == pytest.approx(pairs(c, tokens), rel=1e-3)
    assert of_pairs / tokens / GFLOP == pytest.approx(gflop, abs=5e-3)


MIXTURE = dataclasses.replace(TINY, n_experts=5, top_k=2)
WINDOWED = dataclasses.replace(TINY, n_layers=4, windows=(4, 0))


@pytest.mark.parametrize(
    ('c', 'remat'),
    [(TINY, 'dots'), (TINY, 'projections'), (WINDOWED, 'full'), (MIXTURE, 'full'), (MIXTURE, 'dots')],
    ids=['dense', 'named', 'windows', 'experts', 'experts-dots'],
)
def test_training_is_three_forward_passes_whatever_is_computed_again(c, remat):
    c = dataclasses.replace(c, remat=remat)
    forward = 2 * weights(c) * ROWS * TEXT + ROWS * pairs(c, TEXT)

    def loss(base, tokens):
        return jnp.sum(base(tokens) ** 2)

    of_sums = 2 * c.d_model * ROWS * TEXT  # over the chosen experts
    trained = total(jax.grad(loss), c, abstract(c), ids(TEXT, ROWS))
    assert trained == pytest.approx(3 * forward, abs=0.01 * forward + of_sums * c.n_layers * 3 * c.top_k)


@pytest.mark.parametrize('how', moe.IMPLEMENTATIONS | moe.PLANNED)
def test_experts_count_as_routed_whatever_runs(how):
    """A forward pass, and the gradient of the input alone: no product for frozen weights."""
    c = dataclasses.replace(MIXTURE, experts=how)
    forward = 2 * weights(c) * ROWS * TEXT + ROWS * pairs(c, TEXT)
    of_sums = 2 * c.d_model * ROWS * TEXT * c.n_layers * c.top_k  # over the chosen experts
    assert total(Transformer.__call__, c, abstract(c), ids(TEXT, ROWS)) == pytest.approx(forward + of_sums)

    def loss(x, base):
        return jnp.sum(base.logits(base.run_layers(x, 0, c.n_layers)) ** 2)

    x = jax.ShapeDtypeStruct((ROWS, TEXT, c.d_model), jnp.float32)
    counted = total(jax.grad(loss), c, x, abstract(c))
    # of pairs both factors have a gradient
    assert counted == pytest.approx(2 * forward + ROWS * pairs(c, TEXT), abs=0.01 * forward + 3 * of_sums)


def test_a_mesh_changes_nothing():
    """Experts run as programs of one device: two devices of `model` work on the same rows."""
    c = dataclasses.replace(MIXTURE, n_experts=6)
    alone = total(Transformer.__call__, c, abstract(c), ids(TEXT, 8))
    mesh = sharding.make_mesh(4, 2)
    with jax.set_mesh(mesh):
        base = sharding.with_placement(abstract(c), mesh, float('inf'))
        rows = jax.sharding.NamedSharding(mesh, sharding.rows(2))
        there = jax.ShapeDtypeStruct((8, TEXT), jnp.int32, sharding=rows)
        assert total(Transformer.__call__, c, base, there) == alone


def test_the_outermost_scope_counts_and_gradients_stay_in_it():
    a = jnp.ones((3, 4))

    def loss(w):
        with jax.named_scope('read'), jax.named_scope('decode'):
            x = jax.lax.stop_gradient(a @ w)
        with jax.named_scope('encode'):
            body = jax.checkpoint(lambda x, _: (jnp.sin(x @ w), None))
            x, _ = jax.lax.scan(body, x, None, length=5)
        return jnp.sum(x @ w)

    parts = flops.by_scope(jax.jit(jax.grad(loss)).trace(jnp.ones((4, 4))).jaxpr, TINY)
    one = 2 * 3 * 4 * 4
    assert parts == {'read': one, 'sample': 0, 'encode': 15 * one, 'update': 0, 'score': 0, 'other': 2 * one}


# ---- the train step

DOCUMENTS, VECTORS, LENGTH, GROUP, PREFIX = 2, 3, 6, 5, 4
LAYER, OUTPUT_LAYER = 1, 2
TEXTS = DOCUMENTS * VECTORS
LEFT, RIGHT, FAR = 3, 4, 50  # of the decoder's prompt; FAR: TEXTS times it is worth a pass over the weights
READ = 5 + LENGTH  # tokens of an encoder's text
DEEP = dataclasses.replace(TINY, n_layers=6, windows=(4, 0))


@functools.cache
def parts_of_a_step(objective, left=LEFT, **changes):
    """FLOPs of the train step of one phase by part; block__key=value. left: tokens before the slot."""
    texts = Texts(Prompt([1] * left, [2] * RIGHT), ([3] * 2, [4] * 3), (5,) * PREFIX, NO_TAGS)
    cfg = settings.get_config()
    cfg.phases, cfg.layer, cfg.explanation_len = (objective,), LAYER, LENGTH
    cfg.decoder.patched_blocks, cfg.encoder.output_layer = 2, OUTPUT_LAYER
    p = cfg[objective]
    p.documents, p.vectors, p.group = DOCUMENTS, VECTORS, GROUP
    for key, value in changes.items():
        block, _, name = key.rpartition('__')
        (cfg[block] if block else cfg)[name] = value
    mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
        base = sharding.with_placement(abstract(DEEP), mesh, float('inf'))
        lens = abstract_lens(cfg, texts, base, mesh)
        (phase,) = config.make_phases(cfg, texts)
        shapes = {'tokens': (DOCUMENTS, TEXT), 'positions': (DOCUMENTS, VECTORS)}
        if phase.labelled:
            shapes['explanations'] = (DOCUMENTS, VECTORS, LENGTH)
        batch = {k: jax.ShapeDtypeStruct(s, jnp.int32) for k, s in shapes.items()}
        state = State(jax.ShapeDtypeStruct((), jnp.int32), lens, jax.eval_shape(phase.tx.init, lens))
        key = jax.eval_shape(lambda: jax.random.key(0))
        reading, step = (flops.by_scope(x.jaxpr, DEEP) for x in trace(phase, state, base, batch, key))
        return {part: reading[part] + step[part] for part in step}


def text(tokens, layers, logits=0):
    """FLOPs of one text in the first blocks, and of some logits."""
    c = DEEP
    head = c.d_model * c.vocab_size
    return 2 * (weights(c) - head) * layers // c.n_layers * tokens + 2 * head * logits + pairs(c, tokens, layers)


READING = DOCUMENTS * text(TEXT, LAYER + 1)
ENCODER = text(READ, OUTPUT_LAYER + 1)


def written(left=LEFT, of=text):
    """FLOPs of (the prompt of a decoder before its slot, the prompt, all but the last token, which is fed to nobody)."""
    ends = left, left + 1 + RIGHT, left + RIGHT + LENGTH
    return [of(n, DEEP.n_layers, *more) for n, more in zip(ends, ((), (), (LENGTH,)), strict=True)]


@pytest.mark.parametrize(('train', 'passes', 'left'), [('maps', 2, LEFT), ('maps', 2, FAR), ('full', 3, LEFT)])
def test_a_frozen_base_is_two_passes_and_a_trained_one_three(train, passes, left):
    """What no activation changes runs once where it is many tokens of a batch."""
    parts = parts_of_a_step('sft', left, decoder__train=train, encoder__train=train)

    def once(of):
        before, _, whole = written(left, of)
        return TEXTS * whole if left == LEFT else before + TEXTS * (whole - before)

    # both factors of an attention product have a gradient
    attention = once(lambda tokens, layers, logits=0: pairs(DEEP, tokens, layers))
    expected = READING + passes * (once(text) + TEXTS * ENCODER) + (3 - passes) * attention
    assert sum(parts.values()) == pytest.approx(expected, rel=0.08 if train == 'maps' else 0.03)  # maps and read-out
    assert parts['sample'] == 0


def test_the_parts_of_a_step_that_samples():
    parts = parts_of_a_step('grpo')
    samples = TEXTS * GROUP
    assert parts['read'] == pytest.approx(READING, rel=0.02)
    before, prompt, whole = written()
    scored = TEXTS * prompt + samples * (whole - prompt)  # the prompt once for an activation
    assert parts['sample'] == pytest.approx(scored - (TEXTS - 1) * before, rel=0.05)
    assert parts['score'] == pytest.approx(2 * scored, rel=0.1)
    assert parts['encode'] == pytest.approx(2 * samples * ENCODER, rel=0.1)
    assert parts['other'] < 0.01 * sum(parts.values())


def test_what_nobody_trains_has_no_backward_pass():
    rest, maps = ('.', 1.0, 0.0, 'all', '0'), {'decoder__train': 'maps', 'encoder__train': 'maps'}
    frozen = parts_of_a_step('sft', sft__table=(('^decoder/', None), rest), **maps)
    saved = sum(parts_of_a_step('sft', **maps).values()) - sum(frozen.values())
    assert saved == pytest.approx(TEXTS * written()[2], rel=0.15)


def test_a_gradient_through_the_sampling_counts_no_step_twice():
    """The forward pass of its backward pass is computed again, under the same scopes as the sampling."""
    parts = parts_of_a_step('gumbel', gumbel__form='full')
    more = 2 * 2 * LENGTH * DEEP.d_model * DEEP.vocab_size  # products of relaxed words with the tables
    before, _, whole = written()
    expected = READING + 2 * before + TEXTS * (2 * (whole - before) + 2 * ENCODER + more)
    assert sum(parts.values()) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(
    ('kind', 'tflops'),
    [
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA A100-SXM4-80GB', 312),
        ('TPU v5 lite', 197),
        ('TPU v5p', 459),
    ],
)
def test_peaks(kind, tflops):
    assert flops.peak(kind) == tflops * 1e12


def test_an_unknown_device_has_no_peak():
    assert flops.peak('cpu') is None
