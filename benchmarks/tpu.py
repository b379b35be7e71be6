"""Training steps of two models on slices of TPUs as their compiler sees them, on a machine without any.

    make tpu-compile

A line for every step: memory of a device against what there is; collectives, how often each kind runs in a step (loops
multiplied out, one that may stop early whole) and the GB that a device sends for them at least; what is wrong: what does
not fit or compile, and what is gathered whole because the compiler does not know how to split it ("involuntary full
rematerialization").
"""

import collections
import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator

import jax
from absl import app, flags

from benchmarks import full_size, roofline
from benchmarks.full_size import GPT_OSS, NLA, Part
from benchmarks.timing import report
from lens import cli, sharding
from lens.tools import plan, targets

CHIPS = 8
SMALL = {'subject.remat': 'full', 'sft.slices': 4, 'grpo.slices': 16}  # for 16 GB
WAYS = {
    'data': {'mesh.data': 8} | SMALL,
    'tensor': {'mesh.data': 2, 'mesh.model': 4} | SMALL,  # as many as the model has kv heads
    'split': {'mesh.data': 8, 'mesh.shard_base': True} | SMALL | {'grpo.slices': 4},  # a document a device and slice
}
# model -> (kind of TPU, recipe, tokens of a document, batch of every phase, ways to split the work)
MODELS = {
    'qwen': ('v5e', NLA, 2048, {'sft': (32, 2, 1), 'grpo': (32, 1, 8)}, WAYS),
    'gptoss': (
        'v5p',
        GPT_OSS,
        4096,
        {'sft': (24, 10, 1), 'grpo': (8, 2, 8)},
        {'data': {'mesh.data': 8}, 'tensor': {'mesh.model': 8}},
    ),
}
STEPS = {
    f'{model}_{phase}_{way}': (kind, Part('', *recipe, 'step', phase, full_size.batch(*sizes), tokens, values))
    for model, (kind, recipe, tokens, phases, ways) in MODELS.items()
    for phase, sizes in phases.items()
    for way, values in ways.items()
}


@contextlib.contextmanager
def standard_error() -> Iterator[list[str]]:
    """Holds back what is written to standard error, also by libraries; its lines are in the list afterwards."""
    lines, before = [], os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode(errors='replace').splitlines()


def rematerialised(lines: list[str]) -> list[str]:
    """Returns what the compiler says to gather whole involuntarily, by its place in the program, each once."""
    said = [x for x in lines if 'nvoluntary full rematerialization' in x]
    return list(dict.fromkeys((re.findall(r'op_name="([^"]*)"', x) or [x])[0][-200:] for x in said))


def run(part: Part, devices: list, limit_gb: float, texts: str = '') -> dict:
    """Compiles a step for `devices` that have limit_gb * 1e9 bytes each, but for one that cannot even hold what it is
    given. Returns its figures and what is wrong. texts: folder for the programs."""
    cfg, job = full_size.open_part(part)
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model, devices=devices)
    given = plan.needs(cfg, job, mesh)[part.phase].total / 1e9
    if given > limit_gb:
        return {'given_gb': given, 'wrong': [f'what it is given does not fit in {limit_gb:.1f} GB']}
    needs, sent, wrong = [], collections.Counter(), []
    with standard_error() as lines, jax.set_mesh(mesh):
        try:
            for i, program in enumerate(full_size.programs(part, cfg, job, mesh)):
                compiled = program.traced.lower().compile()
                needs.append(full_size.memory(compiled) / 1e9)
                text = compiled.as_text()
                for kind, (runs, n) in roofline.by_kind(roofline.collectives(text, cfg.explanation_len)).items():
                    sent.update({f'{kind}': runs, f'{kind}_gb': n / 1e9})
                if texts:
                    full_size.keep(text, texts, f'{part.name}.{i}')
        except Exception as e:  # the other steps are compiled all the same
            wrong.append(' '.join(str(e).split())[:400])
    if max(needs, default=0) > limit_gb:
        wrong.append(f'does not fit in {limit_gb:.1f} GB')
    figures = {'given_gb': given} | ({'memory_gb': max(needs)} if needs else {})
    return figures | dict(sent) | {'wrong': wrong + [f'rematerialised: {x}' for x in rematerialised(lines)]}


def main(_):
    targets.prepare('v5e')
    for name in CHOSEN.value:
        kind, part = STEPS[name]
        began = time.monotonic()
        limit_gb = cli.MEMORY_FRACTION * targets.TARGETS[kind].memory_gb
        row = run(part._replace(name=name), targets.devices(kind, CHIPS), limit_gb, TEXTS.value)
        row = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
        report(step=name, devices=f'{CHIPS} x {kind}', **row, compile_s=round(time.monotonic() - began))


if __name__ == '__main__':
    CHOSEN = flags.DEFINE_list('parts', [*STEPS], 'Which steps, in this order.')
    TEXTS = flags.DEFINE_string('texts', '', 'Folder for the texts of the compiled programs.')
    app.run(main)
