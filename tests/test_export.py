"""An exported lens: the same lens when it comes back, the same text in PyTorch by the program of its card."""

import functools
import importlib.resources
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import types

import jax
import jax.numpy as jnp
import markdown_it
import numpy as np
import pytest
import torch
import transformers
from absl import flags
from ml_collections import config_flags
from safetensors.numpy import load_file

from lens import export, hf, lens_folder, lens_init, sampling, sharding, tensor_files
from lens.config import load, plan
from lens.errors import LensError, shown
from lens.models import lora
from lens.models.decoder import Decoder, DecoderConfig, scaled_identity
from lens.models.encoder import Encoder, EncoderConfig, encode
from lens.models.injection import Add, Affine, Replace
from lens.models.lens import Lens
from lens.response import NO_TAGS, Prompt, Texts
from lens.rollout import source_of
from tests import hf_models, small_run

KINDS, CONTEXT = ('lora', 'maps', 'full'), 3
SUMMARY = {'steps': 2, 'fve': 0.25, 'cosine': 0.5, 'activations': 24, 'documents': 6, 'device': 'a CPU'}
SUMMARY |= {'commit': 'abc', 'command': 'python -m lens.main'}


def config(world, kind, **changes):
    short = {
        'phases': ('sft',),
        'sft__steps': 2,
        'sft__learning_rate_decoder': 3e-2,
        'sft__learning_rate_encoder': 3e-2,
        'eval__every': 0,
        'lora__pattern': 'q|v|down',
        'lora__rank': 3,
        'mesh__data': 1,
        'encoder__context_tokens': CONTEXT,
        'decoder__train': kind,
        'encoder__train': kind,
    }
    return small_run.config(world, **short | changes)


def abstract_lens(cfg):
    """(run, the shapes of its lens)."""
    run = load(cfg, plan(cfg))
    with jax.set_mesh(run.mesh):
        return run, lens_init.abstract_lens(cfg, run.texts, run.base, run.mesh)


@pytest.fixture(scope='module')
def exports(world, tmp_path_factory):
    """kind -> (folder, lens of random numbers, run); each is made once."""
    root, made = tmp_path_factory.mktemp('exports'), {}

    def of(kind):
        if kind not in made:
            cfg, rng = config(world, kind), np.random.default_rng(4)
            run, abstract = abstract_lens(cfg)

            def leaf(kp, x):
                one = 1 if sharding.path(kp).endswith('scale') else 0
                return sharding.put((one + 0.2 * rng.standard_normal(x.shape)).astype(np.float32), x.sharding)

            lens = jax.tree_util.tree_map_with_path(leaf, abstract)
            with jax.set_mesh(run.mesh):
                export.write_folder(root / kind, lens, run, json.loads(cfg.to_json()), 2, SUMMARY)
            made[kind] = root / kind, lens, run
        return made[kind]

    return of


def code_of(folder, language):
    return re.search(rf'```{language}\n(.*?)```', (folder / 'README.md').read_text(), re.S)[1]


def run_card(folder, monkeypatch):
    """The names that the Python block of the card leaves behind, run in its folder."""
    code = code_of(folder, 'python')
    assert code == importlib.resources.files('lens').joinpath('card_code.py').read_text()
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    return names


@functools.partial(jax.jit, static_argnames='length')
def greedy(decoder, base, activation_BxD, length):
    return sampling.sample(decoder, base, activation_BxD, jax.random.key(0), length=length, temperature=0.0).ids_NxT


reconstructions = jax.jit(encode)
run_all = jax.jit(lambda model, x, adapters=None: model.run_layers(x, 0, model.config.n_layers, adapters=adapters))


def check_card(names, lens, base, length):
    """Greedy text and reconstruction of the card's own activation and of other ones, against ours."""
    scale = names['activation'].norm().item() * base.config.d_model**-0.5
    other = scale * np.random.default_rng(5).standard_normal((3, base.config.d_model)).astype(np.float32)
    a = np.concatenate([names['activation'][None].numpy(), other])
    ids = np.asarray(greedy(lens.decoder, base, a, length))
    theirs = [names['explain'](torch.tensor(x)) for x in a]
    np.testing.assert_array_equal(np.stack(theirs), ids)
    assert len({tuple(x) for x in ids.tolist()}) > 1, 'the text must depend on the activation'
    text = names['tokens'][0].numpy()
    at = np.array([[len(text) - 1, 5, 1, 0]])  # from 1 on the context is longer than the text
    source = source_of({'tokens': text[None], 'positions': at}, CONTEXT)
    expected = np.asarray(reconstructions(lens.encoder, base, ids, source))
    ours = np.stack([names['reconstruct'](x, text[: p + 1], p) for x, p in zip(theirs, at[0], strict=True)])
    np.testing.assert_allclose(ours, expected, atol=1e-4 * expected.std())
    assert expected.std(axis=0).mean() > 1e-3 * expected.std(), 'the reconstruction must depend on the text'


@pytest.mark.parametrize('kind', KINDS)
def test_a_lens_comes_back_as_it_was(exports, world, kind):
    folder, lens, _ = exports(kind)
    run, abstract = abstract_lens(config(world, kind))
    with jax.set_mesh(run.mesh):
        again = lens_folder.read(folder, abstract)
    leaves = jax.tree_util.tree_leaves_with_path(lens)
    for (kp, x), y in zip(leaves, jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=sharding.path(kp))


@pytest.mark.slow
def test_figures_come_back_by_the_command_of_the_card_and_training_goes_on(world, tmp_path):
    workdir, out = tmp_path / 'run', tmp_path / 'exported'
    summary = small_run.train(config(world, 'lora'), workdir)
    export.export(workdir, out)
    words = shlex.split(code_of(out, 'sh').replace('\\\n', ' '))
    assert words[:3] == ['python', '-m', 'lens.main'] and words[-1] == '--workdir=runs/again'
    argv = [w.replace('init_from=DIR', f'init_from={out}') for w in words[2:-1]]
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=holder, sys_argv=argv)
    holder(argv)
    cfg = holder.config
    assert cfg.phases == () and cfg.decoder.train == 'lora' and cfg.encoder.prompt == '<|bos|><text>'
    cfg.eval = config(world, 'lora').eval
    again = small_run.train(cfg, tmp_path / 'again')
    figures = small_run.figures(summary)
    assert {'fve', 'fve_greedy', 'fve_shuffled', 'cosine'} < figures.keys() and again['steps'] == 0
    for name, value in figures.items():
        if name != 'fve_sft':
            np.testing.assert_allclose(again[name], value, atol=1e-4, err_msg=name)
    export.export(tmp_path / 'again', tmp_path / 'twice')
    assert (tmp_path / 'twice/lens.safetensors').read_bytes() == (out / 'lens.safetensors').read_bytes()
    with pytest.raises(LensError, match=r'twice holds something already: give an empty or a new folder as --out\.$'):
        export.export(tmp_path / 'again', tmp_path / 'twice')
    more = config(world, 'lora', init_from=str(out), sft__learning_rate_decoder=1e-3, sft__learning_rate_encoder=1e-3)
    on = small_run.train(more, tmp_path / 'on')
    assert on['steps'] == 2 and abs(on['fve'] - summary['fve']) > 1e-6


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'decoder__patched_blocks': 1}, r'holds a lens with decoder.patched_blocks=2, this configuration says '),
        ({'decoder__shared_map': True}, r'decoder.shared_map=False, this configuration says decoder.shared_map=True'),
        ({'decoder__train': 'full'}, r'decoder.train=lora, this configuration says decoder.train=full'),
        ({'encoder__train': 'maps'}, r'encoder.train=lora, this configuration says encoder.train=maps'),
        ({'encoder__output_layer': 2}, r'encoder.output_layer=1, this configuration says encoder.output_layer=2'),
        ({'encoder__readout': 'none'}, r'encoder.readout=affine, '),
        ({'layer': 2, 'encoder__output_layer': 1}, r'a lens with layer=1, this configuration says layer=2'),
        (
            {'lora__rank': 4},
            r'decoder/adapters/down/a: shape \(3, 40, 3\), this configuration needs shape \(3, 40, 4\)',
        ),
        ({'lora__pattern': 'q|v'}, r'decoder/adapters/down/a: shape \(3, 40, 3\), this configuration needs none'),
        ({'encoder__prompt': '<text>:'}, r'encoder/prompt_left: shape \(1, 24\), this configuration needs shape \(0,'),
    ],
)
def test_another_configuration_is_refused_in_one_sentence(exports, world, change, message):
    folder, (_, like) = exports('lora')[0], abstract_lens(config(world, 'lora', **change))
    with pytest.raises(LensError, match=message) as e:
        lens_folder.check(folder, like)
    assert '\n' not in str(e.value)


def test_what_is_no_export_is_refused_before_anything_is_written(world, tmp_path):
    cfg = config(world, 'lora', init_from='configs')
    with pytest.raises(LensError, match=r'configs/lens.json does not exist: init_from must be a folder of lens.export'):
        small_run.train(cfg, tmp_path / 'w')
    assert not (tmp_path / 'w/config.json').exists()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{', 'is not valid JSON'),
        ('{"format": "lens/0"}', 'is not of format lens/1'),
        ('{"format": "lens/1"}', 'lacks'),
    ],
)
def test_a_damaged_sidecar_is_refused(tmp_path, text, message):
    (tmp_path / 'lens.json').write_text(text)
    with pytest.raises(LensError, match=message):
        lens_folder.read(tmp_path, None)


@pytest.mark.parametrize(
    'content', ['{"steps"', '[]', '{"steps": 3}', '{"steps": "2"}', json.dumps(SUMMARY | {'documents': 'many'})]
)
def test_a_damaged_summary_is_named(tmp_path, content):
    (tmp_path / 'summary.json').write_text(content)
    with pytest.raises(LensError, match=r'summary.json .+: remove it, for a card without figures'):
        export._summary(tmp_path, 2)


def test_weights_that_are_not_finite_are_refused(exports, tmp_path):
    folder, lens, _ = exports('lora')
    shutil.copytree(folder, tmp_path / 'copy')
    arrays = load_file(folder / 'lens.safetensors')
    arrays['decoder/maps_b'][0, 3] = np.nan
    tensor_files.write(tmp_path / 'copy/lens.safetensors', arrays)
    with pytest.raises(LensError, match=r'lens.safetensors: decoder/maps_b holds values that are not finite'):
        lens_folder.check(tmp_path / 'copy', lens)


@pytest.mark.parametrize('kind', KINDS)
def test_the_folder_holds_what_its_sidecar_says(exports, world, kind):
    out, _, _ = exports(kind)
    assert {p.name for p in out.iterdir()} == {'decoder', 'encoder', 'lens.safetensors', 'lens.json', 'README.md'}
    assert not [p for p in out.parent.iterdir() if p.name.startswith('.')], 'nothing temporary stays'
    spec, tensors = json.loads((out / 'lens.json').read_text()), load_file(out / 'lens.safetensors')
    assert {k: (tuple(v['shape']), v['dtype']) for k, v in spec['tensors'].items()} == {
        k: (x.shape, 'float32') for k, x in tensors.items()
    }
    assert all(v['meaning'].endswith('.') for v in spec['tensors'].values())
    assert tensors['encoder/prompt_right'].shape == (0, 24) and tensors['decoder/maps_w'].shape == (2, 24, 24)
    assert ('encoder/adapters/down/b' in tensors) == (kind == 'lora') and not any('base' in k for k in tensors)
    assert spec['trained'] == {'decoder': kind, 'encoder': kind} and spec['layer'] == 1 and spec['step'] == 2
    assert spec['decoder'].items() >= {'patched_blocks': 2, 'shared_map': False, 'prompt': '<|bos|><embed>:'}.items()
    assert spec['encoder'].items() >= {'output_layer': 1, 'readout': 'affine', 'prompt_ids_right': []}.items()
    assert spec['config'] == json.loads(config(world, kind).to_json())
    assert spec['figures'] == {k: SUMMARY[k] for k in ('fve', 'cosine')}
    card = (out / 'README.md').read_text()
    assert '{' + '{' not in card and '{%' not in card
    assert ('do not add them a second time' in card) == (kind == 'lora')
    rows = [line.replace('\\|', '') for line in card.splitlines() if line.startswith('| ')]
    assert len(rows) == 1 + len(spec['figures']) and {row.count('|') for row in rows} == {4}
    assert rows[1].startswith('| `fve` | 0.250 | ')
    blocks = {'decoder': 3, 'encoder': 2}
    subject = load_file(world / 'subject/model.safetensors')
    for side in lens_folder.SIDES:
        model = transformers.AutoModelForCausalLM.from_pretrained(out / side, dtype='auto')
        assert model.config.num_hidden_layers == blocks[side] and model.dtype == torch.float32
        assert (out / side / 'tokenizer.json').read_bytes() == (world / 'subject/tokenizer.json').read_bytes()
        changed = {k for k, x in load_file(out / side / 'model.safetensors').items() if not (x == subject[k]).all()}
        if kind == 'lora':
            assert {k.split('.')[-2] for k in changed} == {'q_proj', 'v_proj', 'down_proj'}
            assert len(changed) == 3 * blocks[side]
        else:
            assert bool(changed) == (kind == 'full')


def test_the_card_reads_and_reconstructs_like_the_lens(exports, monkeypatch):
    out, lens, run = exports('lora')
    lens, base = jax.tree.map(np.asarray, (lens, run.base))  # outside any mesh
    check_card(run_card(out, monkeypatch), lens, base, 12)


def handmade(base, n, shared, own_base, readout, injection):
    """A lens of block 2 of six, nothing of it at its initial value."""
    norms = np.linspace(1, 2, base.config.n_layers + 1, dtype=np.float32)
    own = {'own_base': own_base, 'adapters': None}
    inject = {'affine': Affine(n, shared), 'replace': Replace(7.0), 'add': Add()}[injection]
    c = DecoderConfig(inject, 2, () if injection == 'affine' else (1,), 4)
    start = scaled_identity(inject, 2, base.config.embed_scale, base.config.d_model, norms)
    maps = start if inject.n_maps else None
    decoder = Decoder(c, [3, 7], [9, 4, 6] if n else [], base, maps, **own)
    encoder = Encoder(EncoderConfig(3, readout), [5], [6, 8], base, **own)
    rng = np.random.default_rng(2)
    lens = Lens(decoder, encoder)
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32), lens)


@pytest.mark.parametrize(
    ('family', 'n', 'shared', 'own_base', 'readout', 'injection'),
    [
        ('gpt2', 3, True, False, 'none', 'affine'),
        ('gemma2', 2, False, False, 'linear', 'replace'),
        pytest.param('gemma3_text', 0, False, False, 'affine', 'affine', marks=pytest.mark.slow),
        pytest.param('qwen2', 1, True, True, 'linear', 'add', marks=pytest.mark.slow),
    ],
)
def test_the_card_works_in_other_families(tmp_path, monkeypatch, family, n, shared, own_base, readout, injection):
    hf_models.build(family, tmp_path / 'subject', vocab_size=len(hf.load_tokenizer(small_run.TOKENIZER)))
    for name in {p.name for p in pathlib.Path(small_run.TOKENIZER).iterdir()} & set(hf.TOKENIZER_FILES):
        shutil.copy(pathlib.Path(small_run.TOKENIZER) / name, tmp_path / 'subject')
    # what the card's program must not follow: it would end at once, and repeat nothing
    generation = {'eos_token_id': list(range(0, 900, 2)), 'repetition_penalty': 3.0}
    (tmp_path / 'subject/generation_config.json').write_text(json.dumps(generation))
    base = hf.load_model(tmp_path / 'subject')
    lens = handmade(base, n, shared, own_base, readout, injection)
    cfg = small_run.config(tmp_path, explanation_len=6)
    cfg.decoder.train = cfg.encoder.train = 'full' if own_base else 'maps'
    texts = Texts(Prompt([3, 7], [9]), ([5], [6, 8]), (), NO_TAGS)
    run = types.SimpleNamespace(base=base, length=6, texts=texts)
    monkeypatch.chdir(tmp_path)
    cfg.subject.path = 'subject'  # seen from here, not from the folder of the card
    export.write_folder(tmp_path / 'out', lens, run, json.loads(cfg.to_json()), 0, {})
    assert 'Not evaluated yet.' in (tmp_path / 'out/README.md').read_text()
    check_card(run_card(tmp_path / 'out', monkeypatch), lens, base, 6)


def random_adapters(base, pattern='.*'):
    init = functools.partial(lora.init_adapters, n_layers=3, pattern=pattern, rank=2, alpha=4.0)
    shapes, rng = jax.eval_shape(init, base.blocks, key=jax.random.key(0)), np.random.default_rng(4)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def test_merged_adapters_compute_what_separate_ones_do(base, tokens):
    adapters = random_adapters(base)
    assert set(adapters) == set(lora.MATRICES)
    before, x = jax.tree.map(np.array, base), base.embed(tokens)
    expected = run_all(base, x, adapters)
    assert np.abs(expected - run_all(base, x)).max() > 0.1
    np.testing.assert_allclose(run_all(lora.merge(base, adapters), x), expected, atol=1e-4 * np.std(expected))
    jax.tree.map(np.testing.assert_array_equal, base, before)


def test_merged_adapters_stay_where_their_matrices_are(base):
    adapters, mesh = random_adapters(base, 'q|down'), sharding.make_mesh(1, 4)
    with jax.set_mesh(mesh):
        placed = sharding.place(base, mesh)
        merged = lora.merge(placed, sharding.place({'adapters': adapters}, mesh)['adapters'])
    for (kp, a), b in zip(jax.tree_util.tree_leaves_with_path(merged), jax.tree.leaves(placed), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), sharding.path(kp)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged, lora.merge(base, adapters))


def test_merging_adds_in_float32_and_keeps_the_dtype(base):
    adapters = random_adapters(base, 'down')
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    a, b = adapters['down']['a'], adapters['down']['b']
    down = np.asarray(half.blocks.mlp.down[...], np.float32) + np.einsum('lfr,lrd->lfd', a, b)
    merged = lora.merge(half, adapters)
    np.testing.assert_array_equal(merged.blocks.mlp.down[...], jnp.asarray(down, jnp.bfloat16))
    np.testing.assert_array_equal(merged.blocks.mlp.up[...], half.blocks.mlp.up[...])
    with pytest.raises(ValueError, match='blocks/mlp/down have 2 blocks, the model has 3'):
        lora.merge(base, jax.tree.map(lambda x: x[:2], adapters))


HOSTILE = (
    '[a](http://b) **c** _d_ <b>e</b> &amp; $f$ ~~g~~',
    '`',
    '```\n# x',
    '"; import os',
    "'; rm -rf /",
    '${HOME}',
    '</script>',
    '| a | b',
    '\u202egnp',
    '\x1b[2J',
    'a\u200db',
)


def card_of(world, text):
    """The card of a lens, every text of others in which is this one; its blocks and spans, as a Markdown parser reads them."""
    cfg = json.loads(config(world, 'maps').to_json())
    cfg['subject']['path'] = cfg['decoder']['prompt'] = text
    cfg['phases'] = ['sft', 'grpo']
    sides = {
        'decoder': {'injection': 'affine', 'patched_blocks': 1, 'shared_map': True, 'layers': [], 'prompt': text},
        'encoder': {'output_layer': 1, 'readout': text, 'context_tokens': 0, 'prompt': text},
    }
    spec = dict.fromkeys(('subject', 'family', 'exported'), text) | dict.fromkeys(('d_model', 'layer', 'step'), 1)
    spec |= {'explanation_len': 2, 'trained': dict.fromkeys(sides, 'maps'), 'config': cfg, 'lora': None} | sides
    spec |= {
        'subject_folder': text,
        'figures': {'fve': 0.5},
        'provenance': {'commit': text},
        'models': [*sides],
        'subject_content': text,
    }
    card = export.card(spec, SUMMARY | {'device': text, 'commit': text, 'command': text})
    tokens = markdown_it.MarkdownIt('commonmark').enable('table').parse(card)
    return card, tokens, [(t.type, t.tag, [c.type for c in t.children or ()]) for t in tokens]


@pytest.mark.parametrize('text', HOSTILE)
def test_the_card_shows_texts_and_nothing_of_them_takes_effect(world, text):
    card, tokens, structure = card_of(world, text)
    assert structure == card_of(world, 'x')[2]
    assert re.search(r'\(steps of the phases: sft \d+, grpo \d+\)', card)
    assert all(c == '\n' or c.isprintable() for c in card), 'control characters and turned text stay out'
    assert tokens[1].children[1].content == shown(text)
    command = [t.content for t in tokens if t.type == 'fence'][1]
    if text.replace('\n', '').isprintable():  # shlex knows no escapes of bash
        assert f'--config.subject.path={text}' in shlex.split(command.replace('\\\n', ' '))


def test_a_shell_gives_back_what_the_card_quotes():
    words = ["it's", 'a\u202eb', '\x1b[2J\\', "\t'", 'a\nb', '${HOME}']
    script = 'printf "%s\\0" ' + ' '.join(map(export._quoted, words))
    said = subprocess.run(['bash', '-c', script], capture_output=True, env={'LC_ALL': 'C.UTF-8'}, check=True).stdout
    assert said.decode().split('\0')[:-1] == words


@pytest.mark.parametrize('value', ['0.5', None, [1], {}])
def test_a_figure_that_is_no_number_is_named(tmp_path, value):
    (tmp_path / 'summary.json').write_text(json.dumps(SUMMARY | {'steps': 5, 'fve': value}))
    with pytest.raises(LensError, match=r'summary\.json is damaged: fve is no number: remove it'):
        export._summary(tmp_path, 5)


def test_a_failed_export_leaves_nothing(exports, world, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError('disk full')

    _, lens, run = exports('maps')
    monkeypatch.setattr(hf, 'save_model', fail)
    with pytest.raises(LensError, match=r'out cannot be written \(disk full\)'), jax.set_mesh(run.mesh):
        export.write_folder(tmp_path / 'out', lens, run, json.loads(config(world, 'maps').to_json()), 2, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(tmp_path, world):
    with pytest.raises(
        LensError, match=r'w/config.json does not exist: --workdir and init_from must be the folder of a run'
    ):
        export.export(tmp_path / 'w', tmp_path / 'out')
    (tmp_path / 'config.json').write_text(config(world, 'maps').to_json())
    with pytest.raises(LensError, match=r"checkpoints has no checkpoint 'newest': it has none yet"):
        export.export(tmp_path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_figures_of_another_step_are_left_out(tmp_path):
    whole = SUMMARY | {'steps': 5, 'fve': 1.0}
    (tmp_path / 'summary.json').write_text(json.dumps(whole))
    assert export._summary(tmp_path, 5) == whole
    assert export._summary(tmp_path, 4) == export._summary(tmp_path / 'none', 5) == {}
