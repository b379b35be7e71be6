"""What the benchmarks measure with: seconds of a program, and one JSON object a line."""

import json
import statistics
import time
from collections.abc import Callable, Mapping

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


def in_turn(
    programs: Mapping[str, Callable[[], object]], repeats: int, now: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Returns the median seconds of each, run one after the other `repeats` times; what they give is waited for."""
    laps: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            begin = now()
            jax.block_until_ready(run())
            laps[name].append(now() - begin)
    return {name: statistics.median(x) for name, x in laps.items()}
