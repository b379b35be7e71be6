"""What a compiled program moves between devices, read from its text (`compiled.as_text()`).

The text is that of one program for all partitions, as jax compiles it: shapes are those of one device.
A collective is counted as often as it runs: the body of a loop times its trip count, of a conditional every branch.
Kinds other than KINDS (sends between hosts, ragged exchanges) are not listed.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

from lens.errors import LensError

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')

_COMPUTATION = re.compile(r'(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,<= ]*)\]')
_CALLS = re.compile(
    r'\b(?:body|condition|to_apply|calls|called_computations|branch_computations|\w+_computation)=(\{[^}]*\}|[^,\s]+)'
)
_TRIP_COUNT = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')


class HloError(LensError):
    """The text is no compiled program, or in a notation that is not known."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    count: how often it runs in one call of the program. shapes: of its results, 'f32[8,24]' each. payload_bytes:
    of the whole array as one device sees it: the result, of a reduce-scatter the operand. group_size: devices that
    take part together. op_name: the JAX operation that it is from. bounded: False where it is in a loop whose trip
    count the text does not tell; that loop counts as one pass.
    """

    kind: str
    count: int
    shapes: tuple[str, ...]
    payload_bytes: int
    group_size: int
    op_name: str
    bounded: bool = True

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in one call of the program, by ring algorithms."""
        share = (self.group_size - 1) / self.group_size
        factor = {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(self.kind, share)
        return factor * self.payload_bytes * self.count


class _Instruction(NamedTuple):
    """`type opcode(operands), attributes`, texts."""

    name: str
    type: str
    opcode: str
    operands: str
    attributes: str


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program in the order of its text, one entry for each place that runs them.

    Raises HloError when `text` has no entry computation or holds replica groups in an unknown notation.
    """
    computations, entry = _parse(text)
    devices = math.prod(int(n) for n in re.findall(r'\b(?:replica_count|num_partitions)=(\d+)', text.split('\n', 1)[0]))

    @functools.cache
    def inside(name: str) -> tuple[Collective, ...]:
        """Of one run of the computation `name`."""
        found = []
        instructions = computations.get(name, ())
        for x in instructions:
            if x.opcode.removesuffix('-start') in KINDS:
                found.append(_collective(x, instructions, devices))
            trips, bounded = _trips(x)
            for called in _called(x):
                found += [
                    dataclasses.replace(c, count=c.count * trips, bounded=c.bounded and bounded) for c in inside(called)
                ]
        return tuple(found)

    return list(inside(entry))


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """(instructions of every computation, name of the entry)."""
    computations, entry, current = {}, None, []
    for line in re.sub(r'/\*.*?\*/', '', text).splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header['name']] = []
            entry = header['name'] if header['entry'] else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_instruction(match['name'], match['rest']))
    if entry is None:
        raise HloError('The text has no ENTRY computation: give the text of a compiled program, compiled.as_text().')
    return computations, entry


def _instruction(name: str, rest: str) -> _Instruction:
    end = _closing(rest) if rest.startswith('(') else rest.index(' ')
    kind, rest = rest[:end], rest[end:].strip()
    start = rest.index('(')
    end = start + _closing(rest[start:])
    return _Instruction(name, kind, rest[:start], rest[start + 1 : end - 1], rest[end:])


def _closing(text: str) -> int:
    """Where the parenthesis that opens `text` has closed; quoted text does not count."""
    depth = 0
    for i, c in enumerate(_QUOTED.sub(lambda m: '"' * len(m[0]), text)):
        depth += (c == '(') - (c == ')')
        if depth == 0:
            return i + 1
    raise HloError(f'No closing parenthesis in {text[:80]!r}: the text of the program is cut.')


def _called(x: _Instruction) -> list[str]:
    """Computations that an instruction runs."""
    attributes = _QUOTED.sub('""', x.attributes)
    return [name for names in _CALLS.findall(attributes) for name in re.findall(r'[\w.\-]+', names)]


def _trips(x: _Instruction) -> tuple[int, bool]:
    """(how often an instruction runs what it calls, whether the text says so)."""
    if x.opcode != 'while':
        return 1, True
    known = _TRIP_COUNT.search(x.attributes)
    return (int(known[1]), True) if known else (1, False)


def _collective(x: _Instruction, instructions: list[_Instruction], devices: int) -> Collective:
    kind = x.opcode.removesuffix('-start')
    shapes = _SHAPE.findall(_result(x, kind, instructions))
    size = _group_size(x, kind, devices)
    payload = sum(_bytes(*shape) for shape in shapes) * (size if kind == 'reduce-scatter' else 1)
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', x.attributes)
    return Collective(kind, 1, tuple(f'{t}[{d}]' for t, d in shapes), payload, size, op_name[1] if op_name else '')


def _result(x: _Instruction, kind: str, instructions: list[_Instruction]) -> str:
    """Type of what a collective gives: of an asynchronous one that of its `-done`, as `-start` has operands and
    contexts in its type, differently by kind."""
    if x.opcode == kind:
        return x.type
    handles = {x.name}
    for y in instructions:
        if y.opcode in (f'{kind}-update', f'{kind}-done') and handles & set(re.findall(r'[\w.\-]+', y.operands)):
            if y.opcode == f'{kind}-done':
                return y.type
            handles.add(y.name)
    raise HloError(f'{x.name} is started and never done: the text of the program is cut.')


def _bytes(element: str, dims: str) -> int:
    """Of an array; a dynamic dimension counts as its bound."""
    width = re.search(r'\d+', element)
    bits = int(width[0]) if width else 8 * (element == 'pred')
    return math.ceil(math.prod(int(n) for n in re.findall(r'\d+', dims)) * bits / 8)


def _group_size(x: _Instruction, kind: str, devices: int) -> int:
    """Devices that take part together: `{{0,1},{2,3}}`, `[groups,size]<=[…]`, `mesh['a'=4,'b'=2] {'a'}`, `{}` = all."""
    if kind == 'collective-permute':
        pairs = re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', x.attributes)
        return _longest_chain(re.findall(r'\{(\d+),(\d+)\}', pairs[1] if pairs else ''))
    if iota := re.search(r'replica_groups=\[\d+,(\d+)\]<=', x.attributes):
        return int(iota[1])
    if mesh := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', x.attributes):
        sizes = dict(axis.split('=') for axis in mesh[1].split(','))
        # 'a' is a whole axis, 'a':(2)4 a part of 4 of it
        return math.prod(int(re.sub(r'.*\)', '', axis) if ':' in axis else sizes[axis]) for axis in mesh[2].split(','))
    listed = re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', x.attributes)
    if listed is None and 'replica_groups=' in x.attributes:
        raise HloError(f'The replica groups of {x.name} are in an unknown notation: {x.attributes[:120]!r}.')
    groups = re.findall(r'\{([\d,]+)\}', listed[1]) if listed else []
    return max((len(g.split(',')) for g in groups), default=devices)


def _longest_chain(pairs: list[tuple[str, str]]) -> int:
    """Devices of the longest chain or ring that (source, target) pairs make."""
    groups = {}
    for pair in pairs:
        merged = set(pair).union(*(groups.get(d, ()) for d in pair))
        groups |= dict.fromkeys(merged, merged)
    return max(map(len, groups.values()), default=1)
