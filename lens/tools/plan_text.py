"""The words of `lens.main --plan`: what a configuration needs, in at most 100 columns."""

import re

from lens.tools import flops
from lens.tools.plan import Needs, Program, Remedy, Step

GB = 1e9
DEVICE = 'H100'  # whose peak the seconds of a step are stated for
UTILISATION = 0.4
MARGIN = 0.1  # spare memory below which a plan warns
SHOWN = 12  # collectives of a phase; the smaller ones are added up
WIDTH = 100
# parts of the name of an operation that do not say where it is from
_NOISE = ('', 'jit', 'jvp', 'transpose', 'train_step', '_run_blocks', 'while', 'body', 'closed_call', 'checkpoint')
_BACKWARD = re.compile(r'transpose\(|rematted_computation')


def spare(total: float, device: float) -> str:
    left = device - total
    if left < 0:
        return f'{-left / GB:.1f} GB too much'
    return f'{left / GB:.1f} GB ({left / device:.0%}) to spare'


def heading(step: Step) -> str:
    p, hp = step.phase, step.phase.hparams
    texts = f' x {hp.group * hp.mean_of} explanations' if hp.group * hp.mean_of > 1 else ''
    return f'Phase {p.name}: {p.documents} documents x {p.vectors} activations{texts} a step'


def memory(n: Needs, program: Program, dtype: str, device: float) -> list[str]:
    """device: bytes of one. dtype: of the subject."""
    total = n.given + program.temporaries
    notes = {
        'base': (n.base, f'frozen, {dtype}'),
        'trained': (n.trainable, 'float32'),
        'optimizer': (n.optimizer, 'its moments'),
        'reference': (n.reference, 'the decoder at the start of the phase'),
    }
    lines = [f'  {name:12}        {size / GB:8.2f}  {note}' for name, (size, note) in notes.items() if size]
    lines.append(f'  temporaries  at most{program.temporaries / GB:8.2f}  of the program in float32')
    parts = {f'its keys and values, {dtype}': n.cache, 'a copy of one layer of experts': program.experts}
    lines += [f'    with {size / GB:.2f} for {what}' for what, size in parts.items() if size]
    lines.append(f'  total        at most{total / GB:8.2f}  of {device / GB:.1f}: {spare(total, device)}')
    return ['Memory of one device, GB', *lines]


def work(parts: dict[str, float], devices: int) -> str:
    peak = flops.PEAK_FLOPS[DEVICE]
    seconds = flops.in_mfu(parts) / (UTILISATION * peak * devices)
    named = ', '.join(f'{k} {v:.2g}' for k, v in parts.items() if v)
    return (
        f'FLOPs of a step, all devices: {named}\n  {" and ".join(flops.IN_MFU)} take {seconds:.2g} s at '
        f'{UTILISATION:.0%} of {peak / 1e12:.0f} TFLOP/s on each ({DEVICE})'
    )


def traffic(program: Program) -> list[str]:
    """Collectives, those that move most first."""
    found = sorted(program.collectives, key=lambda c: -c.wire_bytes)
    if not found:
        return ['Collectives of a step: none']
    lines = ['Collectives of a step    times  devices  payload MB  on the wire GB  from']
    for c in found[:SHOWN]:
        times = f'{c.count}{"" if c.bounded else "+"}'
        row = f'  {c.kind:20} {times:>7} {c.group_size:8} {c.payload_bytes / 1e6:11.3f} {c.wire_bytes / GB:15.4f}  '
        lines.append(row + place(c.op_name, WIDTH - len(row)))
    if rest := found[SHOWN:]:
        moved = sum(c.wire_bytes for c in rest) / GB
        lines.append(f'  {len(rest)} smaller ones{sum(c.count for c in rest):13}{moved:37.4f}')
    count, moved = sum(c.count for c in found), sum(c.wire_bytes for c in found) / GB
    lines.append(f'  total{count:23}{moved:37.4f}  sent by each device, at most')
    if not all(c.bounded for c in found):
        lines.append('  +: in a loop whose length the program does not tell, counted as one pass')
    return lines


def place(op_name: str, width: int) -> str:
    """The end of the name of an operation, in so many characters."""
    parts = [p for p in re.split(r'[/:()]', op_name) if p not in _NOISE]
    short = '/'.join(dict.fromkeys(parts)) + (' (backward)' if _BACKWARD.search(op_name) else '')
    return short if len(short) <= width else '…' + short[-(width - 1) :]


def verdict(totals: dict[str, int], device: float) -> list[str]:
    """totals: bytes on one device by phase."""
    name, total = max(totals.items(), key=lambda x: x[1])
    if total > device:
        return [f'Does not fit in {device / GB:.1f} GB: phase {name} needs at most {total / GB:.2f} GB.']
    lines = [
        f'Fits in {device / GB:.1f} GB: phase {name} needs most, at most {total / GB:.2f} GB, {spare(total, device)}.'
    ]
    if total > (1 - MARGIN) * device:
        lines.append(f'Under {MARGIN:.0%} to spare: fragmentation and workspaces of kernels are not counted.')
    return lines


def changes(found: list[Remedy], before: dict[str, Needs], device: float) -> list[str]:
    """What would help, least bytes first. before: needs as they are."""
    lines = [f'What each change alone would give in {device / GB:.1f} GB:'] if found else []
    for r in sorted(found, key=lambda r: (r.total > device, r.total)):
        now, then = before[r.phase].base, r.needs[r.phase].base
        base = f'base {then / GB:.2f} GB instead of {now / GB:.2f}, ' if then != now else ''
        total = 'total at most' if r.compiled else 'without temporaries'
        fits = 'fits, ' if r.total <= device else ''
        lines += [f'  {r.change}', f'    {base}{total} {r.total / GB:.2f} ({r.phase}): {fits}{spare(r.total, device)}']
    if all(r.total > device for r in found):
        lines.append('None of the changes that are known here is enough: more or larger devices, or a smaller subject.')
    return lines
