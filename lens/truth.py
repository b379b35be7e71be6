"""What explanations say, counted against the text itself: formulas of figures that need no judge.

The text so far is a document up to and with the position that is read, ahead are its next 32 tokens; in chats without the
words of system turns and headers. Words are whole, their inflections folded (lens.words); content words are those that
are no stop words. Of an explanation each content word counts once, and the names of its parts are none.

Dimension letters: N activations.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lens import words
from lens.words import Format

AHEAD = 32  # tokens
RAREST = 4  # words of a text so far that are recalled, where the labels of the data do not say how many


@dataclasses.dataclass(frozen=True)
class Source:
    """What is true of one activation, in folded words: content words of the text so far and ahead, the rarest so far, all
    words of what comes next in their order."""

    said: frozenset[str]
    ahead: frozenset[str]
    rarest: tuple[str, ...]
    next: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sources:
    """Those of N activations, and what reads explanations."""

    of_N: list[Source]
    reader: words.Reader
    form: Format | None

    def first(self, n: int) -> 'Sources':
        """Returns those of the first n activations."""
        return dataclasses.replace(self, of_N=self.of_N[:n])

    def parts(self, ids_T: np.ndarray) -> dict[str, str]:
        """Takes an explanation apart, '' is what is in no part. ids: -1 outside of the explanation."""
        text = ''.join(self.reader.pieces([i for i in ids_T.tolist() if i >= 0 and i not in self.reader.special]))
        return {'': text} if self.form is None else self.form.split(text)

    def whole_words(self, ids_T: np.ndarray) -> list[str]:
        """Returns the words of an explanation, without those of which a part has the end alone: no space before."""
        out = []
        for i, (name, text) in enumerate(self.parts(ids_T).items()):
            cut = name and text[:1].isalnum() and not (self.form.bare and i == 0)
            out += words.WORD.findall(text)[bool(cut) :]
        return out


def sources(split, train, rows: Sequence[int], positions_RxV: np.ndarray, tokenizer) -> Sources:
    """Reads what is true at positions of some rows of a split. train: the split that words are rare in."""
    reader, form = words.Reader(tokenizer), Format.of(split.meta)
    frequency = words.document_frequency(reader, train)
    of_N = []
    for row, positions in zip(rows, positions_RxV.tolist(), strict=True):
        ids, mask = words.own_text(split, row)
        found = reader.words(ids, mask)
        of_N += [_source(reader, ids, found, at, form, frequency) for at in positions]
    return Sources(of_N, reader, form)


def _source(reader, ids, found: list[words.Word], at: int, form: Format | None, frequency) -> Source:
    said = [w for w in found if w.last <= at]
    cut = [w.text for w in found if w.first <= at < w.last]  # as it stands so far it is a word, too
    cut = [w.text for w in reader.words(ids[max(at - 8, 0) : at + 1])[-1:]] if cut else []
    near = words.keys_of(w.text for w in said if form and w.last > at - form.context_tokens)
    far = [w.text for w in said if words.fold(w.text) not in near]
    return Source(
        frozenset(words.keys_of([w.text for w in said] + cut)),
        frozenset(words.keys_of(w.text for w in found if at < w.last and w.first <= at + AHEAD)),
        tuple(map(words.fold, words.rarest(far, frequency, dict(form.parts).get('topic', RAREST) if form else RAREST))),
        tuple(words.fold(w.text) for w in reader.words(ids[at + 1 : at + 1 + AHEAD])),
    )


def _begun(word: str, known: frozenset[str]) -> bool:
    return len(word) >= words.SHORTEST and any(k.startswith(word) for k in known)


def _content(sources: Sources, ids_NxT: np.ndarray):
    """Yields of every explanation the source and its content words."""
    for source, ids in zip(sources.of_N, ids_NxT, strict=True):
        said = sources.whole_words(ids)
        keys, known = words.keys_of(said), source.said | source.ahead
        # an explanation that fills its room may end within a word
        if ids[-1] >= 0 and said and words.fold(said[-1]) not in known and _begun(said[-1].lower(), known):
            keys.discard(words.fold(said[-1]))
        yield source, keys


def _counts(pairs) -> tuple[np.ndarray, np.ndarray]:
    hits, of = np.array(list(pairs)).T
    return hits, of


def grounded(sources: Sources, ids_NxT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts the content words that stand in the text so far, and all, of every explanation: [N] each."""
    return _counts((len(k & s.said), len(k)) for s, k in _content(sources, ids_NxT))


def grounded_ahead(sources: Sources, ids_NxT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of words that stand ahead and not in the text so far."""
    return _counts((len((k & s.ahead) - s.said), len(k)) for s, k in _content(sources, ids_NxT))


def invented(sources: Sources, ids_NxT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of words that stand in neither."""
    return _counts((len(k - s.said - s.ahead), len(k)) for s, k in _content(sources, ids_NxT))


def topic_recall(sources: Sources, ids_NxT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts the rarest words so far that an explanation names anywhere, and those that there are."""
    named = ({words.fold(w) for w in sources.whole_words(ids)} for ids in ids_NxT)
    return _counts(
        (len(said.intersection(s.rarest)), len(s.rarest)) for s, said in zip(sources.of_N, named, strict=True)
    )


def next_match(sources: Sources, ids_NxT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts words of the part `next` that stand at the same place in what comes next, and all of that part."""
    said = ([words.fold(w) for w in words.WORD.findall(sources.parts(ids).get('next', ''))] for ids in ids_NxT)
    return _counts(
        (sum(a == b for a, b in zip(x, s.next, strict=False)), len(x)) for s, x in zip(sources.of_N, said, strict=True)
    )
