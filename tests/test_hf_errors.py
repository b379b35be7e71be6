"""lens.hf: what it refuses to load, and that save and load lose nothing."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers
from flax import nnx

from lens import hf, sharding, tensor_files
from lens.errors import LensError
from lens.models.rope import Rope
from lens.models.transformer import Transformer, TransformerConfig
from tests import config_json

CONFIG = TransformerConfig(
    family='llama',
    vocab_size=29,
    d_model=12,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    d_ff=20,
    norm_eps=1e-5,
    tied=False,
    max_positions=40,
    ropes=(Rope(5000.0),),
)
K_PROJ = 'model.layers.1.self_attn.k_proj.weight'  # stored (12, 12); o_proj is (12, 24)
EMBEDDING = 'model.embed_tokens.weight'
O_PROJ = 'model.layers.1.self_attn.o_proj.weight'
WEIGHTS = 'model.safetensors'


def random_model(seed=0, config=CONFIG):
    """Random weights without running an initialiser, which would compile for seconds."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def save(model, directory, **more):
    hf.save_model(model, directory, config=config_json.llama(CONFIG), **more)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp('hf') / 'model'
    save(random_model(), directory)
    return directory


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model; tests damage it."""
    return shutil.copytree(saved, tmp_path / 'model')


def leaves(model):
    return {sharding.path(kp): np.asarray(x) for kp, x in jax.tree_util.tree_leaves_with_path(model)}


def assert_same_weights(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for k, x in a.items():
        np.testing.assert_array_equal(x, b[k], err_msg=k)


def tensors(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


def write(folder, weights):
    safetensors.numpy.save_file(weights, folder / WEIGHTS, metadata={'format': 'pt'})


def shard(folder, extra_index=None):
    """The single file as two files and an index, written by hand."""
    weights, names = tensors(folder), sorted(tensors(folder))
    files = {n: f'model-0000{1 + (i % 2)}-of-00002.safetensors' for i, n in enumerate(names)}
    for file in set(files.values()):
        safetensors.numpy.save_file({n: weights[n] for n in names if files[n] == file}, folder / file)
    index = {'metadata': {'total_size': 0}, 'weight_map': files | (extra_index or {})}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()
    return files


def refused(folder, *needles):
    with pytest.raises(LensError) as error:
        hf.load_model(folder)
    text = str(error.value)
    assert text.endswith('.') and '\n' not in text, text
    assert [n for n in needles if n not in text] == [], text


def edit_config(folder, **values):
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    for k, v in values.items():
        config.pop(k, None)
        if v is not None:
            config[k] = v
    path.write_text(json.dumps(config))


# ---- directory and config.json ----


def test_missing_directory(tmp_path):
    refused(tmp_path / 'nowhere', f'{tmp_path}/nowhere does not exist')


def test_directory_that_is_no_model(tmp_path):
    refused(tmp_path, f'{tmp_path}/config.json does not exist')


@pytest.mark.parametrize('name', ['a\0b', '', 'x/' * 3000, '\x1b[2J\u202e', 'a' * 3000])
def test_paths_that_are_none(name):
    with pytest.raises(LensError) as error:
        hf.load_model(name)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize('name', ['gtp2', 'nobody/no-such-model'])
def test_hub_id_without_a_hub(name):
    """HF_HUB_OFFLINE is set in tests."""
    refused(name, name, 'Hub', 'local directory')


def test_missing_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, f'{folder}/{WEIGHTS} does not exist')


@pytest.mark.parametrize('content', [b'', b'{', b'{"model_type": "llama"', b'hello', b'\xff\xfe\x00'])
def test_bad_json(folder, content):
    (folder / 'config.json').write_bytes(content)
    refused(folder, f'{folder}/config.json is not valid JSON')


@pytest.mark.parametrize('content', ['[]', '"llama"', 'null'])
def test_json_that_is_no_object(folder, content):
    (folder / 'config.json').write_text(content)
    refused(folder, f'{folder}/config.json')


@pytest.mark.parametrize(
    'key', ['hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size', 'vocab_size']
)
def test_missing_key(folder, key):
    edit_config(folder, **{key: None})
    refused(folder, f'{folder}/config.json', key)


@pytest.mark.parametrize('model_type', ['mamba', 'bert', 'Llama', '', None])
def test_unsupported_model_type(folder, model_type):
    edit_config(folder, model_type=model_type)
    refused(folder, f'{folder}/config.json', repr(model_type), 'llama')


@pytest.mark.parametrize('key', ['rope_parameters', 'rope_scaling'])
@pytest.mark.parametrize('name', ['rope_type', 'type'])
def test_unsupported_rope_type(folder, key, name):
    edit_config(folder, rope_parameters=None, **{key: {name: 'banana', 'factor': 4.0}} if key == 'rope_scaling' else {})
    if key == 'rope_parameters':
        edit_config(folder, rope_parameters={name: 'banana', 'rope_theta': 1e4})
    refused(folder, f'{folder}/config.json', "'banana'")


def test_a_second_rotary_table_is_not_passed_over(folder):
    """transformers takes rope_scaling, which users add by hand, where a file has rope_parameters too."""
    yarn = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
    edit_config(folder, rope_parameters={'rope_type': 'default', 'rope_theta': 1e4}, rope_scaling=yarn, rope_theta=1e4)
    refused(folder, f'{folder}/config.json', 'rope_parameters and rope_scaling differ')
    edit_config(folder, rope_parameters=yarn | {'rope_theta': 1e4})
    assert hf.read_config(folder).ropes[0].kind == 'yarn'


@pytest.mark.parametrize(
    'changed', [{'hidden_act': 'relu'}, {'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5}}]
)
def test_features_that_would_be_computed_wrongly(folder, changed):
    edit_config(folder, **changed)
    refused(folder, f'{folder}/config.json', 'is not supported')


@pytest.mark.parametrize(('key', 'tensor'), [('attention_bias', 'k_proj.bias'), ('mlp_bias', 'down_proj.bias')])
def test_biases_that_the_config_promises(folder, key, tensor):
    edit_config(folder, **{key: True})
    refused(folder, str(folder), f'lacks model.layers.0.{"self_attn" if "k_" in tensor else "mlp"}.{tensor}')


# ---- tensors ----


@pytest.mark.parametrize('name', [K_PROJ, 'model.norm.weight', 'lm_head.weight'])
def test_missing_tensor(folder, name):
    weights = tensors(folder)
    del weights[name]
    write(folder, weights)
    refused(folder, str(folder), f'lacks {name}', '1 tensors missing')


@pytest.mark.parametrize(
    'name', ['model.layers.3.input_layernorm.weight', 'model.layers.0.self_attn.q_proj.bias', 'visual.x']
)
def test_extra_tensor(folder, name):
    write(folder, tensors(folder) | {name: np.zeros(3, np.float32)})
    refused(folder, str(folder), name, '1 extra')


def test_tied_config_with_a_head_of_its_own(folder):
    edit_config(folder, tie_word_embeddings=True)
    refused(folder, 'lm_head.weight')
    weights = tensors(folder)
    write(folder, weights | {'lm_head.weight': weights['model.embed_tokens.weight']})  # the same table twice is one
    assert hf.load_model(folder).head is None


@pytest.mark.parametrize('wrong', [lambda x: x.T, lambda x: x[:-1], lambda x: x.ravel(), lambda x: x[None]])
def test_misshapen_tensor(folder, wrong):
    weights = tensors(folder)
    weights[O_PROJ] = np.ascontiguousarray(wrong(weights[O_PROJ]))
    write(folder, weights)
    refused(folder, f'{folder}/{WEIGHTS}', O_PROJ, str(weights[O_PROJ].shape), '(12, 24)')


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_tensor_that_is_not_finite(folder, bad):
    weights = tensors(folder)
    weights[K_PROJ][3, 1] = bad
    write(folder, weights)
    refused(folder, f'{folder}/{WEIGHTS}', K_PROJ, 'not finite')


@pytest.mark.parametrize('keep', [0, 5, 200, -1])
def test_truncated_file(folder, keep):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, f'{path} cannot be read')


def test_a_pickle_is_no_weights(folder):
    """Only safetensors counts: the file with the executable format is not even looked at."""
    (folder / WEIGHTS).rename(folder / 'pytorch_model.bin')
    refused(folder, f'{folder}/{WEIGHTS} does not exist', 'pytorch_model.bin', 'may run code', 'to safetensors with')


@pytest.mark.parametrize('dtype', ['float8_e4m3fn', 'float8_e5m2', 'int8', 'uint8', 'bool', 'int32', 'complex64'])
@pytest.mark.parametrize('name', [K_PROJ, 'lm_head.weight'])
def test_weights_that_are_no_floats(folder, dtype, name, monkeypatch):
    monkeypatch.setattr(hf, '_load_leaf', lambda *_: pytest.fail('it reads weights before it has checked all of them'))
    edit_config(folder, tie_word_embeddings=name == 'lm_head.weight')
    weights = tensors(folder)
    write(folder, weights | {name: weights[name].astype(ml_dtypes.finfo(dtype).dtype if 'float8' in dtype else dtype)})
    refused(folder, f'{folder}/{WEIGHTS}: {name} has dtype ', 'weights in bfloat16')


@pytest.mark.parametrize('suffix', ['qweight', 'scales', 'weight_scale_inv', 'weight_packed', 'SCB', 'weight.absmax'])
def test_quantised_weights_that_the_config_does_not_tell_of(folder, suffix):
    name = f'model.layers.0.mlp.up_proj.{suffix}'
    write(folder, tensors(folder) | {name: np.zeros(3, np.float32)})
    refused(folder, f'{folder}/{WEIGHTS} holds {name}, of quantised weights: give a copy')


def test_header_that_lies_or_pipe_in_place_of_weights(folder):
    path, weights = folder / WEIGHTS, (folder / WEIGHTS).read_bytes()
    for lie in (2**62, 10**8 - 1):
        path.write_bytes(lie.to_bytes(8, 'little') + weights[8:])
        refused(folder, f'{path} cannot be read')
    path.unlink()
    os.mkfifo(path)
    refused(folder, f'{path} cannot be read', 'no file')


def test_a_tied_table_that_is_stored_as_the_head_alone(folder):
    edit_config(folder, tie_word_embeddings=True)
    weights = tensors(folder)
    head = weights.pop(EMBEDDING)
    refused(folder, 'lm_head.weight')
    write(folder, weights | {'lm_head.weight': head})
    model = hf.load_model(folder)
    assert model.head is None
    np.testing.assert_array_equal(model.embedding[...], head)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    np.testing.assert_array_equal(theirs.get_input_embeddings().weight.detach(), head)
    edit_config(folder, tie_word_embeddings=False)
    refused(folder, f'lacks {EMBEDDING}')


# ---- sharded ----


def test_sharded_model_loads_the_same(saved, folder):
    shard(folder)
    assert_same_weights(hf.load_model(folder), hf.load_model(saved))


def test_missing_shard(folder):
    file = shard(folder)[K_PROJ]
    (folder / file).unlink()
    refused(folder, f'{folder}/{file}')


def test_truncated_shard(folder):
    file = shard(folder)[K_PROJ]
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    refused(folder, f'{folder}/{file} cannot be read')


def test_index_that_names_the_wrong_shard(folder):
    other = next(f for f in shard(folder).values() if f != shard_of(folder, K_PROJ))
    edit_index(folder, K_PROJ, other)
    refused(folder, f'{folder}/{other}', K_PROJ)


def shard_of(folder, name):
    return json.loads((folder / 'model.safetensors.index.json').read_text())['weight_map'][name]


def edit_index(folder, name, file):
    path = folder / 'model.safetensors.index.json'
    index = json.loads(path.read_text())
    index['weight_map'][name] = file
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    'file', ['../x.safetensors', '/etc/passwd', 'a/../../x', '', '.', '..', 3, None, ['a'], 'a\0b']
)
def test_index_that_names_what_is_no_file_of_the_folder(folder, file):
    shard(folder)
    (folder.parent / 'x.safetensors').write_bytes((folder / shard_of(folder, K_PROJ)).read_bytes())
    edit_index(folder, K_PROJ, file)
    refused(folder, f'{folder}/model.safetensors.index.json names {file!r}', 'no file of the directory')


def test_shards_that_are_links_as_in_the_cache_of_the_hub(saved, folder):
    (folder.parent / 'blobs').mkdir()
    for n, file in enumerate(set(shard(folder).values())):
        (folder / file).rename(folder.parent / f'blobs/{n}')
        (folder / file).symlink_to(f'../blobs/{n}')
    assert_same_weights(hf.load_model(folder), hf.load_model(saved))


def test_stale_index_beside_a_single_file(saved, folder, capsys):
    """As transformers: the single file is the model."""
    shard(folder)
    for path in folder.glob('model-*'):
        path.unlink()
    shutil.copy(saved / WEIGHTS, folder)
    assert_same_weights(hf.load_model(folder), hf.load_model(saved))
    said = capsys.readouterr().out
    assert said == f'{folder}/{WEIGHTS} is read; model.safetensors.index.json beside it is not.\n'
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == CONFIG.vocab_size


def test_index_with_a_missing_or_extra_tensor(folder):
    shard(folder, {'visual.x': 'model-00001-of-00002.safetensors'})
    refused(folder, f'{folder}/model-00001-of-00002.safetensors', 'visual.x')


@pytest.mark.parametrize('content', ['{', '{}', '[]', '{"weight_map": null}'])
def test_bad_index(folder, content):
    shard(folder)
    (folder / 'model.safetensors.index.json').write_text(content)
    refused(folder, f'{folder}/model.safetensors.index.json')


# ---- round trip ----


def test_save_then_load_gives_the_same_model(saved):
    model = hf.load_model(saved)
    assert model.config == CONFIG
    assert_same_weights(model, random_model())


@pytest.mark.parametrize('sharded', [False, True])
def test_load_then_save_gives_identical_bytes(saved, folder, tmp_path, sharded):
    if sharded:
        shard(folder)
    hf.save_model(hf.load_model(folder), tmp_path / 'again', source=folder)
    names = sorted(p.name for p in saved.iterdir())
    assert names == sorted(p.name for p in (tmp_path / 'again').iterdir())
    for name in names:
        assert (tmp_path / 'again' / name).read_bytes() == (saved / name).read_bytes(), name


def test_layout_is_that_of_hugging_face(saved):
    """Each nn.Linear weight is [out, in]; heads are (kv head, group) in order."""
    model, weights = leaves(random_model()), tensors(saved)
    assert len(weights) == 3 + 9 * CONFIG.n_layers
    rows_kgh_d = model['blocks/attn/q'][1].reshape(12, 24).T
    np.testing.assert_array_equal(weights['model.layers.1.self_attn.q_proj.weight'], rows_kgh_d)
    np.testing.assert_array_equal(weights[O_PROJ], model['blocks/attn/o'][1].reshape(24, 12).T)
    np.testing.assert_array_equal(weights['model.layers.2.mlp.down_proj.weight'], model['blocks/mlp/down'][2].T)
    np.testing.assert_array_equal(weights['lm_head.weight'], model['head'].T)
    np.testing.assert_array_equal(weights['model.embed_tokens.weight'], model['embedding'])


def test_bfloat16_round_trip(tmp_path):
    save(random_model(), tmp_path / 'a', dtype=jnp.bfloat16)
    model = hf.load_model(tmp_path / 'a', dtype=jnp.bfloat16)
    for k, x in leaves(random_model()).items():
        np.testing.assert_array_equal(leaves(model)[k], x.astype(jnp.bfloat16), err_msg=k)
    save(model, tmp_path / 'b', dtype=jnp.bfloat16)
    assert (tmp_path / 'a' / WEIGHTS).read_bytes() == (tmp_path / 'b' / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / 'a' / 'config.json').read_text())['dtype'] == 'bfloat16'


# ---- saving ----


def test_large_models_are_saved_in_shards(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, 'SHARD_BYTES', 3000)
    save(random_model(), tmp_path / 'model')
    index = json.loads((tmp_path / 'model/model.safetensors.index.json').read_text())
    files = sorted(p.name for p in (tmp_path / 'model').glob('*.safetensors'))
    assert len(files) > 3 and files == sorted(set(index['weight_map'].values()))
    assert index['weight_map'].keys() == tensors(saved).keys()
    assert_same_weights(hf.load_model(tmp_path / 'model'), random_model())


def test_token_ids_and_generation_config_are_the_sources_unless_config_has_others(saved, tmp_path):
    source, keys = shutil.copytree(saved, tmp_path / 'source'), ('eos_token_id', 'temperature')
    edit_config(source, eos_token_id=2)
    (source / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2, 3], 'temperature': 0.5}))
    hf.save_model(random_model(), tmp_path / 'a', source=source)
    hf.save_model(random_model(), tmp_path / 'b', source=source, config=config_json.llama(CONFIG) | {'eos_token_id': 7})
    for name, config, generation in (('a', 2, ([2, 3], 0.5)), ('b', 7, (7, 0.5))):
        assert json.loads((tmp_path / name / 'config.json').read_text())['eos_token_id'] == config
        found = json.loads((tmp_path / name / 'generation_config.json').read_text())
        assert tuple(found[k] for k in keys) == generation


def content(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize('other', [WEIGHTS, 'thesis.txt'])
def test_save_refuses_a_directory_that_holds_something(tmp_path, other):
    target = tmp_path / 'model'
    target.mkdir()
    (target / other).write_text('keep me')
    with pytest.raises(LensError, match='model holds something already'):
        save(random_model(), target)
    assert content(target) == {other: b'keep me'}
    assert [p.name for p in tmp_path.iterdir()] == ['model']


def test_save_into_an_empty_or_missing_directory(tmp_path):
    (tmp_path / 'empty').mkdir()
    save(random_model(), tmp_path / 'empty')
    save(random_model(), tmp_path / 'new' / 'deep')
    assert content(tmp_path / 'empty') == content(tmp_path / 'new' / 'deep')


def test_save_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise tensor_files.safetensors.SafetensorError('I/O error: No space left on device (os error 28)')

    monkeypatch.setattr(tensor_files.safetensors.numpy, 'save_file', disk_full)
    with pytest.raises(LensError, match=f'{tmp_path}/model cannot be written .*No space left'):
        save(random_model(), tmp_path / 'model')
    assert list(tmp_path.iterdir()) == []
