"""What the decoder says after a prompt that a client has put together itself: rows as they enter its first block, the
activation in its place among them, as clients of servers of language models send them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lens import sampling, sharding, words
from lens.errors import LARGEST_INT, LensError, number
from lens.models import injection
from lens.models.decoder import Decoder
from lens.models.lens import Lens
from lens.response import Tags, find

COLDEST = 1e-6  # temperature below which SGLang draws the most probable token, and limits leave no other


@dataclasses.dataclass(frozen=True)
class Given(injection.Injection):
    """The activation is the row of its slot, in units of the stream."""

    name = 'given'

    def enter(self, decoder, model, a_BxD):
        return a_BxD / model.config.embed_scale, None


class Limits(NamedTuple):
    """What may be drawn, as SGLang has it: a token is among the top_k most probable ones, those more probable than it have at
    most top_p of all probability together, and it has at least min_p times the probability of the first. -1, 1 and 0:
    every token may."""

    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0


EVERY = Limits()


def kept(logp_NxV, top_k, top_p, min_p):
    """Returns which tokens Limits leave, bool NxV, the most probable one always; of equal ones the first come first.

    logp_NxV: log-probabilities at the temperature of the draw. top_k: at least 1.
    """
    id_NxV = jax.lax.broadcasted_iota(jnp.int32, logp_NxV.shape, 1, out_sharding=sharding.like(logp_NxV))
    down_NxV, order_NxV = jax.lax.sort((-logp_NxV, id_NxV), num_keys=1)
    p_NxV = jnp.exp(-down_NxV)
    before_NxV = jnp.cumsum(p_NxV, axis=1) - p_NxV
    # what is left of a sum that is 1 but for rounding is no reason to leave a token out
    kept_NxV = (id_NxV < top_k) & ((before_NxV <= top_p) | (top_p >= 1)) & (p_NxV >= min_p * p_NxV[:, :1])
    return jax.lax.sort((order_NxV, kept_NxV), num_keys=1)[1]


@dataclasses.dataclass(frozen=True)
class Said:
    """ids of the tokens; logp of each at temperature 1, of all tokens; stopped: whether it has ended by itself, by its
    closing tag or a control token; end: that token, the last one, None where none has ended it."""

    ids: list[int]
    logp: list[float]
    stopped: bool
    end: int | None


def _with_prompt(decoder: Decoder, rows_QxD, embed_scale: float) -> Decoder:
    """Copies a decoder with rows as its prompt, of which the last is its slot."""
    copy = jax.tree.map(lambda x: x, decoder)
    copy.config = dataclasses.replace(decoder.config, injection=Given(), more_slots=())
    copy.left_ids, copy.right_ids = (0,) * (len(rows_QxD) - 1), ()
    copy.prompt_left, copy.prompt_right = (nnx.data(nnx.Param(x)) for x in (rows_QxD[:-1] / embed_scale, rows_QxD[:0]))
    return copy


@functools.partial(jax.jit, static_argnames=('length', 'tags'))
def _say(lens: Lens, base, rows_QxD, seed, temperature, limits: Limits | None, *, length: int, tags: Tags):
    """Returns tokens [T], their log-probabilities, how many of them there are until the tags are closed, and whether they are."""

    def only(logits_NxV):
        logp_NxV = jax.nn.log_softmax(logits_NxV / jnp.maximum(temperature, COLDEST))
        return jnp.where(kept(logp_NxV, *limits), logits_NxV, -jnp.inf)

    decoder = _with_prompt(lens.decoder, rows_QxD, base.config.embed_scale)
    how = {'length': length, 'temperature': temperature, 'tags': tags, 'only': only if limits else sampling.every}
    last_1xD = sharding.reshard(rows_QxD[-1:], sharding.rows(2))
    said = sampling.sample(decoder, base, last_1xD, jax.random.key(seed), **how)
    found = find(said.ids_NxT, tags)
    return said.ids_NxT[0], said.logp_NxT[0], found.end_N[0], found.found_N[0]


def say(reader, rows_QxD, *, length: int, temperature: float, seed: int, limits: Limits = EVERY) -> Said:
    """Draws what the decoder says after a prompt, at most `length` tokens.

    reader: lens.reader.Reader. rows_QxD: as they enter block 0, so after the scale of the embedding, two at least; position
    vectors are added here. Each number of rows and each length is a program. Raises LensError, also for a lens whose
    activation enters after the input, which no prompt holds.
    """
    c, inject = reader.base.config, reader.lens.decoder.config.injection
    if not inject.at_input or isinstance(inject, injection.Add):
        raise LensError(
            'The activation of this lens enters blocks of its decoder, which no prompt holds: use /describe.'
        )
    rows = np.asarray(rows_QxD, np.float32)
    if rows.ndim != 2 or rows.shape[1] != c.d_model or len(rows) < 2 or not np.isfinite(rows).all():
        raise LensError(f'input_embeds must be two or more rows of {c.d_model} finite numbers.')
    number(length, 'max_new_tokens', 1)
    if len(rows) + length > c.max_positions:
        raise LensError(
            f'{len(rows)} rows and {length} new tokens are more than {c.max_positions}: lower max_new_tokens.'
        )
    eos, ends = reader.tokenizer.eos_token_id, words.special_ids(reader.tokenizer)
    tags = reader.run.texts.tags or Tags((), () if eos is None else (eos,))
    given = None if limits == EVERY else limits._replace(top_k=limits.top_k if limits.top_k > 0 else LARGEST_INT)
    with jax.set_mesh(reader.run.mesh):
        out = _say(reader.lens, reader.base, jnp.asarray(rows), seed, temperature, given, length=length, tags=tags)
    ids, logp, end, found = jax.device_get(out)
    ids, found = ids[:end].tolist(), bool(found)
    turn = next((k for k, i in enumerate(ids) if i in ends), None)
    if turn is not None:
        ids, found = ids[: turn + 1], True
    return Said(ids, logp[: len(ids)].tolist(), found, ids[-1] if ids and ids[-1] in ends else None)
