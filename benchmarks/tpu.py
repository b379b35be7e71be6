"""Training steps of two models on slices of TPUs as their compiler sees them, on a machine without any.

    make tpu-compile

One line a step: memory of a device; collectives, how often each kind runs in a step (loops multiplied out; one that may
stop early counts whole) and the GB that a device sends at least; what is wrong: errors of the compiler, what does not fit,
and weights or activations that it gathers whole because it does not know how to split them ("involuntary full
rematerialization").
"""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator

from absl import flags

from benchmarks import full_size, roofline
from benchmarks.full_size import GPT_OSS, NLA, Part, batch
from lens import sharding
from lens.tools import targets

TENSOR, SPLIT = {'mesh.data': 2, 'mesh.model': 4}, {'mesh.data': 8, 'mesh.shard_base': True}
QWEN = {'sft': batch(8, 8), 'grpo': batch(8, 4, 8)}  # as the recipes have it
OSS = {'sft': batch(24, 10), 'grpo': batch(8, 2, 8)}
# name -> (kind of TPU, part); slices of 8
STEPS = {
    f'{model}_{phase}_{how}': (kind, Part('', *of, 'step', phase, sizes[phase], tokens, values))
    for model, of, sizes, tokens, kind, ways in (
        ('qwen', NLA, QWEN, 2048, 'v5e', {'data': {'mesh.data': 8}, 'tensor': TENSOR, 'split': SPLIT}),
        ('gptoss', GPT_OSS, OSS, 4096, 'v5p', {'data': {'mesh.data': 8}, 'tensor': {'mesh.model': 8}}),
    )
    for how, values in ways.items()
    for phase in ('sft', 'grpo')
}
CHIPS = 8
CHOSEN = flags.DEFINE_list('parts', [*STEPS], 'Which steps, in this order.')
TEXTS = flags.DEFINE_string('texts', '', 'Folder for the texts of the compiled programs.')


@contextlib.contextmanager
def standard_error() -> Iterator[list[str]]:
    """Holds back what the compiler writes to standard error; afterwards the list has its lines."""
    lines, kept = [], os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors='replace').splitlines()


def involuntary(lines: list[str]) -> list[str]:
    """Returns what was rematerialised involuntarily: the operations by their names in the source, each once."""
    found = [x for x in lines if 'nvoluntary full rematerialization' in x]
    return list(dict.fromkeys((re.findall(r'op_name="([^"]*)"', x) or [x[:300]])[0] for x in found))


def run(name: str) -> dict:
    """Compiles a step; returns what there is to say about it."""
    kind, part = STEPS[name]
    cfg, job = full_size.open_part(part)
    m, began = cfg.mesh, time.monotonic()
    mesh = sharding.make_mesh(m.data, m.model, devices=targets.devices(kind, CHIPS))
    out, wire, wrong = {'step': name, 'devices': f'{CHIPS} x {kind}'}, {}, []
    with standard_error() as lines:
        try:
            with full_size.under(mesh):
                for i, program in enumerate(full_size.programs(part, cfg, job, mesh)):
                    compiled = program.traced.lower().compile()
                    out['memory_gb'] = max(out.get('memory_gb', 0), round(full_size.memory(compiled) / 1e9, 2))
                    text = compiled.as_text()
                    if TEXTS.value:
                        full_size.keep(text, TEXTS.value, f'{name}.{i}')
                    for kind_of, (runs, sent) in roofline.collectives(text, cfg.explanation_len).items():
                        before = wire.get(kind_of, (0, 0))
                        wire[kind_of] = before[0] + runs, before[1] + sent / 1e9
        except Exception as e:  # the others are compiled all the same
            wrong.append(' '.join(str(e).split())[:600])
    pass


"""
"""
