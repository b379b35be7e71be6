"""How wide the batches of texts are: few widths, each a program of its own, that pad little."""

from collections.abc import Iterator

import numpy as np

MOST_WIDTHS, TEXT_SHARE = 8, 0.85  # of the batches of a split: no more widths than give this share of text in them
FINE = 16  # a width is a multiple of this, and above its square of a power of two that is at most 1/FINE of it
NEAR, FAR = 64, 512  # widths of texts that are read once are multiples of the first, above FAR tokens of the second


def choose_widths(lengths_N: np.ndarray) -> np.ndarray:
    """Returns ascending widths for texts of these lengths: the fewest of those that pad least whose share of text is
    TEXT_SHARE, at most MOST_WIDTHS. By dynamic programming over what the texts up to each width cost."""
    lengths_N = np.asarray(lengths_N, np.int64)
    unit_N = np.maximum(2 ** np.log2(lengths_N).astype(np.int64) // FINE, FINE)
    width, counts = np.unique(-(-lengths_N // unit_N) * unit_N, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(counts)])
    cost, ways = np.concatenate([[0], np.full(len(width), np.inf)]), [()] * (len(width) + 1)
    for _ in range(min(MOST_WIDTHS, len(width))):
        tried = np.where(np.tri(len(width), len(width) + 1), cost + (upto[1:, None] - upto) * width[:, None], np.inf)
        best = np.argmin(tried, axis=1)  # the texts of all smaller widths are read in the widths before
        cost = np.concatenate([[0], np.take_along_axis(tried, best[:, None], 1)[:, 0]])
        ways = [(), *(ways[b] + (w,) for b, w in zip(best, width, strict=True))]
        if lengths_N.sum() >= TEXT_SHARE * cost[-1]:
            break
    return np.array(ways[-1])


def batches(
    lengths_N: np.ndarray, most: int, tokens: int, rows: float = np.inf
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (width, some texts, the same with some of them again, of one shape for each width) until all texts are in one.

    most: no width is above it. tokens, rows: that a batch has at most, one row at least.
    """
    grid_N = np.where(lengths_N <= FAR, NEAR, FAR)
    width_N = np.minimum(-(-np.maximum(lengths_N, 1) // grid_N) * grid_N, most)
    for width in np.unique(width_N).tolist():
        of_width, size = np.flatnonzero(width_N == width), max(int(min(rows, tokens // width)), 1)
        for some in (of_width[i : i + size] for i in range(0, len(of_width), size)):
            yield width, some, np.resize(some, size)
