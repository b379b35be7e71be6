"""The instrument against evaluate, sampler and encoder: the same figures, in any batch, with no training data on disk."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lens
from lens import config, evaluate, explain, export, files, hf, lens_init, metrics, places, reader, reopen, sharding
from lens.checkpoint import Checkpoints, Keep
from lens.errors import LensError
from lens.models import subject
from lens.models.encoder import encode_context
from lens.reading import Reading, label
from tests import programs, small_run

TEXT = 'Everyone knew Lena the baker. Lena found a compass near the lake.'
CHAT = [{'role': 'user', 'content': 'Who found it?'}, {'role': 'assistant', 'content': 'Lena', 'thinking': 'the baker'}]


def made(world, **changes):
    """(configuration, run, a lens of random numbers in its structure)."""
    short = {'lora__rank': 3, 'mesh__data': 1, 'decoder__train': 'lora', 'encoder__train': 'lora'} | {
        'encoder__context_tokens': 3
    }
    cfg, rng = small_run.config(world, **short | changes), np.random.default_rng(4)
    run = config.load(cfg, config.plan(cfg))

    def leaf(kp, x):
        one = 1 if sharding.path(kp).endswith('scale') else 0
        x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        return sharding.put((one + 0.2 * rng.standard_normal(x.shape)).astype(np.float32), x.sharding)

    with jax.set_mesh(run.mesh):
        params = lens_init.abstract_lens(cfg, run.texts, run.base, run.mesh)
        return cfg, run, jax.tree_util.tree_map_with_path(leaf, params)


def asarray(x):
    """Outside any mesh."""
    return jnp.asarray(np.asarray(x))


@pytest.fixture(scope='module')
def folders(world, tmp_path_factory):
    """A lens in each of its forms, and where what it was made of is: a light folder, a full one, a workdir, whose data are
    gone."""
    root = tmp_path_factory.mktemp('lenses')
    cfg, run, params = made(world)
    stored = json.loads(cfg.to_json())
    with jax.set_mesh(run.mesh):
        for form in ('hf', 'lens'):
            export.write_folder(root / form, params, run, stored, 7, {}, form=form)
        with Checkpoints(root / 'workdir/checkpoints', Keep(1)) as checkpoints:
            info = places.identity(cfg, run) | {'contents': places.contents(cfg)}
            checkpoints.save(7, {'params': params}, info, needed=True)
    files.write_json(root / 'workdir/config.json', stored | {'data': stored['data'] | {'path': 'nowhere'}})
    return root, run, params


@pytest.fixture(scope='module')
def opened(folders):
    return lens.load(folders[0] / 'hf', batch=5)


@pytest.fixture(scope='module')
def reading(opened):
    return opened.explain(TEXT, samples=2)


def test_figures_are_those_of_evaluate(folders, opened):
    _, run, params = folders
    with jax.set_mesh(run.mesh):
        e = evaluate.Evaluator(run)
        c = e._collect(params, 3, [metrics.figures(run.context_tokens)['fve_greedy']])
    for d, (tokens, n, positions) in enumerate(
        zip(*(e.held[k] for k in ('tokens', 'lengths', 'positions')), strict=True)
    ):
        if d == 3:
            break
        rows = slice(d * e.vectors, (d + 1) * e.vectors)
        found = opened.explain(tokens[:n], positions, salience=False)
        np.testing.assert_array_equal([r.explanations[0].ids for r in found], c.ids['greedy'][rows])
        doc = np.arange(e.vectors)
        for name, f in (('nmse', metrics.nmse), ('cosine', metrics.cosine)):
            theirs = [f(c.pred['greedy'][rows][[i]], c.a[rows][[i]], doc[:1])['value'] for i in doc]
            ours = [getattr(r, name) for r in found]  # of the order of 1, and a cosine may be near 0
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_an_exported_lens_has_the_figures_of_its_run(world, folders, tmp_path):
    root = folders[0]
    how = {'step': 'newest', 'subject': '', 'data': str(world / 'data'), 'best_of': '', 'num_vectors': 0}
    evaluate.main(str(root / 'workdir'), lens='', **how)
    evaluate.main(str(tmp_path / 'figures'), lens=str(root / 'hf'), **how)
    evaluate.main(str(tmp_path / 'few'), lens=str(root / 'hf'), studies=False, **how)
    theirs, ours, few = (
        json.loads((d / 'evaluation.json').read_text())['figures']
        for d in (root / 'workdir', tmp_path / 'figures', tmp_path / 'few')
    )
    assert theirs.keys() == ours.keys() and (tmp_path / 'figures/report.html').exists()
    for name, figure in theirs.items():
        assert ours[name]['value'] == pytest.approx(figure['value'], rel=1e-4, abs=1e-5), name
    assert (tmp_path / 'few/report.html').exists() and not (tmp_path / 'few/plots').exists()
    assert {'fve', 'fve_greedy', 'fve_shuffled'} <= few.keys() < ours.keys(), 'the studies were left out'
    assert few == {k: ours[k] for k in few}
    with pytest.raises(LensError, match=r'workdir is a run: give another folder for the figures of --lens='):
        evaluate.main(str(root / 'workdir'), lens=str(root / 'hf'), **how)


@pytest.mark.slow
def test_the_page_of_a_run_is_the_same_on_any_mesh(world, opened, tmp_path):
    cfg, run, params = made(world, mesh__data=2, mesh__model=2, eval__reading=5)
    with jax.set_mesh(run.mesh):
        e = evaluate.Evaluator(run)
        found = e.reading(params, json.loads(cfg.to_json()), 7, 'it')
    assert [r.position for r in found] == list(range(run.min_pos, run.min_pos + 5))
    theirs = opened.explain(e.held['tokens'][0, : run.min_pos + 5], range(run.min_pos, run.min_pos + 5))
    assert [r.explanations[0].ids for r in found] == [r.explanations[0].ids for r in theirs]
    np.testing.assert_allclose([r.nmse for r in found], [r.nmse for r in theirs], rtol=1e-4)


def test_a_row_says_what_was_read(opened, reading, folders):
    _, run, params = folders
    ids = run.tokenizer(TEXT)['input_ids']
    assert [r.token_id for r in reading] == ids and [r.position for r in reading] == list(range(len(ids)))
    assert ''.join(r.token for r in reading[1:]) == TEXT and reading[0].role == 'special'
    base = jax.tree.map(asarray, opened.base)
    logits, streams = (np.asarray(x) for x in programs.hidden(base, np.array([ids])))
    a = streams[run.layer + 1, 0]
    np.testing.assert_allclose([r.norm for r in reading], np.linalg.norm(a, axis=1), rtol=1e-5)
    np.testing.assert_allclose(opened.activations(TEXT, [-1, 2]), a[[-1, 2]], rtol=0, atol=1e-5 * a.std())
    for r, row in zip(reading, logits[0], strict=True):
        assert r.next_tokens[0].token == run.tokenizer.decode([row.argmax()])
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        np.testing.assert_allclose([c.probability for c in r.next_tokens], np.sort(p)[::-1][:5], rtol=1e-4)
        greedy, drawn = r.explanations
        assert drawn.sampled and not greedy.sampled and len(greedy.ids) == run.length
        assert all(w.probability == pytest.approx(w.alternatives[0].probability, rel=1e-4) for w in greedy.words)
        assert ('early' in r.flags) == (r.position < run.min_pos)
    source = opened._source(ids, np.arange(len(ids)))
    quote = np.asarray(jax.jit(encode_context)(*jax.tree.map(asarray, (params.encoder, opened.base)), source, 3))
    for r, p, x in zip(reading, quote, a, strict=True):
        assert r.controls['context'] == pytest.approx(((x - p) ** 2).sum() / (x**2).sum(), rel=1e-4)
        assert r.beyond == pytest.approx(1 - r.nmse / r.controls['context'])
    assert any(r.explanations[0].ids != r.explanations[1].ids for r in reading)


def test_batches_change_no_row(folders, reading, opened, monkeypatch):
    monkeypatch.setattr(reader, 'ENCODED', 1)  # as many texts are read back at a time as before
    other = lens.load(folders[0] / 'hf', batch=20).explain(TEXT, samples=2)
    some = opened.explain(TEXT, [9, 3], samples=2)
    for ours, theirs in [*zip(reading, other, strict=True), (some[0], reading.at(9)), (some[1], reading.at(3))]:
        assert ours.explanations[1].ids == theirs.explanations[1].ids
        for a, b in zip(ours.explanations, theirs.explanations, strict=True):
            assert a.nmse == pytest.approx(b.nmse, rel=1e-4)
            # salience is a difference of errors, relative to one of them
            np.testing.assert_allclose(*([w.salience or 0 for w in x.words] for x in (a, b)), atol=1e-4)


def test_salience_is_the_error_without_the_word(opened, reading):
    e, a = reading.at(9).explanations[0], opened.activations(TEXT, [9])
    starts = [i for i, w in enumerate(e.words) if w.salience is not None]
    assert starts[0] == 0
    for first, end in zip(starts, [*starts[1:], len(e.ids)], strict=True):
        left = e.ids[:first] + e.ids[end:]
        pred = opened._encode([left], opened._source(opened.tokens(TEXT).ids, [9]))[0]
        error = ((a[0] - pred) ** 2).sum() / (a[0] ** 2).sum()
        assert e.words[first].salience == pytest.approx((error - e.nmse) / e.nmse, abs=1e-4)


@pytest.mark.parametrize('form', ['workdir', 'lens'])
def test_every_form_of_a_lens_says_the_same(folders, reading, form):
    found = lens.load(folders[0] / form, batch=5).explain(TEXT, [9, -1])
    for ours, theirs in zip(found, (reading.at(9), reading[-1]), strict=True):
        # bfloat16 keeps 8 bits of every trained number
        assert ours.nmse == pytest.approx(theirs.nmse, rel=1e-4 if form == 'workdir' else 0.1)
    assert found.about['step'] == 7


def test_a_light_folder_is_small_and_is_a_start(folders, world):
    root, _, params = folders
    assert {p.name for p in (root / 'lens').iterdir()} == {'lens.safetensors', 'lens.json', 'README.md'}
    size, whole = ((root / form / 'lens.safetensors').stat().st_size for form in ('lens', 'hf'))
    assert size < 0.55 * whole
    spec = json.loads((root / 'lens/lens.json').read_text())
    assert spec['models'] == [] and {x['dtype'] for x in spec['tensors'].values()} == {'bfloat16'}
    card = (root / 'lens/README.md').read_text()
    assert "lens.load('DIR')" in card and 'AutoModelForCausalLM' not in card and spec['subject_content'] in card
    cfg, run, _ = made(world, init_from=str(root / 'lens'))
    with jax.set_mesh(run.mesh):
        again = lens_init.init_lens(cfg, run)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(y, x, rtol=2**-8)


def test_a_side_that_is_trained_in_full_is_not_light(world, tmp_path):
    cfg, run, params = made(world, encoder__train='full')
    with jax.set_mesh(run.mesh), pytest.raises(LensError, match=r'encoder\.train=full .* use --format=hf'):
        export.write_folder(tmp_path / 'x', params, run, json.loads(cfg.to_json()), 7, {}, form='lens')
    assert list(tmp_path.iterdir()) == []


def test_another_subject_is_refused(folders, world, tmp_path):
    shutil.copytree(world / 'subject', tmp_path / 'other')
    model = hf.load_model(world / 'subject')
    assert hf.content(tmp_path / 'other') == hf.content(world / 'subject')
    shutil.rmtree(tmp_path / 'other')
    model.blocks.mlp.down[...] = model.blocks.mlp.down[...].at[2].add(1)
    hf.save_model(model, tmp_path / 'other', source=world / 'subject')
    with pytest.raises(LensError, match=r'holds a lens of another subject than .*other, whose weights are not'):
        lens.load(folders[0] / 'lens', subject=str(tmp_path / 'other'))


def test_what_ships_is_found_by_name(folders, tmp_path, monkeypatch):
    (tmp_path / 'configs').mkdir()
    shutil.copytree(folders[0] / 'lens', tmp_path / 'lenses/small')
    monkeypatch.setattr(files, '__file__', str(tmp_path / 'files.py'))
    assert lens.load('small').name == 'small'
    with pytest.raises(LensError, match=r'^large is no folder of a run .* that ships with the package \(small\)'):
        lens.load('large')
    monkeypatch.setitem(reopen.MADE, 'data/it/model', 'make it')
    spec = json.loads((tmp_path / 'lenses/small/lens.json').read_text())
    spec['config']['subject']['path'] = 'data/it/model'
    (tmp_path / 'lenses/small/lens.json').write_text(json.dumps(spec))
    with pytest.raises(LensError, match=r'^The subject of small is not there: `make it` makes it\.$'):
        lens.load('small')


def test_halves_agree_with_the_whole(opened, reading):
    a, ids = opened.activations(TEXT, [9]), opened.tokens(TEXT).ids[:10]
    row, e = opened.describe(a, [ids])[0], reading.at(9).explanations[0]
    assert row.explanations[0].ids == e.ids and row.nmse == pytest.approx(e.nmse, rel=1e-4)
    score = opened.score(a[0], [e.text], ids)[0]
    pred = opened.reconstruct([e.ids], [ids])
    error = ((a - pred) ** 2).sum() / (a**2).sum()
    assert error == pytest.approx(e.nmse, rel=1e-4)
    assert opened.words(e.text) != e.ids or score['nmse'] == pytest.approx(e.nmse, rel=1e-4)
    best = opened.best_of(TEXT, 4, [9])[0]
    drawn = opened.explain(TEXT, [9], samples=4, greedy=False)[0]
    assert best.nmse == min(x.nmse for x in drawn.explanations)
    both = opened.compare(TEXT, TEXT.replace('Lena', 'Hugo'))
    assert [r.token for r in both] == ['a', 'b', 'a - b'] and both[2].norm == pytest.approx(both[0].norm, rel=1e-5)


def test_an_edit_puts_the_difference_at_its_token(opened, folders):
    _, run, _ = folders
    old, new = opened.explain(TEXT, [9], salience=False)[0].explanations[0].ids, [11, 12, 13]
    edit = opened.edit(TEXT, 9, new, strength=0.5, steps=3)
    ids = np.array([opened.tokens(TEXT).ids[:10]])
    a = opened.activations(TEXT, [9])
    base, change = (
        jax.tree.map(asarray, opened.base),
        0.5 * (opened.reconstruct([new], ids) - opened.reconstruct([old], ids)),
    )
    assert edit.size == pytest.approx(np.linalg.norm(change) / np.linalg.norm(a), rel=1e-4)
    patched = jax.jit(subject.patch, static_argnums=4)
    for name, value in (('none', a), ('edit', a + change)):
        row = np.pad(ids, [(0, 0), (0, 3)])
        for k in range(10, 13):
            row[0, k] = np.asarray(patched(base, row, np.array([9]), value, run.layer))[0, k - 1].argmax()
        assert edit.outcomes[name].continuation == run.tokenizer.decode(row[0, 10:])
    assert edit.outcomes['none'].kl == pytest.approx(0, abs=1e-6) and edit.outcomes['edit'].kl > 1e-4
    assert 'unrelated' in str(edit) and json.loads(json.dumps(edit.to_json()))['position'] == 9


def test_a_chat_has_roles_and_messages(opened):
    found = opened.tokens(CHAT)
    said = {
        role: ''.join(t for t, r in zip(found.texts, found.roles, strict=True) if r == role) for role in found.roles
    }
    assert {k: said[k] for k in ('user', 'thinking', 'final')} == {
        'user': 'Who found it?',
        'thinking': 'the baker',
        'final': 'Lena',
    }
    assert found.messages == sorted(found.messages) and set(found.messages) == {0, 1}


def test_characters_of_several_tokens(opened):
    found = opened.tokens('a \U0001f408 b')
    assert (
        ''.join(t for t, (k, _) in zip(found.texts, found.fragments, strict=True) if not k) == '<|bos|>a \U0001f408 b'
    )
    assert (3, 4) in found.fragments


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda r: r.explain(' \n'), r'The text is empty'),
        (lambda r: r.explain('a ' * 200), r'The text has \d+ tokens, the subject reads 1\.\.128'),
        (lambda r: r.explain(TEXT, [99]), r'position 99 is not in the text, which has the tokens 0\.\.14'),
        (lambda r: r.explain(TEXT, [0.5]), r'positions=\[0\.5\] must be whole numbers'),
        (lambda r: r.explain([5, 10**6]), r'token id 1000000 is none of the subject'),
        (lambda r: r.explain(TEXT, layers=[0, 1]), r'trained on the stream after block 1 alone'),
        (lambda r: r.explain(TEXT, samples=0), r'samples=0 must be at least 1'),
        (lambda r: r.explain([{'role': 'user'}]), r'message 0 of the chat is .*role and content'),
        (lambda r: r.explain([{'role': 'user', 'content': '<|end|>'}]), r'holds the control token <\|end\|>'),
        (lambda r: r.describe(np.ones(3)), r'vectors of shape \(1, 3\) were given, this lens takes finite ones Nx24'),
        (
            lambda r: r.reconstruct(['a b c d e f g h i j k l m n']),
            r'An explanation of \d+ tokens was given, this lens',
        ),
        (lambda r: r.compare(TEXT, TEXT), r'The two activations are the same'),
        (lambda r: r.edit(TEXT, -1, ' Lena', steps=200), r'steps=200 make 215 tokens, the subject reads 128'),
        (lambda r: r.edit(TEXT, -1, ' Lena', mode='x'), r"mode='x' is none of difference, replace"),
    ],
)
def test_refusals(opened, call, message):
    with pytest.raises(LensError, match=message) as e:
        call(opened)
    assert '\n' not in str(e.value)


def test_a_reading_is_a_table_json_and_rows(reading, tmp_path, monkeypatch):
    reading.save(tmp_path / 'x.json')
    again = Reading.from_json(json.loads((tmp_path / 'x.json').read_text()))
    assert again == reading and dataclasses.asdict(again[3]) == dataclasses.asdict(reading[3])
    text = str(reading)
    assert all(word in text for word in ('15 tokens of 15', 'error', 'baker', label(reading[5].nmse), 'early'))
    assert '\x1b' not in text and '15 activations' in str(dataclasses.replace(reading, text=()))
    monkeypatch.setattr('rich.console._is_jupyter', lambda: True)  # where rich shows what it prints
    assert str(reading) == text
    with pytest.raises(LensError, match='This is no reading in JSON'):
        Reading.from_json({'format': 'x'})


def test_the_command(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reader, 'load', functools.partial(reader.load, batch=5))  # programs that are there
    (tmp_path / 'chat.json').write_text(json.dumps({'messages': CHAT}))
    how = {'samples': 1, 'best_of': 0, 'temperature': 1.0, 'seed': 0, 'subject': ''}
    out = {'json': str(tmp_path / 'x.json'), 'html': ''}
    explain.main(folders[0] / 'lens', None, str(tmp_path / 'chat.json'), None, '-3:', **how, **out)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f'JSON: {tmp_path}/x.json' and 'Opening' in said.err
    assert len(json.loads((tmp_path / 'x.json').read_text())['rows']) == 3


@pytest.mark.parametrize(
    ('given', 'n', 'wanted'), [('', 5, None), ('3,-1,4,9', 5, [3, 4, 9]), ('1:3,2', 5, [1, 2]), ('-2:', 5, [3, 4])]
)
def test_positions_of_the_command(given, n, wanted):
    assert explain.places(given, n) == wanted


@pytest.mark.parametrize('given', ['x', '1-3', '7:9', '1:2:3'])
def test_no_positions(given):
    with pytest.raises(LensError, match='--positions='):
        explain.places(given, 5)


def test_what_the_command_cannot_read(tmp_path):
    (tmp_path / 'bad').write_bytes(b'\xff\xfe')
    for flags, message in (
        ((None, None, None), 'Give one of --text, --chat and --file'),
        ((None, None, str(tmp_path)), 'is no file'),
        ((None, None, str(tmp_path / 'bad')), 'is no UTF-8 text'),
        ((None, str(tmp_path / 'bad'), 'x'), 'Give one of'),
    ):
        with pytest.raises(LensError, match=message):
            explain.source(*flags)
    (tmp_path / 'chat').write_text('{"a": 1}')
    with pytest.raises(LensError, match='holds no list of messages'):
        explain.source(None, str(tmp_path / 'chat'), None)
    with pytest.raises(LensError, match=r'--html=.*cannot be written'):
        explain.check_out('', str(tmp_path / 'no/x.html'))
