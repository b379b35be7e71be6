"""Labels from the text and the subject alone: words of the text so far, what comes next, the last words.

lens.words says how they are written. A label has --explanation_len tokens: words are taken off the longest part until it
fits, and the last words grow into the room that is left. Last words and what comes next are the tokens of the source as
they stand there, so a label whose last part is `now` ends as the text does, and without filling.

Dimension letters: N documents, S tokens of a row, V labelled positions, T tokens of an explanation.
"""

import dataclasses
import functools
import itertools

import numpy as np

from lens import words
from lens.errors import LensError
from lens.words import Format

from .label_prompts import Part

NEXT = ('auto', 'text', 'subject')
OWN_ROLES = ('thinking', 'final')  # what the subject has written of its chats
SPARE = 8  # topic words beyond the wanted ones, of which one may fit into the room that is left
TOKENS_PER_WORD, TOKENS = 2, 2  # of a continuation: asked of the subject for each word, and besides
TICK = 500  # labels between two lines of progress


@dataclasses.dataclass
class Labels:
    """What label_files makes arrays of, in place of answers. subject: path of the model, read where its words are needed."""

    parts: list[Part]
    tokenizer: object
    subject: str
    form: Format
    next: str
    layer: int
    explanation_len: int
    made: dict

    def __post_init__(self):
        self.reader = words.Reader(self.tokenizer)
        train = min(self.parts, key=lambda p: p.name != 'train')
        self.frequency = words.document_frequency(self.reader, train.split)
        self.meta, self.first, self.model = self.form.to_meta(), '', None
        self.held = self._probes(train) if self.layer >= 0 else None

    def _probes(self, train: Part):
        """Fits held.Held to the words that labels may name."""
        from . import held  # with JAX, which texts alone need not

        documents = functools.lru_cache(1)(lambda row: _Document(self, train, row))
        return held.Held(
            self.subject, self.layer, train, self.frequency, lambda row, slot: words.keys_of(documents(row).far(slot))
        )

    def labelled(self, part: Part) -> np.ndarray:
        """Returns bool [N, V]: which of the drawn positions have a label."""
        return part.positions >= 0

    def remark(self) -> str:
        """Shows a label."""
        return f' The first one: {self.first!r}.'

    def _own_words(self, part: Part) -> np.ndarray:
        """Which positions [N, V] take what comes next from the text."""
        if self.next != 'auto' or part.role is None:
            return np.full(part.positions.shape, self.next == 'text')
        codes = [code for code, name in part.role_names.items() if name in OWN_ROLES]
        return np.isin(np.take_along_axis(np.asarray(part.role), np.maximum(part.positions, 0), 1), codes)

    def _continued(self, part: Part) -> dict[tuple[int, int], np.ndarray]:
        """What the subject writes next where it is asked, by (row, column of the position)."""
        count = dict(self.form.parts).get('next')
        asked = self.labelled(part) & ~self._own_words(part)
        if not count or not asked.any():
            return {}
        from . import continuations  # with JAX, which texts alone need not

        self.model = self.model or continuations.load(self.subject)
        length = TOKENS_PER_WORD * count + TOKENS
        return continuations.greedy(self.model, part.split, np.where(asked, part.positions, -1), length)

    def explanations(self, part: Part, filler: int) -> tuple[np.ndarray, dict]:
        """int32 [N, V, T]; how many labels there are, how many were cut, and the tokens of filling."""
        given = self._continued(part)
        out = np.full((*part.positions.shape, self.explanation_len), filler, np.int32)
        counts = {'labels': 0, 'cut': 0, 'filled_tokens': 0, 'next_of_subject': len(given)}
        for row in range(len(out)):
            places = np.flatnonzero(part.positions[row] >= 0)
            if len(places):
                document = _Document(self, part, row)
            for slot in places.tolist():
                ids, cut = document.label(slot, given.get((row, slot)))
                out[row, slot, : len(ids)] = ids
                self.first = self.first or self.tokenizer.decode(ids)
                counts['labels'] += 1
                counts['cut'] += cut
                counts['filled_tokens'] += self.explanation_len - len(ids)
                if counts['labels'] % TICK == 0:
                    print(f'{counts["labels"]}/{int((part.positions >= 0).sum())} labels  {part.name}', flush=True)
        return out, counts


class _Document:
    """Writes the labels of one document."""

    def __init__(self, labels: Labels, part: Part, row: int):
        self.labels, self.part, self.row, self.reader = labels, part, row, labels.reader
        ids, mask = words.own_text(part.split, row)
        self.ids = ids.tolist()
        self.words = self.reader.words(self.ids, mask)
        special = np.flatnonzero(np.isin(ids, list(self.reader.special)))
        self.breaks = [-1, *special.tolist(), len(self.ids)]
        self.begins = [_begins(a, b) for a, b in itertools.pairwise(['', *self.reader.pieces(self.ids)])]

    def label(self, slot: int, given: np.ndarray | None) -> tuple[list[int], bool]:
        """Token ids of a position's label, and whether it is cut; given: what the subject writes next, else the text."""
        counts, at = dict(self.labels.form.parts), int(self.part.positions[self.row, slot])
        end = min(b for b in self.breaks if b > at)
        start = max(b for b in self.breaks if b <= at) + 1
        new = self.ids[at + 1 : end] if given is None else self._unbroken(given.tolist())
        units = {
            'topic': self._topic(slot, counts.get('topic', 0) + SPARE),
            'next': self._next(new, counts.get('next', 0)),
            'now': self._now(start, at),
        }
        take = {name: min(n, len(units[name])) for name, n in counts.items()}
        return _Fit(self.labels, units, {k: n for k, n in take.items() if n}).ids(self.begins, self.ids, start, at)

    def _unbroken(self, ids: list[int]) -> list[int]:
        return list(itertools.takewhile(lambda i: i not in self.reader.special, ids))

    def far(self, slot: int) -> list[str]:
        """Words of the text so far, without those that stand beside the label or in the part `now`."""
        form, at = self.labels.form, self.part.positions[self.row, slot]
        said = [w for w in self.words if w.last <= at]
        near = {w for w in said if w.last > at - form.context_tokens}
        near |= {*said[len(said) - dict(form.parts).get('now', 0) :]}
        near = words.keys_of(w.text for w in near)
        return [w.text for w in said if words.fold(w.text) not in near]

    def _topic(self, slot: int, count: int) -> list[str]:
        """Words that the activation holds, or rare ones."""
        held, far = self.labels.held, self.far(slot)
        found = words.rarest(far, self.labels.frequency, len(far))
        return (held.rank(self.part, self.row, slot, found) if held else found)[:count]

    def _next(self, ids: list[int], count: int) -> list[list[int]]:
        """Tokens of the next words, word by word, up to the end of the line."""
        pieces = self.reader.pieces(ids[: 4 * count + 8])
        first = next((i for i, p in enumerate(pieces) if p.strip()), len(pieces))
        stop = next((i for i, p in enumerate(pieces) if i > first and '\n' in p), len(pieces))
        line = ids[first:stop]
        ends = list(dict.fromkeys(w.last + 1 for w in self.reader.words(line)))[:count] or [len(line)] * bool(line)
        return [line[a:b] for a, b in itertools.pairwise([0, *ends])]

    def _now(self, start: int, at: int) -> list[int]:
        """How many tokens the last 1, 2, … words of the text are."""
        return [at + 1 - i for i in range(at, start - 1, -1) if self.begins[i]] or [at + 1 - start] * (at >= start)


def _begins(before: str, piece: str) -> bool:
    """Tells whether a word begins with this token, or none is in it."""
    return not (before[-1:].isalnum() and piece[:1].isalnum())


class _Fit:
    """Fits the units of every part into T tokens. take: how many units of each."""

    def __init__(self, labels: Labels, units: dict[str, list], take: dict[str, int]):
        self.labels, self.units, self.take = labels, units, take

    def _encode(self, text: str, first: bool) -> list[int]:
        def ids(x):  # a label that quotes a special token spells it
            return self.labels.tokenizer(x, add_special_tokens=False, split_special_tokens=True)['input_ids']

        before, both = ids(words.ANCHOR), ids(words.ANCHOR + text)
        # what some tokenizers put before a text is no part of a label
        return both[len(before) :] if not first and both[: len(before)] == before else ids(text)

    def _written(self, topic: list[str], now: list[int]) -> list[int]:
        form, out = self.labels.form, []
        for name in self.take:
            lead, first = form.lead(name, not out), not out
            if name == 'topic':
                text = (' ' if form.bare else ', ').join(topic)
                out += self._encode(lead + ('' if form.bare and first else ' ') + text, first)
            else:
                new = now if name == 'now' else [*itertools.chain(*self.units['next'][: self.take['next']])]
                out += (self._encode(lead, first) if lead else []) + new
        return out

    def ids(self, begins: list[bool], source: list[int], start: int, at: int) -> tuple[list[int], bool]:
        """Token ids of the label, at most T, and whether it is cut."""
        length, topic, now = self.labels.explanation_len, self.units['topic'], self.units['now']

        def written(more: int = 0, extra: tuple[str, ...] = ()):
            tokens = now[self.take['now'] - 1] + more if 'now' in self.take else 0
            return self._written([*topic[: self.take.get('topic', 0)], *extra], source[at + 1 - tokens : at + 1])

        while len(out := written()) > length and (max(self.take.values()) > 1 or len(self.take) > 1):
            name = max(self.take, key=self.take.get)
            self.take[name] -= 1
            if not self.take[name]:
                del self.take[name]
        if len(out) > length or 'now' not in self.take:
            return out[:length], len(out) > length
        had = now[self.take['now'] - 1]
        room = min(length - len(out), at + 1 - start - had)
        whole = max(m for m in range(room + 1) if m == 0 or begins[at + 1 - had - m])
        if whole < room and 'topic' in self.take:  # a topic word may take the rest
            for word in topic[self.take['topic'] :]:
                if len(fits := written(whole, (word,))) == length:
                    return fits, False
        return written(room if self.labels.form.parts[-1][0] == 'now' else whole), False


def form(o) -> Format:
    """Reads the format of a command. Raises LensError where it says nothing of the text so far."""
    out = Format.parse(o.parts, o.bare, o.context_tokens)
    if not {'topic', 'now'} & dict(out.parts).keys():
        raise LensError(f'--parts={o.parts} says nothing of the text so far: name topic or now.')
    if o.layer >= 0 and 'topic' not in dict(out.parts):
        raise LensError(
            f'--layer={o.layer} chooses topic words, and --parts={o.parts} has none: leave one of them away.'
        )
    return out


def make(parts: list[Part], tokenizer, form: Format, o) -> Labels:
    """Returns what the labels of a command are made by; o: LabelOptions. Counts the words of its training documents."""
    names = 'method', 'seed', 'positions', 'min_position', 'explanation_len', 'next', 'layer'
    made = {k: getattr(o, k) for k in names}
    return Labels(parts, tokenizer, o.tokenizer, form, o.next, o.layer, o.explanation_len, made)
