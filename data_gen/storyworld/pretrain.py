"""Pretraining of a small subject: the ordinary language-model loss plus a look-ahead loss.

A small model looks facts up when it needs them; its residual stream does not carry them. The
look-ahead loss makes one block's output predict the fact words of the next tokens, so that there is
something to read. Its head is thrown away.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from . import commands

    commands.pretrain()

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx

from lens import data, files, hf, logger, losses, sharding
from lens.checkpoint import Checkpoints, Keep
from lens.errors import LensError
from lens.models.norm import unit_rms
from lens.models.rope import Rope
from lens.models.transformer import Transformer, TransformerConfig

SUBJECT = pathlib.Path(__file__).parents[2] / 'configs/tiny_subject'  # its config.json, but for sizes and token ids
END = 0.05  # of the peak learning rate
HELD_OUT, BATCH = 512, 64  # documents of the held-out losses, per forward


class Trainable(nnx.Module):
    def __init__(self, c: TransformerConfig, n_facts: int, *, rngs):
        self.model = Transformer(c, rngs=rngs)
        self.model.embedding = nnx.Param(self.model.embedding[...] * 0.02)
        self.fact_head = nnx.Param(jnp.zeros((c.d_model, n_facts)))


# (reduction, output) axes of the stacked block matrices for Muon; every other leaf is Adam's
MATRIX_AXES = {
    'attn/q': (1, (2, 3, 4)),
    'attn/k': (1, (2, 3)),
    'attn/v': (1, (2, 3)),
    'attn/o': ((1, 2, 3), 4),
    'mlp/gate': (1, 2),
    'mlp/up': (1, 2),
    'mlp/down': (1, 2),
    'moe/gate_up': (4, (2, 3)),
    'moe/down': (2, 3),
}


def matrix_axes(tree):
    """Returns Muon's dimension numbers for every leaf, None where Adam trains it."""

    def axes(kp, _):
        path = sharding.path(kp)
        spec = MATRIX_AXES.get('/'.join(path.split('/')[-2:])) if 'blocks/' in path else None
        return spec and optax.contrib.MuonDimensionNumbers(*spec)

    return jax.tree_util.tree_map_with_path(axes, tree)


def fact_targets(tokens_BxS, mask_BxS, fact_ids_M, window: int):
    """Returns 1 where fact word m occurs among the next `window` tokens after position s; BxSxM."""
    onehot = (tokens_BxS[..., None] == fact_ids_M) & mask_BxS[..., None]
    seen = jnp.cumsum(onehot, axis=1)
    ahead = jnp.pad(seen, ((0, 0), (0, window), (0, 0)), mode='edge')[:, window:]
    return (ahead > seen).astype(jnp.float32)


def lookahead_loss(head_DxM, x_BxSxD, targets_BxSxM, group_sizes: tuple[int, ...]):
    """Computes the cross-entropy of each field's value (softmax within the field) for the fact words ahead."""
    x = unit_rms(x_BxSxD, 1e-6)
    logits = jnp.einsum('bsd,dm->bsm', x, head_DxM)
    edges = np.cumsum(group_sizes)[:-1]
    logp = jnp.concatenate([jax.nn.log_softmax(g, -1) for g in jnp.split(logits, edges, -1)], -1)
    return -jnp.sum(logp * targets_BxSxM) / jnp.maximum(jnp.sum(targets_BxSxM), 1)


def loss_fn(t: Trainable, tokens_BxS, lengths_B, *, fact_ids_M, layer, window, weight, group_sizes):
    """Computes LM loss + weight * look-ahead loss, and both as metrics (nats)."""
    m, c = t.model, t.model.config
    mask = jnp.arange(tokens_BxS.shape[1]) < lengths_B[:, None]
    x = m.run_layers(m.embed(tokens_BxS), 0, layer + 1)
    logp = losses.token_log_probs(m.logits(m.run_layers(x, layer + 1, c.n_layers))[:, :-1], tokens_BxS[:, 1:])
    lm = losses.cross_entropy(logp, mask[:, 1:])
    ahead = jnp.zeros(())
    if weight:
        targets = fact_targets(tokens_BxS, mask, fact_ids_M, window)
        ahead = lookahead_loss(t.fact_head[...], x, targets * mask[..., None], group_sizes)
    return lm + weight * ahead, {'lm_loss_nats': lm, 'lookahead_loss_nats': ahead}


def make_optimizer(recipe) -> optax.GradientTransformation:
    """Makes Muon for the block matrices, Adam for the rest. Muon learns to carry the facts several times faster
    than Adam: look-ahead loss 2.06 against 2.70 after 250 steps.

    recipe: steps, warmup_steps, weight_decay and two peak learning rates, learning_rate_matrices and learning_rate.
    """

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, recipe.warmup_steps, recipe.steps, END * peak)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(recipe.learning_rate_matrices),
            weight_decay=recipe.weight_decay,
            adam_learning_rate=schedule(recipe.learning_rate),
            adam_b2=0.98,
            muon_weight_dimension_numbers=matrix_axes,
        ),
    )


def make_step(loss, tx: optax.GradientTransformation):
    """Makes a compiled step (state, *batch) -> (state, figures) for loss(trainable, *batch) -> (nats, figures)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, *batch):
        grads, out = jax.grad(loss, has_aux=True)(state['trainable'], *batch)
        updates, opt = tx.update(grads, state['opt'], state['trainable'])
        return {'trainable': optax.apply_updates(state['trainable'], updates), 'opt': opt}, out

    return step


def show(step: int, steps: int, figures: dict, rate_s: float) -> None:
    """Prints a line of progress. rate_s: seconds per step."""
    text = '  '.join(f'{k} {float(v):.3f}' for k, v in figures.items())
    print(f'step {step}/{steps}  {text}  ETA {logger.clock(rate_s * (steps - step))}', flush=True)


class Pretrainer:
    """A recipe with its data and compiled step: `run` trains in a workdir. Raises LensError for what does not fit."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.tokenizer = hf.load_tokenizer(cfg.tokenizer)
        vocab_size = len(self.tokenizer)
        self.train, self.validation = (
            data.open_split(cfg.data, s, vocab_size=vocab_size) for s in ('train', 'validation')
        )
        fields = self.train.meta.get('facts') or []
        if not 0 <= cfg.lookahead.layer < cfg.model.n_layers:
            raise LensError(
                f'lookahead.layer={cfg.lookahead.layer} is not a block of the model (0..{cfg.model.n_layers - 1}).'
            )
        if cfg.lookahead.weight and not fields:
            raise LensError(
                f'{cfg.data} has no known facts: the look-ahead loss needs them, or set lookahead.weight=0.'
            )
        self.shape = TransformerConfig(
            family='llama',
            vocab_size=vocab_size,
            norm_eps=1e-5,
            tied=True,
            max_positions=512,
            ropes=(Rope(10000.0),),
            remat='dots',
            **cfg.model,
        )
        self.fact_ids = np.array([i for f in fields for i in f['token_ids']], np.int32)
        self.tx = make_optimizer(cfg)
        loss = functools.partial(
            loss_fn, **cfg.lookahead, fact_ids_M=self.fact_ids, group_sizes=tuple(len(f['token_ids']) for f in fields)
        )

        def init():
            t = Trainable(self.shape, len(self.fact_ids), rngs=nnx.Rngs(cfg.seed))
            return {'trainable': t, 'opt': self.tx.init(t)}

        self._init, self.step, self.loss = jax.jit(init), make_step(loss, self.tx), jax.jit(loss)

    def init(self) -> dict:
        """Returns the state before the first step."""
        # committed, as what a checkpoint gives back: both run through one compiled step
        return jax.device_put(self._init(), jax.devices()[0])

    def run(self, workdir: pathlib.Path) -> dict[str, float]:
        """Trains to the end, writes the model and returns its held-out losses; goes on from the last checkpoint."""
        cfg, state, rng = self.cfg, self.init(), np.random.default_rng(self.cfg.seed)
        if (workdir / 'model').exists():
            raise LensError(f'{workdir}/model exists: this run is finished; use another --workdir.')
        print(f'{sum(x.size for x in jax.tree.leaves(state["trainable"].model)):,} parameters')
        with Checkpoints(workdir / 'checkpoints', Keep()) as checkpoints:
            first = checkpoints.latest_step or 0
            if first:
                state = checkpoints.restore(first, state)
                print(f'Continuing at step {first}')
            begin = time.monotonic()
            for i in range(1, cfg.steps + 1):
                rows = rng.integers(len(self.train), size=cfg.documents)
                if i <= first:
                    continue
                state, out = self.step(state, self.train.tokens[rows], self.train.lengths[rows])
                if i % cfg.log_every_steps == 0:
                    show(i, cfg.steps, out, (time.monotonic() - begin) / (i - first))
                if i % cfg.checkpoint_every_steps == 0:
                    print(f'held out at step {i}: {self.held_out(state["trainable"])}', flush=True)
                    checkpoints.save(i, state, {})
        model = state['trainable'].model
        ids = {f'{k}_token_id': getattr(self.tokenizer, f'{k}_token_id') for k in ('bos', 'eos', 'pad')}
        config = files.read_json(SUBJECT / 'config.json', 'it is part of the repository') | ids
        hf.save_model(model, workdir / 'model', dtype=jnp.bfloat16, source=cfg.tokenizer, config=config)
        return self.held_out(state['trainable'])

    def held_out(self, t: Trainable) -> dict[str, float]:
        """Computes the losses over the first held-out documents, nats."""
        n = max(min(len(self.validation), HELD_OUT) // BATCH, 1) * BATCH
        tokens, lengths = self.validation.tokens, self.validation.lengths
        parts = [self.loss(t, tokens[i : i + BATCH], lengths[i : i + BATCH])[1] for i in range(0, n, BATCH)]
        return {k: round(float(np.mean([p[k] for p in parts])), 4) for k in parts[0]}


def main(config, workdir: str) -> None:
    print(f'Held out: {Pretrainer(config).run(pathlib.Path(workdir))}\nModel: {workdir}/model')
