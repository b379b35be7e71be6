"""Memory and time of one gradient of a straight-through rollout, by form and length.

    python -m benchmarks.gumbel_memory                          # the table of BUILD_NOTES.md: random weights, CPU
    python -m benchmarks.gumbel_memory --rows=64 --lengths=32   # other shapes

Prints one JSON object per length and form: what the compiled program allocates besides its arguments and its results
(megabytes), and seconds of one gradient. `naive` is the plain scan differentiated by JAX. The decoder has the shape of
the embedded subject, frozen, with maps into two blocks.
"""

import functools

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks.timing import report, seconds
from lens import gumbel
from lens.models.decoder import Decoder, DecoderConfig
from lens.models.injection import Affine
from lens.models.rope import Rope
from lens.models.transformer import Transformer, TransformerConfig
from tests import naive_rollout

LENGTHS = flags.DEFINE_multi_integer('lengths', [16, 32, 64, 128], 'Tokens of an explanation.')
ROWS = flags.DEFINE_integer('rows', 16, 'Activations.')
FORMS = flags.DEFINE_multi_enum('forms', [*gumbel.FORMS, 'naive'], [*gumbel.FORMS, 'naive'], 'What is measured.')

TAU = 1.0
SHAPE = TransformerConfig(
    family='llama',
    vocab_size=940,
    d_model=144,
    n_layers=6,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    d_ff=352,
    norm_eps=1e-5,
    tied=True,
    max_positions=512,
    ropes=(Rope(10000.0),),
)


def program(form: str, length: int, arguments):
    """Compiles the gradient of a function of the words and of the logits."""
    roll = naive_rollout.rollout if form == 'naive' else functools.partial(gumbel.rollout, form=form)

    def loss(decoder, base, activation_NxD):
        out = roll(decoder, base, activation_NxD, base.embedding[...], jax.random.key(0), length=length, tau=TAU)
        return jnp.sum(jnp.sin(out.words_NxTxW)) + jnp.mean(jax.nn.logsumexp(out.stream.logits(), axis=-1))

    return jax.jit(jax.grad(loss)).lower(*arguments).compile()


def main(_):
    base = Transformer(SHAPE, rngs=nnx.Rngs(0))
    config = DecoderConfig(Affine(patched_blocks=2), layer=3)
    d = SHAPE.d_model
    maps = jnp.tile(jnp.eye(d), (2, 1, 1)), jnp.zeros((2, d))
    decoder = Decoder(config, [3, 7, 11, 2, 5], [9, 4], base, maps, own_base=False, adapters=None)
    activation_NxD = jax.random.normal(jax.random.key(1), (ROWS.value, d))
    arguments = decoder, base, activation_NxD
    report(device=jax.devices()[0].device_kind, jax=jax.__version__, rows=ROWS.value)
    for length in LENGTHS.value:
        for form in FORMS.value:
            run = program(form, length, arguments)
            temporary_mb = round(run.memory_analysis().temp_size_in_bytes / 1e6, 1)
            report(length=length, form=form, temporary_mb=temporary_mb, seconds=round(seconds(run, *arguments), 2))


if __name__ == '__main__':
    app.run(main)
