"""The journal of a labelling: which labels there are, why others are missing, and what all answers have cost.

labels.jsonl and failures.jsonl get a line for every answer, with its tokens and its cost; the ledger is the sum over
those lines, over all commands.
"""

import collections
import dataclasses
import pathlib

import numpy as np

from data_gen.journal import Journal
from data_gen.label_prompts import Part
from lens.errors import LensError

WITHOUT = 'without a label'


@dataclasses.dataclass(frozen=True)
class Job:
    """One label: of row `row` of a split, at the position in column `slot`."""

    part: Part
    row: int
    slot: int

    @property
    def position(self) -> int:
        return int(self.part.positions[self.row, self.slot])

    @property
    def doc_id(self) -> int:
        return int(self.part.split.doc_id[self.row])

    def record(self) -> dict:
        place = {'split': self.part.name, 'row': self.row, 'slot': self.slot}
        return place | {'doc_id': self.doc_id, 'position': self.position}


@dataclasses.dataclass
class Failure:
    """Of a job without a label: answers that held none, whether a server refused it, and the last reason."""

    answers: int = 0
    refused: bool = False
    reason: str = ''


class Ledger(Journal):
    """options: label.LabelOptions. Failures are kept over commands: a closed one is asked again on --retry_failures."""

    elsewhere = 'another --labels'

    def __init__(self, folder: pathlib.Path, parts: list[Part], settings: dict, options):
        self._parts, self._o = {p.name: p for p in parts}, options
        self._labelled = {p.name: np.zeros(p.positions.shape, bool) for p in parts}
        self._failures: dict[tuple, Failure] = {}
        self.counts = {'data': 0, WITHOUT: 0}
        self._sums = collections.Counter()
        super().__init__(folder, {k: folder / f'{k}.jsonl' for k in ('labels', 'failures')}, settings)
        if options.retry_failures:
            self._failures.clear()
        self.counts[WITHOUT] = sum(map(self._is_closed, self._failures.values()))

    @property
    def cost(self) -> float:
        return self._sums['cost']

    def note(self, kind: str, record: dict, at: int) -> bool:
        try:
            self._note(kind, record)
        except (KeyError, IndexError, TypeError):
            raise LensError(
                f'{self.paths[kind]} is damaged (the record at byte {at} is none of this command): remove that line, or '
                'choose another --labels.'
            ) from None
        return True

    def _note(self, kind: str, record: dict) -> None:
        name, row, slot = place = record['split'], record['row'], record['slot']
        had = self._labelled[name][row, slot]
        self._sums.update({k: record[k] for k in ('prompt_tokens', 'answer_tokens', 'cost')})
        self._sums['answers'] += record.get('kind', 'answer') == 'answer'
        self._sums['estimated'] += record.get('estimated', False)
        if kind == 'labels':
            self._labelled[name][row, slot] = True
            self._failures.pop(place, None)
            self.counts['data'] += not had
        elif not had:
            failure = self._failures.setdefault(place, Failure())
            failure.answers += record['kind'] == 'answer'
            failure.refused |= record['kind'] == 'refused'
            failure.reason = record['reason']
            self.counts[WITHOUT] += self._is_closed(failure) or record['kind'] == 'failed'

    def _is_closed(self, failure: Failure) -> bool:
        return failure.refused or failure.answers >= self._o.attempts

    def add(self, kind: str, job: Job, record: dict, usage: dict | None = None) -> bool:
        """Writes the line of an answer; returns whether its job is closed. usage: the tokens of the answer, if there is one."""
        record = job.record() | record | (usage or {'prompt_tokens': 0, 'answer_tokens': 0})
        self.append(kind, record | {'cost': self.price(record['prompt_tokens'], record['answer_tokens'])})
        failure = self._failures.get((job.part.name, job.row, job.slot))
        return failure is None or self._is_closed(failure)

    def price(self, prompt_tokens: int, answer_tokens: int) -> float:
        return (prompt_tokens * self._o.price_in + answer_tokens * self._o.price_out) / 1e6

    def labelled(self, part: Part) -> np.ndarray:
        """bool [N, V]: which of the drawn positions have a label."""
        return self._labelled[part.name] & (part.positions >= 0)

    def wanted(self, part: Part) -> np.ndarray:
        """bool [N, V]: for which a server is to be asked."""
        out = (part.positions >= 0) & ~self._labelled[part.name]
        for (name, row, slot), failure in self._failures.items():
            if name == part.name and self._is_closed(failure):
                out[row, slot] = False
        return out

    def reasons(self) -> dict[str, int]:
        """Why there is no label -> how many, most frequent first."""
        drawn = {n: p.positions >= 0 for n, p in self._parts.items()}
        missing = sum(int((d & ~self._labelled[n]).sum()) for n, d in drawn.items())
        out = collections.Counter(f.reason for (n, row, slot), f in self._failures.items() if drawn[n][row, slot])
        if missing > out.total():
            out['not asked'] = missing - out.total()
        return dict(out.most_common())

    def why(self) -> str:
        return ', '.join(f'{n} {reason}' for reason, n in list(self.reasons().items())[:5]) or 'none'

    def as_dict(self) -> dict:
        ledger = {k: self._sums[k] for k in ('answers', 'prompt_tokens', 'answer_tokens', 'cost')}
        return ledger | {'answers_counted_here': self._sums['estimated']}

    def spent(self) -> str:
        cost = f', cost {self.cost:.2f}' if self.cost else ''
        estimated = self._sums['estimated']
        here = f' ({estimated} answers counted with the tokenizer of the subject)' if estimated else ''
        return f'{self._sums["prompt_tokens"]:,} prompt and {self._sums["answer_tokens"]:,} answer tokens{cost}{here}'
