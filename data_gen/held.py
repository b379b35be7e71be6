"""Which words of a text an activation holds, as far as a linear probe tells.

Most rare words of a text have left the stream many tokens later: a label of them is noise that no decoder can learn to
read. The probe is a ridge regression from the activation to which words stand in the text so far, fitted on the training
documents. A word's score is its predicted presence less the mean, in standard deviations of the presence, so that rare
words and common ones compete alike. Each document is judged by a probe that has not seen it (cross-fitting).

Dimension letters: V positions, D width, I words.
"""

from collections.abc import Callable

import numpy as np

from lens import words

from . import shards
from .activations import Reader, config_of
from .label_prompts import Part

FOLDS = 4  # probes, each fitted without its own documents
LEAST = 2  # documents of a fold: of fewer there is no probe, and words stay as they are given
COMMON = 8  # a word in more than one of so many documents tells no text from another
RIDGE = 0.3  # times the mean eigenvalue of the standardised activations
DOCUMENTS = 256  # read together


class Held:
    """The probes of a subject's stream after block `layer`, fitted on the documents of `part` that `frequency` counted.

    present: (row, slot) -> folded words of the text so far that may be named. Raises LensError.
    """

    def __init__(self, subject: str, layer: int, part: Part, frequency: words.Frequency, present: Callable):
        config_of(subject, layer)
        most = frequency.documents / COMMON
        names = sorted(k for k, n in frequency.counts.items() if words.SEEN <= n <= most)
        self.word = {k: i for i, k in enumerate(names)}
        self.fitted, self.block, self.probes = {}, {}, []
        rows = words.counted(part.split)
        rows = rows[(part.positions[rows] >= 0).any(1)]
        self.fold = {(part.name, row): i % FOLDS for i, row in enumerate(rows.tolist())}
        if self.word and len(rows) >= LEAST * FOLDS:
            self.read = Reader(subject, layer)
            self.probes = self._fit(part, rows, present)

    def _fit(self, part: Part, rows: np.ndarray, present: Callable) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns a probe without each fold, and one of all documents."""
        bar = shards.progress('Reading', len(rows), 0)
        sums = [0.0] * FOLDS
        for i in range(0, len(rows), DOCUMENTS):
            some, seen = rows[i : i + DOCUMENTS], [[] for _ in range(FOLDS)]
            for row, a_VxD in zip(some.tolist(), self.read(part, some), strict=True):
                self.fitted[part.name, row] = a_VxD
                slots = np.flatnonzero(part.positions[row] >= 0)
                y_VxI = np.zeros((len(slots), len(self.word)))
                for k, slot in enumerate(slots.tolist()):
                    y_VxI[k, [self.word[w] for w in present(row, slot) if w in self.word]] = 1
                x = np.concatenate([np.ones((len(slots), 1)), a_VxD[slots], y_VxI], axis=1)
                seen[self.fold[part.name, row]].append(x)
            d = a_VxD.shape[1]
            for fold, xs in enumerate(seen):
                if xs:
                    x = np.concatenate(xs)
                    sums[fold] += x[:, : 1 + d].T @ x
            bar.update(len(some))
        bar.close()
        return [_probe(sum(s for k, s in enumerate(sums) if k != fold)) for fold in range(FOLDS + 1)]

    def _activation(self, part: Part, row: int, slot: int) -> np.ndarray:
        where = part.name, row
        if where not in self.fitted and where not in self.block:
            rows = np.flatnonzero((part.positions >= 0).any(1))
            rows = rows[rows >= row][:DOCUMENTS]
            self.block = {(part.name, r): a for r, a in zip(rows.tolist(), self.read(part, rows), strict=True)}
        return (self.fitted if where in self.fitted else self.block)[where][slot]

    def rank(self, part: Part, row: int, slot: int, given: list[str]) -> list[str]:
        """Returns some words of the text so far, those first that the activation holds; unknown ones follow as given."""
        if not self.probes:
            return given
        mean_D, weight_IxD = self.probes[self.fold.get((part.name, row), FOLDS)]
        known = {w: self.word[key] for w in given if (key := words.fold(w)) in self.word}
        score = weight_IxD[[*known.values()]] @ (self._activation(part, row, slot) - mean_D)
        score = dict(zip(known, score.tolist(), strict=True))
        return sorted(given, key=lambda w: -score.get(w, -np.inf))


def _probe(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of standardised presence from the sums of products of (1, activation) with (1, activation, presence)."""
    d = len(sums) - 1
    n, mean = sums[0, 0], sums[0, 1:] / sums[0, 0]
    covariance = sums[1:, 1:] / n - np.outer(mean[:d], mean)
    sd = np.sqrt(np.maximum(np.diag(covariance), np.finfo(np.float32).tiny))
    weight = np.linalg.solve(covariance[:, :d] / np.outer(sd, sd) + RIDGE * np.eye(d), covariance[:, d:] / sd[:, None])
    presence = mean[d:]
    spread = np.sqrt(presence * (1 - presence))
    return mean[:d], (weight / sd[:, None] / np.where(spread > 0, spread, np.inf)).T.copy()
