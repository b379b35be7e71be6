"""What a lens says of a text, as data: rows for tokens, and how they are shown in a terminal, a notebook, JSON, a page.

Errors are relative: |A - reconstruction|^2 / |A|^2 (nmse), or 2 - 2 cosine where the lens compares directions. `label` says
how well the words recover the activation: high below LABELS['high'], medium below LABELS['medium'], else low.
"""

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import rich.box
import rich.console
import rich.table
import rich.text

from lens import files
from lens.errors import LensError, harmless, number, shown

FORMAT = 'lens-reading/1'
MOST_SAMPLES = 64  # explanations of a token
LABELS = {'high': 0.3, 'medium': 0.5, 'low': float('inf')}  # how well words recover an activation: below which error
STYLES = {'high': 'green', 'medium': 'yellow', 'low': 'red'}
FLAGS = {
    'early': 'the lens was trained on later positions only',
    'norm': 'the norm of the activation is far from that of the others: an attention sink, say',
    'failed': 'the response holds no explanation; its error is that of the zero vector',
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How explanations are made: keywords of Reader.explain. Raises LensError."""

    samples: int = 1
    greedy: bool = True
    temperature: float = 1.0
    seed: int = 0
    salience: bool = True

    def __post_init__(self):
        number(self.samples, 'samples', 1, MOST_SAMPLES)
        number(self.temperature, 'temperature', 0, 100, whole=False)
        number(self.seed, 'seed', 0)


class Choice(NamedTuple):
    """A token that might stand somewhere, and how probable it is."""

    token: str
    probability: float


class Word(NamedTuple):
    """A token of an explanation. alternatives: the most probable tokens there, itself perhaps among them. salience, of the
    whole word that it begins: (error without it - error) / error; None for the rest of a word, or where it was not
    asked for."""

    token: str
    id: int
    probability: float
    alternatives: tuple[Choice, ...] = ()
    salience: float | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One text about an activation. sampled: drawn, not the most probable one. found: whether the response holds an
    explanation."""

    text: str
    words: tuple[Word, ...]
    nmse: float
    cosine: float
    sampled: bool = False
    found: bool = True

    @property
    def ids(self) -> list[int]:
        return [w.id for w in self.words]


@dataclasses.dataclass(frozen=True)
class Row:
    """One activation, of the token at `position`.

    norm: of the activation. explanations: one at least, the best known first where best_of has chosen. next_tokens: what
    the subject predicts after it, logit_lens: what it would if the block that is read were its last. controls: name ->
    nmse of what no word says: `mean` (the mean activation of the text), `blind` (the words of a decoder that sees no
    activation) and, where the encoder reads tokens of the text, `context` (no words). beyond: the share of what the context leaves
    open that the words explain. flags: names of FLAGS.
    """

    token: str
    token_id: int
    position: int
    role: str
    norm: float
    explanations: tuple[Explanation, ...]
    next_tokens: tuple[Choice, ...] = ()
    logit_lens: tuple[Choice, ...] = ()
    controls: dict[str, float] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()
    message: int = -1
    fragment: tuple[int, int] = (0, 1)

    @property
    def explanation(self) -> str:
        return self.explanations[0].text

    @property
    def nmse(self) -> float:
        return self.explanations[0].nmse

    @property
    def cosine(self) -> float:
        return self.explanations[0].cosine

    @property
    def label(self) -> str:
        return label(self.nmse)

    @property
    def beyond(self) -> float | None:
        without = self.controls.get('context')
        return None if without is None else 1 - self.nmse / max(without, 1e-12)

    def to_json(self) -> dict:
        """Returns JSON values, by the names of open servers where they have one."""
        return {
            'position': self.position,
            'token': self.token,
            'token_id': self.token_id,
            'role': self.role,
            'message_index': self.message,
            'fragment_index': self.fragment[0],
            'fragment_count': self.fragment[1],
            'l2_norm': self.norm,
            'description': self.explanation,
            'nmse': self.nmse,
            'cosine_similarity': self.cosine,
            'label': self.label,
            'beyond': self.beyond,
            'flags': list(self.flags),
            'controls': self.controls,
            'explanations': [_explanation_json(e) for e in self.explanations],
            'next_tokens': [list(c) for c in self.next_tokens],
            'logit_lens': [list(c) for c in self.logit_lens],
        }


def label(nmse: float) -> str:
    """Returns how well words recover an activation by their error: high, medium or low."""
    return next(name for name, most in LABELS.items() if nmse < most or name == 'low')


def _explanation_json(e: Explanation) -> dict:
    words = [
        {'token': w.token, 'id': w.id, 'p': w.probability, 'alternatives': [list(c) for c in w.alternatives]}
        | ({} if w.salience is None else {'salience': w.salience})
        for w in e.words
    ]
    return {'text': e.text, 'nmse': e.nmse, 'cosine': e.cosine, 'sampled': e.sampled, 'found': e.found, 'words': words}


def _choices(values) -> tuple[Choice, ...]:
    return tuple(Choice(str(token), float(p)) for token, p in values)


def _row(x: dict) -> Row:
    explanations = tuple(
        Explanation(
            str(e['text']),
            tuple(
                Word(str(w['token']), int(w['id']), float(w['p']), _choices(w['alternatives']), w.get('salience'))
                for w in e['words']
            ),
            float(e['nmse']),
            float(e['cosine']),
            bool(e['sampled']),
            bool(e['found']),
        )
        for e in x['explanations']
    )
    return Row(
        token=str(x['token']),
        token_id=int(x['token_id']),
        position=int(x['position']),
        role=str(x['role']),
        norm=float(x['l2_norm']),
        explanations=explanations,
        next_tokens=_choices(x['next_tokens']),
        logit_lens=_choices(x['logit_lens']),
        controls={str(k): float(v) for k, v in x['controls'].items()},
        flags=tuple(map(str, x['flags'])),
        message=int(x['message_index']),
        fragment=(int(x['fragment_index']), int(x['fragment_count'])),
    )


@dataclasses.dataclass(frozen=True)
class Reading:
    """Rows for tokens of a text: iterate, index, or look a position up with `at`. It prints as a table.

    about: subject, layer, lens, step, error ('nmse' or 'direction') and settings of the reading. text: token, role and
    message of every token, those without a row too.
    """

    rows: tuple[Row, ...]
    about: dict
    text: tuple[tuple[str, str, int], ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]

    def at(self, position: int) -> Row:
        """Returns the row of a position. Raises LensError where it has none."""
        found = next((r for r in self.rows if r.position == position), None)
        if found is None:
            raise LensError(
                f'position {position} was not read: it is none of {shown([r.position for r in self.rows])}.'
            )
        return found

    def to_json(self) -> dict:
        """Returns JSON values; `from_json` makes the reading of them."""
        rows = [r.to_json() for r in self.rows]
        return {'format': FORMAT, 'about': self.about, 'text': [list(t) for t in self.text], 'rows': rows}

    @classmethod
    def from_json(cls, value: dict) -> 'Reading':
        """Returns the reading of JSON values. Raises LensError where they are none."""
        try:
            if value['format'] != FORMAT:
                raise ValueError(f'the format is {shown(repr(value["format"]), 40)}')
            text = tuple((str(t), str(role), int(m)) for t, role, m in value['text'])
            return cls(tuple(map(_row, value['rows'])), dict(value['about']), text)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise LensError(f'This is no reading in JSON, format {FORMAT} ({shown(e)}): write it again.') from None

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the reading as JSON. Raises OSError."""
        files.write_text(pathlib.Path(path), json.dumps(self.to_json(), ensure_ascii=False) + '\n')

    def to_page(self, path: str | pathlib.Path) -> None:
        """Writes the reading as one HTML file, which needs nothing else. Raises OSError."""
        from lens import page

        files.write_text(pathlib.Path(path), page.html(self))

    def to_frame(self):
        """Returns a pandas.DataFrame, a row for each explanation. Raises LensError where pandas is not installed."""
        if importlib.util.find_spec('pandas') is None:
            raise LensError('to_frame needs the package pandas: pip install pandas.')
        import pandas

        own = ('position', 'token', 'role', 'norm', 'beyond')
        rows = [
            {k: getattr(r, k) for k in own}
            | {'sample': k, 'explanation': e.text, 'nmse': e.nmse, 'cosine': e.cosine, 'label': label(e.nmse)}
            | {'flags': ' '.join(r.flags)}
            for r in self.rows
            for k, e in enumerate(r.explanations)
        ]
        return pandas.DataFrame(rows)

    def table(self) -> rich.table.Table:
        """Returns the table that a terminal shows: error as colour and as word."""
        out = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=self.title(), title_justify='left')
        beyond = any(r.beyond is not None for r in self.rows)
        for name, justify in (('#', 'right'), ('token', 'right'), ('error', 'right'), ('', 'left')):
            out.add_column(name, justify=justify, no_wrap=True)
        if beyond:
            out.add_column('beyond', justify='right', no_wrap=True)
        out.add_column('explanation', ratio=1)
        out.add_column('then', no_wrap=True, max_width=14)
        for r in self.rows:
            for k, e in enumerate(r.explanations):
                named = label(e.nmse)
                error = [rich.text.Text(f'{e.nmse:.2f}', STYLES[named]), rich.text.Text(named, STYLES[named])]
                whose = [str(r.position), _one_line(_part(r))] if k == 0 else ['', '']
                flags = f'({", ".join(r.flags)}) ' if r.flags and k == 0 else ''
                words = rich.text.Text.assemble((flags, 'dim'), _one_line(e.text.strip()))
                then = _one_line(r.next_tokens[0].token) if r.next_tokens and k == 0 else ''
                share = [f'{r.beyond:.2f}' if k == 0 else ''] if beyond else []
                out.add_row(
                    *map(rich.text.Text, whose), *error, *map(rich.text.Text, share), words, rich.text.Text(then)
                )
        return out

    def title(self) -> str:
        """Returns what was read, in a line."""
        about = {k: shown(v) for k, v in self.about.items()}
        what = f'tokens of {len(self.text)}' if self.text else 'activations'
        return f'{len(self.rows)} {what}, {about["subject"]} after block {about["layer"]}'

    def __str__(self) -> str:
        # plain text, also where Rich would show what it prints at once
        console = rich.console.Console(width=110, force_terminal=False, force_jupyter=False)
        with console.capture() as said:
            console.print(self.table())
        return said.get()

    __repr__ = __str__

    def __rich__(self) -> rich.table.Table:
        return self.table()

    def _repr_html_(self) -> str:
        from lens import page

        return page.table(self)


def ranked(row: Row) -> Row:
    """Returns a row with the explanation first that its activation is best recovered from."""
    return dataclasses.replace(row, explanations=tuple(sorted(row.explanations, key=lambda e: e.nmse)))


def _part(r: Row) -> str:
    index, count = r.fragment
    return r.token + (f' {index + 1}/{count}' if count > 1 else '')


def _one_line(x: str) -> str:
    return harmless(x.replace('\n', '\u21b5').replace('\t', '\u21e5'), '\u200c\u200d')
