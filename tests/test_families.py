"""Every supported family against transformers: logits, hidden states, files, caches, packed experts."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from lens import hf, tensor_files
from lens.errors import LensError
from lens.models import families, rope
from tests import hf_models
from tests.hf_models import FULL, SLIDING

T = 13  # three windows
IDS = np.random.default_rng(1).integers(0, 97, (2, T)).astype(np.int32)
AT = 7
CHANGED = IDS.copy()
CHANGED[:, AT] = (CHANGED[:, AT] + 1) % 97
PUBLISHED = sorted((pathlib.Path(__file__).parent / 'hf_configs').glob('*.json'))
# The other way round than the family's default.
RETIED = {
    'gpt2': False,
    'llama': True,
    'qwen2': True,
    'qwen3': True,
    'gemma2': False,
    'gemma3_text': False,
    'gpt_oss': True,
}
# Of the spread of what is compared: the rounding of a few thousand sums, one on another.
CLOSE = 1000 * np.finfo(np.float32).eps
SHOWS = 100 * CLOSE  # least effect of a fact
all_families = pytest.mark.parametrize('family', hf_models.FAMILIES)
distinct = pytest.mark.parametrize('family', hf_models.DISTINCT)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    return hf_models.pairs(tmp_path_factory.mktemp('families'))


def assert_close(ours, theirs, what=''):
    error = np.abs(ours - theirs).max() / np.std(theirs)
    assert error < CLOSE, f'{what}: {error / CLOSE:.1f} times what rounding explains'


def reloaded(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **hf_models.EAGER).eval()


@jax.jit  # one program per family: compiling is all the time there is
def outputs(model, ids):
    """(logits BxTxV, streams that enter each block and leave the last)."""
    x, streams = model.collect(model.embed(ids), 0, model.config.n_layers, lambda x: x)
    return model.logits(x), jnp.concatenate([streams, x[None]])


FACTS = [
    ('gpt2', {'layer_norm_epsilon': 1e-5}),
    ('llama', {'rms_norm_eps': 1e-5}),
    ('llama3', {'rope_parameters': hf_models.PLAIN_ROPE}),
    ('llama_linear', {'rope_parameters': hf_models.PLAIN_ROPE}),
    ('qwen2', {'layer_types': [FULL] * 6}),
    ('qwen2', {'layer_types': [FULL] * 3 + [SLIDING] * 3}),
    ('gemma2', {'attn_logit_softcapping': None}),
    ('gemma2', {'final_logit_softcapping': None}),
    ('gemma2', {'query_pre_attn_scalar': 16}),
    ('gemma2', {'layer_types': [SLIDING, FULL] * 3}),
    ('gemma3_text', {'sliding_window': 5}),
    ('gemma3_text', {'rope_parameters': dict.fromkeys((SLIDING, FULL), hf_models.PLAIN_ROPE)}),
    ('gpt_oss', {'rope_parameters': hf_models.YARN_ROPE | {'truncate': True}}),
    ('gpt_oss', {'rope_parameters': hf_models.YARN_ROPE | {'attention_factor': 1.0}}),
    ('gpt_oss', {'swiglu_limit': 100.0}),
    ('gpt_oss', {'sliding_window': 5}),
    ('gpt_oss', {'num_experts_per_tok': 3}),
]


@pytest.mark.parametrize(('family', 'change'), FACTS, ids=[f'{f}-{next(iter(c))}' for f, c in FACTS])
def test_every_fact_of_the_random_models_shows_in_their_logits(pair, family, change):
    """Parity would mean nothing for a window, cap or rotary table that changes nothing."""
    logits = pair(family).logits(IDS)
    other = hf_models.forward(hf_models.altered(pair(family).torch, **change), IDS)[0]
    assert np.abs(other - logits).max() > SHOWS * logits.std()


@all_families
def test_logits_and_every_hidden_state_equal_transformers(pair, family):
    p = pair(family)
    theirs, streams = hf_models.forward(p.torch, IDS)
    logits, ours = outputs(p.jax, IDS)
    assert_close(logits, theirs, 'logits')
    for k, stream in enumerate(streams):
        assert_close(ours[k], stream, f'stream {k}')


@distinct
def test_a_token_changes_nothing_before_it(pair, family):
    model = pair(family).jax
    logits = outputs(model, IDS)[0]
    change = np.abs(outputs(model, CHANGED)[0] - logits).max(-1) / np.std(logits)
    assert change[:, :AT].max() == 0 and change[:, AT].min() > SHOWS


@pytest.mark.parametrize(('family', 'tied'), RETIED.items())
def test_tied_and_untied_heads_load_and_save(pair, tmp_path, family, tied):
    p = pair(family, tie_word_embeddings=tied)
    assert (p.jax.head is None) == tied
    hf.save_model(p.jax, tmp_path / 'copy', source=p.directory)
    assert_close(hf_models.forward(reloaded(tmp_path / 'copy'), IDS)[0], p.logits(IDS))


def test_bfloat16_stays_close(pair):
    """Root mean square error of a position relative to the spread of the logits; the median position,
    because where rounding makes a router pick another expert the whole row moves, in PyTorch too."""
    p = pair('gpt_oss')
    logits = p.logits(IDS)
    model = hf.load_model(p.directory, dtype=jnp.bfloat16)
    assert model.blocks.attn.q[...].dtype == jnp.bfloat16
    error = np.median(np.sqrt(np.mean((outputs(model, IDS)[0] - logits) ** 2, axis=-1))) / logits.std()
    assert error < 0.05, error


@all_families
def test_saved_directory_is_the_same_model_to_transformers(pair, tmp_path, family):
    p = pair(family)
    hf.save_model(p.jax, tmp_path / 'copy', source=p.directory)
    copy = reloaded(tmp_path / 'copy')
    assert_close(hf_models.forward(copy, IDS)[0], p.logits(IDS))
    config = json.loads((tmp_path / 'copy' / 'config.json').read_text())
    text = pair('gemma3_text' if family == 'gemma3' else family).torch  # a multimodal model saves as its text model
    assert (config['architectures'], config['model_type']) == ([type(text).__name__], text.config.model_type)
    assert copy.state_dict().keys() == text.state_dict().keys()
    rope = config.get('rope_parameters')
    if rope:  # of transformers 5; what version 4 reads stands beside it
        full = rope.get(FULL, rope)
        assert config['rope_theta'] == full['rope_theta']
        kind = full['rope_type']
        assert config.get('rope_scaling', {'rope_type': 'default'})['rope_type'] == kind


@pytest.mark.parametrize('family', ['gpt2', 'qwen2', 'gemma3_text', 'gpt_oss'])
def test_a_cut_stack_saves_as_a_shorter_model(pair, tmp_path, family):
    """As the encoder of an exported lens; layer_types are cut with it."""
    p, n = pair(family), 4
    short = p.jax.truncated(n)
    short.final_norm, short.head = p.jax.final_norm, p.jax.head
    hf.save_model(short, tmp_path / 'copy', source=p.directory)
    assert hf.read_config(tmp_path / 'copy').n_layers == n
    streams = hf_models.forward(reloaded(tmp_path / 'copy'), IDS)[1]
    assert len(streams) == n + 1
    assert_close(streams[n], hf_models.forward(p.torch, IDS)[1][n])


@pytest.mark.parametrize('file', PUBLISHED, ids=lambda f: f.stem)
def test_published_configs_change_in_what_differs_alone(file, tmp_path):
    """Half the blocks of a published model, by what transformers makes of both files."""
    config = json.loads(file.read_text())
    c = families.from_hf(config)
    n = c.n_layers // 2 + 1
    out = families.edited(config, dataclasses.replace(c, n_layers=n), 'bfloat16')
    assert families.edited(out, families.from_hf(out), 'bfloat16') == out
    (tmp_path / 'config.json').write_text(json.dumps(out))
    ours = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    theirs = transformers.AutoConfig.from_pretrained(file).get_text_config().to_dict()
    differing = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    allowed = {
        'n_layer',
        'num_hidden_layers',
        'layer_types',
        'dtype',
        'architectures',
        'quantization_config',
        '_name_or_path',
    }
    allowed |= {'eos_token_id'} if 'text_config' in config else set()
    assert differing <= allowed, {k: (ours.get(k), theirs.get(k)) for k in differing - allowed}
    assert 'torch_dtype' not in out and ours['dtype'] == 'bfloat16'
    if 'layer_types' in ours:
        assert ours['layer_types'] == theirs['layer_types'][:n]
        assert [w > 0 for w in c.windows] == [t == SLIDING for t in theirs['layer_types']]


def test_null_turns_off_a_cap_or_window_and_is_any_other_key_left_out():
    config = hf_models.FAMILIES['gemma2'][1] | {'model_type': 'gemma2'}
    whole = families.from_hf(config)
    for key, field in (('attn_logit_softcapping', 'attn_softcap'), ('final_logit_softcapping', 'final_softcap')):
        assert families.from_hf(config | {key: None}) == dataclasses.replace(whole, **{field: 0.0})
    assert families.from_hf(config | {'sliding_window': None}) == dataclasses.replace(whole, windows=(0,) * 6)
    left_out = {k: x for k, x in config.items() if k != 'query_pre_attn_scalar'}
    assert families.from_hf(config | {'query_pre_attn_scalar': None}) == families.from_hf(left_out)


def test_yarn_whose_original_length_is_left_out_has_that_of_the_model():
    yarn = {k: x for k, x in hf_models.YARN_ROPE.items() if k != 'original_max_position_embeddings'}
    for family, given in (('llama', yarn), ('gemma3_text', {FULL: yarn, SLIDING: None})):
        config = hf_models.FAMILIES[family][1] | {'model_type': family, 'rope_parameters': given}
        c = families.from_hf(config)
        assert families.from_hf(families.edited(config, c, 'float32')) == c
        assert c.ropes[0].original_length == c.max_positions
        assert np.isfinite(rope.inverse_frequencies(c.ropes[0], c.head_dim)).all()


def test_the_config_of_another_kind_of_model_is_refused(pair, tmp_path):
    with pytest.raises(LensError, match=r'llama/config.json: it describes another model .*\(family, qk_norm diff'):
        hf.save_model(pair('qwen3').jax, tmp_path / 'copy', source=pair('llama').directory)
    with pytest.raises(LensError, match=r'config: it describes another model than the one to save \(ropes differ'):
        config = json.loads((pair('llama3').directory / 'config.json').read_text())
        hf.save_model(pair('llama').jax, tmp_path / 'copy', config=config)
    assert not (tmp_path / 'copy').exists()


@jax.jit
def cached(model, ids):
    """Logits of every token but the first two: a prompt of 3 tokens, then one by one through the cache."""
    n, prompt = model.config.n_layers, 3
    x, cache = model.run_cached(model.embed(ids[:, :prompt]), 0, n)

    def step(room, t):
        y, written = model.run_cached(model.embed(ids[:, t][:, None], t), 0, n, (cache, room), t)
        return room.written(written, t - prompt), y[:, 0]

    _, y_TxBxD = jax.lax.scan(step, cache.room(len(ids), T - prompt), jnp.arange(prompt, T))
    return model.logits(jnp.concatenate([x[:, -1:], y_TxBxD.swapaxes(0, 1)], 1))


@pytest.mark.parametrize('family', ['gpt2', 'gemma3_text', 'gpt_oss'])
def test_cached_decoding_equals_teacher_forcing_past_the_window(pair, family):
    model = pair(family).jax
    assert_close(cached(model, IDS), outputs(model, IDS)[0][:, 2:])


@jax.jit
def cut_twice(model, ids):
    x = model.embed(ids)
    for lo, hi in ((0, 2), (2, 5), (5, 6)):
        x = model.run_layers(x, lo, hi)
    return x


def test_stack_cut_at_even_and_odd_blocks_composes_to_the_whole(pair):
    """Where windows and rotary tables differ from layer to layer."""
    model = pair('gemma3_text').jax
    assert_close(cut_twice(model, IDS), outputs(model, IDS)[1][-1])


def test_dense_and_grouped_experts_agree(pair):
    p = pair('gpt_oss')
    dense = hf.load_model(p.directory, experts='dense')
    assert_close(outputs(dense, IDS)[0], p.logits(IDS))


@pytest.fixture(scope='module')
def mxfp4(tmp_path_factory):
    directory = tmp_path_factory.mktemp('mxfp4') / 'model'
    return directory, hf_models.forward(hf_models.mxfp4(directory), IDS)[0]


@pytest.mark.parametrize('packed', [False, True])
def test_mxfp4_directory_gives_the_logits_of_its_dequantised_weights(mxfp4, packed):
    directory, logits = mxfp4
    assert_close(outputs(hf.load_model(directory, packed=packed), IDS)[0], logits)


def test_mxfp4_directory_saves_as_a_model_that_transformers_reads(mxfp4, tmp_path):
    directory, logits = mxfp4
    hf.save_model(hf.load_model(directory), tmp_path / 'copy', source=directory)
    assert_close(hf_models.forward(reloaded(tmp_path / 'copy'), IDS)[0], logits)


def test_packed_experts_are_saved_as_they_are(mxfp4, tmp_path):
    directory, _ = mxfp4
    hf.save_model(hf.load_model(directory, dtype=jnp.bfloat16, packed=True), tmp_path / 'copy', source=directory)
    ours, theirs = (tensor_files.read_all(d / 'model.safetensors') for d in (tmp_path / 'copy', directory))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)
    assert hf.ships_packed(tmp_path / 'copy')


NAN, INFINITY = float('nan'), float('inf')
NUMBERS = {
    'llama': (
        'vocab_size',
        'hidden_size',
        'num_hidden_layers',
        'num_attention_heads',
        'num_key_value_heads',
        'head_dim',
        'intermediate_size',
        'max_position_embeddings',
    ),
    'gpt2': ('n_embd', 'n_layer', 'n_head', 'n_inner', 'n_positions'),
    'gemma2': ('sliding_window',),
    'gemma3_text': ('sliding_window_pattern',),
    'gpt_oss': ('num_local_experts', 'num_experts_per_tok'),
}
SCALARS = {
    'llama': ('rms_norm_eps', 'rope_theta'),
    'gpt2': ('layer_norm_epsilon',),
    'gemma2': ('query_pre_attn_scalar', 'attn_logit_softcapping', 'final_logit_softcapping'),
    'gemma3_text': ('rope_local_base_freq',),
}
ABSURD = ('6', 10**12, -8, NAN, INFINITY, True, [6], {})
WRONG = [(f, k, x) for f, keys in NUMBERS.items() for k in keys for x in (*ABSURD, 0, 6.0)]
WRONG += [(f, k, x) for f, keys in SCALARS.items() for k in keys for x in (*ABSURD[:1], 1e300, *ABSURD[2:])]
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}
ROPES = [
    (['yarn'], 'rope_parameters'),
    ({'rope_type': ['yarn']}, 'rope_parameters.rope_type'),
    ({'rope_type': 'yarn'}, "'factor'"),
    ({'rope_type': 'linear', 'factor': None}, "'factor'"),
    *[(YARN | {'factor': x}, 'rope_parameters.factor') for x in ('4', 0, -1, NAN, INFINITY, [])],
    *[(YARN | {k: NAN}, k) for k in ('rope_theta', 'beta_fast', 'beta_slow', 'attention_factor')],
    (YARN | {'original_max_position_embeddings': 'x'}, 'original_max_position_embeddings'),
    (YARN | {'truncate': 'no'}, 'truncate'),
    (hf_models.LLAMA3_ROPE | {'high_freq_factor': 1.0}, 'low_freq_factor'),
    ({'full_attention': hf_models.PLAIN_ROPE}, 'by layer type'),
]
WRONG += [('llama', 'rope_parameters', x, needle) for x, needle in ROPES]
WRONG += [
    ('llama', 'model_type', ['llama']),
    ('llama', 'model_type', 'x' * 10**6),
    ('llama', 'tie_word_embeddings', 'true'),
    ('llama', 'attention_bias', 'no'),
    ('llama', 'hidden_act', ['silu']),
    ('llama', 'eos_token_id', '2'),
    ('llama', 'eos_token_id', [1, NAN]),
    ('llama', 'torch_dtype', 'foo', 'foo'),
    ('llama', 'dtype', 7),
    ('llama', 'dtype', 'float8_e4m3fn', 'weights in bfloat16'),
    ('llama', 'num_attention_heads', 7, '7 heads'),
    ('llama', 'num_key_value_heads', 4, 'key-value'),
    ('llama', 'head_dim', 15),
    ('gpt2', 'n_head', 7, '7 heads'),
    ('gemma2', 'layer_types', 'full_attention'),
    ('gemma2', 'layer_types', [FULL, 'chunked_attention'] * 3, 'chunked_attention'),
    ('gemma2', 'layer_types', [FULL, []] * 3),
    ('gpt_oss', 'num_experts_per_tok', 6),
    ('gemma3', 'text_config', ['a']),
    ('gemma3', 'text_config', hf_models.GEMMA3 | {'num_hidden_layers': '6'}, 'text_config.num_hidden_layers'),
    ('gemma3', 'quantization_config', {'quant_method': 'gptq'}, 'gptq'),
    ('llama', 'quantization_config', 'fp8'),
    ('llama', 'quantization_config', {'quant_method': ['fp8']}),
    ('llama', 'quantization_config', {'quant_method': 'mxfp4'}, 'mxfp4'),
    ('llama', 'quantization_config', {'load_in_4bit': True}, 'bitsandbytes'),
    *[
        ('llama', 'quantization_config', {'quant_method': m, 'bits': 4}, f'by {m}, which is not supported: give')
        for m in ('fp8', 'gptq', 'awq', 'bitsandbytes', 'compressed-tensors')
    ],
]


WRONG = [(*w, w[1])[:4] for w in WRONG]


@pytest.mark.parametrize(('family', 'key', 'value', 'needle'), WRONG, ids=[f'{w[1]}-{n}' for n, w in enumerate(WRONG)])
def test_a_value_that_a_key_of_config_json_cannot_have_is_one_sentence(family, key, value, needle):
    config = hf_models.FAMILIES[family][1] | {'model_type': family}
    families.from_hf(config)
    with pytest.raises(LensError) as error:
        families.from_hf(config | {key: value})
    text = str(error.value)
    assert needle in text and text.endswith('.') and '\n' not in text and len(text) < 300, text
