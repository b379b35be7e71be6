"""Servers that cannot be trusted: answers without end, of any shape, with control characters, and keys in URLs."""

import asyncio
import contextlib
import gzip
import io
import itertools
import json
import os
import threading
import tracemalloc
import types
import zlib

import pytest
from rich.console import Console

from data_gen import generate, requests, servers, urls
from data_gen.servers import Failed, Servers
from lens.errors import LensError
from lens.files import read_jsonl
from tests.chat_rows import jsonl, talk
from tests.fake_server import FakeServer, RawServer, response

BODY = {'model': 'tiny', 'max_tokens': 9, 'messages': [{'role': 'user', 'content': 'a'}]}
MODELS = json.dumps({'data': [{'id': 'tiny'}]}).encode()
CONTROLS = 'bad \x1b[2J\x9b31m\x07 \u202eedoc \r\n\x00 \U000e0041'
ENOUGH = 2**26  # bytes of an answer without end, far beyond all buffers


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(requests, 'PAUSE_S', 0.0)
    monkeypatch.setattr(servers, 'BACKOFF_MAX_S', 0.001)
    monkeypatch.setattr(servers, 'START_S', 0.0)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(servers, 'say', lines.append)
    return lines


def ask(*urls: str, times: int = 1, body: dict = BODY, **more):
    """The last of `times` answers, or the Failed that it is; the Servers."""

    async def run():
        async with Servers(','.join(urls), 'tiny', more.pop('timeout', 60.0), **more) as all_servers:
            await all_servers.start()
            for _ in range(times):
                try:
                    answer = await all_servers.complete(body)
                except Failed as e:
                    answer = e
            return answer, all_servers

    return asyncio.run(run())


def to_posts(answer):
    """Of a RawServer: the models, and answer(send) to what is posted."""
    return lambda request, send: send(response(MODELS)) if request.startswith(b'GET') else answer(send)


def completion(content='fine', **more) -> bytes:
    return json.dumps({'choices': [{'message': {'role': 'assistant', 'content': content}}]} | more).encode()


# --- bounds ---------------------------------------------------------------------------------------------------


def endless(*headers: str, chunk=b' ' * 2**16, frame=lambda c: c):
    def answer(send):
        send(response(b'', *headers, length=False))
        for _ in range(ENOUGH // 2**16):
            send(frame(chunk))

    return answer


def bomb(encoding: str, compressed: bytes):
    return lambda send: send(response(compressed, f'Content-Encoding: {encoding}'))


ZEROS = bytes(2**26)
ENDLESS = {
    'until the connection closes': endless(),
    'with a length': endless('Content-Length: 1000000000000'),
    'in chunks': endless('Transfer-Encoding: chunked', frame=lambda c: b'%x\r\n%s\r\n' % (len(c), c)),
    'gzip': bomb('gzip', gzip.compress(ZEROS, 6)),
    'deflate': bomb('deflate', zlib.compress(ZEROS, 6)),
    'gzip in gzip': bomb('gzip, gzip', gzip.compress(gzip.compress(ZEROS))),
    'headers': lambda send: [send(b'HTTP/1.1 200 OK\r\n')] + [send(b'X-%d: a\r\n' % i * 100) for i in range(100_000)],
    'one header': lambda send: [send(b'HTTP/1.1 200 OK\r\nX: ')] + [send(b'a' * 2**16) for _ in range(ENOUGH // 2**16)],
    'trailers': endless('Transfer-Encoding: chunked', chunk=b'X-Y: a\r\n' * 2**13, frame=lambda c: b'0\r\n' + c),
}


@pytest.mark.parametrize('name', ENDLESS)
def test_an_answer_without_end_costs_little_memory_and_ends(name):
    with RawServer(to_posts(ENDLESS[name])) as a:
        tracemalloc.start()
        try:
            failure, _ = ask(a.url)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert isinstance(failure, Failed) and peak < 2**23
        assert a.ended.wait(60) and a.sent < ENOUGH


def test_models_without_end_and_errors_without_end():
    with RawServer(lambda request, send: endless()(send)) as a:
        with pytest.raises(LensError, match='the answer is longer than'):
            ask(a.url)
        assert a.ended.wait(60) and a.sent < ENOUGH
    with RawServer(to_posts(lambda send: [send(response(b'', status=500, length=False)), endless()(send)])) as a:
        assert isinstance(ask(a.url)[0], Failed)


def test_the_limit_of_an_answer_follows_from_its_tokens():
    size = servers.LEAST_BYTES + 10 * servers.BYTES_PER_TOKEN
    with RawServer(to_posts(lambda send: send(response(completion('a' * (size - 200)))))) as a:
        assert 'longer than' in str(ask(a.url)[0])
        answer, _ = ask(a.url, body=BODY | {'max_tokens': 10})
    assert len(answer.message['content']) == size - 200


def test_a_compressed_answer_is_read():
    with RawServer(to_posts(bomb('gzip', gzip.compress(completion())))) as a:
        assert ask(a.url)[0].message['content'] == 'fine'


def test_an_answer_that_drips_ends_with_the_timeout():
    stop = threading.Event()

    def drip(send):
        send(response(b'', 'Content-Length: 1000', length=False))
        while not stop.wait(0.01):
            send(b' ')

    with RawServer(to_posts(drip)) as a:
        failure, _ = ask(a.url, timeout=0.2)
        assert str(failure) == 'no answer within 0.2 s' and failure.counts
        assert a.ended.wait(60)
    stop.set()


def test_a_pause_that_a_server_asks_for_is_bounded():
    for value in ('1e9', '9' * 300, 'Wed, 21 Oct 2995 07:28:00 GMT'):
        assert servers.retry_after(value) == servers.MOST_PAUSE_S
    assert servers.retry_after('Wed, 21 Oct 99999 07:28:00 GMT') is None


# --- redirects ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_a_redirect_is_refused(status):
    with FakeServer() as other:
        to = f'Location: {other.url}/chat/completions?key=hush'
        with RawServer(to_posts(lambda send: send(response(b'', to, status=status)))) as a:
            failure, _ = ask(a.url, key='my-key')
    assert not other.requests and failure.lasting
    assert str(failure) == f'HTTP {status}: it wants to redirect to {other.url}/chat/completions'


# --- shapes ---------------------------------------------------------------------------------------------------

DEEP = b'[' * 100_000 + b']' * 100_000
NO_MODELS = [
    b'',
    b'<html>',
    b'[]',
    b'null',
    b'{"data": 7}',
    b'{"data": [7]}',
    b'{"data": {"id": "tiny"}}',
    DEEP,
    b'\xff\xfe',
]
NO_MODELS += [b'{"data": ' + DEEP + b'}', b'{"data": [{"id": ' + b'9' * 5000 + b'}]}', b'data: {"data": []}']
WRONG_MODELS = [{'id': None}, {'id': float('nan')}, {'id': [['tiny']]}, {'id': 'tiny '}, {'id': CONTROLS * 1000}]


@pytest.mark.parametrize('answer', NO_MODELS, ids=range(len(NO_MODELS)))
def test_what_is_no_list_of_models_is_said(answer):
    message = r'No server answers at .*the answer of /models is not a list of models'
    with RawServer(lambda request, send: send(response(answer))) as a, pytest.raises(LensError, match=message):
        ask(a.url)


@pytest.mark.parametrize('model', WRONG_MODELS, ids=range(len(WRONG_MODELS)))
def test_other_models_are_named_in_a_short_line(model, said):
    models = json.dumps({'data': [model] * 3}).encode()
    message = r'serves .*, not tiny: give the name it serves'
    with RawServer(lambda request, send: send(response(models))) as a, pytest.raises(LensError, match=message) as e:
        ask(a.url)
    for text in (str(e.value), *said):
        assert len(text) < 600 and text.isprintable()


def number(text: str) -> bytes:
    return completion().replace(b'"choices"', b'"usage": {"completion_tokens": %s}, "choices"' % text.encode())


NO_ANSWERS = [
    b'',
    b'<html>502</html>',
    b'{"error": {"message": "overloaded"}}',
    b'data: {"choices": []}',
    DEEP,
    b'\x00\xff',
    b'{"choices": [{"message": {"content": "\xff"}}]}',
]
NO_ANSWERS += [
    b'{"choices": ' + DEEP + b'}',
    b'{"choices": [{"message": ' + DEEP + b'}]}',
    b'[{"message": {}}]',
    b'NaN',
]
NO_ANSWERS += [CONTROLS.encode(), number('9' * 5000)]


@pytest.mark.parametrize('answer', NO_ANSWERS, ids=range(len(NO_ANSWERS)))
def test_what_is_no_answer_is_a_failure_in_one_printable_line(answer):
    with RawServer(to_posts(lambda send: send(response(answer)))) as a:
        failure, _ = ask(a.url)
    assert isinstance(failure, Failed) and failure.counts and failure.lasting and not failure.refused
    assert str(failure).isprintable() and len(str(failure)) < 400


@pytest.mark.parametrize(
    'text', ['NaN', '-Infinity', '1e999', '-5', '1' + '0' * 30, '100000000', 'true', '"7"', '2.5', '[]']
)
def test_a_count_of_tokens_that_cannot_be_is_none(text):
    with RawServer(to_posts(lambda send: send(response(number(text))))) as a:
        answer, _ = ask(a.url)
    assert answer.tokens is None and answer.message['content'] == 'fine'


@pytest.mark.parametrize('status', [400, 401, 403, 404, 418, 429, 500, 503, 599, 999])
def test_what_an_error_says_is_one_short_printable_line(status, said):
    for text in (CONTROLS, json.dumps({'error': {'message': CONTROLS * 1000}}), json.dumps({'error': [[CONTROLS]]})):
        with RawServer(to_posts(lambda send, t=text: send(response(t.encode(), status=status)))) as a:
            failure, known = ask(a.url)
        (server,) = known.all.values()
        for line in (str(failure), server.problem, *said):
            assert line.isprintable() and len(line) <= servers.REASON_CHARS
        assert str(failure).startswith(f'HTTP {status}: ') and 'bad' in str(failure)


def test_nothing_that_a_terminal_would_obey_is_printed(tmp_path, capsys):
    with FakeServer(answer=lambda body: f'fine {CONTROLS} \ud800') as a:
        run(tmp_path, a.url, rows=2)
    out = capsys.readouterr().out
    assert 'fine' in out and all(c.isprintable() or c == '\n' for c in out)
    assert len(out) < 4 * generate.SHOWN_CHARS
    assert CONTROLS in read_jsonl(tmp_path / 'out' / 'data.jsonl')[0]['messages'][-1]['content']


def test_a_host_is_no_markup_of_the_progress_bar(monkeypatch):
    out, journal = io.StringIO(), types.SimpleNamespace(done=lambda: 1, counts={})
    monkeypatch.setattr(requests, 'Console', lambda: Console(file=out, force_terminal=True, width=200))
    server = servers.Server('http://u:hush@[fe80::1]:80/v1')
    with requests.Display(types.SimpleNamespace(journal=journal, total=2, unit='rows')) as display:
        display.update(types.SimpleNamespace(all={'': server}))
    assert '[fe80::1]:80 0 tok/s' in out.getvalue() and 'hush' not in out.getvalue()


# --- runs that end --------------------------------------------------------------------------------------------


def run(tmp_path, url: str, rows: int = 400, **more) -> str:
    source = jsonl(tmp_path / 'in.jsonl', [{'messages': talk(i)} for i in range(rows)])
    given = {'input_dataset': str(source), 'output_path': str(tmp_path / 'out'), 'server_urls': url, 'model': 'tiny'}
    given |= {'tokenizer': 'configs/tiny_subject', 'max_concurrency': 4}
    return generate.generate(generate.GenerateOptions(**given | more))


NEVER_USED = {
    '401': response(b'no key', status=401),
    '403': response(b'no', status=403),
    '404': response(b'not here', status=404),
    'HTML': response(b'<html>welcome</html>', 'Content-Type: text/html'),
    'no content': response(completion(None)),
    'redirect': response(b'', 'Location: http://elsewhere/v1', status=302),
    'too long': response(b' ' * 2**21),
}


@pytest.mark.parametrize('name', NEVER_USED)
def test_a_failure_that_lasts_ends_the_run(tmp_path, monkeypatch, name):
    """After LASTING_S, and not row by row."""
    monkeypatch.setattr(servers, 'LASTING_S', 0.0)
    with RawServer(to_posts(lambda send: send(NEVER_USED[name]))) as a:
        with pytest.raises(
            LensError, match=r'No server gives an answer that can be used \(127.*: look at --model, --server'
        ):
            run(tmp_path, a.url)
        posts = [r for r in a.requests if r.startswith(b'POST')]
    assert servers.LASTING_TIMES <= len(posts) < 40 and not (tmp_path / 'out' / 'rejected.jsonl').read_text()


def test_a_failure_lasts_only_where_all_servers_have_it_for_so_long(monkeypatch):
    server, clock = servers.Server('http://a/v1'), itertools.count(step=20.0)
    monkeypatch.setattr(servers.time, 'monotonic', lambda: next(clock))
    lasting, away, cut = Failed('HTTP 401', False, lasting=True), Failed('away', False), Failed('cut')
    seen = []
    for failure in (*[lasting] * 4, cut, lasting, lasting, None, *[lasting] * 4, away, *[lasting] * 5):
        server.note(failure)
        seen.append(server.hopeless())
    assert seen == [False] * 5 + [True] * 2 + [False] * 10 + [True]
    both = Servers('http://a/v1,http://b/v1', 'tiny', 60.0)
    both.read_registry()
    both.all['http://a/v1'] = server
    both.check()
    both.all['http://b/v1'] = server
    with pytest.raises(LensError, match='No server gives an answer'):
        both.check()


def test_a_wait_is_said_with_its_limit(tmp_path, monkeypatch, said):
    monkeypatch.setattr(servers, 'NONE_LEFT_S', 0.0)
    monkeypatch.setattr(servers, 'LASTING_S', 1.0)
    with FakeServer() as a:
        a.script = lambda number, body: setattr(a, 'key', 'another') if number == 3 else None
        with pytest.raises(LensError, match='No server gives an answer'):
            run(tmp_path, a.url)
    assert any(line.endswith('HTTP 401: wrong API key): waiting for one, for about 1 s') for line in said)


def test_a_key_that_is_withdrawn_ends_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, 'LASTING_S', 0.0)
    with FakeServer() as a:
        a.script = lambda number, body: setattr(a, 'key', 'another') if number == 5 else None
        with pytest.raises(LensError, match=r'No server gives an answer that can be used .*HTTP 401: wrong API key'):
            run(tmp_path, a.url)
        assert len((tmp_path / 'out' / 'data.jsonl').read_text().splitlines()) >= 6


def test_requests_that_are_all_refused_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, 'MOST_REFUSED', 9)
    with (
        FakeServer(script=lambda number, body: 'refuse') as a,
        pytest.raises(LensError, match='requests were refused and'),
    ):
        run(tmp_path, a.url)
    assert 9 <= len(a.requests) < 20
    (tmp_path / 'other').mkdir()
    with FakeServer(script=lambda number, body: 'refuse' if number else None) as a:
        assert '1 done, 29 rejected' in run(tmp_path / 'other', a.url, rows=30, max_concurrency=1)


@pytest.mark.parametrize('registry', ['', 'none.txt'])
def test_servers_without_a_useful_answer_are_asked_for_a_limited_time(monkeypatch, registry):
    """But with a registry one that is not there yet is waited for."""
    known, now = Servers('http://a/v1', 'tiny', 60.0, registry=registry), [0.0]
    monkeypatch.setattr(servers.time, 'monotonic', lambda: now[0])
    known.read_registry()
    (server,) = known.all.values()
    answer = servers.Answer({}, None, None, '', server)

    def fail_at(*times_s):
        for now[0] in times_s:
            known.judge(answer, Failed('HTTP 500'))

    server.serves = server.useful = True
    fail_at(9, 1000, 1800)
    known.judge(answer, None)
    fail_at(1801, 3600)
    server.serves = None  # away
    with contextlib.nullcontext() if registry else pytest.raises(LensError, match='can be used for 30 minutes'):
        fail_at(3602)
    server.serves = True
    fail_at(3700) if registry else None


# --- keys and passwords ---------------------------------------------------------------------------------------


def test_keys_and_passwords_are_sent_and_never_shown(tmp_path, capsys, monkeypatch):
    """By a server that repeats them wherever it can."""
    secrets = ['key-in-the-env', 'p%40ss-word', 'p@ss-word', 'key-in-query', 'key-in-registry']
    turn, registry = itertools.count(), tmp_path / 'servers.txt'
    echo = ' '.join(secrets)

    def answer(request, send):
        said = json.dumps({'error': {'message': echo}}).encode()
        if request.startswith(b'GET'):
            return send(response(MODELS))
        bad = [response(said, status=s) for s in (400, 401, 500)] + [response(b'no JSON ' + b'x' * 180 + echo.encode())]
        bad += [response(said), response(b'', f'Location: http://u:p%40ss-word@h/?{echo}', status=302)]
        n = next(turn)
        return send(bad[n % 6] if n < 60 else response(completion(id=echo)))

    monkeypatch.setenv('TEST_KEY', secrets[0])
    with RawServer(answer) as a:
        host = a.url.removeprefix('http://').removesuffix('/v1')
        registry.write_text(
            f'http://me:p%40ss-word@{host}/v1?api_key=key-in-query\nhttp://{host}/v1?k=key-in-registry # b\n'
        )
        given = {'server_registry': str(registry), 'api_key_env': 'TEST_KEY', 'registry_refresh_interval': 0.05}
        run(tmp_path, a.url, rows=60, **given)
        registry.write_text('')
        arrived = b''.join(a.requests).decode()
    for part in (
        'Authorization: Bearer key-in-the-env',
        'Authorization: Basic bWU6cEBzcy13b3Jk',
        '/v1/models?api_key=key-in-query',
    ):
        assert part in arrived
    out = capsys.readouterr()
    files = [p.read_bytes().decode('utf-8', 'replace') for p in (tmp_path / 'out').rglob('*') if p.is_file()]
    for text in (out.out, out.err, *files):
        assert not [s for s in secrets if s in text]
    assert any('***' in text for text in files) and '***' in out.out


@pytest.mark.parametrize(
    ('text', 'url', 'shown'),
    [
        ('http://a', 'http://a/v1', 'http://a/v1'),
        (' https://u:hush@a:8/x/ ', 'https://u:hush@a:8/x', 'https://a:8/x'),
        ('http://a/v1/?k=hush#hush', 'http://a/v1?k=hush', 'http://a/v1'),
        ('http://a/v1?k=h%75sh%C3%A9&k=hushé', 'http://a/v1?k=h%75sh%C3%A9&k=hushé', 'http://a/v1'),
        ('http://hush@[::1]:80/v1', 'http://hush@[::1]:80/v1', 'http://[::1]:80/v1'),
        ('u:hush@a/v1', None, 'a/v1'),
        ('http://u:hush@a:99999/v1', None, 'http://a:99999/v1'),
        ('http://u:hu?sh@a', None, 'http://a'),
        ('ftp://u:hush@a/v1', None, 'ftp://a/v1'),
        ('http://a b/v1', None, 'http://a b/v1'),
        ('http://a/\x1b[2J', None, 'http://a/\ufffd[2J'),
        ('http://a/\u202e', None, 'http://a/\ufffd'),
        ('http://?k=hush', None, 'http://'),
        ('-oProxyCommand=x', None, '-oProxyCommand=x'),
    ],
)
def test_urls(text, url, shown):
    assert urls.normal_url(text) == url
    if url:
        server = servers.Server(url)
        assert server.url == shown and 'hush' not in server.label + server.url
        if '?' in url or '@' in url:
            assert 'hush' not in server.hide('hushé hush%C3%A9' if 'é' in url else 'hush')
    else:
        assert urls.public(text) == shown
        with pytest.raises(LensError) as e:
            Servers(text, 'tiny', 1.0)
        assert 'hush' not in str(e.value) and str(e.value).isprintable()


def test_an_environment_variable_without_a_key_is_refused(monkeypatch):
    monkeypatch.setenv('TEST_KEY', 'a\nb')
    for name in ('TEST_KEY', 'TEST_NO_KEY'):
        with pytest.raises(LensError, match=f'--api_key_env={name}: this environment variable holds no API key'):
            requests.api_key(name)
    assert requests.api_key('') is None


# --- the registry ---------------------------------------------------------------------------------------------


def test_lines_of_a_registry_that_are_no_urls_are_said_once(tmp_path, said):
    registry = tmp_path / 'servers.txt'
    registry.write_bytes(b'\xff\xfe\x1b[2J\nhttp://good:1  # one\n\n#http://no\nhttp://u:hush@x:y/\n' + b'x' * 2**17)
    known = Servers('', 'tiny', 1.0, registry=str(registry))
    known.read_registry()
    known.read_registry()
    assert list(known.all) == ['http://good:1/v1'] and len(said) == 3 and 'hush' not in ''.join(said)
    assert all('is no URL' in line and line.isprintable() and len(line) < 600 for line in said)


def test_a_list_without_a_url_is_refused():
    with pytest.raises(LensError, match='--server_urls holds no URL'):
        Servers(',', 'tiny', 1.0)


@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo])
def test_a_registry_that_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / 'r')
    with pytest.raises(LensError, match=r'--server_registry=.*/r is no text file'):
        Servers('', 'tiny', 1.0, registry=str(tmp_path / 'r'))


def test_a_registry_that_is_replaced_by_none_leaves_the_servers(tmp_path):
    registry = tmp_path / 'r'
    registry.write_text('http://a\n')
    known = Servers('', 'tiny', 1.0, registry=str(registry))
    for replace in (lambda: None, registry.unlink, lambda: os.mkfifo(registry)):
        replace()
        known.read_registry()
        assert list(known.all) == ['http://a/v1']


def test_a_host_that_cannot_be_one_is_a_failure():
    for url in ('http://' + 'a' * 64 + '.invalid', 'http://a..b', 'http://.'):
        with contextlib.suppress(LensError):
            ask(url)
