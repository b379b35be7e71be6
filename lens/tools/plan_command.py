"""`python -m lens.main --config=… --plan`: compiles the train steps for the mesh of a configuration and prints their needs."""

import functools
import pathlib
import time

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lens import checks, hf, sharding
from lens.errors import LensError
from lens.tools import plan, plan_text

DEVICES = 8  # with mesh.data=-1
SEQ_LEN, DOCUMENTS = 4096, 100_000  # where the data is not there


class PlanError(LensError):
    """There is not enough to plan from; the message names what is missing."""


def run(cfg, device_gb: float) -> int:
    """Prints the plan of `cfg` for devices of `device_gb` * 1e9 bytes. Returns 0 when it fits, else 1.

    Only CPU devices are made, as many as the mesh has. Raises LensError for what a configuration alone shows to
    be impossible.
    """
    checks.check_values(cfg)
    _pretend_devices(cfg)
    if not cfg.phases:
        raise PlanError('phases is empty: there is nothing to plan.')
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model, cfg.mesh.replica)
    job, ships_packed, notes = _open(cfg)
    for name in cfg.phases:
        checks.check_phase(cfg, name)
    checks.check_batches(cfg, mesh)
    sizes = ', '.join(f'{k} {v}' for k, v in mesh.shape.items() if v > 1) or 'no mesh'
    print(f'{cfg.subject.path} on {mesh.size} device{"s" * (mesh.size > 1)} ({sizes}); no device is touched')
    for note in notes:
        print(f'  {note}')
    print('  temporaries and collectives: of the CPU program with a float32 subject, upper bounds for 16 bits')
    print('  not counted: evaluation, fragmentation, workspaces of kernels')
    device, programs, needs, totals = device_gb * plan_text.GB, {}, {}, {}
    with jax.set_mesh(mesh):
        steps = list(plan.steps(cfg, job, mesh))
    for step in steps:
        name = step.phase.name
        print()
        programs[name] = _compile('as configured', cfg, job, mesh, name)
        with jax.set_mesh(mesh):
            needs[name] = step.needs()
        totals[name] = needs[name].given + programs[name].temporaries
        _print(step, needs[name], programs[name], cfg.subject.dtype, mesh.size, device)
    print('\n' + '\n'.join(plan_text.verdict(totals, device)))
    full = [name for name, total in totals.items() if total > device]
    if full:
        found = []
        for change, values in plan.changes(cfg, mesh, full, ships_packed):
            compiling = functools.partial(_compile, change)
            found.append(plan.remedy(change, values, cfg, job, full, device, compiling))
        print('\n' + '\n'.join(plan_text.changes(found, needs, device)))
    return 1 if full else 0


def _pretend_devices(cfg) -> None:
    """As many CPU devices as the mesh has."""
    m = cfg.mesh
    if m.data == -1:
        m.data = max(1, DEVICES // (m.model * m.replica))
        print(f'mesh.data=-1: {m.data} is taken, for {m.data * m.model * m.replica} devices')
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', max(1, m.data * m.model * m.replica))


def _open(cfg) -> tuple[plan.Job, bool, list[str]]:
    """(the job, whether the experts are MXFP4 on disk, what was assumed)."""
    path, notes = pathlib.Path(cfg.subject.path), []
    if path.suffix == '.json':
        tokenizer = plan.WordTokenizer()
        notes.append(f'prompts are counted in words: {path} is no folder with a tokenizer')
    else:
        path = _folder(cfg.subject.path)
        tokenizer = hf.load_tokenizer(path)
    c = hf.read_config(path)
    checks.check_subject(cfg, c)
    ships_packed = hf.ships_packed(path)
    if cfg.subject.packed and not ships_packed:
        raise PlanError(f'{cfg.subject.path} does not say that its experts are MXFP4: plan without subject.packed.')
    seq_len, documents = _rows(cfg, c.max_positions, notes)
    return plan.Job(c, plan.read_texts(cfg, tokenizer), seq_len, documents), ships_packed, notes


def _folder(path: str) -> pathlib.Path:
    """The folder of the subject, or of its config and tokenizer from the Hub."""
    try:
        return hf.local_directory(path, weights=False)
    except hf.ModelError as e:
        raise PlanError(
            f'subject.path={path} is no folder, and the Hub gave none: set --config.subject.path= to a folder with '
            'config.json and tokenizer, or to a config.json file alone.'
        ) from e


def _rows(cfg, max_positions: int, notes: list[str]) -> tuple[int, int]:
    """(tokens of a row, training documents) of the data folder, or what is taken without one."""
    file = pathlib.Path(cfg.data.path) / 'train/tokens.npy'
    try:
        documents, seq_len = np.load(file, mmap_mode='r', allow_pickle=False).shape
    except FileNotFoundError:
        seq_len, documents = min(SEQ_LEN, max_positions), DOCUMENTS
        notes.append(f'rows of {seq_len} tokens and {documents} documents are assumed: {file} is not there')
        return seq_len, documents
    except (ValueError, EOFError):
        raise PlanError(f'{file} is no array of rows of tokens: make the data again.') from None
    notes.append(f'rows of {seq_len} tokens, {documents} documents: {file}')
    if seq_len > max_positions:
        raise PlanError(f'{file} has {seq_len} tokens a row, the subject reads {max_positions}.')
    return seq_len, documents


def _compile(what: str, cfg, job: plan.Job, mesh, name: str) -> plan.Program:
    """As plan.compile_phase, with the time that it takes on the terminal. what: is planned, in words."""
    began, i, n = time.monotonic(), cfg.phases.index(name) + 1, len(cfg.phases)
    words = f'{what}, phase {i} of {n}, {name}'
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn('{task.description}'), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(f'Compiling {words}')
        program = plan.compile_phase(cfg, job, mesh, name)
    print(f'Compiled {words}: {time.monotonic() - began:.0f} s', flush=True)
    return program


def _print(step: plan.Step, needs: plan.Needs, program: plan.Program, dtype: str, devices: int, device: float) -> None:
    lines = [plan_text.heading(step), *plan_text.memory(needs, program, dtype, device)]
    print('\n'.join([*lines, plan_text.work(step.flops(), devices), *plan_text.traffic(program)]), flush=True)
