"""What a step works on: what its program depends on, the activations of a batch, and texts of them, without gradient."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import sampling, sharding
from lens.models import decoder as dec
from lens.models import subject
from lens.models.encoder import Source
from lens.models.lens import Lens
from lens.response import NO_TAGS, Found, Tags

COPIES = 32  # last tokens of the source, words among which copy_price is for
PREFIXES = 2**31 - 2  # folded into the key of a step for the lengths of prefixes; sampling folds in indices of tokens


@dataclasses.dataclass(frozen=True)
class Hparams:
    """What an objective's program depends on; a static argument of a step.

    on: the objectives.KNOBS that are not zero throughout the phase; a weight that is not among them computes nothing.
    layers: blocks whose activations stand in the slots of the decoder's prompt, one each; (): that of `layer` in all.
    natural_prefix: token ids of the decoder prompt with a word for the activation. prefix: (prefix_min, prefix_max), or ().
    judged: rewards are from another encoder than the one that learns. The others: configs/base.py.
    """

    layer: int
    length: int
    layers: tuple[int, ...] = ()
    on: frozenset[str] = frozenset({'mse_weight'})
    tags: Tags = NO_TAGS
    error: str = 'nmse'
    group: int = 1
    mean_of: int = 1
    advantage: str = 'grpo'
    reward: str = 'error'
    policy: str = 'ppo'
    aggregate: str = 'tokens'
    drop_equal: bool = False
    encoder_texts: str = 'all'
    prefix: tuple[int, ...] = ()
    judged: bool = False
    updates: int = 1
    slices: int = 1
    kl_to: str = 'natural'
    kl_top: int = 0
    natural_prefix: tuple[int, ...] = ()
    form: str = 'two_pass'
    resample: bool = False
    resample_stop_grad: bool = True
    context: int = 0

    @property
    def recent(self) -> int:
        """Returns how many source tokens a step is given of each activation."""
        return max(1, self.context, COPIES if 'copy_price' in self.on else 0)

    @property
    def reads_again(self) -> bool:
        """Returns whether the loss runs the subject on the texts."""
        return 'kl_weight' in self.on

    @property
    def needs_reference(self) -> bool:
        return 'beta' in self.on and self.kl_to == 'start'


Knobs = Mapping[str, jax.Array]


class Counted(NamedTuple):
    """What counts in the means of a loss: 1 or 0 for each token and, in the encoder's terms, each row; and how many count
    (scalars: with the first tokens, without those of kl_skip; rows) in the whole rollout. teach_NxT: of the tokens, those
    that the decoder learns from."""

    found: Found
    mask_NxT: jax.Array
    teach_NxT: jax.Array
    kept_N: jax.Array
    tokens: jax.Array
    kl_tokens: jax.Array
    kept: jax.Array


class Rollout(NamedTuple):
    """What a step works on, all constants. N rows; rows of one activation are contiguous. batch: without tokens where
    no text is read again. counted: where there are texts, once their loss is asked for. shown_A: how many tokens of the
    context the encoder is shown without words, of each activation; where it has a context, once a gradient is asked for.
    words_N: how many words of its text the encoder reads at most; where hp has a prefix. judged_NxD: reconstructions that
    rewards are of; where hp is judged. slots_NxKxD: activations for the slots of the decoder's prompt, one each; where hp
    has layers. a_NxD is what is reconstructed."""

    a_NxD: jax.Array
    source: Source
    batch: dict
    ids_NxT: jax.Array | None = None
    logp_NxT: jax.Array | None = None
    counted: Counted | None = None
    shown_A: jax.Array | None = None
    words_N: jax.Array | None = None
    judged_NxD: jax.Array | None = None
    slots_NxKxD: jax.Array | None = None

    @property
    def shown(self) -> jax.Array:
        """Returns the activations that the decoder says something of, NxD or one for each slot, NxKxD."""
        return self.a_NxD if self.slots_NxKxD is None else self.slots_NxKxD


@functools.partial(jax.jit, static_argnames=('layer', 'layers', 'again', 'recent'))
def read(base, batch, *, layer: int, layers: tuple[int, ...] = (), again: bool = False, recent: int = 1) -> Rollout:
    """Returns the activations NxD in float32 and where they are from, with the last `recent` source tokens of each.

    A program of its own, since it alone depends on the width of the texts. layers: of Hparams; stored activations have
    none. again: keep the tokens for a second reading.
    """
    a, slots = batch.get('activations'), None
    if a is None:
        found = subject.activations_of(base, batch['tokens'], batch['positions'], (layer, *layers))
        a = found[layer]
        if layers:
            slots = in_rows(jnp.stack([found[k] for k in layers], axis=2).astype(jnp.float32))
    rest = {k: x for k, x in batch.items() if k != 'activations' and (again or k != 'tokens')}
    return Rollout(in_rows(a.astype(jnp.float32)), source_of(batch, recent), rest, slots_NxKxD=slots)


@functools.partial(jax.jit, static_argnames='recent')
def source_of(batch, recent: int) -> Source:
    """Makes the Source of N = B * P activations with the last `recent` tokens of each; before the beginning of a text its
    first token is repeated, and where there is no text all are 0."""
    positions_BxP = batch['positions']
    tokens_BxS = batch.get('tokens', jnp.zeros_like(positions_BxP))
    (b, p), at_BxPxR = positions_BxP.shape, positions_BxP[..., None] - jnp.arange(recent)[::-1]
    tokens = sharding.take(tokens_BxS, jnp.clip(at_BxPxR, 0, tokens_BxS.shape[1] - 1).reshape(b, p * recent))
    return Source(in_rows(tokens.reshape(b, p, recent)), in_rows(positions_BxP))


def in_rows(x_BxPxD):
    """The rows of all documents one after the other, split over the devices; of one document XLA would not know how."""
    return sharding.reshard(x_BxPxD.reshape(-1, *x_BxPxD.shape[2:]), sharding.rows(x_BxPxD.ndim - 1))


def no_rollout(lens: Lens, base, roll: Rollout, key, hp: Hparams) -> Rollout:
    del lens, base, key, hp
    return roll


def given_rollout(lens: Lens, base, roll: Rollout, key, hp: Hparams) -> Rollout:
    """Takes the given responses as if they had been sampled."""
    del lens, base
    return roll._replace(ids_NxT=roll.batch['explanations'].reshape(-1, hp.length), words_N=_words(roll, key, hp, 1))


def sampled_rollout(lens: Lens, base, roll: Rollout, key, hp: Hparams) -> Rollout:
    """Draws group * mean_of responses of every activation."""
    n = hp.group * hp.mean_of
    how = {'length': hp.length, 'group': n, 'tags': hp.tags}
    s = sampling.sample(lens.decoder, base, vectors(lens.decoder, roll), key, **how)
    tiled = roll.a_NxD, roll.source, roll.slots_NxKxD
    a, source, slots = jax.tree.map(lambda x: subject.tile_rows(x, n), tiled)
    words = _words(roll, key, hp, n)
    return Rollout(a, source, roll.batch, s.ids_NxT, s.logp_NxT, words_N=words, slots_NxKxD=slots)


def _words(roll: Rollout, key, hp: Hparams, n: int):
    """How many words the encoder reads, drawn for each activation and the same for its n texts: what comes first in all of
    them must say most."""
    if not hp.prefix:
        return None
    least, most = hp.prefix
    words_A = jax.random.randint(jax.random.fold_in(key, PREFIXES), (len(roll.a_NxD),), least, most + 1)
    return subject.tile_rows(sharding.reshard(words_A, sharding.rows(1)), n)


def per_activation(roll: Rollout) -> int:
    """Returns how many rows an activation has."""
    return len(roll.a_NxD) // roll.batch['positions'].size


def per_document(roll: Rollout) -> int:
    """Returns how many rows a document has."""
    return len(roll.a_NxD) // len(roll.batch['positions'])


def vectors(decoder: dec.Decoder, roll: Rollout):
    """Returns what the decoder is given of each row, NxD, or NxKxD."""
    return dec.without_position(decoder, roll.shown, roll.source.position_N)
