"""The directories of a lens of others: what is in them, read and refused, but for whole models.

DIR/av, DIR/ar       (or actor and critic, decoder and encoder): the two sides; nla_meta.yaml in each, or one in DIR for both
DIR                  of a decoder alone; its encoder is beside it, under the same name with ar for av, critic for actor: so
                     for a name of the Hub as well

A side is a whole model (an encoder with value_head.safetensors, without final norm and head), or adapters on the subject:
those of PEFT, the `ar_meta.json` of EasyNLA, an activation oracle (ao_config.json; a decoder that is asked).
"""

import dataclasses
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from lens import files, hf, tensor_files
from lens.errors import LensError, number, shown
from lens.hf import HEAD, LORA_ENCODER, LORA_ENCODER_WEIGHTS, ORACLE, PEFT, PEFT_WEIGHTS, SIDECAR
from lens.interchange import sidecar
from lens.interchange.sidecar import Sidecar
from lens.models.transformer import TransformerConfig

FOLDERS = {'decoder': ('av', 'actor', 'decoder'), 'encoder': ('ar', 'critic', 'encoder')}
BESIDE = {'av': 'ar', 'actor': 'critic'}  # word in the name of a decoder -> in that of its encoder
WORD = re.compile(r'(?<![a-z])(av|actor)(?![a-z])')
HUB_ID = re.compile(r'[\w-][\w.-]*/[\w.-]+')
PROJECTIONS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
ADAPTED = re.compile(
    r'layers\.(\d+)\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.lora_(A|B)(?:\.default)?\.weight$'
)
WANTS_NONE = ('use_dora', 'modules_to_save', 'rank_pattern', 'alpha_pattern', 'lora_bias')  # of PEFT, not supported


class Adapters(NamedTuple):
    """Low-rank adapters as stored. tensors: (matrix, layer, 'A' | 'B') -> [r, inputs] | [outputs, r]; scale: of their product;
    base: the model that they are on, '' where it is not said."""

    tensors: dict[tuple[str, int, str], np.ndarray]
    rank: int
    alpha: float
    rs: bool
    base: str = ''

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rs else self.rank)

    @property
    def matrices(self) -> set[str]:
        return {name for name, _, _ in self.tensors}


@dataclasses.dataclass(frozen=True)
class Side:
    """One side as it is on disk. told: its sidecar, None of an activation oracle. config: of a whole model, else adapters.
    head: the map after the block that an encoder reads, y = weight x + bias. blocks: that its encoder has, where a file
    says it. normed: whether the final norm of the subject stands before the head."""

    directory: pathlib.Path
    told: Sidecar | None
    config: TransformerConfig | None = None
    adapters: Adapters | None = None
    head: dict[str, np.ndarray] | None = None
    blocks: int | None = None
    normed: bool = False

    @property
    def train(self) -> str:
        return 'lora' if self.adapters else 'full'


def is_foreign(path: str | pathlib.Path) -> bool:
    """Tells a lens of others from a run and from a folder of lens.export. A name of the Hub is one where it says av."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        return '@[' in str(path) or bool(HUB_ID.fullmatch(str(path)) and WORD.search(folder.name))
    if (folder / 'lens.json').exists() or (folder / 'checkpoints').exists():
        return False
    subfolders = [n for names in FOLDERS.values() for n in names[:2]]
    return any((folder / n).exists() for n in (*subfolders, f'decoder/{SIDECAR}', SIDECAR, PEFT))


def _directories(path: str | pathlib.Path) -> dict[str, pathlib.Path]:
    """The directory of each side that is there, by name. Raises LensError where there is no decoder."""
    if '@[' in str(path):
        raise LensError(f'{shown(path)}: rows of a data set cannot be picked here: give the directory of a lens.')
    folder = hf.local_directory(path)
    odd = [folder / n for names in FOLDERS.values() for n in names if os.path.lexists(folder / n)]
    if odd := [x for x in odd if not x.is_dir()]:
        raise LensError(f'{odd[0]} is no folder: put the directory of a model there, or remove it.')
    below = {side: next((folder / n for n in names if (folder / n).is_dir()), None) for side, names in FOLDERS.items()}
    if any(below.values()):
        if below['decoder'] is None:
            raise LensError(f'{folder} has no folder av, actor or decoder: give the decoder of this lens too.')
        return {side: _inner(x) for side, x in below.items() if x}
    out, name = {'decoder': _inner(folder)}, pathlib.Path(path).name
    other = pathlib.Path(path).with_name(WORD.sub(lambda m: BESIDE[m[1]], name))
    if other.name != name and (other.is_dir() or not pathlib.Path(path).is_dir()):
        out['encoder'] = _inner(hf.local_directory(other))
    return out


def _inner(directory: pathlib.Path) -> pathlib.Path:
    """Where the model of a directory is: trainers put it beside their own files, in hf/."""
    inner = directory / 'hf'
    return inner if inner.is_dir() and not (directory / 'config.json').exists() else directory


def sides(path: str | pathlib.Path) -> dict[str, Side]:
    """Reads what a lens of others is but for whole models: sidecars, configurations, adapters, heads. Raises LensError."""
    found = _directories(path)
    return {side: _side(side, directory) for side, directory in found.items()}


def _side(side: str, directory: pathlib.Path) -> Side:
    told = _told(side, directory)
    if (directory / PEFT).exists():
        if side == 'encoder':
            raise LensError(
                f'{directory}/{PEFT} is of a decoder: an encoder of adapters has {LORA_ENCODER} and its head.'
            )
        return Side(directory, told, adapters=_peft(directory))
    if told is None:
        raise LensError(f'{directory}/{SIDECAR} does not exist: put the sidecar of this model there.')
    if side == 'encoder' and (directory / LORA_ENCODER).exists():
        return _lora_encoder(directory, told)
    config = hf.read_config(directory)
    if told.d_model != config.d_model:
        raise LensError(
            f'{told.file}: d_model={told.d_model}, the model beside it has hidden states of {config.d_model}: give the '
            'sidecar of this model.'
        )
    if side == 'decoder':
        return Side(directory, told, config)
    file = directory / HEAD
    return Side(directory, told, config, head=_head(file, tensor_files.read_all(file), told), blocks=config.n_layers)


def _told(side: str, directory: pathlib.Path) -> Sidecar | None:
    """The sidecar of a side: its own, else that of the folder around; None where there is none, as of an oracle.

    Raises LensError where there are two that do not agree, or one of another role.
    """
    files_ = [x for x in (directory / SIDECAR, directory.parent / SIDECAR) if x.exists()]
    if not files_:
        if side == 'decoder' and (directory / ORACLE).exists() and (directory / PEFT).exists():
            files.read_json(directory / ORACLE, tensor_files.AGAIN)
            return None
        raise LensError(f'{directory}/{SIDECAR} does not exist: put the sidecar of this model there.')
    found = [sidecar.parse(x) for x in files_]
    told, around = found[0], found[-1]
    if told.role not in ('', side):
        raise LensError(
            f'{told.file} is of the role of a {told.role}, and lies in the place of the {side}: exchange the folders.'
        )
    names = ('d_model', 'marker', 'marker_id', 'left', 'right', 'decoder_template', 'encoder_template', 'layer')
    pairs = {k: (getattr(told, k), getattr(around, k)) for k in names}
    if differ := [k for k, (a, b) in pairs.items() if a != b and a not in (None, '', -1) and b not in (None, '', -1)]:
        raise LensError(f'{told.file} and {around.file} differ in {", ".join(differ)}: remove the one that is wrong.')
    family, scale = told.family or around.family, told.injection_scale or around.injection_scale
    if not family and told.kind == 'nla_model' and side == 'decoder' and not (directory / PEFT).exists():
        family = 'replace'  # of kitft, whose sidecars name none
    return dataclasses.replace(told, family=family, injection_scale=scale)


def _peft(directory: pathlib.Path) -> Adapters:
    file = directory / PEFT
    c = files.read_json(file, tensor_files.AGAIN)
    kind, odd = c.get('peft_type'), [k for k in WANTS_NONE if c.get(k)] + ['bias'] * (c.get('bias', 'none') != 'none')
    if kind != 'LORA' or odd:
        what = f'{odd[0]}={shown(repr(c[odd[0]]), 60)}' if odd else f'peft_type={shown(repr(kind), 40)}'
        raise LensError(f'{file}: {what} is not supported: merge the adapter into its model and give that.')
    weights = directory / PEFT_WEIGHTS
    tensors, rest = _adapted(tensor_files.read_all(weights))
    if rest or not tensors:
        what = f'holds {shown(rest[0])}, which is no adapter of a matrix of a block' if rest else 'holds no adapter'
        raise LensError(f'{weights} {what}: merge the adapter into its model and give that.')
    return _adapters(file, tensors, c.get('r'), c.get('lora_alpha'), _flag(file, c, 'use_rslora'), c)


def _lora_encoder(directory: pathlib.Path, told: Sidecar) -> Side:
    """An encoder of EasyNLA: adapters with rank-stabilised scale, and its head."""
    file, weights = directory / LORA_ENCODER, directory / LORA_ENCODER_WEIGHTS
    c, stored = files.read_json(file, tensor_files.AGAIN, keys={'ar_num_layers': int}), tensor_files.read_all(weights)
    tensors, rest = _adapted(stored)
    head = {n.removeprefix('value_head.'): stored[n] for n in rest}
    adapters = _adapters(file, tensors, c.get('lora_r'), c.get('lora_alpha'), True, c)
    normed = not _flag(file, c, 'final_norm_stripped')  # as it was before the key was there
    blocks = number(c['ar_num_layers'], f'{file}: ar_num_layers', 1)
    return Side(directory, told, None, adapters, _head(weights, head, told), blocks, normed)


def _flag(file: pathlib.Path, config: dict, key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):  # a text that says no is true
        raise LensError(f'{file}: {key}={shown(repr(value), 40)} must be true or false.')
    return value


def _adapted(stored: dict[str, np.ndarray]) -> tuple[dict, list[str]]:
    """(tensors of Adapters, names of the others)."""
    found = {name: m for name in stored if (m := ADAPTED.search(name))}
    chosen = {(m[2], int(m[1]), m[3]): name for name, m in found.items()}
    return {k: stored[name] for k, name in chosen.items()}, sorted(stored.keys() - chosen.values())


def _adapters(file: pathlib.Path, tensors: dict, rank, alpha, rs: bool, config: dict) -> Adapters:
    number(rank, f'{file}: rank', 1)
    number(alpha, f'{file}: lora_alpha', 1e-6, whole=False)
    for (name, layer, part), x in tensors.items():
        other = tensors.get((name, layer, 'AB'.replace(part, '')))
        if x.ndim != 2 or x.shape['AB'.index(part)] != rank or other is None:
            what = f'shape {x.shape}' if other is not None else 'no other factor'
            raise LensError(
                f'{file} says rank {rank}, and adapter {part} of {name} in block {layer} has {what}: {tensor_files.AGAIN}.'
            )
    named = config.get('target_modules')
    named = [str(n).rpartition('.')[2] for n in named] if isinstance(named, list) else []
    if lost := [n for n in named if n in PROJECTIONS and n.removesuffix('_proj') not in {m for m, _, _ in tensors}]:
        raise LensError(f'{file} says target_modules {lost[0]}, of which no adapter is stored: {tensor_files.AGAIN}.')
    base = config.get('base_model_name_or_path')
    return Adapters(tensors, rank, float(alpha), rs, base if isinstance(base, str) else '')


def _head(file: pathlib.Path, stored: dict[str, np.ndarray], told: Sidecar) -> dict[str, np.ndarray]:
    d, shapes = told.d_model, {name: x.shape for name, x in stored.items()}
    if shapes not in ({'weight': (d, d)}, {'weight': (d, d), 'bias': (d,)}):
        have = ', '.join(f'{n} {s}' for n, s in shapes.items()) or 'nothing'
        raise LensError(
            f'{file} must hold weight {(d, d)}, perhaps bias {(d,)}, and holds {shown(have)}: {tensor_files.AGAIN}.'
        )
    return stored
