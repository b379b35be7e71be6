"""Hugging Face directories in and out: config.json, safetensors, tokenizers.

Loads safetensors and JSON only; nothing in a directory is executed.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax import nnx

from lens import sharding
from lens.errors import LensError
from lens.models import families
from lens.models.transformer import Transformer

TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')


class ModelError(LensError):
    """A model directory is missing, damaged or not supported; the message names file and remedy."""


def tokenizer_sha256(directory: str | os.PathLike) -> str:
    """Fingerprint of the tokenizer of a directory; data folders carry that of theirs."""
    return hashlib.sha256((pathlib.Path(directory) / 'tokenizer.json').read_bytes()).hexdigest()


def load_tokenizer(directory: str):
    """The tokenizer of a local directory."""
    from transformers import AutoTokenizer  # a second of import that model loading does not need

    if not (pathlib.Path(directory) / 'tokenizer.json').exists():
        raise ModelError(f'{directory}/tokenizer.json does not exist: give a directory that holds the tokenizer.')
    return AutoTokenizer.from_pretrained(directory)


def _read_json(path: pathlib.Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f'{path} does not exist: give a directory in Hugging Face layout.') from None
    except ValueError as e:
        raise ModelError(f'{path} is not valid JSON ({e}): download or export the model again.') from None
    if not isinstance(value, dict):
        raise ModelError(f'{path} holds no JSON object: download or export the model again.')
    return value


def _tensor_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor name -> file, from the index or from the single file."""
    index = directory / 'model.safetensors.index.json'
    if index.exists():
        weight_map = _read_json(index).get('weight_map')
        if not isinstance(weight_map, dict):
            raise ModelError(f'{index} has no weight_map: download or export the model again.')
        return {name: directory / file for name, file in weight_map.items()}
    single = directory / 'model.safetensors'
    if not single.exists():
        raise ModelError(f'{single} does not exist: the directory needs safetensors weights.')
    try:
        with safetensors.safe_open(single, framework='numpy') as f:
            return dict.fromkeys(f.keys(), single)
    except safetensors.SafetensorError as e:
        raise ModelError(f'{single} cannot be read ({e}): download or export the model again.') from None


def _read_tensor(name: str, file: pathlib.Path, shape, dtype) -> np.ndarray:
    try:
        with safetensors.safe_open(file, framework='flax') as f:
            x = np.asarray(f.get_tensor(name))
    except (OSError, safetensors.SafetensorError) as e:
        raise ModelError(f'{file} cannot be read ({e}): download or export the model again.') from None
    if x.shape != shape:
        raise ModelError(f'{file}: {name} has shape {x.shape}, config.json says {shape}.')
    if not np.isfinite(x.astype(np.float32)).all():
        raise ModelError(f'{file}: {name} holds values that are not finite.')
    return x.astype(dtype)


def load_model(directory: str | os.PathLike, *, dtype=jnp.float32, mesh=None, remat: str = 'full') -> Transformer:
    """The model of a local Hugging Face directory, placed on `mesh` (default: one device).

    dtype: of all weights on the device. remat: see TransformerConfig.
    Raises ModelError naming the file or tensor when anything is missing, extra, misshapen or not finite.
    """
    directory = pathlib.Path(directory)
    try:
        c = families.from_hf(_read_json(directory / 'config.json'))
    except families.UnsupportedModelError as e:
        raise ModelError(f'{directory}/config.json: {e}.') from None
    except KeyError as e:
        raise ModelError(f'{directory}/config.json has no key {e}.') from None
    files = _tensor_files(directory)
    table = families.tensors(c)
    layers = range(c.n_layers)
    wanted = {n for t in table for n in (t.hf_name.format(i) for i in layers)}
    missing, extra = sorted(wanted - files.keys()), sorted(files.keys() - wanted)
    if missing or extra:
        what = f'lacks {missing[0]}' if missing else f'holds an unexpected {extra[0]}'
        raise ModelError(f'{directory} {what} ({len(missing)} tensors missing, {len(extra)} extra).')

    def read(t, i=0):
        name = t.hf_name.format(i)
        return families.from_hf_layout(_read_tensor(name, files[name], families.hf_shape(t, c), dtype), t, c)

    stacked = {t.path: np.stack([read(t, i) for i in layers]) if '{}' in t.hf_name else read(t) for t in table}
    abstract = jax.eval_shape(lambda: Transformer(c, rngs=nnx.Rngs(0), dtype=dtype))
    model = jax.tree_util.tree_map_with_path(lambda kp, _: stacked[sharding.path(kp)], abstract)
    model.config = dataclasses.replace(c, remat=remat)
    return jax.device_put(model) if mesh is None else sharding.place(model, mesh)


def save_model(
    model: Transformer,
    directory: str | os.PathLike,
    *,
    dtype=jnp.float32,
    tokenizer_dir=None,
    token_ids: dict | None = None,
) -> None:
    """Writes an ordinary Hugging Face directory; it appears at once, by rename.

    tokenizer_dir: whose tokenizer files are copied beside. token_ids: bos_token_id, eos_token_id,
    pad_token_id for config.json. Raises FileExistsError when `directory` holds something.
    """
    directory = pathlib.Path(directory)
    c = model.config
    leaves = {sharding.path(kp): np.asarray(x) for kp, x in jax.tree_util.tree_leaves_with_path(model)}
    out = {}
    for t in families.tensors(c):
        x = leaves[t.path]
        layers = [(i, x[i]) for i in range(c.n_layers)] if '{}' in t.hf_name else [(0, x)]
        for i, w in layers:
            out[t.hf_name.format(i)] = jnp.asarray(families.to_hf_layout(w, t, c), dtype)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f'{directory} holds something already: give an empty or a new directory.')
    directory.parent.mkdir(parents=True, exist_ok=True)
    tmp = pathlib.Path(tempfile.mkdtemp(prefix=f'.{directory.name}-', dir=directory.parent))
    try:
        safetensors.flax.save_file(out, tmp / 'model.safetensors', metadata={'format': 'pt'})
        config = families.to_hf(c, jnp.dtype(dtype).name) | (token_ids or {})
        (tmp / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
        (tmp / 'generation_config.json').write_text(json.dumps(token_ids or {}, indent=2) + '\n')
        for name in TOKENIZER_FILES:
            if tokenizer_dir and (pathlib.Path(tokenizer_dir) / name).exists():
                shutil.copy(pathlib.Path(tokenizer_dir) / name, tmp / name)
        tmp.chmod(0o755)
        os.replace(tmp, directory)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
