"""How a lens starts: its structure from a configuration, the first values of maps, prompts and read-out.

Shapes and placements come from `abstract_lens`; nothing is made only to know them.
"""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lens import lens_folder, sharding, translators
from lens.config import Run
from lens.interchange import directories, reading
from lens.models import injection, lora, subject
from lens.models.decoder import Decoder, DecoderConfig, scaled_identity
from lens.models.encoder import Encoder, EncoderConfig
from lens.models.lens import Lens
from lens.response import Texts

NORM_DOCUMENTS, NORM_TOKENS = 10, 256  # texts that the scale of the maps is measured on, and as much of each


class Start(NamedTuple):
    """Where the affine parts begin: maps of the decoder, ([M, D, D], [M, D]) or, with cfg.decoder.layers, ([M, D, K, D],
    [M, K, D]); read-out ([D, D], [D]) of the encoder."""

    maps: tuple[jax.Array, jax.Array]
    readout: tuple[jax.Array, jax.Array]


def _encoder_config(cfg) -> EncoderConfig:
    e = cfg.encoder
    return EncoderConfig(cfg.layer if e.output_layer == -1 else e.output_layer, e.readout, e.context_tokens)


def compute_of(cfg) -> str:
    """Returns the dtype of the products of a base that is trained, on the devices of the mesh."""
    asked = cfg.subject.compute
    return asked if asked != 'auto' else 'float32' if sharding.platform() == 'cpu' else 'bfloat16'


def make_lens(cfg, texts: Texts, base, start: Start, key) -> Lens:
    """Returns the trainable tree at step 0, a pure function of its arguments."""
    where, encoder, inject = texts.decoder, _encoder_config(cfg), injection.of_config(cfg.decoder, base.config)

    def trained(side, n_layers, key):
        own = {'own_base': side.train == 'full', 'compute': compute_of(cfg), 'adapters': None}
        own['positions'] = cfg.position_vectors
        if side.train == 'lora':
            own['adapters'] = lora.init_adapters(
                base.blocks, n_layers, cfg.lora.pattern, cfg.lora.rank, cfg.lora.alpha, key, rs=cfg.lora.rs
            )
        return own

    decoder_key, encoder_key = jax.random.split(key)
    return Lens(
        Decoder(
            DecoderConfig(inject, cfg.layer, where.more_slots, where.marker, tuple(cfg.decoder.layers)),
            where.left,
            where.right,
            base,
            start.maps if inject.n_maps else None,
            **trained(cfg.decoder, base.config.n_layers, decoder_key),
        ),
        Encoder(
            encoder,
            *texts.encoder,
            base,
            readout=start.readout,
            soft_prompt=inject.soft_prompts,
            **trained(cfg.encoder, encoder.output_layer + 1, encoder_key),
        ),
    )


def abstract_lens(cfg, texts: Texts, base, mesh) -> Lens:
    """Returns shapes and placements of make_lens. `base` may be abstract itself. Call under jax.set_mesh(mesh)."""
    d, n = base.config.d_model, injection.of_config(cfg.decoder, base.config).n_maps
    slots = (len(cfg.decoder.layers),) if cfg.decoder.layers else ()

    def spec(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    start = Start((spec(n, d, *slots, d), spec(n, *slots, d)), (spec(d, d), spec(d)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    lens = jax.eval_shape(lambda *a: make_lens(cfg, texts, *a), base, start, key)
    return sharding.with_placement(lens, mesh, sharding.SPLIT_ABOVE)


def check_start(cfg, lens: Lens, base) -> None:
    """Raises LensError where the exported lens or the translators that a run starts from do not fit. All may be
    abstract."""
    if directories.is_foreign(cfg.init_from):
        reading.check(cfg.init_from, lens)
    elif cfg.init_from:
        lens_folder.check(pathlib.Path(cfg.init_from), lens)
    elif 'tuned_lens' in (cfg.decoder.init, cfg.encoder.init):
        translators.read(cfg.tuned_lens, base.config)


def init_lens(cfg, run: Run) -> Lens:
    """Returns the lens that training starts from, made in its place on the mesh: fresh and reproducible from
    cfg.seed, or the exported one of cfg.init_from, or that of others. Call under jax.set_mesh(run.mesh). Raises
    LensError."""
    abstract = abstract_lens(cfg, run.texts, run.base, run.mesh)
    if directories.is_foreign(cfg.init_from):
        return reading.read(cfg.init_from, run.base, abstract)
    if cfg.init_from:
        return lens_folder.read(pathlib.Path(cfg.init_from), abstract)
    make = jax.jit(lambda *a: make_lens(cfg, run.texts, *a), out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
    return make(run.base, _start(cfg, run), jax.random.key(run.seed))


def _stream_norms(run: Run) -> jax.Array:
    """subject.stream_norms over the beginnings of the first training texts; the same texts on every mesh."""
    n = min(NORM_DOCUMENTS, len(run.train))
    parts = sharding.row_count(run.mesh)
    rows = parts * -(-n // parts)
    width = min(run.train.width_for(run.train.lengths[:n]), NORM_TOKENS)
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    tokens[:n], lengths[:n] = run.train.tokens[:n, :width], np.minimum(run.train.lengths[:n], width)
    batch = sharding.put_batch({'tokens': tokens, 'lengths': lengths}, run.mesh)
    return jax.jit(subject.stream_norms)(run.base, batch['tokens'], batch['lengths'])


def _start(cfg, run: Run) -> Start:
    """Maps and read-out by cfg.decoder.init and cfg.encoder.init. Raises LensError."""
    c, encoder = run.base.config, _encoder_config(cfg)
    inject = injection.of_config(cfg.decoder, c)
    n, d, layers = inject.n_maps, c.d_model, cfg.decoder.layers or (cfg.layer,)
    maps = [(jnp.tile(jnp.eye(d, dtype=jnp.float32), (n, 1, 1)), jnp.zeros((n, d), jnp.float32))] * len(layers)
    readout = jnp.eye(d, dtype=jnp.float32), jnp.zeros(d, jnp.float32)
    of_maps, of_readout = cfg.decoder.init if n else 'identity', cfg.encoder.init
    if 'scale' in (of_maps, of_readout):
        norms = _stream_norms(run)
        if of_maps == 'scale':
            maps = [scaled_identity(inject, layer, c.embed_scale, d, norms) for layer in layers]
        if of_readout == 'scale':
            readout = readout[0] * (norms[cfg.layer + 1] / norms[encoder.output_layer + 1]), readout[1]
    if 'tuned_lens' in (of_maps, of_readout):
        lens = translators.read(cfg.tuned_lens, c)
        if of_maps == 'tuned_lens':
            scale = c.embed_scale if inject.at_input else 1.0
            composed = [[translators.compose(*lens, layer + 1, k) for k in range(n)] for layer in layers]
            maps = [tuple(np.stack(x) / scale for x in zip(*of_one, strict=True)) for of_one in composed]
        if of_readout == 'tuned_lens':
            readout = translators.compose(*lens, encoder.output_layer + 1, cfg.layer + 1)
    if cfg.decoder.layers:
        w, b = zip(*maps, strict=True)
        maps = [(np.stack(w, axis=2), np.stack(b, axis=1))]
    return Start(tuple(map(jnp.asarray, maps[0])), tuple(map(jnp.asarray, readout)))
