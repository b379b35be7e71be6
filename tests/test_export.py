"""An exported lens: the same figures when it comes back, the same text in PyTorch by the code of its card."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from absl import flags
from ml_collections import config_flags
from safetensors.numpy import load_file

from lens import export, hf, lens_folder, lens_init, sampling, sharding
from lens.checkpoint import Checkpoints
from lens.config import open_run
from lens.errors import LensError
from lens.models import lora
from lens.models.decoder import Decoder, DecoderConfig, Prompt, scaled_identity
from lens.models.encoder import Encoder, EncoderConfig, encode
from lens.models.lens import Lens
from lens.response import NO_TAGS
from tests import hf_models, small_run

KINDS = ('lora', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('maps', 'full')))


def config(world, kind, **changes):
    short = {
        'phases': ('sft',),
        'sft__steps': 2,
        'sft__learning_rate_decoder': 3e-2,
        'sft__learning_rate_encoder': 3e-2,
        'eval__every': 0,
        'lora__pattern': 'q|v|down',
        'lora__rank': 3,
    }
    short |= {'decoder__train': kind, 'encoder__train': kind}
    return small_run.config(world, **short | changes)


@pytest.fixture(scope='module')
def runs(world, tmp_path_factory):
    """kind -> (workdir, summary, exported folder); each is made once."""
    root, made = tmp_path_factory.mktemp('runs'), {}

    def run(kind):
        if kind not in made:
            workdir, out = root / kind, root / f'{kind}_exported'
            summary = small_run.train(config(world, kind), workdir)
            export.export(workdir, out)
            made[kind] = (workdir, summary, out)
        return made[kind]

    return run


def code_of(folder, language):
    return re.search(rf'```{language}\n(.*?)```', (folder / 'README.md').read_text(), re.S)[1]


def run_card(folder, monkeypatch):
    """The names that the Python block of the card leaves behind, run as it stands in its folder."""
    monkeypatch.chdir(folder)
    names = {}
    exec(code_of(folder, 'python'), names)
    return names


def check_card(names, lens, base, length):
    """Greedy text and reconstruction of the card's own activation and of other ones, against ours."""
    scale = names['activation'].norm().item() * base.config.d_model**-0.5
    other = scale * np.random.default_rng(5).standard_normal((3, base.config.d_model)).astype(np.float32)
    a = np.concatenate([names['activation'][None].numpy(), other])
    ids = np.asarray(sampling.sample(lens.decoder, base, a, jax.random.key(0), length=length, temperature=0.0).ids_NxT)
    theirs = [names['explain'](torch.tensor(x)) for x in a]
    np.testing.assert_array_equal(np.stack(theirs), ids)
    assert len({tuple(x) for x in ids.tolist()}) > 1, 'the text must depend on the activation'
    expected = encode(lens.encoder, base, ids)
    for x, y in zip(theirs, expected, strict=True):
        np.testing.assert_allclose(names['reconstruct'](x), y, atol=1e-4)


def restored(world, kind, workdir):
    """(lens, base) of the newest checkpoint, outside any mesh."""
    cfg = config(world, kind)
    run = open_run(cfg)
    with jax.set_mesh(run.mesh), Checkpoints(workdir / 'checkpoints', 2) as c:
        lens = lens_init.restore(cfg, run, c, c.latest_step).params
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (lens, run.base))


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_figures_come_back_by_the_command_of_the_card(runs, world, tmp_path, kind):
    _, summary, out = runs(kind)
    words = shlex.split(code_of(out, 'sh').replace('\\\n', ' '))
    assert words[:3] == ['python', '-m', 'lens.main'] and words[-1] == '--workdir=runs/again'
    argv = [w.replace('init_from=DIR', f'init_from={out}') for w in words[2:-1]]
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=holder, sys_argv=argv)
    holder(argv)
    cfg = holder.config
    assert cfg.phases == () and cfg.decoder.train == kind and cfg.encoder.prompt == '<|bos|><text>'
    cfg.eval = config(world, kind).eval
    again = small_run.train(cfg, tmp_path / 'again')
    figures = small_run.figures(summary)
    assert {'fve', 'fve_greedy', 'fve_shuffled', 'cosine'} < figures.keys() and again['steps'] == 0
    for name, value in figures.items():
        if name != 'fve_sft':
            np.testing.assert_allclose(again[name], value, atol=1e-4, err_msg=name)
    export.export(tmp_path / 'again', tmp_path / 'twice')
    assert (tmp_path / 'twice/lens.safetensors').read_bytes() == (out / 'lens.safetensors').read_bytes()


@pytest.mark.slow
def test_training_goes_on_from_an_export(runs, world, tmp_path):
    _, summary, out = runs('lora')
    more = config(world, 'lora', init_from=str(out), sft__learning_rate_decoder=1e-3, sft__learning_rate_encoder=1e-3)
    again = small_run.train(more, tmp_path / 'w')
    assert again['steps'] == 2 and abs(again['fve'] - summary['fve']) > 1e-6


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
        ({'init_from': 'configs'}, r'configs/lens.json does not exist: init_from must be a folder of lens.export'),
    ],
)
def test_another_configuration_is_refused_in_one_sentence(runs, world, tmp_path, change, message):
    cfg = config(world, 'lora', **{'init_from': str(runs('lora')[2])} | change)
    with pytest.raises(LensError, match=message) as e:
        small_run.train(cfg, tmp_path / 'w')
    assert '\n' not in str(e.value) and not (tmp_path / 'w/config.json').exists()


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
    with pytest.raises(lens_folder.LensFolderError, match=message):
        lens_folder.read(tmp_path, None)


@pytest.mark.parametrize('kind', KINDS)
def test_the_folder_holds_what_its_sidecar_says(runs, world, kind):
    workdir, summary, out = runs(kind)
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
    assert spec['config'] == json.loads((workdir / 'config.json').read_text())
    assert spec['figures'].items() <= summary.items() and spec['figures']['fve'] == summary['fve']
    card = (out / 'README.md').read_text()
    for name, value in spec['figures'].items():
        assert f'| `{name}` | {value:.3f} | ' in card
    rows = [line.replace('\\|', '') for line in card.splitlines() if line.startswith('| ')]
    assert len(rows) == 1 + len(spec['figures']) and {row.count('|') for row in rows} == {4}
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


def test_the_card_reads_and_reconstructs_like_the_lens(runs, world, monkeypatch):
    workdir, _, out = runs('lora')
    lens, base = restored(world, 'lora', workdir)
    check_card(run_card(out, monkeypatch), lens, base, 12)


def handmade(base, n, shared, own_base, readout, injection):
    """A lens of block 2 of six, nothing of it at its initial value."""
    norms = np.linspace(1, 2, base.config.n_layers + 1, dtype=np.float32)
    own = {'own_base': own_base, 'adapters': None}
    c = DecoderConfig(n, shared, 2, injection, 7.0, 4, () if injection == 'affine' else (1,))
    maps = scaled_identity(c, base.config.embed_scale, base.config.d_model, norms) if injection == 'affine' else None
    decoder = Decoder(c, [3, 7], [9, 4, 6] if n else [], base, maps, **own)
    encoder = Encoder(EncoderConfig(3, readout), [5], [6, 8], base, **own)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), Lens(decoder, encoder))


@pytest.mark.parametrize(
    ('family', 'n', 'shared', 'own_base', 'readout', 'injection'),
    [
        ('gemma3_text', 0, False, False, 'affine', 'affine'),
        ('gpt2', 3, True, True, 'none', 'affine'),
        ('qwen2', 1, True, False, 'linear', 'add'),
        pytest.param('gemma2', 2, False, False, 'linear', 'replace', marks=pytest.mark.slow),
    ],
)
def test_the_card_works_in_other_families(tmp_path, monkeypatch, family, n, shared, own_base, readout, injection):
    hf_models.build(family, tmp_path / 'subject', vocab_size=len(hf.load_tokenizer(small_run.TOKENIZER)))
    for name in {p.name for p in pathlib.Path(small_run.TOKENIZER).iterdir()} & set(hf.TOKENIZER_FILES):
        shutil.copy(pathlib.Path(small_run.TOKENIZER) / name, tmp_path / 'subject')
    base = hf.load_model(tmp_path / 'subject')
    lens = handmade(base, n, shared, own_base, readout, injection)
    cfg = small_run.config(tmp_path, explanation_len=6)
    cfg.decoder.train = cfg.encoder.train = 'full' if own_base else 'maps'
    run = types.SimpleNamespace(
        base=base, length=6, tags=NO_TAGS, decoder_prompt=Prompt([3, 7], [9]), encoder_prompt=([5], [6, 8])
    )
    export.write_folder(tmp_path / 'out', lens, run, json.loads(cfg.to_json()), 0, {})
    assert 'Not evaluated yet.' in (tmp_path / 'out/README.md').read_text()
    check_card(run_card(tmp_path / 'out', monkeypatch), lens, base, 6)


def random_adapters(base, pattern='.*'):
    adapters = lora.init_adapters(base.blocks, 3, pattern, 2, 4.0, jax.random.key(0))
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), adapters)


def test_merged_adapters_compute_what_separate_ones_do(base, tokens):
    adapters = random_adapters(base)
    assert set(adapters) == set(lora.MATRICES)
    before = jax.tree.map(np.array, base)
    x = base.embed(tokens)
    expected = base.run_layers(x, 0, 3, adapters=adapters)
    assert np.abs(expected - base.run_layers(x, 0, 3)).max() > 0.1
    np.testing.assert_allclose(lora.merge(base, adapters).run_layers(x, 0, 3), expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, base, before)
    mesh = sharding.make_mesh(1, 4)
    with jax.set_mesh(mesh):
        placed = sharding.place(base, mesh)
        merged = lora.merge(placed, sharding.place({'adapters': adapters}, mesh)['adapters'])
    for (kp, a), b in zip(jax.tree_util.tree_leaves_with_path(merged), jax.tree.leaves(placed), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), sharding.path(kp)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, lora.merge(base, adapters))


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


def test_a_failed_export_leaves_nothing(runs, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError('disk full')

    monkeypatch.setattr(hf, 'save_model', fail)
    with pytest.raises(OSError, match='disk full'):
        export.export(runs('maps')[0], tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command(runs, tmp_path):
    """Succeeds once with a clear last line; then the folder holds something and is refused."""
    workdir, _, out = runs('maps')

    argv = [sys.executable, '-m', 'lens.export', f'--workdir={workdir}', f'--out={tmp_path}/new/out']
    done = subprocess.run(argv, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stderr
    assert lines[0].startswith('Writing decoder: 3 blocks') and lines[1].startswith('Writing encoder: 2 blocks')
    assert lines[2].startswith(f'Exported to {tmp_path}/new/out')
    assert (tmp_path / 'new/out/lens.safetensors').read_bytes() == (out / 'lens.safetensors').read_bytes()
    with pytest.raises(LensError, match=r'new/out holds something already: give an empty or a new folder as --out\.$'):
        export.export(workdir, tmp_path / 'new/out')


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(tmp_path, world):
    with pytest.raises(
        LensError, match=r'w/config.json does not exist: --workdir and init_from must be the folder of a run'
    ):
        export.export(tmp_path / 'w', tmp_path / 'out')
    (tmp_path / 'config.json').write_text(config(world, 'maps').to_json())
    with pytest.raises(LensError, match=r'checkpoints holds no checkpoint yet'):
        export.export(tmp_path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_figures_of_another_step_are_left_out(tmp_path):
    (tmp_path / 'summary.json').write_text('{"steps": 5, "fve": 1.0}')
    assert export._summary(tmp_path, 5) == {'steps': 5, 'fve': 1.0}
    assert export._summary(tmp_path, 4) == export._summary(tmp_path / 'none', 5) == {}
