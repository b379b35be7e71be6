"""What a configuration needs on each device: `python -m lens.main --config=… --plan [--device=h100] [--device_gb=80]`.

Nothing is allocated and no weights are read. What a step is given (base, trained parameters, optimizer, reference) is
exact, in the dtypes of the run. What it needs besides is read from the program that XLA makes for as many devices: of
--device where the plugin of JAX for it is installed, no such device being needed (targets.py). Without a plugin it is the
program for CPUs, with the frozen base in float32: on CPU a 16-bit program would convert whole stacks of weights first.
Both are upper bounds then, where the run has 16 bits. Of a device's memory JAX is given cli.MEMORY_FRACTION.
"""

import collections
import math
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import checks, cli, config, data, flops, hf, keys, lens_init, objectives, places, reopen, response, sharding
from lens.config import Phase
from lens.errors import LensError, require
from lens.interchange.reading import configured
from lens.models import moe
from lens.models.transformer import Transformer, TransformerConfig
from lens.response import Texts
from lens.tools import targets
from lens.train import State, abstract_state, trace

GB = 1e9
DEVICES, MOST_DEVICES = 8, 2048  # with mesh.data=-1; that start within seconds
MODEL_SIZES = (2, 4, 8)  # of mesh.model, tried where a configuration does not fit
SEQ_LEN, DOCUMENTS = 4096, 100_000  # where the data is not there
MARGIN = 0.1  # spare memory below which a plan warns
TOO_MUCH = re.compile(r'^RESOURCE_EXHAUSTED.*\(([\d.]+)G\) exceeds', re.DOTALL)  # as the compiler for TPUs says it
CPU_NOTE = 'temporaries: of the CPU program with a float32 subject, an upper bound for 16 bits'


class WordTokenizer:
    """Stands in for a tokenizer that is not there: words, other signs and special tokens are one token each."""

    def __init__(self):
        self.ids = {}

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        words = re.findall(rf'{response.SPECIAL_LITERAL}|<[^<>\s]+>|[A-Za-z0-9_]+|[^\s]', text)
        return {'input_ids': [self.ids.setdefault(w, len(self.ids)) for w in words]}


class Workload(NamedTuple):
    """What is planned, beside configuration and mesh. seq_len: tokens of a row, 0 where activations are stored. ships_packed:
    the subject's experts are MXFP4 on disk. devices: for which it is compiled, those of this process where there are none."""

    c: TransformerConfig
    texts: Texts
    seq_len: int
    documents: int
    ships_packed: bool
    devices: Sequence | None = None


class Needs(NamedTuple):
    """Bytes on one device in one phase. temporaries: None where the step has not been compiled."""

    base: int
    trained: int
    optimizer: int
    reference: int
    temporaries: int | None = None

    @property
    def total(self) -> int:
        return sum(x or 0 for x in self)


def per_device(tree) -> int:
    """Returns bytes of one device's share of abstract arrays that carry placements."""
    shares = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * size for shape, size in shares)


def steps(cfg, job: Workload, mesh) -> Iterator[tuple[Phase, State, Transformer, dict]]:
    """Yields every phase with state, base and batch of its step, as placed shapes. Call under set_mesh(mesh)."""
    base = config.abstract_base(cfg, job.c, mesh)
    lens = lens_init.abstract_lens(cfg, job.texts, base, mesh)
    for phase in config.make_phases(cfg, job.texts, job.documents):
        shapes = {'positions': (phase.documents, phase.vectors)}
        if job.seq_len:
            shapes['tokens'] = phase.documents, job.seq_len
        else:
            shapes['activations'] = *shapes['positions'], job.c.d_model
        if phase.labelled:
            shapes['explanations'] = (*shapes['positions'], phase.hparams.length)
        place = {k: jax.sharding.NamedSharding(mesh, sharding.rows(len(s))) for k, s in shapes.items()}
        kinds = {k: jnp.float32 if k == 'activations' else jnp.int32 for k in shapes}
        batch = {k: jax.ShapeDtypeStruct(s, kinds[k], sharding=place[k]) for k, s in shapes.items()}
        yield phase, abstract_state(lens, phase, mesh), base, batch


def needs(cfg, job: Workload, mesh) -> dict[str, Needs]:
    """Returns what the step of every phase is given."""
    with jax.set_mesh(mesh):
        given = {p.name: (base, s.params, s.opt, (s.reference, s.judge)) for p, s, base, _ in steps(cfg, job, mesh)}
        return {name: Needs(*map(per_device, parts)) for name, parts in given.items()}


def compile_step(cfg, job: Workload, mesh, name: str) -> list[tuple[jax.stages.Traced, jax.stages.Compiled]]:
    """Compiles the reading and the step of phase `name` as the head of this file says, in up to a minute."""
    cfg = cfg.copy_and_resolve_references()
    if on_cpu(mesh):
        cfg.subject.dtype = 'float32'
        if job.c.n_experts:
            (cfg.subject.experts,) = moe.PLANNED
    with jax.set_mesh(mesh):
        step, key = next(x for x in steps(cfg, job, mesh) if x[0].name == name), jax.eval_shape(jax.random.key, 0)
        return [(traced, traced.lower().compile()) for traced in trace(*step, key)]


def on_cpu(mesh) -> bool:
    return mesh.devices.flat[0].platform == 'cpu'


def compile_phase(cfg, job: Workload, mesh, name: str) -> tuple[int, dict[str, float]]:
    """Returns (bytes of the temporaries of a step on one device, its FLOPs by part).

    Of a program that a compiler refuses since it would not fit, the temporaries that it names, and no FLOPs. On CPU one
    layer's experts are among the temporaries: a kernel for grouped products may copy them, unlike what is
    compiled in its place (moe.PLANNED).
    """
    try:
        programs = compile_step(cfg, job, mesh, name)
    except jax.errors.JaxRuntimeError as e:
        named = TOO_MUCH.search(str(e))
        if named is None:
            raise
        return int(float(named[1]) * 2**30), {}
    experts = per_device(config.abstract_base(cfg, job.c, mesh).blocks.moe) // job.c.n_layers if on_cpu(mesh) else 0
    temporaries = max(compiled.memory_analysis().temp_size_in_bytes for _, compiled in programs)
    work = collections.Counter()
    for traced, _ in programs:
        work.update(flops.by_scope(traced.jaxpr, job.c))
    return temporaries + experts, work


def changes(cfg, mesh, full: list[str], ships_packed: bool) -> Iterator[dict]:
    """Yields values of dotted keys that may help on the same number of devices. full: phases that do not fit."""
    data, model = mesh.shape['data'], mesh.shape['model']
    if data > 1 and not cfg.mesh.shard_base:
        yield {'mesh.shard_base': True}
    if ships_packed and not cfg.subject.packed and 'full' not in (cfg.decoder.train, cfg.encoder.train):
        yield {'subject.packed': True}
    for size in MODEL_SIZES:
        if size > model and data * model % size == 0:
            yield {'mesh.model': size, 'mesh.data': data * model // size}
    parts = [_part(cfg[name], name, sharding.row_count(mesh)) for name in full]
    if all(parts):
        yield {k: v for part in parts for k, v in part.items()}


def _part(p, name: str, devices: int) -> dict:
    """Fewer documents at a time in a phase: slices, where they can be had, change nothing else; else half of them."""
    if 'slices' in objectives.OBJECTIVES[p.objective].reads and not p.resample:
        for n in (4 * p.slices, 2 * p.slices):
            if p.documents % (n * devices) == 0:
                return {f'{name}.slices': n}
    n = p.documents // 2
    return {f'{name}.documents': n} if n % (p.slices * devices) == 0 and n * p.vectors >= 2 else {}


def after(
    values: dict, cfg, job: Workload, full: list[str], device: float, compiling=compile_phase
) -> tuple[str, Needs]:
    """Returns the phase that needs most once `cfg` has other values of dotted keys, and its needs.

    Compiled where it may fit in `device` bytes, the phases `full` first and no more once one is too much.
    """
    cfg = cfg.copy_and_resolve_references()
    cfg.update_from_flattened_dict(values)
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model, cfg.mesh.replica, job.devices)
    given, found = needs(cfg, job, mesh), {}
    most = max(given, key=lambda x: given[x].total)
    if given[most].total > device:
        return most, given[most]
    for name in sorted(given, key=lambda x: x not in full):
        found[name] = given[name]._replace(temporaries=compiling(cfg, job, mesh, name)[0])
        if found[name].total > device:
            break
    most = max(found, key=lambda x: found[x].total)
    return most, found[most]


def run(cfg, target: str = '', device_gb: float | None = None, compiling=compile_phase) -> int:
    """Prints the plan of `cfg` for devices `target` (targets.TARGETS, '' for the first whose compiler is there) of
    `device_gb` * 1e9 bytes, where given. Returns 0 when it fits, else 1.

    No device is touched but those of the CPU. Raises LensError for what a configuration alone shows to be impossible.
    """
    checks.check_values(cfg)
    cfg = configured(cfg, places.locate(cfg, pathlib.Path()))
    target = target or targets.default()
    keys.choice(target, targets.TARGETS, '--device')
    devices = pretend_devices(cfg, target)
    require(len(cfg.phases) > 0, 'phases is empty: there is nothing to plan.')
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model, cfg.mesh.replica, devices)
    card = targets.TARGETS[target].memory_gb if device_gb is None else device_gb
    share = cli.MEMORY_FRACTION
    device, limit = share * card * GB, f'{share * card:.1f} GB ({share} of {card:.1f})'
    job, notes = open_job(cfg)
    job = job._replace(devices=devices)
    for name in cfg.phases:
        checks.check_phase(cfg, name)
    checks.check_batches(cfg, mesh)
    _check_start(places.locate(cfg, pathlib.Path()), job, mesh)
    sizes = ', '.join(f'{k} {v}' for k, v in mesh.shape.items() if v > 1) or 'no mesh'
    print(f'{cfg.subject.path} on {mesh.size} device{"s" * (mesh.size > 1)} ({sizes}); no device is touched')
    notes.append(CPU_NOTE if on_cpu(mesh) else f'temporaries: of the program of the compiler for {target}')
    bound = 'at most' if on_cpu(mesh) else 'as compiled'
    print('\n'.join(f'  {x}' for x in [*notes, 'not counted: evaluation, fragmentation, workspaces of kernels']))
    found = {}
    for name, given in needs(cfg, job, mesh).items():
        print(f'\nPhase {name}: ', end='', flush=True)
        began, found[name], work = time.monotonic(), given, {}
        if given.total > device:
            print('too much before it computes anything')
        else:
            print('compiling, ', end='', flush=True)
            temporaries, work = compiling(cfg, job, mesh, name)
            found[name] = given._replace(temporaries=temporaries)
            print(f'{time.monotonic() - began:.0f} s')
        print('\n'.join(describe(found[name], work, cfg.subject.dtype, device, bound)))
    most = max(found, key=lambda x: found[x].total)
    full = [name for name, n in found.items() if n.total > device]
    if not full:
        print(f'\nFits in {limit}: phase {most} needs most, {bound} {spare(found[most], device)}.')
        if found[most].total > (1 - MARGIN) * device:
            print(f'Under {MARGIN:.0%} to spare: fragmentation and workspaces of kernels are not counted.')
        return 0
    print(f'\nDoes not fit in {limit}: phase {most} needs {spare(found[most], device)}.')
    fits = False
    for values in changes(cfg, mesh, full, job.ships_packed):
        name, then = after(values, cfg, job, full, device, compiling)
        fits |= then.total <= device
        without = '' if then.temporaries is not None else ' without temporaries'
        change = ' '.join(f'{k}={v}' for k, v in values.items())
        print(f'  with {change}: base {then.base / GB:.2f}, phase {name}{without} {spare(then, device)}', flush=True)
    if not fits:
        print('None of the changes that are known here is enough: more or larger devices, or a smaller subject.')
    return 1


def _check_start(cfg, job: Workload, mesh) -> None:
    """Raises LensError where the run would start from a lens that is here and does not fit, by its headers. Prompts that
    are counted in words have other sizes."""
    if cfg.init_from and pathlib.Path(cfg.init_from).is_dir() and not cfg.subject.path.endswith('.json'):
        with jax.set_mesh(mesh):
            base = config.abstract_base(cfg, job.c, mesh)
            reopen.check_start(cfg, lens_init.abstract_lens(cfg, job.texts, base, mesh), base)


def describe(n: Needs, work: dict[str, float], dtype: str, device: float, bound: str) -> list[str]:
    """Returns lines on the memory of one device, in GB, and on the FLOPs of a step on all. bound: what temporaries are."""
    notes = f'frozen, {dtype}', 'float32', 'its moments', 'the decoder at the start of the phase', bound
    lines = [f'  {k:12}{x / GB:8.2f} GB  {note}' for k, x, note in zip(n._fields, n, notes, strict=True) if x]
    lines.append(f'  total {bound if n.temporaries is not None else "at least"} {spare(n, device)}')
    named = ', '.join(f'{k} {v:.2g}' for k, v in work.items() if v)
    return [*lines, f'  FLOPs of a step, all devices: {named}'] if named else lines


def spare(n: Needs, device: float) -> str:
    """Returns '8.60 GB, 1.4 GB (14%) to spare' or what is too much for `device` bytes."""
    left = device - n.total
    rest = f'{-left / GB:.1f} GB too much' if left < 0 else f'{left / GB:.1f} GB ({left / device:.0%}) to spare'
    return f'{n.total / GB:.2f} GB, {rest}'


def pretend_devices(cfg, target: str) -> list:
    """Makes as many devices of a target as the mesh has."""
    m = cfg.mesh
    if m.data == -1:
        m.data = max(1, DEVICES // (m.model * m.replica))
        print(f'mesh.data=-1: {m.data} is taken, for {m.data * m.model * m.replica} devices')
    n = m.data * m.model * m.replica
    require(n <= MOST_DEVICES, f'the mesh has {n} devices, a plan can make {MOST_DEVICES}: plan a smaller mesh.data.')
    targets.prepare(target)
    return targets.devices(target, max(1, n))


def open_job(cfg) -> tuple[Workload, list[str]]:
    """Returns the job and what was assumed. A subject.path of a config.json alone has its prompts counted in words."""
    cfg = places.locate(cfg, pathlib.Path())
    path, notes = pathlib.Path(cfg.subject.path), []
    if path.suffix == '.json':
        notes.append(f'prompts are counted in words: {path} is no folder with a tokenizer')
    else:
        try:
            path = hf.local_directory(cfg.subject.path, weights=False)
        except LensError as e:
            raise LensError(
                f'subject.path={path} is no folder, and the Hub gave none: set --config.subject.path= to a folder with '
                'config.json and tokenizer, or to a config.json file alone.'
            ) from e
    c, ships_packed = hf.read_config(path), hf.ships_packed(path)
    tokenizer = WordTokenizer() if path.suffix == '.json' else hf.load_tokenizer(path)
    checks.check_subject(cfg, c)
    require(
        ships_packed or not cfg.subject.packed,
        f'{cfg.subject.path} does not say that its experts are MXFP4: plan without subject.packed.',
    )
    texts = config.read_texts(cfg, tokenizer, math.inf if isinstance(tokenizer, WordTokenizer) else c.vocab_size)
    checks.check_lengths(cfg, c, texts)
    return Workload(c, texts, *_rows(cfg, c, texts, notes), ships_packed), notes


def _rows(cfg, c: TransformerConfig, texts: Texts, notes: list[str]) -> tuple[int, int]:
    """Returns (tokens of a row, 0 of stored activations, training documents) of the data, or what is taken without it."""
    file, stored = (pathlib.Path(cfg.data.path) / f'train/{name}.npy' for name in ('tokens', 'activations'))
    if stored.exists() or pathlib.Path(cfg.data.path).is_file():
        split = data.open_split(cfg.data.path, 'train', vocab_size=c.vocab_size)
        checks.check_stored(cfg, c, split)
        split = data.readable(split, cfg.data.positions, cfg.data.min_pos)
        for name in cfg.phases:
            checks.check_documents(cfg, name, split, texts.tags)
        notes.append(f'stored activations of {len(split)} documents, {split.activations.shape[1]} a row: {stored}')
        return 0, len(split)
    if not file.exists():
        notes.append(f'rows of {min(SEQ_LEN, c.max_positions)} tokens and {DOCUMENTS} documents are assumed: no {file}')
        return min(SEQ_LEN, c.max_positions), DOCUMENTS
    documents, seq_len = data.load(file, (None, None)).shape
    require(seq_len <= c.max_positions, f'{file} has {seq_len} tokens a row, the subject reads {c.max_positions}.')
    notes.append(f'rows of {seq_len} tokens, {documents} documents: {file}')
    return seq_len, documents
