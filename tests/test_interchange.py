"""Lenses of others: opened and continued with the numbers that PyTorch has. The directories are made by tests/foreign.py,
without code of lens."""

import json
import os
import shutil
import types

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

import lens
from configs import base as defaults
from lens import hf, reopen, sharding
from lens.errors import LensError
from lens.interchange import directories, reading, sidecar
from lens.models.decoder import prefill
from lens.models.encoder import encode
from lens.train import train
from tests import foreign, hf_models
from tests.compare import close
from tests.foreign import AR, BLOCKS, BOS, LAYER, MARKER, PROMPT, SCALE, beside, ids, write_sidecar

TEXTS = ('A recipe for bread.', 'x')
SUFFIX = ids('</text> <summary>')[1:]
first_logits = jax.jit(lambda decoder, base, a: prefill(decoder, base, a)[0])
reconstructions = jax.jit(encode)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """subject/ with its tokenizer, pair/av and pair/ar, whole models."""
    return foreign.write_pair(tmp_path_factory.mktemp('foreign'))


@pytest.fixture
def pair(root, tmp_path):
    """A copy of pair/ to change."""
    return shutil.copytree(root / 'pair', tmp_path / 'pair')


def asked(root, folder, **changes):
    """The configuration of a run that starts from a folder and says no more than `changes`."""
    cfg = defaults.get_config()
    cfg.subject.path, cfg.init_from = str(root / 'subject'), str(folder)
    cfg.update_from_flattened_dict({k.replace('__', '.'): x for k, x in changes.items()})
    return cfg


def configured(root, folder, **changes):
    cfg = asked(root, folder, **changes)
    return reading.configured(cfg, cfg)


def opened(root, folder, question=''):
    """What a folder computes: logits(vector) after the prompt, rebuilt(text); its run and configuration."""
    found = reopen.open_lens(folder, question=question, subject_path=str(root / 'subject'))
    run, made = found.run, found.params

    def call(program, side, rows):
        with jax.set_mesh(run.mesh):
            return np.asarray(program(side, run.base, sharding.put_batch({'x': rows}, run.mesh)['x']))[0]

    def rebuilt(text):
        row = run.tokenizer(text, add_special_tokens=False)['input_ids']
        return call(reconstructions, made.encoder, np.asarray([row]))

    def logits(vector):
        return call(first_logits, made.decoder, vector[None])

    return types.SimpleNamespace(logits=logits, rebuilt=rebuilt, run=run, config=found.config)


def read_text(text: str, bos: bool = True) -> list[int]:
    """What a reconstructor reads, by hand."""
    return ids((BOS if bos else '') + AR.format(explanation=text))


# ---- what is read is what PyTorch computes ----


@pytest.mark.slow
def test_whole_models(root):
    """A verbalizer and a reconstructor as kitft releases them, found side by side by their names."""
    for role in ('av', 'ar'):
        os.symlink(root / 'pair' / role, root / f'nla-x-L1-{role}')
    decoder = hf_models.load(root / 'pair/av')
    rebuild = foreign.encoder(root / 'again', 2)
    reader = lens.load(root / 'nla-x-L1-av', subject=str(root / 'subject'))
    close(reader.reconstruct(TEXTS), np.stack([rebuild(read_text(t)) for t in TEXTS]))
    v, prompt = foreign.vectors(2), ids(PROMPT)
    rows = reader.describe(v, salience=False).rows
    said = [[w.id for w in row.explanations[0].words][:12] for row in rows]
    assert said == [foreign.said(decoder, prompt, prompt.index(259), x, 12) for x in v]
    assert said[0] != said[1], 'the text must depend on the vector'
    assert (reader.layer, reader.run.error, reader.length) == (LAYER, 'direction', 150)


def test_head_with_a_bias(root, pair):
    shutil.rmtree(pair / 'ar')
    rebuild = foreign.encoder(pair / 'ar', 2, bias=True)
    write_sidecar(pair / 'ar', beside('ar'))
    here = opened(root, pair)
    close(here.rebuilt(TEXTS[0]), rebuild(read_text(TEXTS[0])))
    assert here.config['encoder']['readout'] == 'affine'


@pytest.mark.parametrize('stripped', [True, None])
def test_adapters(root, tmp_path, stripped):
    """As EasyNLA saves them: of PEFT on the decoder, with a head of its own on the encoder, the sidecar that of the data;
    other matrices and ranks on the two sides. stripped: None as in old files, whose final norm stands before the head."""
    dataset = beside('', kind='nla_dataset', role=None, d_model=None, extraction={'d_model': 48, 'layer_index': LAYER})
    dataset |= {'injection': sidecar.FAMILIES['add']}
    decoder, encoder = (hf_models.load(root / 'subject') for _ in range(2))
    factors = foreign.adapters(decoder, 3, 5, ('q_proj', 'o_proj', 'down_proj'), BLOCKS, 8 / 3**0.5)
    foreign.write_peft(tmp_path / 'av', factors, r=3, lora_alpha=8, use_rslora=True)
    factors = foreign.adapters(encoder, 2, 6, ('q_proj', 'v_proj'), LAYER + 1, 8 / 2**0.5)
    head = 0.3 * torch.randn(48, 48, generator=torch.Generator().manual_seed(7))
    stored = {f'backbone.{k}.default.weight': x for k, x in factors.items()} | {'value_head.weight': head}
    (tmp_path / 'ar').mkdir()
    safetensors.torch.save_file(stored, tmp_path / 'ar/ar_lora_value_head.safetensors')
    about = {'ar_num_layers': LAYER + 1, 'lora_r': 2, 'lora_alpha': 8, 'quant': 'none'}
    about |= {} if stripped is None else {'final_norm_stripped': stripped}
    (tmp_path / 'ar/ar_meta.json').write_text(json.dumps(about))
    write_sidecar(tmp_path, dataset)

    here, v, prompt = opened(root, tmp_path), foreign.vectors(1)[0], ids(PROMPT + '-')  # told not to think
    close(here.logits(v), foreign.logits(decoder, prompt, prompt.index(259), v, 'add'))
    stream = torch.tensor(hf_models.forward(encoder, [read_text(TEXTS[0], bos=False)])[1][LAYER + 1][0, -1])
    with torch.no_grad():
        want = head @ (stream if stripped else encoder.model.norm(stream))
    got = here.rebuilt(TEXTS[0])
    assert here.config['lora']['rank'] == 3 and here.config['lora']['pattern'] == 'q|v|o|down'
    close(got / np.linalg.norm(got), (want / want.norm()).numpy())


def test_an_oracle(root, tmp_path):
    """Adapters alone: the subject reads the words back."""
    decoder = hf_models.load(root / 'subject')
    factors = foreign.adapters(decoder, 3, 5, ('q_proj',), BLOCKS, 8 / 3)
    foreign.write_peft(tmp_path, factors, r=3, lora_alpha=8, base_model_name_or_path='somebody/a-model')
    (tmp_path / 'ao_config.json').write_text('{}')
    here, v = opened(root, tmp_path), foreign.vectors(1)[0]
    prompt = ids(f'{BOS}<|u|>Layer: 2\n ? \n{reading.QUESTION}<|a|>-')
    close(here.logits(v), foreign.logits(decoder, prompt, prompt.index(260), v, 'add'))
    subject = hf_models.load(root / 'subject')
    close(here.rebuilt(TEXTS[0]), hf_models.forward(subject, [ids(TEXTS[0])])[1][3][0, -1])
    asked, several = opened(root, tmp_path, '<embed><embed> \nAre they alike?'), foreign.vectors(2)
    prompt = ids(f'{BOS}<|u|>Layer: 2\n ? ? \nAre they alike?<|a|>-')
    at = [i for i, x in enumerate(prompt) if x == 260]
    want = foreign.logits(decoder, prompt, at, several, 'add')
    close(asked.logits(several), want)
    swapped = foreign.logits(decoder, prompt, at, several[::-1].copy(), 'add')
    assert np.abs(want - swapped).max() > 1e-2
    with pytest.raises(LensError, match=r'pair/av is no activation oracle, so it has one prompt: leave the question'):
        reopen.open_lens(root / 'pair', question='Why?', subject_path=str(root / 'subject'))


# ---- what a sidecar says ----


def parsed(tmp_path, content):
    write_sidecar(tmp_path, content)
    return sidecar.parse(tmp_path / 'nla_meta.yaml')


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({}, {'role': 'decoder', 'layer': LAYER, 'injection_scale': SCALE, 'suffix': tuple(SUFFIX), 'family': ''}),
        ({'role': 'actor', 'prompt_templates': {'actor': 'a', 'critic': 'b'}}, {'role': 'decoder'}),
        ({'prompt_templates': {'actor': 'a', 'av': ''}}, {'decoder_template': 'a', 'encoder_template': ''}),
        ({'prompt_templates': {'actor': 'a', 'av': 'c'}}, {'decoder_template': 'c'}),
        ({'prompt_templates': {'verbalizer': 'a', 'reconstructor': 'b'}}, {'encoder_template': 'b'}),
        ({'role': 'critic', 'extraction__injection_scale': None}, {'role': 'encoder', 'injection_scale': None}),
        ({'extraction__mse_scale': None}, {'mse_scale': 48**0.5}),
        ({'extraction': {'mse_scale': 'sqrt_d_model', 'injection_scale': '150.0'}}, {'mse_scale': 48**0.5}),
        ({'extraction': {'mse_scale': 'raw', 'injection_scale': 'none'}}, {'mse_scale': None, 'injection_scale': None}),
        ({'schema_version': 1, 'extraction_layer_index': None, 'critic': {'num_hidden_layers': 3}}, {'layer': 3}),
        ({'critic': {'extraction_layer_index': LAYER, 'num_hidden_layers': LAYER}}, {'layer': LAYER}),
        ({'ar': {'num_hidden_layers': 20}}, {'layer': LAYER}),  # of the documentation; nobody reads it
        ({'injection': {'family': 'add'}}, {'family': 'add'}),
        (
            {'injection': {'family': 'replace', 'layer': 'embedding', 'norm_rule': 'injection_scale'}},
            {'family': 'replace'},
        ),
        (
            {
                'kind': 'nla_dataset',
                'extraction': {'base_model': 'b', 'd_model': 32, 'layer_index': 5, 'norm': 'none'},
                'extraction_layer_index': None,
            },
            {'d_model': 32, 'layer': 5, 'base': 'b', 'kind': 'nla_dataset', 'mse_scale': 32**0.5},
        ),
    ],
)
def test_variants(tmp_path, changes, expected):
    found = parsed(tmp_path, beside('av', **changes))
    assert {k: getattr(found, k) for k in expected} == expected


@pytest.mark.parametrize(
    ('raw', 'value'),
    [(None, None), ('raw', None), ('none', None), ('sqrt_d_model', 59.86651818838306), (150, 150.0), ('150.0', 150.0)],
)
def test_scales(raw, value):
    """The values that kitft's own reader gives for d=3584."""
    assert sidecar.scale(raw, 3584, 'k') == value


def test_a_sidecar_comes_back_as_it_was_written(tmp_path):
    given = beside(
        'ar', stage='sl', my_own={'a': [1, None]}, critic={'extraction_layer_index': LAYER}, trained_on=['x']
    )
    found = parsed(tmp_path, given)
    again = found.written()
    assert again == given
    assert [k for k in again if k in given] == [k for k in [*again] if k in given]
    order = ['kind', 'schema_version', 'role', 'stage', 'base_checkpoint', 'd_model', 'extraction', 'tokens']
    assert [*again][: len(order) + 1] == [*order, 'prompt_templates']
    assert parsed(tmp_path, again) == found


@pytest.mark.parametrize(
    ('path', 'found'),
    [
        ('a/b.parquet', 'a/b.parquet.nla_meta.yaml'),
        ('a/b.parquet@[0:10]', 'a/b.parquet.nla_meta.yaml'),
        ('a/ckpt', 'a/ckpt/nla_meta.yaml'),
        ('there/qwen2.5', 'there/qwen2.5/nla_meta.yaml'),
        ('a/qwen2.5-7b', None),
        ('kitft/nla-qwen2.5-7b-L20-av', None),
    ],
)
def test_places(tmp_path, monkeypatch, path, found):
    (tmp_path / 'there/qwen2.5').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if found is None:
        with pytest.raises(LensError, match=r'is no directory and no .parquet file: download'):
            sidecar.place(path)
    else:
        assert str(sidecar.place(path)) == found


# ---- where a run starts from it ----


def test_a_configuration_that_leaves_it_to_the_lens(root):
    cfg = configured(root, root / 'pair', explanation_len=99, decoder__norm=3.0)
    assert (cfg.layer, cfg.decoder.injection, cfg.decoder.marker) == (LAYER, 'replace', MARKER)
    assert cfg.decoder.prompt == PROMPT.replace(MARKER, '<embed>')
    assert cfg.encoder.prompt == BOS + AR.format(explanation='<text>')
    assert (cfg.decoder.train, cfg.encoder.train, cfg.encoder.readout) == ('full', 'full', 'linear')
    assert (cfg.encoder.error, cfg.explanation_close) == ('direction', '\n</explanation>')
    assert (cfg.explanation_len, cfg.decoder.norm) == (99, 3.0), 'what a run says itself counts'
    with pytest.raises(
        LensError, match=r"init_from=.*: layer=2, the lens has 1, encoder.readout='none', .*: leave layer,"
    ):
        configured(root, root / 'pair', layer=2, encoder__readout='none')


def test_a_run_is_that_of_the_lens(root, tmp_path, monkeypatch):
    """Also as it is stored, so that it opens again where the lens is gone."""
    planned = []
    monkeypatch.setattr('lens.train.config.plan', lambda cfg: planned.append(cfg) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(asked(root, root / 'pair'), tmp_path / 'run')
    assert planned[0].decoder.marker == MARKER and planned[0].layer == LAYER
    with pytest.raises(LensError, match=r'layer=2, the lens has 1'):
        train(asked(root, root / 'pair', layer=2), tmp_path / 'run')


def test_the_family_may_be_told_by_the_configuration(root, pair):
    for role in ('av', 'ar'):
        write_sidecar(pair / role, beside('', kind='nla_dataset', role=None, d_model=None, extraction={'d_model': 48}))
    with pytest.raises(LensError, match=r'does not say how the activation enters: add `injection: \{family: …\}`'):
        configured(root, pair)
    cfg = configured(root, pair, decoder__injection='add')
    assert cfg.decoder.prompt.endswith('<|a|>-') and cfg.encoder.prompt.startswith('Of <text>')


def test_a_name_of_the_hub(root, monkeypatch):
    """The encoder of a published decoder has its name beside it."""
    asked_for = []

    def download(name, **how):
        asked_for.append(name)
        assert {'nla_meta.yaml', '*.safetensors', 'adapter_config.json', 'ar_meta.json'} <= {*how['allow_patterns']}
        return str(root / 'pair' / name[-2:])

    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    cfg = configured(root, 'kitft/nla-qwen2.5-7b-L20-av')
    assert cfg.encoder.readout == 'linear' and {*asked_for} == {f'kitft/nla-qwen2.5-7b-L20-{x}' for x in ('av', 'ar')}


def test_a_model_in_a_folder_of_its_trainer(root, pair):
    """As kitft saves a reconstructor in reinforcement learning: the model in hf/, the sidecar around it."""
    shutil.move(pair / 'ar', pair / 'model')
    (pair / 'ar').mkdir()
    shutil.move(pair / 'model', pair / 'ar/hf')
    shutil.move(pair / 'ar/hf/nla_meta.yaml', pair / 'ar/nla_meta.yaml')
    cfg = configured(root, pair)
    assert cfg.encoder.readout == 'linear' and cfg.layer == LAYER


def test_what_stands_beside_a_truncated_encoder_is_left_out(root, pair):
    """A norm of ones and a square head, as a preparation for another trainer adds them."""
    file = pair / 'ar/model.safetensors'
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(
        tensors | {'model.norm.weight': torch.ones(48), 'lm_head.weight': torch.eye(48)}, file, {'format': 'pt'}
    )
    assert hf.load_model(pair / 'ar', head=False).head is None
    assert directories.sides(pair)['encoder'].blocks == LAYER + 1
