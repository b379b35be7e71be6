"""Where the explanation is in a response: between an opening and a closing tag, both token sequences."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Tags:
    """Token ids of the tags; without a closing one every token of a response is explanation."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.closing)


NO_TAGS = Tags()


class Extraction(NamedTuple):
    """Of every response: the words start..start+length-1, the tokens up to and with the closing tag, success."""

    start_N: jnp.ndarray
    length_N: jnp.ndarray
    end_N: jnp.ndarray
    found_N: jnp.ndarray

    @property
    def span(self):
        return self.start_N, self.length_N

    def mask(self, length: int):
        """1.0 on the tokens of the response NxT, 0.0 after its end."""
        return (jnp.arange(length) < self.end_N[:, None]).astype(jnp.float32)


def _first(ids_NxT, tag: tuple[int, ...], begin_N):
    """(index of the first occurrence of `tag` at or after begin, whether there is one)."""
    n, t = ids_NxT.shape
    hit = jnp.ones((n, t), bool)
    for k, token in enumerate(tag):
        shifted = jnp.pad(ids_NxT[:, k:], ((0, 0), (0, k)), constant_values=-1)
        hit &= shifted == token
    hit &= jnp.arange(t) >= begin_N[:, None]
    return jnp.argmax(hit, axis=1).astype(jnp.int32), hit.any(1)


def extract(ids_NxT, tags: Tags) -> Extraction:
    """The first closed pair of tags with at least one token between them.

    A response without one has failed: all its tokens count, the explanation is what follows the opening tag, or
    all of it. Without tags nothing fails.
    """
    t = ids_NxT.shape[1]
    zero = jnp.zeros_like(ids_NxT[:, 0])
    if not tags:
        return Extraction(zero, zero + t, zero + t, zero == 0)
    opened, has_opening = _first(ids_NxT, tags.opening, zero) if tags.opening else (zero, zero == 0)
    start = jnp.where(has_opening, opened + len(tags.opening), 0)
    closed, has_closing = _first(ids_NxT, tags.closing, start)
    found = has_opening & has_closing & (closed > start)
    stop = jnp.where(found, closed, t)
    start = jnp.minimum(start, t - 1)
    return Extraction(start, jnp.maximum(stop - start, 1), jnp.where(found, closed + len(tags.closing), t), found)


def respond(labels: np.ndarray, tags: Tags, filler: int, length: int) -> np.ndarray:
    """Responses [..., length] of given explanations [..., T]: opening tag, words, closing tag, filler.

    The filler at the end of a label is no word. Labels that leave no room for the tags are cut. Without tags the
    labels are what is written.
    """
    if not tags:
        return labels
    t, room = labels.shape[-1], length - len(tags.opening) - len(tags.closing)
    words = np.where(labels != filler, np.arange(1, t + 1), 0).max(-1).clip(1, room)
    out = np.full((*labels.shape[:-1], length), filler, labels.dtype)
    out[..., : len(tags.opening)] = tags.opening
    body = np.arange(min(t, room)) < words[..., None]
    inner = out[..., len(tags.opening) : len(tags.opening) + body.shape[-1]]
    inner[body] = labels[..., : body.shape[-1]][body]
    close = (len(tags.opening) + words)[..., None] + np.arange(len(tags.closing))
    np.put_along_axis(out, close, np.broadcast_to(np.asarray(tags.closing, labels.dtype), close.shape), -1)
    return out
