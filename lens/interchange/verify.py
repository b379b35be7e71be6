"""Is what was written what was trained: the program of the card, PyTorch and transformers alone, on held-out activations.

It runs as those who get the folder run it, in float32, against the lens with its adapters merged and its weights rounded
as they were written: equal responses, token by token, and equal reconstructions. Readers of the formats of others read an
explanation as text; where that is other tokens than those that were said, the lens reads theirs here, and it is told.
"""

import dataclasses
import functools
import importlib.resources
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lens import feed, instrument, lens_folder, rollout, sharding
from lens.config import Run
from lens.errors import LensError, need_package
from lens.models.lens import Lens
from lens.models.transformer import cast

ACTIVATIONS, PER_DOCUMENT = 64, 4
TOLERANCE = 1e-3  # of a reconstruction, relative to its norm
PROGRAMS = {'hf': 'card_code.py', 'nla': 'card_nla.py', 'peft': 'card_nla.py'}


class Held(NamedTuple):
    """What a lens makes of held-out activations, NxD or with decoder.layers NxKxD: responses, how many of their tokens count, the words in them, or what
    is read where there is no closed pair of tags (found_N), and what they are turned back into. before_NxR: the source
    tokens up to and with the one at position_N. encode: the same of whole rows of token ids."""

    shown: np.ndarray
    position_N: np.ndarray
    before_NxR: np.ndarray
    ids_NxT: np.ndarray
    end_N: np.ndarray
    found_N: np.ndarray
    words: list[np.ndarray]
    pred_NxD: np.ndarray
    encode: Callable[[list[list[int]]], np.ndarray]


def check_possible(form: str) -> None:
    """Raises LensError where nothing can be verified."""
    if form not in PROGRAMS:
        raise LensError(f'--verify runs the models of --format={", ".join(PROGRAMS)}: --format={form} writes none.')
    need_package('torch', 'test', '--verify')


def _as_written(lens: Lens, base) -> Lens:
    """The lens of the models that were written, in float32."""
    copy = jax.tree.map(lambda x: x, lens)
    for side in lens_folder.SIDES:
        model, part = lens_folder.model(lens, base, side), getattr(copy, side)
        whole = cast(model, jnp.float32)
        whole.config = dataclasses.replace(model.config, compute='')
        part.base, part.adapters = nnx.data(whole), None
    return copy


def hold(lens: Lens, run: Run) -> Held:
    """Reads, explains and reconstructs held-out activations. Call under jax.set_mesh(run.mesh)."""
    documents = -(-ACTIVATIONS // PER_DOCUMENT)
    split = feed.held_out(run.validation, documents=documents, vectors=PER_DOCUMENT, min_pos=run.min_pos, seed=run.seed)
    batch = sharding.put_batch({k: split[k] for k in ('tokens', 'positions')}, run.mesh)
    roll = rollout.read(run.base, batch, **run.reading)
    n = len(roll.a_NxD)
    how = {'length': run.length, 'tags': run.texts.tags, 'top': 1}
    greedy = np.zeros((n, 2), np.int32), np.zeros(n, np.float32)  # which randomness, which temperature
    written = _as_written(lens, run.base)
    said = instrument.explain(written, run.base, roll.shown, roll.source, 0, *greedy, **how)
    roll, said = jax.tree.map(np.asarray, (roll, said))
    after = said.start_N + said.length_N
    return Held(
        roll.shown,
        roll.source.position_N,
        roll.source.tokens_NxR,
        said.ids_NxT,
        np.where(said.found_N, after + len(run.texts.tags.closing), run.length),
        said.found_N,
        [row[start:end] for row, start, end in zip(said.words_NxT, said.start_N, after, strict=True)],
        said.pred_NxD,
        functools.partial(_encode_rows, written, run),
    )


def _encode_rows(lens: Lens, run: Run, rows: list[list[int]]) -> np.ndarray:
    """Reconstructions of rows of token ids in which the prompt stands already."""
    bare, lengths = jax.tree.map(lambda x: x, lens), np.array([len(row) for row in rows])
    bare.encoder.left_ids = bare.encoder.right_ids = ()
    ids = np.stack([np.pad(row, (0, lengths.max() - len(row))) for row in rows]).astype(np.int32)
    with jax.set_mesh(run.mesh):
        return np.asarray(instrument.reconstruct(bare, run.base, ids, lengths, None))


def _program(form: str, folder: pathlib.Path) -> dict:
    """Runs the program of a card in a folder; returns its names."""
    code = importlib.resources.files('lens').joinpath(PROGRAMS[form]).read_text()
    for name, value in {'FOLDER': str(folder), 'DTYPE': 'float32'}.items():
        code, n = re.subn(f'(?m)^{name} = .*$', f'{name} = {value!r}', code)
        assert n == 1, name
    names: dict = {}
    exec(compile(code, PROGRAMS[form], 'exec'), names)
    return names


def verify(folder: pathlib.Path, form: str, held: Held) -> str:
    """Returns what was found, as a sentence. Raises LensError where a response is another one, or the error of a
    reconstruction is above TOLERANCE."""
    card = _program(form, folder)
    torch, of_activation = card['torch'], zip(held.words, held.found_N, held.ids_NxT, strict=True)
    a, words, told = torch.tensor(held.shown), [torch.tensor(w) for w in held.words], ''
    if form == 'hf':
        seen = [row[-1 - p :] for row, p in zip(held.before_NxR, held.position_N, strict=True)]
        said = [card['explain'](x, p).numpy() for x, p in zip(a, held.position_N, strict=True)]
        same = [np.array_equal(x, w if ok else ids) for x, (w, ok, ids) in zip(said, of_activation, strict=True)]
        preds, want = [card['reconstruct'](*x) for x in zip(words, seen, held.position_N, strict=True)], held.pred_NxD
    else:
        said, texts = card['explain'](a), [card['tokenizer'].decode(w) for w in words]
        same = [
            np.array_equal(x[:end], ids[:end]) and (card['within'](x).strip() == text.strip() or not ok)
            for x, end, text, (_, ok, ids) in zip(said, held.end_N, texts, of_activation, strict=True)
        ]
        texts = [card['within'](x) if ok else text for x, ok, text in zip(said, held.found_N, texts, strict=True)]
        rows = [card['read'](text)[0].tolist() for text in texts]
        preds, want = [card['reconstruct'](text) for text in texts], held.encode(rows)
        others = (np.abs(want - held.pred_NxD).max(axis=1) > TOLERANCE * np.linalg.norm(want, axis=1)).sum()
        told = f'; {others} explanations are other tokens to a reader of text' if others else ''
    if not all(same):
        raise LensError(
            f'--verify: {len(same) - sum(same)} of {len(same)} most probable texts are others in PyTorch: nothing is written.'
        )
    error = np.linalg.norm(torch.stack(preds).numpy() - want, axis=1) / np.linalg.norm(want, axis=1)
    if not (error <= TOLERANCE).all():  # nor where it is no number
        raise LensError(
            f'--verify: a reconstruction is off by {error.max():.2g} of its norm in PyTorch, at most {TOLERANCE} is allowed: '
            'nothing is written.'
        )
    return f'Verified in PyTorch: {len(same)} texts are equal, reconstructions to {error.max():.1g}{told}'
