"""How a step grows: its time against every size, and what it sends between devices.

    python -m benchmarks.scaling                # all of it, on a CPU that has nothing else to do, in about 15 minutes
    python -m benchmarks.scaling --parts=wire   # no clock: also on a busy one

time   a GRPO step of a small model, one size doubled at a time: seconds beside the FLOPs that the step needs. Where
       work is linear the seconds are a line (with a start: the other sizes stay), so `of growth` doubles with the size.
wire   steps on eight fake devices: collectives and bytes that each device sends in a step, read from the compiled
       program, loops multiplied out; then recipes at full size, with a float32 subject. Split: over `data`, as trained
       leaves of a large model are (sharding.SPLIT_ABOVE).

Prints tables, and writes OUT/scaling.json and OUT/scaling.svg.
"""

import dataclasses
import functools
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags
from flax import nnx
from matplotlib.figure import Figure

from benchmarks.full_size import open_recipe
from benchmarks.roofline import COLLECTIVES, by_kind, collectives
from benchmarks.timing import seconds
from configs import base
from lens import files, flops, lens_init, response, sharding
from lens.models.rope import Rope
from lens.models.transformer import Transformer, TransformerConfig
from lens.objectives import OBJECTIVES
from lens.tools import plan
from lens.train import init_state, micro_step, trace

DEVICES = 8
MODEL = TransformerConfig(  # DEVICES divide what `model` splits
    family='llama',
    vocab_size=1000,
    d_model=144,
    n_layers=4,
    n_heads=16,
    n_kv_heads=8,
    head_dim=12,
    d_ff=352,
    norm_eps=1e-5,
    tied=True,
    max_positions=1024,
    ropes=(Rope(10000.0),),
)
UNTUNED = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}  # they are never run
SIZES = {'rows': 4, 'tokens': 16, 'vectors': 2, 'group': 4, 'text': 64, 'layers': 2}
TEXTS = response.Texts(response.Prompt([1, 2, 3], [4]), ([5], [6, 7]), (1, 2, 3, 8, 4), response.NO_TAGS)
TRAINED = ('maps', 'lora', 'full')


def small(objective: str, trained: str, sizes: dict[str, int]):
    """Returns (configuration, job) of a phase of MODEL. sizes: rows are documents of `text` tokens, `tokens` those of an
    explanation."""
    cfg = base.get_config()
    cfg.phases, cfg.explanation_len, cfg.layer = (objective,), sizes['tokens'], sizes['layers'] // 2
    cfg.decoder.train = cfg.encoder.train = trained
    cfg.lora.pattern, cfg.lora.rank = '.*', 8
    cfg[objective].documents, cfg[objective].vectors = sizes['rows'], sizes['vectors']
    cfg[objective].group = sizes['group']
    c = dataclasses.replace(MODEL, n_layers=sizes['layers'])
    return cfg, plan.Workload(c, TEXTS, sizes['text'], 1000, False)


@functools.cache  # the smallest of every size is one step
def step_seconds(**sizes: int) -> tuple[float, float]:
    """Returns seconds of a GRPO step, median, and its FLOPs."""
    cfg, job = small('grpo', 'maps', sizes)
    mesh, key, d = sharding.make_mesh(1, 1), jax.random.key(0), MODEL.d_model
    with jax.set_mesh(mesh):
        phase, _, _, batch = next(plan.steps(cfg, job, mesh))
        model = sharding.place(jax.jit(lambda: Transformer(job.c, rngs=nnx.Rngs(0)))(), mesh)
        eye = jnp.eye(d), jnp.zeros(d)
        start = lens_init.Start(jax.tree.map(lambda x: x[None], eye), eye)
        lens = jax.jit(lambda b: lens_init.make_lens(cfg, TEXTS, b, start, key))(model)
        rng = np.random.default_rng(0)
        most = {'tokens': MODEL.vocab_size, 'positions': sizes['text']}
        batch = sharding.put_batch({k: rng.integers(0, most[k], x.shape, np.int32) for k, x in batch.items()}, mesh)
        state = init_state(sharding.place(lens, mesh), phase, mesh)
        work = sum(sum(flops.by_scope(x.jaxpr, job.c).values()) for x in trace(phase, state, model, batch, key))
        knobs = phase.knobs(0)

        def step():
            nonlocal state  # which a step takes for itself
            state, figures = micro_step(phase, state, model, batch, key, knobs)
            return figures

        return seconds(step), work


def times() -> list[dict]:
    """Measures every size and its doublings; prints their table."""
    out = []
    print('| size | | s a step | of growth | GFLOP | GFLOP/s |\n|---|---|---|---|---|---|')
    for name, first in SIZES.items():
        before = None
        for k in range(DOUBLINGS.value + 1):
            value = first * 2**k
            s, work = step_seconds(**SIZES | {name: value})
            growth = '' if before is None else f'{s - before:+.4f}'
            before = s
            out.append({'size': name, 'value': value, 's': s, 'flop': work})
            print(f'| {name} | {value} | {s:.4f} | {growth} | {work / 1e9:.2f} | {work / s / 1e9:.1f} |', flush=True)
    return out


def draw(rows: list[dict], file: pathlib.Path) -> None:
    """Draws seconds and FLOPs of a step against each size as multiples of those at the smallest one."""
    figure = Figure(figsize=(11, 6.4), layout='constrained')
    axes = figure.subplots(2, 3).flat
    for name, ax in zip(SIZES, axes, strict=True):
        mine = [r for r in rows if r['size'] == name]
        x = np.array([r['value'] for r in mine])
        for what, style in (('s', 'o-'), ('flop', 'k--')):
            y = np.array([r[what] for r in mine])
            ax.plot(x, y / y[0], style, label={'s': 'seconds', 'flop': 'FLOPs needed'}[what])
        ax.plot(x, x / x[0], ':', color='gray', label='proportional')
        ax.set(xlabel=name, xlim=(0, None), ylim=(0, None), title=f'a step against {name}')
        ax.legend(fontsize=8)
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'lens'}):  # text, not outlines
        figure.savefig(file, metadata={'Date': None} if file.suffix == '.svg' else None)


def sent(name: str, cfg, job: plan.Workload, mesh, **more) -> dict:
    """Compiles the step of a phase and prints a row of the table: what a device sends in it."""
    cfg.subject.dtype = 'float32'
    with jax.set_mesh(mesh):
        step = next(x for x in plan.steps(cfg, job, mesh) if x[0].name == name)
        programs = trace(*step, jax.eval_shape(jax.random.key, 0))
        texts = [x.lower().compile(compiler_options=UNTUNED).as_text() for x in programs]
    found, state = [x for text in texts for x in collectives(text, step[0].hparams.length)], step[1]
    n = sharding.row_count(mesh)
    row = more | {'phase': name, 'mesh': {k: v for k, v in mesh.shape.items() if v > 1}}
    row |= {kind: by_kind(found).get(kind, (0, 0)) for kind in COLLECTIVES}
    row['in_sampling'] = sum(x.total for x in found if '/decode/' in x.source)
    row['gradients'] = 2 * (n - 1) / n * sum(x.size * 4 for x in jax.tree.leaves(state.params))
    cells = (f'{k:,.0f} x {b / 1e6:.3f}' if k else '' for k, b in (row[kind] for kind in COLLECTIVES))
    what = f'{more["model"]} | {name} | {more["trains"]} | {", ".join(f"{k} {v}" for k, v in row["mesh"].items())}'
    all_of_it = sum(x.total for x in found)
    last = f'{all_of_it / 1e6:.3f} | {row["in_sampling"] / 1e6:.3f} | {row["gradients"] / 1e6:.3f}'
    print(f'| {what} | {" | ".join(cells)} | {last} |', flush=True)
    return row


def wire() -> list[dict]:
    """Compiles objectives x what trains x meshes, then recipes at full size; prints their table."""
    print('MB that each device sends in a step: collectives x MB of all of them; gradients: those of all that trains')
    print(f'| model | phase | trains | mesh | {" | ".join(COLLECTIVES)} | all | in sampling | gradients |')
    print('|---' * (len(COLLECTIVES) + 7) + '|')
    rows, sizes = [], SIZES | {'rows': DEVICES}
    places = ((DEVICES, 1, ''), (DEVICES, 1, ', split'), (1, DEVICES, ''))
    for objective in OBJECTIVES:
        for trained in TRAINED:
            for data, model, split in places:
                cfg, job = small(objective, trained, sizes)
                above = 0 if split else sharding.SPLIT_ABOVE
                with mock.patch.object(sharding, 'SPLIT_ABOVE', above):
                    mesh = sharding.make_mesh(data, model)
                    rows.append(sent(objective, cfg, job, mesh, model='small', trains=trained + split))
    for recipe in RECIPES.value:
        cfg, job = open_recipe(recipe)
        mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model)
        for name in cfg.phases:
            rows.append(sent(name, cfg, job, mesh, model=recipe, trains=cfg.decoder.train))
    return rows


def main(_):
    out, found = pathlib.Path(OUT.value), {}
    out.mkdir(parents=True, exist_ok=True)
    if 'wire' in PARTS.value:
        found['wire'] = wire()
    if 'time' in PARTS.value:
        found['time'] = times()
        draw(found['time'], out / 'scaling.svg')
    files.write_json(out / 'scaling.json', found | {'jax': jax.__version__})


if __name__ == '__main__':
    PARTS = flags.DEFINE_multi_enum('parts', ['time', 'wire'], ['time', 'wire'], 'What is made.')
    OUT = flags.DEFINE_string('out', 'runs/scaling', 'Folder of the table and the plot.')
    DOUBLINGS = flags.DEFINE_integer('doublings', 3, 'Of every size.')
    RECIPES = flags.DEFINE_multi_string('recipes', ['nla_qwen2_5_7b'], 'NAME or NAME:ARGUMENT, for wire.')
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', DEVICES)
    app.run(main)
