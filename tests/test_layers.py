"""A decoder whose slots stand for blocks of their own: what each is given, that all of it teaches, figures, reading, export."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lens as lenses
from lens import (
    config,
    evaluate,
    export,
    files,
    instrument,
    lens_init,
    objectives,
    reopen,
    rollout,
    sharding,
    tensor_files,
    texts,
    translators,
)
from lens.errors import LensError
from lens.interchange import verify, writing
from lens.models import decoder as dec
from lens.models.decoder import Decoder, DecoderConfig
from lens.models.injection import Affine, Replace
from lens.models.lens import Lens
from lens.reader import Reader
from lens.tools import plan
from lens.train import trace
from tests import programs, small_run
from tests.compare import close, differs
from tests.conftest import LAYER, LENGTH, TINY
from tests.phases import phase_of

LAYERS = (2, 0)  # neither ascending nor that which is reconstructed
PROMPT = '<|bos|><embed>:<embed>:'
TEXT = 'Everyone knew Lena the baker. Lena found a compass near the lake.'


def streams_by_hand(model, tokens_BxS) -> list[np.ndarray]:
    """What leaves each block, BxSxD, one block after the other."""
    x, out = np.asarray(model.embedding[...])[np.asarray(tokens_BxS)], []
    for k in range(model.config.n_layers):
        x = programs.block(model, x, k)
        out.append(np.asarray(x))
    return out


def at(stream_BxSxD, positions_BxP) -> np.ndarray:
    return np.take_along_axis(stream_BxSxD, np.asarray(positions_BxP)[..., None], axis=1).reshape(-1, TINY.d_model)


def two_slots(base, inject, encoder, layers=LAYERS) -> Lens:
    """A lens of random numbers."""
    rng, d, n = np.random.default_rng(6), TINY.d_model, inject.n_maps
    maps = (np.zeros((n, d, 2, d), np.float32), np.zeros((n, 2, d), np.float32)) if n else None
    decoder = Decoder(
        DecoderConfig(inject, LAYER, (0,), 11, layers), [3, 7], [9], base, maps, own_base=None, adapters=None
    )
    return Lens(jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), decoder), encoder)


@pytest.fixture(scope='module')
def two(base, lens):
    return two_slots(base, Affine(2), lens.encoder)


@pytest.mark.parametrize('layers', [LAYERS, (2, 0, 2), (1,)])
def test_each_slot_has_the_stream_of_its_block(base, batch, layers):
    streams = streams_by_hand(base, batch['tokens'])
    given = {k: jnp.asarray(batch[k]) for k in ('tokens', 'positions')}
    roll = rollout.read(base, given, layer=LAYER, layers=layers)
    close(roll.a_NxD, at(streams[LAYER], batch['positions']))
    assert roll.slots_NxKxD.shape == (16, len(layers), TINY.d_model) and roll.slots_NxKxD.dtype == jnp.float32
    for k, layer in enumerate(layers):
        close(roll.slots_NxKxD[:, k], at(streams[layer], batch['positions']))
    alone = rollout.read(base, given, layer=LAYER)
    assert alone.slots_NxKxD is None and alone.shown is alone.a_NxD
    close(roll.a_NxD, alone.a_NxD, steps=8)

    read = instrument.read(base, given['tokens'], layer=LAYER, top=2, layers=layers)
    close(read.a_SxD, streams[LAYER])
    close(read.slots_SxKxD, np.stack([streams[k] for k in layers], axis=2))
    other = instrument.read(base, given['tokens'], layer=LAYER, top=2)
    close(read.next.probability, other.next.probability)
    close(read.logit_lens.probability, other.logit_lens.probability)


def test_a_slot_has_maps_of_its_own(base, two):
    decoder = two.decoder
    a = np.random.default_rng(7).standard_normal((3, 2, TINY.d_model)).astype(np.float32)
    x, patch = dec.prompt_rows(decoder, base, jnp.asarray(a))
    w, b = np.asarray(decoder.maps_w[...]), np.asarray(decoder.maps_b[...])
    for j, slot in enumerate(decoder.slots):
        values = [a[:, j] @ w[m, :, j] + b[m, j] for m in range(2)]
        close(x[:, slot], values[0])
        close(patch(x, 1)[:, slot], values[1])


def rolled(objective, base, batch, two):
    """(phase, the rollout of a step)."""
    more = {'group': 3, 'kl_to': 'start'} if objective == 'grpo' else {}
    phase = phase_of(objective, layers=LAYERS, **more)
    roll = rollout.read(base, {k: jnp.asarray(x) for k, x in batch.items()}, **phase.reading)
    return phase, jax.jit(phase.objective.rollout, static_argnums=4)(two, base, roll, jax.random.key(1), phase.hparams)


@pytest.mark.parametrize('objective', ['sft', *(pytest.param(x, marks=pytest.mark.slow) for x in ('grpo', 'gumbel'))])
def test_every_vector_of_a_row_teaches_the_decoder(base, batch, two, objective):
    phase, roll = rolled(objective, base, batch, two)
    rows = len(roll.a_NxD)
    assert roll.slots_NxKxD.shape == (rows, 2, TINY.d_model) and rows == 16 * (3 if objective == 'grpo' else 1)
    assert roll.slots_NxKxD.shape == rollout.vectors(two.decoder, roll).shape

    knobs = phase.knobs(0)

    @jax.jit
    def gradient(slots):
        how = phase.objective, two, base, roll._replace(slots_NxKxD=slots), jax.random.key(1), phase.hparams
        return objectives.gradient(*how, knobs, ())[0]

    own = gradient(roll.slots_NxKxD)
    for k in range(2):
        other = gradient(roll.slots_NxKxD.at[:, k].multiply(-1.0))
        differs(other.decoder.maps_w[...], own.decoder.maps_w[...])
        assert np.abs(own.decoder.maps_w[...][:, :, k]).max() > 0
        if objective != 'gumbel':  # whose words are drawn anew
            close(other.encoder.readout_w[...], own.encoder.readout_w[...])


def test_the_words_of_a_group_are_drawn_of_all_vectors(base, batch, two):
    _, roll = rolled('grpo', base, batch, two)
    of_group = np.asarray(roll.slots_NxKxD).reshape(16, 3, 2, -1)
    np.testing.assert_array_equal(of_group, np.broadcast_to(of_group[:, :1], of_group.shape))
    logp = np.asarray(programs.score(two.decoder, base, of_group[:, 0], roll.ids_NxT)[0])
    close(roll.logp_NxT, logp)


def test_controls_take_or_leave_all_vectors_of_an_activation(base, batch, two):
    roll = rollout.read(base, {k: jnp.asarray(batch[k]) for k in ('tokens', 'positions')}, layer=LAYER, layers=LAYERS)
    roll.batch['index'] = jnp.arange(16).reshape(8, 2)
    how = {'length': LENGTH, 'tags': rollout.NO_TAGS, 'error': 'nmse', 'quotes': ()}
    how['names'] = ('sampled', 'greedy', 'no_activation')

    def words(slots):
        return texts.evaluate_batch(two, base, roll._replace(slots_NxKxD=slots), jax.random.key(0), **how)['ids']

    slots, order = roll.slots_NxKxD, np.roll(np.arange(16), 3)
    own, moved, one = words(slots), words(slots[order]), words(slots.at[:, 1].set(slots[order, 1]))
    np.testing.assert_array_equal(moved['greedy'], own['greedy'][order])
    assert (one['greedy'] != own['greedy']).any() and (one['greedy'] != own['greedy'][order]).any()
    for other in (moved, one):
        np.testing.assert_array_equal(other['no_activation'], own['no_activation'])
        assert (other['sampled'] != own['sampled']).any()


def run_config(world, **changes):
    short = {
        'decoder__prompt': PROMPT,
        'decoder__layers': (2, LAYER),
        'decoder__train': 'maps',
        'encoder__train': 'maps',
    }
    short |= {'sft__steps': 2, 'grpo__steps': 2, 'eval__every': 0, 'mesh__data': 1, 'encoder__context_tokens': 2}
    return small_run.config(world, **short | changes)


@pytest.fixture(scope='module')
def trained(world, tmp_path_factory):
    """(workdir, summary, run, the lens that it began with)."""
    root, cfg = tmp_path_factory.mktemp('layers'), run_config(world)
    run = config.load(cfg, config.plan(cfg))
    with jax.set_mesh(run.mesh):
        first = jax.tree.map(np.asarray, lens_init.init_lens(cfg, run))
        norms = np.asarray(lens_init._stream_norms(run))
    summary = small_run.train(cfg, root / 'run')
    return root / 'run', summary, run, first, norms


@pytest.mark.slow
def test_a_run_trains_on_all_of_them(trained):
    workdir, summary, run, first, norms = trained
    assert all(p.reading['layers'] == (2, LAYER) == run.reading['layers'] for p in run.phases)
    rows = [r for r in files.read_metrics(workdir / 'metrics.jsonl') if r['kind'] == 'train']
    assert [r['phase'] for r in rows] == ['sft', 'sft', 'grpo', 'grpo']
    assert all(np.isfinite(r['loss_encoder']) for r in rows)
    maps = np.asarray(reopen.reopen(workdir).params.decoder.maps_w[...])
    for k, layer in enumerate((2, LAYER)):
        for block in range(2):
            start = norms[block] / norms[layer + 1] * np.eye(TINY.d_model)
            close(first.decoder.maps_w[...][block, :, k], start)
            assert np.abs(maps[block, :, k] - start).max() > 1e-4
    assert {'fve', 'fve_greedy', 'fve_shuffled', 'fve_no_activation', 'fve_given'} <= summary.keys()
    assert all(np.isfinite(x) for x in small_run.figures(summary).values())


def test_maps_of_each_slot_start_as_the_tuned_lens_of_its_block(world, tmp_path):
    rng, d = np.random.default_rng(9), TINY.d_model
    weight, bias = (0.3 * rng.standard_normal(s).astype(np.float32) for s in ((3, d, d), (3, d)))
    subject = {'family': 'llama', 'd_model': d, 'n_layers': 3}
    files.write_json(tmp_path / 'tuned_lens.json', {'format': translators.FORMAT, 'subject': subject})
    tensor_files.write(tmp_path / 'translators.safetensors', {'weight': weight, 'bias': bias})
    cfg = run_config(world, decoder__init='tuned_lens', tuned_lens=str(tmp_path))
    run = config.load(cfg, config.plan(cfg))
    with jax.set_mesh(run.mesh):
        decoder = jax.tree.map(np.asarray, lens_init.init_lens(cfg, run)).decoder
    for k, layer in enumerate((2, LAYER)):
        for block in range(2):
            w, b = translators.compose(*translators.read(tmp_path, run.base.config), layer + 1, block)
            close(decoder.maps_w[...][block, :, k], w)
            close(decoder.maps_b[...][block, k], b)


def test_a_plan_of_it_is_that_of_its_steps(world):
    cfg = run_config(world)
    job, mesh = plan.open_job(cfg)[0], sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
        key = jax.eval_shape(jax.random.key, 0)
        for step in plan.steps(cfg, job, mesh):
            reading, _ = trace(*step, key)
            assert reading.out_info.slots_NxKxD.shape[1:] == (2, TINY.d_model)
    cfg.decoder.layers = (1,)
    with pytest.raises(LensError, match=r'decoder.layers=\(1,\) has 1 blocks'):
        plan.open_job(cfg)


@pytest.mark.slow
def test_studies_of_it(trained, world):
    how = {'step': 'newest', 'lens': '', 'subject': '', 'data': str(world / 'data'), 'num_vectors': 2}
    evaluate.main(str(trained[0]), best_of='1,2', **how)
    figures = files.read_json(trained[0] / 'evaluation.json', 'of the run')['figures']
    assert {'fve_best_of_2', 'fve_text_only_2', 'fve_last_2', 'fve_subject_2'} <= figures.keys()
    assert all(np.isfinite(f['value']) for f in figures.values())
    assert figures['fve_best_of_2']['value'] >= figures['fve_best_of_1']['value']


def random_lens(world, **changes):
    """(the run, a lens of random numbers in its structure, its configuration)."""
    cfg, rng = run_config(world, **changes), np.random.default_rng(8)
    run = config.load(cfg, config.plan(cfg))
    with jax.set_mesh(run.mesh):
        like = lens_init.abstract_lens(cfg, run.texts, run.base, run.mesh)
    params = jax.tree.map(
        lambda x: sharding.put(0.3 * rng.standard_normal(x.shape).astype(np.float32), x.sharding), like
    )
    return run, params, json.loads(cfg.to_json())


@pytest.fixture(scope='module')
def shaken(world, tmp_path_factory):
    """(folder of a lens whose words differ from row to row, the run, the lens, its configuration)."""
    folder = tmp_path_factory.mktemp('shaken') / 'lens'
    run, params, stored = random_lens(world)
    with jax.set_mesh(run.mesh):
        export.write_folder(folder, params, run, stored, 7, {}, form='lens')
    return folder, run, params, stored


def ids_of(reading) -> list[list[int]]:
    return [r.explanations[0].ids for r in reading]


def test_what_is_said_of_a_text_is_said_of_its_vectors(shaken):
    reader = lenses.load(shaken[0])
    ids, where = np.asarray(reader.tokens(TEXT).ids), [9, 3, 12]
    decoder, base = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (reader.lens.decoder, reader.base))
    streams = streams_by_hand(base, ids[None])
    by_hand = np.stack([streams[k][0, where] for k in (2, LAYER)], axis=1)
    assert reader.layers == (2, LAYER) and reader.about()['layers'] == [2, LAYER]
    close(reader.vectors(TEXT, where), by_hand)
    close(reader.activations(TEXT, where), by_hand[:, 1])
    context = [ids[: p + 1] for p in where]
    of_text, of_vectors = reader.explain(TEXT, where, layers=[2, LAYER]), reader.describe(by_hand, context)
    drawn = programs.sample(decoder, base, by_hand, jax.random.key(0), length=reader.length, temperature=0.0)
    assert ids_of(of_text) == ids_of(of_vectors) == drawn.ids_NxT.tolist()
    assert len(set(map(tuple, ids_of(of_text)))) == 3
    for row, other, a in zip(of_text, of_vectors, by_hand, strict=True):
        assert row.nmse == pytest.approx(other.nmse, rel=1e-3)
        assert row.norm == pytest.approx(np.linalg.norm(a[1]), rel=1e-4)
        score = reader.score(a[1], [row.explanations[0].ids], ids[: row.position + 1])[0]
        assert score['nmse'] == pytest.approx(row.nmse, rel=1e-3)
    assert ids_of(reader.describe(by_hand[:, ::-1], context)) != ids_of(of_vectors)

    compared = reader.compare(TEXT, TEXT, 9, 3)
    assert ids_of(compared)[:2] == ids_of(of_text)[:2]
    assert compared[2].norm == pytest.approx(compared[0].norm, rel=1e-4)
    change = by_hand[0] - by_hand[1]
    change *= np.linalg.norm(by_hand[0], axis=1, keepdims=True) / np.linalg.norm(change, axis=1, keepdims=True)
    (same,), other = reader.describe(change[None], context[:1]), compared[2]
    probable = ([w.probability for w in r.explanations[0].words] for r in (other, same))
    np.testing.assert_allclose(*probable, rtol=1e-3)
    made = reader.edit(TEXT, 9, ' Lena', steps=2)
    assert made.before == reader.explain(ids[:10], [9])[0].explanations[0].text
    for wrong in (by_hand[:, 0], by_hand[:, :1]):
        with pytest.raises(LensError, match=r'this lens takes finite ones Nx2x24\.'):
            reader.describe(wrong, context)
    with pytest.raises(LensError, match=r'trained on the stream after blocks 2, 1, one for each slot'):
        reader.explain(TEXT, where, layers=[LAYER])


@pytest.mark.slow
def test_it_is_exported_and_comes_back(shaken):
    folder, run, params, stored = shaken
    spec = files.read_json(folder / 'lens.json', 'of the export')
    assert spec['decoder']['layers'] == [2, LAYER] and spec['tensors']['decoder/maps_w']['shape'] == [2, 24, 2, 24]
    assert 'after blocks 2, 1, one each' in (folder / 'README.md').read_text()
    back, rounded = lenses.load(folder), jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params)
    assert back.lens.decoder.config == params.decoder.config and back.lens.decoder.config.layers == (2, LAYER)
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(np.asarray, x) for x in (back.lens, rounded)))
    here = Reader(reopen.Reopened(stored, stored['subject']['path'], run, 7, rounded), 'here')
    one, other = (r.explain(TEXT, [9, 3]) for r in (here, back))
    assert ids_of(one) == ids_of(other)
    np.testing.assert_allclose([r.nmse for r in one], [r.nmse for r in other], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('layers', [(), (1, 2)])
def test_a_run_takes_over_a_lens_of_the_same_blocks_alone(world, trained, shaken, layers):
    for place in (shaken[0], trained[0]):
        cfg = run_config(world, init_from=str(place), decoder__layers=layers)
        run = config.plan(cfg, needs=())
        with jax.set_mesh(run.mesh), pytest.raises(LensError, match=r'a lens with .*decoder.layers=\[2, 1\]'):
            reopen.check_start(cfg, lens_init.abstract_lens(cfg, run.texts, run.base, run.mesh), run.base)


@pytest.mark.slow
@pytest.mark.parametrize('inject', ['affine', 'replace', 'add'])
def test_pytorch_says_the_same_of_it(world, tmp_path, inject):
    """By the program of its card."""
    marked = {} if inject == 'affine' else {'decoder__marker': '#', 'decoder__train': 'full'}
    run, params, stored = random_lens(world, decoder__injection=inject, **marked)
    with jax.set_mesh(run.mesh):
        held = verify.hold(params, run)
        assert len({w.tobytes() for w in held.words}) > 8
        export.write_folder(tmp_path / 'hf', params, run, stored, 7, {}, form='hf', held=held)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'decoder__layers': (2, 3)},
            r'decoder.layers=\(2, 3\) names \[3\], and the subject has blocks 0\.\.2',
        ),
        ({'decoder__layers': (-1, 2)}, r'decoder.layers=\(-1, 2\) names \[-1\], and the subject has'),
        ({'decoder__layers': (1,)}, r'decoder.layers=\(1,\) has 1 blocks, and decoder.prompt has <embed> 2 times'),
        ({'decoder__layers': (0, 1, 2)}, r'decoder.layers=\(0, 1, 2\) has 3 blocks, .* give one block for each'),
        (
            {'decoder__layers': (0, 1), 'position_vectors': True},
            r'decoder.layers does not go with position_vectors=True',
        ),
        ({'decoder__layers': ('2', 1)}, r"decoder.layers='2' must be a whole number"),
    ],
)
def test_layers_that_cannot_be_are_refused(world, changes, message):
    with pytest.raises(LensError, match=message):
        config.plan(run_config(world, **changes), needs=())


def test_other_kinds_of_values_are_refused(world):
    cfg = run_config(world)
    with cfg.ignore_type():
        cfg.decoder.layers = 2
    with pytest.raises(LensError, match=r'decoder.layers=2 must be a tuple of whole numbers'):
        config.plan(cfg, needs=())


def test_formats_of_others_have_no_place_for_it(base, lens):
    abstract = functools.partial(two_slots, base, Replace(5.0), lens.encoder)
    with pytest.raises(LensError, match=r'--format=nla needs one slot in decoder.prompt'):
        writing.check('nla', abstract(), TINY)
    alone = abstract()
    alone.decoder.config = DecoderConfig(Replace(5.0), LAYER, (), 11, (2,))
    for layout in writing.LAYOUTS:
        with pytest.raises(LensError, match=rf'--format={layout} needs decoder.layers=\(\)'):
            writing.check(layout, alone, TINY)


@pytest.mark.slow
@pytest.mark.parametrize('inject', [Affine(2), Replace(5.0)], ids=lambda x: x.name)
def test_split_over_devices_it_is_the_same(base, batch, lens, inject):
    two = two_slots(base, inject, lens.encoder)
    phase, roll = rolled('sft', base, batch, two)

    hp, knobs = phase.hparams, phase.knobs(0)

    def step(lens, base, roll):
        return objectives.gradient(phase.objective, lens, base, roll, jax.random.key(1), hp, knobs, ())[0]

    want, mesh = jax.jit(step)(two, base, roll), sharding.make_mesh(2, 2)
    with jax.set_mesh(mesh):
        there = sharding.place(two, mesh), sharding.place(base, mesh)
        rows = sharding.put_batch({k: batch[k] for k in ('tokens', 'positions', 'explanations')}, mesh)
        again = rollout.read(there[1], rows, **phase.reading)
        again = jax.jit(phase.objective.rollout, static_argnums=4)(*there, again, jax.random.key(1), phase.hparams)
        got = jax.tree.map(np.asarray, jax.jit(step)(*there, again))
    close(got, want, steps=4096)
