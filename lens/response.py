"""Prompts and tags as token ids, and where the explanation stands in a response: between two tags.

Without an opening tag the tokens between are the explanation. With one and a prompt of words it is a text, as of other
natural language autoencoders: without white space at its edges, read again by the tokenizer (joints.py).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lens.errors import LensError, shown
from lens.joints import Joints

Ids = Callable[[str, str], list[int]]  # of `reader`
EMBED, TEXT = '<embed>', '<text>'
# What a special token looks like in a prompt; other tags are ordinary text.
SPECIAL_LITERAL = r'<\|[^|<>]+\|>|</?s>|<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn)>|\[[A-Z]+\]'


@dataclasses.dataclass(frozen=True)
class Tags:
    """Token ids of the tags; without a closing one every token of a response is explanation.

    blank: white space that is written before the closing tag and may be missing or part of another token where it is
    found. end: the token after which nothing is said; with it a response that does not come to it has failed. joints, texts:
    where an explanation is text, how the encoder reads it, and the tags as texts.
    """

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    blank: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    joints: Joints | None = None
    texts: tuple[str, str] = ('', '')

    def __bool__(self) -> bool:
        return bool(self.closing)

    @property
    def around(self) -> int:
        """Returns how many tokens of a response are no explanation."""
        return len(self.opening) + len(self.blank) + len(self.closing) + len(self.end)

    @property
    def no_words(self) -> tuple[int, ...]:
        """Returns what the encoder reads between its prompts where there is no explanation."""
        return tuple(self.joints.exact(())) if self.joints else ()


NO_TAGS = Tags()


class Prompt(NamedTuple):
    """Token ids left and right of the first slot; rows of `right` that are slots as well; the token in the slots."""

    left: list[int]
    right: list[int]
    more_slots: tuple[int, ...] = ()
    marker: int = 0


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a configuration as token ids. natural: the decoder prompt with a word for the activation; encoder:
    before and after the words, without what is joined with them."""

    decoder: Prompt
    encoder: tuple[list[int], list[int]]
    natural: tuple[int, ...]
    tags: Tags


class Found(NamedTuple):
    """Of every response: the words start..start+length-1, the tokens up to and with its end, success."""

    start_N: jnp.ndarray
    length_N: jnp.ndarray
    end_N: jnp.ndarray
    found_N: jnp.ndarray

    @property
    def span(self):
        return self.start_N, self.length_N

    def mask(self, length: int):
        """Returns 1.0 on the tokens of the response NxT, 0.0 after its end."""
        return (jnp.arange(length) < self.end_N[:, None]).astype(jnp.float32)

    def inside(self, length: int):
        """Returns which tokens of the response are explanation, NxT."""
        start, at = self.start_N[:, None], jnp.arange(length)
        return (at >= start) & (at < start + self.length_N[:, None])


def _first(ids_NxT, tag: tuple[int, ...], begin_N):
    """(index of the first occurrence of `tag` at or after begin, whether there is one)."""
    hit = jnp.arange(ids_NxT.shape[1]) >= begin_N[:, None]
    for k, token in enumerate(tag):
        hit &= jnp.pad(ids_NxT[:, k:], ((0, 0), (0, k)), constant_values=-1) == token
    return jnp.argmax(hit, axis=1).astype(jnp.int32), hit.any(1)


def find(ids_NxT, tags: Tags) -> Found:
    """Finds the first closed pair of tags with at least one token between them, and the end token after it if there is
    one to be.

    Where an explanation is text the tags are, too. Without them it has failed: all tokens up to an end token count, words are
    what follows the opening tag, or all. No tags, no failure.
    """
    t, zero = ids_NxT.shape[1], jnp.zeros_like(ids_NxT[:, 0])
    if not tags:
        return Found(zero, zero + t, zero + t, zero == 0)
    if tags.joints:
        opened, closed, last = tags.joints.find(ids_NxT)
        at, start, end = jnp.arange(t), opened + 1, last + 1
        inside = (at >= opened[:, None]) & (at <= closed[:, None])
        text, length, some = tags.joints.trim(tags.joints.between(ids_NxT, opened, closed), inside)
        found = (opened >= 0) & (closed > opened) & some
        start, closed = jnp.where(found, text, start), jnp.where(found, text + length, closed)
    else:
        opened, has_opening = _first(ids_NxT, tags.opening, zero)
        start = jnp.where(has_opening, opened + len(tags.opening), 0)
        closed, has_closing = _first(ids_NxT, tags.closing, start)
        found, end = has_opening & has_closing & (closed > start), closed + len(tags.closing)
    ended = found
    if tags.end:
        last, ended = _first(ids_NxT, tags.end, zero)
        found, end = found & ended & (last >= end), last + 1
    start = jnp.minimum(start, t - 1)
    length = jnp.maximum(jnp.where(found, closed, t) - start, 1)
    return Found(start, length, jnp.where(ended, end, t), found)


def words(ids_NxT, found: Found, tags: Tags):
    """Gives responses in which the first and the last word are none of a tag that the tokenizer has joined them with."""
    if not tags.joints:
        return ids_NxT
    opened, closed, _ = tags.joints.find(ids_NxT)
    inside_NxT, parted_NxT = found.inside(ids_NxT.shape[1]), tags.joints.between(ids_NxT, opened, closed)
    return jnp.where(inside_NxT & (parted_NxT >= 0), parted_NxT, ids_NxT)


def between(ids_NxT, found: Found, tags: Tags):
    """Gives (ids, span) of responses as `encode` takes them: what stands between the prompts of the encoder."""
    if not tags.joints:
        return ids_NxT, found.span if tags else None
    return tags.joints.join(words(ids_NxT, found, tags), found.span, ids_NxT.shape[1])


def word_count(label_T: np.ndarray, filler: int) -> int:
    """Returns how many tokens of a given explanation stand before its filling, one at least."""
    return int(np.flatnonzero(label_T != filler)[-1:].sum()) + 1


def respond(labels: np.ndarray, tags: Tags, filler: int, length: int) -> np.ndarray:
    """Makes responses [..., length] of explanations [..., T]: opening tag, words (cut to fit), closing tag and end, filler;
    where an explanation is text, as the tokenizer reads it between its tags."""
    if not tags:
        return labels
    room = length - tags.around

    def response(label):
        given = label[: word_count(label, filler)]
        body = [*tags.opening, *given[:room], *tags.blank, *tags.closing, *tags.end]
        if (
            tags.joints
            and len(whole := tags.joints.write(tags.texts[0], given, tags.texts[1])) + len(tags.end) <= length
        ):
            body = [*whole, *tags.end]
        return np.pad(np.asarray(body, label.dtype), (0, length - len(body)), constant_values=filler)

    return np.apply_along_axis(response, -1, labels)


def reader(tokenizer, vocab_size: int) -> Ids:
    """Returns ids(text, key), the token ids of a text of the configuration, all of which the subject has: JAX would
    read another row for the others. It raises LensError, which names the key and the token."""

    def ids(text: str, key: str) -> list[int]:
        out = tokenizer(text, add_special_tokens=False)['input_ids']
        if beyond := [i for i in out if i >= vocab_size]:
            token = shown(repr(tokenizer.decode(beyond[:1])), 40)
            raise LensError(
                f'{key} has the token {token}, id {beyond[0]}, and the subject has embeddings 0..{vocab_size - 1} alone: '
                'write a token that the model has, or give the tokenizer of this model.'
            )
        return out

    return ids


def _prompt_ids(ids: Ids, text: str, key: str) -> list[int]:
    """Token ids of a part of a prompt, in which special tokens are written out and must be one token each."""
    for literal in re.findall(SPECIAL_LITERAL, text):
        if len(ids(literal, key)) != 1:
            raise LensError(f'{key} holds {literal}, which is no token of the subject: write one that it has.')
    return ids(text, key)


def encoder_prompt(ids: Ids, text: str) -> tuple[list[int], list[int]]:
    """Tokenises what is before and after the words, at the last <text> (before, it is a tag). Raises LensError."""
    if TEXT not in text:
        raise LensError(f'encoder.prompt={shown(repr(text))} must contain {TEXT}.')
    return tuple(_prompt_ids(ids, part, 'encoder.prompt') for part in text.rsplit(TEXT, 1))


def decoder_prompt(ids: Ids, text: str, marker: str) -> Prompt:
    """Tokenises what is around the slots; with a marker, the whole text, as its readers do. Raises LensError."""
    key, count = 'decoder.prompt', text.count(EMBED)
    if not count:
        raise LensError(f'{key}={shown(repr(text))} must contain {EMBED}.')
    parts = [_prompt_ids(ids, part, key) for part in text.split(EMBED)]
    token = ids(marker, 'decoder.marker') if marker else [0]
    if len(token) != 1:
        raise LensError(f'decoder.marker={shown(repr(marker))} is {len(token)} tokens of the subject, it must be one.')
    found = [n - 1 for n in itertools.accumulate(len(part) + 1 for part in parts[:-1])]
    row = sum(([0, *part] for part in parts[1:]), parts[0])
    if marker:
        row = ids(text.replace(EMBED, marker), key)
        found = [i for i in range(1, len(row) - 1) if row[i] == token[0]]  # with neighbours
        if not len(found) == count == row.count(token[0]):
            raise LensError(
                f'{key}={shown(repr(text))} has {count} slots, but with decoder.marker={shown(repr(marker))} in them its tokens have '
                f'{len(found)} inside: put text around each slot and take a marker that does not merge with it.'
            )
    first = found[0]
    return Prompt(row[:first], row[first + 1 :], tuple(i - first - 1 for i in found[1:]), token[0])


def tags(ids: Ids, opening: str, closing: str, end: str = '', joints: Joints | None = None) -> Tags:
    """Tokenises what an explanation stands between and what ends a response. joints: where it is text. Raises LensError."""
    for key, text in (('open', opening), ('end', end)):
        if text and not closing:
            raise LensError(f'explanation_{key}={shown(repr(text))} needs an explanation_close.')
    last = tuple(ids(end, 'explanation_end'))
    if len(last) > 1:
        raise LensError(f'explanation_end={shown(repr(end))} is {len(last)} tokens of the subject, it must be one.')
    found = tuple(ids(closing.lstrip() or closing, 'explanation_close'))
    written = tuple(ids(closing, 'explanation_close'))
    if written[len(written) - len(found) :] != found:
        raise LensError(
            f'explanation_close={shown(repr(closing))}: its white space is joined to it by the tokenizer, so that it would not '
            'be found alone: leave that away.'
        )
    blank = written[: len(written) - len(found)]
    return Tags(
        tuple(ids(opening, 'explanation_open')), found, blank, last, joints, (opening, closing) if joints else ('', '')
    )
