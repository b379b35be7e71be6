"""What a configuration needs on each device, from shapes alone: nothing is allocated, no weights are read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lens import build, sharding
from lens.extraction import NO_TAGS
from lens.models.transformer import Transformer, TransformerConfig
from lens.state import abstract_lens, abstract_state, with_placement
from lens.train import train_step


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes on one device in one phase. cache: keys and values of all texts that a step draws."""

    base: int
    trainable: int
    optimizer: int
    cache: int


def per_device(tree) -> int:
    """Bytes of one device's share of abstract arrays that carry placements."""
    shares = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree))
    return sum(int(np.prod(shape)) * size for shape, size in shares)


def abstract_base(cfg, c: TransformerConfig, mesh) -> Transformer:
    """Shapes and placements of the frozen base as cfg.subject asks for it."""
    s = cfg.subject
    c = dataclasses.replace(c, remat=s.remat, experts=s.experts, packed=s.packed)
    abstract = jax.eval_shape(lambda: Transformer(c, rngs=nnx.Rngs(0), dtype=build.DTYPES[s.dtype]))
    return with_placement(abstract, mesh, build.split_base(cfg))


def abstract_batch(phase: build.Phase, seq_len: int, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """One step's batch as data.train_batches gives it."""
    shapes = {'tokens': (phase.documents, seq_len), 'positions': (phase.documents, phase.vectors)}
    if phase.labelled:
        shapes['explanations'] = (*shapes['positions'], phase.hparams.length)
    place = {k: jax.sharding.NamedSharding(mesh, sharding.rows(len(s))) for k, s in shapes.items()}
    return {k: jax.ShapeDtypeStruct(s, jnp.int32, sharding=place[k]) for k, s in shapes.items()}


def plan(cfg, c: TransformerConfig, mesh, prompts, seq_len: int) -> dict[str, Needs]:
    """Needs of every phase; each phase's train step is traced, so that what cannot run raises here.

    c: of the subject. prompts: a decoder.Prompt and the token ids (left, right) of the encoder.
    seq_len: tokens of a row of the data folder.
    """
    out = {}
    with jax.set_mesh(mesh):
        base = abstract_base(cfg, c, mesh)
        lens = abstract_lens(cfg, prompts, base, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        for phase in build.make_phases(cfg, [*prompts[0].left, 0, *prompts[0].right], NO_TAGS):
            state = abstract_state(lens, phase, mesh)
            step = functools.partial(train_step, objective=phase.objective, hparams=phase.hparams, tx=phase.tx)
            jax.eval_shape(step, state, base, abstract_batch(phase, seq_len, mesh), key)
            texts = (
                0 if phase.labelled else phase.documents * phase.vectors * phase.hparams.group * phase.hparams.mean_of
            )
            length = lens.decoder.prompt_len + phase.hparams.length
            cache = jax.eval_shape(lambda b, n=texts, t=length: b.empty_cache(n, t), base)
            out[phase.name] = Needs(
                per_device(base), per_device(state.params), per_device(state.opt), per_device(cache) if texts else 0
            )
    return out
