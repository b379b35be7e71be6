"""The real vLLM engine serves models that we wrote, and the chain of data generation runs against it.

`make test-vllm` makes the models and runs this; pytest without arguments leaves the folder out.
"""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from data_gen import turns
from data_gen.storyworld import chats as story_chats
from data_gen.storyworld import world
from lens import data, hf

ROOT = pathlib.Path(__file__).parents[2]
CHAT = {family: ROOT / 'data/tiny_chat' / family for family in ('gpt_oss', 'llama')}
SUBJECT = ROOT / 'configs/tiny_subject'
ROWS = 48
RIGHT = 0.6  # least share of answers that are right word by word; what is checked is the chain, not the model
SEQ_LEN = 256
READY_S, STOP_S = 300, 60
# what stands before the thinking, between it and the answer, and after the answer
AROUND = {
    'gpt_oss': (
        '<|end|><|start|>assistant<|channel|>analysis<|message|>',
        '<|end|><|start|>assistant<|channel|>final<|message|>',
        '<|return|>',
    ),
    'llama': ('<|end|><|assistant|><think>', '</think>\n', '<|end|>'),
}


def descendants(pid: int) -> set[int]:
    """Ids of all processes below `pid`."""
    parent = {}
    for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            parent[int(stat.parent.name)] = int(stat.read_text().rpartition(')')[2].split()[1])
    found, new = set(), {pid}
    while new := {p for p, q in parent.items() if q in new} - found:
        found |= new
    return found


def running(pid: int) -> bool:
    try:
        state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except OSError:
        return False
    return state not in 'ZX'


@contextlib.contextmanager
def served(model: pathlib.Path, log: pathlib.Path):
    """The URL of a server of `model`; at the end none of its processes is left."""
    command = [ROOT / 'launch/serve_vllm.sh', model, '--served-model-name=tiny', '--dtype=float32']
    command += ['--max-model-len=512', f'--ready-timeout={READY_S}', f'--log={log}']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    family = set()
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith('Ready after'):
                break
        else:
            pytest.fail(f'no server: {"".join(said)}')
        family = descendants(process.pid)
        yield said[-1].split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=STOP_S)
    assert len(family) > 1
    assert not [p for p in family if running(p)]


def post(url: str, **body) -> dict:
    request = urllib.request.Request(url, json.dumps({'model': 'tiny', 'temperature': 0} | body).encode())
    request.add_header('Content-Type', 'application/json')
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def run(module: str, *options) -> None:
    """One of our commands, as a user gives it."""
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    done = subprocess.run(
        [sys.executable, '-m', module, *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def generate(url: str, family: str, questions: pathlib.Path, out: pathlib.Path, *options) -> list[dict]:
    """The rows that data_gen.generate makes of the questions, in their order."""
    run(
        'data_gen.generate',
        f'--input_dataset={questions}',
        f'--output_path={out}',
        f'--server_urls={url}',
        '--model=tiny',
        f'--tokenizer={CHAT[family]}',
        '--temperature=0',
        *options,
    )
    rows = [json.loads(line) for line in (out / 'data.jsonl').read_text().splitlines()]
    return sorted(rows, key=lambda r: r['index'])


@pytest.fixture(scope='module')
def chats():
    return story_chats.first_chats(ROWS, index=world.FIRST_VALIDATION_INDEX)


@pytest.fixture
def questions(tmp_path, chats):
    path = tmp_path / 'questions.jsonl'
    path.write_text(''.join(json.dumps(story_chats.row(c)) + '\n' for c in chats))
    return path


def test_the_engine_completes_stories_as_our_own_model_does(tmp_path):
    tokenizer, model = hf.load_tokenizer(SUBJECT), hf.load_model(SUBJECT)
    prompts = [tokenizer(world.generate(7, i).text)['input_ids'][:20] for i in range(6)]
    ids = np.zeros((len(prompts), 44), np.int32)
    ids[:, :20] = prompts
    for t in range(20, 44):
        ids[:, t] = np.argmax(model(ids)[:, t - 1], -1)
    with served(SUBJECT, tmp_path / 'log') as url:
        choices = post(url + '/completions', prompt=prompts, max_tokens=24, ignore_eos=True, return_token_ids=True)
        said = post(url + '/chat/completions', messages=[{'role': 'user', 'content': 'Hello'}], max_tokens=8)
    assert [c['token_ids'] for c in choices['choices']] == ids[:, 20:].tolist()
    assert said['choices'][0]['message']['content']


@pytest.mark.parametrize('family', CHAT)
def test_thinking_goes_from_the_engine_to_tokens_with_roles(family, chats, questions, tmp_path):
    tokenizer, out = hf.load_tokenizer(CHAT[family]), tmp_path / 'chats'
    with served(CHAT[family], tmp_path / 'log') as url:
        rows = generate(url, family, questions, out, '--max_completion_tokens=100')
        sent = [{'role': 'system', 'content': rows[0]['system']}, rows[0]['messages'][0]]
        raw = post(url + '/chat/completions', messages=sent, max_tokens=100, return_token_ids=True)
        cut = post(url + '/chat/completions', messages=sent, max_tokens=9)['choices'][0]

    answers = [r['messages'][-1] for r in rows]
    assert [r['messages'][0]['content'] for r in rows] == [c.prompt for c in chats]
    assert {r['finish_reason'] for r in rows} == {'stop'}
    right = [(a.get('thinking'), a['content']) == (c.thinking, c.content) for a, c in zip(answers, chats, strict=True)]
    print(f'{family}: {sum(right)} of {len(right)} answers are right')
    assert np.mean(right) >= RIGHT
    # an answer that ends inside its thinking is thinking alone
    thinking, content = turns.extract(cut['message'])
    assert (content, cut['finish_reason']) == ('', 'length')
    assert thinking and answers[0]['thinking'].startswith(thinking)

    options = [f'--input={out}/dataset', f'--tokenizer={CHAT[family]}', f'--out={out}/tokens', f'--seq_len={SEQ_LEN}']
    run('data_gen.pretokenize', *options)
    splits = [data.open_split(str(out / 'tokens'), s, vocab_size=len(tokenizer)) for s in ('train', 'validation')]
    names = splits[0].meta['roles']
    seen = {}
    for split in splits:
        for ids, roles, n, row in zip(split.tokens, split.role, split.lengths, split.doc_id, strict=True):
            ids, roles = np.array(ids[:n]), np.array(roles[:n])
            check_roles(family, tokenizer, ids, {k: roles == v for k, v in names.items()}, rows[row])
            seen[int(row)] = ids
    assert sorted(seen) == list(range(ROWS))
    # our tokens of an answer are those that the engine sampled
    sampled = raw['choices'][0]['token_ids']
    assert seen[0][-len(sampled) :].tolist() == sampled


def check_roles(family: str, tokenizer, ids, of: dict, row: dict) -> None:
    """Every token of a document has the role of the text it comes from. of: role -> bool [n]."""
    user, answer = row['messages']
    assert tokenizer.decode(ids[of['user']]) == user['content']
    assert tokenizer.decode(ids[of['thinking']]) == answer.get('thinking', '')
    assert tokenizer.decode(ids[of['final']]) == answer['content']
    assert of['system'].any() and not of['text'].any()
    if not answer.get('thinking') or not answer['content']:  # a wrong answer of the tiny model
        return
    last = np.flatnonzero(of['user'])[-1] + 1
    before, between, after = AROUND[family]
    tail = f'{before}{answer["thinking"]}{between}{answer["content"]}{after}'
    assert tokenizer.decode(ids[last:]) == tail
    # the runs: what is before the thinking, it, what is between, the answer, and its end
    runs = [k for k, _ in itertools.groupby(next(n for n, m in of.items() if m[t]) for t in range(last, len(ids)))]
    assert runs == ['special', 'thinking', 'special', 'final', 'special']
