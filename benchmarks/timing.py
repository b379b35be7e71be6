"""What the benchmarks measure with: seconds of a program, and one JSON object a line."""

import json
import statistics
import time

import jax

REPEATS = 5


def report(**values) -> None:
    print(json.dumps(values), flush=True)


def seconds(run, *args) -> float:
    """Returns the median of REPEATS runs after one that is not counted."""
    laps = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(run(*args))
        laps.append(time.perf_counter() - begin)
    return statistics.median(laps[1:])
