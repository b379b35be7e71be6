"""Trains a tuned lens: for the stream entering each block, an affine map to where the final head reads it.

    python -m lens.tools.tuned_lens --model=configs/tiny_subject --data=data/storyworld --out=runs/tuned_lens

T_i(h) = h + h @ V_i + v_i minimises KL(softmax(logits(hs[L])) || softmax(logits(T_i(hs[i])))) over the text,
i = 0..L-1 (Belrose et al. 2023). The subject is frozen; T_i starts as the identity, the logit lens. The
layers share nothing, so each has an optimizer of its own. A short job without checkpoints: the
folder (lens/translators.py) appears at the end, and a killed run starts anew.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from lens import commands

    commands.tuned_lens()

import dataclasses
import functools
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from lens import data, files, hf, logger, losses, sharding, tensor_files
from lens.config import DTYPES
from lens.errors import require
from lens.models.transformer import Transformer
from lens.translators import FORMAT

HELD_OUT_DOCUMENTS = 256
LOGS = 20  # progress lines of a run
SEED = 0  # of the order of the documents
CONVENTION = (
    'T_i(h) = h + h @ weight[i] + bias[i], h a row vector (of torch.nn.Linear it is the transpose), entering block i'
)


@dataclasses.dataclass(frozen=True)
class TunedLensSettings:
    """What the flags of the command say, in their order (lens/commands.py)."""

    steps: int = 250
    batch: int = 8
    seq_len: int | None = None
    learning_rate: float = 0.3
    dtype: str = 'float32'
    mesh_data: int = 1
    mesh_model: int = 1


class TunedLensState(struct.PyTreeNode):
    """Translators {weight V [L, d, d], bias [L, d]} and their optimizers; the bias in units of scale_L, the
    typical norm of a component of a stream, so that neither gradient nor step depends on the scale of a stream."""

    params: dict[str, jax.Array]
    opt: optax.OptState
    scale_L: jax.Array


def read_streams(subject: Transformer, batch: dict):
    """Returns hs_LxBxSxD, hs[L] BxSxD, (next-token probabilities BxSxV, their entropy BxS in nats), mask of real tokens
    BxS."""
    x, hs_LxBxSxD = subject.collect(subject.embed(batch['tokens']), 0, subject.config.n_layers, jnp.asarray)
    logits_BxSxV = subject.logits(x)
    target = jax.nn.softmax(logits_BxSxV), losses.entropy(logits_BxSxV)
    return hs_LxBxSxD, x, target, jnp.arange(x.shape[1]) < batch['lengths'][:, None]


def typical_norm(x_BxSxD, mask_BxS):
    """Returns the geometric mean of the norms where mask is 1: a few huge ones, of first tokens, do not decide it."""
    norm_BxS = jnp.linalg.norm(x_BxSxD.astype(jnp.float32), axis=-1)
    counted = mask_BxS & (norm_BxS > 0)
    return jnp.exp(jnp.sum(jnp.where(counted, jnp.log(norm_BxS), 0)) / jnp.maximum(counted.sum(), 1))


@functools.partial(jax.jit, static_argnames='tx')
def init_state(subject: Transformer, batch: dict, *, tx: optax.GradientTransformation) -> TunedLensState:
    """Returns identity translators. batch: where the scale of the streams is measured."""
    n, d = subject.config.n_layers, subject.config.d_model
    hs_LxBxSxD, _, _, mask_BxS = read_streams(subject, batch)
    scale_L = jax.lax.map(lambda h: typical_norm(h, mask_BxS), hs_LxBxSxD) / d**0.5
    params = {'weight': jnp.zeros((n, d, d)), 'bias': jnp.zeros((n, d))}
    return TunedLensState(params, jax.vmap(tx.init)(params), scale_L)


def translate(params: dict, scale, h_BxSxD):
    """Applies one layer's translator, in float32."""
    h = h_BxSxD.astype(jnp.float32)
    return h + jnp.einsum('bsd,de->bse', h, params['weight']) + scale * params['bias']


def kl_sum(params: dict, scale, h_BxSxD, subject: Transformer, target: tuple, mask_BxS):
    """Returns the sum over the real tokens of KL(final || translated), nats, of one layer.

    Cross-entropy minus entropy: one array of the size of the logits less than from log-probabilities.
    """
    p_BxSxV, entropy_BxS = target
    y_BxSxV = subject.logits(translate(params, scale, h_BxSxD).astype(subject.dtype))
    cross_BxS = jax.nn.logsumexp(y_BxSxV, axis=-1) - jnp.sum(p_BxSxV * y_BxSxV, axis=-1)
    return jnp.sum((cross_BxS - entropy_BxS) * mask_BxS)


@functools.partial(jax.jit, static_argnames='tx', donate_argnames='state')
def train_step(state: TunedLensState, subject: Transformer, batch: dict, *, tx) -> tuple[TunedLensState, jax.Array]:
    """Updates every layer. Returns the state and the mean KL before it by layer, nats per token.

    One layer at a time: logits [B, S, V] of one exist beside the final ones.
    """
    hs_LxBxSxD, _, target, mask_BxS = read_streams(subject, batch)
    tokens = jnp.maximum(mask_BxS.sum(), 1)

    def layer(x):
        return jax.value_and_grad(kl_sum)(*x, subject, target, mask_BxS)

    kl_L, grads = jax.lax.map(layer, (state.params, state.scale_L, hs_LxBxSxD))
    updates, opt = jax.vmap(tx.update)(jax.tree.map(lambda g: g / tokens, grads), state.opt, state.params)
    return state.replace(params=optax.apply_updates(state.params, updates), opt=opt), kl_L / tokens


@jax.jit
def kl_sums(state: TunedLensState, subject: Transformer, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Returns (sum of the KL over the real tokens by layer, nats; number of those tokens)."""
    hs_LxBxSxD, _, target, mask_BxS = read_streams(subject, batch)
    layers = (state.params, state.scale_L, hs_LxBxSxD)
    return jax.lax.map(lambda x: kl_sum(*x, subject, target, mask_BxS), layers), mask_BxS.sum()


@jax.jit
def to_final_norm(state: TunedLensState, subject: Transformer, batch: dict) -> TunedLensState:
    """Returns the same translators, each times the number that gives T_i(hs[i]) the typical norm of hs[L].

    The final norm hides that number from the loss, and a composition of two translators does not.
    """
    hs_LxBxSxD, last_BxSxD, _, mask_BxS = read_streams(subject, batch)
    wanted = typical_norm(last_BxSxD, mask_BxS)

    def layer(x):
        params, scale, h_BxSxD = x
        c = wanted / typical_norm(translate(params, scale, h_BxSxD), mask_BxS)
        eye = jnp.eye(h_BxSxD.shape[-1])
        return {'weight': c * (eye + params['weight']) - eye, 'bias': c * params['bias']}

    return state.replace(params=jax.lax.map(layer, (state.params, state.scale_L, hs_LxBxSxD)))


class TunedLensJob(NamedTuple):
    """A subject, the data of its translators, and the settings with the tokens of a row that are read."""

    subject: Transformer
    train: data.Split
    validation: data.Split
    mesh: jax.sharding.Mesh
    settings: TunedLensSettings

    def batch(self, split: data.Split, which: np.ndarray, counted: int | None = None) -> dict[str, jax.Array]:
        """Returns the first tokens of some documents, tokens BxS, lengths B; only the first `counted` count."""
        n = self.settings.seq_len
        lengths = np.minimum(split.lengths[which], n).astype(np.int32)
        lengths[len(which) if counted is None else counted :] = 0
        tokens = np.asarray(split.tokens[which, :n], np.int32)
        return sharding.put_batch({'tokens': tokens, 'lengths': lengths}, self.mesh)


def open_job(model: str, folder: str, s: TunedLensSettings) -> TunedLensJob:
    """Checks the settings, opens the data and loads the subject. Raises LensError."""
    for key in ('steps', 'batch', 'seq_len', 'learning_rate'):
        value = getattr(s, key)
        require(value is None or value > 0, f'--{key}={value} must be positive.')
    mesh = sharding.make_mesh(s.mesh_data, s.mesh_model)
    sharding.check_divides(s.batch, '--batch', mesh)
    directory = hf.local_directory(model)
    c = hf.read_config(directory)
    train, validation = data.open_splits(folder, c.vocab_size, directory, hf.tokenizer_sha256)
    require(len(train) >= s.batch, f'{folder}/train holds {len(train)} documents, fewer than --batch={s.batch}.')
    n, most = min(s.seq_len or train.tokens.shape[1], train.tokens.shape[1]), c.max_positions
    require(n <= most, f'{folder} has {n} tokens a row, the subject reads {most}: give --seq_len={most} or less.')
    subject = hf.load_model(directory, dtype=DTYPES[s.dtype], mesh=mesh, head=True)
    return TunedLensJob(subject, train, validation, mesh, dataclasses.replace(s, seq_len=n))


def held_out(job: TunedLensJob, state: TunedLensState) -> np.ndarray:
    """Returns the mean KL by layer over the tokens of the first held-out documents, nats per token."""
    n, batch = min(len(job.validation), HELD_OUT_DOCUMENTS), job.settings.batch
    kl_L, tokens = 0.0, 0
    for i in range(0, n, batch):  # the last batch is filled with documents that do not count
        part = job.batch(job.validation, np.arange(i, i + batch) % n, counted=min(n - i, batch))
        kl, count = kl_sums(state, job.subject, part)
        kl_L, tokens = kl_L + np.asarray(kl, np.float64), tokens + int(count)
    return kl_L / tokens


def _check_finite(kl_L: np.ndarray, where: str) -> None:
    finite = np.isfinite(kl_L)
    require(finite.all(), f'{where}: the KL of layer {np.argmin(finite)} is not finite: lower --learning_rate.')


def fit(job: TunedLensJob) -> tuple[TunedLensState, np.ndarray, np.ndarray]:
    """Returns (trained state, held-out KL by layer before, after). Call under jax.set_mesh(job.mesh)."""
    s, rng, first = job.settings, np.random.default_rng(SEED), job.batch(job.train, np.arange(job.settings.batch))
    # Momentum and linear decay as in the paper; Adam and Muon were slower, and Muon's translators worse conditioned,
    # which a composition inverts.
    sgd = optax.sgd(optax.linear_schedule(s.learning_rate, 0.0, s.steps), momentum=0.9, nesterov=True)
    tx = optax.chain(optax.clip_by_global_norm(1.0), sgd)
    state = init_state(job.subject, first, tx=tx)
    before = held_out(job, state)
    for i in range(1, s.steps + 1):
        which = np.sort(rng.choice(len(job.train), s.batch, replace=False))
        state, kl_L = train_step(state, job.subject, job.batch(job.train, which), tx=tx)
        kl_L = np.asarray(kl_L)
        _check_finite(kl_L, f'step {i}')
        if i == 1:
            begin = time.monotonic()  # without compilation
        elif i % max(s.steps // LOGS, 1) == 0 or i == s.steps:
            left_s = (time.monotonic() - begin) / (i - 1) * (s.steps - i)
            print(f'step {i}/{s.steps}  KL {kl_L.mean():.4f} nats, mean of layers  {left_s:.0f} s left', flush=True)
    state = to_final_norm(state, job.subject, first)
    after = held_out(job, state)
    _check_finite(after, 'held-out documents')
    return state, before, after


def train(model: str, folder: str, out: pathlib.Path, settings: TunedLensSettings) -> None:
    """Trains on folder/train and writes `out`, which appears at once, by rename. Raises LensError."""
    files.check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)  # fails now where it would fail after training
    begin = time.monotonic()
    job = open_job(model, folder, settings)
    with jax.set_mesh(job.mesh):
        state, before, after = fit(job)
    print('| layer | KL before | KL after |\n|---|---|---|')
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        print(f'| {i} | {a:.4f} | {b:.4f} |')
    if worse := ', '.join(str(i) for i in np.flatnonzero(after > before)):
        print(f'Worse than the logit lens: layers {worse}; lower --learning_rate or raise --steps.')
    shape = {k: getattr(job.subject.config, k) for k in ('family', 'd_model', 'n_layers', 'vocab_size')}
    documents = min(len(job.validation), HELD_OUT_DOCUMENTS)
    about = {
        'format': FORMAT,
        'convention': CONVENTION,
        'subject': {'path': model, **shape},
        'data': folder,
        'training': dataclasses.asdict(job.settings) | {'seed': SEED},
        'held_out': {'documents': documents, 'kl_before_nats': before.tolist(), 'kl_after_nats': after.tolist()},
        'wall_s': time.monotonic() - begin,
        'provenance': logger.provenance(),
    }
    bias_LxD = np.asarray(state.params['bias']) * np.asarray(state.scale_L)[:, None]
    with files.new_folder(out) as tmp:
        arrays = {'weight': np.asarray(state.params['weight']), 'bias': bias_LxD}
        tensor_files.write(tmp / 'translators.safetensors', arrays)
        files.write_json(tmp / 'tuned_lens.json', about)


def main(model: str, folder: str, out: str, *settings) -> None:
    train(model, folder, pathlib.Path(out), TunedLensSettings(*settings))
    print(f'Tuned lens: {out}')
