"""The stack against transformers/PyTorch and against itself: cutting, caching, causality, memory."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from lens import hf, sharding
from lens.models import lora
from lens.models.transformer import REMAT_POLICIES, Transformer
from tests import config_json, programs
from tests.compare import close
from tests.conftest import TINY, make_base

SUBJECT = 'configs/tiny_subject'
N = TINY.n_layers


def torch_outputs(directory, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        out = model(torch.tensor(tokens), output_hidden_states=True)
    return out.logits.numpy(), [h.numpy() for h in out.hidden_states]


@pytest.mark.parametrize('tied', [False, True])
def test_logits_and_every_hidden_state_equal_transformers(tmp_path, base, tokens, tied):
    model = make_base(dataclasses.replace(TINY, tied=True)) if tied else base
    hf.save_model(model, tmp_path / 'model', config=config_json.llama(model.config))
    want_logits, want = torch_outputs(tmp_path / 'model', tokens)
    logits, streams = programs.hidden(model, tokens)
    close(logits, want_logits)
    for k in range(N):
        close(streams[k], want[k])
    close(model.final_norm(streams[N], TINY.norm_eps), want[N])  # transformers norms the last one


def test_shipped_subject_gives_the_logits_of_transformers():
    model = hf.load_model(SUBJECT)
    ids = hf.load_tokenizer(SUBJECT)('Near the meadow was a compass. The compass kept Freya cheerful.')['input_ids']
    close(programs.hidden(model, np.asarray([ids]))[0], torch_outputs(SUBJECT, [ids])[0])


def test_a_range_of_blocks_is_each_of_them_in_turn(base, tokens):
    _, streams = programs.hidden(base, tokens)
    for lo, hi in ((0, 1), (1, N), (2, 2)):
        close(base.run_layers(streams[lo], lo, hi), streams[hi])
    with pytest.raises(ValueError, match=r'blocks 2\.\.3 are not all in 0\.\.2'):
        base.run_layers(streams[2], 2, 4)


def test_truncated_copy_runs_the_same_first_blocks(base, tokens):
    cut = base.truncated(2)
    assert cut.config.n_layers == 2
    close(programs.layers(cut, base.embed(tokens)), programs.hidden(base, tokens)[1][2])
    kept = {sharding.path(kp) for kp, _ in jax.tree_util.tree_leaves_with_path(cut)}
    assert not kept & {'head', 'final_norm/scale'} and 'embedding' in kept


@pytest.mark.parametrize('remat', REMAT_POLICIES)
def test_layer_ranges_and_their_gradient_copy_no_weights(remat):
    """Temporary memory stays far below the stack: slicing it or indexing it outside the checkpoint
    would cost the size of the slice or of the whole."""
    config = dataclasses.replace(TINY, d_model=64, d_ff=384, n_layers=16, remat=remat)
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    stack_bytes = sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(model.blocks))
    x = jax.ShapeDtypeStruct((2, 3, 64), jnp.float32)

    def loss(x, model):
        return model.run_layers(x, 3, 15).sum()

    for fn in (loss, jax.grad(loss)):
        temp = jax.jit(fn).lower(x, model).compile().memory_analysis().temp_size_in_bytes
        assert temp < 0.25 * stack_bytes, (temp, stack_bytes)


@pytest.fixture(scope='module')
def adapters(base):
    made = lora.init_adapters(base.blocks, N, '.*', 5, 6.0, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1, made)


# remat -> what a block keeps of a token, as (shape, how often); its input besides. All dimensions are distinct.
HEADS, KEYS, STREAM, WIDE = (4, 2, 6), (4, 6), (TINY.d_model,), (TINY.d_ff,)
KEPT = {
    'full': {STREAM: 1},
    'attention': {HEADS: 2, KEYS: 2, STREAM: 1},  # q and the mix, k and v
    'projections': {HEADS: 2, KEYS: 2, STREAM: 1, WIDE: 2},  # and what gate and up give
}


@pytest.mark.parametrize('remat', KEPT)
def test_the_backward_pass_keeps_what_the_policy_is_named_by(base, tokens, adapters, remat):
    model = jax.tree.map(lambda x: x, base)
    model.config = dataclasses.replace(TINY, remat=remat)

    def residuals(x, adapters):
        return jax.vjp(lambda x, a: model.run_layers(x, 0, N, adapters=a), x, adapters)[1]

    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(residuals, base.embed(tokens), adapters))]
    of_tokens = collections.Counter(s[3:] for s in shapes if s[:3] == (N, *tokens.shape))
    assert of_tokens == KEPT[remat]


def test_all_policies_give_one_gradient(base, tokens, adapters):
    @functools.partial(jax.jit, static_argnums=0)
    def gradient(remat, base, adapters):
        base.config = dataclasses.replace(TINY, remat=remat)
        x = base.embed(tokens)
        return jax.grad(lambda *of: jnp.sum(jnp.sin(programs.layers(*of))), argnums=(0, 1, 2))(base, x, adapters)

    want = gradient('full', base, adapters)
    for remat in REMAT_POLICIES:
        close(gradient(remat, base, adapters), want)


def test_cached_decoding_equals_teacher_forcing_position_by_position(base, tokens):
    prompt = 4

    @jax.jit
    def run(base, ids):
        x, cache = base.run_cached(base.embed(ids[:, :prompt]), 0, N)
        room, steps = cache.room(len(ids), ids.shape[1] - prompt), [x]
        for t in range(prompt, ids.shape[1]):
            x, written = base.run_cached(base.embed(ids[:, t : t + 1], t), 0, N, (cache, room), t)
            room = room.written(written, t - prompt)
            steps.append(x)
        return base.logits(jnp.concatenate(steps, 1))

    close(run(base, tokens), programs.hidden(base, tokens)[0])


def test_causality_by_gradient(base, tokens):
    """The output at position t depends on inputs 0..t, on all of them, and on no later one."""
    x = base.embed(tokens[:1])
    jacobian = jax.jit(jax.jacrev(lambda x: base.run_layers(x, 0, N)[0].sum(-1)))(x)[:, 0]
    reach = np.abs(np.asarray(jacobian)).max(-1) > 0
    np.testing.assert_array_equal(reach, np.tril(np.ones_like(reach)))


def test_before_block_sees_every_block_once_and_in_order(base, tokens):
    @jax.jit
    def run(x):
        return base.run_layers(x, 1, N, before_block=lambda x, i: x.at[:, 0, 0].set(i.astype(x.dtype)))

    x = base.embed(tokens)
    want = x
    for i in range(1, N):
        want = programs.block(base, want.at[:, 0, 0].set(i), i)
    close(run(x), want)


def test_works_on_a_mesh_as_without(base, tokens):
    mesh = sharding.make_mesh(4, 2)
    with jax.set_mesh(mesh):
        placed = sharding.place(base, mesh)
        sharded = jax.jit(lambda m, t: m(t))(placed, sharding.put_batch({'t': tokens}, mesh)['t'])
    close(np.asarray(sharded), programs.hidden(base, tokens)[0])
