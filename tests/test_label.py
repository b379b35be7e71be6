"""Labels against scripted servers: positions, parsing, the ledger, stops and resume, and what cannot be labelled."""

import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time

import numpy as np
import pytest

from data_gen import label as module
from data_gen import ledger, requests, servers
from data_gen.label import LabelOptions, label
from data_gen.storyworld import world as story_world
from lens import data, hf
from lens.errors import LensError
from lens.files import read_jsonl
from tests.fake_server import WORDS, FakeServer

HANG_S = 120
SUBJECT = 'configs/tiny_subject'
TRAIN, VALIDATION, POSITIONS, LENGTH, FROM = 14, 5, 3, 11, 50
JOBS = (TRAIN + VALIDATION) * POSITIONS


@pytest.fixture(scope='module')
def stories(tmp_path_factory):
    """Storyworld without explanations."""
    root = tmp_path_factory.mktemp('stories')
    settings = story_world.Settings(train=TRAIN, validation=VALIDATION, positions=4)
    story_world.write_arrays(root / 'data', SUBJECT, settings)
    for name in ('train', 'validation'):
        for array in ('positions', 'explanations'):
            (root / 'data' / name / f'{array}.npy').unlink()
    return root


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(requests, 'PAUSE_S', 0.01)
    monkeypatch.setattr(servers, 'BACKOFF_S', 0.01)


@pytest.fixture
def world(stories, tmp_path):
    shutil.copytree(stories / 'data', tmp_path / 'data')
    return tmp_path


@pytest.fixture(scope='module')
def tokenizer():
    return hf.load_tokenizer(SUBJECT)


def text_of(body: dict) -> str:
    return re.search(r'<text>\n(.*)\n</text>', body['messages'][0]['content'], re.DOTALL)[1]


def words_for(text: str) -> list[str]:
    digest = hashlib.sha256(text.encode()).digest()
    return [WORDS[b % len(WORDS)] for b in digest[: 4 + digest[0] % 9]]


def features(body: dict) -> str:
    """A good answer that follows from the text alone."""
    first, *rest = words_for(text_of(body))
    return f'Here:\n<analysis>\n- {first}\n- **{rest[0]}** {" ".join(rest[1:])}\n</analysis>'


def expected_label(text: str) -> str:
    first, *rest = words_for(text)
    return f'{first}\n\n{" ".join(rest)}'


def options(root, *urls, **more) -> LabelOptions:
    given = {'data': str(root / 'data'), 'tokenizer': SUBJECT, 'model': 'tiny', 'server_urls': ','.join(urls)}
    given |= {
        'positions': POSITIONS,
        'explanation_len': LENGTH,
        'timeout': 60.0,
        'price_in': 300.0,
        'price_out': 2000.0,
    }
    return LabelOptions(**given | more)


def arrays_of(folder) -> dict[str, np.ndarray]:
    return {f'{p.parent.name}/{p.stem}': np.load(p) for p in sorted(folder.glob('*/*.npy'))}


def tree(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


# --- runs -----------------------------------------------------------------------------------------------------


def check_arrays(folder, tokenizer, documents: dict[str, int]) -> None:
    """Every label is that of its own text, cut or filled at LENGTH tokens."""
    for name, n in documents.items():
        split = data.open_split(str(folder), name, vocab_size=len(tokenizer))
        assert len(split) == n and split.explanations.shape == (n, POSITIONS, LENGTH)
        assert split.meta['explanation_len'] == LENGTH and split.meta['filler_id'] == split.meta['pad_id']
        for row in range(n):
            for slot, position in enumerate(split.positions[row]):
                text = tokenizer.decode(split.tokens[row, : position + 1], skip_special_tokens=True)
                ids = tokenizer(expected_label(text), add_special_tokens=False)['input_ids']
                wanted = (ids + [split.meta['pad_id']] * LENGTH)[:LENGTH]
                assert split.explanations[row, slot].tolist() == wanted


def check_ledger(world, prompt_tokens: int, answer_tokens: int) -> None:
    made = json.loads((world / 'data' / 'train' / 'labels.json').read_text())['ledger']
    assert (made['prompt_tokens'], made['answer_tokens']) == (prompt_tokens, answer_tokens)
    assert made['cost'] == pytest.approx((300 * prompt_tokens + 2000 * answer_tokens) / 1e6, rel=1e-9)
    records = [r for k in ('labels', 'failures') for r in read_jsonl(world / 'data-labels' / f'{k}.jsonl')]
    assert sum(r['cost'] for r in records) == pytest.approx(made['cost'], rel=1e-9)


def used(server: FakeServer) -> tuple[int, int]:
    """Prompt and answer tokens of all requests, counted as the server does."""
    prompts = sum(len(b['messages'][0]['content'].split()) for b in server.requests)
    return prompts, sum(len(server.answer(b).split()) for b in server.requests)


def test_one_run(world, tokenizer, capsys, monkeypatch):
    before, together = arrays_of(world / 'data'), threading.Barrier(6)

    def script(number, body):
        if number < 6:
            together.wait(HANG_S)  # six requests are under way at once

    with FakeServer(answer=features, script=script, key='secret') as a:
        monkeypatch.setenv('LABEL_TEST_KEY', 'secret')
        last = label(options(world, a.url, max_concurrency=6, api_key_env='LABEL_TEST_KEY'))
    assert len(a.requests) == JOBS and a.most_in_flight == 6
    assert len({text_of(b) for b in a.requests}) == JOBS
    assert set(a.requests[0]) == {'model', 'messages', 'max_tokens', 'temperature'}
    assert last.endswith(
        f'{world / "data"}: {TRAIN} of {TRAIN} train, {VALIDATION} of {VALIDATION} validation documents have labels'
    )
    out = capsys.readouterr().out
    assert re.search(rf'{JOBS}/{JOBS} labels  127.0.0.1:\d+ \d+ tok/s  ETA 0:00', out) and 'secret' not in out
    check_arrays(world / 'data', tokenizer, {'train': TRAIN, 'validation': VALIDATION})
    check_ledger(world, *used(a))
    after = arrays_of(world / 'data')
    assert all((after[k] == v).all() for k, v in before.items()) and len(after) == len(before) + 4
    assert not list((world / 'data').rglob('.*')) and 'secret' not in str(tree(world))

    written = tree(world)
    assert label(options(world)) == last and tree(world) == written  # nothing is left to ask: no server is needed


def test_only_labelled_documents_go_into_a_new_folder(world, tokenizer):
    """Refused, unreadable and unanswered ones are counted; another command asks only where no server answered."""
    folder = world / 'data' / 'train'
    texts = {}

    def fate(text: str) -> str:
        """By the document: its first words are the same at every position."""
        document = next(d for t, d in texts.items() if t.startswith(text))
        return {3: 'refused', 7: 'one feature', 9: 'away'}.get(document, 'fine')

    tokens, lengths = np.load(folder / 'tokens.npy'), np.load(folder / 'lengths.npy')
    for row in range(TRAIN):
        texts[tokenizer.decode(tokens[row, : lengths[row]], skip_special_tokens=True)] = row
    validation = np.load(world / 'data/validation/tokens.npy')
    texts |= {tokenizer.decode(v, skip_special_tokens=True): -1 for v in validation}

    def answer(body):
        one = '<analysis>\nonly one\n</analysis>'
        return one if fate(text_of(body)) == 'one feature' else features(body)

    def script(number, body):
        return {'refused': 'refuse', 'away': '500'}.get(fate(text_of(body)))

    given = {'out': str(world / 'new'), 'splits': 'train', 'attempts': 2, 'max_concurrency': 3}
    with FakeServer(answer=answer, script=script) as a:
        last = label(options(world, a.url, **given))
        asked = [fate(text_of(b)) for b in a.requests]
        counts = {k: asked.count(k) for k in ('refused', 'one feature', 'away', 'fine')}
        assert counts == {'refused': 3, 'one feature': 6, 'away': 9, 'fine': 3 * (TRAIN - 3)}
        assert f'{TRAIN - 3} of {TRAIN} train documents have labels' in last
        for reason in ('3 fewer than 2 features', '3 HTTP 400: refused by script', '3 HTTP 500'):
            assert reason in last
        failures = read_jsonl(world / 'data-labels' / 'failures.jsonl')
        assert sorted({(r['row'], r['kind']) for r in failures}) == [(3, 'refused'), (7, 'answer'), (9, 'failed')]
        assert len(failures) == 3 + 6 + 3
        a.script = None
        label(options(world, a.url, **given))
        assert len(a.requests) == len(asked) + 3  # those that no server had answered
        last = label(options(world, a.url, **given, retry_failures=True))
        assert len(a.requests) == len(asked) + 3 + 3 + 6
    assert f'{TRAIN - 1} of {TRAIN} train' in last
    check_arrays(world / 'new', tokenizer, {'train': TRAIN - 1})
    new, old = arrays_of(world / 'new'), arrays_of(world / 'data')
    kept = np.arange(TRAIN) != 7
    for name in ('tokens', 'lengths', 'doc_id', 'facts'):
        assert (new[f'train/{name}'] == old[f'train/{name}'][kept]).all()
        assert (new[f'validation/{name}'] == old[f'validation/{name}']).all()
    assert 'train/positions' not in old and 'validation/positions' not in new
    assert data.open_split(str(world / 'new'), 'train', vocab_size=len(tokenizer)).meta['documents'] == TRAIN - 1
    with pytest.raises(
        LensError, match=r'1 documents of .*train have no label \(3 fewer than 2 features\): give --out'
    ):
        label(options(world, **given | {'out': '', 'finish': True}))


def test_labels_count_once_and_only_of_documents_that_are_asked_for(world, tokenizer):
    with FakeServer(answer=features) as a:
        label(options(world, a.url))
    log = world / 'data-labels' / 'labels.jsonl'
    log.write_text(log.read_text() + log.read_text())
    label(options(world, max_documents=4, out=str(world / 'new')))
    check_arrays(world / 'new', tokenizer, {'train': 4, 'validation': 4})
    made = json.loads((world / 'new/train/labels.json').read_text())
    explanations = np.load(world / 'new/train/explanations.npy')
    filler = json.loads((world / 'new/train/meta.json').read_text())['filler_id']
    assert (made['labels'], made['filled_tokens']) == (4 * POSITIONS, (explanations == filler).sum())


def test_a_dry_run_sends_and_writes_nothing(world, tokenizer, capsys):
    before = tree(world)
    last = label(options(world, 'http://127.0.0.1:1', dry_run=True))
    out = capsys.readouterr().out
    shown = re.findall(r'--- prompt \d: train document (\d+), position (\d+)\n', out)
    assert len({d for d, _ in shown}) == 3 and out.count('</text>') == 3
    assert tree(world) == before
    calls, prompt, answer = (int(n.replace(',', '')) for n in re.findall(r'([\d,]+) (?:calls|prompt|answer)', last)[:3])
    with FakeServer(answer=features) as a:
        label(options(world, a.url))
    sent = [len(tokenizer(b['messages'][0]['content'])['input_ids']) for b in a.requests]
    assert calls == JOBS and prompt == pytest.approx(sum(sent), rel=0.02)
    cost = (300 * prompt + 2000 * answer) / 1e6
    most = (300 * prompt + 2000 * 300 * calls) / 1e6
    assert f'cost {cost:.2f}, with --max_tokens for every answer {most:.2f}.' in last


def test_max_cost_is_never_exceeded_and_the_rest_is_done_later(world, tokenizer):
    def long(body):  # as many tokens as are allowed
        said = features(body)
        return said + ' so' * (body['max_tokens'] - len(said.split()))

    with FakeServer(answer=long) as a:
        limit = 3.0
        with pytest.raises(LensError, match=r'--max_cost=3 is reached: \d+ labels \([\d,]+ prompt .*cost \d'):
            label(options(world, a.url, max_cost=limit, max_tokens=200))
        prompts, answers = used(a)
        spent = (300 * prompts + 2000 * answers) / 1e6
        longest = max(len(b['messages'][0]['content'].encode()) for b in a.requests)
        most = (300 * (longest + module.TEMPLATE_TOKENS) + 2000 * 200) / 1e6
        assert limit - 1.2 * most < spent <= limit and len(a.requests) < JOBS
        assert not (world / 'data/train/positions.npy').exists()
        asked = len(a.requests)
        with pytest.raises(LensError, match='--max_cost=3 is reached'):
            label(options(world, a.url, max_cost=limit, max_tokens=200))
        prompts, answers = used(a)
        assert (300 * prompts + 2000 * answers) / 1e6 <= limit and len(a.requests) < asked + 8
        label(options(world, a.url, max_tokens=200))
        assert len(a.requests) == JOBS
    check_ledger(world, *used(a))


def test_tokens_that_a_server_does_not_report_are_counted_here(world, tokenizer):
    with FakeServer(answer=features, usage=False) as a:
        last = label(options(world, a.url))
    assert f'({JOBS} answers counted with the tokenizer of the subject)' in last
    texts = [[b['messages'][0]['content'] for b in a.requests], [features(b) for b in a.requests]]
    check_ledger(world, *(sum(len(tokenizer(t)['input_ids']) for t in some) for some in texts))


def test_half_a_surrogate_pair_is_counted_like_any_text(world):
    with FakeServer(answer=lambda body: features(body) + ' \ud800', usage=False) as a:
        last = label(options(world, a.url))
    assert f'({JOBS} answers counted with the tokenizer of the subject)' in last


def test_a_model_that_never_answers_well_is_stopped_early(world):
    with FakeServer(answer=lambda body: 'I like stories.') as a:
        with pytest.raises(LensError, match=r'20 answers and not one label \(.*10 no closed analysis tag.*add --retry'):
            label(options(world, a.url, max_concurrency=1))
        assert len(a.requests) == 20
    assert read_jsonl(world / 'data-labels/failures.jsonl')[0]['content'] == 'I like stories.'


# --- kills and disks ------------------------------------------------------------------------------------------


def test_stopped_at_any_time_the_same_command_goes_on(world, tokenizer):
    stopped, log = threading.Event(), world / 'data-labels' / 'labels.jsonl'
    script = lambda number, body: stopped.wait(HANG_S) and None if number >= 12 else None  # noqa: E731
    with FakeServer(answer=features, script=script) as a:

        def stop():
            deadline = time.monotonic() + HANG_S
            while len(a.requests) < 15 and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(
            LensError, match=r'Stopped by SIGTERM with 12 labels \([\d,]+ prompt .*\): the same command goes'
        ):
            label(options(world, a.url, max_concurrency=3))
        thread.join()
        stopped.set()
        lines = log.read_bytes().splitlines(keepends=True)
        assert len(lines) == 12
        log.write_bytes(b''.join(lines[:11]) + lines[11][:30])  # a kill in the middle of a line
        label(options(world, a.url))
        assert len(a.requests) == 15 + JOBS - 11
    places = [(r['split'], r['row'], r['slot']) for r in read_jsonl(log)]
    assert len(places) == len(set(places)) == JOBS
    check_arrays(world / 'data', tokenizer, {'train': TRAIN, 'validation': VALIDATION})


def test_the_ledger_keeps_failures_and_costs_over_commands(world):
    """A journal of rows forgets what failed; this one asks again only where no server has answered."""
    work = module.Labelling(options(world, attempts=2))
    work.journal.open()
    one, two, three, four = (next(work._jobs) for _ in range(4))
    usage = {'prompt_tokens': 1000, 'answer_tokens': 10}
    failed = {'kind': 'answer', 'reason': 'empty answer'}
    assert [work.journal.add('failures', one, failed | usage) for _ in range(2)] == [False, True]
    assert work.journal.add('failures', two, {'kind': 'refused', 'reason': 'HTTP 400'})
    assert not work.journal.add('failures', three, {'kind': 'failed', 'reason': 'HTTP 500'})
    assert work.journal.add('labels', four, {'text': 'a'} | usage)
    assert work.journal.counts == {'data': 1, ledger.WITHOUT: 3}
    work.journal.close()
    for retry, left in ((False, JOBS - 3), (True, JOBS - 1)):
        again = module.Labelling(options(world, retry_failures=retry))
        assert again.estimate()[0] == left
        assert again.journal.cost == pytest.approx(3 * (1000 * 300 + 10 * 2000) / 1e6)
        assert again.journal.counts == {'data': 1, ledger.WITHOUT: 0 if retry else 2}


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'model': ''}, '--model is needed'),
        ({'data': 'nowhere'}, 'nowhere/train/meta.json does not exist'),
        ({'tokenizer': 'configs'}, 'configs/tokenizer.json does not exist'),
        ({'splits': 'test'}, "--splits='test' is not train, validation or train,validation"),
        ({'labels': '/dev/null/labels'}, '/dev/null/labels cannot be written'),
        ({'out': '/dev/null/out'}, '/dev/null'),
        ({'out': 'configs', 'force': True}, 'configs exists and is no folder of tokens'),
        ({'min_position': 900}, 'has no document with a token from position 900 on'),
        ({'max_documents': 4}, 'documents that get no label'),
        ({'instruction': 'nowhere.txt'}, '--instruction=nowhere.txt cannot be read'),
        ({'instruction': 'README.md'}, 'must contain {text} exactly once'),
        ({'max_cost': 1.0, 'price_in': 0.0, 'price_out': 0.0}, '--max_cost needs the prices'),
        ({'api_key_env': 'NO_SUCH_KEY'}, '--api_key_env=NO_SUCH_KEY: this environment variable holds no API key'),
        ({'server_urls': 'localhost'}, "'localhost' in --server_urls is no URL"),
        ({'finish': True}, 'there are no labels yet'),
    ],
)
def test_errors_before_anything_is_asked(world, given, message):
    before = tree(world)
    with pytest.raises(LensError, match=re.escape(message)):
        label(options(world, **{'server_urls': 'http://127.0.0.1:1'} | given))
    assert tree(world) == before and not (world / 'data-labels').exists()


def test_another_tokenizer_and_given_explanations_are_refused(stories, world):
    other = world / 'tokenizer'
    shutil.copytree(SUBJECT, other, ignore=shutil.ignore_patterns('*.safetensors'))
    vocabulary = json.loads((other / 'tokenizer.json').read_text())
    (other / 'tokenizer.json').write_text(json.dumps(vocabulary, indent=7))
    with pytest.raises(LensError, match='was made with another tokenizer than that of'):
        label(options(world, tokenizer=str(other)))
    shape = (TRAIN, 2)
    np.save(world / 'data/train/positions.npy', np.full(shape, 60, np.int32))
    np.save(world / 'data/train/explanations.npy', np.zeros((*shape, 4), np.int32))
    with pytest.raises(LensError, match=r'positions\.npy exists and was not made by this command: --force'):
        label(options(world))
    shutil.copytree(stories / 'data', world / 'other')
    with pytest.raises(LensError, match='other exists and was not made by this command: --force'):
        label(options(world, out=str(world / 'other')))


def test_settings_that_differ_are_refused(world):
    with FakeServer(answer=features) as a:
        label(options(world, a.url))
    for changed, given in (('seed 42', {'seed': 1}), ('positions 3', {'positions': 4}), ('instruction', {'words': 5})):
        with pytest.raises(LensError, match=f'settings.json says {changed}.*another --labels'):
            label(options(world, **given))
    log = world / 'data-labels' / 'labels.jsonl'
    good = {'split': 'train', 'row': 0, 'slot': 0, 'prompt_tokens': 1, 'answer_tokens': 1, 'cost': 0.1, 'text': 'a'}
    for wrong in (
        {'cost': float('nan')},
        {'cost': -1},
        {'cost': '1'},
        {'answer_tokens': 1e999},
        {'prompt_tokens': None},
        {'row': -1},
        {'row': 10**9},
        {'row': True},
        {'row': [0]},
        {'slot': 'a'},
        {'split': []},
        {'reason': ['x']},
    ):
        log.write_text(json.dumps(good | wrong) + '\n')
        with pytest.raises(LensError, match=r'labels.jsonl is damaged \(the record at byte 0'):
            label(options(world))


def test_a_server_that_wants_a_key(world, monkeypatch):
    monkeypatch.setattr(servers, 'START_S', 0.0)
    with FakeServer(key='secret') as a, pytest.raises(LensError, match='HTTP 401 from /models, it wants an API key'):
        label(options(world, a.url))
    assert not (world / 'data-labels').exists()
