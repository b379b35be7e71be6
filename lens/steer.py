"""Other words for an activation, put back: what the subject then predicts, beside controls of the same size.

The change is strength * (reconstruction of the new words - reconstruction of the old ones), added to the activation, or,
with mode='replace', strength of the way from the activation to the reconstruction of the new words at its norm. The
controls are moved as far: in a random direction, and by an edit that is not this one (`unrelated`).
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lens import instrument
from lens.errors import LensError, number
from lens.reading import Choice

MOST_STEPS = 256
TOP = 10
PART = 16  # tokens that one program goes on with
STRENGTH = 1.0
MODES = ('difference', 'replace')


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the subject does with one value: the next tokens, their KL in nats from what they are without an edit, how it
    goes on (greedy)."""

    next_tokens: tuple[Choice, ...]
    kl: float
    continuation: str


@dataclasses.dataclass(frozen=True)
class Edit:
    """An edit and its controls. before, after: the explanations; size: norm of the change, relative to that of the
    activation. outcomes: `none` (no edit), `edit`, `random`, `unrelated`."""

    position: int
    token: str
    before: str
    after: str
    unrelated: str
    size: float
    outcomes: dict[str, Outcome]

    def to_json(self) -> dict:
        """Returns JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f'token {self.position} {self.token!r}: {self.before!r} -> {self.after!r}, moved by {self.size:.2f} |A|'
        ]
        for name, o in self.outcomes.items():
            likely = ', '.join(f'{c.token!r} {c.probability:.2f}' for c in o.next_tokens[:3])
            lines.append(f'{name:10} KL {o.kl:6.3f}  next {likely}  goes on {o.continuation!r}')
        return '\n'.join(lines)


def edit(
    reader,
    text,
    position: int,
    explanation,
    strength: float = STRENGTH,
    *,
    before=None,
    unrelated=None,
    mode: str = 'difference',
    steps: int = 20,
    seed: int = 0,
) -> Edit:
    """Puts what `explanation` says in place of what `before` says at a token of a text; what follows it is not read.

    reader: lens.reader.Reader; text: as it takes one. explanation, before, unrelated: a str or token ids.
    strength: 1 moves by the difference of the two reconstructions, 2 twice as far: of 100 stories of the demo with another
    name for the hero, the subject writes it within 12 tokens in 52 at 1 and in 89 at 2.
    before: default the most probable explanation. unrelated: of the control, default the words of `before` that the edit
    keeps, in reverse order. steps: tokens of the continuation. seed: of the random direction. Raises LensError.
    """
    number(strength, 'strength', -100, 100, whole=False)
    number(steps, 'steps', 1, MOST_STEPS)
    if mode not in MODES:
        raise LensError(f'mode={mode!r} is none of {", ".join(MODES)}.')
    found = reader.tokens(text)
    p = int(reader.positions([position], len(found.ids))[0])
    ids, most = found.ids[: p + 1], reader.base.config.max_positions
    if p + 1 + steps > most:
        raise LensError(
            f'position {p} and steps={steps} make {p + 1 + steps} tokens, the subject reads {most}: lower one.'
        )
    a = reader.activations(ids, [-1])[0]
    if before is None:
        before = reader.describe(reader.vectors(ids, [-1]), [ids], salience=False)[0].explanations[0].ids
    old, new = reader.words(before), reader.words(explanation)
    other = _shuffled(old, new) if unrelated is None else reader.words(unrelated)
    of_old, of_new, of_other = reader.reconstruct([old, new, other], [ids] * 3)
    norm = np.linalg.norm(a)
    goal = a + of_new - of_old if mode == 'difference' else _sized(of_new, norm)
    change = strength * (goal - a)
    size = np.linalg.norm(change)
    random = np.random.default_rng(seed).standard_normal(len(a))
    values = {
        'none': 0 * a,
        'edit': change,
        'random': _sized(random, size),
        'unrelated': _sized(of_other - of_old, size),
    }
    made = _go_on(reader, ids, a + np.stack(list(values.values())).astype(np.float32), steps)
    outcomes = {
        name: Outcome(
            reader.choices(made.next.probability[k], made.next.id[k]),
            float(max(made.kl_V[k], 0)),
            reader.tokenizer.decode(made.ids_VxT[k]),
        )
        for k, name in enumerate(values)
    }
    said = (reader.text_of(x) for x in (old, new, other))
    return Edit(p, found.texts[p], *said, float(size / max(norm, 1e-12)), outcomes)


def go_on(reader, text, steps: int) -> Iterator[list[int]]:
    """Yields the most probable tokens that a text goes on with, in parts; none from the first control token on.

    reader, text: as in `edit`. Raises LensError where the subject does not read as many.
    """
    ids, tokenizer, most = [*reader.tokens(text).ids], reader.tokenizer, reader.base.config.max_positions
    number(steps, 'steps', 1)
    if len(ids) + steps > most:
        raise LensError(f'{len(ids)} tokens and {steps} more were asked for, the subject reads {most}: lower one.')
    ends = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    while steps > 0:
        part = PART if len(ids) + PART <= most else 1
        made = _go_on(reader, ids, reader.activations(ids, [-1]), part).ids_VxT[0].tolist()[:steps]
        kept = made[: next((k for k, i in enumerate(made) if i in ends), len(made))]
        yield kept
        if len(kept) < len(made):
            return
        ids, steps = ids + kept, steps - len(kept)


def _shuffled(old: list[int], new: list[int]) -> list[int]:
    """The old words, those that the new ones keep in reverse order."""
    kept = [i for i, x in enumerate(old) if i < len(new) and new[i] == x]
    out = list(old)
    for i, j in zip(kept, reversed(kept), strict=True):
        out[i] = old[j]
    return out


def _sized(direction: np.ndarray, size: float) -> np.ndarray:
    return direction * (size / max(np.linalg.norm(direction), 1e-12))


def _go_on(reader, ids: list[int], values_VxD: np.ndarray, steps: int) -> instrument.Continued:
    tokens = np.zeros((len(values_VxD), reader.width(len(ids) + steps)), np.int32)
    tokens[:, : len(ids)] = ids
    how = {'layer': reader.layer, 'steps': steps, 'top': TOP}
    return reader.in_batches(
        lambda x: instrument.go_on(reader.base, x[0], len(ids) - 1, x[1], **how), (tokens, values_VxD), len(values_VxD)
    )
