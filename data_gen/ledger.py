"""The journal of a labelling: which labels there are, why others are missing, and what all answers have cost.

labels.jsonl and failures.jsonl get a line for every answer, with its tokens and its cost; the ledger is the sum over
those lines, over all commands.
"""

import collections
import math
import pathlib

import numpy as np

from lens.errors import LensError, shown

from .journal import Journal
from .label_prompts import Part

WITHOUT = 'without a label'


class Ledger(Journal):
    """A job is one label: {split, row, slot, doc_id, position}, slot the column of the position. options: LabelOptions.

    Failures are kept over commands. A job is closed by a label, a refusal or `attempts` answers without a label.
    """

    elsewhere = 'another --labels'

    def __init__(self, folder: pathlib.Path, parts: list[Part], settings: dict, options):
        self._parts, self._o = {p.name: p for p in parts}, options
        self._labelled = {p.name: np.zeros(p.positions.shape, bool) for p in parts}
        self._failures: dict[tuple, list[dict]] = {}  # the records of every job without a label
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
        used = {k: record[k] for k in ('prompt_tokens', 'answer_tokens', 'cost')}
        if (
            type(row) is not int
            or type(slot) is not int
            or not all(0 <= x < math.inf for x in (row, slot, *used.values()))
        ):
            raise TypeError
        if not isinstance(record.get('reason', ''), str):
            raise TypeError
        self._sums.update(used)
        self._sums['answers'] += record.get('kind', 'answer') == 'answer'
        self._sums['estimated'] += record.get('estimated', False)
        if kind == 'labels':
            self._labelled[name][row, slot] = True
            self._failures.pop(place, None)
            self.counts['data'] += not had
        elif not had:
            kept = {k: record[k] for k in ('kind', 'reason')}
            records = self._failures.setdefault(place, [])
            records.append(kept)
            self.counts[WITHOUT] += kept['kind'] == 'failed' or self._is_closed(records)

    def _is_closed(self, records: list[dict]) -> bool:
        kinds = [r['kind'] for r in records]
        return 'refused' in kinds or kinds.count('answer') >= self._o.attempts

    def add(self, kind: str, job: dict, record: dict) -> bool:
        """Writes the line of an answer with its cost; returns whether the job is closed."""
        record = job | {'prompt_tokens': 0, 'answer_tokens': 0} | record
        self.append(kind, record | {'cost': self.price(record['prompt_tokens'], record['answer_tokens'])})
        records = self._failures.get((job['split'], job['row'], job['slot']))
        return records is None or self._is_closed(records)

    def price(self, prompt_tokens: int, answer_tokens: int) -> float:
        return (prompt_tokens * self._o.price_in + answer_tokens * self._o.price_out) / 1e6

    def labelled(self, part: Part) -> np.ndarray:
        """Returns bool [N, V]: which of the drawn positions have a label."""
        return self._labelled[part.name] & (part.positions >= 0)

    def wanted(self, part: Part) -> np.ndarray:
        """Returns bool [N, V]: for which a server is to be asked."""
        out = (part.positions >= 0) & ~self._labelled[part.name]
        for (name, row, slot), records in self._failures.items():
            if name == part.name and self._is_closed(records):
                out[row, slot] = False
        return out

    def reasons(self) -> dict[str, int]:
        """Counts the missing labels by reason, most frequent first."""
        drawn = {n: p.positions >= 0 for n, p in self._parts.items()}
        missing = sum(int((d & ~self._labelled[n]).sum()) for n, d in drawn.items())
        out = collections.Counter(
            records[-1]['reason'] for (n, row, slot), records in self._failures.items() if drawn[n][row, slot]
        )
        if missing > out.total():
            out['not asked'] = missing - out.total()
        return dict(out.most_common())

    def why(self) -> str:
        return ', '.join(f'{n} {shown(reason)}' for reason, n in list(self.reasons().items())[:5]) or 'none'

    def as_dict(self) -> dict:
        ledger = {k: self._sums[k] for k in ('answers', 'prompt_tokens', 'answer_tokens', 'cost')}
        return ledger | {'answers_counted_here': self._sums['estimated']}

    def spent(self) -> str:
        cost = f', cost {self.cost:.2f}' if self.cost else ''
        estimated = self._sums['estimated']
        here = f' ({estimated} answers counted with the tokenizer of the subject)' if estimated else ''
        return f'{self._sums["prompt_tokens"]:,} prompt and {self._sums["answer_tokens"]:,} answer tokens{cost}{here}'
