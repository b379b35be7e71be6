"""What the text of a compiled program says: bytes, FLOPs and launches of every kernel, loops multiplied out.

`kernels(text)` walks the program from its entry. A kernel cannot take less than bytes / BANDWIDTH nor than
FLOPs / FLOPS; their sum is the roof of the program, without the gaps between launches. Of an operand that a kernel
slices only the slice counts, of a buffer that it updates in place only the update. Kernels of libraries (cuBLAS, cuDNN)
are counted from the shapes of their operands; of others that are known by name alone FLOPs are not, and `unknown` says so.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BANDWIDTH, FLOPS = 3.0e12, 650e12  # of an H100, as large products and copies reach them
WEIGHT = 1 << 20  # elements from which on an array of the entry may be a weight whose copy counts
BITS = {'pred': 8, 'bf16': 16, 'token': 0, 'opaque': 0}  # others say it in their names

SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
CALLED = re.compile(r'(?:calls|to_apply|body)=%?([\w.\-]+)')

FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'opt-barrier', 'iota'}
FREE |= {'partition-id', 'replica-id', 'async-update'}  # and all that waits for what was started: *-done
VIEWS = {'bitcast', 'reshape', 'get-tuple-element'}
SLICES = {'dynamic-slice', 'slice', 'gather'}
UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}  # which operand is the update; operand 0 stays in its place
MOVES = {'parameter', 'constant', 'tuple', 'copy', 'transpose', *VIEWS, 'dynamic-slice', 'slice'}
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Returns its bytes; 0 of a vector of s8, which is a library's workspace."""
        if self.dtype in BITS or (self.dtype == 's8' and len(self.dims) == 1):
            return self.size * BITS.get(self.dtype, 0) / 8
        return self.size * int(re.search(r'\d+', self.dtype)[0]) / 8


class Instruction(NamedTuple):
    name: str
    out: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> float:
        return sum(x.bytes for x in self.out)

    @property
    def source(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ''

    def called(self, attribute: str) -> str:
        return re.search(rf'{attribute}=%?([\w.\-]+)', self.attributes)[1]


Computation = dict[str, Instruction]


class Kernel(NamedTuple):
    """times: its runs in one call of the program; loops: trip counts of the loops around it, the outermost first.

    bytes, flops, copied (bytes of weights that it moves and does nothing else with) are those of one run. unknown: it
    has FLOPs that cannot be counted.
    """

    name: str
    op: str
    loops: tuple[int, ...]
    times: float
    bytes: float
    flops: float
    copied: float
    unknown: bool
    source: str

    @property
    def seconds(self) -> float:
        """Returns the least time that all its runs together can take."""
        return self.times * max(self.bytes / BANDWIDTH, self.flops / FLOPS)


def kernels(text: str, trips: int = 1) -> list[Kernel]:
    """Returns the kernels of a compiled program, jax.stages.Compiled.as_text().

    trips: of loops whose count is not known before they run, as that of sampling with an early stop. Of the branches
    of a conditional those that launch anything count in equal parts.
    """
    return list(_Program(text, trips).walk(None, 1.0, ()))


def summary(found: list[Kernel]) -> dict[str, float]:
    """Returns the roof of a program, its launches, and its copies of weights."""
    copies = [k for k in found if k.copied]
    return {
        'roof_ms': 1e3 * sum(k.seconds for k in found),
        'launches': sum(k.times for k in found),
        'copies': sum(k.times for k in copies),
        'copied_gb': sum(k.times * k.copied for k in copies) / 1e9,
        'uncounted': sum(k.times for k in found if k.unknown),
    }


def most_expensive(found: list[Kernel], n: int) -> list[str]:
    """Returns lines on the n kernels with the highest roof."""
    lines = []
    for k in sorted(found, key=lambda k: -k.seconds)[:n]:
        what = f'{k.bytes / 1e6:.1f} MB, {k.flops / 1e9:.1f} GFLOP' + ', copy of weights' * bool(k.copied)
        lines.append(f'  {1e3 * k.seconds:8.1f} ms  {k.times:7.0f} x ({what}) {k.name}  {k.source[-70:]}')
    return lines


class Collective(NamedTuple):
    """One that a program names. sent: bytes that a device sends at least each time, in a ring; arrays: what it gives;
    source: names of the traced program that it is from."""

    kind: str
    times: float
    sent: float
    arrays: tuple[Array, ...]
    source: str

    @property
    def total(self) -> float:
        return self.times * self.sent


def collectives(text: str, trips: int = 1) -> list[Collective]:
    """Returns the collectives of a compiled program.

    What a TPU does in steps beside other work, kernels of one channel, counts once.
    """
    program, found, seen = _Program(text, trips), [], set()
    for of, x, times, _ in program.instructions(None, 1.0, ()):
        name = x.called('calls') if x.op == 'fusion' else ''
        for y in program.computations[name].values() if name else (x,):
            kind = next((k for k in COLLECTIVES if y.op in (k, f'{k}-start')), None)
            channel, n = re.search(r'channel_id=(\d+)', y.attributes), _group_size(y.attributes)
            place = name and channel and (id(of), channel[1])
            if kind is None or n < 2 or (place and place in seen):
                continue
            seen.add(place)
            if 'all-reduce-scatter' in name:  # of the sum a device keeps its part
                kind, share = 'reduce-scatter', (n - 1) / n
            else:
                share = {'all-reduce': 2 * (n - 1) / n, 'reduce-scatter': n - 1, 'collective-permute': 1}.get(kind)
                share = (n - 1) / n if share is None else share
            arrays = program.result(y)
            found.append(Collective(kind, times, sum(a.bytes for a in arrays) * share, arrays, y.source))
    return found


def by_kind(found: list[Collective]) -> dict[str, tuple[float, float]]:
    """Returns kind -> (runs, bytes that a device sends) of all of them together."""
    kinds = dict.fromkeys(x.kind for x in found)
    return {k: (sum(x.times for x in found if x.kind == k), sum(x.total for x in found if x.kind == k)) for k in kinds}


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of its entry."""
    computations, entry, current = {}, '', {}
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            current = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
        elif found := INSTRUCTION.match(line):
            out, rest = _head(found[3])
            op, operands = rest.split('(', 1)
            operands, attributes = _head(f'({operands}')
            arrays = tuple(Array(t, tuple(int(n) for n in d.split(',') if n)) for t, d in SHAPE.findall(out))
            names = tuple(re.findall(r'%([\w.\-]+)', operands)) if op != 'constant' else (operands.strip('()'),)
            current[found[2]] = Instruction(found[2], arrays, op, names, attributes, bool(found[1]))
    return computations, entry


def _head(text: str) -> tuple[str, str]:
    """What stands before the first space outside all brackets, and what follows it."""
    depth = 0
    for i, x in enumerate(text):
        depth += (x in '({[') - (x in ')}]')
        if depth == 0 and (x == ' ' or (x == ')' and text[0] == '(')):
            return text[: i + 1], text[i + 1 :].lstrip(' ,')
    return text, ''


def _group_size(attributes: str) -> int:
    """Devices of one group of a collective."""
    if found := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', attributes):  # by the names of axes
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r'replica_groups=\[\d+,(\d+)\]', attributes):
        return int(found[1])
    if found := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
        return found[1].count(',') + 1
    return 2 if 'source_target_pairs={{' in attributes else 1


class _Program:
    def __init__(self, text: str, trips: int):
        self.computations, self.entry = _parse(text)
        self.trips = trips
        self.weights = set()  # what a weight or one layer of a stack of them looks like
        for x in self.computations[self.entry].values():
            if x.op == 'parameter' and len(x.out) == 1 and len(x.out[0].dims) > 1 and x.bytes:
                whole = x.out[0]
                sizes = (whole.size, whole.size // whole.dims[0])
                self.weights |= {(whole.dtype, n) for n in sizes if n >= WEIGHT}

    def instructions(self, name: str | None, times: float, loops: tuple[int, ...]) -> Iterator:
        """(its computation, instruction, runs, loops) of all that is launched."""
        computation = self.computations[name or self.entry]
        for x in computation.values():
            if x.op == 'while':
                n = self._count(x, computation)
                yield from self.instructions(x.called('body'), n * times, (*loops, n))
            elif x.op == 'conditional':
                names = re.search(r'branch_computations=\{([^}]*)\}', x.attributes)
                names = names[1] if names else f'{x.called("true_computation")},{x.called("false_computation")}'
                branches = [list(self.instructions(b, 1.0, loops)) for b in re.findall(r'[\w.\-]+', names)]
                branches = [b for b in branches if b]
                for of, y, runs, inside in (i for b in branches for i in b):
                    yield of, y, runs * times / len(branches), inside
            elif x.op in ('call', 'async-start'):
                yield from self.instructions(x.called('to_apply' if x.op == 'call' else 'calls'), times, loops)
            elif x.op not in FREE and not x.op.endswith('-done'):
                yield computation, x, times, loops

    def _count(self, x: Instruction, of: Computation) -> int:
        """How often a loop runs: as it is noted, or as its condition says, which is `counter < constant` then."""
        if known := re.search(r'known_trip_count\W+n\W+(\d+)', x.attributes):
            return int(known[1])
        condition = self.computations.get(x.called('condition'), {})
        (root,) = [y for y in condition.values() if y.is_root] or [None]
        if root and root.op == 'compare' and 'direction=LT' in root.attributes:
            counter, end = (condition[o] for o in root.operands)
            index = re.search(r'index=(\d+)', counter.attributes)
            carry = of.get(x.operands[0])
            start = of.get(carry.operands[int(index[1])]) if index and carry and carry.op == 'tuple' else None
            first = int(start.operands[0]) if start and start.op == 'constant' else 0
            if end.op == 'constant':
                return int(end.operands[0]) - first
        return self.trips

    def walk(self, name: str | None, times: float, loops: tuple[int, ...]) -> Iterator[Kernel]:
        for of, x, runs, inside in self.instructions(name, times, loops):
            moved, flops = self._traffic(of, x), self._flops(of, x)
            yield Kernel(x.name, x.op, inside, runs, moved, flops or 0.0, self._copied(x), flops is None, x.source)

    def result(self, x: Instruction) -> tuple[Array, ...]:
        """What an instruction gives; one that only starts it names its operands as well."""
        half = len(x.out) // 2
        return x.out[half : 2 * half] if x.op.endswith('-start') and half else x.out

    def _body(self, x: Instruction) -> Computation | None:
        return self.computations.get(x.called('calls')) if x.op in ('fusion', 'fusion-start') else None

    def _traffic(self, of: Computation, x: Instruction) -> float:
        """Bytes that a kernel reads and writes."""
        if x.op in SLICES:
            return 2 * x.bytes
        if x.op in UPDATES:
            return 2 * of[x.operands[UPDATES[x.op]]].bytes
        body = self._body(x)
        if body is None:
            read, given = [of[o] for o in x.operands if o in of], sum(a.bytes for a in self.result(x))
            if 'gpu.triton"' in x.attributes:  # of a stack of matrices by layer and expert it reads one layer
                return given + sum(y.bytes / (y.out[0].dims[0] if len(y.out[0].dims) == 4 else 1) for y in read)
            return given + sum(y.bytes for y in read)
        users = collections.defaultdict(list)
        for y in body.values():
            for operand in y.operands:
                users[operand].append(y)
        (root,) = (y for y in body.values() if y.is_root)
        read = sum(self._used(y, users) for y in body.values() if y.op == 'parameter')
        return read + self._written(root, body)

    def _used(self, x: Instruction, users: dict[str, list[Instruction]]) -> float:
        """Bytes of x that the kernel around it needs."""
        total = 0.0
        for user in users[x.name]:
            if user.op in SLICES and user.operands[0] == x.name:
                total += user.bytes
            elif user.op in UPDATES and user.operands[0] == x.name:
                pass
            elif user.op in VIEWS:
                total += self._used(user, users)
            else:
                return x.bytes
        return min(total, x.bytes)

    def _written(self, x: Instruction, body: Computation) -> float:
        inputs = [body[o] for o in x.operands if o in body]
        if x.op == 'tuple':
            return sum(self._written(y, body) for y in inputs)
        if x.op in VIEWS and inputs and inputs[0].op != 'parameter' and len(inputs[0].out) == 1:
            return self._written(inputs[0], body)
        return inputs[UPDATES[x.op]].bytes if x.op in UPDATES else x.bytes

    def _flops(self, of: Computation, x: Instruction) -> float | None:
        """FLOPs of the products of one run; None where there may be some that nothing tells."""
        body = self._body(x)
        if body is not None:
            inside = [self._flops(body, y) for y in body.values()]
            return None if None in inside else sum(inside)
        if x.op not in ('dot', 'ragged-dot', 'convolution', 'custom-call'):
            return 0.0
        inputs = [of[o].out[0] for o in x.operands if o in of and of[o].out]
        out, target = x.out[0], re.search(r'custom_call_target="([^"]*)"', x.attributes)
        target = target[1] if target else ''
        if 'fmha' in target:
            return _attention_flops(x, inputs)
        if contracted := re.search(r'lhs_contracting_dim(?:ension)?s\W+([\d",]+)', x.attributes):
            left, right = inputs[:2]
            depth = math.prod(left.dims[int(n)] for n in re.findall(r'\d+', contracted[1]))
            ragged = 'lhs_ragged_dims' in x.attributes and len(right.dims) < len(out.dims)  # a gradient of weights
            return 2 * out.size * depth / (out.dims[0] if ragged else 1)
        if 'triton' in target or 'mosaic' in target or 'pallas' in target:
            return _grouped_flops(inputs, x.out)
        return 0.0

    def _copied(self, x: Instruction) -> float:
        """Bytes of weights, or of a layer of them, that a kernel writes elsewhere without a change."""
        body = self._body(x)
        if body is None:
            moves, out = x.op in ('copy', 'copy-start', 'transpose', 'dynamic-slice', 'slice'), x.out[:1]
        else:
            moves = all(y.op in MOVES or all(a.size == 1 for a in y.out) for y in body.values())
            (out,) = (y.out for y in body.values() if y.is_root)
        return sum(a.bytes for a in out if (a.dtype, a.size) in self.weights) if moves else 0.0


def _attention_flops(x: Instruction, inputs: list[Array]) -> float:
    """Of cuDNN's flash attention; queries BxTxHxd, keys BxSxKxd. A causal query is one of the last T of S positions and
    sees what is before it, at most the window."""
    q, k = inputs[:2]
    queries, keys = q.dims[1], k.dims[1]
    seen = float(queries * keys)
    if 'CAUSAL' in x.attributes:
        window = re.search(r'sliding_window_length\W+(\d+)', x.attributes)
        most = int(window[1]) if window and int(window[1]) else keys
        seen = float(sum(min(keys - queries + i + 1, most) for i in range(queries)))
    products = 5 if 'Backward' in x.attributes else 2
    return products * 2 * q.size / queries * seen


def _grouped_flops(inputs: list[Array], out: tuple[Array, ...]) -> float | None:
    """Of the kernels of lens/models/grouped.py: rows [A, I] in tiles times the matrices [L, E, ., .] of their experts, the
    last tile of each on average half empty; or [A, I] and [A, O] to [E, I, O]. None for every other kernel."""
    dims, result = [a.dims for a in inputs], out[0].dims
    rows, stacks = [d for d in dims if len(d) == 2], [d for d in dims if len(d) in (3, 4)]
    for left in rows:
        if len(result) == 2 and left[0] == result[0]:
            for *_, experts, m, n in stacks:
                if {m, n} == {left[1], result[1]}:
                    tiles = max((d[0] for d in dims if len(d) == 1), default=0)
                    tile = left[0] / (tiles - experts + 1) if tiles >= experts else 0
                    return 2.0 * (left[0] + experts * tile / 2) * left[1] * result[1]
        if len(result) == 3 and any(r[0] == left[0] and {left[1], r[1]} == set(result[1:]) for r in rows):
            return 2.0 * left[0] * result[1] * result[2]
    return None
