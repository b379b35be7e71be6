"""Drawing explanations: prompts that a group shares, and the end of the last explanation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lens import prompted, response
from lens.models import lora
from tests import programs
from tests.compare import close
from tests.conftest import TINY, make_base, make_lens

LENGTH, ROWS, GROUP = 24, 2, 3


@pytest.fixture(scope='module')
def pair():
    """(decoder with adapters that do something, base)"""
    base = make_base(TINY)
    adapters = lora.init_adapters(base.blocks, TINY.n_layers, '.*', 2, 4.0, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapters)
    return make_lens(base, adapters=(adapters, None)).decoder, base


ACTIVATIONS = jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, TINY.d_model), np.float32))


def test_a_group_draws_and_scores_as_rows_of_its_own_do(pair):
    """Keys and values of the prompt are made once for the group; tokens, log-probabilities and gradients are those of
    as many equal activations."""
    key, tiled = jax.random.key(3), jnp.repeat(ACTIVATIONS, GROUP, axis=0)
    shared = programs.sample(*pair, ACTIVATIONS, key, length=LENGTH, group=GROUP)
    own = programs.sample(*pair, tiled, key, length=LENGTH)
    np.testing.assert_array_equal(shared.ids_NxT, own.ids_NxT)
    close(shared.logp_NxT, own.logp_NxT)
    up = np.random.default_rng(4).standard_normal((ROWS * GROUP, LENGTH, TINY.vocab_size))  # no two rows count alike

    @jax.jit
    @jax.value_and_grad
    def scored(decoder, a):
        return jnp.sum(up * jnp.sin(programs.teacher_forced_logits(decoder, pair[1], a, own.ids_NxT)))

    got, want = scored(pair[0], ACTIVATIONS), scored(pair[0], tiled)
    close(got[0], want[0], steps=2000)
    close(got[1], want[1], steps=4000)


def test_nothing_is_drawn_after_the_last_explanation_is_closed(pair):
    """Up to there the tokens are those of a draw that goes on."""
    for seed in range(100):
        key = jax.random.key(seed)
        whole = programs.sample(*pair, ACTIVATIONS, key, length=LENGTH, group=GROUP)
        ids = np.asarray(whole.ids_NxT)
        shared = set.intersection(*(set(row[1:-4].tolist()) for row in ids))
        shared = [c for c in shared if max(list(row).index(c) for row in ids) < LENGTH - 4 and c not in ids[:, 0]]
        if shared:
            break
    tags = response.Tags((), (int(shared[0]),))
    stopped = programs.sample(*pair, ACTIVATIONS, key, length=LENGTH, group=GROUP, tags=tags)
    found = response.find(whole.ids_NxT, tags)
    assert found.found_N.all()
    last = int(found.end_N.max())
    np.testing.assert_array_equal(stopped.ids_NxT[:, :last], ids[:, :last])
    close(stopped.logp_NxT[:, :last], whole.logp_NxT[:, :last])
    assert not np.any(stopped.ids_NxT[:, last + 1 :]) and not np.any(stopped.logp_NxT[:, last + 1 :])
    for got, want in zip(response.find(stopped.ids_NxT, tags), found, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_row_that_stays_open_is_drawn_to_its_end(pair):
    """Closed by token 0, which no row draws: places that are still to be drawn do not count as it."""
    wholes = (
        programs.sample(*pair, ACTIVATIONS, key, length=LENGTH, group=GROUP) for key in map(jax.random.key, range(200))
    )
    whole, seed = next((w, k) for k, w in enumerate(wholes) if np.all(w.ids_NxT))
    tags = response.Tags((), (0,))
    got = programs.sample(*pair, ACTIVATIONS, jax.random.key(seed), length=LENGTH, group=GROUP, tags=tags)
    np.testing.assert_array_equal(got.ids_NxT, whole.ids_NxT)


ALL = {'top_k': 2**31 - 1, 'top_p': 1.0, 'min_p': 0.0}


def kept(logits, **limits):
    return np.asarray(prompted.kept(jax.nn.log_softmax(logits), **(ALL | limits)))


@pytest.mark.parametrize(
    ('limits', 'theirs'),
    [({'top_k': k}, TopKLogitsWarper(k)) for k in (1, 7, 300, 9999)]
    + [({'top_p': p}, TopPLogitsWarper(p)) for p in (1e-9, 0.3, 0.95)]
    + [({'min_p': p}, MinPLogitsWarper(p)) for p in (0.02, 0.5, 1.0)],
)
def test_what_may_be_drawn_is_as_transformers_has_it(limits, theirs):
    logits = 3 * np.random.default_rng(0).standard_normal((4, 300), np.float32)
    wanted = theirs(None, torch.tensor(logits)).isfinite().numpy()
    np.testing.assert_array_equal(kept(logits, **limits), wanted)


def test_limits_together_are_as_the_open_server_has_them():
    """In its order: the mass of top_p is that of the whole vocabulary, also where top_k leaves less of it."""
    rng = np.random.default_rng(1)
    for k, p, least in [(5, 0.6, 0.0), (40, 0.9, 0.05), (3, 0.999, 0.3), (50, 0.2, 0.9)]:
        logits = (2 * rng.standard_normal((6, 200))).astype(np.float32)
        for row, ours in zip(logits, kept(logits, top_k=k, top_p=p, min_p=least), strict=True):
            probs = np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
            wanted, mass = set(), 0.0
            for rank, i in enumerate(np.argsort(-probs)):
                if rank < k and mass <= p and probs[i] >= least * probs.max():
                    wanted.add(int(i))
                mass += probs[i]
            assert {*np.flatnonzero(ours).tolist()} == wanted


def test_of_equal_tokens_as_many_are_kept_as_were_asked_for():
    logits = np.zeros((1, 300), np.float32)
    np.testing.assert_array_equal(np.flatnonzero(kept(logits, top_k=3)), [0, 1, 2])
    assert kept(logits).all() and kept(logits, min_p=1.0).all()
