"""From a configuration to the settings of a run; every check of the configuration is here.

The ConfigDict stops here: what leaves is frozen dataclasses, arrays and functions.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lens import data, hf, objectives, optimizer, sharding
from lens.errors import LensError
from lens.models import moe
from lens.models.transformer import REMAT_POLICIES, Transformer

EMBED, TEXT = '<embed>', '<text>'
# What a special token looks like in a prompt: <|im_start|>, <bos>, <start_of_turn>, [EOS].
SPECIAL_LITERAL = r'<\|[^|<>]+\|>|</?\w+>|\[[A-Z]+\]'
TRAIN_CHOICES = ('maps', 'lora', 'full')
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
POSITIVE = (
    'explanation_len',
    'lora.rank',
    'mesh.model',
    'eval.quick_documents',
    'eval.vectors',
    'eval.batch',
    'checkpoint.every_steps',
    'checkpoint.keep',
    'log.every_steps',
)


class ConfigError(LensError):
    """A configuration value is impossible; the message names the key."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training with one objective: global steps start..end-1."""

    name: str
    start: int
    end: int
    objective: Callable
    hparams: objectives.Hparams
    tx: optax.GradientTransformation
    documents: int
    vectors: int
    labelled: bool


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
    decoder_prompt: tuple[list[int], list[int]]  # token ids left and right of the slot
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


def _split_prompt(tokenizer, text: str, mark: str, key: str) -> tuple[list[int], list[int]]:
    """Token ids left and right of `mark`. Special tokens are written out, and each must be one token."""
    _require(text.count(mark) == 1, f'{key}={text!r} must contain {mark} exactly once.')
    for literal in re.findall(SPECIAL_LITERAL, text.replace(mark, '')):
        _require(
            len(tokenizer(literal, add_special_tokens=False)['input_ids']) == 1,
            f'{key} holds {literal}, which is no token of the subject: write a special token that its tokenizer has.',
        )
    return tuple(tokenizer(part, add_special_tokens=False)['input_ids'] for part in text.split(mark))


def open_run(cfg) -> Run:
    """Checks `cfg`, loads the frozen base and opens the data. Raises LensError."""
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
    _choice(cfg.decoder.train, TRAIN_CHOICES, 'decoder.train')
    _choice(cfg.encoder.train, TRAIN_CHOICES, 'encoder.train')
    _require(
        not (cfg.subject.packed and 'full' in (cfg.decoder.train, cfg.encoder.train)),
        'subject.packed=True keeps the experts as bytes, which cannot be trained: drop it, or use train=lora or maps.',
    )
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model)
    base = hf.load_model(
        cfg.subject.path,
        dtype=DTYPES[cfg.subject.dtype],
        mesh=mesh,
        remat=cfg.subject.remat,
        experts=cfg.subject.experts,
        packed=cfg.subject.packed,
    )
    tokenizer = hf.load_tokenizer(cfg.subject.path)
    c = base.config
    last = c.n_layers - 1
    _require(0 <= cfg.layer <= last, f'layer={cfg.layer} is not a block of the subject, which has blocks 0..{last}.')
    out = cfg.encoder.output_layer
    _require(
        -1 <= out <= last, f'encoder.output_layer={out} is not a block of the subject (0..{last}, or -1 for layer).'
    )
    n = cfg.decoder.patched_blocks
    _require(0 <= n <= c.n_layers, f'decoder.patched_blocks={n} is not in 0..{c.n_layers}, the blocks of the subject.')
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
    _require(
        len(cfg.phases) > 0 or bool(cfg.init_from),
        'phases is empty: name at least one phase, e.g. sft, or give init_from to evaluate an exported lens.',
    )
    for name in cfg.phases:
        _check_phase(cfg, name, mesh, train)
    prefix = tokenizer(cfg.decoder.prompt.replace(EMBED, 'something'), add_special_tokens=False)['input_ids']
    return Run(
        mesh=mesh,
        tokenizer=tokenizer,
        base=base,
        train=train,
        validation=validation,
        layer=cfg.layer,
        length=cfg.explanation_len,
        min_pos=cfg.data.min_pos,
        seed=cfg.seed,
        decoder_prompt=_split_prompt(tokenizer, cfg.decoder.prompt, EMBED, 'decoder.prompt'),
        encoder_prompt=_split_prompt(tokenizer, cfg.encoder.prompt, TEXT, 'encoder.prompt'),
        evaluation=from_block(EvalSettings, cfg.eval),
        phases=make_phases(cfg, prefix),
    )


def from_block(kind, block):
    """The dataclass `kind` from the keys of the same name of a configuration block."""
    return kind(**{f.name: block[f.name] for f in dataclasses.fields(kind)})


def _check_phase(cfg, name: str, mesh, train: data.Split) -> None:
    """Raises LensError for impossible values of the phase block `name`."""
    _require(
        name in cfg and 'objective' in cfg[name], f'phases names {name!r}, but there is no phase block of that name.'
    )
    p = cfg[name]
    _choice(p.objective, objectives.OBJECTIVES, f'{name}.objective')
    _require(p.steps > 0, f'{name}.steps={p.steps} must be positive; drop the phase from phases instead.')
    _require(
        p.objective != 'grpo' or p.group >= 2,
        f'{name}.group={p.group} must be at least 2: advantages compare the group.',
    )
    _require(
        0 <= p.warmup_steps < p.steps, f'{name}.warmup_steps={p.warmup_steps} is not below {name}.steps={p.steps}.'
    )
    _require(
        p.documents * p.vectors >= 2,
        f'{name}: one activation per step has no variance; raise documents or vectors.',
    )
    _require(
        not p.beta or 0 <= p.kl_skip < cfg.explanation_len,
        f'{name}.kl_skip={p.kl_skip} leaves no token of explanation_len={cfg.explanation_len}.',
    )
    sharding.check_divides(p.documents, f'{name}.documents', mesh)
    _require(p.vectors > 0, f'{name}.vectors={p.vectors} must be positive.')
    _require(
        len(train) >= p.documents,
        f'{name}.documents={p.documents}, but {train.directory} holds only {len(train)} documents.',
    )
    if p.objective in objectives.NEEDS_EXPLANATIONS:
        _check_explanations(cfg, name, p.objective, train)


def _check_explanations(cfg, name: str, objective: str, train: data.Split) -> None:
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
        have == cfg.explanation_len,
        f'explanation_len={cfg.explanation_len}, but the given explanations in {train.directory} have {have} tokens.',
    )


def make_phases(cfg, natural_prefix: list[int]) -> tuple[Phase, ...]:
    """The phases of a configuration in their order. natural_prefix: ids of the decoder prompt with a word
    in place of the activation."""
    phases, start = [], 0
    for name in cfg.phases:
        p = cfg[name]
        hp = objectives.Hparams(
            layer=cfg.layer,
            length=cfg.explanation_len,
            group=p.group if p.objective == 'grpo' else 1,
            entropy_weight=p.entropy_weight,
            entropy_clamp=p.entropy_clamp,
            beta=p.beta,
            kl_skip=p.kl_skip,
            natural_prefix=tuple(natural_prefix),
            tau=p.tau,
        )
        phases.append(
            Phase(
                name=name,
                start=start,
                end=start + p.steps,
                objective=objectives.OBJECTIVES[p.objective],
                hparams=hp,
                tx=optimizer.make(from_block(optimizer.OptimizerConfig, p)),
                documents=p.documents,
                vectors=p.vectors,
                labelled=p.objective in objectives.NEEDS_EXPLANATIONS,
            )
        )
        start += p.steps
    return tuple(phases)
