"""Clients of the open servers of such lenses: what they send, by their published descriptions, is answered with the keys and
types that they read. Their requests are written out here; none of their code is used."""

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import lens
from lens import web
from tests import foreign, hf_models
from tests.foreign import MARKER, PROMPT, SCALE, ids
from tests.test_serve import HERE, events

NULL = type(None)
NUMBER = (int, float)
TOKEN = {'token': str, 'token_id': int, 'position': int, 'fragment_index': int, 'fragment_count': int}
TOKEN |= {'role': (str, NULL), 'section': (str, NULL), 'channel': (str, NULL), 'message_index': (int, NULL)}
RESULT = {'description': str, 'mse': NUMBER, 'cosine_similarity': NUMBER}
ROW = TOKEN | RESULT | {'l2_norm': NUMBER, 'generated': bool}
VECTOR = {'token': str, 'token_id': int, 'position': int, 'l2_norm': NUMBER, 'activation': list}
CHAT = [{'role': 'user', 'content': 'Who was it?'}, {'role': 'assistant', 'content': 'Lena.', 'channel': None}]
FLAGS = {'add_generation_prompt': True, 'continue_final_message': False, 'enable_thinking': None}
SOURCES = {
    'text': {'text': 'The lamp is on.', 'messages': None} | FLAGS,
    'a chat': {'text': None, 'messages': CHAT[:1]} | FLAGS,
    'a chat with its answer': {'text': None, 'messages': CHAT} | FLAGS | {'add_generation_prompt': False},
}
WORDS = {'temperature': 0.7, 'max_new_tokens': 200}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return foreign.write_pair(tmp_path_factory.mktemp('clients'), response={'explanation_len': 60})


@pytest.fixture(scope='module')
def decoder(root):
    return hf_models.load(root / 'pair/av')


@pytest.fixture(scope='module')
def client(root, decoder):
    reader = lens.load(root / 'pair', subject=str(root / 'subject'))
    with TestClient(web.application(reader, 4), base_url=HERE, raise_server_exceptions=False) as client:
        yield client


def ask(client, path: str, value: dict):
    answer = client.post(path, json=value, headers={'x-secret-key': 'any'})
    assert answer.status_code == 200, answer.text
    return events(answer.text) if value.get('stream') else answer.json()


def has(value: dict, kinds: dict) -> None:
    for key, kind in kinds.items():
        assert isinstance(value[key], kind), (key, value[key])
        assert kind is bool or not isinstance(value[key], bool)


@pytest.mark.parametrize(
    'source', [pytest.param(x, marks=[pytest.mark.slow] * (x != 'a chat with its answer')) for x in SOURCES]
)
def test_texts_and_chats(client, source):
    given = SOURCES[source]
    found = ask(client, '/tokenize', given)
    has(found, {'tokens': list, 'prompt_length': int, 'text': str})
    has(ask(client, '/extract', given)['tokens'][0], VECTOR)
    asked = given | WORDS | {'positions': [0, -1], 'reverse': True}
    whole = ask(client, '/explain', asked | {'stream': False})
    head, *rows = ask(client, '/explain', asked | {'stream': True})
    has(head, {'layer_index': int, 'total': int, 'prompt_length': int})
    assert whole['results'] == rows and len(rows) == head['total'] == 2 and 'description' not in head
    asked = given | {'completion_tokens': 3, 'temperature': 0.7}
    has(ask(client, '/completion', asked | {'stream': False}), {'tokens': list, 'prompt_length': int, 'text': str})
    first, *tokens, last = ask(client, '/completion', asked | {'stream': True})
    has(first, {'type': str, 'prompt_length': int, 'tokens': list})
    has(last, {'type': str, 'text': str})
    for row in rows:
        has(row, ROW)
    for token in [*found['tokens'], *first['tokens'], *(t['token'] for t in tokens)]:
        has(token, TOKEN)


def test_vectors(client):
    a, b = foreign.vectors(2).tolist()
    described = ask(client, '/describe', {'activations': [a, b], 'stream': False} | WORDS)['results']
    _, *frames = ask(client, '/describe', {'activations': [a, b], 'stream': True} | WORDS)
    for row in described + frames:
        has(row, RESULT)
    assert [f['index'] for f in frames] == [0, 1]
    has(
        ask(client, '/score', {'activation': a, 'description': 'A lamp.'}),
        {k: RESULT[k] for k in RESULT if k != 'description'},
    )
    has(ask(client, '/compare', {'activation_a': a, 'activation_b': b} | WORDS), RESULT | {'diff_norm': NUMBER})


def test_whether_it_runs(client):
    told = client.get('/', headers={'accept': 'application/json'}).json()
    has(told, {'status': str, 'd_model': int, 'extraction_layer': int, 'verbalizer_model': str, 'source_model': str})
    limits = ('max_input_chars', 'max_positions_per_request', 'max_new_tokens', 'max_describe_batch')
    has(told['limits'], dict.fromkeys((*limits, 'max_description_chars', 'max_completion_tokens'), int))
    has(told, dict.fromkeys(('num_cuda_devices', 'max_concurrent_explains', 'max_describe_requests'), int))


@pytest.mark.slow
def test_a_prompt_of_rows_is_answered_as_pytorch_goes_on(client, decoder):
    """Of a decoder whose explanations are text between tags."""
    prompt, vector = ids(PROMPT), foreign.vectors(1)[0]
    at = prompt.index(ids(MARKER)[0])
    rows = decoder.get_input_embeddings().weight[prompt].detach().numpy().copy()
    rows[at] = vector * SCALE / np.linalg.norm(vector)
    params = {'temperature': 0, 'max_new_tokens': 8, 'skip_special_tokens': False}
    trainer = {'top_p': 1.0, 'top_k': -1, 'stop': None, 'stop_token_ids': None}
    trainer |= {'no_stop_trim': True, 'spaces_between_special_tokens': False}
    value = {'input_embeds': rows.tolist(), 'sampling_params': params}
    made = ask(client, '/generate', value)
    same = ask(client, '/generate', value | {'sampling_params': params | trainer, 'return_logprob': True})
    assert same['meta_info'] == made['meta_info'] and same['text'].startswith(made['text'])
    has(made, {'text': str, 'meta_info': dict})
    logp, said, _ = zip(*made['meta_info']['output_token_logprobs'], strict=True)
    with torch.no_grad():
        assert [*said] == foreign.said(decoder, prompt, at, vector, 8)[: len(said)]
    assert max(logp) <= 0 and made['meta_info']['finish_reason']['type'] in ('stop', 'length')
    params |= {'temperature': 0.7, 'top_p': 0.9, 'top_k': 20}
    drawn = ask(client, '/generate', value | {'sampling_params': params})
    assert drawn['meta_info']['completion_tokens'] == len(drawn['meta_info']['output_token_logprobs'])
