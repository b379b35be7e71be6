"""From a configuration to the settings of a run; every check of the configuration is here.

The ConfigDict stops here: what leaves is frozen dataclasses, arrays and functions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lens import data, extraction, gumbel, health, hf, losses, objectives, optimizer, prompts, schedules, sharding
from lens.errors import LensError
from lens.models import injection, moe
from lens.models.decoder import Prompt
from lens.models.encoder import READOUTS
from lens.models.transformer import REMAT_POLICIES, Transformer, TransformerConfig

TRAIN_CHOICES = ('maps', 'lora', 'full')
INITS = ('identity', 'scale', 'tuned_lens')
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
POSITIVE = (
    'explanation_len',
    'lora.rank',
    'mesh.model',
    'mesh.replica',
    'eval.quick_documents',
    'eval.vectors',
    'eval.batch',
    'checkpoint.keep',
)


class ConfigError(LensError):
    """A configuration value is impossible; the message names the key."""


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Micro-steps of the run between two evaluations, checkpoints, lines of metrics, drifts; 0 or None: never."""

    evaluate: int | None = None
    save: int | None = None
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
    tags: extraction.Tags
    error: str  # one of objectives.ERRORS
    decoder_prompt: Prompt
    encoder_prompt: tuple[list[int], list[int]]  # token ids before and after the words
    evaluation: EvalSettings
    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        return self.phases[-1].end if self.phases else 0


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _choice(value, choices, key: str) -> None:
    _require(value in choices, f'{key}={value!r} is not one of {", ".join(choices)}.')


def check_values(cfg) -> None:
    """Raises ConfigError for values that are impossible with any subject and any data."""
    for key in POSITIVE:
        block, _, name = key.rpartition('.')
        value = (cfg[block] if block else cfg)[name]
        _require(value > 0, f'{key}={value} must be positive.')
    _require(cfg.data.min_pos >= 0, f'data.min_pos={cfg.data.min_pos} must not be negative.')
    _require(
        cfg.eval.documents >= 2, f'eval.documents={cfg.eval.documents} must be at least 2: controls pair documents.'
    )
    _choice(cfg.data.positions, data.POSITIONS, 'data.positions')
    _choice(cfg.subject.dtype, DTYPES, 'subject.dtype')
    _choice(cfg.subject.remat, REMAT_POLICIES, 'subject.remat')
    _choice(cfg.subject.experts, moe.IMPLEMENTATIONS, 'subject.experts')
    _choice(cfg.encoder.readout, READOUTS, 'encoder.readout')
    _choice(cfg.encoder.error, objectives.ERRORS, 'encoder.error')
    _choice(cfg.health.collapse, health.ACTIONS, 'health.collapse')
    for key in ('best', 'keep_every'):
        _require(cfg.checkpoint[key] >= 0, f'checkpoint.{key}={cfg.checkpoint[key]} must not be negative.')
    _choice(cfg.decoder.train, TRAIN_CHOICES, 'decoder.train')
    _choice(cfg.encoder.train, TRAIN_CHOICES, 'encoder.train')
    _require(
        not (cfg.subject.packed and 'full' in (cfg.decoder.train, cfg.encoder.train)),
        'subject.packed=True keeps the experts as bytes, which cannot be trained: drop it, or use train=lora or maps.',
    )


def check_subject(cfg, c: TransformerConfig) -> None:
    """Raises ConfigError for values that are impossible with this subject."""
    last = c.n_layers - 1
    _require(0 <= cfg.layer <= last, f'layer={cfg.layer} is not a block of the subject, which has blocks 0..{last}.')
    out = cfg.encoder.output_layer
    _require(
        -1 <= out <= last, f'encoder.output_layer={out} is not a block of the subject (0..{last}, or -1 for layer).'
    )
    _check_decoder(cfg.decoder, c)
    _require(
        not cfg.position_vectors or not c.ropes,
        f'position_vectors=True needs a subject with learned positions (GPT-2), not {c.family}.',
    )
    _check_starts(cfg, c)


def open_run(cfg, check: Callable[['Run'], None] = lambda run: None) -> Run:
    """Checks `cfg`, opens the data and loads the frozen base. Raises LensError.

    check: is called before the weights are read, which may take minutes, with the run whose base has shapes only.
    """
    check_values(cfg)
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model, cfg.mesh.replica)
    c = hf.read_config(hf.local_directory(cfg.subject.path, weights=False))
    tokenizer = hf.load_tokenizer(cfg.subject.path)
    check_subject(cfg, c)
    tags = prompts.tags(tokenizer, cfg.explanation_open, cfg.explanation_close)
    train, validation = _open_data(cfg, c, tags)
    _require(
        len(cfg.phases) > 0 or bool(cfg.init_from),
        'phases is empty: name at least one phase, e.g. sft, or give init_from to evaluate an exported lens.',
    )
    for name in cfg.phases:
        check_phase(cfg, name, mesh)
        _check_documents(cfg, name, train, tags)
    prefix = tokenizer(cfg.decoder.prompt.replace(prompts.EMBED, 'something'), add_special_tokens=False)['input_ids']
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
        decoder_prompt=prompts.decoder_prompt(tokenizer, cfg.decoder.prompt, cfg.decoder.marker),
        encoder_prompt=prompts.encoder_prompt(tokenizer, cfg.encoder.prompt),
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
    return {'dtype': DTYPES[cfg.subject.dtype], 'split_above': 0 if cfg.mesh.shard_base else math.inf}


def abstract_base(cfg, c: TransformerConfig, mesh) -> Transformer:
    """Shapes and placements of the frozen base as `cfg` asks for it."""
    return hf.abstract_model(dataclasses.replace(c, **_how_to_run(cfg)), mesh=mesh, **_placed(cfg))


def _open_data(cfg, c: TransformerConfig, tags: extraction.Tags) -> tuple[data.Split, data.Split]:
    """The training and the validation split as the run reads them."""
    train, validation = (data.open_split(cfg.data.path, s, vocab_size=c.vocab_size) for s in ('train', 'validation'))
    for split in (train, validation):
        made_with = split.meta.get('tokenizer_sha256')
        _require(
            made_with in (None, hf.tokenizer_sha256(cfg.subject.path)),
            f'{split.directory} was made with another tokenizer than that of {cfg.subject.path}: pretokenize again.',
        )
    data.check_disjoint(train, validation)
    train, validation = (data.readable(x, cfg.data.positions, cfg.data.min_pos) for x in (train, validation))
    longest = max(train.tokens.shape[1], validation.tokens.shape[1])
    _require(
        longest <= c.max_positions,
        f'{train.directory} has {longest} tokens a row, the subject reads {c.max_positions}.',
    )
    return tuple(_responding(x, tags, cfg.explanation_len) for x in (train, validation))


def from_block(kind, block):
    """The dataclass `kind` from the keys of the same name of a configuration block."""
    return kind(**{f.name: block[f.name] for f in dataclasses.fields(kind)})


def _check_decoder(d, c: TransformerConfig) -> None:
    _choice(d.injection, injection.FAMILIES, 'decoder.injection')
    n = d.patched_blocks
    _require(
        -1 <= n <= c.n_layers, f'decoder.patched_blocks={n} is not in -1..{c.n_layers}, the blocks of the subject.'
    )
    _require(d.norm >= 0, f'decoder.norm={d.norm} must not be negative.')
    if d.injection == 'add':
        _require(
            c.n_layers > injection.ADD_BLOCK,
            f'decoder.injection=add writes at block {injection.ADD_BLOCK}, the subject has {c.n_layers} blocks.',
        )
        _require(bool(d.marker), 'decoder.injection=add needs decoder.marker, a text of one token for the slot.')


def _check_starts(cfg, c: TransformerConfig) -> None:
    if cfg.init_from:
        return
    _choice(cfg.decoder.init, INITS, 'decoder.init')
    _choice(cfg.encoder.init, INITS, 'encoder.init')
    _require(
        'tuned_lens' not in (cfg.decoder.init, cfg.encoder.init) or bool(cfg.tuned_lens),
        'init=tuned_lens needs tuned_lens, a folder that lens.tuned_lens has written.',
    )


def _responding(split: data.Split, tags: extraction.Tags, length: int) -> data.Split:
    """The split whose given explanations are responses of this run."""
    filler = split.meta.get('filler_id', split.meta.get('pad_id') or 0)
    return dataclasses.replace(
        split, respond=functools.partial(extraction.respond, tags=tags, filler=filler, length=length)
    )


def check_phase(cfg, name: str, mesh) -> None:
    """Raises LensError for impossible values of the phase block `name`."""
    _require(
        name in cfg and 'objective' in cfg[name], f'phases names {name!r}, but there is no phase block of that name.'
    )
    p = cfg[name]
    _choice(p.objective, objectives.OBJECTIVES, f'{name}.objective')
    _require(
        p.objective != 'grpo' or p.group >= 2,
        f'{name}.group={p.group} must be at least 2: advantages compare the group.',
    )
    _require(
        p.documents * p.vectors >= 2,
        f'{name}: one activation per step has no variance; raise documents or vectors.',
    )
    _choice(p.advantage, losses.ADVANTAGES, f'{name}.advantage')
    _choice(p.kl_to, objectives.REFERENCES, f'{name}.kl_to')
    _choice(p.form, gumbel.FORMS, f'{name}.form')
    for key in ('group', 'mean_of', 'updates'):
        _require(p[key] > 0, f'{name}.{key}={p[key]} must be positive.')
    _require(
        p.updates == 1 or p.accumulate == 1,
        f'{name}.updates={p.updates} does not go with {name}.accumulate={p.accumulate}.',
    )
    _require(p.clip > 0, f'{name}.clip={p.clip} must be positive.')
    _require(not p.resample or p.documents >= 2, f'{name}.resample=True needs {name}.documents of at least 2.')
    together = p.mean_of > 1 and (p.lm_weight != 0 or p.kl_weight != 0)
    _require(not together, f'{name}.mean_of above 1 has no single text: set lm_weight and kl_weight to 0.')
    _require(
        p.beta == 0 or 0 <= p.kl_skip < cfg.explanation_len,
        f'{name}.kl_skip={p.kl_skip} leaves no token of explanation_len={cfg.explanation_len}.',
    )
    sharding.check_divides(p.documents, f'{name}.documents', mesh)
    _require(p.vectors > 0, f'{name}.vectors={p.vectors} must be positive.')


def _check_documents(cfg, name: str, train: data.Split, tags: extraction.Tags) -> None:
    """Raises ConfigError where the data does not have what the phase block `name` asks for."""
    p = cfg[name]
    _require(
        len(train) >= p.documents,
        f'{name}.documents={p.documents}, but {train.directory} holds only {len(train)} documents.',
    )
    if p.objective in objectives.NEEDS_EXPLANATIONS:
        _check_explanations(cfg, name, p.objective, train, tags)


def _check_explanations(cfg, name: str, objective: str, train: data.Split, tags: extraction.Tags) -> None:
    _require(
        train.explanations is not None,
        f'{train.directory}/explanations.npy does not exist: the {objective} objective of {name} needs given explanations.',
    )
    _require(
        bool((train.positions >= 0).any(1).all()),
        f'{train.directory}/positions.npy has documents without a labelled position: {name} needs one in each.',
    )
    have = train.explanations.shape[2]
    _require(
        have == cfg.explanation_len or bool(tags),
        f'explanation_len={cfg.explanation_len}, but the given explanations in {train.directory} have {have} tokens.',
    )
    around = len(tags.opening) + len(tags.closing)
    _require(
        around < cfg.explanation_len,
        f'explanation_len={cfg.explanation_len} leaves no room between tags of {around} tokens.',
    )


def make_phases(
    cfg, natural_prefix: list[int], tags: extraction.Tags, documents: int | None = None
) -> tuple[Phase, ...]:
    """The phases of a configuration in their order. natural_prefix: ids of the decoder prompt with a word
    in place of the activation. documents: of the training split; where not given, no duration may count epochs."""
    clocks = schedules.clocks(cfg, documents)
    run_steps, phases, start = sum(c.total for c in clocks), [], 0
    for name, clock in zip(cfg.phases, clocks, strict=True):
        p = cfg[name]
        values = {k: schedules.parse(p[k], clock, f'{name}.{k}') for k in schedules.VALUES}
        rates = {s: values.pop(f'learning_rate_{s}') for s in optimizer.SIDES}
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
                tx=optimizer.make(table, rates, _clip(p.grad_clip, f'{name}.grad_clip'), p.accumulate, hp.updates),
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
    keys = {'evaluate': 'eval.every', 'save': 'checkpoint.every', 'log': 'log.every', 'drift': 'log.drift'}
    return Intervals(**{k: schedules.duration(cfg[key], clock, key) for k, key in keys.items()})


def _clip(value, key: str) -> float | dict[str, float]:
    """One norm, or a norm by clip group from pairs."""
    try:
        return {str(k): float(v) for k, v in value} if isinstance(value, (tuple, list)) else float(value)
    except (TypeError, ValueError) as e:
        raise ConfigError(
            f"{key}={value!r} is neither a norm nor pairs of a clip group and its norm, (('decoder', 0.05), …)."
        ) from e
