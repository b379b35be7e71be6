"""Words of token ids: put together whole, folded to one form, ranked by rarity; and the parts of a written label.

A label of data_gen.label --method=self names rare words, what comes next and the last words:
`topic: volcano, ash, magma | next: destroys the slope | now: flows down the`. Dimension letters: M documents.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lens.errors import LensError, shown

WORD = re.compile("[^\\W_]+(?:['\u2019][^\\W_]+)*")
BROKEN = '\ufffd'  # of a token that holds a part of a character
BREAK = '\0'  # stands for what is left out: no word goes across it
ANCHOR = 'a'  # what a token is decoded after, so that its space stays
SHORTEST = 3  # letters of a content word
NO_WORDS = ('special', 'system')  # roles whose words are none of a chat
COUNTED = 4000  # documents that document frequencies are of, at most
SEEN = 3  # documents that a rare word stands in
_STOP = """
    a about above after again against all almost also although always am among an and another any are aren't around as
    at away back be became because become been before behind being below between both but by came can can't cannot come
    comes could couldn't did didn't do does doesn't doing don't done down during each either else enough even ever every
    few first for from further gave get gets give go goes going gone got had hadn't has hasn't have haven't having he
    he's her here hers herself him himself his how however i i'm i've if in include included includes including instead
    into is isn't it it's its itself just keep kept know last least less let let's like made make makes making many may
    me might more most much must my myself near need never new next no nor not nothing now of off often on once one only
    onto or other others our ours out over own per perhaps put rather really said same say says see seem seen several
    shall she she's should shouldn't since so some something soon still such take taken than that that's the their
    theirs them themselves then there there's therefore these they they're this those though three through throughout
    thus to together too took toward towards two under until up upon us use used uses using various very via was wasn't
    way ways we we're well went were weren't what when where whether which while who whom whose why will with within
    without won't would wouldn't yet you you're you've your yours yourself
"""
STOP = frozenset(_STOP.split())


class Word(NamedTuple):
    """A word as it stands in a text, and its tokens first..last."""

    text: str
    first: int
    last: int


def special_ids(tokenizer) -> list[int]:
    """Returns the tokens that decoding leaves out."""
    return [*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)]


@functools.lru_cache(1 << 16)
def fold(word: str) -> str:
    """Folds a word: small letters, endings of English inflection taken off, so that volcano and volcanoes are one.

    The result is a key, no word: make, makes, making -> mak.
    """
    w = word.lower().replace('\u2019', "'").split("'")[0]
    if len(w) > 3 and w.endswith('s') and w[-2] not in 'sui':
        w = w[:-1]
    for ending in ('ing', 'ed'):
        stem = w.removesuffix(ending)
        if stem != w and len(stem) >= 2 and re.search('[aeiouy]', stem) and not w.endswith('eed'):
            w = stem
            break
    if len(w) > 2 and w.endswith('e'):
        w = w[:-1]
    if len(w) > 2 and w.endswith('y'):
        w = w[:-1] + 'i'
    return w[:-1] if len(w) > 2 and w[-1] == w[-2] and w[-1] not in 'aeiou' else w


@functools.lru_cache(1 << 16)
def is_content(word: str) -> bool:
    """Tells whether a word says something by itself: no stop word, no number, not too short."""
    plain = word.lower().replace('\u2019', "'")
    return len(plain) >= SHORTEST and plain not in STOP and any(x.isalpha() for x in plain)


def keys_of(words: Iterable[str]) -> set[str]:
    """Folds the content words among some."""
    return {fold(w) for w in words if is_content(w)}


class Reader:
    """Reads the words of token ids, with any tokenizer. Special tokens, `special`, belong to no word."""

    def __init__(self, tokenizer):
        self._tokenizer, self.special, self._pieces = tokenizer, frozenset(special_ids(tokenizer)), {}
        self._anchor = tokenizer(ANCHOR, add_special_tokens=False)['input_ids']

    def _decode(self, ids) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _learn(self, new: set[int]) -> None:
        start = self._decode(self._anchor)
        for i in new:
            text = self._decode([*self._anchor, i])
            # a decoder that changes what stands before is asked for the token alone
            piece = text[len(start) :] if text.startswith(start) else self._decode([i])
            self._pieces[i] = BREAK if i in self.special else piece

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns the text of every token, the space before a word with it."""
        ids = [int(i) for i in ids]
        self._learn(set(ids) - self._pieces.keys())
        return [self._pieces[i] for i in ids]

    def words(self, ids: Sequence[int], mask=None) -> list[Word]:
        """Returns the words of a text in their order. mask: of tokens that may be part of one, bool as ids."""
        pieces = self.pieces(ids)
        if mask is not None:
            pieces = [p if m else BREAK for p, m in zip(pieces, mask, strict=True)]
        text, ends = ''.join(pieces).replace(BROKEN, ANCHOR), np.cumsum([len(p) for p in pieces])
        broken = BROKEN in ''.join(pieces)
        out = []
        for found in WORD.finditer(text):
            first, last = np.searchsorted(ends, [found.start(), found.end() - 1], side='right').tolist()
            if broken and any(BROKEN in p for p in pieces[first : last + 1]):
                whole = self._decode([int(i) for i in ids[first : last + 1]])
                out += [Word(w, first, last) for w in WORD.findall(whole)]
            else:
                out.append(Word(found[0], first, last))
        return out


class Frequency(NamedTuple):
    """In how many of M documents each folded content word stands."""

    counts: collections.Counter
    documents: int


def document_frequency(reader: Reader, split) -> Frequency:
    """Counts the words of those documents of a split that stand for all."""
    rows, counts = counted(split), collections.Counter()
    for row in rows:
        counts.update(keys_of(w.text for w in reader.words(*own_text(split, row))))
    return Frequency(counts, len(rows))


def counted(split) -> np.ndarray:
    """Returns the documents of a split that stand for all: at most COUNTED, spread evenly."""
    n = len(split.tokens)
    return np.unique(np.linspace(0, n - 1, min(n, COUNTED)).astype(int))


def own_text(split, row: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the tokens of a document, and in chats which of them are words of it: bool, without system and headers."""
    ids = np.asarray(split.tokens[row, : split.lengths[row]])
    if split.role is None or not split.meta.get('template'):
        return ids, None
    codes = [code for name, code in (split.meta.get('roles') or {}).items() if name in NO_WORDS]
    return ids, ~np.isin(split.role[row, : len(ids)], codes)


def rarest(words: Sequence[str], frequency: Frequency, count: int) -> list[str]:
    """Picks the distinct content words of a text that say most about it, best first, as they stand in it.

    By tf-idf: rarity, ln((M + 1) / (frequency + 1)), times how often the text has the word; of equals the later one. Of
    hundreds of documents, what stands in fewer than SEEN counts as no rarer: nothing that reads them can learn it.
    """
    forms, times, place = {}, collections.Counter(), {}
    for at, word in enumerate(words):
        if is_content(word):
            key = fold(word)
            times[key] += 1
            place[key] = at
            if key not in forms or word.islower() > forms[key].islower():
                forms[key] = re.sub("['\u2019]s$", '', word)

    least = min(SEEN, frequency.documents // 100)

    def weight(key):
        rarity = math.log((frequency.documents + 1) / (max(frequency.counts[key], least) + 1))
        return rarity * times[key], place[key]

    return [forms[key] for key in sorted(forms, key=weight, reverse=True)[:count]]


# --- the parts of a label --------------------------------------------------------------------------------------

PARTS = ('topic', 'next', 'now')
BAR = ' |'


@dataclasses.dataclass(frozen=True)
class Format:
    """How a label is written: its parts in order, with how many words each has at most.

    bare: without names and commas. context_tokens: last tokens of the source whose words are no topic.
    """

    parts: tuple[tuple[str, int], ...]
    bare: bool = False
    context_tokens: int = 0

    @classmethod
    def parse(cls, text: str, bare: bool = False, context_tokens: int = 0) -> 'Format':
        """Reads topic:4,next:4,now:4. Raises LensError."""
        found = [re.fullmatch(r'\s*(\w+)\s*:\s*(\d{1,3})\s*', x) for x in text.split(',')]
        parts = tuple((m[1], int(m[2])) for m in found if m)
        names = [name for name, _ in parts]
        if not all(found) or set(names) - set(PARTS) or len(set(names)) < len(names) or not all(n for _, n in parts):
            raise LensError(
                f'parts={shown(repr(text))} is no list such as topic:4,next:4,now:4: each of {", ".join(PARTS)} once at '
                'most, with a number of words above 0.'
            )
        return cls(parts, bare, context_tokens)

    @classmethod
    def of(cls, meta: dict) -> 'Format | None':
        """Reads what meta.json of a split says about its labels; None where they are others."""
        said = meta.get('label_parts')
        if not isinstance(said, dict):
            return None
        context = said.get('context_tokens')
        return cls.parse(str(said.get('parts')), bool(said.get('bare')), context if isinstance(context, int) else 0)

    def to_meta(self) -> dict:
        """Returns what `of` reads."""
        parts = ','.join(f'{name}:{n}' for name, n in self.parts)
        return {'label_parts': {'parts': parts, 'bare': self.bare, 'context_tokens': self.context_tokens}}

    def lead(self, name: str, first: bool) -> str:
        """What stands before the words of a part."""
        start = '' if first else BAR
        return start if self.bare else f'{start}{"" if first else " "}{name}:'

    def split(self, text: str) -> dict[str, str]:
        """Takes a label apart, name -> text; what is before the first name, or no part at all, is ''."""
        if self.bare:
            names = [name for name, _ in self.parts]
            return dict(zip(names, text.split(BAR.strip(), len(names) - 1), strict=False))
        found = re.split(rf'(?:^|\|)\s*({"|".join(PARTS)}):', text)
        out = {'': found[0]} if found[0].strip() else {}
        for name, words in zip(found[1::2], found[2::2], strict=True):
            out.setdefault(name, words)
        return out
