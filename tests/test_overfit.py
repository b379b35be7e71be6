"""The whole loop can learn: 32 activations of the embedded subject, written down and read back."""

import jax
import numpy as np
import pytest

from configs import tiny
from data_gen.storyworld import world
from lens import config, data, losses, objectives, sampling, sharding
from lens.lens_init import init_lens
from lens.models.encoder import encode
from lens.train import init_state, micro_step

STEPS = 250


@pytest.mark.slow
def test_32_activations_reach_an_fve_above_nine_tenths(tmp_path):
    settings = world.Settings(train=8, validation=8)
    world.write_arrays(tmp_path / 'data', 'configs/tiny_subject', settings)
    cfg = tiny.get_config('sft')
    cfg.data.path, cfg.sft.steps = str(tmp_path / 'data'), STEPS
    cfg.sft.learning_rate_decoder = cfg.sft.learning_rate_encoder = 'cosine 1e-3 1e-5 warmup 10s'
    run = config.load(cfg, config.plan(cfg))
    (phase,) = run.phases
    with jax.set_mesh(run.mesh):
        rows = next(data.train_batches(run.train, documents=8, vectors=4, min_pos=run.min_pos, labelled=True, seed=0))
        rows.pop('doc_id')
        batch = sharding.put_batch(rows, run.mesh)
        state = init_state(init_lens(cfg, run), phase, run.mesh)
        for t in range(STEPS):
            state, _ = micro_step(phase, state, run.base, batch, jax.random.key(0), phase.knobs(t))
        a = objectives.read(run.base, batch, layer=run.layer).a_NxD
        draw = jax.jit(lambda d: sampling.sample(d, run.base, a, jax.random.key(1), length=run.length, temperature=0.0))
        ids = draw(state.params.decoder).ids_NxT
        pred = encode(state.params.encoder, run.base, ids)
    assert a.shape == (32, 144)
    assert float(losses.fve(pred, a)) > 0.9
    assert (np.asarray(ids) == np.asarray(batch['explanations']).reshape(32, -1)).mean() > 0.9
