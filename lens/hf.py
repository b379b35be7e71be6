"""Hugging Face directories in and out: config.json, safetensors, tokenizers.

    model = lens.hf.load_model('path/or/hub-id')
    logits_BxTxV = model(tokens_BxT)

Loads safetensors and JSON only; nothing in a directory is executed.
"""

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding

from lens import files, sharding, tensor_files
from lens.errors import LensError, need_package, number, shown
from lens.models import families, mxfp4, tensors
from lens.models.transformer import Transformer, TransformerConfig

PathLike = str | os.PathLike
SENTENCEPIECE = b'\n'  # how its files begin; others of the name tokenizer.model are text
# The first one that a directory has is its fingerprint.
VOCABULARY_FILES = ('tokenizer.json', 'tokenizer.model', 'vocab.json')
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    'merges.txt',
    'added_tokens.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'chat_template.jinja',
)
# What lenses of others have beside models: what one says of itself; the head of an encoder; adapters of a decoder; of an
# encoder, as EasyNLA has them; of an activation oracle.
SIDECAR, HEAD = 'nla_meta.yaml', 'value_head.safetensors'
PEFT, PEFT_WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
LORA_ENCODER, LORA_ENCODER_WEIGHTS = 'ar_meta.json', 'ar_lora_value_head.safetensors'
ORACLE = 'ao_config.json'
OF_LENSES = (SIDECAR, PEFT, LORA_ENCODER, ORACLE)
# Tensors that checkpoints hold and a text model does not need: buffers, the vision side of Gemma-3.
IGNORED = re.compile(r'(^|\.)(vision_tower|multi_modal_projector)\.|\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$')
SHARD_BYTES = 5_000_000_000  # of one file that save_model writes
OWN_TAGS = re.compile(r'{%-?\s*(end)?generation\s*-?%}')  # of transformers, in chat templates
# What weights of few bits have beside or in place of a weight: GPTQ, AWQ, bitsandbytes, FP8, compressed-tensors.
QUANTISED = re.compile(
    r'\.(qweight|qzeros|g_idx|scales|SCB|absmax|quant_map|weight_(packed|shape|scale(_inv)?|format))$'
)


def local_directory(path: PathLike, *, weights: bool = True) -> pathlib.Path:
    """Finds `path`, or downloads the Hub repository of that name, its tensors only with `weights`. Raises LensError."""
    if os.path.isdir(found := files.find(path)):
        return found
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', str(path)) or str(path).startswith('.'):
        raise LensError(f'{shown(path)} does not exist: give a directory in Hugging Face layout, or a Hub id.')
    import huggingface_hub  # half a second that local models do not need

    wanted = ['config.json', 'generation_config.json', *TOKENIZER_FILES, *OF_LENSES]
    wanted += ['*.safetensors', '*.safetensors.index.json'] if weights else []
    unwanted = ['original/*', 'metal/*', 'onnx/*']  # further copies of the weights in other layouts
    try:
        found = huggingface_hub.snapshot_download(str(path), allow_patterns=wanted, ignore_patterns=unwanted)
    except Exception as e:  # the library raises many kinds, of its own and of its HTTP client
        raise LensError(
            f'{shown(path)} is no local directory, and the Hugging Face Hub gave no model of that name ({tensor_files.reason(e)}): '
            'check the spelling and the connection, or give a local directory, which counts from the current folder, as '
            '--config.subject.path, in lens.evaluate and lens.export as --subject.'
        ) from None
    return pathlib.Path(found)


def tokenizer_sha256(directory: PathLike) -> str:
    """Fingerprints the tokenizer of a directory; data folders carry that of theirs."""
    directory = local_directory(directory, weights=False)
    odd = [n for n in ('config.json', *TOKENIZER_FILES) if (directory / n).exists() and not (directory / n).is_file()]
    if odd:  # opening a pipe would wait
        raise LensError(f'{directory}/{odd[0]} is no file: give a directory that holds the tokenizer.')
    file = next((directory / n for n in VOCABULARY_FILES if (directory / n).exists()), None)
    if file is None:
        raise LensError(f'{directory}/tokenizer.json does not exist: give a directory that holds the tokenizer.')
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load_tokenizer(path: PathLike):
    """Loads the tokenizer of a local directory or a Hub id, and tries it. Raises LensError, whatever is wrong with it."""
    from transformers import AutoTokenizer  # a second of import that model loading does not need

    directory = local_directory(path, weights=False)
    tokenizer_sha256(directory)  # refuses a directory without one
    vocabulary = directory / 'tokenizer.model'
    alone = not any((directory / n).exists() for n in VOCABULARY_FILES if n != vocabulary.name)
    if alone and vocabulary.read_bytes().startswith(SENTENCEPIECE):
        need_package('sentencepiece', 'sentencepiece', f'{vocabulary}, without a tokenizer.json beside it,')
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        number(tokenizer.model_max_length, 'model_max_length', 1, 10**31, whole=False)
        _parse_templates(tokenizer.chat_template or {})
        if not tokenizer('a word', add_special_tokens=False)['input_ids']:
            raise ValueError('it makes no tokens of words')
    except BaseException as e:  # libraries raise what they like here, one of them a panic of its own
        if not isinstance(e, Exception) and type(e).__name__ != 'PanicException':
            raise
        own = 'custom code' in str(e)
        reason = 'it is code of its own, which is never run' if own else tensor_files.reason(e)
        remedy = (
            'give a directory with a tokenizer.json of a class that transformers has' if own else tensor_files.AGAIN
        )
        raise LensError(f'{_damaged(directory) or directory} gives no tokenizer ({reason}): {remedy}.') from None
    return tokenizer


def _parse_templates(given: str | dict[str, str]) -> None:
    """Raises ValueError where a chat template is none. They are rendered by transformers, in a sandbox of Jinja2."""
    parser = jinja2.Environment(extensions=['jinja2.ext.loopcontrols'])
    for template in given.values() if isinstance(given, dict) else [given]:
        if not isinstance(template, str):
            raise ValueError('a chat template is no text')
        try:
            parser.parse(OWN_TAGS.sub('', template))
        except jinja2.TemplateSyntaxError as e:
            raise ValueError(f'line {e.lineno} of a chat template: {e}') from None


def _damaged(directory: pathlib.Path) -> pathlib.Path | None:
    """The first file beside a tokenizer that should hold a JSON object and does not."""
    for path in (directory / n for n in ('config.json', *TOKENIZER_FILES) if n.endswith('.json')):
        try:
            if path.exists() and files.json_object(path.read_bytes()) is None:
                return path
        except OSError:
            return path
    return None


def _read_json(path: pathlib.Path) -> dict:
    return files.read_json(path, tensor_files.COMPLETE)


def content(path: PathLike) -> str:
    """Returns a digest of a model, by the names and shapes of its tensors and a row of each as float32: the same however
    its files are cut and whatever else its config.json says. Raises LensError."""
    directory, digest = local_directory(path), hashlib.sha256()
    for name, stored in sorted(tensor_files.headers(directory).items()):
        with tensor_files.opened(stored.file) as f:
            row = f.get_slice(name)[:1].astype(np.float32)
        digest.update(f'{name} {stored.shape}\n'.encode() + row.tobytes())
    return digest.hexdigest()[:16]


def _check(directory: pathlib.Path, stored: dict[str, tensor_files.Stored], table, c) -> dict[str, str]:
    """Name in the table of every wanted tensor -> name in the file. Raises LensError unless all fits."""
    bits = next((n for n in stored if QUANTISED.search(n)), None)
    if bits is not None:
        raise LensError(f'{stored[bits].file} holds {shown(bits)}, of quantised weights: {families.UNQUANTISED}.')
    names = tensors.stored_names(directory, stored, table, c)
    wanted = {theirs for theirs, _ in names.values()}
    missing = sorted(wanted - stored.keys())
    extra = sorted(n for n in stored.keys() - wanted if not IGNORED.search(n))
    if c.tied and not missing and len(extra) == 1 and extra[0].endswith('lm_head.weight'):  # others store it twice
        rows = names[next(t.hf_name for t in table if t.path == 'embedding')][0]
        head, rows = (tensor_files.read(stored[n].file, n) for n in (extra[0], rows))
        extra = [] if np.array_equal(head, rows) else extra
    if missing or extra:
        what = f'lacks {shown(missing[0])}' if missing else f'holds an unexpected {shown(extra[0])}'
        raise LensError(
            f'{directory} {what} ({len(missing)} tensors missing, {len(extra)} extra): {tensor_files.COMPLETE}.'
        )
    for theirs, shape in names.values():
        file, have, dtype = stored[theirs]
        if have != shape:
            raise LensError(
                f'{file}: {shown(theirs)} has shape {have}, config.json says {shape}: give both of one model.'
            )
        tensor_files.check_dtype(file, theirs, dtype)
    return {ours: theirs for ours, (theirs, _) in names.items()}


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack, x, i):
    return jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=('t', 'c'))
def _put_dequantised(stack, blocks, scales, i, *, t, c):
    x = tensors.from_hf_layout(mxfp4.dequantise(blocks, scales, stack.dtype), t, c)
    place = jax.typeof(stack).sharding
    if not place.mesh.empty:
        x = jax.sharding.reshard(x, sharding.P(*place.spec[1:]))
    return jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)


def _in_stack(place, axes: int | None = None):
    """Where one layer of a stack lives, or what has its first axes alone."""
    if not isinstance(place, NamedSharding):
        return place
    return NamedSharding(place.mesh, sharding.P(*place.spec[1:][:axes]))


def _load_leaf(read: Callable[[str, int], np.ndarray], t: tensors.Tensor, c, leaf) -> jax.Array:
    """One leaf in its place on the devices. read: name in the table and layer -> stored tensor; the host holds one."""

    def host(i):
        return tensors.from_hf_layout(read(t.hf_name, i), t, c).astype(leaf.dtype, copy=False)

    place = leaf.sharding
    if '{}' not in t.hf_name:
        return sharding.put(host(0), place)
    stack = jnp.zeros(leaf.shape, leaf.dtype, device=place)
    for i in range(c.n_layers):
        if t.packed:  # the expert axis is the first one on both sides
            parts = (sharding.put(read(n, i), _in_stack(place, axes=1)) for n in tensors.shapes_on_disk(t, c))
            stack = _put_dequantised(stack, *parts, i, t=t, c=c)
        else:
            stack = _put_layer(stack, sharding.put(host(i), _in_stack(place)), i)
    return stack


def _config_json(path: pathlib.Path) -> pathlib.Path:
    return path if path.suffix == '.json' else path / 'config.json'


def read_config(path: pathlib.Path) -> TransformerConfig:
    """Reads the configuration of a local directory, or of a config.json by itself. Raises LensError."""
    config = _read_json(_config_json(path))
    try:
        return families.from_hf(config)
    except LensError as e:
        raise LensError(f'{_config_json(path)}: {e}') from None


def ships_packed(path: pathlib.Path) -> bool:
    """Tells whether the tensors beside a config.json are MXFP4, by what it says; path as in read_config."""
    return (_read_json(_config_json(path)).get('quantization_config') or {}).get('quant_method') == 'mxfp4'


def abstract_model(
    c: TransformerConfig, *, dtype=jnp.float32, mesh=None, split_above: float = math.inf, head: bool = True
) -> Transformer:
    """Makes a model of ShapeDtypeStructs that carry their placement; arguments as in load_model."""

    def make():
        model = Transformer(c, rngs=nnx.Rngs(0), dtype=dtype)
        return model if head else model.truncated(c.n_layers)

    abstract = jax.eval_shape(make)
    if mesh is None:
        place = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
    return sharding.with_placement(abstract, mesh, split_above)


def load_model(
    path: PathLike,
    *,
    dtype=jnp.float32,
    mesh=None,
    remat='full',
    experts='auto',
    packed=False,
    split_above=math.inf,
    head: bool | None = None,
) -> Transformer:
    """Loads the model of a local Hugging Face directory or a Hub id onto `mesh` (default: one device).

    dtype: of all weights on the device. remat, experts: see TransformerConfig. packed: keep MXFP4 experts as bytes
    and dequantise them one layer at a time; without it they become `dtype` here. split_above: see
    sharding.shardings. head: whether final norm and head must be there, or are left out as in an encoder that ends
    after the block it reads; None: as the files have it. The host holds no more than one stored tensor at a time.
    Raises LensError naming the file or tensor when anything is missing, extra, misshapen or not finite.
    """
    how = {'remat': remat, 'experts': experts, 'packed': packed}
    c, abstract, table, names, stored = _described(path, how, head, dtype=dtype, mesh=mesh, split_above=split_above)
    rows = {t.path: t for t in table}

    def read(name, layer):
        theirs = names[name.format(layer)]
        return tensor_files.read(stored[theirs].file, theirs)

    return jax.tree_util.tree_map_with_path(lambda kp, x: _load_leaf(read, rows[sharding.path(kp)], c, x), abstract)


def check_model(path: PathLike, *, head: bool | None = None) -> None:
    """Raises LensError where load_model would, but for values that are not finite: headers are all that is read."""
    _described(path, {}, head)


def _described(path: PathLike, how: dict, head: bool | None, **placed):
    """What load_model reads, before it does: config, abstract model, table, names in the files, their headers."""
    directory = local_directory(path)
    c, stored = dataclasses.replace(read_config(directory), **how), tensor_files.headers(directory)
    shipped_packed = any(n.endswith('_blocks') for n in stored)
    if c.packed and not shipped_packed:
        raise LensError(f'{directory} holds no MXFP4 tensors (…_blocks): load it without packed.')
    top = {t.hf_name for t in families.FAMILIES[c.family].table if t.path.startswith(('final_norm/', 'head'))}
    top = {n for n in stored if any(n == name or n.endswith(f'.{name}') for name in top)}
    head = bool(top) if head is None else head
    stored = stored if head else {n: x for n, x in stored.items() if n not in top}
    abstract = abstract_model(c, head=head, **placed)
    leaves = {sharding.path(kp) for kp, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    table = families.table(c, leaves.__contains__, shipped_packed)
    return c, abstract, table, _check(directory, stored, table, c), stored


_layer_of = jax.jit(lambda stack, i: stack[i])


def _write_weights(model: Transformer, directory: pathlib.Path, dtype) -> None:
    """model.safetensors, or shards with an index; the host holds one shard at a time."""
    from huggingface_hub import split_state_dict_into_shards_factory

    c = model.config
    leaves = {sharding.path(kp): x for kp, x in jax.tree_util.tree_leaves_with_path(model)}
    sources = {}  # stored name -> (layer or None, its rows in the order of their parts)
    for t in sorted(families.table(c, leaves.__contains__), key=lambda t: t.part or 0):
        prefix = '' if t.path == 'head' else families.FAMILIES[c.family].prefix
        for i in range(c.n_layers) if '{}' in t.hf_name else [None]:
            sources.setdefault(prefix + t.hf_name.format(i), (i, []))[1].append(t)

    def dtype_of(rows):
        return jnp.dtype(jnp.uint8 if leaves[rows[0].path].dtype == jnp.uint8 else dtype)

    def tensor(i, rows):
        parts = [leaves[t.path] if i is None else _layer_of(leaves[t.path], i) for t in rows]
        x = tensors.to_hf_layout([np.asarray(p) for p in parts], rows, c)
        return np.ascontiguousarray(x.astype(dtype_of(rows), copy=False))

    split = split_state_dict_into_shards_factory(
        sources,
        get_storage_size=lambda source: math.prod(tensors.hf_shape(source[1][0], c)) * dtype_of(source[1]).itemsize,
        filename_pattern='model{suffix}.safetensors',
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        tensor_files.write(directory / file, {name: tensor(*sources[name]) for name in names})
    if split.is_sharded:
        index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
        files.write_json(directory / 'model.safetensors.index.json', index)


def save_model(
    model: Transformer, directory: PathLike, *, source: PathLike | None = None, config: dict | None = None, dtype=None
) -> None:
    """Writes an ordinary Hugging Face directory; it appears at once, by rename.

    source: a directory or Hub id, such as the one that the model came from; its tokenizer and generation config go
    along, and its config.json changed in sizes, depth and dtype. config: a config.json to start from in place of
    that, its token ids too. dtype: of the stored weights, default that of the model.
    Raises LensError when `directory` holds something or the config.json is that of another kind of model.
    """
    directory = pathlib.Path(directory)
    files.check_free(directory, 'give an empty or a new directory')
    dtype = model.embedding.dtype if dtype is None else dtype
    source = local_directory(source, weights=False) if source else None
    start = config or _read_json(_config_json(source))
    try:
        new = families.edited(start, model.config, jnp.dtype(dtype).name)
    except LensError as e:
        raise LensError(f'{"config" if config else _config_json(source)}: {e}') from None
    ids = {k: new[k] for k in families.TOKEN_IDS if new.get(k) is not None}
    if source and (source / 'generation_config.json').exists():
        generation = _read_json(source / 'generation_config.json')
        ids = generation | ids if config else generation
    with files.new_folder(directory) as tmp:
        _write_weights(model, tmp, dtype)
        files.write_json(tmp / 'config.json', new)
        files.write_json(tmp / 'generation_config.json', ids)
        if source:
            copy_tokenizer(source, tmp)


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Copies what a directory has of a tokenizer. Raises OSError."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, directory / name)
