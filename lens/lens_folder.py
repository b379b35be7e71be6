"""A trained lens as a folder: two Hugging Face models, and what no Hugging Face model has beside them; or that alone.

DIR/decoder, DIR/encoder   complete models (adapters merged; the encoder cut after its read-out block), or none
DIR/lens.safetensors       maps, soft prompts, special vector, read-out, adapters: all trained leaves but own bases
DIR/lens.json              shapes and meanings of those, settings, figures
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lens import files, hf, sharding, tensor_files
from lens.errors import LensError, shown
from lens.models import lora
from lens.models.decoder import Decoder
from lens.models.encoder import Encoder
from lens.models.lens import Lens
from lens.models.transformer import Transformer

FORMAT = 'lens/1'
SIDES = ('decoder', 'encoder')


def trained(side: Decoder | Encoder) -> str:
    """Tells how a side is trained, by the name in the configuration: maps | lora | full."""
    return 'full' if side.base is not None else 'lora' if side.adapters is not None else 'maps'


def settings(lens: Lens) -> dict:
    """Collects what decides how the parameters of a lens are used, by configuration key."""
    d, e = lens.decoder, lens.encoder
    return {
        'layer': d.config.layer,
        'decoder.train': trained(d),
        **d.config.injection.settings(),
        'decoder.more_slots': list(d.config.more_slots),
        'decoder.layers': list(d.config.layers),
        'decoder.marker_id': d.config.marker,
        'encoder.train': trained(e),
        'encoder.output_layer': e.config.output_layer,
        'encoder.readout': e.config.readout,
        'encoder.context_tokens': e.config.context_tokens,
        'position_vectors': e.positions is not None,
        **({} if d.config.injection.soft_prompts else prompt_ids(lens)),
    }


def prompt_ids(lens: Lens) -> dict:
    """Collects the words of the prompts, token ids by configuration key."""
    sides = {side: getattr(lens, side) for side in SIDES}
    ids = {f'{k}.prompt_ids_left': x.left_ids for k, x in sides.items()}
    ids |= {f'{k}.prompt_ids_right': x.right_ids for k, x in sides.items()}
    return {k: list(x) for k, x in ids.items()}


def _leaves(tree) -> dict:
    return {sharding.path(kp): x for kp, x in jax.tree_util.tree_leaves_with_path(tree)}


def _small(lens: Lens) -> dict:
    """All trained leaves but own bases."""
    return {name: x for name, x in _leaves(lens).items() if name.split('/')[1] != 'base'}


def _meaning(name: str, keys: dict, place: str, models: bool) -> str:
    """One sentence on a tensor of lens.safetensors; keys: settings of the lens; place: of Injection; models: whether
    they stand beside it."""
    side, _, leaf = name.partition('/')
    if leaf.startswith('adapters/'):
        _, matrix, factor = leaf.split('/')
        shape = '[blocks, inputs, rank]' if factor == 'a' else '[blocks, rank, outputs]'
        merged = f'; already merged into {side}/ and kept here so that training can go on' if models else ''
        return (
            f'Low-rank factor {factor.upper()} {shape} of matrix {matrix}, used as x W + (x A) B with alpha / rank '
            f'inside A{merged}.'
        )
    position = 'Vectors [positions, d], in units of the residual stream, that are {} at the position that was read.'
    slots = ', slots' * bool(keys['decoder.layers'])
    rows = 'Soft prompt [tokens, d] {} the {}, in units of the embedding table (times embed_scale = inputs_embeds).'
    return {
        'decoder/maps_w': f'W [maps, d_in{slots}, d_out] of y = a @ W + b, the activation a a row vector (transpose it for '
        f'torch.nn.Linear); y {place}.',
        'decoder/maps_b': f'b [maps{slots}, d] of y = a @ W + b, see decoder/maps_w.',
        'decoder/prompt_left': rows.format('before', 'slot'),
        'decoder/prompt_right': rows.format('after', 'slot'),
        'encoder/prompt_left': rows.format('before', 'words'),
        'encoder/prompt_right': rows.format('after', 'words'),
        'decoder/positions': position.format('taken off the activation before it enters the prompt'),
        'encoder/positions': position.format('added to the reconstruction'),
        'encoder/special_last': 'Vector [d] added to the last input row, in units of the embedding table.',
        'encoder/readout_w': 'W [d_in, d_out] of reconstruction = x @ W + b, the row vector x being the residual stream '
        f'after block {keys["encoder.output_layer"]} at the last position (before any final norm; transpose it for '
        'torch.nn.Linear).',
        'encoder/readout_b': "b [d] of reconstruction = x @ W + b, in units of the subject's residual stream after "
        f'block {keys["layer"]}.',
    }[name]


def model(lens: Lens, base: Transformer, side: str) -> Transformer:
    """Makes the complete model of a side: its own base, or `base` with the adapters merged.

    The encoder ends after its read-out block; the final norm and head of `base` only make its directory complete.
    Nothing is copied but merged matrices: a stack may be longer than config.n_layers says.
    """
    part = getattr(lens, side)
    n = base.config.n_layers if side == 'decoder' else part.config.output_layer + 1
    copy = jax.tree.map(lambda x: x, base if part.base is None else part.base)
    copy.config = dataclasses.replace(copy.config, n_layers=n)
    if side == 'encoder':
        copy.final_norm, copy.head = base.final_norm, base.head
    return copy if part.adapters is None else lora.merge(copy, part.adapters)


def describe(lens: Lens, base: Transformer, prompts: dict[str, str], about: dict, models: bool = True) -> dict:
    """Returns what lens.json says. prompts: the text of that of each side; about: further entries. models: whether decoder/
    and encoder/ come beside."""
    keys, place = settings(lens) | prompt_ids(lens), lens.decoder.config.injection.place
    sides = {
        side: {k.removeprefix(f'{side}.'): v for k, v in keys.items() if k.startswith(f'{side}.')}
        | {'prompt': prompts[side]}
        for side in SIDES
    }
    dtype = 'float32' if models else 'bfloat16'
    return {
        'format': FORMAT,
        'layer': keys['layer'],
        'position_vectors': keys['position_vectors'],
        'trained': {side: sides[side].pop('train') for side in SIDES},
        'models': list(SIDES) if models else [],
        'family': base.config.family,
        'd_model': base.config.d_model,
        # inputs_embeds = embed_scale * rows of the embedding table; 1 but for Gemma
        'embed_scale': float(jnp.asarray(base.config.embed_scale, base.embedding.dtype)),
        **sides,
        'tensors': {
            name: {'shape': list(x.shape), 'dtype': dtype, 'meaning': _meaning(name, keys, place, models)}
            for name, x in _small(lens).items()
        },
        **about,
    }


def write(directory: pathlib.Path, lens: Lens, spec: dict) -> None:
    """Writes lens.safetensors and lens.json. spec: of `describe`; without models beside it the lens is to be small: in
    bfloat16, and a side with a base of its own, of which nothing would be left, is refused. Raises LensError."""
    if full := [side for side in SIDES if getattr(lens, side).base is not None and not spec['models']]:
        raise LensError(
            f'--format=lens keeps maps, prompts and adapters alone, and {full[0]}.train=full trains the whole {full[0]}: use '
            '--format=hf, or train it with lora or maps.'
        )
    dtypes = {name: jnp.dtype(told['dtype']) for name, told in spec['tensors'].items()}
    arrays = {name: np.asarray(x).astype(dtypes[name]) for name, x in _small(lens).items()}
    tensor_files.write(directory / 'lens.safetensors', arrays)
    files.write_json(directory / 'lens.json', spec)


def read_spec(directory: pathlib.Path) -> dict:
    """Returns lens.json. Raises LensError."""
    file = directory / 'lens.json'
    spec = files.read_json(file, 'init_from must be a folder of lens.export')
    if spec.get('format') != FORMAT:
        raise LensError(f'{file} is not of format {FORMAT}: export the lens again with this version.')
    return spec


def _read_settings(directory: pathlib.Path) -> dict:
    """The settings of lens.json by configuration key, among others that it has."""
    spec, file = read_spec(directory), directory / 'lens.json'
    try:
        sides = {f'{side}.{k}': v for side in SIDES for k, v in spec[side].items()}
        sides.setdefault('decoder.layers', [])  # of a folder that is older than the key
        shared = {k: spec[k] for k in ('layer', 'position_vectors')}
        return sides | {f'{side}.train': spec['trained'][side] for side in SIDES} | shared
    except (KeyError, TypeError, AttributeError):
        raise LensError(f'{file} lacks layer, trained, decoder or encoder: export the lens again.') from None


def check(directory: pathlib.Path, like: Lens) -> dict[str, np.ndarray]:
    """Reads lens.safetensors. Raises LensError unless its tensors and the settings are those of `like`."""
    stored, small = _read_settings(directory), tensor_files.read_all(directory / 'lens.safetensors')
    here = settings(like)
    differing = {k: stored.get(k) for k, v in here.items() if stored.get(k) != v}
    if differing:
        theirs, ours = (shown(', '.join(f'{k}={d[k]}' for k in differing)) for d in (differing, here))
        raise LensError(f'{directory} holds a lens with {theirs}, this configuration says {ours}: use its keys.')
    wanted, have = ({name: x.shape for name, x in tree.items()} for tree in (_small(like), small))
    for name in sorted(wanted.keys() | have.keys()):
        if wanted.get(name) != have.get(name):
            theirs, ours = (f'shape {d[name]}' if name in d else 'none' for d in (have, wanted))
            raise LensError(
                f'{directory}/lens.safetensors holds {shown(name)}: {theirs}, this configuration needs {ours}: use the '
                'subject, the prompts and the lora.* keys that it was trained with.'
            )
    return small


def read(directory: str | pathlib.Path, like: Lens) -> Lens:
    """Reads the lens of a folder into the structure and placement of `like` (ShapeDtypeStructs with shardings).

    Raises LensError when the folder is no export, is damaged, or its lens is another than `like`.
    """
    directory = pathlib.Path(directory)
    found = check(directory, like)
    for side in SIDES:
        own = getattr(like, side).base
        if own is None:
            continue
        x = jax.tree.leaves(own)[0]
        how = {'dtype': x.dtype, 'mesh': x.sharding.mesh, 'split_above': sharding.SPLIT_ABOVE}
        stored = _leaves(hf.load_model(directory / side, **how))
        for name, x in _leaves(own).items():
            if name not in stored or stored[name].shape != x.shape:
                have = f'{name} of shape {stored[name].shape}' if name in stored else f'no {name}'
                raise LensError(f'{directory}/{side} holds {have}, the subject of this configuration needs {x.shape}.')
            found[f'{side}/base/{name}'] = stored[name]
    return placed(found, like)


def placed(found: dict[str, np.ndarray | jax.Array], like: Lens) -> Lens:
    """Puts leaves by path into the structure and placement of `like`; those on devices are in their place."""

    def leaf(kp, x):
        y = found[sharding.path(kp)]
        return y if isinstance(y, jax.Array) else sharding.put(y.astype(x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)
