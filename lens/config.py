"""From a configuration to a run: every refusal (checks.py), then frozen dataclasses. No weights are read but by `load`.

The ConfigDict stops here: what leaves is dataclasses, arrays and functions.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lens import checks, data, hf, joints, objectives, optimizer, response, schedules, sharding
from lens.errors import require, shown
from lens.keys import DTYPES, get
from lens.models.transformer import Transformer, TransformerConfig
from lens.schedules import Schedule, Units

INTERVALS = {  # of Intervals, its key
    'evaluate': 'eval.every',
    'save': 'checkpoint.every',
    'keep': 'checkpoint.keep_every',
    'log': 'log.every',
    'drift': 'log.drift',
}
AS_WRITTEN = (  # keys of a phase that are those of Hparams
    *('advantage', 'reward', 'policy', 'aggregate', 'drop_equal', 'encoder_texts', 'kl_to', 'kl_top', 'form'),
    *('resample', 'resample_stop_grad'),
)
SLOT_WORD = 'something'  # what stands for the activation in the natural prefix


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Micro-steps between evaluations, checkpoints, those that stay, lines of metrics, drifts; 0 or None: never."""

    evaluate: int | None = None
    save: int | None = None
    keep: int | None = None
    log: int | None = None
    drift: int | None = None


def fires(every: int | None, step: int) -> bool:
    """Returns whether an interval of micro-steps falls on `step`."""
    return bool(every) and step % every == 0


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training with one objective: micro-steps start+1..end of the run.

    objective, hparams and tx are what its programs depend on; everything else reaches a step as `knobs`.
    """

    name: str
    start: int
    end: int
    objective: objectives.Objective
    hparams: objectives.Hparams
    tx: optimizer.Optimizer
    documents: int
    vectors: int
    schedules: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)
    rates: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)
    table: tuple[optimizer.Row, ...] = ()
    clip_norms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    clip: float = 0.0
    kl_skip: int = 0
    reward_ema: float = 0.0
    reward_lag: int = 0
    every: Intervals = Intervals()

    @property
    def labelled(self) -> bool:
        return not self.objective.samples

    @property
    def reading(self) -> dict:
        """Returns the static arguments of rollout.read."""
        hp = self.hparams
        return {'layer': hp.layer, 'layers': hp.layers, 'again': hp.reads_again, 'recent': hp.recent}

    @property
    def program(self) -> dict:
        """Returns the static arguments of train_step."""
        return {'objective': self.objective, 'hparams': self.hparams, 'tx': self.tx}

    def knobs(self, t: int) -> dict:
        """Returns the numbers of its micro-step t, from 0, as train_step takes them: numpy scalars and small arrays."""
        values = {k: self.schedules[k](t) for k in objectives.KNOBS}
        numbers = optimizer.numbers(self.table, self.rates, self.clip_norms, t, self.tx.accumulation)
        fixed = {'clip': np.float32(self.clip), 'kl_skip': np.int32(self.kl_skip), 'renew': self._renew(t)}
        return values | fixed | {'optimizer': numbers}

    def _renew(self, t: int) -> np.float32:
        """What share of the encoder enters that by which rewards are given, after micro-step t."""
        update, left = divmod(t + 1, self.tx.accumulation)
        due = not left and (not self.reward_lag or update % self.reward_lag == 0)
        return np.float32(1 - self.reward_ema if due else 0)


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """Held-out figures: `documents` with `vectors` activations each, `batch` activations per step; `samples` and tokens
    of a `reading` to be shown."""

    quick_documents: int
    documents: int
    vectors: int
    batch: int
    samples: int
    reading: int = 0


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop and the evaluation need. base: shapes and placements until `load`."""

    mesh: jax.sharding.Mesh
    tokenizer: object
    texts: response.Texts
    base: Transformer
    train: data.Split | None
    validation: data.Split | None
    layer: int
    layers: tuple[int, ...]  # of Hparams
    length: int
    min_pos: int
    seed: int
    error: str  # one of losses.ERRORS
    context_tokens: int  # that the encoder reads
    evaluation: EvalSettings
    phases: tuple[Phase, ...]

    @property
    def reading(self) -> dict:
        """Returns the static arguments of rollout.read for figures."""
        return {'layer': self.layer, 'layers': self.layers, 'recent': max(1, self.context_tokens)}

    @property
    def steps(self) -> int:
        return self.phases[-1].end if self.phases else 0

    def phase_of(self, step: int) -> Phase | None:
        """Returns the phase that a checkpoint after micro-step `step` was made in; at a boundary the one that ends."""
        return next((p for p in self.phases if step <= p.end), None)


def plan(cfg, needs: Sequence[str] = ('train', 'validation')) -> Run:
    """Returns the run of a configuration, its base as shapes. Raises LensError for all that can be refused without
    weights, which may take minutes to read.

    needs: splits without which it is of no use; phases need both. A split that is not opened is None.
    """
    checks.check_values(cfg)
    folders = {'subject.path': 'a directory in Hugging Face layout'} | (
        {'data.path': 'a folder of tokens'} if needs else {}
    )
    for key, what in folders.items():
        require(get(cfg, key).strip() != '', f'{key} is empty: give {what}.')
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model, cfg.mesh.replica)
    c = hf.read_config(hf.local_directory(cfg.subject.path, weights=False))
    tokenizer = hf.load_tokenizer(cfg.subject.path)
    checks.check_subject(cfg, c)
    texts = read_texts(cfg, tokenizer, c.vocab_size)
    checks.check_lengths(cfg, c, texts)
    what = 'name at least one phase, e.g. sft, or give init_from to evaluate an exported lens'
    require(len(cfg.phases) > 0 or bool(cfg.init_from), f'phases is empty: {what}.')
    for name in cfg.phases:
        checks.check_phase(cfg, name)
    checks.check_prefixes(cfg, texts.tags)
    checks.check_context(cfg)
    make_phases(cfg, texts, 1)  # refuses what is written wrongly before data are read, which may take minutes
    trains = bool(cfg.phases) and 'train' in needs
    train, validation = _open_data(cfg, c, texts.tags, trains) if needs else (None, None)
    if validation is not None:
        checks.check_held_out(cfg, validation)
    for name in cfg.phases if trains else ():
        checks.check_documents(cfg, name, train, texts.tags)
    return Run(
        mesh=mesh,
        tokenizer=tokenizer,
        texts=texts,
        base=abstract_base(cfg, c, mesh),
        train=train,
        validation=validation,
        layer=cfg.layer,
        layers=tuple(cfg.decoder.layers),
        length=cfg.explanation_len,
        min_pos=cfg.data.min_pos,
        seed=cfg.seed,
        error=cfg.encoder.error,
        context_tokens=cfg.encoder.context_tokens,
        evaluation=EvalSettings(**{f.name: cfg.eval[f.name] for f in dataclasses.fields(EvalSettings)}),
        phases=make_phases(cfg, texts, len(train)) if trains else (),
    )


def load(cfg, run: Run) -> Run:
    """Returns the run with the weights of its frozen base in their place. Raises LensError."""
    how, placed = _base_settings(cfg)
    return dataclasses.replace(run, base=hf.load_model(cfg.subject.path, mesh=run.mesh, head=True, **how, **placed))


def read_texts(cfg, tokenizer, vocab_size: int) -> response.Texts:
    """Returns the prompts and tags of a configuration for a subject of `vocab_size` embeddings; math.inf: of a tokenizer
    that stands in for another, and joins nothing. Raises LensError."""
    ids, natural = response.reader(tokenizer, vocab_size), f'decoder.prompt with {SLOT_WORD!r} in its slot'
    encoder, around = response.encoder_prompt(ids, cfg.encoder.prompt), None
    is_text = cfg.explanation_open and cfg.decoder.injection != 'affine'  # and prompts are words
    if is_text and math.isfinite(vocab_size):
        beside, tags = tuple(cfg.encoder.prompt.rsplit(response.TEXT, 1)), (cfg.explanation_open, cfg.explanation_close)
        around = joints.build(tokenizer, beside, encoder, tags, vocab_size)
        encoder = around.cut_off(*encoder)
    return response.Texts(
        response.decoder_prompt(ids, cfg.decoder.prompt, cfg.decoder.marker),
        encoder,
        tuple(ids(cfg.decoder.prompt.replace(response.EMBED, SLOT_WORD), natural)),
        response.tags(ids, cfg.explanation_open, cfg.explanation_close, cfg.explanation_end, around),
    )


def abstract_base(cfg, c: TransformerConfig, mesh) -> Transformer:
    """Returns shapes and placements of the frozen base as `cfg` asks for it."""
    how, placed = _base_settings(cfg)
    return hf.abstract_model(dataclasses.replace(c, **how), mesh=mesh, **placed)


def _base_settings(cfg) -> tuple[dict, dict]:
    """How the frozen base runs, as in TransformerConfig; its dtype, and above how many elements `data` splits a leaf."""
    how = {k: cfg.subject[k] for k in ('remat', 'experts', 'packed')}
    return how, {'dtype': DTYPES[cfg.subject.dtype], 'split_above': 0 if cfg.mesh.shard_base else math.inf}


def _open_data(cfg, c: TransformerConfig, tags: response.Tags, trains: bool) -> tuple[data.Split | None, data.Split]:
    """The training and the validation split as the run reads them, given explanations as responses."""

    def split_of(split: data.Split) -> data.Split:
        n = split.width
        require(n <= c.max_positions, f'{split.directory} has {n} tokens a row, the subject reads {c.max_positions}.')
        if split.activations is not None:
            checks.check_stored(cfg, c, split)
        respond = functools.partial(response.respond, tags=tags, filler=split.filler, length=cfg.explanation_len)
        split = data.readable(split, cfg.data.positions, cfg.data.min_pos)
        return dataclasses.replace(split, respond=respond)

    splits = data.open_splits(cfg.data.path, c.vocab_size, cfg.subject.path, hf.tokenizer_sha256, train=trains)
    return tuple(x and split_of(x) for x in splits)


def make_phases(cfg, texts: response.Texts, documents: int | None = None) -> tuple[Phase, ...]:
    """Returns the phases of a configuration in their order.

    documents: of the training split; where not given, no duration may count epochs. Raises LensError.
    """
    clocks, out = schedules.clocks(cfg, documents), []
    run_clock = sum(c.total for c in clocks)
    for name, clock in zip(cfg.phases, clocks, strict=True):
        start = out[-1].end if out else 0
        of_run = dataclasses.replace(clock, total=run_clock)  # "-1" is the whole run here
        every = Intervals(**{k: schedules.duration(get(cfg, key), of_run, key) for k, key in INTERVALS.items()})
        out.append(_phase(cfg, name, clock, start, every, texts))
    return tuple(out)


def _phase(cfg, name: str, clock: Units, start: int, every: Intervals, texts: response.Texts) -> Phase:
    p, objective = cfg[name], objectives.OBJECTIVES[cfg[name].objective]
    values = {k: schedules.parse(p[k], clock, f'{name}.{k}') for k in objectives.KNOBS}
    keys = {side: f'learning_rate_{side}' for side in optimizer.SIDES}
    rates = {side: schedules.parse(p[key], clock, f'{name}.{key}') for side, key in keys.items()}
    for side, key in keys.items():
        require(min(rates[side].start, rates[side].end) >= 0, f'{name}.{key}={shown(repr(p[key]))} is negative.')
    relaxed = p.objective == 'gumbel' and texts.tags.joints is not None
    what = 'explanation_open: the encoder reads the words again as text, through which no gradient goes'
    require(not relaxed, f'{name}.objective=gumbel does not go with {what}.')
    table = optimizer.parse_table(p.table, clock, f'{name}.table')
    counts = {k: p[k] if k in objective.reads else 1 for k in ('group', 'mean_of', 'updates', 'slices')}
    hparams = objectives.Hparams(
        layer=cfg.layer,
        layers=tuple(cfg.decoder.layers),
        length=cfg.explanation_len,
        on=frozenset(k for k, v in values.items() if v),
        tags=texts.tags,
        error=cfg.encoder.error,
        context=cfg.encoder.context_tokens,
        natural_prefix=texts.natural,
        prefix=(p.prefix_min, p.prefix_max) if p.prefix_min else (),
        judged=bool(p.reward_ema or p.reward_lag),
        **counts,
        **{k: p[k] for k in AS_WRITTEN},
    )
    return Phase(
        name=name,
        start=start,
        end=start + clock.total,
        objective=objective,
        hparams=hparams,
        tx=optimizer.make(table, p.accumulate),
        documents=p.documents,
        vectors=p.vectors,
        schedules=values,
        rates=rates,
        table=table,
        clip_norms=optimizer.parse_clip(p.grad_clip, f'{name}.grad_clip', table),
        clip=p.clip,
        kl_skip=p.kl_skip,
        reward_ema=p.reward_ema,
        reward_lag=p.reward_lag,
        every=every,
    )
