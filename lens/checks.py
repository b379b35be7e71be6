"""What a configuration may say: every check of its values, one sentence for each that is impossible."""

import importlib.util

import jax.numpy as jnp

from lens import data, gumbel, health, losses, objectives, optimizer, response, sharding
from lens.errors import LensError
from lens.models import injection, moe
from lens.models.decoder import Prompt
from lens.models.encoder import READOUTS
from lens.models.transformer import REMAT_POLICIES, TransformerConfig

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


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _choice(value, choices, key: str) -> None:
    require(value in choices, f'{key}={value!r} is not one of {", ".join(choices)}.')


def check_values(cfg) -> None:
    """Raises ConfigError for values that are impossible with any subject and any data."""
    for key in POSITIVE:
        block, _, name = key.rpartition('.')
        value = (cfg[block] if block else cfg)[name]
        require(value > 0, f'{key}={value} must be positive.')
    require(cfg.data.min_pos >= 0, f'data.min_pos={cfg.data.min_pos} must not be negative.')
    require(
        cfg.eval.documents >= 2, f'eval.documents={cfg.eval.documents} must be at least 2: controls pair documents.'
    )
    _choice(cfg.data.positions, data.POSITIONS, 'data.positions')
    _choice(cfg.subject.dtype, DTYPES, 'subject.dtype')
    _choice(cfg.subject.remat, REMAT_POLICIES, 'subject.remat')
    _choice(cfg.subject.experts, moe.IMPLEMENTATIONS, 'subject.experts')
    require(
        cfg.subject.experts != 'tokamax' or importlib.util.find_spec('tokamax') is not None,
        'subject.experts=tokamax needs the package tokamax: pip install tokamax, or use ragged.',
    )
    _choice(cfg.encoder.readout, READOUTS, 'encoder.readout')
    _choice(cfg.encoder.error, objectives.ERRORS, 'encoder.error')
    _choice(cfg.health.collapse, health.ACTIONS, 'health.collapse')
    require(cfg.checkpoint.best >= 0, f'checkpoint.best={cfg.checkpoint.best} must not be negative.')
    _choice(cfg.decoder.train, TRAIN_CHOICES, 'decoder.train')
    _choice(cfg.encoder.train, TRAIN_CHOICES, 'encoder.train')
    require(
        not (cfg.subject.packed and 'full' in (cfg.decoder.train, cfg.encoder.train)),
        'subject.packed=True keeps the experts as bytes, which cannot be trained: drop it, or use train=lora or maps.',
    )


def check_subject(cfg, c: TransformerConfig) -> None:
    """Raises ConfigError for values that are impossible with this subject."""
    last = c.n_layers - 1
    require(0 <= cfg.layer <= last, f'layer={cfg.layer} is not a block of the subject, which has blocks 0..{last}.')
    out = cfg.encoder.output_layer
    require(
        -1 <= out <= last, f'encoder.output_layer={out} is not a block of the subject (0..{last}, or -1 for layer).'
    )
    _check_decoder(cfg.decoder, c)
    require(
        not cfg.position_vectors or not c.ropes,
        f'position_vectors=True needs a subject with learned positions (GPT-2), not {c.family}.',
    )
    _check_starts(cfg, c)


def _check_decoder(d, c: TransformerConfig) -> None:
    _choice(d.injection, injection.FAMILIES, 'decoder.injection')
    n = d.patched_blocks
    require(-1 <= n <= c.n_layers, f'decoder.patched_blocks={n} is not in -1..{c.n_layers}, the blocks of the subject.')
    require(d.norm >= 0, f'decoder.norm={d.norm} must not be negative.')
    if d.injection == 'add':
        require(
            c.n_layers > injection.ADD_BLOCK,
            f'decoder.injection=add writes at block {injection.ADD_BLOCK}, the subject has {c.n_layers} blocks.',
        )
        require(bool(d.marker), 'decoder.injection=add needs decoder.marker, a text of one token for the slot.')


def _check_starts(cfg, c: TransformerConfig) -> None:
    if cfg.init_from:
        return
    _choice(cfg.decoder.init, INITS, 'decoder.init')
    _choice(cfg.encoder.init, INITS, 'encoder.init')
    require(
        cfg.encoder.init == 'identity' or cfg.encoder.readout != 'none',
        f'encoder.init={cfg.encoder.init} starts a map that encoder.readout=none does not have: use identity.',
    )
    require(
        'tuned_lens' not in (cfg.decoder.init, cfg.encoder.init) or bool(cfg.tuned_lens),
        'init=tuned_lens needs tuned_lens, a folder that lens.tools.tuned_lens has written.',
    )


def check_lengths(cfg, c: TransformerConfig, decoder: Prompt, encoder: tuple[list[int], list[int]]) -> None:
    """Raises ConfigError where the subject has no positions for a prompt with its explanation."""
    sides = {'decoder': len(decoder.left) + len(decoder.right), 'encoder': sum(map(len, encoder))}
    for side, tokens in sides.items():
        total = tokens + 1 + cfg.explanation_len  # the slot, or the token that was read
        require(
            total <= c.max_positions,
            f'{side}.prompt and explanation_len={cfg.explanation_len} make {total} tokens, the subject reads '
            f'{c.max_positions}.',
        )


def check_batches(cfg, mesh) -> None:
    """Raises LensError where a batch of training cannot be split over the devices."""
    for name in cfg.phases:
        sharding.check_divides(cfg[name].documents, f'{name}.documents', mesh)


def check_phase(cfg, name: str) -> None:
    """Raises LensError for impossible values of the phase block `name`."""
    require(
        name in cfg and 'objective' in cfg[name], f'phases names {name!r}, but there is no phase block of that name.'
    )
    p = cfg[name]
    _choice(p.objective, objectives.OBJECTIVES, f'{name}.objective')
    require(
        p.objective != 'grpo' or p.group >= 2,
        f'{name}.group={p.group} must be at least 2: advantages compare the group.',
    )
    require(
        p.documents * p.vectors >= 2,
        f'{name}: one activation per step has no variance; raise documents or vectors.',
    )
    _choice(p.advantage, losses.ADVANTAGES, f'{name}.advantage')
    _choice(p.kl_to, objectives.REFERENCES, f'{name}.kl_to')
    _choice(p.form, gumbel.FORMS, f'{name}.form')
    for key in ('group', 'mean_of', 'updates'):
        require(p[key] > 0, f'{name}.{key}={p[key]} must be positive.')
    require(
        p.updates == 1 or p.accumulate == 1,
        f'{name}.updates={p.updates} does not go with {name}.accumulate={p.accumulate}.',
    )
    require(p.clip > 0, f'{name}.clip={p.clip} must be positive.')
    require(not p.resample or p.documents >= 2, f'{name}.resample=True needs {name}.documents of at least 2.')
    for key, off in objectives.UNREAD[p.objective].items():
        require(p[key] == off, f'{name}.{key}={p[key]!r} does nothing under the {p.objective} objective: use {off}.')
    together = p.mean_of > 1 and (p.lm_weight != 0 or p.kl_weight != 0)
    require(not together, f'{name}.mean_of above 1 has no single text: set lm_weight and kl_weight to 0.')
    require(
        p.beta == 0 or 0 <= p.kl_skip < cfg.explanation_len,
        f'{name}.kl_skip={p.kl_skip} leaves no token of explanation_len={cfg.explanation_len}.',
    )
    require(p.vectors > 0, f'{name}.vectors={p.vectors} must be positive.')


def check_documents(cfg, name: str, train: data.Split, tags: response.Tags) -> None:
    """Raises ConfigError where the data does not have what the phase block `name` asks for."""
    p = cfg[name]
    require(
        len(train) >= p.documents,
        f'{name}.documents={p.documents}, but {train.directory} holds only {len(train)} documents.',
    )
    if p.objective in objectives.NEEDS_EXPLANATIONS:
        _check_explanations(cfg, name, p.objective, train, tags)


def _check_explanations(cfg, name: str, objective: str, train: data.Split, tags: response.Tags) -> None:
    require(
        train.explanations is not None,
        f'{train.directory}/explanations.npy does not exist: the {objective} objective of {name} needs given explanations.',
    )
    row = data.first_unlabelled(train, cfg.data.min_pos)
    require(
        row is None,
        f'{train.directory}/positions.npy row {row} has no labelled position from data.min_pos={cfg.data.min_pos} on: '
        f'{name} needs one in each document.',
    )
    have = train.explanations.shape[2]
    require(
        have == cfg.explanation_len or bool(tags),
        f'explanation_len={cfg.explanation_len}, but the given explanations in {train.directory} have {have} tokens.',
    )
    around = len(tags.opening) + len(tags.closing)
    require(
        around < cfg.explanation_len,
        f'explanation_len={cfg.explanation_len} leaves no room between tags of {around} tokens.',
    )


def clip_norms(value, key: str, table: tuple[optimizer.Row, ...]) -> float | dict[str, float]:
    """One norm, or a norm by clip group of the table from pairs."""
    try:
        by_group = {str(k): float(v) for k, v in value} if isinstance(value, (tuple, list)) else {'': float(value)}
    except (TypeError, ValueError) as e:
        raise ConfigError(
            f"{key}={value!r} is neither a norm nor pairs of a clip group and its norm, (('decoder', 0.05), …)."
        ) from e
    require(min(by_group.values(), default=1) > 0, f'{key}={value!r} must be positive; 1e9 clips nothing.')
    if not isinstance(value, (tuple, list)):
        return by_group['']
    groups = {row.clip for row in table if row.multiplier is not None}
    unknown = ', '.join(by_group.keys() - groups)
    require(not unknown, f'{key} names {unknown}, which is no clip group of the table: it has {", ".join(groups)}.')
    return by_group
