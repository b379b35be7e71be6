"""Where a tag stands in a response, as text: a tokenizer may join its ends with the words beside them.

`text.</explanation>` is `text`, `.</`, `explanation`, `>` to many tokenizers, and `<explanation>A` ends with the token `>A`.
A table over the vocabulary says how far into the tag each token comes, so that it is found inside a compiled step; another
one, which token the rest of the joined one is: `.` or `A`.
"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from lens import sharding

NOTHING = -1


@dataclasses.dataclass(frozen=True)
class Edge:
    """A tag of S characters. digest: of all that follows it, by which two are equal.

    steps_SxV: how many characters of the tag are there after a token, S if it is whole; row 0: of a token in which it
    begins, row s: of one that goes on after s characters; 0: it is not the tag. before_V, after_V: the token of what
    stands before, after the tag in a token, NOTHING where that is white space or none.
    """

    digest: str
    steps_SxV: np.ndarray = dataclasses.field(compare=False, repr=False)
    before_V: np.ndarray = dataclasses.field(compare=False, repr=False)
    after_V: np.ndarray = dataclasses.field(compare=False, repr=False)

    def first(self, ids_NxT, begin_N):
        """Finds the first tag that begins at token `begin` or after it: its first token and its last one, [N] each, -1 where
        there is none. Negative ids are no tokens."""
        size, at = len(self.steps_SxV), jnp.arange(ids_NxT.shape[1])
        begun = jnp.where(ids_NxT < 0, 0, look_up(self.steps_SxV[0], ids_NxT))

        def go_on(_, carry):
            state, last, following = carry
            following = jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
            inside = (state > 0) & (state < size)
            step = jnp.where(following < 0, 0, look_up(self.steps_SxV, state % size, following))
            return jnp.where(inside, step, state), last + inside, following

        state, last, _ = jax.lax.fori_loop(1, size, go_on, (begun, at + 0 * ids_NxT, ids_NxT))
        hit = (state == size) & (at >= begin_N[:, None])
        first_N = jnp.where(hit.any(1), jnp.argmax(hit, axis=1).astype(jnp.int32), -1)
        return first_N, jnp.where(first_N < 0, -1, jnp.take_along_axis(last, first_N[:, None], axis=1)[:, 0])


def look_up(table: np.ndarray, *at):
    """Values of a table at places of equal shape, one for each of its first axes; split over the devices as these are."""
    place, n = sharding.like(at[0]), at[0].ndim + table.ndim - len(at)
    place = place and sharding.P(*place, *[None] * (n - len(place)))
    table = sharding.reshard(jnp.asarray(table), sharding.P())
    return table.at[at].get(out_sharding=place)


def build(texts: list[str], tag: str, vocab_size: int) -> Edge:
    """Makes the edge of a tag, without white space at its ends, for tokens of these texts, of a model of `vocab_size` rows.
    A token of which the rest is no token by itself is no part of the tag."""
    size = len(tag)
    steps, (before, after) = np.zeros((size, vocab_size), np.int16), np.full((2, vocab_size), NOTHING, np.int32)
    known = {text: i for i, text in reversed([*enumerate(texts)])}

    def rest(text: str) -> int | None:
        return known.get(text) if text.strip() else NOTHING

    for i, text in enumerate(texts):
        left, found, right = text.partition(tag)
        if found:
            n, parts = size, (rest(left), rest(right))
        else:
            n = next((n for n in range(min(size - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
            parts = rest(text[: len(text) - n]), NOTHING
        if n and None not in parts:
            steps[0, i], before[i], after[i] = n, *parts
        for s in (s for s in range(1, size) if text and text[0] == tag[s]):
            if tag.startswith(text, s):
                steps[s, i] = s + len(text)
            elif text.startswith(tag[s:]) and (part := rest(text[size - s :])) is not None:
                steps[s, i], after[i] = size, part
    digest = hashlib.sha256(b''.join(x.tobytes() for x in (steps, before, after)))
    return Edge(digest.hexdigest(), steps, before, after)
