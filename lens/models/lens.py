"""The trainable tree: one decoder and one encoder around a shared frozen base."""

import jax
from flax import nnx

from lens.models.decoder import Decoder
from lens.models.encoder import Encoder


class Lens(nnx.Module):
    """Gradients, optimizer state and checkpoints exist for this tree alone."""

    def __init__(self, decoder: Decoder, encoder: Encoder):
        self.decoder = decoder
        self.encoder = encoder


def parameter_count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
