"""Generation against scripted servers: turn choice, faults, kills, resume, and every error sentence."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import datasets
import pyarrow.parquet as pq
import pytest

from data_gen import chat_data, requests, rollouts, servers
from data_gen.generate import GenerateOptions, generate
from lens import hf
from lens.errors import LensError
from lens.files import read_jsonl
from tests.chat_rows import jsonl, talk
from tests.fake_server import FAULTS, FakeServer, answer_to, faults_at_random

ROOT, HANG_S = pathlib.Path(__file__).parents[1], 120
SUBJECT = 'configs/tiny_subject'
PRELOADED = [
    'data_gen.generate',
    'datasets',
    'pyarrow.parquet',
    'transformers.activations',
    'transformers.models.auto.tokenization_auto',
    'transformers.models.llama.configuration_llama',
]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(requests, 'PAUSE_S', 0.01)
    monkeypatch.setattr(servers, 'BACKOFF_S', 0.01)


def options(tmp_path, rows, *, urls=(), **more) -> GenerateOptions:
    source = rows if isinstance(rows, str) else jsonl(tmp_path / 'in.jsonl', rows)
    given = {'input_dataset': str(source), 'output_path': str(tmp_path / 'out'), 'server_urls': ','.join(urls)}
    given |= {'model': 'tiny', 'tokenizer': SUBJECT, 'timeout': 60.0, 'registry_refresh_interval': 0.05}
    return GenerateOptions(**given | more)


@pytest.fixture(scope='module')
def tokenizer():
    return hf.load_tokenizer(SUBJECT)


# --- runs -----------------------------------------------------------------------------------------------------


def check_result(tmp_path, rows: int, missing: dict[str, list[int]]) -> None:
    """Every index exactly once over all files, in order in the finished ones, and each answer its own."""
    out = tmp_path / 'out'
    expected = [i for i in range(rows) if not any(i in v for v in missing.values())]
    lines = read_jsonl(out / 'data.jsonl')
    assert sorted(r['index'] for r in lines) == expected
    for kind, indices in missing.items():
        assert sorted(r['index'] for r in read_jsonl(out / f'{kind}.jsonl')) == indices
    saved = datasets.load_from_disk(str(out / 'dataset')).to_list()
    assert [r['index'] for r in saved] == expected
    assert saved == pq.read_table(out / 'parquet' / 'train.parquet').to_pylist()
    by_index = {r['index']: r for r in lines}
    for row in saved:
        original = by_index[row['index']]
        assert chat_data.messages_of(row['messages']) == original['messages']
        *before, answer = original['messages']
        sent = [{'role': 'system', 'content': 'Reasoning: high'}, *before]
        budget = 4000 - original['tokens']['prompt_tokens_with_system']
        assert (answer['thinking'], answer['content']) == answer_to(sent, min(1536, budget))
        assert original['system'] == 'Reasoning: high' and original['finish_reason'] == 'stop'
    assert not (out / '.unfinished').exists()


def mixed_rows(n: int) -> tuple[list[dict], dict[str, list[int]]]:
    """Rows with a refused one and one in which nothing is to be answered among them."""
    rows = [{'messages': talk(i, pairs=1 + i % 3)} for i in range(n)]
    rows[7] = {'messages': talk(7, question='REFUSE')}
    rows[11] = {'messages': talk(11)[1:]}
    return rows, {'rejected': [7], 'skipped': [11], 'failed': []}


def test_one_run(tmp_path, capsys, tokenizer):
    rows, missing = mixed_rows(40)
    together = threading.Barrier(6)

    def script(number, body):
        if number < 3:
            together.wait(HANG_S)  # six requests are under way at once

    with FakeServer(script=script) as a, FakeServer(script=script, field='tags') as b:
        last = generate(options(tmp_path, rows, urls=(a.url, b.url), max_concurrency=6))
    assert '38 done, 1 rejected, 0 failed, 1 skipped' in last and str(tmp_path / 'out' / 'dataset') in last
    check_result(tmp_path, 40, missing)
    assert len(a.requests) + len(b.requests) == 39 and min(len(a.requests), len(b.requests)) == 19
    assert max(a.most_in_flight, b.most_in_flight) <= 6
    body = a.requests[0]
    assert set(body) == {'model', 'messages', 'max_tokens', 'temperature', 'top_p'} and body['temperature'] == 0.2
    out = capsys.readouterr().out
    raw = json.loads(re.search(r'First raw response \(http[^)]+\):\n(.+)', out)[1])
    example = json.JSONDecoder().raw_decode(out.split('First finished example:\n')[1])[0]
    assert raw['choices'][0]['message']['content']
    assert example in read_jsonl(tmp_path / 'out' / 'data.jsonl') and out.count('First ') == 2
    assert re.search(r'40/40 rows  127.0.0.1:\d+ \d+ tok/s, 127.0.0.1:\d+ \d+ tok/s .* ETA 0:00', out)
    (reject,) = read_jsonl(tmp_path / 'out' / 'rejected.jsonl')
    assert reject['status'] == 400 and 'this request is refused' in reject['reason']
    stats = json.loads((tmp_path / 'out' / 'stats.json').read_text())
    assert stats['counts'] == {'done': 38, 'rejected': 1, 'failed': 0, 'skipped': 1}
    thoughts = [r['messages'][-1]['thinking'] for r in read_jsonl(tmp_path / 'out' / 'data.jsonl')]
    counted = [len(tokenizer(t, add_special_tokens=False)['input_ids']) for t in thoughts]
    assert stats['lengths']['thinking_tokens'] == rollouts.length_statistics(counted)
    before = (tmp_path / 'out' / 'data.jsonl').read_bytes()
    again = options(tmp_path, rows, urls=('http://127.0.0.1:1',))
    with pytest.raises(LensError, match='exists: add --resume'):
        generate(again)
    with pytest.raises(LensError, match=r'says temperature 0\.2, this run 0\.7'):
        generate(options(tmp_path, rows, resume=True, temperature=0.7))
    assert generate(options(tmp_path, rows, resume=True)) == last  # nothing is left to ask for: no server is needed
    assert (tmp_path / 'out' / 'data.jsonl').read_bytes() == before


def test_the_place_of_the_lines_is_remembered(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, lines = [{'messages': talk(i)} for i in range(9)], tmp_path / 'lines.jsonl'
    (tmp_path / 'tokenizer').symlink_to(ROOT / SUBJECT)
    with FakeServer() as a:
        given = {'urls': [a.url], 'tokenizer': str(tmp_path / 'tokenizer')}
        generate(options(tmp_path, rows, max_samples=5, partial_jsonl='lines.jsonl', **given))
        monkeypatch.chdir('/')
        for other in ({}, {'partial_jsonl': str(tmp_path / 'new.jsonl')}):
            with pytest.raises(LensError, match=re.escape(f'{lines} exists: add --resume to continue it')):
                generate(options(tmp_path, rows, **given, **other))
        with pytest.raises(LensError, match=re.escape(f'lines are in {lines}, --partial_jsonl names {tmp_path}/new')):
            generate(options(tmp_path, rows, resume=True, partial_jsonl=str(tmp_path / 'new.jsonl'), **given))
        capsys.readouterr()
        assert '9 done' in generate(options(tmp_path, rows, resume=True, **given))
        assert f'Continuing {lines}' in capsys.readouterr().out
        assert len(a.requests) == 9 and len(read_jsonl(lines)) == 9
        lines.rename(tmp_path / 'away.jsonl')
        with pytest.raises(LensError, match=re.escape(f'lines are in {lines}, which is not there: put it back')):
            generate(options(tmp_path, rows, resume=True, **given))
        assert len(a.requests) == 9
    assert {p.name for p in tmp_path.iterdir()} == {'in.jsonl', 'out', 'away.jsonl', 'tokenizer'}
    assert not (tmp_path / 'out' / 'data.jsonl').exists()


def test_lines_in_the_output_folder_are_not_left_for_another_place(tmp_path):
    rows, default = [{'messages': talk(i)} for i in range(4)], tmp_path / 'out' / 'data.jsonl'
    with FakeServer() as a:
        generate(options(tmp_path, rows, urls=[a.url], max_samples=3))
        other = {'partial_jsonl': str(tmp_path / 'new.jsonl')}
        with pytest.raises(LensError, match=re.escape(f'{default} exists: add --resume')):
            generate(options(tmp_path, rows, urls=[a.url], **other))
        with pytest.raises(LensError, match=re.escape(f'lines are in {default}, --partial_jsonl names')):
            generate(options(tmp_path, rows, urls=[a.url], resume=True, **other))
        same = {'partial_jsonl': str(default), 'resume': True}
        assert '4 done' in generate(options(tmp_path, rows, urls=[a.url], **same))
        assert len(a.requests) == 4
        settings = tmp_path / 'out' / 'settings.json'
        before = json.loads(settings.read_text())
        del before['partial_jsonl']  # as an earlier version wrote it
        settings.write_text(json.dumps(before))
        assert '4 done' in generate(options(tmp_path, rows, urls=[a.url], resume=True))
    assert json.loads(settings.read_text())['partial_jsonl'] == ''


REASONS = {0: 7, 1: {'type': 'stop'}, 2: 'half \ud800', 3: ['stop'], 4: None}
USAGES = {5: 'many', 6: [3], 7: {'completion_tokens': '5', 'prompt_tokens': None}, 8: None}
USAGES |= {9: {'completion_tokens': 10**400, 'prompt_tokens': 10**400}, 10: {'completion_tokens': -5}}
USAGES |= {11: {'completion_tokens': True}, 12: {'completion_tokens': 2.5}}


class Odd(FakeServer):
    """Answers with other JSON types than OpenAI's, by the number of the row."""

    def completion(self, body):
        out, row = super().completion(body), int(body['messages'][-1]['content'].split()[-1].strip('.'))
        out['choices'][0]['finish_reason'] = REASONS.get(row, 'stop')
        return out | ({'usage': USAGES[row]} if row in USAGES else {})


def test_answers_with_unexpected_types_are_answers(tmp_path):
    rows = [{'messages': talk(i)} for i in range(13)]
    with Odd() as a:
        assert '13 done' in generate(options(tmp_path, rows, urls=[a.url], max_concurrency=4))
        assert len(a.requests) == 13
        assert '13 done' in generate(options(tmp_path, rows, urls=[a.url], resume=True))
    saved = datasets.load_from_disk(str(tmp_path / 'out' / 'dataset')).to_list()
    assert [r['finish_reason'] for r in saved] == [None, None, 'half ?', None, None] + ['stop'] * 8
    counts = [servers.parse_answer(json.dumps(Odd().completion(body_for(i))), None) for i in range(13)]
    assert all(isinstance(a.tokens, int) and a.tokens >= 6 and a.prompt_tokens == 7 for a in counts[:5])
    assert all(a.tokens is None and a.prompt_tokens is None for a in counts[5:])


def body_for(i: int) -> dict:
    return {'messages': [{'role': 'user', 'content': f'a b c d e f {i}'}], 'max_tokens': 9}


@pytest.mark.parametrize(
    'answer',
    [
        '[]',
        'null',
        '{"choices": null}',
        '{"choices": {}}',
        '{"choices": "abc"}',
        '{"choices": [null]}',
        '{"choices": [[]]}',
        '{"choices": [{"message": "a"}]}',
        '{"choices": [{"message": null}]}',
    ],
)
def test_what_is_no_answer_is_a_failure(answer):
    with pytest.raises(servers.Failed, match='the answer is not a chat completion'):
        servers.parse_answer(answer, None)


def test_half_a_surrogate_pair_of_a_server_can_be_printed(tmp_path, capsys):
    assert servers._error_text('{"error": {"message": "half \\ud800"}}') == 'half ?'
    assert servers._error_text('{"error": "half \\ud800"}') == 'half ?'
    with FakeServer(model='half \ud800') as a, pytest.raises(LensError, match=r'serves half \?, not tiny'):
        generate(options(tmp_path, [{'messages': talk(0)}], urls=[a.url]))
    assert 'serves half ?, not tiny' in capsys.readouterr().out


def test_retry_after_is_honoured(tmp_path):
    rows = [{'messages': talk(i)} for i in range(3)]
    with FakeServer(script=lambda number, body: '429' if number < 4 else None, retry_after='0') as a:
        assert '3 done' in generate(options(tmp_path, rows, urls=[a.url], max_concurrency=1))  # no attempt is counted
        assert len(a.requests) == 7
    busy, now = servers.Server('http://x/v1'), time.monotonic()
    busy.serves = True
    busy.fail(now, servers.Failed('busy', counts=False, pause_s=1000))
    assert not busy.ready(now + 999) and busy.ready(now + 1000 + HANG_S)
    assert servers.retry_after('Wed, 21 Oct 2015 07:28:00 GMT') == 0 and servers.retry_after('soon') is None
    assert servers.retry_after('7') == 7 and servers.retry_after('inf') is None and servers.retry_after('nan') is None


def test_a_server_that_fails_is_left_alone_for_a_time_that_doubles():
    away = servers.Server('http://x/v1')
    away.serves, pauses = True, []
    for _ in range(3):
        now = time.monotonic()
        away.fail(now, servers.Failed('away'))
        away.fail(now - 1, servers.Failed('away'))  # was under way when the failure was noticed
        pauses.append(away.retry_at - away.failed_at)
    assert pauses == pytest.approx([0.01, 0.02, 0.04], rel=1e-3)
    away.in_flight = 1
    assert not away.ready(away.retry_at)  # one request tries it
    away.failures = 0
    assert away.ready(away.retry_at)


def test_rows_whose_attempts_are_exhausted_are_listed_and_tried_again_on_resume(tmp_path):
    def unlucky(number, body):
        return '500' if body['messages'][-1]['content'].endswith(' 2.') else None

    rows = [{'messages': talk(i)} for i in range(6)]
    with FakeServer(script=unlucky) as a:
        assert '5 done, 0 rejected, 1 failed' in generate(options(tmp_path, rows, urls=[a.url]))
        assert sum(b['messages'][-1]['content'].endswith(' 2.') for b in a.requests) == 3
        (failed,) = read_jsonl(tmp_path / 'out' / 'failed.jsonl')
        assert failed['index'] == 2 and failed['attempts'] == 3 and 'HTTP 500' in failed['reason']
        a.script = None
        assert '6 done, 0 rejected, 0 failed' in generate(options(tmp_path, rows, urls=[a.url], resume=True))
    check_result(tmp_path, 6, {'failed': []})


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(servers, 'say', lines.append)
    return lines


def wait_for(condition) -> None:
    """For other threads; the deadline only catches hangs."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, 'hangs'
        time.sleep(0.005)


@contextlib.contextmanager
def meanwhile(function):
    thread = threading.Thread(target=function)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_with_no_server_left_it_waits_says_so_once_and_goes_on(tmp_path, monkeypatch, said):
    monkeypatch.setattr(servers, 'NONE_LEFT_S', 0.05)
    rows = [{'messages': talk(i)} for i in range(30)]
    closed = threading.Event()
    server = FakeServer(script=lambda number, body: None if number < 10 else closed.wait(HANG_S) and None)
    server.__enter__()

    def interrupt():
        wait_for(lambda: len(server.requests) >= 12)
        server.__exit__()
        closed.set()
        wait_for(lambda: any('no server is left' in line for line in said))
        server.__enter__()

    try:
        with meanwhile(interrupt):
            last = generate(options(tmp_path, rows, urls=[server.url], max_concurrency=2))
    finally:
        server.__exit__()
    assert '30 done, 0 rejected, 0 failed' in last
    assert [sum(text in line for line in said) for text in ('no server is left', 'answers: going on')] == [1, 1]


def test_the_registry_adds_and_removes_servers_while_running(tmp_path, said):
    rows = [{'messages': talk(i)} for i in range(40)]
    registry, removed = tmp_path / 'servers.txt', threading.Event()
    hold = lambda number, body: None if number < 10 else removed.wait(HANG_S) and None  # noqa: E731
    with FakeServer(script=hold) as a, FakeServer() as b, FakeServer(model='other') as wrong:

        def rewrite():
            wait_for(lambda: f'no server yet: waiting for one in {registry}' in said)
            registry.write_text(f'{a.url}\n')
            wait_for(lambda: len(a.requests) == 12)
            registry.write_text(f'# two\n{b.url}/\n{wrong.url}\n')
            wait_for(lambda: f'server {a.url} was removed from the registry' in said)
            removed.set()

        with meanwhile(rewrite):
            last = generate(options(tmp_path, rows, server_registry=str(registry), max_concurrency=2))
    assert '40 done, 0 rejected, 0 failed' in last and not wrong.requests
    assert len(a.requests) == 12 and len(b.requests) == 28
    assert said.count(f'server {wrong.url} is left out: it serves other, not tiny') == 1


# --- errors ---------------------------------------------------------------------------------------------------


def unused_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ('rows', 'given', 'message'),
    [
        ('missing.jsonl', {}, 'missing.jsonl does not exist'),
        ([], {}, 'in.jsonl is empty: it has no rows'),
        (
            [{'text': 'a', 'tags': ['b', 'c']}],
            {},
            'holds texts (in text) and no chats',
        ),
        ([{'messages': talk(0)}], {'input_column': 'chats'}, 'has no column chats; its columns: messages'),
        ([{'messages': talk(0), 'n': 1}], {'input_column': 'n'}, 'Column n of'),
        ([{'a': talk(0), 'b': talk(1)}], {}, 'has several columns of chats or answers (a, b): name one'),
        ([{'messages': talk(0)}], {'server_urls': 'localhost'}, "'localhost' in --server_urls is no URL"),
        ([{'messages': talk(0)}], {'output_path': '/dev/null/out'}, '/dev/null/out cannot be written'),
        ([{'messages': talk(0)}], {'tokenizer': 'configs'}, 'configs'),
    ],
)
def test_errors_before_anything_is_asked(tmp_path, rows, given, message):
    rows = str(tmp_path / rows) if isinstance(rows, str) else rows
    with pytest.raises(LensError, match=re.escape(message)):
        generate(options(tmp_path, rows, **given or {'urls': ['http://127.0.0.1:1']}))
    assert not (tmp_path / 'out').exists()


def test_errors_of_servers(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, 'START_S', 0.0)
    rows = [{'messages': talk(0)}]
    with FakeServer(model='other') as a:
        with pytest.raises(LensError, match='serves other, not tiny: give the name it serves as --model'):
            generate(options(tmp_path, rows, urls=[a.url]))
        with pytest.raises(LensError, match='HTTP 404 from /models'):
            generate(options(tmp_path, rows, urls=[a.url + '/chat']))
    with pytest.raises(LensError, match=r'No server answers at http.*: start one'):
        generate(options(tmp_path, rows, urls=[f'http://127.0.0.1:{unused_port()}']))
    assert not (tmp_path / 'out').exists()
    with FakeServer(model='tiny') as a, pytest.raises(LensError, match=r'No row has an answer .*rejected.jsonl says'):
        generate(options(tmp_path, [{'messages': talk(0, question='REFUSE')}], urls=[a.url]))
    assert not (tmp_path / 'out' / 'dataset').exists() and not (tmp_path / 'out' / 'stats.json').exists()


def test_the_command_line(tmp_path):
    """Names with dashes are flags, a LensError is one sentence, --help shows the flags of the command."""
    given = (
        ['generate', '--input-dataset=nowhere.jsonl', f'--output-path={tmp_path}/out', '--max_samples=3'],
        ['label', '--help'],
    )
    commands = [
        subprocess.Popen(
            [sys.executable, '-m', f'data_gen.{c}', *f], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for c, *f in given
    ]
    (_, error), (text, _) = (c.communicate() for c in commands)
    assert commands[0].returncode == 1 and 'error: nowhere.jsonl does not exist' in error and 'Traceback' not in error
    assert '--min_position: First position' in text and '--max_cost: Stop before' in text


def test_a_full_disk_is_one_sentence_and_the_run_resumes(tmp_path, capsys):
    rows = [{'messages': talk(i)} for i in range(40)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FakeServer() as a:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
            with pytest.raises(
                LensError, match=r'data.jsonl cannot be written \(File too large\): free space .*--resume'
            ):
                generate(options(tmp_path, rows, urls=[a.url]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        lines = (tmp_path / 'out' / 'data.jsonl').read_text()
        assert lines.endswith('\n') and 5 < len(read_jsonl(tmp_path / 'out' / 'data.jsonl')) < 40
        last = generate(options(tmp_path, rows, urls=[a.url], resume=True))
    assert last.endswith('40 done, 0 rejected, 0 failed, 0 skipped')
    check_result(tmp_path, 40, {'failed': []})


def test_sigterm_keeps_what_was_answered(tmp_path):
    rows, stopped = [{'messages': talk(i)} for i in range(20)], threading.Event()
    with FakeServer(script=lambda number, body: stopped.wait(HANG_S) and None if number >= 10 else None) as a:

        def stop():
            wait_for(lambda: len(a.requests) == 12)
            os.kill(os.getpid(), signal.SIGTERM)

        with meanwhile(stop), pytest.raises(LensError, match=r'Stopped by SIGTERM with 10 rows done: --resume goes on'):
            generate(options(tmp_path, rows, urls=[a.url], max_concurrency=2))
        stopped.set()
        assert len(read_jsonl(tmp_path / 'out' / 'data.jsonl')) == 10
        generate(options(tmp_path, rows, urls=[a.url], resume=True))
    check_result(tmp_path, 20, {})


def test_a_row_survives_every_fault_of_a_server(tmp_path):
    rows, missing = mixed_rows(20)
    faults = {f'Tell me a story {i}.': fault for i, fault in enumerate(FAULTS)}

    def once(number, body):
        return faults.pop(body['messages'][-1]['content'], None)

    with FakeServer(script=once, hang=0.0, retry_after='0') as a:
        generate(options(tmp_path, rows, urls=[a.url], max_concurrency=3))
        assert len(a.requests) == 19 + len(FAULTS)
    check_result(tmp_path, 20, missing)


# --- chaos ----------------------------------------------------------------------------------------------------


def child(given: GenerateOptions, log: str) -> None:
    """One generation in a process of its own; exit code 0 when it came to its end."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    print(generate(given), flush=True)


@pytest.mark.slow
def test_chaos_with_kills(tmp_path):
    """Faults, a changing registry and kill -9 at random instants; the result is that of an undisturbed run."""
    n, kills, seed = 120, 3, 0
    context = multiprocessing.get_context('forkserver')  # the imports are paid once
    context.set_forkserver_preload(PRELOADED)
    rows, missing = mixed_rows(n)
    (tmp_path / 'calm').mkdir()
    with FakeServer() as calm:
        generate(options(tmp_path / 'calm', rows, urls=[calm.url]))
    draw, registry, stop = random.Random(seed), tmp_path / 'servers.txt', threading.Event()
    data = tmp_path / 'out' / 'data.jsonl'
    a = FakeServer(script=faults_at_random(0.2, seed), delay=0.03, hang=1.5)
    b = FakeServer(script=faults_at_random(0.2, seed + 1), delay=0.03, hang=1.5, field='reasoning_content')
    with a, b:

        def rewrite():
            for urls in (lists for _ in iter(int, 1) for lists in ((a.url, b.url), (a.url,), (), (b.url,))):
                registry.write_text('\n'.join(urls))
                if stop.wait(0.6):
                    return

        thread = threading.Thread(target=rewrite)
        thread.start()
        given = {'server_registry': str(registry), 'timeout': 1.0, 'resume': True, 'max_concurrency': 8}
        try:
            killed = 0
            for _ in range(kills + 20):
                process = context.Process(target=child, args=(options(tmp_path, rows, **given), str(tmp_path / 'log')))
                process.start()
                if killed < kills:
                    size = data.stat().st_size if data.exists() else 0
                    while process.is_alive() and (data.stat().st_size if data.exists() else 0) == size:
                        time.sleep(0.002)
                    process.join(draw.uniform(0, 0.8))
                    if process.is_alive():
                        os.kill(process.pid, signal.SIGKILL)
                        killed += 1
                process.join()
                if process.exitcode == 0 and not (tmp_path / 'out' / 'failed.jsonl').read_text():
                    break
                assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / 'log').read_text()
        finally:
            stop.set()
            thread.join()
    assert killed == kills, f'the run ended after {killed} kills: more rows are needed'
    check_result(tmp_path, n, missing)
    calm_out = tmp_path / 'calm' / 'out'
    assert (tmp_path / 'out' / 'stats.json').read_text() == (calm_out / 'stats.json').read_text()
    assert pq.read_table(tmp_path / 'out' / 'parquet').equals(pq.read_table(calm_out / 'parquet'))
