"""Generated bad model folders, answers of servers and files of rows; otherwise as in test_bad_inputs.py."""

import asyncio
import contextlib
import copy
import functools
import gzip
import json
import pathlib
import shutil
import tempfile
import types

import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.strategies import sampled_from as one_of

from data_gen import documents, generate, render, servers, tables, turns
from lens import hf
from tests.bad_inputs import JUNK, NOT_FINITE, changed, check_sentence, copied, inputs, ruined

pytestmark = pytest.mark.slow


@pytest.fixture
def places(world):
    return world


# Folders of a model

BAD_TENSORS = [{'dtype': x} for x in ('I32', 'F16', 'F8_E4M3', 'Q4', 'BOOL', '', None, 3, 'f32', 'x' * 5000)]
BAD_TENSORS += [{'shape': x} for x in ([], [0], [2**62, 8], [-1], ['x'], None, [1.5], [10**30], 3, [[1]])]
BAD_TENSORS += [{'data_offsets': x} for x in ([0, 0], [4, 0], [0, 2**63], [-4, 0], [0], None, [0, 10**30], 'x')]


@inputs(refused=0.7)
def test_model_folders(kind, draw, root):
    file, folder = 'model.safetensors', root / 'subject'
    good = (folder / file).read_bytes()
    size = int.from_bytes(good[:8], 'little')
    text, body = good[8 : 8 + size], good[8 + size :]
    header, wrong = json.loads(text), True
    names = sorted(header.keys() - {'__metadata__'})
    how = draw(one_of(('length', 'tensor', 'header', 'ruined', 'cut', 'value', 'index', 'config', 'gone')))
    content = None

    def stored(header: bytes, body: bytes = body, length: int | None = None) -> bytes:
        return (len(header) if length is None else length).to_bytes(8, 'little') + header + body

    if how == 'length':
        content = stored(text, body, draw(one_of((0, 1, size - 1, size + 1, 2**27, 2**63, 2**64 - 1))))
    elif how == 'tensor':
        name = draw(one_of(names))
        content = stored(json.dumps(header | {name: header[name] | draw(one_of(BAD_TENSORS))}).encode())
    elif how == 'header':
        content, wrong = stored(json.dumps(changed(draw, header)).encode()), False
    elif how == 'ruined':
        content = stored(ruined(draw, text))
    elif how == 'cut':
        content = draw(one_of((good[: draw(st.integers(0, len(good) - 1))], good + b'x')))
    elif how == 'value':
        at = 4 * draw(st.integers(0, len(body) // 4 - 1))
        content = stored(text, body[:at] + np.float32(draw(one_of(NOT_FINITE))).tobytes() + body[at + 4 :])
    elif how == 'index':
        file = 'model.safetensors.index.json'
        weight_map = dict.fromkeys(names, 'a.safetensors')
        weight_map[draw(one_of(names))] = draw(one_of(('b.safetensors', '../x', '/etc/passwd', '.', 'x\0')) | JUNK)
        content = json.dumps({'weight_map': weight_map}).encode()
    elif how == 'config':
        file, wrong = 'config.json', False
        content = json.dumps(changed(draw, json.loads((folder / file).read_text()))).encode()
    with copied(folder, 'model.safetensors' if how != 'config' else file, content) as new:
        if how == 'index':
            (new / 'model.safetensors').rename(new / file)
            shutil.copy(folder / 'model.safetensors', new / 'a.safetensors')
        model = kind.attempt(lambda: hf.load_model(new), (how, content), wrong)
    if model is not None and how == 'header':
        same = jax.tree.map(np.array_equal, model, hf.load_model(folder))
        assert all(jax.tree.leaves(same)), content


# Answers of servers

MESSAGE = {'role': 'assistant', 'content': 'Fine.', 'reasoning_content': 'Hm.'}
USAGE = {'completion_tokens': 3, 'prompt_tokens': 9}
ANSWER = {'choices': [{'message': MESSAGE, 'finish_reason': 'stop'}], 'usage': USAGE}
SECRET = 'hunter2hunter2'
WORDS = ('<think>a', '<|end|>', SECRET, '\u202e', 'assistantfinal', '<|channel|>x', '\x1b]0;x\7', '\ud800', 'a' * 10**6)


@inputs(refused=0.4)
def test_answers(kind, draw, root):
    planner = chat_parts(root)[1]
    body, models = copy.deepcopy(ANSWER), draw(one_of((False, False, True)))
    how = draw(one_of(('changed', 'changed', 'words', 'ruined', 'junk')))
    status = draw(one_of((200, 200, 200, 307, 404, 503)))
    if models:
        body = {'data': [{'id': 'm'}, {'id': 'other'}]}
    elif how == 'words':
        key = draw(one_of(('content', 'reasoning_content')))
        body['choices'][0]['message'][key] = draw(one_of(WORDS) | st.text())
    raw = json.dumps(changed(draw, body) if how == 'changed' else draw(JUNK) if how == 'junk' else body).encode()
    raw = ruined(draw, raw) if how == 'ruined' else raw
    after = draw(one_of(('', 'nan', '-1', 'inf', 'Wed, 99 Oct', '9' * 400, 'x\0')))

    class Content:
        async def iter_any(self):
            yield raw

    @contextlib.asynccontextmanager
    async def request(*_, **__):
        headers = {'Retry-After': after, 'Location': after}
        yield types.SimpleNamespace(status=status, headers=headers, content=Content(), close=int)

    async def ask():
        asked = servers.Servers(f'http://u:{SECRET}@localhost:1/v1', 'm', 5.0)
        asked.read_registry()
        asked._session, server = types.SimpleNamespace(request=request), *asked.all.values()
        if models:
            await asked._ask_models(server)
            check_sentence(Exception(server.problem))
            return server if server.serves else None
        return await asked._post(server, {'max_tokens': 5})

    def act():
        answer = asyncio.run(ask())
        if models and answer is None:
            raise servers.Failed('it serves no such model')
        return answer if models else (answer, planner.record(turns.Plan(0, [], [], 1, 1, 5), answer))

    out = kind.attempt(act, (models, status, after, raw), how == 'ruined' or status != 200, servers.Failed)
    assert SECRET not in kind.said
    if out and not models:
        answer, record = out
        assert answer.message == json.loads(raw)['choices'][0]['message']
        assert all(n is None or (type(n) is int and 0 <= n <= 10**7) for n in (answer.tokens, answer.prompt_tokens))
        assert json.loads(json.dumps(record, allow_nan=False, ensure_ascii=False).encode()) == record


# Files of rows

TEXT = st.text(max_size=12) | one_of((*WORDS[:-1], 'Fine.', '</think>', ''))
CALL = one_of(
    ({'function': {'name': 'f', 'arguments': '{}'}}, {'name': 'f'}, {'function': {'name': 3}}, {'function': 'f'})
)
TURN = {'role': one_of(('user', 'assistant', 'assistant', 'system', 'tool', 'human', 'gpt', 'nobody')) | JUNK}
CALLED = {'tool_calls': st.lists(CALL, max_size=2) | JUNK, 'function_call': CALL | JUNK, 'name': JUNK}
SAID = dict.fromkeys(('content', 'thinking'), TEXT | JUNK) | {
    'channel': one_of(('analysis', 'final', 'commentary')) | JUNK
}
TURNS = st.lists(st.fixed_dictionaries(TURN, optional=SAID | CALLED), max_size=4)
GOOD = [{'role': 'user', 'content': 'Well?'}, {'role': 'assistant', 'content': 'The rabbit sang.'}]
CHAT = TURNS.map(lambda chat: [*GOOD, *chat]) | TURNS | JUNK
ROW = st.fixed_dictionaries(
    {'messages': CHAT}, optional={'tools': JUNK, 'system': TEXT | JUNK, 'reasoning_effort': JUNK}
)
ROW |= st.fixed_dictionaries({'prompt': TEXT | CHAT, 'completion': TEXT | CHAT}, optional={'input': TEXT | JUNK})
ROW |= st.fixed_dictionaries({'text': TEXT | JUNK}) | JUNK
OTHER_FORMAT = (
    'x.parquet',
    'x.jsonl.gz',
    'x.jsonl.bz2',
    'x.json.xz',
    'x.jsonl.zst',
    'x.csv.zip',
    'x.npy',
    'x',
    'x.tsv.gz',
)
NO_TEXT_FILE = (
    b'',
    b' \n\n',
    b'\0' * 99,
    '{"text": "äöü"}\n'.encode('latin1'),
    b'{"text": "a"}\n'.decode().encode('utf-16-le'),
)


@functools.lru_cache
def chat_parts(root: pathlib.Path):
    tokenizer = hf.load_tokenizer(root / 'subject')
    planner = turns.Planner(tokenizer, generate.GenerateOptions(tokenizer='subject'))
    return render.Renderer(tokenizer, seq_len=64, truncate='right', date=render.DATE, chats=True), planner


@inputs(refused=0.3)
def test_files_of_rows(kind, draw, root):
    renderer, planner = chat_parts(root)
    how = draw(one_of(('lines', 'lines', 'lines', 'array', 'csv', 'text', 'cut', 'torn', 'format', 'bytes')))
    found = draw(st.lists(ROW, min_size=1, max_size=4))
    lines, wrong, name = '\n'.join(map(json.dumps, found)).encode() + b'\n', False, 'x.jsonl'
    if how == 'array':
        name, lines = 'x.json', json.dumps(found).encode()
    elif how in ('csv', 'text'):
        name, lines = draw(one_of(('x.csv', 'x.tsv'))) if how == 'csv' else 'x.txt', draw(st.binary(max_size=60))
        lines = b'prompt,completion\n' + lines if how == 'csv' else lines
    elif how == 'cut':
        packed = gzip.compress(lines)
        name, lines, wrong = 'x.jsonl.gz', packed[: draw(st.integers(0, len(packed) - 1))], True
    elif how == 'torn':
        lines = ruined(draw, lines)
    elif how == 'format':
        name, wrong = draw(one_of(OTHER_FORMAT)), True
    elif how == 'bytes':
        name, lines, wrong = draw(one_of(('x.jsonl', 'x.json', 'x.csv', 'x.txt'))), draw(one_of(NO_TEXT_FILE)), True

    def act():
        table, out = tables.open_table(str(path)), []
        form = documents.row_format(table)
        for index, row in table.rows(0):
            try:
                out.append(renderer.encode(documents.parse(row, *form, 'medium')))
            except documents.BadRow as e:
                check_sentence(e)
            try:
                planner.plan(index, documents.messages(row, *form) if form[0] != 'text' else None)
            except (turns.Skip, ValueError) as e:
                check_sentence(e)
        return out

    with tempfile.TemporaryDirectory() as tmp:
        path = pathlib.Path(tmp) / name
        path.write_bytes(lines)
        encoded = kind.attempt(act, (name, lines), wrong)
    if encoded == []:  # every row is refused
        kind.refused.add(repr((name, lines)))
    for ids, roles, *_ in encoded or ():
        assert len(ids) == len(roles) <= 64 and np.isin(roles, list(render.ROLES.values())).all()
        assert not len(ids) or 0 <= ids.min() <= ids.max() < len(renderer.tokenizer)
