"""From a configuration to the settings of a run; what it may say is in checks.py.

The ConfigDict stops here: what leaves is frozen dataclasses, arrays and functions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax

from lens import checks, data, hf, objectives, optimizer, response, schedules, sharding
from lens.models.transformer import Transformer, TransformerConfig


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Micro-steps of the run between two evaluations, checkpoints, those that stay, lines of metrics, drifts.

    0 or None: never.
    """

    evaluate: int | None = None
    save: int | None = None
    keep: int | None = None
    log: int | None = None
    drift: int | None = None


def fires(every: int | None, step: int) -> bool:
    """Whether an interval of micro-steps falls on `step`."""
    return bool(every) and step % every == 0


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training with one objective: micro-steps start..end-1 of the run."""

    name: str
    start: int
    end: int
    objective: Callable
    hparams: objectives.Hparams
    tx: optimizer.Optimizer
    documents: int
    vectors: int
    labelled: bool
    every: Intervals = Intervals()

    @property
    def steps(self) -> range:
        """Numbers of its micro-steps, counted from 1 over the run."""
        return range(self.start + 1, self.end + 1)


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """Held-out figures: `documents` with `vectors` activations each, `batch` activations per step."""

    quick_documents: int
    documents: int
    vectors: int
    batch: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop and the evaluation need."""

    mesh: jax.sharding.Mesh
    tokenizer: object
    base: Transformer
    train: data.Split
    validation: data.Split
    layer: int
    length: int
    min_pos: int
    seed: int
    tags: response.Tags
    error: str  # one of objectives.ERRORS
    decoder_prompt: response.Prompt
    encoder_prompt: tuple[list[int], list[int]]  # token ids before and after the words
    evaluation: EvalSettings
    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        return self.phases[-1].end if self.phases else 0


def open_run(cfg, check: Callable[['Run'], None] = lambda run: None) -> Run:
    """Checks `cfg`, opens the data and loads the frozen base. Raises LensError.

    check: is called before the weights are read, which may take minutes, with the run whose base has shapes only.
    """
    checks.check_values(cfg)
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model, cfg.mesh.replica)
    c = hf.read_config(hf.local_directory(cfg.subject.path, weights=False))
    tokenizer = hf.load_tokenizer(cfg.subject.path)
    checks.check_subject(cfg, c)
    tags = response.tags(tokenizer, cfg.explanation_open, cfg.explanation_close)
    decoder_prompt = response.decoder_prompt(tokenizer, cfg.decoder.prompt, cfg.decoder.marker)
    encoder_prompt = response.encoder_prompt(tokenizer, cfg.encoder.prompt)
    checks.check_lengths(cfg, c, decoder_prompt, encoder_prompt)
    train, validation = _open_data(cfg, c, tags)
    checks.require(
        len(cfg.phases) > 0 or bool(cfg.init_from),
        'phases is empty: name at least one phase, e.g. sft, or give init_from to evaluate an exported lens.',
    )
    for name in cfg.phases:
        checks.check_phase(cfg, name)
        checks.check_documents(cfg, name, train, tags)
    prefix = tokenizer(cfg.decoder.prompt.replace(response.EMBED, 'something'), add_special_tokens=False)['input_ids']
    run = Run(
        mesh=mesh,
        tokenizer=tokenizer,
        base=abstract_base(cfg, c, mesh),
        train=train,
        validation=validation,
        layer=cfg.layer,
        length=cfg.explanation_len,
        min_pos=cfg.data.min_pos,
        seed=cfg.seed,
        tags=tags,
        error=cfg.encoder.error,
        decoder_prompt=decoder_prompt,
        encoder_prompt=encoder_prompt,
        evaluation=from_block(EvalSettings, cfg.eval),
        phases=make_phases(cfg, prefix, tags, len(train)),
    )
    check(run)
    base = hf.load_model(cfg.subject.path, mesh=mesh, **_how_to_run(cfg), **_placed(cfg))
    return dataclasses.replace(run, base=base)


def _how_to_run(cfg) -> dict:
    """What cfg.subject says of the frozen base beside its path, as in TransformerConfig."""
    return {k: cfg.subject[k] for k in ('remat', 'experts', 'packed')}


def _placed(cfg) -> dict:
    """Type of the leaves of the frozen base, and elements above which they are split over the devices of `data`."""
    return {'dtype': checks.DTYPES[cfg.subject.dtype], 'split_above': 0 if cfg.mesh.shard_base else math.inf}


def abstract_base(cfg, c: TransformerConfig, mesh) -> Transformer:
    """Shapes and placements of the frozen base as `cfg` asks for it."""
    return hf.abstract_model(dataclasses.replace(c, **_how_to_run(cfg)), mesh=mesh, **_placed(cfg))


def _open_data(cfg, c: TransformerConfig, tags: response.Tags) -> tuple[data.Split, data.Split]:
    """The training and the validation split as the run reads them."""
    train, validation = (data.open_split(cfg.data.path, s, vocab_size=c.vocab_size) for s in ('train', 'validation'))
    for split in (train, validation):
        made_with = split.meta.get('tokenizer_sha256')
        checks.require(
            made_with in (None, hf.tokenizer_sha256(cfg.subject.path)),
            f'{split.directory} was made with another tokenizer than that of {cfg.subject.path}: pretokenize again.',
        )
    data.check_disjoint(train, validation)
    train, validation = (data.readable(x, cfg.data.positions, cfg.data.min_pos) for x in (train, validation))
    longest = max(train.tokens.shape[1], validation.tokens.shape[1])
    checks.require(
        longest <= c.max_positions,
        f'{train.directory} has {longest} tokens a row, the subject reads {c.max_positions}.',
    )
    return tuple(_responding(x, tags, cfg.explanation_len) for x in (train, validation))


def from_block(kind, block):
    """The dataclass `kind` from the keys of the same name of a configuration block."""
    return kind(**{f.name: block[f.name] for f in dataclasses.fields(kind)})


def _responding(split: data.Split, tags: response.Tags, length: int) -> data.Split:
    """The split whose given explanations are responses of this run."""
    filler = split.meta.get('filler_id', split.meta.get('pad_id') or 0)
    return dataclasses.replace(
        split, respond=functools.partial(response.respond, tags=tags, filler=filler, length=length)
    )


def make_phases(cfg, natural_prefix: list[int], tags: response.Tags, documents: int | None = None) -> tuple[Phase, ...]:
    """The phases of a configuration in their order. natural_prefix: ids of the decoder prompt with a word
    in place of the activation. documents: of the training split; where not given, no duration may count epochs."""
    clocks = schedules.clocks(cfg, documents)
    run_steps, phases, start = sum(c.total for c in clocks), [], 0
    for name, clock in zip(cfg.phases, clocks, strict=True):
        p = cfg[name]
        values = {k: schedules.parse(p[k], clock, f'{name}.{k}') for k in schedules.VALUES}
        rates = {s: values.pop(f'learning_rate_{s}') for s in optimizer.SIDES}
        for s, rate in rates.items():
            checks.require(
                min(rate.start, rate.end) >= 0, f'{name}.learning_rate_{s}={p[f"learning_rate_{s}"]!r} is negative.'
            )
        table = optimizer.parse_table(p.table, clock, f'{name}.table')
        hp = objectives.Hparams(
            layer=cfg.layer,
            length=cfg.explanation_len,
            tags=tags,
            error=cfg.encoder.error,
            group=p.group if p.objective == 'grpo' else 1,
            mean_of=p.mean_of if p.objective == 'grpo' else 1,
            advantage=p.advantage,
            updates=p.updates if p.objective == 'grpo' else 1,
            clip=p.clip,
            kl_to=p.kl_to,
            form=p.form,
            resample=p.resample,
            resample_stop_grad=p.resample_stop_grad,
            kl_skip=p.kl_skip,
            natural_prefix=tuple(natural_prefix),
            **values,
        )
        phases.append(
            Phase(
                name=name,
                start=start,
                end=start + clock.total,
                objective=objectives.OBJECTIVES[p.objective],
                hparams=hp,
                tx=optimizer.make(
                    table, rates, checks.clip_norms(p.grad_clip, f'{name}.grad_clip', table), p.accumulate, hp.updates
                ),
                documents=p.documents,
                vectors=p.vectors,
                labelled=p.objective in objectives.NEEDS_EXPLANATIONS,
                every=_intervals(cfg, dataclasses.replace(clock, total=run_steps)),
            )
        )
        start += clock.total
    return tuple(phases)


def _intervals(cfg, clock: schedules.Clock) -> Intervals:
    """clock: of a phase, with the length of the whole run, which is what "-1" means here."""
    keys = {'evaluate': 'eval.every', 'save': 'checkpoint.every', 'keep': 'checkpoint.keep_every'}
    keys |= {'log': 'log.every', 'drift': 'log.drift'}
    return Intervals(**{k: schedules.duration(cfg[key], clock, key) for k, key in keys.items()})
