"""The server of a lens: what its routes say is what the lens says; bad input, strangers, crowds and who goes away."""

import asyncio
import copy
import dataclasses
import json
import random
import re
import threading
import types

import jax
import numpy as np
import pytest
from starlette.testclient import TestClient

from lens import api, jobs, page, serve, sharding, web
from lens.errors import LensError
from lens.models.injection import Replace
from lens.reader import Reader
from lens.reopen import Reopened
from tests.test_page import HOSTILE, Parsed
from tests.test_reader import CHAT, TEXT, made

HERE = 'http://127.0.0.1:8123'


@pytest.fixture(scope='module')
def reader(world):
    cfg, run, params = made(world)
    return Reader(Reopened(json.loads(cfg.to_json()), cfg.subject.path, run, 7, params), 'it', batch=5)


@pytest.fixture(scope='module')
def client(reader):
    with TestClient(web.application(reader, 4), base_url=HERE, raise_server_exceptions=False) as client:
        yield client


def ask(client, path: str, value, **how):
    answer = client.post(path, json=value, **how)
    assert answer.status_code == 200, answer.text
    return answer.json()


def with_params(value: dict, **params) -> dict:
    return value | {'sampling_params': value['sampling_params'] | params}


def events(text: str) -> list:
    parts = [p.removeprefix('data: ') for p in text.split('\n\n') if p.startswith('data: ')]
    assert parts.pop() == '[DONE]'
    return [json.loads(p) for p in parts]


def same(ours, theirs):
    """Floats of JSON trees but for what another batch changes, all else exactly."""
    if isinstance(theirs, dict | list | tuple):
        assert len(ours) == len(theirs)
        for k, x in theirs.items() if isinstance(theirs, dict) else enumerate(theirs):
            same(ours[k], x)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    else:
        assert ours == theirs


def test_what_it_explains_is_what_the_lens_explains(client, reader):
    wanted = reader.explain(TEXT, [9, 3], samples=2)
    value = {'text': TEXT, 'positions': [9, 3], 'samples': 2}
    whole = ask(client, '/explain', value)
    head, *rows = events(client.post('/explain', json=value | {'stream': True}).text)
    assert rows == whole['results'] and head == {k: x for k, x in whole.items() if k != 'results'}
    assert (head['layer_index'], head['total'], head['prompt_length']) == (1, 2, 15)
    for row, theirs in zip(rows, wanted, strict=True):
        own = theirs.to_json() | {'role': None, 'message_index': None}
        same({k: row[k] for k in own}, own)
        assert row['mse'] == pytest.approx(2 - 2 * theirs.cosine, rel=1e-4)
        assert (row['generated'], row['section'], row['channel'], row['part']) == (False, 'content', None, 'text')
    best = ask(client, '/explain', {'text': TEXT, 'positions': [9], 'best_of': 3, 'prompt_length': 9})['results'][0]
    assert best['generated'] and best['nmse'] == min(e['nmse'] for e in best['explanations'])
    back = ask(client, '/explain', {'text': TEXT, 'positions': [3, 9, -6], 'reverse': True, 'salience': False})
    assert [r['position'] for r in back['results']] == [9, 3]


@pytest.mark.slow
def test_a_prompt_of_rows_goes_on_as_the_decoder_does(client, reader):
    """Against one run of prompt and words together, as the model itself has it."""
    lens, base = jax.tree.map(lambda x: x, reader.lens), reader.base
    lens.decoder.config = dataclasses.replace(lens.decoder.config, injection=Replace(20.0))
    it = copy.copy(reader)
    it.lens = lens
    rows = np.random.default_rng(0).standard_normal((6, base.config.d_model)).astype(np.float32)
    value = {'input_embeds': rows.tolist(), 'sampling_params': {'temperature': 0, 'max_new_tokens': 5}}

    def logits_at(ids: list[int]) -> np.ndarray:
        with jax.set_mesh(reader.run.mesh):
            words = base.lookup(np.array([ids], np.int32))
            x = sharding.reshard(np.concatenate([rows[None], np.asarray(words)], axis=1), sharding.ACT)
            x = base.run_layers(x, 0, base.config.n_layers, adapters=lens.decoder.adapters)
            return np.asarray(base.logits(x))[0, len(rows) - 1 : -1]

    with TestClient(web.application(it, 4), base_url=HERE) as other:
        made = ask(other, '/generate', value)
        drawn = value | {'sampling_params': {'max_new_tokens': 5, 'sampling_seed': 3, 'top_p': 1.0}}
        assert ask(other, '/generate', drawn) == ask(other, '/generate', drawn) != made
        limits = {'top_p': 1, 'top_k': -1, 'min_p': 0}
        assert ask(other, '/generate', with_params(drawn, **limits)) == ask(other, '/generate', drawn)
        for limit in ({'top_k': 1}, {'top_p': 1e-6}, {'min_p': 1.0}):  # the most probable token alone is left
            assert ask(other, '/generate', with_params(drawn, temperature=2.0, **limit)) == made
        few = ask(other, '/generate', with_params(drawn, temperature=5.0, top_k=2, max_new_tokens=20))
        few = [i for _, i, _ in few['meta_info']['output_token_logprobs']]
        ranks = [(-row).argsort().tolist().index(i) for row, i in zip(logits_at(few), few, strict=True)]
        assert {*ranks} == {0, 1}
        wrong = other.post('/generate', json=value | {'input_embeds': rows[:, 1:].tolist()})
        assert wrong.status_code == 400 and 'a row of 23 numbers, the decoder reads 24' in wrong.json()['detail']
    logp, ids, _ = zip(*made['meta_info']['output_token_logprobs'], strict=True)
    logits = logits_at([*ids])
    assert logits.argmax(1).tolist() == [*ids]
    theirs = jax.nn.log_softmax(logits)[np.arange(len(ids)), ids]
    np.testing.assert_allclose(logp, theirs, rtol=1e-4, atol=1e-5)
    ends = set(reader.tokenizer.all_special_ids)
    ended = ids[-1] in ends
    assert made['text'] == reader.tokenizer.decode(ids[:-1] if ended else ids) and (len(ids) == 5 or ended)
    reason = {'type': 'stop', 'matched': ids[-1]} if ended else {'type': 'length', 'length': 5}
    assert made['meta_info']['finish_reason'] == reason
    assert made['meta_info']['prompt_tokens'] == 6
    for wrong, why in {
        'enters blocks of its decoder': {},
        'input_ids: extra inputs are not permitted': {'input_ids': [1]},
        'sampling_params.top_p: input should be greater than 0 (given: 0).': {'sampling_params': {'top_p': 0}},
        'top_p: input should be less than or equal to 1 (given: 1.5).': {'sampling_params': {'top_p': 1.5}},
        'sampling_params.top_k: input should be -1 or at least 1 (given: 0).': {'sampling_params': {'top_k': 0}},
        'top_k: input should be greater than or equal to -1 (given: -2).': {'sampling_params': {'top_k': -2}},
        'top_k: input should be a valid integer (given: 1.5).': {'sampling_params': {'top_k': 1.5}},
        'min_p: input should be less than or equal to 1 (given: 1.1).': {'sampling_params': {'min_p': 1.1}},
        'min_p: input should be greater than or equal to 0 (given: -0.1).': {'sampling_params': {'min_p': -0.1}},
    }.items():
        answer = client.post('/generate', json=value | why)
        assert answer.status_code == 400 and wrong in answer.json()['detail']


def test_tokens_of_a_chat_say_whose_they_are(client, reader):
    found = reader.tokens(CHAT)
    tokens = ask(client, '/tokenize', {'messages': CHAT, 'text': None})['tokens']
    assert [(t['token'], t['token_id'], t['part']) for t in tokens] == [
        *zip(found.texts, found.ids, found.roles, strict=True)
    ]
    for part, owner in {
        'user': ('user', 'content', None, 0),
        'thinking': ('assistant', 'content', 'analysis', 1),
        'final': ('assistant', 'content', 'final', 1),
    }.items():
        of_part = {
            tuple(t[k] for k in ('role', 'section', 'channel', 'message_index')) for t in tokens if t['part'] == part
        }
        assert of_part == {owner}


def test_the_halves(client, reader):
    extracted = ask(client, '/extract', {'text': TEXT, 'positions': [9]})['tokens'][0]
    a = np.asarray(extracted['activation'], np.float32)
    np.testing.assert_allclose(a, reader.activations(TEXT, [9])[0], rtol=1e-5)
    ids = reader.tokens(TEXT).ids[:10]
    row = ask(client, '/describe', {'activations': [a.tolist()] * 6, 'context': [ids] * 6, 'salience': False})[
        'results'
    ]
    wanted = reader.explain(TEXT, [9], salience=False)[0]
    assert [r['index'] for r in row] == list(range(6)) and {r['description'] for r in row} == {wanted.explanation}
    score = ask(client, '/score', {'activation': a.tolist(), 'description': 'Lena', 'context': ids})
    theirs = reader.score(a, 'Lena', ids)[0]
    same([score[k] for k in ('description', 'nmse', 'cosine_similarity')], ['Lena', theirs['nmse'], theirs['cosine']])
    other = TEXT.replace('Lena', 'Hugo')
    both = ask(client, '/compare', {'text_a': TEXT, 'text_b': other})
    assert both['description'] == reader.compare(TEXT, other)[2].explanation
    b = reader.activations(other, [-1])[0]
    vectors = {'activation_a': reader.activations(TEXT, [-1])[0].tolist(), 'activation_b': b.tolist()}
    assert ask(client, '/compare', vectors)['diff_norm'] == pytest.approx(both['diff_norm'], rel=1e-4)


def test_going_on_and_edits(client, reader):
    ids, n = list(reader.tokens(TEXT).ids), 5
    base = jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x)), reader.base)
    program = jax.jit(lambda row: base(row))
    wide = np.zeros((1, 32), np.int32)
    for _ in range(n):
        wide[0, : len(ids)] = ids
        ids.append(int(np.asarray(program(wide))[0, len(ids) - 1].argmax()))
    found = ask(client, '/completion', {'text': TEXT, 'completion_tokens': n})
    got = [t['token_id'] for t in found['tokens']]
    assert got == ids[: len(got)] and found['prompt_length'] == 15
    ends = reader.tokenizer.get_added_vocab().values()
    assert len(got) == len(ids) or ids[len(got)] in ends
    prompt, *tokens, done = events(
        client.post('/completion', json={'text': TEXT, 'completion_tokens': n, 'stream': True}).text
    )
    assert (prompt['type'], done['type']) == ('prompt', 'done') and done['text'] == found['text']
    assert prompt['tokens'] + [t['token'] for t in tokens] == found['tokens']
    edit = ask(client, '/edit', {'text': TEXT, 'position': 9, 'description': 'Lena found', 'strength': 0.5, 'steps': 8})
    same(edit, json.loads(json.dumps(reader.edit(TEXT, 9, 'Lena found', strength=0.5, steps=8).to_json())))


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('/explain', {}, 'Give text, messages or token_ids: what is to be read.'),
        ('/explain', [], 'The request: input should be an object (given: []).'),
        ('/explain', {'text': ' '}, 'The text is empty: give one with words in it.'),
        ('/explain', {'text': 3}, 'text: input should be a valid string (given: 3).'),
        ('/explain', {'text': 'a\ud800'}, 'text: input should be a valid string, unable to parse'),
        ('/explain', {'text': 'a\0'}, 'text: string should match pattern'),
        ('/explain', {'text': TEXT, 'seed': 1.5}, 'seed: input should be a valid integer (given: 1.5).'),
        ('/explain', {'text': TEXT, 'colour': 1}, 'colour: extra inputs are not permitted (given: 1).'),
        ('/explain', {'text': TEXT, 'positions': [99]}, 'position 99 is not in the text, which has the tokens 0..14.'),
        ('/explain', {'text': TEXT, 'samples': 65}, 'samples: input should be less than or equal to 64 (given: 65).'),
        ('/explain', {'text': TEXT, 'stream': 1}, 'stream: input should be a valid boolean (given: 1).'),
        (
            '/explain',
            {'text': TEXT, 'temperature': 1e400},
            'temperature: input should be a finite number (given: inf).',
        ),
        ('/explain', {'text': 'a ' * 200}, 'the subject reads 1..128: give a part.'),
        ('/explain', {'messages': [{'content': 'x'}]}, 'messages[0].role: field required.'),
        ('/explain', {'messages': []}, 'messages: list should have at least 1 item'),
        ('/explain', {'token_ids': [10**9]}, 'token id 1000000000 is none of the subject'),
        ('/explain', {'text': TEXT, 'enable_thinking': True}, 'enable_thinking: input should be False (given: True).'),
        (
            '/explain',
            {'messages': CHAT[:1], 'add_generation_prompt': False},
            'add_generation_prompt=false is for a chat that ends with the assistant: leave it out.',
        ),
        ('/describe', {'activations': [[1.0]]}, 'An activation of 1 numbers was given, those of this lens have 24.'),
        ('/describe', {'activations': [[1.0] * 24], 'context': [[1], [2]]}, 'context has 2 entries for 1 vectors'),
        ('/score', {'activation': [1.0]}, 'description: field required.'),
        ('/compare', {'text_a': TEXT}, 'Give activation_a and activation_b, or text_a and text_b'),
        ('/completion', {'text': TEXT, 'completion_tokens': 500}, 'the subject reads 128: lower one.'),
        ('/edit', {'text': TEXT, 'description': ''}, 'An explanation of 0 tokens was given'),
        ('/edit', {'text': TEXT, 'description': 'x', 'steps': 9}, 'steps: input should be 8, 20 or 40 (given: 9).'),
        ('/page', {'reading': {}}, 'This is no reading'),
        ('/page', {'reading': {}, 'notes': {'a': {}}}, 'notes.a.[key]: string should match pattern'),
    ],
)
def test_refusals(client, path, value, message):
    for stream in (
        ({}, {'stream': True}) if isinstance(value, dict) and path == '/explain' and 'stream' not in value else ({},)
    ):
        body = json.dumps(value | stream if stream else value).replace('Infinity', '1e400')
        answer = client.post(path, content=body, headers={'content-type': 'application/json'})
        assert answer.status_code == 400 and message in answer.json()['detail'], answer.text
        assert '\n' not in answer.json()['detail']


@pytest.mark.parametrize(
    ('body', 'kind', 'status'),
    [
        (b'{', 'application/json', 400),
        (b'\xff', 'application/json', 400),
        (b'[' * 10**5, 'application/json', 400),
        (b'{"text": NaN}', 'application/json', 400),
        (b'1' * 10**4, 'application/json', 400),
        (b'{}', 'text/plain', 415),
        (b'{}', '', 415),
        (b' ' * (web.MOST_BYTES + 1), 'application/json', 413),
    ],
)
def test_what_is_no_json(client, body, kind, status):
    answer = client.post('/tokenize', content=body, headers={'content-type': kind})
    assert answer.status_code == status and answer.json()['detail'].endswith('.')


@pytest.mark.parametrize(
    ('method', 'path', 'headers', 'status'),
    [
        ('GET', '/', {'host': 'evil.example'}, 403),
        ('GET', '/', {'host': 'evil.example:8123'}, 403),
        ('GET', '/', {'host': ''}, 403),
        ('GET', '/', {'host': '[::1'}, 403),
        ('GET', '/health', {'host': 'localhost:9'}, 200),
        ('GET', '/health', {'host': '[::1]:8123'}, 200),
        ('GET', '/', {'sec-fetch-site': 'cross-site'}, 200),
        ('POST', '/tokenize', {'origin': 'http://evil.example'}, 403),
        ('POST', '/tokenize', {'origin': 'null'}, 403),
        ('POST', '/tokenize', {'origin': 'http://localhost:8123'}, 403),
        ('POST', '/tokenize', {'sec-fetch-site': 'same-site'}, 403),
        ('POST', '/tokenize', {'origin': HERE, 'sec-fetch-site': 'same-origin'}, 200),
        ('OPTIONS', '/tokenize', {'origin': HERE}, 405),
        ('GET', '/tokenize', {}, 405),
        ('GET', '/../lens', {}, 404),
    ],
)
def test_whom_it_answers(client, method, path, headers, status):
    how = {'json': {'text': TEXT}} if method == 'POST' else {}
    answer = client.request(method, path, headers=headers, **how)
    assert answer.status_code == status, answer.text
    assert not any(k.startswith('access-control') for k in answer.headers)
    assert answer.headers['x-content-type-options'] == 'nosniff' and answer.headers['x-frame-options'] == 'DENY'
    assert status == 200 or answer.json()['detail'].endswith('.')


JUNK = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    '',
    'x',
    '\u202e\0',
    '</script>',
    [],
    [[]],
    [1, -1],
    {},
    {'role': 'user'},
    [None],
]


def test_random_requests_are_answered_or_refused(client, reader):
    """Valid requests of which some keys are made into others."""
    rng, a = random.Random(0), reader.activations(TEXT, [9])[0].tolist()
    source = {'text': TEXT, 'messages': None, 'token_ids': None}
    valid = {
        '/tokenize': source,
        '/explain': source | {'positions': [9], 'samples': 1, 'salience': False, 'stream': False, 'reverse': True},
        '/describe': {'activations': [a], 'context': None, 'samples': 1, 'salience': False},
        '/extract': source | {'positions': [0]},
        '/score': {'activation': a, 'description': 'Lena', 'context': None},
        '/compare': {'text_a': TEXT, 'text_b': 'Hugo', 'activation_a': None, 'position_a': 1},
        '/completion': source | {'completion_tokens': 5},
        '/edit': source | {'description': 'Lena', 'steps': 8, 'mode': 'replace', 'before': None},
        '/page': {'reading': reader.explain(TEXT, [9], salience=False).to_json(), 'notes': {}},
    }
    seen = {}
    for _ in range(200):
        path, value = rng.choice([*valid.items()])
        value = dict(value)
        for key in rng.sample([*value, 'x'], rng.choice([0, 1, 1, 2])):
            value[key] = rng.choice([*JUNK, rng.randbytes(4).decode('latin-1'), rng.uniform(-9, 9)])
        answer = client.post(path, json=value)
        assert answer.status_code in (200, 400), (path, value, answer.text)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
    assert min(seen.values()) > 40 and client.get('/health').json()['waiting'] == 0


def test_the_description_names_every_route(client):
    told = client.get('/openapi.json').json()
    assert set(told['paths']) == {*api.ROUTES, '/health', '/page'} and told['openapi'].startswith('3.1')
    assert client.get('/health').json()['limits'] == api.LIMITS


def test_the_live_page_runs_its_own_scripts_alone(client):
    answer = client.get('/')
    policy = answer.headers['content-security-policy']
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    for kind in ('style', 'script'):
        inside = re.findall(f'<{kind}>(.*?)</{kind}>', answer.text, re.S)
        assert len(inside) == 2 and all(page._hash(x) in policy for x in inside)
    assert not re.search(r'(?:src|href)="(?!#)|url\(|@import|https?://', answer.text)


@pytest.mark.parametrize('text', HOSTILE)
def test_hostile_texts_stay_texts(client, text):
    about = {'subject': text, 'layer': 1, 'lens': text, 'step': 5, 'min_pos': 2, 'error': 'nmse'}
    ours, usual = (Parsed(page.live(about | x, False, True, 64)[0]) for x in ({}, {'subject': 'a', 'lens': 'a'}))
    assert [tag for tag, _ in ours.elements] == [tag for tag, _ in usual.elements]
    answer = client.post('/tokenize', json={'text': f'a {text}'})
    assert answer.headers['content-type'] == 'application/json' and f'a {text}' in answer.json()['text']


def test_a_reading_becomes_a_page_with_its_notes(client, reader):
    reading = reader.explain(TEXT, [9], salience=False).to_json()
    note = '</script><script>alert(1)</script>'
    answer = client.post('/page', json={'reading': reading, 'notes': {'9': {'lit': True, 'text': note}}})
    texts = Parsed(answer.text).texts
    assert answer.headers['content-type'].startswith('text/html')
    assert json.loads(next(t for t in texts if t.startswith('{"9"')))['9']['text'] == note


# what follows needs no lens: steps that a test lets go on


class Gate:
    """A route whose second step waits for `go`, and tells what has been done."""

    def __init__(self):
        self.go, self.done, self.begun = threading.Semaphore(0), [], threading.Event()

    def steps(self, reader, value):
        yield {'tokens': [], 'prompt_length': 0, 'text': value['text']}
        for k in range(3):
            self.begun.set()
            assert self.go.acquire(timeout=60)
            self.done.append((value['text'], k))
            yield {'k': k}


@pytest.fixture
def gate(monkeypatch):
    gate, about = Gate(), {'subject': 'a', 'layer': 1, 'lens': 'a', 'step': 5, 'min_pos': 2, 'error': 'nmse'}
    only = {'/explain': api.ROUTES['/explain']._replace(steps=gate.steps)}
    monkeypatch.setattr(api, 'ROUTES', only)
    gate.reader = types.SimpleNamespace(
        about=lambda: about, context_tokens=0, tokenizer=types.SimpleNamespace(chat_template='')
    )
    return gate


async def call(app, text: str, gone: asyncio.Event, stream: bool = True) -> list:
    """Asks an ASGI application, as a client that goes away with `gone`; what it was sent."""
    body, sent = [json.dumps({'text': text, 'stream': stream}).encode()], []

    async def receive():
        if body:
            return {'type': 'http.request', 'body': body.pop(), 'more_body': False}
        await gone.wait()
        return {'type': 'http.disconnect'}

    async def send(message):
        sent.append(message)

    headers = [(b'host', b'localhost'), (b'content-type', b'application/json')]
    scope = {'type': 'http', 'method': 'POST', 'path': '/explain', 'headers': headers, 'query_string': b''}
    await app(scope | {'asgi': {'spec_version': '2.3'}, 'http_version': '1.1', 'scheme': 'http'}, receive, send)
    return sent


async def until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError('it never came')


@pytest.mark.parametrize('stream', [True, False])
def test_who_goes_away_leaves_the_queue_to_others(gate, stream):
    async def main():
        app, left = web.application(gate.reader, 2), [asyncio.Event() for _ in range(4)]
        first = asyncio.ensure_future(call(app, 'first', left[0], stream))
        await until(gate.begun.is_set)
        second = asyncio.ensure_future(call(app, 'second', left[1], stream))
        await asyncio.sleep(0.05)
        refused = await call(app, 'third', left[2], stream)
        assert refused[0]['status'] == 429 and (b'retry-after', b'5') in refused[0]['headers']
        assert json.loads(refused[1]['body'])['detail'] == '2 requests are waiting already: come back in some seconds.'
        left[0].set()
        await first
        for _ in range(4):  # the step of the first that has begun, and three of the second
            gate.go.release()
        sent = await second
        assert gate.done == [('first', 0), *(('second', k) for k in range(3))]
        assert sent[0]['status'] == 200 and b''.join(m.get('body', b'') for m in sent).count(b'"k"') == 3
        for _ in range(3):
            gate.go.release()
        assert (await call(app, 'fourth', left[3], stream))[0]['status'] == 200

    asyncio.run(main())


def test_twenty_clients_lose_nothing(gate):
    async def main():
        app = web.application(gate.reader, 20)
        for _ in range(60):
            gate.go.release()
        answers = await asyncio.gather(*(call(app, f'c{i}', asyncio.Event()) for i in range(20)))
        for i, sent in enumerate(answers):
            head, *rows = events(b''.join(m.get('body', b'') for m in sent).decode())
            assert head['text'] == f'c{i}' and [r['k'] for r in rows] == [0, 1, 2]
        assert sorted(gate.done) == sorted((f'c{i}', k) for i in range(20) for k in range(3))

    asyncio.run(main())


def test_a_failure_in_a_stream_is_told_in_it(monkeypatch, gate, capsys):
    def steps(reader, value):
        yield {}
        raise LensError('No.') if value['text'] == 'bad' else ZeroDivisionError

    route = api.ROUTES['/explain']._replace(steps=steps)
    monkeypatch.setattr(api, 'ROUTES', {'/explain': route})
    with TestClient(web.application(gate.reader, 1), base_url=HERE, raise_server_exceptions=False) as client:
        for text, said, status in (('bad', 'No.', 400), ('broken', jobs.BROKEN, 500)):
            streamed = client.post('/explain', json={'text': text, 'stream': True})
            assert events(streamed.text)[-1] == {'detail': said}
            whole = client.post('/explain', json={'text': text})
            assert (whole.status_code, whole.json()) == (status, {'detail': said})
    assert 'ZeroDivisionError' in capsys.readouterr().err


def test_long_work_takes_turns():
    done = []

    def steps(name, n, begin=None):
        for k in range(n):
            if begin:
                begin.wait(60)
            done.append((name, k))
            yield k

    async def main():
        worker, begin = jobs.Worker(3), threading.Event()
        taken = [worker.submit(steps('a', 3, begin)), worker.submit(steps('b', 3)), worker.submit(steps('c', 1))]
        begin.set()
        assert [[x async for x in job] for job in taken] == [[0, 1, 2], [0, 1, 2], [0]]
        assert worker.count == 0
        worker.close()

    asyncio.run(main())
    assert done[:3] == [('a', 0), ('b', 0), ('c', 0)] and done[3:] == [('a', 1), ('b', 1), ('a', 2), ('b', 2)]


def test_what_the_command_needs(monkeypatch):
    with serve.listen(0) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(LensError, match=rf'^--port={port} cannot be listened on .*: give another, or 0 for any\.$'):
            serve.listen(port)
    with pytest.raises(LensError, match=r'^--port=99999 cannot be listened on'):
        serve.listen(99999)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(LensError, match=r"lens\.serve needs the package pydantic: pip install 'lens\[serve\]'"):
        serve.main('it', 0, 4, '', '')
