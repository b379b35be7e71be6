"""From a configuration to the objects of a run; every check of the configuration is here.

The ConfigDict stops here: what leaves is frozen dataclasses, arrays and functions.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from lens import data, hf, objectives, optimizer, sharding
from lens.errors import LensError
from lens.models import lora, subject
from lens.models.decoder import Decoder, DecoderConfig
from lens.models.encoder import Encoder, EncoderConfig
from lens.models.lens import Lens
from lens.models.transformer import REMAT_POLICIES, Transformer

EMBED, TEXT = '<embed>', '<text>'
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
NORM_DOCUMENTS = 10  # texts that the scale of the maps is measured on


class ConfigError(LensError):
    """A configuration value is impossible; the message names the key."""


class State(struct.PyTreeNode):
    """What a step changes: optimizer step count, trainable tree, optimizer state."""

    step: jax.Array
    params: Lens
    opt: optax.OptState


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
        return self.phases[-1].end


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _choice(value, choices, key: str) -> None:
    _require(value in choices, f'{key}={value!r} is not one of {", ".join(choices)}.')


def _split_prompt(tokenizer, text: str, mark: str, key: str) -> tuple[list[int], list[int]]:
    _require(text.count(mark) == 1, f'{key}={text!r} must contain {mark} exactly once.')
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
    _choice(cfg.subject.dtype, DTYPES, 'subject.dtype')
    _choice(cfg.subject.remat, REMAT_POLICIES, 'subject.remat')
    _choice(cfg.decoder.train, TRAIN_CHOICES, 'decoder.train')
    _choice(cfg.encoder.train, TRAIN_CHOICES, 'encoder.train')
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.model)
    base = hf.load_model(cfg.subject.path, dtype=DTYPES[cfg.subject.dtype], mesh=mesh, remat=cfg.subject.remat)
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
    longest = max(train.tokens.shape[1], validation.tokens.shape[1])
    _require(
        longest <= c.max_positions,
        f'{train.directory} has {longest} tokens a row, the subject reads {c.max_positions}.',
    )
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
        phases=_phases(cfg, mesh, tokenizer, train),
    )


def from_block(kind, block):
    """The dataclass `kind` from the keys of the same name of a configuration block."""
    return kind(**{f.name: block[f.name] for f in dataclasses.fields(kind)})


def _phases(cfg, mesh, tokenizer, train: data.Split) -> tuple[Phase, ...]:
    prefix = tokenizer(cfg.decoder.prompt.replace(EMBED, 'something'), add_special_tokens=False)['input_ids']
    _require(len(cfg.phases) > 0, 'phases is empty: name at least one phase, e.g. sft.')
    phases, start = [], 0
    for name in cfg.phases:
        _require(
            name in cfg and 'objective' in cfg[name],
            f'phases names {name!r}, but there is no phase block of that name.',
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
        labelled = p.objective in objectives.NEEDS_EXPLANATIONS
        _require(p.vectors > 0, f'{name}.vectors={p.vectors} must be positive.')
        _require(
            len(train) >= p.documents,
            f'{name}.documents={p.documents}, but {train.directory} holds only {len(train)} documents.',
        )
        if labelled:
            _require(
                train.explanations is not None,
                f'{train.directory}/explanations.npy does not exist: the {p.objective} objective of {name} needs given explanations.',
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
        hp = objectives.Hparams(
            layer=cfg.layer,
            length=cfg.explanation_len,
            group=p.group,
            entropy_weight=p.entropy_weight,
            entropy_clamp=p.entropy_clamp,
            beta=p.beta,
            kl_skip=p.kl_skip,
            natural_prefix=tuple(prefix),
        )
        tx = optimizer.make(from_block(optimizer.OptimizerConfig, p))
        phases.append(
            Phase(
                name=name,
                start=start,
                end=start + p.steps,
                objective=objectives.OBJECTIVES[p.objective],
                hparams=hp,
                tx=tx,
                documents=p.documents,
                vectors=p.vectors,
                labelled=labelled,
            )
        )
        start += p.steps
    return tuple(phases)


def _stream_norms(run: Run) -> jax.Array:
    """subject.stream_norms over the first training texts; the same texts on every mesh."""
    n = min(NORM_DOCUMENTS, len(run.train))
    rows = run.mesh.shape['data'] * -(-n // run.mesh.shape['data'])
    tokens, lengths = np.zeros((rows, run.train.tokens.shape[1]), np.int32), np.zeros(rows, np.int32)
    tokens[:n], lengths[:n] = run.train.tokens[:n], run.train.lengths[:n]
    batch = sharding.put_batch({'tokens': tokens, 'lengths': lengths}, run.mesh)
    return jax.jit(subject.stream_norms)(run.base, batch['tokens'], batch['lengths'])


def init_lens(cfg, run: Run) -> Lens:
    """The trainable tree at step 0, made in its place on the mesh. Reproducible from cfg.seed.

    Call under jax.set_mesh(run.mesh).
    """
    dec_config = DecoderConfig(cfg.decoder.patched_blocks, cfg.decoder.shared_map, cfg.layer)
    output_layer = cfg.layer if cfg.encoder.output_layer == -1 else cfg.encoder.output_layer
    enc_config = EncoderConfig(output_layer, cfg.encoder.readout)

    def adapters(side, blocks, key):
        if side.train != 'lora':
            return None
        return lora.init_adapters(blocks, cfg.lora.pattern, cfg.lora.rank, cfg.lora.alpha, key)

    def make(base, norms, key):
        dec_key, enc_key = jax.random.split(key)
        enc_blocks = base.truncated(output_layer + 1).blocks
        return Lens(
            Decoder(
                dec_config,
                *run.decoder_prompt,
                base,
                norms,
                own_base=cfg.decoder.train == 'full',
                adapters=adapters(cfg.decoder, base.blocks, dec_key),
            ),
            Encoder(
                enc_config,
                *run.encoder_prompt,
                base,
                own_base=cfg.encoder.train == 'full',
                adapters=adapters(cfg.encoder, enc_blocks, enc_key),
            ),
        )

    args = (run.base, _stream_norms(run), jax.random.key(run.seed))
    place = sharding.shardings(jax.eval_shape(make, *args), run.mesh)
    return jax.jit(make, out_shardings=place)(*args)


def phase_at(run: Run, step: int) -> Phase:
    """The phase that goes on from global step `step`; the last one when all are done."""
    return next((p for p in run.phases if step < p.end), run.phases[-1])


def init_state(params: Lens, phase: Phase, mesh, step: int = 0) -> State:
    """Fresh optimizer state for `phase`."""
    place = sharding.shardings(jax.eval_shape(phase.tx.init, params), mesh)
    opt = jax.jit(phase.tx.init, out_shardings=place)(params)
    count = sharding.place({'step': jnp.asarray(step, jnp.int32)}, mesh)
    return State(params=params, opt=opt, **count)
