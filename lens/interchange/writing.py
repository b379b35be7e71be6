"""A lens as others have theirs: lens.export --format=nla | peft.

DIR/av   the decoder: a whole model (nla), or adapters on the subject as PEFT saves them (peft)
DIR/ar   the encoder: a model that ends after the block it reads, without final norm and head, and value_head.safetensors
         (nla), or adapters and head as EasyNLA saves them: ar_lora_value_head.safetensors, ar_meta.json (peft)

Each with its tokenizer and nla_meta.yaml (sidecar.py). What their formats have no place for stands in keys of ours at the
top of it, which their readers pass over: the tags and tokens of a response, which subject it was and where.
"""

import math
import os
import pathlib
import time
from typing import NamedTuple

import numpy as np
import yaml

from lens import files, hf, lens_folder, tensor_files
from lens.config import Run
from lens.errors import LensError, shown
from lens.interchange import sidecar
from lens.interchange.reading import RESPONSE
from lens.interchange.sidecar import Sidecar
from lens.models import families
from lens.models.injection import Replace
from lens.models.lens import Lens
from lens.models.lora import MATRICES
from lens.models.transformer import TransformerConfig
from lens.response import EMBED, TEXT

LAYOUTS = ('nla', 'peft')
FOLDERS = {'decoder': 'av', 'encoder': 'ar'}


class Subject(NamedTuple):
    """The model that a lens reads. name: as it was configured, a name of the Hub or a folder; folder: where it is here, as
    seen from the folder of the lens, '' for one of the Hub; content: its digest by hf.content."""

    name: str
    folder: str
    content: str


def subject_of(name: str, source: str, out: pathlib.Path) -> Subject:
    """Describes the subject `name`, which is at `source`, for a lens in `out`. Raises LensError."""
    found = files.find(source)
    folder = os.path.relpath(os.path.realpath(found), os.path.realpath(out)) if found.is_dir() else ''
    return Subject(name, folder, hf.content(source))


def check(layout: str, lens: Lens, c: TransformerConfig) -> None:
    """Raises LensError, which names the key, where the format has no place for what a lens does. lens, c: may be abstract."""
    d, e = lens.decoder, lens.encoder
    needs = {
        'decoder.injection=replace or add': not d.config.injection.soft_prompts,
        'decoder.marker, a text of one token': d.config.marker,
        'one slot in decoder.prompt': not d.config.more_slots,
        'decoder.layers=()': not d.config.layers,
        'encoder.readout=linear or none, a head without bias': e.readout_b is None,
        'encoder.output_layer to be layer': e.config.output_layer == d.config.layer,
        'encoder.context_tokens=0': not e.config.context_tokens,
        'position_vectors=False': d.positions is None,
    }
    if layout == 'peft':
        needs |= {f'{side}.train=lora': getattr(lens, side).adapters is not None for side in FOLDERS}
        fused = {t.path for t in families.FAMILIES[c.family].table if t.part is not None}
        paths = {f'blocks/{MATRICES[name][0]}/{name}' for name in [*(d.adapters or ()), *(e.adapters or ())]}
        needs['a matrix of its own for each adapter, which q, k and v are not in this family'] = not fused & paths
    if missing := [k for k, there in needs.items() if not there]:
        raise LensError(f'--format={layout} needs {missing[0]}, and this lens is another: take --format=hf.')


def sidecars(lens: Lens, run: Run, config: dict, subject: Subject, step: int) -> dict[str, Sidecar]:
    """Returns the sidecar of each side at a step of the run. Raises LensError where readers of the format would make other
    prompts of it."""
    d, e, d_model = lens.decoder, lens.encoder, run.base.config.d_model
    joints = run.texts.tags.joints  # which have the whole prompt where words may be joined with it
    around = (joints.before, joints.after) if joints else (e.left_ids, e.right_ids)
    inject, marker = d.config.injection, config['decoder']['marker']
    row = [*d.left_ids, d.config.marker, *d.right_ids]
    objectives = [config[phase.name]['objective'] for phase in run.phases if phase.start < step]
    stage = 'init' if not objectives else 'rl' if 'grpo' in objectives else 'sl'
    more = {
        'trained_on': [config['data']['path']],
        'parent_checkpoints': [subject.name],
        'created_at': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        'created_by': 'lens.export',
        'response': {k: config[k] for k in RESPONSE},
        'subject': subject._asdict(),
    }
    both = {
        'kind': 'nla_model',
        'base': subject.name,
        'd_model': d_model,
        'layer': d.config.layer,
        'family': inject.name,
        'mse_scale': math.sqrt(d_model),
        'marker': marker,
        'marker_id': d.config.marker,
        'left': d.left_ids[-1],
        'right': d.right_ids[0],
        'decoder_template': _user_text(run.tokenizer, config['decoder']['prompt'], marker, row),
        'encoder_template': _template(run.tokenizer, config['encoder']['prompt'], inject.name, around),
    }
    scale = inject.norm if isinstance(inject, Replace) else None
    sides = {
        'decoder': {
            'injection_scale': scale,
            'suffix': None,
            'prompt_ids': tuple(row),
            'more': more | {'stage': stage},
        },
        # the encoder is trained by its error alone, in every phase
        'encoder': {
            'injection_scale': None,
            'suffix': tuple(around[1][1:]),
            'more': more | {'stage': 'sl' if objectives else 'init'},
        },
    }
    return {
        side: Sidecar(pathlib.Path(FOLDERS[side], hf.SIDECAR), role=side, **both, **own) for side, own in sides.items()
    }


def _escaped(text: str) -> str:
    """A text as str.format gives it back."""
    return text.replace('{', '{{').replace('}', '}}')


def _user_text(tokenizer, prompt: str, marker: str, row: list[int]) -> str:
    """The template whose text as the one user turn of a chat is the prompt of a decoder, token for token."""
    for how in ({}, {'enable_thinking': False}):
        turns = [{'role': 'user', 'content': EMBED}]
        try:
            chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **how)
        except Exception as e:  # there may be no template, and one may raise what it likes
            raise LensError(
                f'The tokenizer of the subject renders no chat ({shown(e, 80)}): take --format=hf.'
            ) from None
        before, found, after = chat.partition(EMBED)
        inner = prompt.removeprefix(before).removesuffix(after)
        if found and prompt == before + inner + after:
            text = before + inner.replace(EMBED, marker) + after
            if tokenizer(text, add_special_tokens=False)['input_ids'] == row:
                return _escaped(inner).replace(EMBED, f'{{{sidecar.CHAR}}}')
    raise LensError(
        f'decoder.prompt={shown(repr(prompt), 200)} is not what the chat template of the subject makes of one user turn, and '
        f'readers of the format make {shown(repr(before + "…" + after), 200)}: train with that, or take --format=hf.'
    )


def _template(tokenizer, prompt: str, family: str, wanted: tuple) -> str:
    """The template of an encoder. Where the activation replaces a row its readers let the tokenizer add what stands before
    a text, where it is added to the stream they do not."""
    adds = family == Replace.name
    prefix = tokenizer.decode(tokenizer('')['input_ids']) if adds else ''
    before, _, after = prompt.removeprefix(prefix).rpartition(TEXT)
    left = tokenizer(before, add_special_tokens=adds)['input_ids']
    right = tokenizer(after, add_special_tokens=False)['input_ids']
    if (tuple(left), tuple(right)) != wanted:
        raise LensError(
            f'encoder.prompt={shown(repr(prompt), 200)}: readers of the format begin it with the tokens {left}, not '
            f'{[*wanted[0]]}: write {shown(repr(prefix or "no special token"))} at its beginning, or take --format=hf.'
        )
    return f'{_escaped(before)}{{{sidecar.EXPLANATION}}}{_escaped(after)}'


def write(directory: pathlib.Path, layout: str, lens: Lens, run: Run, told: dict[str, Sidecar], source: str) -> None:
    """Writes the directories of both sides. told: of `sidecars`; source: where the subject is. Raises LensError, OSError."""
    head = np.eye(run.base.config.d_model, dtype=np.float32)
    if lens.encoder.readout_w is not None:  # ours: y = x W; theirs: y = W x
        head = np.ascontiguousarray(np.asarray(lens.encoder.readout_w[...], np.float32).T)
    for side, name in FOLDERS.items():
        folder = directory / name
        if layout == 'nla':
            _write_model(folder, lens, run, side, source)
            if side == 'encoder':
                tensor_files.write(folder / hf.HEAD, {'weight': head})
        else:
            folder.mkdir()
            hf.copy_tokenizer(hf.local_directory(source, weights=False), folder)
            if side == 'decoder':
                _write_decoder(folder, lens, run, told[side])
            else:
                _write_encoder(folder, lens, run, told[side], head)
        text = yaml.safe_dump(told[side].written(), sort_keys=False, allow_unicode=True, width=120)
        files.write_text(folder / hf.SIDECAR, text)


def _write_model(folder: pathlib.Path, lens: Lens, run: Run, side: str, source: str) -> None:
    model = lens_folder.model(lens, run.base, side)
    if side == 'encoder':
        model.final_norm = model.head = None
    print(f'Writing {folder.name}: {model.config.n_layers} blocks, {model.embedding.dtype}', flush=True)
    hf.save_model(model, folder, source=source)


def _adapted(side, c: TransformerConfig) -> tuple[list[str], int, dict[str, np.ndarray]]:
    """(names of the adapted modules, rank, module.lora_X.weight with {} for X -> tensors of both factors), as PEFT has them:
    y = W x + B (A x), A [r, inputs], B [outputs, r]. The scale is in A, as it is trained, so that theirs is to be 1."""
    rows = {t.path: t for t in families.FAMILIES[c.family].table}
    modules, tensors = [], {}
    for name, ab in side.adapters.items():
        module = rows[f'blocks/{MATRICES[name][0]}/{name}'].hf_name.removesuffix('.weight')
        modules.append(module.rpartition('.')[2])
        a, b = (np.asarray(ab[k], np.float32) for k in ('a', 'b'))
        for i in range(len(a)):
            at = families.FAMILIES[c.family].prefix + module.format(i)
            tensors[f'{at}.lora_A'] = np.ascontiguousarray(a[i].reshape(-1, a.shape[-1]).T)
            tensors[f'{at}.lora_B'] = np.ascontiguousarray(b[i].reshape(b.shape[1], -1).T)
    return sorted(modules), a.shape[-1], tensors


def _write_decoder(folder: pathlib.Path, lens: Lens, run: Run, told: Sidecar) -> None:
    """As PeftModel.save_pretrained does."""
    modules, rank, tensors = _adapted(lens.decoder, run.base.config)
    config = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': told.base,
        'r': rank,
        'lora_alpha': rank,
        'use_rslora': False,
        'lora_dropout': 0.0,
        'bias': 'none',
        'fan_in_fan_out': False,
        'inference_mode': True,
        'target_modules': modules,
    }
    tensor_files.write(folder / hf.PEFT_WEIGHTS, {f'base_model.model.{k}.weight': x for k, x in tensors.items()})
    files.write_json(folder / hf.PEFT, config)


def _write_encoder(folder: pathlib.Path, lens: Lens, run: Run, told: Sidecar, head: np.ndarray) -> None:
    """As EasyNLA does, whose scale is always alpha / sqrt(rank)."""
    modules, rank, tensors = _adapted(lens.encoder, run.base.config)
    meta = {
        'ar_num_layers': told.layer + 1,
        'lora_r': rank,
        'lora_alpha': math.sqrt(rank),
        'quant': 'none',
        'target_modules': modules,
        'final_norm_stripped': True,
    }
    tensors = {f'backbone.{k}.default.weight': x for k, x in tensors.items()} | {'value_head.weight': head}
    tensor_files.write(folder / hf.LORA_ENCODER_WEIGHTS, tensors)
    files.write_json(folder / hf.LORA_ENCODER, meta)
