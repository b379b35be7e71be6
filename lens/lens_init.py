"""The training state: how it starts, how it looks before it exists, how it comes back.

Shapes and placements come from `abstract`; nothing is made only to know them.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import struct

from lens import lens_folder, sharding, translators
from lens.checkpoint import Checkpoints
from lens.config import Phase, Run, open_run
from lens.errors import LensError
from lens.models import lora, subject
from lens.models.decoder import Decoder, DecoderConfig, Prompt, scaled_identity
from lens.models.encoder import Encoder, EncoderConfig
from lens.models.lens import Lens
from lens.models.transformer import TransformerConfig

PLACES = (  # keys that say where a lens reads and writes
    'layer',
    'position_vectors',
    'decoder.train',
    'decoder.injection',
    'decoder.norm',
    'decoder.marker',
    'decoder.patched_blocks',
    'decoder.shared_map',
    'encoder.train',
    'encoder.output_layer',
    'encoder.readout',
    'encoder.current_token',
)
NORM_DOCUMENTS = 10  # texts that the scale of the maps is measured on


class State(struct.PyTreeNode):
    """What a step changes: count of micro-steps, trainable tree, optimizer state.

    reference: the decoder at the start of the phase, where its objective compares with it; otherwise ().
    """

    step: jax.Array
    params: Lens
    opt: optax.OptState
    reference: Decoder | tuple = ()


class Start(NamedTuple):
    """Where the affine parts begin: maps ([n, d, d], [n, d]) of the decoder, read-out ([d, d], [d]) of the encoder."""

    maps: tuple[jax.Array, jax.Array]
    readout: tuple[jax.Array, jax.Array]


def configs(cfg, prompt: Prompt, base: TransformerConfig) -> tuple[DecoderConfig, EncoderConfig]:
    """Of the decoder and of the encoder on a base."""
    d, e = cfg.decoder, cfg.encoder
    output_layer = cfg.layer if e.output_layer == -1 else e.output_layer
    blocks = base.n_layers if d.patched_blocks == -1 else d.patched_blocks
    norm = float(d.norm) or base.d_model**0.5
    where = {'more_slots': prompt.more_slots, 'marker': prompt.marker}
    return (
        DecoderConfig(blocks, d.shared_map, cfg.layer, d.injection, norm, **where),
        EncoderConfig(output_layer, e.readout, e.current_token),
    )


def make_lens(cfg, prompts, base, start: Start, key) -> Lens:
    """The trainable tree at step 0, a pure function. prompts: a decoder.Prompt and the encoder's token ids (left,
    right)."""
    dec_config, enc_config = configs(cfg, prompts[0], base.config)
    output_layer = enc_config.output_layer

    def trained(side, n_layers, key):
        own = {'own_base': side.train == 'full', 'adapters': None, 'positions': cfg.position_vectors}
        if side.train == 'lora':
            own['adapters'] = lora.init_adapters(
                base.blocks, n_layers, cfg.lora.pattern, cfg.lora.rank, cfg.lora.alpha, key, rs=cfg.lora.rs
            )
        return own

    dec_key, enc_key = jax.random.split(key)
    return Lens(
        Decoder(
            dec_config,
            prompts[0].left,
            prompts[0].right,
            base,
            start.maps if dec_config.injection == 'affine' else None,
            **trained(cfg.decoder, base.config.n_layers, dec_key),
        ),
        Encoder(
            enc_config,
            *prompts[1],
            base,
            readout=start.readout,
            **trained(cfg.encoder, output_layer + 1, enc_key),
        ),
    )


def abstract_lens(cfg, prompts, base, mesh) -> Lens:
    """Shapes and placements of make_lens. `base` may be abstract itself. Call under jax.set_mesh(mesh)."""
    d = base.config.d_model
    c, _ = configs(cfg, prompts[0], base.config)
    shapes = Start(((c.n_maps, d, d), (c.n_maps, d)), ((d, d), (d,)))
    start = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s[0], int)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    lens = jax.eval_shape(lambda *a: make_lens(cfg, prompts, *a), base, start, key)
    return sharding.with_placement(lens, mesh, sharding.SPLIT_ABOVE)


def abstract_state(params: Lens, phase: Phase | None, mesh) -> State:
    """Shapes and placements of the state in `phase`, of an abstract lens."""
    opt = jax.eval_shape(phase.tx.init, params) if phase else ()
    step = {'step': jax.ShapeDtypeStruct((), jnp.int32)}
    opt, step = (sharding.with_placement(x, mesh, sharding.SPLIT_ABOVE) for x in (opt, step))
    reference = params.decoder if phase and phase.hparams.needs_reference else ()
    return State(params=params, opt=opt, reference=reference, **step)


def check(cfg, run: Run, new: bool) -> None:
    """Raises LensError for a table that leaves a parameter out or, of a new run, a start that does not fit.

    run.base may be abstract.
    """
    with jax.set_mesh(run.mesh):
        lens = abstract_lens(cfg, (run.decoder_prompt, run.encoder_prompt), run.base, run.mesh)
        for phase in run.phases:
            jax.eval_shape(phase.tx.init, lens)
    if not new:
        return
    if cfg.init_from and _is_run(cfg.init_from):
        _check_same_lens(pathlib.Path(cfg.init_from), cfg)
    elif cfg.init_from:
        lens_folder.check(pathlib.Path(cfg.init_from), lens)
    elif 'tuned_lens' in (cfg.decoder.init, cfg.encoder.init):
        translators.read(cfg.tuned_lens, run.base.config)


def _check_same_lens(workdir: pathlib.Path, cfg) -> None:
    """Raises LensError unless the lens of another run reads and writes where that of this one does."""
    theirs, ours = _places(_config(workdir), workdir), _places(json.loads(cfg.to_json()), workdir)
    if differing := [f'{k}={theirs[k]!r}' for k in theirs if theirs[k] != ours[k]]:
        raise LensError(f'init_from={workdir} holds a lens with {", ".join(differing)}: use these keys here.')


def _places(config: dict, workdir: pathlib.Path) -> dict:
    """The values of PLACES by dotted key."""
    try:
        values = {k: functools.reduce(dict.__getitem__, k.split('.'), config) for k in PLACES}
    except KeyError as e:
        raise LensError(f'{workdir}/config.json lacks a key ({e}): it is of another version; train again.') from e
    out = values['encoder.output_layer']
    return values | {'encoder.output_layer': values['layer'] if out == -1 else out}


def _config(workdir: pathlib.Path) -> dict:
    """The configuration of a run."""
    file = workdir / 'config.json'
    if not file.exists():
        raise LensError(f'{file} does not exist: --workdir and init_from must be the folder of a run.')
    return json.loads(file.read_text())


def _is_run(folder: str | pathlib.Path) -> bool:
    """Whether init_from is a workdir, not an exported lens."""
    return (pathlib.Path(folder) / 'checkpoints').is_dir()


def _stream_norms(run: Run) -> jax.Array:
    """subject.stream_norms over the first training texts; the same texts on every mesh."""
    n = min(NORM_DOCUMENTS, len(run.train))
    parts = sharding.row_count(run.mesh)
    rows = parts * -(-n // parts)
    tokens, lengths = np.zeros((rows, run.train.tokens.shape[1]), np.int32), np.zeros(rows, np.int32)
    tokens[:n], lengths[:n] = run.train.tokens[:n], run.train.lengths[:n]
    batch = sharding.put_batch({'tokens': tokens, 'lengths': lengths}, run.mesh)
    return jax.jit(subject.stream_norms)(run.base, batch['tokens'], batch['lengths'])


def _start(cfg, run: Run) -> Start:
    """Maps and read-out by cfg.decoder.init and cfg.encoder.init. Raises LensError."""
    c_base = run.base.config
    (c, e), d = configs(cfg, run.decoder_prompt, c_base), c_base.d_model
    maps = jnp.tile(jnp.eye(d, dtype=jnp.float32), (c.n_maps, 1, 1)), jnp.zeros((c.n_maps, d), jnp.float32)
    readout = jnp.eye(d, dtype=jnp.float32), jnp.zeros(d, jnp.float32)
    of_maps, of_readout = cfg.decoder.init if c.injection == 'affine' else 'identity', cfg.encoder.init
    if 'scale' in (of_maps, of_readout):
        norms = _stream_norms(run)
        if of_maps == 'scale':
            maps = scaled_identity(c, c_base.embed_scale, d, norms)
        if of_readout == 'scale':
            readout = readout[0] * (norms[cfg.layer + 1] / norms[e.output_layer + 1]), readout[1]
    if 'tuned_lens' in (of_maps, of_readout):
        lens = translators.read(cfg.tuned_lens, c_base)
        if of_maps == 'tuned_lens':
            w, b = zip(*(translators.compose(*lens, cfg.layer + 1, k) for k in range(c.n_maps)), strict=True)
            scale = 1.0 if c.patched_blocks else c_base.embed_scale
            maps = np.stack(w) / scale, np.stack(b) / scale
        if of_readout == 'tuned_lens':
            readout = translators.compose(*lens, e.output_layer + 1, cfg.layer + 1)
    return Start(tuple(map(jnp.asarray, maps)), tuple(map(jnp.asarray, readout)))


def init_lens(cfg, run: Run) -> Lens:
    """The lens that training starts from, made in its place on the mesh: fresh and reproducible from
    cfg.seed, or that of cfg.init_from, an exported lens or another workdir. Call under jax.set_mesh(run.mesh)."""
    prompts = (run.decoder_prompt, run.encoder_prompt)
    abstract = abstract_lens(cfg, prompts, run.base, run.mesh)
    if cfg.init_from:
        folder = pathlib.Path(cfg.init_from)
        return _weights(folder, abstract)[1] if _is_run(folder) else lens_folder.read(folder, abstract)
    place = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(lambda *a: make_lens(cfg, prompts, *a), out_shardings=place)
    return make(run.base, _start(cfg, run), jax.random.key(run.seed))


def init_state(params: Lens, phase: Phase | None, mesh, step: int = 0) -> State:
    """Fresh optimizer state for `phase`; none where there is nothing to train."""
    opt = ()
    if phase:
        place = sharding.shardings(jax.eval_shape(phase.tx.init, params), mesh, sharding.SPLIT_ABOVE)
        opt = jax.jit(phase.tx.init, out_shardings=place)(params)
    needed = phase and phase.hparams.needs_reference
    reference = jax.tree.map(jnp.copy, params.decoder) if needed else ()  # a step donates params
    count = sharding.place({'step': jnp.asarray(step, jnp.int32)}, mesh)
    return State(params=params, opt=opt, reference=reference, **count)


def phase_of(run: Run, step: int) -> Phase | None:
    """The phase that a checkpoint after micro-step `step` was made in; at a boundary the one that ends there."""
    return next((p for p in run.phases if step <= p.end), None)


@dataclasses.dataclass(frozen=True)
class Reopened:
    """A workdir one of whose checkpoints has been restored. config: of the run, as stored."""

    config: dict
    run: Run
    step: int
    params: Lens


def reopen(workdir: pathlib.Path, step: str = 'newest', data: int = -1) -> Reopened:
    """The run of a workdir with the weights of a checkpoint, on the devices that are here.

    step: newest | best (highest held-out FVE) | a number. data: devices that split a batch, -1 for all that the
    model does not take. Raises LensError.
    """
    config = _config(workdir)
    cfg = ml_collections.ConfigDict(config)
    cfg.mesh.update(data=data, model=math.gcd(cfg.mesh.model, jax.device_count()), replica=1)
    try:
        run = open_run(cfg)
    except (AttributeError, KeyError) as e:
        raise LensError(f'{workdir}/config.json lacks a key ({e}): it is of another version; train again.') from e
    with jax.set_mesh(run.mesh):
        lens = abstract_lens(cfg, (run.decoder_prompt, run.encoder_prompt), run.base, run.mesh)
        return Reopened(config, run, *_weights(workdir, lens, step))


def _weights(workdir: pathlib.Path, lens: Lens, step: str = 'newest') -> tuple[int, Lens]:
    """(step, weights alone) of a checkpoint of a workdir, in the structure and placement of `lens`."""
    with Checkpoints(workdir / 'checkpoints', keep=1) as checkpoints:

        def read(step: int) -> Lens:
            return checkpoints.restore(step, {'params': lens})['params']

        if step == 'newest':
            found = checkpoints.newest(read)
        else:
            number = str(checkpoints.best_step) if step == 'best' else step
            if number not in map(str, checkpoints.steps):
                have = ', '.join(map(str, checkpoints.steps)) or 'none'
                raise LensError(f'{workdir}/checkpoints has no checkpoint {step!r}: it has {have}.')
            found = int(number), read(int(number))
    if found is None:
        raise LensError(f'{workdir}/checkpoints holds no checkpoint yet.')
    return found


def restore(cfg, run: Run, checkpoints: Checkpoints, step: int) -> State:
    """The state of a checkpoint. Call under jax.set_mesh(run.mesh). Raises CheckpointError."""
    lens = abstract_lens(cfg, (run.decoder_prompt, run.encoder_prompt), run.base, run.mesh)
    return checkpoints.restore(step, abstract_state(lens, phase_of(run, step), run.mesh))
