"""How an activation enters a prompt: one object each, with its rows, its hook, its maps, its settings, its checks.

Affine   trained maps of it overwrite the slot at the input or at the entrance of the first blocks
Replace  the row of the slot at the input is the activation itself, rescaled to a fixed norm
Add      the stream that leaves block 1 keeps its direction at the slot and gets that of the activation, norm-matched

Replace and Add are the families A and B of natural language autoencoders; a token of its own marks their slots. A
new one is a class like these and its name in INJECTIONS; its fields are keys of cfg.decoder.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lens import sharding
from lens.errors import LensError, shown

ADD_BLOCK = 2  # block at whose entrance Add acts


class Injection:
    """What every injection has, beside two functions of its own:

    from_config(d, c) makes it of cfg.decoder and the base's TransformerConfig. Raises LensError.
    enter(decoder, model, a_BxD) -> (row_BxD, before_block): what fills the slots of the prompt, in units of the
    embedding table, and the hook of Transformer.run_layers, in those of the stream, or None. a_BxD: float32; or BxKxD, a
    vector for each of K slots, and so are its rows.
    n_maps: trained maps y = a W + b, in Decoder.maps_w and maps_b; where slots stand for blocks of their own, each is a W
    and b for each slot. place: where y goes, for a reader of exported weights. at_input: whether y is in units of the
    embedding table. soft_prompts: whether prompts are trained rows beside the models, not words that each model looks up in
    its own table, as the readers of its files do.
    """

    name: ClassVar[str]
    soft_prompts: ClassVar[bool] = True
    n_maps = 0
    place = ''
    at_input = True

    def settings(self) -> dict:
        """Names what decides how an activation enters, by configuration key."""
        return {'decoder.injection': self.name} | {f'decoder.{k}': v for k, v in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class Affine(Injection):
    """Map k overwrites the slot in the stream that enters block k, for the first patched_blocks; with 0 of them the
    one map fills the slot of the input. shared_map: one map for all blocks."""

    patched_blocks: int
    shared_map: bool = False
    name = 'affine'

    @classmethod
    def from_config(cls, d, c):
        n = d.patched_blocks
        if not -1 <= n <= c.n_layers:
            raise LensError(f'decoder.patched_blocks={n} is not in -1..{c.n_layers}, the blocks of the subject.')
        return cls(c.n_layers if n == -1 else n, d.shared_map)

    @property
    def n_maps(self) -> int:
        return 1 if self.shared_map else max(self.patched_blocks, 1)

    @property
    def at_input(self) -> bool:
        return self.patched_blocks == 0

    @property
    def place(self) -> str:
        last = self.patched_blocks - 1
        if last < 0:
            return (
                'fills the slot of the input, in units of the embedding table (before embed_scale and position vectors)'
            )
        if self.shared_map:
            return f'overwrites the slot in the residual stream that enters each of blocks 0..{last}'
        return f'number k overwrites the slot in the residual stream that enters block k, for k = 0..{last}'

    def enter(self, decoder, model, a_BxD):
        del model
        weights, bias = sharding.gathered(decoder.maps_w[...]), decoder.maps_b[...]
        of_slots = weights.ndim == 4
        maps_MxBxD = jnp.einsum('bkd,mdke->mbke' if of_slots else '...d,mde->m...e', a_BxD, weights)
        maps_MxBxD += jnp.expand_dims(bias, range(1, a_BxD.ndim - of_slots))

        def patch(x_BxTxD, block):
            value_BxD = maps_MxBxD[jnp.minimum(block, self.n_maps - 1)]
            return jnp.where(block < self.patched_blocks, overwrite(x_BxTxD, decoder.slots, value_BxD), x_BxTxD)

        return maps_MxBxD[0], patch if self.patched_blocks else None


@dataclasses.dataclass(frozen=True)
class Replace(Injection):
    """norm: of the row in the slot, in units of the stream."""

    norm: float
    name = 'replace'
    soft_prompts = False

    @classmethod
    def from_config(cls, d, c):
        if d.norm < 0:
            raise LensError(f'decoder.norm={d.norm} must not be negative.')
        return cls(float(d.norm) or c.d_model**0.5)

    def enter(self, decoder, model, a_BxD):
        return fixed_norm(a_BxD, self.norm) / model.config.embed_scale, None


@dataclasses.dataclass(frozen=True)
class Add(Injection):
    name = 'add'
    soft_prompts = False

    @classmethod
    def from_config(cls, d, c):
        if c.n_layers <= ADD_BLOCK:
            raise LensError(f'decoder.injection=add writes at block {ADD_BLOCK}, the subject has {c.n_layers} blocks.')
        if not d.marker:
            raise LensError('decoder.injection=add needs decoder.marker, a text of one token for the slot.')
        return cls()

    def enter(self, decoder, model, a_BxD):
        def add(x_BxTxD, block):
            return jnp.where(block == ADD_BLOCK, add_norm_matched(x_BxTxD, decoder.slots, a_BxD), x_BxTxD)

        marker_1xD = model.embedding_rows([decoder.config.marker])
        return jnp.broadcast_to(marker_1xD, a_BxD.shape, out_sharding=sharding.like(a_BxD)), add


INJECTIONS = {kind.name: kind for kind in (Affine, Replace, Add)}


def of_config(d, c) -> Injection:
    """Picks the injection of cfg.decoder for a base of TransformerConfig `c`. Raises LensError."""
    if d.injection not in INJECTIONS:
        raise LensError(f'decoder.injection={shown(repr(d.injection))} is not one of {", ".join(INJECTIONS)}.')
    return INJECTIONS[d.injection].from_config(d, c)


def _spread(value, slots: tuple[int, ...], width: int):
    """Rows Bx1xD of one vector for all slots, BxD; BxTxD of one for each, BxKxD."""
    if value.ndim == 2:
        return value[:, None]
    at = np.arange(width)[:, None]
    return sum(jnp.where(at == slot, value[:, k, None], 0) for k, slot in enumerate(slots))


def overwrite(x_BxTxD, slots: tuple[int, ...], value):
    """Gives x with the rows at the slots replaced by the value, BxD, or by one of its own for each slot, BxKxD."""
    hit_Tx1 = np.isin(np.arange(x_BxTxD.shape[1]), slots)[:, None]
    return jnp.where(hit_Tx1, _spread(value, slots, x_BxTxD.shape[1]).astype(x_BxTxD.dtype), x_BxTxD)


def add_norm_matched(x_BxTxD, slots: tuple[int, ...], vector):
    """Gives h + |h| v / (|v| + 1e-9) at the slots; the vector, BxD, or one for each slot, BxKxD, is rounded to the dtype of
    the stream first."""
    hit_Tx1 = np.isin(np.arange(x_BxTxD.shape[1]), slots)[:, None]
    v = _spread(vector, slots, x_BxTxD.shape[1]).astype(x_BxTxD.dtype).astype(jnp.float32)
    h = jnp.where(hit_Tx1, x_BxTxD.astype(jnp.float32), 1.0)  # elsewhere any row with a norm that has a gradient
    size = jnp.linalg.norm(h, axis=-1, keepdims=True)
    added = size * v / (jnp.linalg.norm(jax.lax.stop_gradient(v), axis=-1, keepdims=True) + 1e-9)
    return jnp.where(hit_Tx1, (h + added).astype(x_BxTxD.dtype), x_BxTxD)


def fixed_norm(v_NxD, norm: float):
    """Rescales: v * norm / max(|v|, 1e-12): zero stays zero."""
    v = v_NxD.astype(jnp.float32)
    size = jnp.sqrt(jnp.maximum(jnp.sum(v**2, -1, keepdims=True), 1e-24))
    return v * (norm / size)
