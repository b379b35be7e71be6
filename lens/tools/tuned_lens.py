"""Trains a tuned lens: for the stream entering each block, an affine map to where the final head reads it.

    python -m lens.tools.tuned_lens --model=configs/tiny_subject --data=data/storyworld --out=runs/tuned_lens

T_i(h) = h + h @ V_i + v_i minimises KL(softmax(logits(hs[L])) || softmax(logits(T_i(hs[i])))) over the text,
i = 0..L-1 (Belrose et al. 2023). The subject is frozen; T_i starts as the identity, the logit lens. The
layers share nothing, so each has an optimizer of its own. A short job without checkpoints: the
folder (lens/translators.py) appears at the end, and a killed run starts anew.
"""

import dataclasses
import functools
import hashlib
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import struct

from lens import cli, data, hf, logger, losses, sharding, translators
from lens.errors import LensError
from lens.models.transformer import Transformer

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
HELD_OUT_DOCUMENTS = 256
LOGS = 20  # progress lines of a run
SEED = 0  # of the order of the documents


@dataclasses.dataclass(frozen=True)
class Settings:
    """batch: documents per step. seq_len: tokens of each that are read, None for all of a row.
    mesh_data, mesh_model: devices that split the batch; heads, feed-forward and vocabulary."""

    steps: int = 250
    batch: int = 8
    seq_len: int | None = None
    learning_rate: float = 0.3
    dtype: str = 'float32'
    mesh_data: int = 1
    mesh_model: int = 1


class State(struct.PyTreeNode):
    """Translators {weight V [L, d, d], bias [L, d]} and their optimizers; the bias in units of scale_L, the
    typical norm of a component of a stream, so that neither gradient nor step depends on the scale of a stream."""

    params: dict[str, jax.Array]
    opt: optax.OptState
    scale_L: jax.Array


def make_optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Of one layer. Momentum and linear decay as in the paper; Adam and Muon were slower, and Muon's translators
    worse conditioned, which a composition inverts."""
    schedule = optax.linear_schedule(learning_rate, 0.0, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(schedule, momentum=0.9, nesterov=True))


def _kept(x_BxSxD):
    return x_BxSxD


def read_streams(subject: Transformer, batch: dict):
    """hs_LxBxSxD, hs[L] BxSxD, and the mask of real tokens BxS."""
    x, hs_LxBxSxD = subject.collect(subject.embed(batch['tokens']), 0, subject.config.n_layers, _kept)
    return hs_LxBxSxD, x, jnp.arange(x.shape[1]) < batch['lengths'][:, None]


def target_of(subject: Transformer, last_BxSxD):
    """(next-token probabilities p_BxSxV, their entropy_BxS in nats)."""
    logits_BxSxV = subject.logits(last_BxSxD)
    return jax.nn.softmax(logits_BxSxV), losses.entropy(logits_BxSxV)


def typical_norm(x_BxSxD, mask_BxS):
    """Geometric mean of the norms where mask is 1: a few huge ones, as of a first token, do not decide it."""
    norm_BxS = jnp.linalg.norm(x_BxSxD.astype(jnp.float32), axis=-1)
    counted = mask_BxS & (norm_BxS > 0)
    return jnp.exp(jnp.sum(jnp.where(counted, jnp.log(norm_BxS), 0)) / jnp.maximum(counted.sum(), 1))


@functools.partial(jax.jit, static_argnames='tx')
def init_state(subject: Transformer, batch: dict, *, tx: optax.GradientTransformation) -> State:
    """Identity translators. batch: where the scale of the streams is measured."""
    n, d = subject.config.n_layers, subject.config.d_model
    hs_LxBxSxD, _, mask_BxS = read_streams(subject, batch)
    scale_L = jax.lax.map(lambda h: typical_norm(h, mask_BxS), hs_LxBxSxD) / d**0.5
    params = {'weight': jnp.zeros((n, d, d)), 'bias': jnp.zeros((n, d))}
    return State(params, jax.vmap(tx.init)(params), scale_L)


def translate(params: dict, scale, h_BxSxD):
    """One layer's translator, in float32."""
    h = h_BxSxD.astype(jnp.float32)
    return h + jnp.einsum('bsd,de->bse', h, params['weight']) + scale * params['bias']


def kl_sum(params: dict, scale, h_BxSxD, subject: Transformer, target: tuple, mask_BxS):
    """Sum over the real tokens of KL(final || translated), nats, of one layer.

    Cross-entropy minus entropy: one array of the size of the logits less than from log-probabilities.
    """
    p_BxSxV, entropy_BxS = target
    y_BxSxV = subject.logits(translate(params, scale, h_BxSxD).astype(subject.embedding.dtype))
    cross_BxS = jax.nn.logsumexp(y_BxSxV, axis=-1) - jnp.sum(p_BxSxV * y_BxSxV, axis=-1)
    return jnp.sum((cross_BxS - entropy_BxS) * mask_BxS)


@functools.partial(jax.jit, static_argnames='tx', donate_argnames='state')
def train_step(state: State, subject: Transformer, batch: dict, *, tx) -> tuple[State, jax.Array]:
    """One update of every layer. Returns the state and the mean KL before it by layer, nats per token.

    One layer at a time: logits [B, S, V] of one exist beside the final ones.
    """
    hs_LxBxSxD, last_BxSxD, mask_BxS = read_streams(subject, batch)
    target, tokens = target_of(subject, last_BxSxD), jnp.maximum(mask_BxS.sum(), 1)

    def layer(stacks, x):
        i, scale, h_BxSxD = x
        params, opt = jax.tree.map(lambda w: w[i], stacks)
        kl, grads = jax.value_and_grad(kl_sum)(params, scale, h_BxSxD, subject, target, mask_BxS)
        updates, opt = tx.update(jax.tree.map(lambda g: g / tokens, grads), opt, params)
        new = (optax.apply_updates(params, updates), opt)
        return jax.tree.map(lambda stack, w: stack.at[i].set(w), stacks, new), kl / tokens

    layers = (jnp.arange(len(hs_LxBxSxD)), state.scale_L, hs_LxBxSxD)
    (params, opt), kl_L = jax.lax.scan(layer, (state.params, state.opt), layers)
    return state.replace(params=params, opt=opt), kl_L


@jax.jit
def kl_sums(state: State, subject: Transformer, batch: dict) -> tuple[jax.Array, jax.Array]:
    """(sum of the KL over the real tokens by layer, nats; number of those tokens)."""
    hs_LxBxSxD, last_BxSxD, mask_BxS = read_streams(subject, batch)
    target = target_of(subject, last_BxSxD)
    layers = (state.params, state.scale_L, hs_LxBxSxD)
    return jax.lax.map(lambda x: kl_sum(*x, subject, target, mask_BxS), layers), mask_BxS.sum()


@jax.jit
def to_final_norm(state: State, subject: Transformer, batch: dict) -> State:
    """The same translators, each times the number that gives T_i(hs[i]) the typical norm of hs[L].

    The final norm hides that number from the loss, and a composition of two translators does not.
    """
    hs_LxBxSxD, last_BxSxD, mask_BxS = read_streams(subject, batch)
    wanted = typical_norm(last_BxSxD, mask_BxS)

    def layer(x):
        params, scale, h_BxSxD = x
        c = wanted / typical_norm(translate(params, scale, h_BxSxD), mask_BxS)
        eye = jnp.eye(h_BxSxD.shape[-1])
        return {'weight': c * (eye + params['weight']) - eye, 'bias': c * params['bias']}

    return state.replace(params=jax.lax.map(layer, (state.params, state.scale_L, hs_LxBxSxD)))


def rows(split: data.Split, which: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """The first seq_len tokens of some documents: tokens [B, S], lengths [B]."""
    return {
        'tokens': np.asarray(split.tokens[which, :seq_len], np.int32),
        'lengths': np.minimum(split.lengths[which], seq_len).astype(np.int32),
    }


def train_rows(split: data.Split, batch: int):
    """Endless: which documents a step reads. Every document once before any comes again, but for a rest."""
    rng = np.random.default_rng(SEED)
    while True:
        order = rng.permutation(len(split))
        yield from (np.sort(order[i : i + batch]) for i in range(0, len(split) - batch + 1, batch))


def _check_finite(kl_L: np.ndarray, where: str) -> None:
    if not np.isfinite(kl_L).all():
        layer = np.argmin(np.isfinite(kl_L))
        raise LensError(f'{where}: the KL of layer {layer} is not finite: lower --learning_rate.')


class Trainer:
    """Subject and data of one job, checked. Raises LensError."""

    def __init__(self, model: str, folder: str, s: Settings):
        for key in ('steps', 'batch', 'seq_len', 'learning_rate'):
            value = getattr(s, key)
            if value is not None and not value > 0:
                raise LensError(f'--{key}={value} must be positive.')
        self.settings, self.mesh = s, sharding.make_mesh(s.mesh_data, s.mesh_model)
        sharding.check_divides(s.batch, '--batch', self.mesh)
        self.directory = hf.local_directory(model)
        c = hf.read_config(self.directory)
        self.train, self.validation = (
            data.open_split(folder, x, vocab_size=c.vocab_size) for x in ('train', 'validation')
        )
        made_with = self.train.meta.get('tokenizer_sha256')
        if made_with is not None and made_with != hf.tokenizer_sha256(self.directory):
            raise LensError(f'{folder} was made with another tokenizer than that of {model}: pretokenize again.')
        data.check_disjoint(self.train, self.validation)
        if len(self.train) < s.batch:
            raise LensError(f'{folder}/train holds {len(self.train)} documents, fewer than --batch={s.batch}.')
        self.seq_len = min(s.seq_len or self.train.tokens.shape[1], self.train.tokens.shape[1])
        if self.seq_len > c.max_positions:
            raise LensError(
                f'{folder} has {self.seq_len} tokens a row, the subject reads {c.max_positions}: '
                f'give --seq_len={c.max_positions} or less.'
            )
        self.subject = hf.load_model(self.directory, dtype=DTYPES[s.dtype], mesh=self.mesh)
        self.tx = make_optimizer(s.steps, s.learning_rate)

    def _put(self, split: data.Split, which: np.ndarray) -> dict[str, jax.Array]:
        return sharding.put_batch(rows(split, which, self.seq_len), self.mesh)

    def held_out(self, state: State) -> np.ndarray:
        """Mean KL by layer over the tokens of the first held-out documents, nats per token."""
        n, batch = min(len(self.validation), HELD_OUT_DOCUMENTS), self.settings.batch
        kl_L, tokens = 0.0, 0
        for i in range(0, n, batch):
            part = rows(self.validation, np.arange(i, i + batch) % n, self.seq_len)
            part['lengths'][n - i :] = 0  # the last batch is filled with documents that do not count
            kl, count = kl_sums(state, self.subject, sharding.put_batch(part, self.mesh))
            kl_L, tokens = kl_L + np.asarray(kl, np.float64), tokens + int(count)
        return kl_L / tokens

    def run(self) -> tuple[State, np.ndarray, np.ndarray]:
        """(trained state, held-out KL by layer before, after). Call under jax.set_mesh(self.mesh)."""
        steps, order = self.settings.steps, train_rows(self.train, self.settings.batch)
        first = self._put(self.train, np.arange(self.settings.batch))
        state = init_state(self.subject, first, tx=self.tx)
        before = self.held_out(state)
        print(f'Held-out KL of the logit lens, nats by layer: {" ".join(f"{x:.3f}" for x in before)}', flush=True)
        for i in range(1, steps + 1):
            state, kl_L = train_step(state, self.subject, self._put(self.train, next(order)), tx=self.tx)
            kl_L = np.asarray(kl_L)
            _check_finite(kl_L, f'step {i}')
            if i == 1:
                begin = time.monotonic()  # without compilation
            elif i % max(steps // LOGS, 1) == 0 or i == steps:
                left = (time.monotonic() - begin) / (i - 1) * (steps - i)
                print(
                    f'step {i}/{steps}  KL {kl_L.mean():.4f} nats, mean of layers  ETA {logger.clock(left)}',
                    flush=True,
                )
        state = to_final_norm(state, self.subject, first)
        after = self.held_out(state)
        _check_finite(after, 'held-out documents')
        return state, before, after


def subject_sha256(directory: pathlib.Path) -> str:
    """Fingerprint of the weights: of the lines 'name sha256' of the safetensors files, sorted."""
    lines = []
    for file in sorted(directory.glob('*.safetensors')):
        with file.open('rb') as f:
            lines.append(f'{file.name} {hashlib.file_digest(f, "sha256").hexdigest()}\n')
    return hashlib.sha256(''.join(lines).encode()).hexdigest()


def train(model: str, folder: str, out: pathlib.Path, settings: Settings) -> None:
    """Trains on folder/train and writes `out`, which appears at once, by rename. Raises LensError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LensError(f'{out} holds something already: give an empty or a new folder as --out.')
    begin = time.monotonic()
    trainer = Trainer(model, folder, settings)
    with jax.set_mesh(trainer.mesh):
        state, before, after = trainer.run()
    print('| layer | KL before | KL after |\n|---|---|---|')
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        print(f'| {i} | {a:.4f} | {b:.4f} |')
    worse = ', '.join(str(i) for i in np.flatnonzero(after > before))
    if worse:
        print(f'Worse than the logit lens: layers {worse}; lower --learning_rate or raise --steps.')
    c = trainer.subject.config
    shape = {'family': c.family, 'd_model': c.d_model, 'n_layers': c.n_layers, 'vocab_size': c.vocab_size}
    about = {
        'subject': {'path': model, 'sha256': subject_sha256(trainer.directory), **shape},
        'data': folder,
        'training': dataclasses.asdict(settings) | {'seq_len': trainer.seq_len, 'seed': SEED},
        'held_out': {
            'documents': min(len(trainer.validation), HELD_OUT_DOCUMENTS),
            'kl_before_nats': before.tolist(),
            'kl_after_nats': after.tolist(),
        },
        'wall_s': time.monotonic() - begin,
        'provenance': logger.provenance(),
    }
    weight_LxDxD = np.asarray(state.params['weight'])
    bias_LxD = np.asarray(state.params['bias']) * np.asarray(state.scale_L)[:, None]
    translators.write(out, weight_LxDxD, bias_LxD, about)


def main(_):
    settings = Settings(**{f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(Settings)})
    out = pathlib.Path(OUT.value)
    train(MODEL.value, DATA.value, out, settings)
    print(f'Tuned lens: {out}')


if __name__ == '__main__':
    MODEL = flags.DEFINE_string('model', None, 'Hugging Face directory or Hub id of the subject.')
    DATA = flags.DEFINE_string('data', None, 'Folder with train/ and validation/ of its tokens.')
    OUT = flags.DEFINE_string('out', None, 'New folder for the translators.')
    flags.DEFINE_integer('steps', Settings.steps, 'Updates of every layer.')
    flags.DEFINE_integer('batch', Settings.batch, 'Documents per step; a multiple of --mesh_data.')
    flags.DEFINE_integer('seq_len', Settings.seq_len, 'Tokens of each document that are read; default all.')
    flags.DEFINE_float('learning_rate', Settings.learning_rate, 'Peak.')
    flags.DEFINE_enum('dtype', Settings.dtype, list(DTYPES), 'Of the subject; translators are float32.')
    flags.DEFINE_integer('mesh_data', Settings.mesh_data, 'Devices that split the batch; -1 = all that remain.')
    flags.DEFINE_integer('mesh_model', Settings.mesh_model, 'Devices that split heads, feed-forward and vocabulary.')
    flags.mark_flags_as_required(['model', 'data', 'out'])
    cli.run(main)
