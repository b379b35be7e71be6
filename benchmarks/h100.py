"""Sampling, reading and training steps of three models at full size on one H100: what its compiler shows, and seconds.

    make h100-compile                           # any machine: compiled for an H100, nothing runs
    python -m benchmarks.h100 [--budget=470]    # an H100: the same parts timed
    python -m benchmarks.h100 --size=tiny       # any machine: that all of it runs

The programs are those of lens (sampling, rollout.read, train_step), their weights random. roof: sum over kernels of
max(bytes / 3.0 TB/s, FLOPs / 650 TFLOP/s), loops multiplied out, no time between launches; rates stand beside it where
nothing was timed. copies: kernels that move a weight, or a layer of one, and do nothing else. MFU: model FLOPs
(lens/flops.py, without those of sampling) over 989 TFLOP/s. ms a token: of all but the prompt. A loop that may stop early
counts whole. Timed are medians after a first run; then a second table compares small models of every family with float32
on the CPU (benchmarks/agreement.py).
"""

import pathlib
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import agreement, full_size, roofline
from benchmarks.full_size import PARTS, Part, Program
from benchmarks.timing import report, seconds
from lens import cli, files, sharding
from lens.tools import targets

PEAK = 989e12  # dense bfloat16 FLOP/s
RUNS = 3  # after one that is not counted
TOP = 5  # kernels that are named
FAMILY = 'gpt_oss'  # that --size=tiny compares alone
COLUMNS = {
    'seconds': ('s', '.3f'),
    'roof_ms': ('roof ms', '.0f'),
    'token_ms': ('ms/token', '.1f'),
    'explanations_s': ('expl./s', '.1f'),
    'tokens_s': ('tokens/s', '.0f'),
    'mfu': ('MFU', '.1%'),
    'launches': ('launches', '.0f'),
    'copies': ('copies', '.0f'),
    'copied_gb': ('copied GB', '.1f'),
    'temporaries_gb': ('temp. GB', '.1f'),
    'memory_gb': ('all GB', '.1f'),
    'peak_gb': ('peak GB', '.1f'),
    'compile_s': ('compile s', '.0f'),
}


class Compiled(NamedTuple):
    """A part for a device. figures: see COLUMNS; length: tokens of an explanation."""

    programs: list[Program]
    compiled: list[jax.stages.Compiled]
    kernels: list[roofline.Kernel]
    figures: dict[str, float]
    length: int


def compile_part(part: Part, mesh, texts: str = '') -> Compiled:
    """Compiles what a part runs. texts: folder that keeps what was compiled. Call under jax.set_mesh(mesh)."""
    cfg, job = full_size.open_part(part)
    programs, began = full_size.programs(part, cfg, job, mesh), time.monotonic()
    compiled = [p.traced.lower().compile() for p in programs]
    taken, kernels = time.monotonic() - began, []
    for i, text in enumerate(c.as_text() for c in compiled):
        kernels += roofline.kernels(text, trips=cfg.explanation_len)
        if texts:
            full_size.keep(text, texts, f'{part.name}.{i}')
    figures = roofline.summary(kernels) | {
        'temporaries_gb': max(c.memory_analysis().temp_size_in_bytes for c in compiled) / 1e9,
        'memory_gb': max(map(full_size.memory, compiled)) / 1e9,
        'compile_s': taken,
        'model_tflop': full_size.model_flops(programs, job.c) / 1e12,
    }
    return Compiled(programs, compiled, kernels, figures, cfg.explanation_len)


def rates(part: Part, c: Compiled, took: float) -> dict[str, float]:
    """Returns what a part does in a second and its utilisation, where it takes `took` seconds."""
    out = {}
    if c.figures['model_tflop']:
        out['mfu'] = c.figures['model_tflop'] * 1e12 / took / PEAK
    if part.explanations:
        out['explanations_s'] = part.explanations / took
    if part.work == 'sample':
        out['tokens_s'] = part.explanations * c.length / took
        prompt = sum(k.seconds for k in c.kernels if 'prefill' in k.source)
        out['token_ms'] = 1e3 * (took - prompt) / (c.length - 1)
    elif part.work == 'read':
        out['tokens_s'] = part.batch['documents'] * part.tokens / took
    return out


def time_part(c: Compiled) -> float:
    """Returns the seconds of one run of all programs of a part: the median of RUNS after a first one."""
    total = 0.0
    for program, compiled in zip(c.programs, c.compiled, strict=True):
        args, laps = full_size.fill(program.args), []
        for _ in range(1 + RUNS):
            began = time.perf_counter()
            out = jax.block_until_ready(compiled(*args))
            laps.append(time.perf_counter() - began)
            if program.carries:  # it was given away
                args = (out[0], *args[1:])
        total += statistics.median(laps[1:])
    return total


def ceilings(n: int) -> dict[str, float]:
    """Measures a product of n x n in bfloat16 and a copy on the device."""
    x, y = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    large = jnp.ones(16 * n * n, jnp.bfloat16)

    product, copy = seconds(jax.jit(lambda a, b: a @ b), x, y), seconds(jax.jit(lambda a: a + 1), large)
    return {'product_tflops': 2 * n**3 / product / 1e12, 'copy_tb_s': 2 * large.nbytes / copy / 1e12}


def table(rows: dict[str, dict]) -> str:
    """Returns the figures of parts as lines, columns that none has left out."""
    columns = {k: v for k, v in COLUMNS.items() if any(k in r for r in rows.values())}
    lines = [['part', *(title for title, _ in columns.values())]]
    for name, row in rows.items():
        lines.append([name, *(format(row[k], how) if k in row else '' for k, (_, how) in columns.items())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join(
        '  '.join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def run_part(part: Part, mesh, runs: bool, texts: str = '') -> dict:
    """Returns the figures of a part, timed where it `runs`, or what it fails of."""
    try:
        with jax.set_mesh(mesh):
            c = compile_part(part, mesh, texts)
            figures = c.figures | rates(part, c, c.figures['roof_ms'] / 1e3)
            if runs:
                took = time_part(c)
                peak = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0) / 1e9
                figures |= {'seconds': took, 'peak_gb': peak} | rates(part, c, took)
        return figures | {'kernels': roofline.most_expensive(c.kernels, TOP)}
    except Exception as e:  # the other parts run all the same
        return {'failed': f'{type(e).__name__}: {" ".join(str(e).split())[:400]}'}


def main(_):
    began, tiny = time.monotonic(), SIZE.value == 'tiny'
    cli.set_up_accelerators()
    if COMPILE.value:
        targets.prepare('h100')
        mesh = sharding.make_mesh(1, 1, devices=targets.devices('h100', 1))
    else:
        mesh = sharding.make_mesh(1, 1)
        report(device=jax.devices()[0].device_kind, jax=jax.__version__, **ceilings(256 if tiny else 8192))
    rows = {}
    for name in CHOSEN.value:
        if time.monotonic() - began > BUDGET.value:
            rows[name] = {'failed': 'not begun: --budget is spent'}
        else:
            part = full_size.small(PARTS[name]) if tiny else PARTS[name]
            rows[name] = run_part(part, mesh, not COMPILE.value, TEXTS.value)
        report(
            part=name,
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in rows[name].items() if k != 'kernels'},
        )
        print(*rows[name].get('kernels', []), sep='\n', flush=True)
    print('\n' + table(rows))
    if JSON.value:
        files.write_json(pathlib.Path(JSON.value), rows)
    if not COMPILE.value:
        agreement.main(*(((FAMILY,), ('float32',)) if tiny else ()))


if __name__ == '__main__':
    COMPILE = flags.DEFINE_bool('compile', False, 'Compile for an H100 that is not there, and run nothing.')
    SIZE = flags.DEFINE_enum('size', 'full', ['full', 'tiny'], 'tiny: the same parts with small shapes.')
    CHOSEN = flags.DEFINE_list('parts', [*PARTS], 'Which parts, in this order.')
    BUDGET = flags.DEFINE_float('budget', 470.0, 'Seconds after which no further part starts.')
    JSON = flags.DEFINE_string('json', '', 'File for the figures of all parts, with their kernels.')
    TEXTS = flags.DEFINE_string('texts', '', 'Folder for the texts of the compiled programs.')
    app.run(main)
