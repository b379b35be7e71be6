"""A lens that others have trained, from its directories to the configuration and the parameters of one of ours.

The keys of a configuration that decide what such a lens does are taken from it, its parameters take the places that those of
our own lens have: from then on nothing knows where it is from. Where it has no encoder, that is the untouched subject.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from lens import hf, lens_folder, sharding
from lens.configs import base as defaults
from lens.errors import LensError, shown
from lens.interchange import sidecar
from lens.interchange.directories import FOLDERS, LORA_ENCODER, Side, is_foreign, sides
from lens.interchange.sidecar import Sidecar
from lens.keys import get
from lens.models.lens import Lens
from lens.models.lora import MATRICES
from lens.models.transformer import TransformerConfig
from lens.response import EMBED, TEXT

# Of responses, which no sidecar tells of: what the published recipe trains.
TAGS = {'explanation_open': '<explanation>\n', 'explanation_close': '\n</explanation>', 'explanation_len': 150}
MARKER, QUESTION = ' ?', 'Can you describe what this activation represents?'  # of an activation oracle
# Keys that another value would make another lens of; of the others an explicit one counts.
BOUND = ('layer', 'decoder.prompt', 'decoder.injection', 'decoder.marker', 'decoder.train', 'encoder.prompt')
BOUND += ('encoder.output_layer', 'encoder.readout', 'encoder.train', 'encoder.context_tokens', 'position_vectors')


def configured(cfg, found):
    """Returns a copy of a configuration in which the keys that decide what a lens of others in init_from does are those of
    that lens, and cfg where init_from is none. found: `cfg` with its folders as they are found.

    A key that has its default takes the value of the lens. Raises LensError where another one would make another lens of
    it, and for all that the directories show to be wrong before models are read.
    """
    if not is_foreign(found.init_from):
        return cfg
    read, out, usual = sides(found.init_from), cfg.copy_and_resolve_references(), defaults.get_config()
    decoder = read['decoder']
    if not cfg.subject.path:
        out.subject.path = decoder.told.base if decoder.told else decoder.adapters.base
    subject = found.subject.path or out.subject.path
    lens = _keys(read, out, subject)
    differ = [k for k in BOUND if k in lens and get(out, k) not in (lens[k], get(usual, k))]
    if differ:
        told = ', '.join(f'{k}={shown(repr(get(out, k)), 60)}, the lens has {shown(repr(lens[k]), 60)}' for k in differ)
        raise LensError(f'init_from={found.init_from}: {told}: leave {", ".join(differ)} to the lens.')
    out.update_from_flattened_dict({k: x for k, x in lens.items() if get(out, k) == get(usual, k)})
    return out


def _keys(read: dict[str, Side], cfg, subject: str) -> dict:
    """The keys of a lens by dotted name; cfg says what its files leave open. Raises LensError."""
    decoder, encoder = read['decoder'], read.get('encoder')
    if not subject:
        raise LensError(
            f'{decoder.directory} names no model that it reads: give it as subject.path, to lens.load as subject.'
        )
    c, tokenizer = hf.read_config(hf.local_directory(subject, weights=False)), hf.load_tokenizer(subject)
    for side in read.values():
        _check_model(side, side is encoder, c, subject)
    out = {'layer': _layer(read, c, cfg.layer), 'decoder.train': decoder.train}
    if decoder.told:
        out |= TAGS | _decoder_keys(decoder, tokenizer, c, cfg.decoder)
        out['encoder.error'] = 'nmse' if decoder.told.mse_scale is None else 'direction'
        reads = encoder or decoder
        if reads.told.encoder_template:
            reads.told.check(
                tokenizer, c, out['decoder.prompt'].replace(EMBED, decoder.told.marker) if decoder.told.marker else ''
            )
            out['encoder.prompt'] = _bos(reads.told, tokenizer) + reads.told.encoder_text(TEXT)
        elif encoder:
            raise LensError(
                f'{encoder.told.file} has no prompt_templates.ar: add the text that the encoder reads words in.'
            )
    else:
        out |= {'explanation_len': 50, 'encoder.error': 'direction'} | _oracle_keys(tokenizer, out['layer'])
    if encoder:
        out |= {'encoder.train': encoder.train, 'encoder.readout': 'affine' if 'bias' in encoder.head else 'linear'}
        if encoder.normed and (out['encoder.readout'] == 'affine' or out['encoder.error'] != 'direction'):
            raise LensError(
                f'{encoder.directory}/{LORA_ENCODER}: a final norm before a head with a bias, or before vectors whose size '
                'counts, is not supported: merge it into a model without one.'
            )
    else:
        print(f'{decoder.directory} has no encoder: the untouched subject reads its words, and its figures say little.')
        out |= {'encoder.readout': 'none'}
    adapters = [side.adapters for side in read.values() if side.adapters]
    if adapters:
        named = set().union(*(a.matrices for a in adapters))
        out |= {
            'lora.pattern': '|'.join(n for n in MATRICES if n in named),
            'lora.rank': max(a.rank for a in adapters),
            'lora.alpha': adapters[0].alpha,
            'lora.rs': adapters[0].rs,
        }
    return out


def _check_model(side: Side, encodes: bool, c: TransformerConfig, subject: str) -> None:
    """Raises LensError where a whole model is none of the family and sizes of the subject."""
    told = side.told
    if told and told.d_model != (side.config or c).d_model:
        raise LensError(
            f'{told.file}: d_model={told.d_model}, the model has hidden states of {(side.config or c).d_model}.'
        )
    if side.config is None:
        return
    n = side.config.n_layers

    def facts(c: TransformerConfig) -> dict:
        whole = {k: (getattr(c, k) * c.n_layers)[:n] for k in ('windows', 'layer_rope')}
        how = {'remat': '', 'experts': '', 'packed': False, 'compute': '', 'max_positions': 0}
        depth = {'n_layers': 0, 'tied': False} if encodes else {}
        return dataclasses.asdict(dataclasses.replace(c, **how, **whole, **depth))

    theirs, ours = facts(side.config), facts(c)
    if differ := [k for k in ours if theirs[k] != ours[k]]:
        raise LensError(
            f'{side.directory}/config.json differs from that of the subject {shown(subject)} in {", ".join(differ)}: give '
            'the model that it was made of as subject.path, to lens.load as subject.'
        )


def _layer(read: dict[str, Side], c: TransformerConfig, given: int) -> int:
    """K, on which all that tells it must agree; of an oracle, which reads several, the given one or the middle."""
    said = {str(side.told.file): side.told.layer for side in read.values() if side.told}
    encoder = read.get('encoder')
    if encoder:
        said[f'{encoder.directory} (its {encoder.blocks} blocks)'] = encoder.blocks - 1
    said = {k: x for k, x in said.items() if x is not None}
    if len(set(said.values())) > 1:
        listed = ', '.join(f'{k}: {x}' for k, x in said.items())
        raise LensError(
            f'The layer that the lens reads is told differently ({listed}): an encoder has a block more than it.'
        )
    if not said and read['decoder'].told:
        raise LensError(
            f'{read["decoder"].told.file} has no extraction_layer_index: add the block whose output it reads.'
        )
    layer = next(iter(said.values()), given or c.n_layers // 2)
    if layer >= c.n_layers:
        raise LensError(f'{next(iter(said), "layer")} says layer {layer}, the subject has blocks 0..{c.n_layers - 1}.')
    return layer


def _decoder_keys(decoder: Side, tokenizer, c: TransformerConfig, given) -> dict:
    """How the activation enters the prompt, and the prompt; given: decoder.* of the configuration."""
    told = decoder.told
    asked = given.injection if given.injection in sidecar.FAMILIES else ''
    if not (family := told.family or asked):
        means = ' or '.join(f'{k} ({x["layer"]})' for k, x in sidecar.FAMILIES.items())
        raise LensError(
            f'{told.file} does not say how the activation enters: add `injection: {{family: …}}`, {means}, or give '
            'decoder.injection.'
        )
    told = dataclasses.replace(told, family=family)
    norm = given.norm or told.injection_scale
    if family == 'replace' and not norm:
        raise LensError(f'{told.file} has no extraction.injection_scale: add the norm of the row in the slot.')
    if not (told.marker and told.decoder_template):
        missing = 'prompt_templates.av' if told.marker else 'tokens.injection_char'
        raise LensError(f'{told.file} has no {missing}: give the sidecar of a trained decoder.')
    own = any((decoder.directory / n).exists() for n in hf.VOCABULARY_FILES)
    prompt = told.prompt(hf.load_tokenizer(decoder.directory) if own else tokenizer)
    told.check(tokenizer, c, prompt)
    return {
        'decoder.prompt': prompt.replace(told.marker, EMBED),
        'decoder.injection': family,
        'decoder.marker': told.marker,
        'decoder.norm': float(norm or 0) if family == 'replace' else 0.0,
    }


def _oracle_keys(tokenizer, layer: int) -> dict:
    """Of an activation oracle, which is asked about one vector."""
    turns = [{'role': 'user', 'content': f'Layer: {layer}\n{MARKER} \n{QUESTION}'}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return {
        'decoder.prompt': prompt.replace(MARKER, EMBED),
        'decoder.injection': 'add',
        'decoder.marker': MARKER,
        'decoder.norm': 0.0,
    }


def _bos(told: Sidecar, tokenizer) -> str:
    """What a tokenizer puts before a text: the trainers that add to the stream and copy a sidecar of data leave it out."""
    if told.kind == 'nla_dataset' or told.family == 'add':
        return ''
    with_it, without = (tokenizer('a', add_special_tokens=x)['input_ids'] for x in (True, False))
    return tokenizer.decode(with_it[: with_it.index(without[0])]) if with_it[0] != without[0] else ''


def check(path: str | pathlib.Path, like: Lens) -> None:
    """Raises LensError unless the adapters and heads of a lens of others fit `like`, which may be abstract."""
    for side, read in sides(path).items():
        _small(read, getattr(like, side), side)


def _small(read: Side, like, side: str) -> dict[str, np.ndarray]:
    """All trained leaves of a side that are neither its own base nor its prompt, by path."""
    out = {}
    if read.adapters:
        out |= {f'{side}/adapters/{k}': x for k, x in _stacked(read, like.adapters).items()}
    if read.head:
        out[f'{side}/readout_w'] = read.head['weight'].astype(np.float32).T
        if 'bias' in read.head:
            out[f'{side}/readout_b'] = read.head['bias'].astype(np.float32)
    return out


def _stacked(read: Side, like: dict) -> dict[str, np.ndarray]:
    """Adapters as ours: transposed, scaled, with zeros where a block, a matrix or a column has none."""
    out = {f'{n}/{part}': np.zeros(x.shape, np.float32) for n, parts in like.items() for part, x in parts.items()}
    for (name, layer, part), x in read.adapters.tensors.items():
        a = part == 'A'
        stack = out.get(f'{name}/{part.lower()}')
        shape = (
            ()
            if stack is None
            else (*stack.shape[1:-1], read.adapters.rank)
            if a
            else (read.adapters.rank, *stack.shape[2:])
        )
        if stack is None or layer >= len(stack) or x.size != np.prod(shape):
            raise LensError(
                f'{read.directory}: adapter {part} of {name} in block {layer} has shape {x.shape}, the subject has no such '
                'matrix: give the model that it was trained on as subject.path, to lens.load as subject.'
            )
        if a:
            stack[layer, ..., : read.adapters.rank] = read.adapters.scale * x.T.reshape(shape)
        else:
            stack[layer, : read.adapters.rank] = x.T.reshape(shape)
    return out


def read(path: str | pathlib.Path, run, like: Lens) -> Lens:
    """Reads a lens of others into the structure and placement of `like`. run: config.Run, with its base. Call under
    jax.set_mesh(run.mesh). Raises LensError."""
    found, texts = {}, {'decoder': run.texts.decoder[:2], 'encoder': run.texts.encoder}
    stored = sides(path)
    for side in FOLDERS:
        part, one = getattr(like, side), stored.get(side)
        found |= _small(one, part, side) if one else {}
        model = run.base
        if part.base is not None:
            x = jax.tree.leaves(part.base)[0]
            how = {'dtype': x.dtype, 'mesh': x.sharding.mesh, 'split_above': sharding.SPLIT_ABOVE}
            model = hf.load_model(one.directory, head=side == 'decoder', **how)
            leaves = jax.tree_util.tree_leaves_with_path(model)
            found |= {f'{side}/base/{sharding.path(kp)}': x for kp, x in leaves}
        if one and one.normed:
            found[f'{side}/readout_w'] = _norm_gain(run.base)[:, None] * found[f'{side}/readout_w']
        for name, ids in zip(('left', 'right'), texts[side], strict=True):
            found[f'{side}/prompt_{name}'] = np.asarray(model.embedding_rows(ids))
    found['encoder/special_last'] = np.zeros(run.base.config.d_model, np.float32)
    return lens_folder.placed(found, like)


def _norm_gain(base) -> np.ndarray:
    """What the final norm multiplies channels by; the division by the size of the vector changes no direction."""
    return np.asarray(base.final_norm.scale[...], np.float32) + (base.config.norm == 'rms_offset')


def opened(directory: str | pathlib.Path, subject_path: str = '') -> dict:
    """Returns what lens.json says of an exported lens, of one of others: its configuration. subject_path: of the model that
    it reads, if not where its files say. Raises LensError."""
    cfg = defaults.get_config()
    cfg.subject.path, cfg.init_from = subject_path, str(directory)
    return {'config': json.loads(configured(cfg, cfg).to_json()), 'step': 0}
