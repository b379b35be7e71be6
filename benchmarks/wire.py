"""What a compiled program sends: its collectives with the bytes on the wire of one device, loops multiplied out."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
COLLECTIVE = re.compile(rf'^\s+(?:ROOT )?\S+ = (.*?) ({"|".join(KINDS)})\(')
INSIDE = re.compile(r'(?:body|to_apply|calls|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)')
SHAPE = re.compile(r'\b(pred|[a-z]+?(\d+))\[([\d,]*)\]')


class Collective(NamedTuple):
    """One that a program names. sent: bytes that each device sends each time, in rings. scope: names of the traced
    program that it is from."""

    kind: str
    sent: float
    times: int
    scope: str

    @property
    def total(self) -> float:
        return self.sent * self.times


def collectives(text: str) -> list[Collective]:
    """Reads the text of a compiled program. Raises ValueError for a loop of unknown length that sends something."""
    lines, entry = collections.defaultdict(list), None
    for line in text.splitlines():
        if head := re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line):
            name = head[2]
            entry = name if head[1] else entry
        elif line.startswith(' '):
            lines[name].append(line)
    return list(_walk(lines, entry, 1))


def _walk(lines: dict[str, list[str]], computation: str, times: int) -> Iterator[Collective]:
    for line in lines[computation]:
        if found := COLLECTIVE.match(line):
            scope = re.search(r'op_name="([^"]*)"', line)
            sent = _sent(found[2], _bytes(found[1]), _devices(line))
            if sent:
                yield Collective(found[2], sent, times, scope[1] if scope else '')
            continue
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        for name in re.findall(r'[\w.\-]+', ' '.join(INSIDE.findall(line))):
            inside = list(_walk(lines, name, times * (int(trips[1]) if trips else 1)))
            if inside and ' while(' in line and not trips:
                raise ValueError(f'a loop of unknown length sends something: {line.strip()[:200]}')
            yield from inside


def _bytes(shapes: str) -> int:
    """Of all arrays of a type."""
    parts = SHAPE.findall(shapes)
    return sum(max(int(bits or 8) // 8, 1) * math.prod(int(n) for n in dims.split(',') if n) for _, bits, dims in parts)


def _devices(line: str) -> int:
    """How many devices take part in one group of a collective; 2 in a permutation."""
    if axes := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", axes[2]))
    if grid := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
        return int(grid[1])
    if first := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
        return first[1].count(',') + 1
    if 'source_target_pairs=' in line:
        return 2
    raise ValueError(f'the devices of a collective are written in an unknown way: {line.strip()[:200]}')


def _sent(kind: str, given: int, n: int) -> float:
    """Bytes that a device of n sends for a result of `given` bytes, in a ring."""
    return given * {'all-reduce': 2 * (n - 1) / n, 'reduce-scatter': n - 1, 'collective-permute': n - 1}.get(
        kind, (n - 1) / n
    )
