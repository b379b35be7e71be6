"""What lens.hf refuses of a tokenizer: damaged files, code of its own, packages that are missing."""

import importlib.util
import json
import os
import pathlib
import shutil

import jinja2
import pytest

from lens import hf
from lens.errors import LensError

TINY = pathlib.Path(__file__).parents[1] / 'configs/tiny_subject'


@pytest.fixture
def words(tmp_path):
    """A folder with a tokenizer; tests damage it."""
    for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(TINY / name, tmp_path)
    return tmp_path


DEEP = '[' * 10**5
FILES = [
    (name, x) for name in ('tokenizer.json', 'tokenizer_config.json') for x in ('', '{"version": ', '[]', '3', DEEP)
]
FILES += [('config.json', '[]'), ('special_tokens_map.json', '['), ('added_tokens.json', '[' * 10**5)]


@pytest.mark.parametrize(('name', 'content'), FILES, ids=[f'{n}-{x[:2]}' for n, x in FILES])
def test_a_damaged_file_of_a_tokenizer_is_named(words, name, content):
    (words / name).write_text(content)
    refused_tokenizer(words, f'{words}/{name} gives no tokenizer (')


def refused_tokenizer(folder, *needles):
    with pytest.raises(LensError) as error:
        hf.load_tokenizer(folder)
    text = str(error.value)
    assert text.endswith('.') and '\n' not in text and len(text) < 500, text
    assert [n for n in needles if n not in text] == [], text


EDITS = [
    ('tokenizer_config.json', {'model_max_length': 'abc'}, 'model_max_length'),
    ('tokenizer_config.json', {'model_max_length': float('nan')}, 'model_max_length'),
    ('tokenizer_config.json', {'model_max_length': -4}, 'model_max_length'),
    ('tokenizer_config.json', {'eos_token': {'a': 1}}, 'eos_token'),
    ('tokenizer_config.json', {'eos_token': 5}, 'eos_token'),
    ('tokenizer_config.json', {'padding_side': 'up'}, 'Padding side'),
    ('tokenizer_config.json', {'tokenizer_class': 5}, 'gives no tokenizer'),
    ('tokenizer_config.json', {'added_tokens_decoder': [1]}, 'gives no tokenizer'),
    ('tokenizer_config.json', {'auto_map': ['a.X']}, 'gives no tokenizer'),
    ('tokenizer_config.json', {'chat_template': 5}, 'a chat template is no text'),
    ('tokenizer_config.json', {'chat_template': 'x\n{% for'}, 'line 2 of a chat template'),
    ('tokenizer_config.json', {'chat_template': [{'name': 'rag', 'template': '{{ a'}]}, 'line 1 of a chat template'),
    ('tokenizer.json', {'model': None}, 'gives no tokenizer'),
    ('tokenizer.json', {'added_tokens': [{'id': -5, 'content': 'x'}]}, '-5'),
    (
        'tokenizer.json',
        {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}},
        'Precompiled',
    ),  # panics
    (
        'tokenizer.json',
        {'post_processor': {'type': 'TemplateProcessing', 'single': [], 'pair': [], 'special_tokens': {}}},
        'no tokens of words',
    ),
    ('config.json', {'num_hidden_layers': '6'}, 'num_hidden_layers'),
    ('config.json', {'quantization_config': 'x'}, 'gives no tokenizer'),
]


@pytest.mark.parametrize(('name', 'change', 'needle'), EDITS)
def test_whatever_the_libraries_raise_about_a_tokenizer_is_one_sentence(words, name, change, needle):
    (words / name).write_text(json.dumps(json.loads((words / name).read_text()) | change))
    refused_tokenizer(words, str(words), needle)


def test_chat_templates_may_use_the_tags_of_transformers_and_need_no_default(words):
    rag = '{% for m in messages %}{% break %}{%- generation -%}a{%endgeneration%}{% endfor %}'
    templates = {'rag': rag, 'tool_use': ''}
    change = {'chat_template': [{'name': k, 'template': x} for k, x in templates.items()]}
    config = json.loads((words / 'tokenizer_config.json').read_text()) | change
    (words / 'tokenizer_config.json').write_text(json.dumps(config))
    tokenizer = hf.load_tokenizer(words)
    assert tokenizer.chat_template == templates
    assert tokenizer.apply_chat_template([{'role': 'user', 'content': 'a'}], chat_template='rag', tokenize=False) == ''


@pytest.mark.parametrize('name', ['config.json', 'tokenizer_config.json'])
def test_code_of_a_folder_is_neither_run_nor_asked_about(words, name, monkeypatch):
    monkeypatch.setattr('builtins.input', lambda *_: pytest.fail('it asks whether to run code'))
    (words / 'own.py').write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Own: pass\n")
    change = {'auto_map': {'AutoTokenizer': ['own.Own', 'own.Own'], 'AutoConfig': 'own.Own'}}
    change |= {'tokenizer_class': 'Own', 'model_type': 'own'}
    (words / name).write_text(json.dumps(json.loads((words / name).read_text()) | change))
    try:
        assert type(hf.load_tokenizer(words)).__module__.startswith('transformers.')
    except LensError as e:
        assert 'code of its own, which is never run' in str(e) and 'trust_remote_code' not in str(e)
    assert not (words / 'ran').exists()


@pytest.mark.parametrize(
    'template', ["{{ ''.__class__.__mro__ }}", '{{ messages.append(1) }}', '{% include "/etc/passwd" %}']
)
def test_chat_templates_reach_nothing_but_messages(words, template):
    (words / 'chat_template.jinja').write_text(template)
    tokenizer = hf.load_tokenizer(words)
    with pytest.raises((jinja2.exceptions.SecurityError, TypeError)):  # the second: there is nothing to include from
        tokenizer.apply_chat_template([{'role': 'user', 'content': 'a'}], tokenize=False)


def test_a_pipe_in_place_of_a_tokenizer(words):
    (words / 'tokenizer_config.json').unlink()
    os.mkfifo(words / 'tokenizer_config.json')
    refused_tokenizer(words, f'{words}/tokenizer_config.json is no file')


def test_a_sentencepiece_model_alone_names_the_package_that_reads_it(words, monkeypatch):
    (words / 'tokenizer.json').unlink()
    (words / 'tokenizer.model').write_bytes(b'\n\x0e\n\x05<unk>')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    refused_tokenizer(words, f'{words}/tokenizer.model', 'needs the package sentencepiece: pip install')
