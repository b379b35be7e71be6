"""What a configuration needs on each device, from shapes alone: nothing is allocated, no weights are read.

What a step is given (base, trained parameters, optimizer, reference) is exact, in the dtypes of the run. What it needs
besides is read from the program that XLA makes for as many CPU devices, with the frozen base in float32: on CPU a
16-bit program would convert whole stacks of weights first. Both are upper bounds where the run has 16 bits.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens import config, response, sharding
from lens.config import Phase
from lens.lens_init import State, abstract_lens, abstract_state
from lens.models import moe
from lens.models.lens import Lens
from lens.models.transformer import Transformer, TransformerConfig
from lens.response import Prompt, Tags
from lens.tools import flops, hlo
from lens.train import train_step

MODEL_SIZES = (2, 4, 8)  # of mesh.model, tried where a configuration does not fit


class Texts(NamedTuple):
    """The texts of a configuration as token ids. natural: the decoder prompt with a word for the activation."""

    decoder: Prompt
    encoder: tuple[list[int], list[int]]
    natural: list[int]
    tags: Tags


class WordTokenizer:
    """Stands in for a tokenizer that is not there: words, other signs and special tokens are one token each."""

    def __init__(self):
        self.ids = {}

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        words = re.findall(rf'{response.SPECIAL_LITERAL}|<[^<>\s]+>|[A-Za-z0-9_]+|[^\s]', text)
        return {'input_ids': [self.ids.setdefault(w, len(self.ids)) for w in words]}


def read_texts(cfg, tokenizer) -> Texts:
    """Raises LensError."""
    natural = cfg.decoder.prompt.replace(response.EMBED, 'something')
    return Texts(
        response.decoder_prompt(tokenizer, cfg.decoder.prompt, cfg.decoder.marker),
        response.encoder_prompt(tokenizer, cfg.encoder.prompt),
        tokenizer(natural, add_special_tokens=False)['input_ids'],
        response.tags(tokenizer, cfg.explanation_open, cfg.explanation_close),
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """What is planned, but for the configuration and the mesh. c: of the subject. seq_len: tokens of a row of data.
    documents: training documents; None where no duration may count epochs."""

    c: TransformerConfig
    texts: Texts
    seq_len: int
    documents: int | None = None


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes on one device in one phase. reference: the decoder at the start of the phase, where the objective
    compares with it. cache: keys and values of all texts that a step draws; a part of the step's temporaries."""

    base: int
    trainable: int
    optimizer: int
    reference: int
    cache: int

    @property
    def given(self) -> int:
        """All that a step is given; it stays on the device from step to step."""
        return self.base + self.trainable + self.optimizer + self.reference


@dataclasses.dataclass(frozen=True)
class Program:
    """Of a compiled step, on one device: bytes of its temporaries, and what it moves between devices.

    experts: those of the temporaries that are one layer's experts, which a kernel for grouped products may need as
    a copy of their own, unlike what is compiled here in its place (moe.PLANNED).
    """

    temporaries: int
    experts: int
    collectives: tuple[hlo.Collective, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """The train step of one phase, as shapes with placements."""

    phase: Phase
    base: Transformer
    lens: Lens
    state: State
    batch: dict[str, jax.ShapeDtypeStruct]

    def lower(self):
        """Traces the step: what cannot run raises here."""
        p, key = self.phase, jax.eval_shape(lambda: jax.random.key(0))
        static = {'objective': p.objective, 'hparams': p.hparams, 'tx': p.tx}
        return train_step.lower(self.state, self.base, self.batch, key, **static)

    def needs(self) -> Needs:
        p, hp = self.phase, self.phase.hparams
        texts = 0 if p.labelled else p.documents * p.vectors * hp.group * hp.mean_of
        length = self.lens.decoder.prompt_len + hp.length
        cache = jax.eval_shape(lambda b: b.empty_cache(texts, length), self.base) if texts else ()
        parts = (self.base, self.state.params, self.state.opt, self.state.reference, cache)
        return Needs(*map(per_device, parts))

    def flops(self) -> dict[str, float]:
        """Of all devices together, by part."""
        return flops.step_flops(self.base.config, self.phase, self.lens, self.batch['tokens'].shape[1])


def per_device(tree) -> int:
    """Bytes of one device's share of abstract arrays that carry placements."""
    shares = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * size for shape, size in shares)


def abstract_batch(phase: Phase, seq_len: int, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """One step's batch as data.train_batches gives it."""
    shapes = {'tokens': (phase.documents, seq_len), 'positions': (phase.documents, phase.vectors)}
    if phase.labelled:
        shapes['explanations'] = (*shapes['positions'], phase.hparams.length)
    place = {k: jax.sharding.NamedSharding(mesh, sharding.rows(len(s))) for k, s in shapes.items()}
    return {k: jax.ShapeDtypeStruct(s, jnp.int32, sharding=place[k]) for k, s in shapes.items()}


def steps(cfg, job: Job, mesh) -> Iterator[Step]:
    """The train step of every phase. Call under jax.set_mesh(mesh)."""
    base = config.abstract_base(cfg, job.c, mesh)
    lens = abstract_lens(cfg, (job.texts.decoder, job.texts.encoder), base, mesh)
    for phase in config.make_phases(cfg, job.texts.natural, job.texts.tags, job.documents):
        batch = abstract_batch(phase, job.seq_len, mesh)
        yield Step(phase, base, lens, abstract_state(lens, phase, mesh), batch)


def plan(cfg, job: Job, mesh) -> dict[str, Needs]:
    """Needs of every phase; each phase's train step is traced, so that what cannot run raises here."""
    out = {}
    with jax.set_mesh(mesh):
        for step in steps(cfg, job, mesh):
            step.lower()
            out[step.phase.name] = step.needs()
    return out


def needs(cfg, job: Job, mesh) -> dict[str, Needs]:
    """Needs of every phase, from shapes alone."""
    with jax.set_mesh(mesh):
        return {step.phase.name: step.needs() for step in steps(cfg, job, mesh)}


def compile_phase(cfg, job: Job, mesh, name: str) -> Program:
    """The train step of the phase `name`, compiled as the head of this file says. Takes up to a minute."""
    experts = per_device(config.abstract_base(cfg, job.c, mesh).blocks.moe) // job.c.n_layers
    cfg = cfg.copy_and_resolve_references()
    cfg.subject.dtype = 'float32'
    if job.c.n_experts:
        (cfg.subject.experts,) = moe.PLANNED
    with jax.set_mesh(mesh):
        step = next(s for s in steps(cfg, job, mesh) if s.phase.name == name)
        compiled = step.lower().compile()
    moved = (c for c in hlo.collectives(compiled.as_text()) if c.group_size > 1)
    return Program(compiled.memory_analysis().temp_size_in_bytes + experts, experts, tuple(moved))


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change of the configuration. needs: of every phase then. phase, total: the one that needs most among those
    that were compiled, and its bytes on one device; compiled: False where what a step is given is too much already,
    which is the total then."""

    change: str
    needs: dict[str, Needs]
    phase: str
    total: int
    compiled: bool


def changes(cfg, mesh, full: list[str], ships_packed: bool) -> Iterator[tuple[str, dict]]:
    """(as a user writes it, values of dotted keys) of changes on the same number of devices.

    full: names of the phases that do not fit. ships_packed: whether the subject's experts are MXFP4 on disk.
    """
    data, model = mesh.shape['data'], mesh.shape['model']
    tried = []
    if data > 1 and not cfg.mesh.shard_base:
        tried.append({'mesh.shard_base': True})
    if ships_packed and not cfg.subject.packed and 'full' not in (cfg.decoder.train, cfg.encoder.train):
        tried.append({'subject.packed': True})
    for size in MODEL_SIZES:
        if size > model and data * model % size == 0:
            tried.append({'mesh.model': size, 'mesh.data': data * model // size})
    halves = {name: cfg[name].documents // 2 for name in full}
    if all(n and n % sharding.row_count(mesh) == 0 and n * cfg[name].vectors >= 2 for name, n in halves.items()):
        tried.append({f'{name}.documents': n for name, n in halves.items()})
    for values in tried:
        yield ' '.join(f'{k}={v}' for k, v in values.items()), values


def remedy(change: str, values: dict, cfg, job: Job, full: list[str], device: float, compiling=compile_phase) -> Remedy:
    """What `cfg` needs with other values of dotted keys; compiled where it may fit in `device` bytes, the phases
    `full`, which did not, first. compiling: as compile_phase."""
    changed = cfg.copy_and_resolve_references()
    changed.update_from_flattened_dict(values)
    m = changed.mesh
    mesh = sharding.make_mesh(m.data, m.model, m.replica)
    parts, totals = needs(changed, job, mesh), {}
    name = max(parts, key=lambda x: parts[x].given)
    if parts[name].given > device:
        return Remedy(change, parts, name, parts[name].given, compiled=False)
    for name in sorted(parts, key=lambda x: x not in full):
        totals[name] = parts[name].given + compiling(changed, job, mesh, name).temporaries
        if totals[name] > device:
            break
    name = max(totals, key=totals.get)
    return Remedy(change, parts, name, totals[name], compiled=True)
