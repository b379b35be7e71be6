"""A lens as others have theirs: what PyTorch makes of it, what the files hold, what comes back, what is refused."""

import importlib.resources
import json
import re
import shutil

import jax
import numpy as np
import pytest
import transformers
import yaml
from safetensors.numpy import load_file

from lens import export, lens_folder, reopen, sharding, tensor_files
from lens.errors import LensError
from lens.interchange import verify, writing
from tests.compare import close
from tests.test_export import abstract_lens, config

MARKED = {
    'decoder__injection': 'replace',
    'decoder__marker': '#',
    'decoder__norm': 5.0,
    'decoder__prompt': '<|bos|><|user|>The<embed>, {then}?<|end|><|assistant|>',
    'encoder__prompt': '<|bos|>The{<text>}<|end|>',
    'encoder__readout': 'linear',
    'encoder__context_tokens': 0,
    'explanation_close': '<|end|>',
}


@pytest.fixture(scope='module')
def marked(world, tmp_path_factory):
    """(folder, run, lens of random numbers, what it makes of held-out activations): in the formats nla and peft, verified."""
    cfg, rng = config(world, 'lora', **MARKED), np.random.default_rng(4)
    run, abstract = abstract_lens(cfg)

    def leaf(x):
        return sharding.put(rng.standard_normal(x.shape).astype(np.float32), x.sharding)

    lens, root = jax.tree.map(leaf, abstract), tmp_path_factory.mktemp('marked')
    with jax.set_mesh(run.mesh):
        held = verify.hold(lens, run)
        for form in writing.LAYOUTS:
            export.write_folder(root / form, lens, run, json.loads(cfg.to_json()), 2, {}, form=form, held=held)
    return root, run, lens, held


def test_a_lens_in_the_formats_of_others(marked, world):
    """What PyTorch made of it was compared before it was written; here what the files hold, against the formats."""
    root, _, lens, held = marked
    assert len({tuple(x) for x in held.ids_NxT.tolist()}) > 10, 'the texts that were equal differ from each other'
    subject = load_file(world / 'subject/model.safetensors')
    whole = {side: load_file(root / f'nla/{side}/model.safetensors') for side in ('av', 'ar')}
    assert whole['av'].keys() == subject.keys()
    assert whole['ar'].keys() == {
        k for k in subject if not k.startswith('model.layers.2.') and k not in ('model.norm.weight', 'lm_head.weight')
    }
    assert json.loads((root / 'nla/ar/config.json').read_text())['num_hidden_layers'] == 2
    head = load_file(root / 'nla/ar/value_head.safetensors')
    assert head.keys() == {'weight'}
    np.testing.assert_array_equal(head['weight'], np.asarray(lens.encoder.readout_w[...]).T)  # y = weight x

    av, ar = (load_file(root / f'peft/{x}.safetensors') for x in ('av/adapter_model', 'ar/ar_lora_value_head'))
    meta, adapter = (json.loads((root / f'peft/{x}.json').read_text()) for x in ('ar/ar_meta', 'av/adapter_config'))
    assert adapter['lora_alpha'] / adapter['r'] == meta['lora_alpha'] / meta['lora_r'] ** 0.5 == 1.0
    assert not adapter['use_rslora'] and meta['final_norm_stripped'] and meta['ar_num_layers'] == 2
    assert adapter['target_modules'] == meta['target_modules'] == ['down_proj', 'q_proj', 'v_proj']
    np.testing.assert_array_equal(ar.pop('value_head.weight'), head['weight'])
    for side, stored, name in (
        ('av', av, 'base_model.model.{}.lora_{}.weight'),
        ('ar', ar, 'backbone.{}.lora_{}.default.weight'),
    ):
        changed = [k.removesuffix('.weight') for k, x in whole[side].items() if not np.array_equal(x, subject[k])]
        assert {name.format(k, x) for k in changed for x in 'AB'} == stored.keys() and len(changed) == 3 * (
            3 - (side == 'ar')
        )
        for k in changed:
            low = stored[name.format(k, 'B')] @ stored[name.format(k, 'A')]
            close(whole[side][f'{k}.weight'], subject[f'{k}.weight'] + low)

    tokenizer = transformers.AutoTokenizer.from_pretrained(root / 'nla/av')
    for form in writing.LAYOUTS:
        av, ar = (yaml.safe_load((root / form / x / 'nla_meta.yaml').read_text()) for x in ('av', 'ar'))
        assert [*av][:6] == ['kind', 'schema_version', 'role', 'stage', 'base_checkpoint', 'd_model']
        assert (av['role'], ar['role'], av['stage'], av['d_model']) == ('av', 'ar', 'sl', 24)
        assert av['extraction'] == {'injection_scale': 5.0, 'mse_scale': 24**0.5}
        assert ar['extraction'] == {'injection_scale': None, 'mse_scale': 24**0.5}
        assert ar['critic']['extraction_layer_index'] == av['extraction_layer_index'] == 1
        # as their clients do
        marker, content = (
            av['tokens'],
            av['prompt_templates']['av'].format(injection_char=av['tokens']['injection_char']),
        )
        chat = [{'role': 'user', 'content': content}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        at = ids.index(marker['injection_token_id'])
        assert ids == [*lens.decoder.left_ids, ids[at], *lens.decoder.right_ids]
        assert [marker[f'injection_{x}_neighbor_id'] for x in ('left', 'right')] == [ids[at - 1], ids[at + 1]]
        filled = tokenizer(ar['prompt_templates']['ar'].format(explanation=' {Lena}'))['input_ids']
        words = tokenizer(' {Lena}', add_special_tokens=False)['input_ids']
        assert filled == [*lens.encoder.left_ids, *words, *lens.encoder.right_ids]
        card = (root / form / 'README.md').read_text()
        assert importlib.resources.files('lens').joinpath('card_nla.py').read_text() in card


def models_are_those_of(again, lens, run):
    """The whole models and the head of a lens that was opened again, against the one that was written."""
    np.testing.assert_array_equal(again.params.encoder.readout_w[...], lens.encoder.readout_w[...])
    for side, n in (('decoder', 3), ('encoder', 2)):
        with jax.set_mesh(run.mesh):
            want = lens_folder.model(lens, run.base, side).truncated(n)
        got = getattr(again.params, side).base.truncated(n)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(got), jax.tree.leaves(want))


@pytest.mark.parametrize('form', writing.LAYOUTS)
def test_what_others_can_read_comes_back_as_it_was(marked, form):
    root, run, lens, _ = marked
    again = reopen.open_lens(root / form)
    assert again.run.texts == run.texts and again.run.length == run.length and again.run.layer == run.layer
    assert again.params.decoder.config == lens.decoder.config and again.params.encoder.config == lens.encoder.config
    if form == 'peft':
        jax.tree.map(np.testing.assert_array_equal, again.params, lens)
    else:
        models_are_those_of(again, lens, run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('train', 'injection', 'dtype'),
    [
        ('full', 'replace', 'float32'),
        ('full', 'add', 'float32'),
        ('lora', 'add', 'float32'),
        ('full', 'replace', 'bfloat16'),
    ],
)
def test_every_kind_of_lens_is_verified_and_comes_back(world, tmp_path, train, injection, dtype):
    """Written only where PyTorch says the same; bfloat16: of the models as they are written."""
    norm = MARKED['decoder__norm'] * (injection == 'replace')
    more = {'decoder__injection': injection, 'decoder__norm': norm, 'subject__dtype': dtype}
    cfg, rng = config(world, train, **MARKED | more), np.random.default_rng(4)
    run, abstract = abstract_lens(cfg)

    def leaf(x):
        return sharding.put((0.3 * rng.standard_normal(x.shape)).astype(x.dtype), x.sharding)

    lens = jax.tree.map(leaf, abstract)
    with jax.set_mesh(run.mesh):
        held = verify.hold(lens, run)
        export.write_folder(tmp_path / 'nla', lens, run, json.loads(cfg.to_json()), 2, {}, form='nla', held=held)
    again = reopen.open_lens(tmp_path / 'nla')
    assert again.run.texts == run.texts and again.params.decoder.config == lens.decoder.config
    models_are_those_of(again, lens, run)


def test_verifying_finds_what_is_wrong(marked, tmp_path):
    root, _, _, held = marked
    shutil.copytree(root / 'nla', tmp_path / 'nla')
    head = load_file(root / 'nla/ar/value_head.safetensors')['weight']
    tensor_files.write(tmp_path / 'nla/ar/value_head.safetensors', {'weight': np.ascontiguousarray(head.T)})
    with pytest.raises(
        LensError, match=r'a reconstruction is off by 1.* of its norm in PyTorch.*: nothing is written\.$'
    ):
        verify.verify(tmp_path / 'nla', 'nla', held)
    sidecar = tmp_path / 'nla/av/nla_meta.yaml'
    sidecar.write_text(sidecar.read_text().replace('injection_scale: 5.0', 'injection_scale: 0.5'))
    with pytest.raises(LensError, match=r'\d+ of 48 most probable texts are others in PyTorch: nothing is written'):
        verify.verify(tmp_path / 'nla', 'nla', held)
    with pytest.raises(LensError, match='--format=lens writes none'):
        verify.check_possible('lens')


@pytest.mark.parametrize(
    ('form', 'change', 'message'),
    [
        ('nla', {'decoder__injection': 'affine'}, 'needs decoder.injection=replace or add, and this lens is another'),
        ('nla', {'encoder__readout': 'affine'}, 'needs encoder.readout=linear or none, a head without bias'),
        ('nla', {'encoder__context_tokens': 2}, 'needs encoder.context_tokens=0'),
        ('nla', {'encoder__output_layer': 2}, 'needs encoder.output_layer to be layer'),
        ('peft', {'encoder__train': 'maps'}, 'needs encoder.train=lora'),
        (
            'nla',
            {'decoder__prompt': '<|bos|>The<embed>:'},
            'is not what the chat template of the subject makes of one user',
        ),
        ('nla', {'encoder__prompt': 'The<text>:'}, "encoder.prompt='The<text>:': readers of the format begin it with"),
    ],
)
def test_what_the_formats_of_others_have_no_place_for_is_refused(world, form, change, message):
    cfg = config(world, 'lora', **MARKED | change)
    run, lens = abstract_lens(cfg)
    subject = writing.Subject('subject', '', 'abc')
    with pytest.raises(LensError, match=re.escape(message)) as e:
        writing.check(form, lens, run.base.config)
        writing.sidecars(lens, run, json.loads(cfg.to_json()), subject, 2)
    assert '\n' not in str(e.value)
