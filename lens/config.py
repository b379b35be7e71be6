"""From a configuration to a run: every refusal, then frozen dataclasses. No weights are read but by `load`.

The ConfigDict stops here: what leaves is dataclasses, arrays and functions.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lens import data, hf, joints, keys, objectives, optimizer, response, schedules, sharding
from lens.errors import LensError, need_package, shown
from lens.keys import DTYPES, choice, get
from lens.models import injection
from lens.models.transformer import Transformer, TransformerConfig
from lens.schedules import Schedule, Units

INITS = ('identity', 'scale', 'tuned_lens')
MOST_TEXTS = 1 << 20  # that one micro-step reads or draws
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
        return {'layer': self.hparams.layer, 'again': self.hparams.reads_again, 'recent': self.hparams.recent}

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
class Texts:
    """The texts of a configuration as token ids. natural: the decoder prompt with a word for the activation; encoder:
    before and after the words, without what is joined with them."""

    decoder: response.Prompt
    encoder: tuple[list[int], list[int]]
    natural: tuple[int, ...]
    tags: response.Tags


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop and the evaluation need. base: shapes and placements until `load`."""

    mesh: jax.sharding.Mesh
    tokenizer: object
    texts: Texts
    base: Transformer
    train: data.Split | None
    validation: data.Split | None
    layer: int
    length: int
    min_pos: int
    seed: int
    error: str  # one of losses.ERRORS
    context_tokens: int  # that the encoder reads
    evaluation: EvalSettings
    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        return self.phases[-1].end if self.phases else 0

    def phase_of(self, step: int) -> Phase | None:
        """Returns the phase that a checkpoint after micro-step `step` was made in; at a boundary the one that ends."""
        return next((p for p in self.phases if step <= p.end), None)


def require(ok: bool, message: str) -> None:
    if not ok:
        raise LensError(message)


def plan(cfg, needs: Sequence[str] = ('train', 'validation')) -> Run:
    """Returns the run of a configuration, its base as shapes. Raises LensError for all that can be refused without
    weights, which may take minutes to read.

    needs: splits without which it is of no use; phases need both. A split that is not opened is None.
    """
    check_values(cfg)
    folders = {'subject.path': 'a directory in Hugging Face layout'} | (
        {'data.path': 'a folder of tokens'} if needs else {}
    )
    for key, what in folders.items():
        require(get(cfg, key).strip() != '', f'{key} is empty: give {what}.')
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model, cfg.mesh.replica)
    c = hf.read_config(hf.local_directory(cfg.subject.path, weights=False))
    tokenizer = hf.load_tokenizer(cfg.subject.path)
    check_subject(cfg, c)
    texts = read_texts(cfg, tokenizer, c.vocab_size)
    check_lengths(cfg, c, texts)
    what = 'name at least one phase, e.g. sft, or give init_from to evaluate an exported lens'
    require(len(cfg.phases) > 0 or bool(cfg.init_from), f'phases is empty: {what}.')
    for name in cfg.phases:
        check_phase(cfg, name)
    check_prefixes(cfg, texts.tags)
    check_context(cfg)
    make_phases(cfg, texts, 1)  # refuses what is written wrongly before data are read, which may take minutes
    trains = bool(cfg.phases) and 'train' in needs
    train, validation = _open_data(cfg, c, texts.tags, trains) if needs else (None, None)
    if validation is not None:
        check_held_out(cfg, validation)
    for name in cfg.phases if trains else ():
        check_documents(cfg, name, train, texts.tags)
    return Run(
        mesh=mesh,
        tokenizer=tokenizer,
        texts=texts,
        base=abstract_base(cfg, c, mesh),
        train=train,
        validation=validation,
        layer=cfg.layer,
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


def read_texts(cfg, tokenizer, vocab_size: int) -> Texts:
    """Returns the prompts and tags of a configuration for a subject of `vocab_size` embeddings; math.inf: of a tokenizer
    that stands in for another, and joins nothing. Raises LensError."""
    ids, natural = response.reader(tokenizer, vocab_size), f'decoder.prompt with {SLOT_WORD!r} in its slot'
    encoder, around = response.encoder_prompt(ids, cfg.encoder.prompt), None
    is_text = cfg.explanation_open and cfg.decoder.injection != 'affine'  # and prompts are words
    if is_text and math.isfinite(vocab_size):
        beside, tags = tuple(cfg.encoder.prompt.rsplit(response.TEXT, 1)), (cfg.explanation_open, cfg.explanation_close)
        around = joints.build(tokenizer, beside, encoder, tags, vocab_size)
        encoder = around.cut_off(*encoder)
    return Texts(
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
            check_stored(cfg, c, split)
        respond = functools.partial(response.respond, tags=tags, filler=split.filler, length=cfg.explanation_len)
        split = data.readable(split, cfg.data.positions, cfg.data.min_pos)
        return dataclasses.replace(split, respond=respond)

    splits = data.open_splits(cfg.data.path, c.vocab_size, cfg.subject.path, hf.tokenizer_sha256, train=trains)
    return tuple(x and split_of(x) for x in splits)


def make_phases(cfg, texts: Texts, documents: int | None = None) -> tuple[Phase, ...]:
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


def _phase(cfg, name: str, clock: Units, start: int, every: Intervals, texts: Texts) -> Phase:
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


def check_values(cfg) -> None:
    """Raises LensError for values that are impossible with any subject and any data."""
    keys.check(cfg)
    if cfg.log.tensorboard:
        need_package('tensorboardX', 'tensorboard', 'log.tensorboard=True')
    if cfg.log.wandb_project:
        need_package('wandb', 'wandb', f'log.wandb_project={cfg.log.wandb_project}')
    trained = cfg.subject.packed and 'full' in (cfg.decoder.train, cfg.encoder.train)
    remedy = 'drop it, or use train=lora or maps'
    require(not trained, f'subject.packed=True keeps the experts as bytes, which cannot be trained: {remedy}.')


def check_subject(cfg, c: TransformerConfig) -> None:
    """Raises LensError for values that are impossible with this subject."""
    last, out = c.n_layers - 1, cfg.encoder.output_layer
    require(0 <= cfg.layer <= last, f'layer={cfg.layer} is not a block of the subject, which has blocks 0..{last}.')
    most, both = c.d_model, (cfg.decoder.train, cfg.encoder.train)
    fits = 'lora' not in both or cfg.lora.rank <= most
    require(fits, f'lora.rank={cfg.lora.rank} is above the width of the subject, {most}: lower it, or use train=full.')
    wanted = f'0..{last}, or -1 for layer'
    require(-1 <= out <= last, f'encoder.output_layer={out} is not a block of the subject ({wanted}).')
    injection.of_config(cfg.decoder, c)
    learned = not c.ropes or not cfg.position_vectors
    require(learned, f'position_vectors=True needs a subject with learned positions (GPT-2), not {c.family}.')
    if cfg.init_from:
        return
    for key in ('decoder.init', 'encoder.init'):
        choice(get(cfg, key), INITS, key)
    init, readout = cfg.encoder.init, cfg.encoder.readout
    missing = readout == 'none' and init != 'identity'
    require(not missing, f'encoder.init={init} starts a map that encoder.readout=none does not have: use identity.')
    missing = 'tuned_lens' in (cfg.decoder.init, init) and not cfg.tuned_lens
    require(not missing, 'init=tuned_lens needs tuned_lens, a folder that lens.tools.tuned_lens has written.')


def check_lengths(cfg, c: TransformerConfig, texts: Texts) -> None:
    """Raises LensError where the subject has no positions for a prompt with its explanation."""
    left, right = texts.decoder[:2]
    context = cfg.encoder.context_tokens
    read = sum(map(len, texts.encoder)) + (texts.tags.joints.more if texts.tags.joints else 0)
    lengths = {'decoder': len(left) + 1 + len(right), 'encoder': read + context}  # 1: the slot
    for side, tokens in lengths.items():
        total, most = tokens + cfg.explanation_len, c.max_positions
        what = f'{side}.prompt and explanation_len={cfg.explanation_len}'
        what = f'encoder.context_tokens={context}, {what}' if side == 'encoder' and context else what
        require(total <= most, f'{what} make {total} tokens, the subject reads {most}.')
    n, around = cfg.explanation_len, texts.tags.around
    require(around < n, f'explanation_len={n} leaves no room between tags of {around} tokens.')


def check_prefixes(cfg, tags: response.Tags) -> None:
    """Raises LensError where a phase draws prefixes that no explanation has."""
    room = cfg.explanation_len - tags.around
    for name in cfg.phases:
        least, most = cfg[name].prefix_min, cfg[name].prefix_max
        wanted = f'0 and 0, or 1 <= prefix_min <= prefix_max <= {room}, the words that a response has room for'
        fits = least <= most <= room and (least > 0) == (most > 0)
        require(fits, f'{name}.prefix_min={least} and {name}.prefix_max={most} must be {wanted}.')


def check_context(cfg) -> None:
    """Raises LensError where no phase trains the encoder, which has a context to learn."""
    learns = not cfg.encoder.context_tokens or not cfg.phases or any(cfg[name].mse_weight != 0 for name in cfg.phases)
    why = 'the encoder would never learn the context without words, which figures compare with'
    blind = f'{"".join(cfg.phases[-1:])}.mse_weight=0 with encoder.context_tokens={cfg.encoder.context_tokens}'
    require(learns, f'{blind}: {why}.')


def check_batches(cfg, mesh) -> None:
    """Raises LensError where a batch of training cannot be split over the devices."""
    for name in cfg.phases:
        p = cfg[name]
        sharding.check_divides(p.documents, f'{name}.documents', mesh)
        each = p.slices * sharding.row_count(mesh)
        what = f'{name}.documents={p.documents} cannot be split into {name}.slices={p.slices} equal parts'
        require(p.documents % each == 0, f'{what} on every device: use a multiple of {each}.')


def check_phase(cfg, name: str) -> None:
    """Raises LensError for impossible values of the phase block `name`."""
    exists = name in cfg and 'objective' in cfg[name]
    require(exists, f'phases names {shown(repr(name))}, but there is no phase block of that name.')
    p = cfg[name]
    reads = objectives.OBJECTIVES[p.objective].reads
    alone = 'group' in reads and p.group < 2
    require(not alone, f'{name}.group={p.group} must be at least 2: advantages compare the group.')
    require(p.documents * p.vectors >= 2, f'{name}: one activation has no variance; raise documents or vectors.')
    texts = p.documents * p.vectors * (p.group * p.mean_of if 'group' in reads else 1)
    factors = 'documents x vectors' + ' x group x mean_of' * ('group' in reads)
    require(texts <= MOST_TEXTS, f'{name}: {factors} make {texts} texts in a micro-step, more than {MOST_TEXTS}.')
    both = p.updates > 1 and p.accumulate > 1
    require(not both, f'{name}.updates={p.updates} does not go with {name}.accumulate={p.accumulate}.')
    require(not p.resample or p.documents >= 2, f'{name}.resample=True needs {name}.documents of at least 2.')
    alone = not p.resample or p.slices == 1
    require(alone, f'{name}.resample=True needs {name}.slices=1: the next document may be in another slice.')
    for key, off in objectives.OPTIONAL.items():
        idle = f'{name}.{key}={shown(repr(p[key]))} does nothing under the {p.objective} objective'
        require(key in reads or p[key] == off, f'{idle}: use {off}.')
    both = p.reward_ema > 0 and p.reward_lag > 0
    require(
        not both, f'{name}.reward_ema={p.reward_ema} does not go with {name}.reward_lag={p.reward_lag}: set one to 0.'
    )
    both, why = p.mismatch != 0 and p.updates > 1, 'later updates differ from the sampler by what they have learnt'
    require(not both, f'{name}.mismatch does not go with {name}.updates={p.updates}: {why}.')
    open_end = p.length_price != 0 and not cfg.explanation_close
    require(
        not open_end, f'{name}.length_price needs an explanation_close: without one all responses are equally long.'
    )
    together = p.mean_of > 1 and (p.lm_weight != 0 or p.kl_weight != 0)
    require(not together, f'{name}.mean_of above 1 has no single text: set lm_weight and kl_weight to 0.')
    n, some = cfg.explanation_len, p.beta == 0 or 0 <= p.kl_skip < cfg.explanation_len
    require(some, f'{name}.kl_skip={p.kl_skip} leaves no token of explanation_len={n}.')


def check_documents(cfg, name: str, train: data.Split, tags: response.Tags) -> None:
    """Raises LensError where the data does not have what the phase block `name` asks for."""
    p, where = cfg[name], train.directory
    require(
        len(train) >= p.documents, f'{name}.documents={p.documents}, but {where} holds only {len(train)} documents.'
    )
    _check_vectors(p.vectors, f'{name}.vectors', train)
    if objectives.OBJECTIVES[p.objective].samples:
        return
    need = f'the {p.objective} objective of {name} needs given explanations'
    require(train.explanations is not None, f'{where}/explanations.npy does not exist: {need}.')
    row, need = data.first_unlabelled(train, cfg.data.min_pos), f'{name} needs one in each document'
    from_ = f'from data.min_pos={cfg.data.min_pos} on'
    require(row is None, f'{where}/positions.npy row {row} has no labelled position {from_}: {need}.')
    n, have = cfg.explanation_len, train.explanations.shape[2]
    require(have == n or bool(tags), f'explanation_len={n}, but the given explanations in {where} have {have} tokens.')


def check_stored(cfg, c: TransformerConfig, split: data.Split) -> None:
    """Raises LensError where stored activations are of another place than the lens reads, and for what needs their texts,
    which are not there."""
    where, d = f'{split.directory}/activations.npy', split.activations.shape[2]
    require(d == c.d_model, f'{where} has activations of {d} numbers, {cfg.subject.path} has streams of {c.d_model}.')
    of = split.meta['activations'].get('layer')
    require(of == cfg.layer, f'layer={cfg.layer}, but {where} was read after block {shown(of)}: set layer={shown(of)}.')
    idle = {'encoder.context_tokens': 0, **{f'{p}.{k}': 0 for p in cfg.phases for k in ('kl_weight', 'copy_price')}}
    idle |= {'data.positions': 'any'}
    scales = ['decoder.init'] * bool(injection.of_config(cfg.decoder, c).n_maps) + ['encoder.init']
    wrong = [k for k, off in idle.items() if get(cfg, k) != off]
    wrong += [k for k in scales if get(cfg, k) == 'scale' and not cfg.init_from]
    if wrong:
        off = idle.get(wrong[0], 'identity')
        raise LensError(
            f'{wrong[0]}={shown(repr(get(cfg, wrong[0])))} needs the texts, and {split.directory} has stored activations alone: use '
            f'{off!r}, or import it with --vectors=False.'
        )


def check_held_out(cfg, validation: data.Split) -> None:
    """Raises LensError where the held-out documents do not allow the figures that end a phase."""
    where, e = validation.directory, cfg.eval
    _check_vectors(e.vectors, 'eval.vectors', validation)
    read, counts = np.unique(validation.doc_id[validation.read_rows[: e.documents]], return_counts=True)
    require(len(read) > 1, f'{where} holds one document: controls need at least 2.')
    often, half = counts.max(), 'more than half of the documents that are evaluated'
    require(2 * often <= counts.sum(), f'{where}/doc_id.npy: {read[counts.argmax()]} is the id of {half}, {often}.')
    quick = e.quick_documents * e.vectors
    require(quick >= 2, 'eval.quick_documents x eval.vectors is one activation, which has no variance: raise one.')


def _check_vectors(vectors: int, key: str, split: data.Split) -> None:
    width, what = split.width or split.positions.shape[1], 'tokens' if split.width else 'activations'
    require(vectors <= width, f'{key}={vectors}, but the rows of {split.directory} have {width} {what}.')
