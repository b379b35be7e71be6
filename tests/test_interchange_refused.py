"""Lenses of others that are damaged: refused in one sentence, before a model is loaded."""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch
import yaml

import lens
from lens import hf
from lens.errors import LensError
from lens.tools import plan
from tests import foreign
from tests.foreign import LAYER, MARKER, beside, write_sidecar
from tests.test_interchange import asked


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """subject/ with its tokenizer, pair/av and pair/ar, whole models."""
    return foreign.write_pair(tmp_path_factory.mktemp('foreign'))


@pytest.fixture
def pair(root, tmp_path):
    """A copy of pair/ to change."""
    return shutil.copytree(root / 'pair', tmp_path / 'pair')


def edit(role, /, **changes):
    return lambda d: write_sidecar(d / role, beside(role, **changes))


def json_edit(name, **changes):
    def change(d):
        content = json.loads((d / name).read_text())
        (d / name).write_text(json.dumps(content | changes))

    return change


def head(**tensors):
    return lambda d: safetensors.torch.save_file(tensors, d / 'ar/value_head.safetensors')


def remove(name):
    return lambda d: shutil.rmtree(d / name) if (d / name).is_dir() else (d / name).unlink()


def put(name, content):
    def change(d):
        (d / name).parent.mkdir(exist_ok=True)
        (d / name).write_text(content)

    return change


def without(name, tensor):
    def change(d):
        tensors = safetensors.torch.load_file(d / name / 'model.safetensors')
        del tensors[tensor]
        safetensors.torch.save_file(tensors, d / name / 'model.safetensors', {'format': 'pt'})

    return change


def peft(**config):
    def change(d):
        shutil.rmtree(d / 'av')
        factors = {
            'model.layers.0.self_attn.q_proj.lora_A': torch.ones(2, 48),
            'model.layers.0.self_attn.q_proj.lora_B': torch.ones(48, 2),
        }
        foreign.write_peft(d / 'av', factors | config.pop('factors', {}), **{'r': 2, 'lora_alpha': 4} | config)
        write_sidecar(d / 'av', beside('av', injection={'family': 'add'}))

    return change


def more(name, text):
    def change(d):
        with (d / name).open('a') as f:
            f.write(text)

    return change


def link(name, to):
    return lambda d: (remove(name)(d), (d / name).symlink_to(to))


def ar_lora(**meta):
    def change(d):
        shutil.rmtree(d / 'ar')
        (d / 'ar').mkdir()
        about = {'ar_num_layers': LAYER + 1, 'lora_r': 2, 'lora_alpha': 4, 'final_norm_stripped': True}
        (d / 'ar/ar_meta.json').write_text(json.dumps(about | meta))
        at = 'backbone.model.layers.0.self_attn.q_proj'
        stored = {f'{at}.lora_A.weight': torch.ones(2, 48), f'{at}.lora_B.weight': torch.ones(48, 2)}
        stored |= {'value_head.weight': EYE}
        safetensors.torch.save_file(stored, d / 'ar/ar_lora_value_head.safetensors')
        write_sidecar(d / 'ar', beside('ar'))

    return change


EYE = torch.eye(48)
GROWS = ('a', *(f'b{i}' for i in range(99)))  # each is twice the one before
BROKEN = {
    'no sidecar': (remove('av/nla_meta.yaml'), r'av/nla_meta.yaml does not exist: put the sidecar'),
    'no YAML': (put('av/nla_meta.yaml', '{a: ['), r'av/nla_meta.yaml is not valid YAML'),
    'a list': (put('av/nla_meta.yaml', '- 1'), r'av/nla_meta.yaml: kind=None is not one of'),
    'YAML that makes objects': (put('av/nla_meta.yaml', '!!python/object/apply:os.getcwd []'), r'is not valid YAML'),
    'YAML that grows': (
        put('av/nla_meta.yaml', 'a: &a [x]\n' + ''.join(f'b{i}: &b{i} [*{x}, *{x}]\n' for i, x in enumerate(GROWS))),
        r'av/nla_meta.yaml holds more than 131072 values',
    ),
    'a key twice': (
        more('av/nla_meta.yaml', 'd_model: 48\n'),
        r'av/nla_meta.yaml is not valid YAML \(line \d+: the key d_model stands twice\): mend it',
    ),
    'a key that merges': (
        more('av/nla_meta.yaml', 'a: &a {b: 1}\nc: {<<: [*a, *a]}\n'),
        r'\(line \d+: the key << is not read here\)',
    ),
    'a number of base 60': (
        more('av/nla_meta.yaml', 'a: 1' + ':1' * 400_000),
        r'\(line \d+: a number of 800001 digits\)',
    ),
    'a pipe': (
        lambda d: (remove('av/nla_meta.yaml')(d), os.mkfifo(d / 'av/nla_meta.yaml')),
        r'av/nla_meta.yaml is no file: put the sidecar there',
    ),
    'a device': (link('av/nla_meta.yaml', '/dev/zero'), r'av/nla_meta.yaml is no file: put the sidecar'),
    'a link to itself': (link('ar', 'ar'), r'pair/ar is no folder: put the directory of a model there, or remove it'),
    'a file for a folder': (
        lambda d: (remove('ar')(d), (d / 'ar').touch()),
        r'pair/ar is no folder: put the directory',
    ),
    'length of a response': (
        edit('av', response={'explanation_len': 10**12}),
        r'pair/av: explanation_len=1000000000000 must be at most',
    ),
    'kind': (edit('av', kind='nla_movie'), r"kind='nla_movie' is not one of nla_model, nla_dataset"),
    'role': (edit('av', role='reader'), r"role='reader' is not one of av"),
    'the other role': (
        edit('ar', role='av'),
        r'is of the role of a decoder, and lies in the place of the encoder: exchange',
    ),
    'width': (
        edit('ar', d_model=64),
        r'ar/nla_meta.yaml: d_model=64, the model beside it has hidden states of 48: give',
    ),
    'width of text': (edit('av', d_model='wide'), r"d_model='wide' must be a whole number"),
    'scale': (
        edit('av', extraction__injection_scale='big'),
        r"extraction.injection_scale='big' must be a number, null",
    ),
    'scale of nothing': (edit('av', extraction__injection_scale=0), r'extraction.injection_scale=0 must be at least'),
    'no scale': (
        edit('av', extraction__injection_scale=None),
        r'gives no number as extraction.injection_scale: add the norm',
    ),
    'whitened': (edit('av', extraction__norm='whitened_zca_v1'), r"extraction.norm='whitened_zca_v1': only"),
    'marker of two tokens': (
        edit('av', tokens__injection_char='ab'),
        r"the marker 'ab' has the id 259, in the tokenizer",
    ),
    'marker of another id': (
        edit('av', tokens__injection_token_id=7),
        r'the marker .* has the id 7, in the tokenizer it',
    ),
    'left': (
        edit('av', tokens__injection_left_neighbor_id=7),
        r'the marker stands between the ids 7 and \d+, the tokeni',
    ),
    'right': (
        edit('ar', tokens__injection_right_neighbor_id=7),
        r'ar/nla_meta.yaml: the marker stands between the ids',
    ),
    'two markers': (
        edit('av', prompt_templates__av='{injection_char}a' + MARKER),
        r'the marker 2 times inside, it must',
    ),
    'no slot': (edit('av', prompt_templates__av='no slot'), r'must hold \{injection_char\} once and no other field'),
    'a field that looks inside': (
        edit('av', prompt_templates__av='{injection_char.__class__}'),
        r'prompt_templates\.av\|actor\|verbalizer must hold',
    ),
    'a brace': (
        edit('ar', prompt_templates__ar='{explanation} {'),
        r'prompt_templates.* has a brace alone .*\{\{ and \}\}.*: mend the template',
    ),
    'no template': (
        edit('ar', prompt_templates__ar=None),
        r'ar/nla_meta.yaml has no prompt_templates.ar: add the text',
    ),
    'suffix': (edit('ar', tokens__critic_suffix_ids=[1, 2]), r'tokens.critic_suffix_ids=\[1, 2\], the tokenizer ends'),
    'injection': (edit('av', injection={'family': 'multiply'}), r'injection=.*multiply.* is not supported: '),
    'layers that disagree': (edit('ar', critic={'num_hidden_layers': 3}), r'=3 disagree on the layer'),
    'layer': (
        edit('av', extraction_layer_index=0),
        r'The layer that the lens reads is told differently \(.*av.*: 0, .*: 1',
    ),
    'blocks': (
        json_edit('ar/config.json', num_hidden_layers=3, layer_types=None),
        r'\(its 3 blocks\): 2\): correct the one',
    ),
    'another model': (
        json_edit('av/config.json', rms_norm_eps=0.5),
        r'av/config.json differs .* in norm_eps: give the',
    ),
    'no head': (remove('ar/value_head.safetensors'), r'ar/value_head.safetensors does not exist: the directory needs'),
    'head that is no square': (
        head(weight=torch.ones(48, 40)),
        r'must hold weight \(48, 48\), perhaps bias \(48,\), and',
    ),
    'head of another name': (head(kernel=EYE), r'must hold weight .* and holds kernel'),
    'a pointer': (
        put('ar/value_head.safetensors', 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'),
        r'value_head.safetensors cannot be read \(it is a pointer of Git LFS, in whose place `git lfs pull` puts',
    ),
    'NaN': (head(weight=EYE * float('nan')), r'value_head.safetensors: weight holds values that are not finite'),
    'a tensor': (without('ar', 'model.layers.1.mlp.up_proj.weight'), r'ar lacks model.layers.1.mlp.up_proj.weight'),
    'half a decoder': (without('av', 'lm_head.weight'), r'av lacks lm_head.weight'),
    'no decoder': (remove('av'), r'pair has no folder av, actor or decoder: give the decoder'),
    'two sidecars': (
        put('nla_meta.yaml', yaml.safe_dump(beside('av', prompt_templates__av='x{injection_char}y'))),
        r'differ in ',
    ),
    'DoRA': (peft(use_dora=True), r'av/adapter_config.json: use_dora=True is not supported: merge the adapter'),
    'another adapter': (peft(peft_type='IA3'), r"peft_type='IA3' is not supported"),
    'a scale that is no': (peft(use_rslora='no'), r"adapter_config.json: use_rslora='no' must be true or false"),
    'a module that is not stored': (
        peft(target_modules=['q_proj', 'k_proj']),
        r'adapter_config.json says target_modules k_proj, of which no adapter is stored: download',
    ),
    'pickled adapters': (
        lambda d: (peft()(d), (d / 'av/adapter_model.safetensors').rename(d / 'av/adapter_model.bin')),
        r'av/adapter_model.safetensors does not exist, and adapter_model.bin is of a format that is not read',
    ),
    'a norm that is no': (ar_lora(final_norm_stripped='false'), r"ar_meta.json: final_norm_stripped='false' must be"),
    'blocks below nothing': (ar_lora(ar_num_layers=-1), r'ar_meta.json: ar_num_layers=-1 must be at least 1'),
    'rank': (peft(r=3), r'adapter_config.json says rank 3, and adapter A of q in block 0 has shape \(2, 48\)'),
    'an adapted head': (
        peft(factors={'lm_head.lora_A': EYE[:2]}),
        r'holds base_model.model.lm_head.lora_A.weight, which',
    ),
    'half an adapter': (
        peft(factors={'model.layers.1.self_attn.q_proj.lora_A': torch.ones(2, 48)}),
        r'adapter A of q in block 1 has no other factor',
    ),
    'a block too many': (
        peft(
            factors={
                'model.layers.4.self_attn.q_proj.lora_A': torch.ones(2, 48),
                'model.layers.4.self_attn.q_proj.lora_B': torch.ones(48, 2),
            }
        ),
        r'adapter . of q in block 4 has shape .*, the subject has no such matrix',
    ),
}


@pytest.mark.parametrize('case', BROKEN)
def test_broken(root, pair, case, monkeypatch):
    """One sentence, and no model is loaded."""
    monkeypatch.setattr(hf, 'load_model', None)
    change, message = BROKEN[case]
    change(pair)
    with pytest.raises(LensError, match=message) as e:
        lens.load(pair, subject=str(root / 'subject'))
    said = str(e.value)
    assert said.endswith('.') and '\n' not in said and not said.count('. ') and str(pair) in said


def test_a_plan_refuses_what_the_run_would(root, pair, monkeypatch):
    monkeypatch.setattr(plan, 'pretend_devices', lambda cfg, target: None)
    file = pair / 'ar/model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LensError, match=r'ar/model.safetensors cannot be read'):
        plan.run(asked(root, pair, phases=('sft',), mesh__data=1), 'cpu', compiling=None)


def test_rows_of_a_data_set_are_no_lens(root, pair):
    with pytest.raises(LensError, match=r'rows of a data set cannot be picked here: give the directory of a lens'):
        lens.load(f'{pair}@[0:10]', subject=str(root / 'subject'))


def test_a_truncated_encoder_is_no_subject(root):
    with pytest.raises(LensError, match=r'ar lacks lm_head.weight'):
        hf.load_model(root / 'pair/ar', head=True)
    model = hf.load_model(root / 'pair/ar')
    assert model.head is None and model.final_norm is None and model.config.n_layers == LAYER + 1
