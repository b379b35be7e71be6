"""Text, not tokens, between a prompt and the words in it: what the tokenizer makes of the whole.

A tokenizer joins across the border of two texts: `<text>` and `"a` are `>"` and `a` there, `.` and `</text>` are `.</`. The
tokens of a prompt that may be joined with words are cut off it, and stand among the words. Inside a compiled step the first
and the last token of an explanation say by a table over the vocabulary what they are there (`join`); outside of it the
text itself is read (`exact`). White space at its edges is no part of an explanation.

Its tags are found as text, too: `text.</explanation>` is `text`, `.</`, `explanation`, `>` to many tokenizers. A table says how
far into the tag each token comes, another one which token the rest of a joined one is: `.`.
"""

import dataclasses
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from lens import sharding
from lens.words import ANCHOR, BROKEN, special_ids

AFTER = ' the'  # what follows the first token of an explanation: a word of its own
NOTHING = -1  # of a token that is the tag alone, or it and white space
MOST = 4  # tokens that a first or last one becomes; what becomes more of them is left as it is


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
        last_N = sharding.take(last, jnp.maximum(first_N, 0)[:, None])[:, 0]
        return first_N, jnp.where(first_N < 0, -1, last_N)


@dataclasses.dataclass(frozen=True)
class Joints:
    """Two texts and the words between them. digest: of all that follows it, by which two are equal.

    before, after: ids of the texts beside the words; cut: how many tokens of them stand among the words. head_VxH,
    tail_VxW: what the first token of an explanation becomes with the cut ones before it, the last one with those after
    it, -1 after the end. blank_V: tokens that are nothing but white space. tags: that an explanation stands between.
    """

    digest: str
    tokenizer: object = dataclasses.field(compare=False, repr=False)
    texts: tuple[str, str] = dataclasses.field(compare=False)
    before: tuple[int, ...] = dataclasses.field(compare=False)
    after: tuple[int, ...] = dataclasses.field(compare=False)
    cut: tuple[int, int] = dataclasses.field(compare=False)
    head_VxH: np.ndarray = dataclasses.field(compare=False, repr=False)
    tail_VxW: np.ndarray = dataclasses.field(compare=False, repr=False)
    blank_V: np.ndarray = dataclasses.field(compare=False, repr=False)
    tags: tuple[Edge, Edge] = dataclasses.field(compare=False, repr=False)

    @property
    def more(self) -> int:
        """Returns by how many tokens an explanation grows at most."""
        return self.head_VxH.shape[1] + self.tail_VxW.shape[1] - 2

    def find(self, ids_NxT):
        """Finds the first closed pair of tags: (the last token of the opening one, the first and the last one of the closing
        one), [N] each, -1 where there is none."""
        opening, closing = self.tags
        _, opened_N = opening.first(ids_NxT, jnp.zeros_like(ids_NxT[:, 0]))
        return opened_N, *closing.first(ids_NxT, opened_N)

    def between(self, ids_NxT, opened_N, closed_N):
        """Gives responses with, of the tokens at the tags, what of them is none of the tag, -1 where that is nothing."""
        (opening, closing), at = self.tags, jnp.arange(ids_NxT.shape[1])
        ids_NxT = jnp.where(at == opened_N[:, None], look_up(opening.after_V, ids_NxT), ids_NxT)
        return jnp.where(at == closed_N[:, None], look_up(closing.before_V, ids_NxT), ids_NxT)

    def trim(self, ids_NxT, inside_NxT):
        """Finds (start, length, whether there is any) of what is inside without white space at its edges, [N] each."""
        seen_NxT = inside_NxT & (ids_NxT >= 0) & ~look_up(self.blank_V, ids_NxT)
        start, end = jnp.argmax(seen_NxT, axis=1), ids_NxT.shape[1] - jnp.argmax(seen_NxT[:, ::-1], axis=1)
        return start.astype(jnp.int32), (end - start).astype(jnp.int32), seen_NxT.any(1)

    def join(self, ids_NxT, span, width: int):
        """Reads explanations, tokens start..start+length-1 of each row, as text: (ids NxW, (start, length)) of what stands
        between the prompts, W = width + more. Of a single token the right side is not joined."""
        start_N, length_N = span
        at, last_N = jnp.arange(ids_NxT.shape[1]), start_N + length_N - 1
        first, last = (sharding.take(ids_NxT, i[:, None])[:, 0] for i in (start_N, last_N))
        head, tail = look_up(self.head_VxH, first), look_up(self.tail_VxW, last)
        tail = jnp.where((length_N > 1)[:, None], tail, jnp.asarray(_row(self.right_cut, tail.shape[1])))
        between = (at > start_N[:, None]) & (at < last_N[:, None])
        x = jnp.concatenate([head, ids_NxT, tail], axis=1)
        keep = jnp.concatenate([head >= 0, between, tail >= 0], axis=1)
        order = jnp.argsort(~keep, axis=1, stable=True)[:, : width + self.more]
        length = jnp.minimum(jnp.sum(keep, axis=1, dtype=jnp.int32), order.shape[1])
        return jnp.maximum(sharding.take(x, order), 0), (0 * length, length)

    @property
    def left_cut(self) -> tuple[int, ...]:
        """Returns the tokens that are cut off the text before the words."""
        return self.before[len(self.before) - self.cut[0] :]

    @property
    def right_cut(self) -> tuple[int, ...]:
        """Returns the tokens that are cut off the text after the words."""
        return self.after[: self.cut[1]]

    def cut_off(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        """Returns the tokens of a prompt that stay beside the words whatever they are."""
        return before[: len(before) - self.cut[0]], after[self.cut[1] :]

    def text(self, ids) -> str:
        """Returns an explanation as text."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).strip()

    def exact(self, ids) -> list[int]:
        """Returns what stands between the prompts where the text of these tokens does."""
        row = _encode(self.tokenizer, [self.texts[0] + self.text(ids) + self.texts[1]])[0]
        left, right = self.cut_off(self.before, self.after)
        end = len(row) - len(right)
        if tuple(row[: len(left)]) == left and tuple(row[end:]) == right:
            return row[len(left) : end]
        return [*self.left_cut, *ids, *self.right_cut]  # joined further than any single token is

    def write(self, opening: str, ids, closing: str) -> list[int]:
        """Returns a response: the text of an explanation between its tags."""
        return _encode(self.tokenizer, [opening + self.text(ids) + closing])[0]


def look_up(table: np.ndarray, *at):
    """Values of a table at places of equal shape, one for each of its first axes; split over the devices as these are."""
    place, n = sharding.like(at[0]), at[0].ndim + table.ndim - len(at)
    place = place and sharding.P(*place, *[None] * (n - len(place)))
    table = sharding.reshard(jnp.asarray(table), sharding.P())
    return table.at[at].get(out_sharding=place)


def padded(rows: list[list[int]], filler: int, width: int = 0) -> np.ndarray:
    """Returns rows of tokens as one array, as wide as the longest, `width` at least."""
    width = max(width, *map(len, rows))
    return np.stack([_row(row, width, filler) for row in rows])


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)['input_ids']


def _row(ids, width: int, filler: int = -1) -> np.ndarray:
    return np.pad(np.asarray(ids, np.int32), (0, width - len(ids)), constant_values=filler)


def _shared(a, b) -> int:
    """How many tokens two rows begin with alike."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _beside(text: str, side: int, ids: tuple[int, ...], tokenizer) -> tuple[str, tuple[int, ...]]:
    """The part of a prompt next to the words that is tokenized as in the whole, and its ids: a word, or all of it."""
    short = re.search(r'\s?\S*$', text)[0] if side == 0 else re.match(r'\S*', text)[0]
    for part in (short, text):
        row = tuple(_encode(tokenizer, [part])[0]) if part else ()
        if row == (ids[len(ids) - len(row) :] if side == 0 else ids[: len(row)]):
            return part, row
    return '', ()


def build(
    tokenizer, prompt: tuple[str, str], ids: tuple[list[int], list[int]], tags: tuple[str, str], vocab_size: int
) -> Joints:
    """Makes the joints of a prompt, texts and token ids before and after the words, for a model of `vocab_size` rows. tags:
    what an explanation stands between in a response.

    Every token of the vocabulary is tokenized twice: seconds for 150,000 of them.
    """
    (left, before), (right, after) = (_beside(prompt[k], k, tuple(ids[k]), tokenizer) for k in (0, 1))
    backend, known = tokenizer.backend_tokenizer, min(len(tokenizer), vocab_size)
    anchor = _encode(tokenizer, [ANCHOR])[0]
    shown = backend.decode_batch([[*anchor, i] for i in range(known)], skip_special_tokens=False)
    start = tokenizer.decode(anchor)
    special = set(special_ids(tokenizer))
    shown = [s.removeprefix(start) if s.startswith(start) else '' for s in shown]
    found = tuple(_edge(shown, tag.strip() or tag, vocab_size) for tag in tags)
    texts = {i: s for i, s in enumerate(shown) if s and i not in special}
    blank = [i for i, s in texts.items() if s and not s.strip()]
    texts = {i: s for i, s in texts.items() if s.strip() and BROKEN not in s}

    def rows(made: list[str]) -> dict[int, list[int]]:
        found = backend.encode_batch_fast(made, add_special_tokens=False)
        return {i: x.ids for i, x in zip(texts, found, strict=True) if max(x.ids) < vocab_size}

    heads, tails = {}, {}
    then = _encode(tokenizer, [AFTER])[0]
    for i, row in rows([left + s.lstrip() + AFTER for s in texts.values()]).items():
        if row[-len(then) :] == then:
            heads[i] = row[: -len(then)]
    for i, row in rows([ANCHOR + s.rstrip() + right for s in texts.values()]).items():
        alone = texts[i] == texts[i].rstrip() and tuple(row[len(row) - len(after) :]) == after
        if row[: len(anchor)] == anchor and not alone:
            tails[i] = row[len(anchor) :]
    head, cut_left = _table(heads, before, vocab_size)
    tail, cut_right = _table({i: row[::-1] for i, row in tails.items()}, after[::-1], vocab_size)
    for i in np.flatnonzero(tail[:, 0] >= 0):
        n = (tail[i] >= 0).sum()
        tail[i, :n] = tail[i, :n][::-1]
    blank_V = np.zeros(vocab_size, bool)
    blank_V[blank] = True
    digest = hashlib.sha256(repr((left, right, before, after)).encode())
    for x in (head, tail, blank_V):
        digest.update(repr(x.shape).encode() + x.tobytes())
    digest.update(repr([edge.digest for edge in found]).encode())
    cut = cut_left, cut_right
    return Joints(digest.hexdigest(), tokenizer, (left, right), before, after, cut, head, tail, blank_V, found)


def _edge(texts: list[str], tag: str, vocab_size: int) -> Edge:
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


def _table(rows: dict[int, list[int]], prompt: tuple[int, ...], vocab_size: int) -> tuple[np.ndarray, int]:
    """What each token becomes after a prompt, [V, H] with -1 after the end, and how many tokens of the prompt are in it.

    rows: prompt and token, tokenized together, of those for which it is known; the others stay as they are.
    """
    shared = {i: _shared(prompt, row) for i, row in rows.items()}
    new = {i: len(row) - shared[i] for i, row in rows.items()}
    rows = {i: row for i, row in rows.items() if 0 < new[i] <= MOST}
    kept = min((shared[i] for i in rows), default=len(prompt))
    made = [rows[i][kept:] if i in rows else [*prompt[kept:], i] for i in range(vocab_size)]
    return padded(made, -1), len(prompt) - kept
