"""The curve of a run: the rows of metrics.jsonl without what depends on the clock."""

import pathlib

from lens.files import read_jsonl

TIMES, OF_TIME = ('step_s', 'wall_s', 'mfu', 'tflops_s'), 'time'  # keys, and a kind of rows


def curve(workdir: pathlib.Path) -> list[dict]:
    """Equal for equal runs, interrupted or not."""
    rows = read_jsonl(workdir / 'metrics.jsonl')
    return [{k: v for k, v in r.items() if k not in TIMES} for r in rows if r['kind'] != OF_TIME]
