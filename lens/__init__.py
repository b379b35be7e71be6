"""lens: read the hidden states of language models as text."""

from flax import nnx

nnx.set_graph_mode(False)  # modules are plain pytrees; use jax.jit / grad / vmap / scan on them

__version__ = '0.1.0'
