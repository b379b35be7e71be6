"""What every key of a configuration may hold: one table of types, ranges and choices, one walk that refuses the rest.

Units and meanings are in configs/base.py. What a value must be beside others, the subject or the data: config.py.
"""

import difflib
import functools
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections

from lens import cli, data, gumbel, losses, objectives, optimizer, policy
from lens.errors import LONGEST_TEXT, LensError, number, shown, text
from lens.models import injection, moe
from lens.models.encoder import READOUTS
from lens.models.transformer import REMAT_POLICIES

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
COMPUTE = ('auto', *DTYPES)
TRAIN = ('maps', 'lora', 'full')
MOST_DEVICES = 1 << 16  # of one axis of the mesh
MOST_UPDATES = 64  # every one is compiled
LONGEST_PATH = 4096  # of Linux
LEAST_SCALE = 1e-6  # of a factor that must not be zero, and below 1 of one that must not be one


class Whole(NamedTuple):
    """A whole number within bounds; None: that of errors.number."""

    least: int | None = None
    most: int | None = None


class Real(NamedTuple):
    """A finite number within bounds; None: that of errors.number."""

    least: float | None = None
    most: float | None = None


# A key holds a Whole, a Real, a bool, a str, a path, one of some texts, several texts (tuple), several whole numbers, a
# regex, or (object) numbers and texts in a notation that its reader checks.
REGEX, WHOLES = 'regex', 'wholes'
KEYS = {
    'seed': Whole(0),
    'subject.path': pathlib.Path,
    'subject.dtype': DTYPES,
    'subject.compute': COMPUTE,
    'subject.remat': REMAT_POLICIES,
    'subject.experts': moe.IMPLEMENTATIONS,
    'subject.packed': bool,
    'layer': Whole(),
    'data.path': pathlib.Path,
    'data.min_pos': Whole(0),
    'data.positions': data.POSITIONS,
    'explanation_len': Whole(1),
    'explanation_open': str,
    'explanation_close': str,
    'explanation_end': str,
    'position_vectors': bool,
    'tuned_lens': pathlib.Path,
    'decoder.prompt': str,
    'decoder.layers': WHOLES,
    'decoder.injection': str,
    'decoder.norm': Real(0),
    'decoder.marker': str,
    'decoder.patched_blocks': Whole(),
    'decoder.shared_map': bool,
    'decoder.init': str,
    'decoder.train': TRAIN,
    'encoder.prompt': str,
    'encoder.output_layer': Whole(),
    'encoder.readout': READOUTS,
    'encoder.context_tokens': Whole(0),
    'encoder.error': losses.ERRORS,
    'encoder.init': str,
    'encoder.train': TRAIN,
    'lora.pattern': REGEX,
    'lora.rank': Whole(1),
    'lora.alpha': Real(LEAST_SCALE),
    'lora.rs': bool,
    'init_from': pathlib.Path,
    'phases': tuple,
    'mesh.data': Whole(-1, MOST_DEVICES),
    'mesh.model': Whole(1, MOST_DEVICES),
    'mesh.replica': Whole(1, MOST_DEVICES),
    'mesh.shard_base': bool,
    'eval.every': object,
    'eval.quick_documents': Whole(1),
    'eval.documents': Whole(2),  # controls pair documents
    'eval.vectors': Whole(1),
    'eval.batch': Whole(1),
    'eval.samples': Whole(0),
    'eval.reading': Whole(0),
    'checkpoint.every': object,
    'checkpoint.keep': Whole(1),
    'checkpoint.best': Whole(0),
    'checkpoint.keep_every': object,
    'health.collapse': ('off', 'warn', 'stop'),
    'log.every': object,
    'log.drift': object,
    'log.tensorboard': bool,
    'log.wandb_project': str,
}
PHASE_KEYS = dict.fromkeys(objectives.KNOBS, object) | {  # of every phase block
    'objective': objectives.OBJECTIVES,
    'steps': object,
    'accumulate': Whole(1),
    'documents': Whole(1),
    'vectors': Whole(1),
    'learning_rate_decoder': object,
    'learning_rate_encoder': object,
    'table': object,
    'grad_clip': object,
    'resample': bool,
    'resample_stop_grad': bool,
    'group': Whole(1),
    'mean_of': Whole(1),
    'advantage': policy.ADVANTAGES,
    'reward': policy.REWARDS,
    'reward_ema': Real(0, 1 - LEAST_SCALE),
    'reward_lag': Whole(0),
    'policy': policy.POLICIES,
    'aggregate': policy.AGGREGATES,
    'drop_equal': bool,
    'encoder_texts': objectives.ENCODER_TEXTS,
    'prefix_min': Whole(0),
    'prefix_max': Whole(0),
    'updates': Whole(1, MOST_UPDATES),
    'slices': Whole(1),
    'clip': Real(LEAST_SCALE),
    'form': gumbel.FORMS,
    'kl_to': objectives.REFERENCES,
    'kl_top': Whole(0),
    'kl_skip': Whole(0),
}


def get(cfg, key: str):
    """Returns the value of a dotted key."""
    return functools.reduce(lambda block, name: block[name], key.split('.'), cfg)


def choice(value, choices, key: str) -> None:
    """Raises LensError where a text is none of the choices."""
    if text(value, key) not in choices:
        raise LensError(f'{key}={shown(repr(value))} is not one of {", ".join(choices)}.')


def check(cfg) -> None:
    """Raises LensError for a configuration that lacks a key or has one that nobody reads, and for a value that is
    impossible with any subject and any data."""
    if not isinstance(cfg, ml_collections.ConfigDict):
        raise LensError(f'get_config returned {type(cfg).__name__}, it must return the ConfigDict of configs/base.py.')
    phases = [k for k, block in cfg.items() if isinstance(block, ml_collections.ConfigDict) and 'objective' in block]
    known, have = KEYS | {f'{p}.{k}': kind for p in phases for k, kind in PHASE_KEYS.items()}, cli.flat_keys(cfg)
    if missing := known.keys() - have:
        raise LensError(f'the configuration lacks the key {min(missing)}: start it from get_config of configs/base.py.')
    # those of an injection and of an objective of one's own
    more = {f'decoder.{f}' for kind in injection.INJECTIONS.values() for f in kind.__dataclass_fields__}
    more |= {f'{p}.{k}' for p in phases for k in objectives.KNOBS}
    for key in have:
        if key not in known and key not in more:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise LensError(f'the configuration has a key {shown(key)}, which nobody reads; the nearest is {near}.')
        _check(get(cfg, key), known.get(key, object), key)


def _check(value, kind, key: str) -> None:
    """Raises LensError where a value is not of its kind."""
    if isinstance(kind, Whole | Real):
        number(value, key, *kind, whole=isinstance(kind, Whole))
    elif kind is bool:
        if not isinstance(value, bool):
            raise LensError(f'{key}={shown(repr(value))} must be True or False.')
    elif kind in (str, pathlib.Path):
        text(value, key, LONGEST_PATH if kind is pathlib.Path else LONGEST_TEXT)
    elif kind is REGEX:
        optimizer.regex(value, key)
    elif kind in (tuple, WHOLES):
        if not isinstance(value, tuple | list):
            what = 'texts' if kind is tuple else 'whole numbers'
            raise LensError(f'{key}={shown(repr(value))} must be a tuple of {what}.')
        for x in value:
            text(x, key) if kind is tuple else number(x, key)
    elif kind is object:
        _check_free(value, key)
    else:
        choice(value, kind, key)


def _check_free(value, key: str) -> None:
    if isinstance(value, tuple | list):
        for x in value:
            _check_free(x, key)
    elif isinstance(value, str):
        text(value, key)
    elif value is not None:
        number(value, key, whole=False)
