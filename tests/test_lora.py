"""The scale of adapters at the start."""

import jax
import numpy as np
import pytest

from lens.models import lora
from tests.conftest import TINY


@pytest.mark.parametrize(('rs', 'scale'), [(False, 6.0 / 9), (True, 6.0 / 3)])
def test_the_scale_of_an_update_is_alpha_by_rank_or_by_its_root(base, rs, scale):
    """Alpha 6, rank 9: A has unit variance before the scale and 1/sqrt(fan in)."""
    a = lora.init_adapters(base.blocks, 2, 'up', 9, 6.0, jax.random.key(0), rs=rs)['up']['a']
    unit = jax.random.normal(jax.random.split(jax.random.key(0), 1)[0], (2, TINY.d_model, 9))
    np.testing.assert_allclose(a, scale * TINY.d_model**-0.5 * unit, rtol=1e-5)
