"""A lens that others have trained, from its directories to the configuration and the parameters of one of ours.

The keys of a configuration that decide what such a lens does are taken from it, its parameters take the places that those of
our own lens have: from then on nothing knows where it is from. Where it has no encoder, that is the untouched subject.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from lens import hf, keys, lens_folder, sharding
from lens.configs import base as defaults
from lens.configs.nla_qwen2_5_7b import CLOSE, OPEN
from lens.errors import LensError, shown
from lens.hf import LORA_ENCODER
from lens.interchange import sidecar
from lens.interchange.directories import Adapters, Side, is_foreign, sides
from lens.interchange.sidecar import Sidecar
from lens.models.lens import Lens
from lens.models.lora import MATRICES
from lens.models.transformer import Transformer, TransformerConfig
from lens.response import EMBED, TEXT

# Of responses, which no sidecar of others tells of: what the published recipe trains.
RESPONSE = {
    'explanation_open': OPEN,
    'explanation_close': CLOSE,
    'explanation_end': '',
    'explanation_len': 150,
}
MARKER, QUESTION, ANSWER = ' ?', 'Can you describe what this activation represents?', 50  # of an activation oracle
# Keys that another value would make another lens of; of the others an explicit one counts.
BOUND = ('layer', 'decoder.prompt', 'decoder.injection', 'decoder.marker', 'decoder.train', 'encoder.prompt')
BOUND += ('encoder.output_layer', 'encoder.readout', 'encoder.train', 'encoder.context_tokens', 'position_vectors')


def configured(cfg, found):
    """Returns a copy of a configuration in which the keys that decide what a lens of others in init_from does are those of
    that lens, and cfg where init_from is none. found: `cfg` with its folders as they are found.

    A key that has its default takes the value of the lens. Raises LensError where another one would make another lens of
    it, and for all that the directories show to be wrong before models are read.
    """
    return _configured(cfg, found, sides(found.init_from)) if is_foreign(found.init_from) else cfg


def _configured(cfg, found, read: dict[str, Side], question: str = ''):
    out, usual = cfg.copy_and_resolve_references(), defaults.get_config()
    out.subject.path = cfg.subject.path or _subject(read['decoder'])[0]
    subject = found.subject.path or out.subject.path
    lens = _keys(read, out, subject, question)
    differ = [k for k in BOUND if k in lens and keys.get(out, k) not in (lens[k], keys.get(usual, k))]
    if differ:
        told = ', '.join(
            f'{k}={shown(repr(keys.get(out, k)), 60)}, the lens has {shown(repr(lens[k]), 60)}' for k in differ
        )
        raise LensError(f'init_from={found.init_from}: {told}: leave {", ".join(differ)} to the lens.')
    out.update_from_flattened_dict({k: x for k, x in lens.items() if keys.get(out, k) == keys.get(usual, k)})
    try:
        keys.check(out)
    except LensError as e:
        raise LensError(f'{read["decoder"].directory}: {e}') from None
    return out


def _subject(decoder: Side) -> tuple[str, str | None]:
    """Where the model is that a lens reads, and its digest by hf.content, which lens.export alone tells."""
    if decoder.told is None:
        return decoder.adapters.base, None
    said = decoder.told.more.get('subject')
    said = said if isinstance(said, dict) else {}
    beside = decoder.directory.parent / str(said.get('folder'))
    return str(beside) if beside.is_dir() else decoder.told.base, said.get('content')


def _keys(read: dict[str, Side], cfg, subject: str, question: str) -> dict:
    """The keys of a lens by dotted name; cfg says what its files leave open. Raises LensError."""
    decoder, encoder = read['decoder'], read.get('encoder')
    if question and decoder.told:
        raise LensError(f'{decoder.directory} is no activation oracle, so it has one prompt: leave the question away.')
    if not subject:
        raise LensError(
            f'{decoder.directory} names no model that it reads: give it as subject.path, to lens.load as subject.'
        )
    c, tokenizer = hf.read_config(hf.local_directory(subject, weights=False)), hf.load_tokenizer(subject)
    for side in read.values():
        _check_model(side, side is encoder, c, subject)
    layer = _layer(read, c, cfg.layer)
    out = {'layer': layer, 'decoder.train': decoder.train, 'encoder.error': 'direction', 'encoder.readout': 'none'}
    out |= {'encoder.output_layer': -1, 'encoder.context_tokens': 0, 'position_vectors': False}
    if decoder.told:
        out |= _response(decoder.told) | _decoder_keys(decoder, tokenizer, c, cfg.decoder)
        out['encoder.error'] = 'nmse' if decoder.told.mse_scale is None else 'direction'
        reads = (encoder or decoder).told
        if encoder and not reads.encoder_template:
            raise LensError(f'{reads.file} has no prompt_templates.ar: add the text that the encoder reads words in.')
        if reads.encoder_template:
            reads.check(tokenizer, c, out['decoder.prompt'].replace(EMBED, decoder.told.marker))
            out['encoder.prompt'] = _bos(reads, tokenizer) + reads.encoder_text(TEXT)
    else:
        out |= _oracle_keys(tokenizer, layer, question or QUESTION)
    if encoder:
        out |= {'encoder.train': encoder.train, 'encoder.readout': 'affine' if 'bias' in encoder.head else 'linear'}
        if encoder.normed and (out['encoder.readout'] == 'affine' or out['encoder.error'] != 'direction'):
            raise LensError(
                f'{encoder.directory}/{LORA_ENCODER}: a final norm before a head with a bias, or before vectors whose size '
                'counts, is not supported: merge it into a model without one.'
            )
    else:
        print(f'{decoder.directory} has no encoder: the untouched subject reads its words, and its figures say little.')
    return out | _lora_keys([side.adapters for side in read.values() if side.adapters])


def _lora_keys(adapters: list[Adapters]) -> dict:
    """One block of keys for both sides: what one of them does not have is zero in it."""
    if not adapters:
        return {}
    named = set().union(*(a.matrices for a in adapters))
    of_both = {'pattern': '|'.join(n for n in MATRICES if n in named), 'rank': max(a.rank for a in adapters)}
    of_both |= {'alpha': adapters[0].alpha, 'rs': adapters[0].rs}
    return {f'lora.{k}': x for k, x in of_both.items()}


def _response(told: Sidecar) -> dict:
    """What stands around an explanation: as lens.export writes it, else that of the published recipe."""
    said = told.more.get('response') or {}
    if not isinstance(said, dict) or any(not isinstance(said.get(k, x), type(x)) for k, x in RESPONSE.items()):
        raise LensError(
            f'{told.file}: response={shown(repr(said), 80)} must have {", ".join(RESPONSE)}, or be left out.'
        )
    return RESPONSE | {k: said[k] for k in RESPONSE if k in said}


def _check_model(side: Side, encodes: bool, c: TransformerConfig, subject: str) -> None:
    """Raises LensError where a whole model is none of the family and sizes of the subject."""
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
            f'The layer that the lens reads is told differently ({listed}): correct the one that is wrong; an encoder has '
            'a block more than the number of the layer.'
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
        raise LensError(
            f'{told.file} gives no number as extraction.injection_scale: add the norm of the row in the slot.'
        )
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


def _oracle_keys(tokenizer, layer: int, question: str) -> dict:
    """Of an activation oracle, which is asked about one vector, or about as many as the question has slots."""
    asked = question if EMBED in question else f'{EMBED} \n{question}'
    turns = [{'role': 'user', 'content': f'Layer: {layer}\n{asked}'}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return {
        'decoder.prompt': prompt,
        'decoder.injection': 'add',
        'decoder.marker': MARKER,
        'explanation_len': ANSWER,
    }


def _bos(told: Sidecar, tokenizer) -> str:
    """What a tokenizer puts before a text: the trainers that add to the stream and copy a sidecar of data leave it out."""
    if told.kind == 'nla_dataset' or told.family == 'add':
        return ''
    with_it, without = (tokenizer('a', add_special_tokens=x)['input_ids'] for x in (True, False))
    return tokenizer.decode(with_it[: with_it.index(without[0])]) if with_it[0] != without[0] else ''


def check(path: str | pathlib.Path, like: Lens) -> None:
    """Raises LensError unless the adapters and heads of a lens of others fit `like`, which may be abstract, and the files
    of its models are whole."""
    for side, read in sides(path).items():
        _small(read, getattr(like, side), side)
        if read.config:
            hf.check_model(read.directory, head=side == 'decoder')


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
    rank = read.adapters.rank
    for (name, layer, part), x in read.adapters.tensors.items():
        stack = out.get(f'{name}/{part.lower()}', ())
        place = None if layer >= len(stack) else stack[layer, ..., :rank] if part == 'A' else stack[layer, :rank]
        if place is None or place.size != x.size:
            raise LensError(
                f'{read.directory}: adapter {part} of {name} in block {layer} has shape {x.shape}, the subject has no such '
                'matrix: give the model that it was trained on as subject.path, to lens.load as subject.'
            )
        place[...] = x.T.reshape(place.shape) * (read.adapters.scale if part == 'A' else 1)
    return out


def read(path: str | pathlib.Path, base: Transformer, like: Lens) -> Lens:
    """Reads a lens of others into the structure and placement of `like`. base: of the run, with its weights. Raises
    LensError."""
    found = {}
    for side, one in sides(path).items():
        part = getattr(like, side)
        found |= _small(one, part, side)
        if part.base is not None:
            x = jax.tree.leaves(part.base)[0]
            how = {'dtype': x.dtype, 'mesh': x.sharding.mesh, 'split_above': sharding.SPLIT_ABOVE}
            model = hf.load_model(one.directory, head=side == 'decoder', **how)
            leaves = jax.tree_util.tree_leaves_with_path(model)
            found |= {f'{side}/base/{sharding.path(kp)}': x for kp, x in leaves}
        if one.normed:
            found[f'{side}/readout_w'] = _norm_gain(base)[:, None] * found[f'{side}/readout_w']
    return lens_folder.placed(found, like)


def _norm_gain(base: Transformer) -> np.ndarray:
    """What the final norm multiplies channels by; the division by the size of the vector changes no direction."""
    return np.asarray(base.final_norm.scale[...], np.float32) + (base.config.norm == 'rms_offset')


def opened(directory: str | pathlib.Path, question: str = '', subject_path: str = '') -> dict:
    """Returns what lens.json says of an exported lens, of one of others: its configuration, what its subject holds where
    that is told. question: of lens.load; subject_path: of the model that it reads, if not where its files say. Raises
    LensError."""
    cfg = defaults.get_config()
    cfg.subject.path, cfg.init_from = subject_path, str(directory)
    read = sides(directory)
    config = json.loads(_configured(cfg, cfg, read, question).to_json())
    return {'config': config, 'step': 0, 'subject_content': _subject(read['decoder'])[1]}
