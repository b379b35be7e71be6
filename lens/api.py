"""What a server of a lens answers: for each route what a request may hold, and the steps of work that answer it.

Steps run in the thread of lens.jobs: the first one refuses bad input and gives the head of the
answer, a dict; each further one gives a result of it, or None where there is none yet.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lens import prompted, reading, schemas, spoken, steer
from lens.errors import LensError
from lens.reader import Reader, Text
from lens.schemas import MOST_EXPLANATIONS

MOST_NUMBERS = 1 << 20  # of activations that a request asks for
LIMITS = {
    'max_input_chars': schemas.MOST_TEXT,
    'max_positions_per_request': MOST_EXPLANATIONS,
    'max_new_tokens': schemas.MOST_LENGTH,
    'max_description_chars': schemas.MOST_TEXT,
    'max_describe_batch': schemas.MOST_TEXTS,
    'max_completion_tokens': schemas.MOST_STEPS,
}

Value = Mapping[str, Any]


class Route(NamedTuple):
    """about: a sentence; takes: what a request may hold; gives: keys of the answer; results: key of the answer
    under which all but its head stand, '' where the head is all."""

    about: str
    takes: type[schemas.Request]
    gives: dict[str, str]
    results: str
    steps: Callable[[Reader, Value], Iterator[dict | None]]


def source(v: Value) -> Text:
    """Returns what a request gives to read. Raises LensError."""
    if v['token_ids']:
        return v['token_ids']
    if v['messages']:
        if v['add_generation_prompt'] is False and v['messages'][-1]['role'] != 'assistant':
            raise LensError('add_generation_prompt=false is for a chat that ends with the assistant: leave it out.')
        return [{k: m[k] for k in ('role', 'content', 'thinking') if m[k] is not None} for m in v['messages']]
    if v['text'] is None:
        raise LensError('Give text, messages or token_ids: what is to be read.')
    return v['text']


def _owner(role: str, message: int, messages: list | None) -> dict:
    """Whose a token is, by the names of open servers."""
    chat = messages or []
    whose = chat[message]['role'] if 0 <= message < len(chat) else 'assistant' if message >= 0 else None
    channel = {'thinking': 'analysis', 'final': 'final'}.get(role)
    section = 'scaffold' if role == 'special' else 'content'
    return {
        'role': whose,
        'part': role,
        'section': section,
        'channel': channel,
        'message_index': None if message < 0 else message,
    }


def _tokens(found: spoken.Tokens, messages: list | None) -> list[dict]:
    parts = zip(found.texts, found.ids, found.fragments, found.roles, found.messages, strict=True)
    return [
        {'token': t, 'token_id': i, 'position': p, 'fragment_index': k, 'fragment_count': n} | _owner(role, m, messages)
        for p, (t, i, (k, n), role, m) in enumerate(parts)
    ]


def _mse(cosine: float) -> float:
    """Of activation and reconstruction at one norm, as open servers have it."""
    return max(2 - 2 * cosine, 0.0)


def _said(row: reading.Row, v: Value) -> dict:
    best_of = v.get('best_of') is not None
    return (reading.ranked(row) if best_of else row).to_json() | {'mse': _mse(row.cosine)}


def _how(v: Value) -> dict:
    drawn = v['best_of'] is not None
    how = {'samples': v['best_of'] or v['samples'], 'greedy': not drawn}
    return how | {k: v[k] for k in ('temperature', 'seed', 'salience')}


def _bounded(n: int, samples: int) -> None:
    if n * samples > MOST_EXPLANATIONS:
        raise LensError(
            f'{n} positions with {samples} explanations each are {n * samples}, at most {MOST_EXPLANATIONS} are made: give '
            'fewer positions.'
        )


def tokenize(reader: Reader, v: Value) -> Iterator[dict]:
    found = reader.tokens(source(v))
    whole = reader.tokenizer.decode(found.ids)
    yield {'tokens': _tokens(found, v['messages']), 'prompt_length': len(found.ids), 'text': whole}


def explain(reader: Reader, v: Value) -> Iterator[dict]:
    what, how = source(v), _how(v)
    found = reader.tokens(what)
    at = reader.positions(v['positions'] or None, len(found.ids))
    at = [*dict.fromkeys(at.tolist())][:: -1 if v['reverse'] else 1]
    _bounded(len(at), how['samples'])
    n = len(found.ids) if v['prompt_length'] is None else v['prompt_length']
    head = {'layer_index': reader.layer, 'total': len(at), 'prompt_length': n}
    yield head | {'about': reader.about(**how), 'tokens': _tokens(found, v['messages'])}
    for row in reader.explain_stream(what, at, **how):
        yield _said(row, v) | {'generated': row.position >= n} | _owner(row.role, row.message, v['messages'])


def describe(reader: Reader, v: Value) -> Iterator[dict]:
    a, how = _vectors(reader, v['activations']), _how(v)
    if len(a) % v['per_prompt']:
        raise LensError(f'{len(a)} activations do not make prompts of per_prompt={v["per_prompt"]}: give a multiple.')
    a = a.reshape(-1, v['per_prompt'], a.shape[1]) if v['per_prompt'] > 1 else a
    _bounded(len(a), how['samples'])
    yield {'layer_index': reader.layer, 'total': len(a)}
    size = max(reader.batch // how['samples'], 1)
    for i in range(0, len(a), size):
        context = v['context'] and v['context'][i : i + size]
        for k, row in enumerate(reader.describe(a[i : i + size], context, **how)):
            yield {'index': i + k} | _said(row, v)


def extract(reader: Reader, v: Value) -> Iterator[dict]:
    what = source(v)
    found, d = reader.tokens(what), reader.base.config.d_model
    at = reader.positions(v['positions'] or None, len(found.ids)).tolist()
    if len(at) * d > MOST_NUMBERS:
        raise LensError(
            f'{len(at)} activations of {d} numbers are too many, give at most {MOST_NUMBERS // d} positions.'
        )
    named = _tokens(found, v['messages'])
    yield {'layer_index': reader.layer}
    for p, a in zip(at, reader.activations(what, at), strict=True):
        yield named[p] | {'activation': a.tolist(), 'l2_norm': float(np.linalg.norm(a))}


def score(reader: Reader, v: Value) -> Iterator[dict]:
    found = reader.score(_vectors(reader, [v['activation']])[0], v['description'], v['context'])[0]
    cosine = found['cosine']
    yield {'description': found['text'], 'nmse': found['nmse'], 'mse': _mse(cosine), 'cosine_similarity': cosine}


def compare(reader: Reader, v: Value) -> Iterator[dict]:
    how = {k: v[k] for k in ('temperature', 'seed')}
    if v['activation_a'] is not None and v['activation_b'] is not None:
        a, b = (_vectors(reader, [v[k]])[0] for k in ('activation_a', 'activation_b'))
        size = float(np.linalg.norm(a - b))
        if size <= 1e-6 * np.linalg.norm(a):
            raise LensError('activation_a and activation_b are the same: give others.')
        rows = reader.describe((a - b) * (np.linalg.norm(a) / size), **how).rows
    elif v['text_a'] is not None and v['text_b'] is not None:
        made = reader.compare(*(v[k] for k in ('text_a', 'text_b', 'position_a', 'position_b')), **how)
        rows, size = made.rows, made.about['difference_norm']
    else:
        raise LensError('Give activation_a and activation_b, or text_a and text_b: what is compared.')
    yield _said(rows[-1], v) | {'diff_norm': size, 'results': [_said(r, v) for r in rows]}


def completion(reader: Reader, v: Value) -> Iterator[dict | None]:
    what, chat = source(v), v['messages'] or []
    found = reader.tokens(what)
    ids, n, vocabulary = list(found.ids), len(found.ids), reader.base.config.vocab_size
    prompt = _tokens(found, v['messages'])
    if v['stream']:
        yield {'type': 'prompt', 'prompt_length': n, 'tokens': prompt}
    # a chat that the assistant has not ended goes on in the same message
    message = len(chat) - (chat[-1]['role'] == 'assistant') if chat else -1
    owner, new = _owner('final' if chat else 'text', message, v['messages']), []
    for more in steer.go_on(reader, ids, v['completion_tokens']):
        ids += more
        new = [t | owner for t in _tokens(spoken.of_ids(reader.tokenizer, ids, vocabulary), None)[n:]]
        yield None  # others take a turn
        for token in new[len(new) - len(more) :] if v['stream'] else ():
            yield {'type': 'token', 'token': token}
    text = reader.tokenizer.decode(ids)
    if v['stream']:
        yield {'type': 'done', 'text': text}
    else:
        said = reader.tokenizer.decode(ids[n:], skip_special_tokens=True)
        yield {'tokens': prompt + new, 'prompt_length': n, 'text': text, 'completion': said}


def edit(reader: Reader, v: Value) -> Iterator[dict]:
    given = {k: v[k] for k in ('strength', 'before', 'unrelated', 'mode', 'steps', 'seed')}
    made = reader.edit(source(v), v['position'], v['description'], **given)
    yield made.to_json()


def generate(reader: Reader, v: Value) -> Iterator[dict]:
    how = v['sampling_params']
    seed = secrets.randbelow(2**31) if how['sampling_seed'] is None else how['sampling_seed']
    limits = prompted.Limits(**{k: how[k] for k in prompted.Limits._fields})
    settings = {'length': how['max_new_tokens'], 'temperature': how['temperature'], 'seed': seed, 'limits': limits}
    d = reader.base.config.d_model
    if wrong := [len(x) for x in v['input_embeds'] if len(x) != d]:
        raise LensError(f'input_embeds has a row of {wrong[0]} numbers, the decoder reads {d}.')
    said = prompted.say(reader, v['input_embeds'], **settings)
    shown = said.ids if said.end is None or how['no_stop_trim'] else said.ids[:-1]
    text = reader.tokenizer.decode(shown, skip_special_tokens=how['skip_special_tokens'])
    logp = [[p, i, None] for p, i in zip(said.logp, said.ids, strict=True)]
    about = {'prompt_tokens': len(v['input_embeds']), 'completion_tokens': len(said.ids), 'output_token_logprobs': logp}
    reason = {'type': 'stop', 'matched': said.end} if said.stopped else {'type': 'length', 'length': len(said.ids)}
    yield {'text': text, 'meta_info': about | {'finish_reason': reason}}


def _vectors(reader: Reader, given: list[list]) -> np.ndarray:
    """Raises LensError where one is not of the lens."""
    d = reader.base.config.d_model
    if wrong := [len(x) for x in given if len(x) != d]:
        raise LensError(f'An activation of {wrong[0]} numbers was given, those of this lens have {d}.')
    return np.asarray(given, np.float32)


TOKENS = {'tokens': 'array', 'prompt_length': 'integer', 'text': 'string'}
FIGURES = {'description': 'string', 'nmse': 'number', 'mse': 'number', 'cosine_similarity': 'number'}
HEAD = {'layer_index': 'integer', 'total': 'integer'}
ROUTES = {
    '/tokenize': Route('Tokens of a text or chat, and whose they are.', schemas.Source, TOKENS, '', tokenize),
    '/explain': Route(
        'What the subject carries at tokens of a text or chat, in words.',
        schemas.Explain,
        HEAD | {'prompt_length': 'integer', 'tokens': 'array', 'results': 'array'},
        'results',
        explain,
    ),
    '/describe': Route('Activations in words.', schemas.Describe, HEAD | {'results': 'array'}, 'results', describe),
    '/extract': Route(
        'Activations of a text or chat.',
        schemas.Extract,
        {'layer_index': 'integer', 'tokens': 'array'},
        'tokens',
        extract,
    ),
    '/score': Route('How well words recover an activation.', schemas.Score, FIGURES, '', score),
    '/compare': Route(
        'The difference of two activations, a - b, in words.',
        schemas.Compare,
        FIGURES | {'diff_norm': 'number', 'results': 'array'},
        '',
        compare,
    ),
    '/completion': Route(
        'How the subject goes on: the most probable token each time, to the end of its turn or of what was asked for.',
        schemas.Completion,
        TOKENS | {'completion': 'string'},
        '',
        completion,
    ),
    '/generate': Route(
        'What the decoder says after a prompt of rows, the activation among them, as servers of language models take it.',
        schemas.Generate,
        {'text': 'string', 'meta_info': 'object'},
        '',
        generate,
    ),
    '/edit': Route(
        'Other words for one activation, put back: what the subject then predicts, beside controls of the same size.',
        schemas.Edit,
        dict.fromkeys(('token', 'before', 'after'), 'string')
        | {'position': 'integer', 'size': 'number', 'outcomes': 'object'},
        '',
        edit,
    ),
}
