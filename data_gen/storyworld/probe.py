"""The gate of a subject: does the read block carry the facts, and what did that cost?

    python -m data_gen.storyworld.probe --model=configs/tiny_subject --data=data/storyworld --layer=3

A linear probe (multinomial logistic regression) at the read block predicts every described field
from the activation, at positions where the text has established it. Exit code 0 if every field
reaches --floor and, with --baseline, the language-model loss is within --max_cost of the baseline's.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from . import commands

    commands.probe()

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lens import data, feed, hf, losses
from lens.errors import LensError
from lens.models import subject

DOCUMENTS = 2000  # for the fit; POSITIONS each
POSITIONS = 12
MIN_POS = 8
FIT_STEPS = 400
BATCH = 100  # documents per forward


def activations(model, split: data.Split, documents: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (activations NxD, established values NxF) at POSITIONS positions of the first documents."""
    held = feed.held_out(split, documents=documents, vectors=POSITIONS, min_pos=MIN_POS, seed=1)
    read = jax.jit(subject.activations, static_argnames='layer')
    starts = range(0, len(held['tokens']), BATCH)
    parts = [read(model, *(held[k][i : i + BATCH] for k in ('tokens', 'positions')), layer=layer) for i in starts]
    return tuple(np.concatenate(x).reshape(-1, x[0].shape[-1]) for x in (parts, held['facts']))


def fit(a_NxD, labels_N, classes: int):
    """Fits weights [D+1, classes] of a logistic regression on standardised inputs, ridge 1e-4."""
    x = jnp.concatenate([a_NxD, jnp.ones((len(a_NxD), 1))], axis=1)

    def loss(w):
        logp = jax.nn.log_softmax(x @ w)
        return -jnp.mean(jnp.take_along_axis(logp, labels_N[:, None], axis=1)) + 1e-4 * jnp.sum(w**2)

    tx = optax.adam(optax.cosine_decay_schedule(0.05, FIT_STEPS))

    def step(_, carry):
        w, opt = carry
        updates, opt = tx.update(jax.grad(loss)(w), opt)
        return w + updates, opt

    w = jnp.zeros((x.shape[1], classes))
    return jax.lax.fori_loop(0, FIT_STEPS, step, (w, tx.init(w)))[0]


def accuracies(model, train: data.Split, validation: data.Split, layer: int) -> list[tuple[str, int, float]]:
    """Returns (field, number of values, held-out accuracy) for every field."""
    a, y = activations(model, train, DOCUMENTS, layer)
    b, z = activations(model, validation, len(validation), layer)
    mean, std = a.mean(0), a.std(0)
    a, b = (a - mean) / std, (b - mean) / std
    out = []
    for i, f in enumerate(train.meta['facts']):
        have, test = y[:, i] >= 0, z[:, i] >= 0
        w = fit(a[have], y[have, i].astype(np.int32), len(f['values']))
        guess = np.argmax(b[test] @ np.asarray(w[:-1]) + np.asarray(w[-1]), axis=1)
        out.append((f['field'], len(f['values']), float(np.mean(guess == z[test, i]))))
    return out


def lm_loss(model, split: data.Split) -> float:
    """Computes the held-out next-token loss in nats per token."""

    @jax.jit
    def batch_loss(model, tokens, lengths):
        logp = losses.token_log_probs(model(tokens)[:, :-1], tokens[:, 1:])
        mask = jnp.arange(1, tokens.shape[1]) < lengths[:, None]
        return jnp.sum(-logp * mask), jnp.sum(mask)

    starts = range(0, len(split), BATCH)
    parts = [batch_loss(model, split.tokens[i : i + BATCH], split.lengths[i : i + BATCH]) for i in starts]
    total, count = np.sum(np.asarray(parts, np.float64), axis=0)
    return float(total / count)


def main(model: str, baseline: str | None, data_folder: str, layer: int, floor: float, max_cost: float) -> None:
    subject_model = hf.load_model(model)
    c = subject_model.config
    if not 0 <= layer < c.n_layers:
        raise LensError(f'--layer={layer} is not a block of the subject (0..{c.n_layers - 1}).')
    train, validation = (data.open_split(data_folder, s, vocab_size=c.vocab_size) for s in ('train', 'validation'))
    if validation.facts is None:
        raise LensError(f'{data_folder} has no facts.npy: the probe needs known answers.')
    rows = accuracies(subject_model, train, validation, layer)
    print(f'Linear probe after block {layer} of {model}, held-out documents\n')
    print('| field | values | accuracy |\n|---|---|---|')
    for field, values, accuracy in rows:
        print(f'| {field} | {values} | {accuracy:.3f} |')
    loss = lm_loss(subject_model, validation)
    print(f'\nLM loss {loss:.4f} nats per token')
    failed = [f for f, _, accuracy in rows if accuracy < floor]
    if baseline:
        plain = lm_loss(hf.load_model(baseline), validation)
        print(f'without the look-ahead loss {plain:.4f}: cost {loss / plain - 1:+.2%}')
        failed += ['LM loss'] if loss / plain - 1 > max_cost else []
    if failed:
        sys.exit(f'gate FAILED: {", ".join(failed)}')
    print('gate passed')
