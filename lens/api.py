"""What a server of a lens answers: for each route what a request may hold, and the steps of work that answer it.

Names are those of open servers of the kind where they have one. The tables here are the validation and the description of
the routes (OpenAPI) at once. Steps run in the thread of lens.jobs: the first one refuses bad input and gives the head of the
answer, a dict; each further one gives a result of it, or None where there is none yet.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lens import prompted, reading, spoken, steer
from lens.errors import LensError
from lens.reader import MOST_SAMPLES, Reader, Text, ranked
from lens.schemas import NUMBER, Schema, check, may, record

MOST_TEXT, MOST_TEXTS, MOST_MESSAGES = 65_536, 64, 256
MOST_EXPLANATIONS = 4096  # of a request: positions * samples
MOST_NUMBERS = 1 << 20  # of activations that a request holds or asks for
MOST_STEPS = 512
EDIT_STEPS = (8, 20, 40)  # each is a program
LIMITS = {
    'max_input_chars': MOST_TEXT,
    'max_positions_per_request': MOST_EXPLANATIONS,
    'max_describe_batch': MOST_TEXTS,
    'max_completion_tokens': MOST_STEPS,
}

Value = Mapping[str, Any]


STRING: Schema = {'type': 'string', 'maxLength': MOST_TEXT}
VECTOR: Schema = {'type': 'array', 'items': NUMBER, 'minItems': 1, 'maxItems': 1 << 15}
IDS: Schema = {'type': 'array', 'items': {'type': 'integer', 'minimum': 0}, 'minItems': 1, 'maxItems': 1 << 15}
MESSAGE = record(
    {
        'role': {'type': 'string', 'maxLength': 100},
        'content': STRING | {'default': ''},
        'thinking': may(STRING, about='What the assistant thought before it.'),
        'channel': {'enum': [None, 'final'], 'description': 'What was thought is in `thinking`.'},
    },
    'role',
)
SOURCE: dict[str, Schema] = {
    'text': may(STRING, about='Text that is read; or give messages or token_ids.'),
    'messages': may(
        {'type': 'array', 'items': MESSAGE, 'minItems': 1, 'maxItems': MOST_MESSAGES},
        about='Chat that is read by the template of the subject. The text is then not looked at.',
    ),
    'token_ids': may(IDS, about='Tokens that are read. The others are then not looked at.'),
    'enable_thinking': {'enum': [None, False], 'description': 'Thinking is given in messages.'},
    'add_generation_prompt': {
        'enum': [True],
        'description': 'A chat that does not end with the assistant asks for it.',
    },
    'continue_final_message': {'enum': [False]},
}
DRAWN: dict[str, Schema] = {
    'temperature': {'type': 'number', 'minimum': 0, 'maximum': 5, 'default': 1.0, 'description': 'Of what is drawn.'},
    'seed': {'type': 'integer', 'minimum': 0, 'maximum': 2**31 - 1, 'default': 0},
    'samples': {
        'type': 'integer',
        'minimum': 1,
        'maximum': MOST_SAMPLES,
        'default': 1,
        'description': 'Explanations of each: the most probable one, the others drawn.',
    },
    'best_of': may(
        {'type': 'integer', 'minimum': 1, 'maximum': MOST_SAMPLES},
        about='Draw so many instead, the best recovery first.',
    ),
    'salience': {'type': 'boolean', 'default': True, 'description': 'Read each explanation without each of its words.'},
    'max_new_tokens': {
        'type': 'integer',
        'minimum': 1,
        'maximum': 4096,
        'description': 'Changes nothing: explanations are as long as in training.',
    },
    'stream': {'type': 'boolean', 'default': False, 'description': 'Answer by server-sent events, [DONE] at the end.'},
}
SAMPLING = record(
    {
        'temperature': DRAWN['temperature'],
        'max_new_tokens': {'type': 'integer', 'minimum': 1, 'maximum': 4096, 'default': 200},
        'skip_special_tokens': {'type': 'boolean', 'default': False},
        'sampling_seed': may(DRAWN['seed'], about='Of what is drawn; another one each time, if it is missing.'),
        **{
            k: {'enum': [x], 'default': x, 'description': 'Every token may be drawn.'}
            for k, x in (('top_p', 1), ('top_k', -1), ('min_p', 0))
        },
    }
)
CONTEXT = may(
    {'type': 'array', 'items': IDS, 'minItems': 1, 'maxItems': MOST_TEXTS},
    about='For each, the tokens up to the one it is of: a lens that also reads the last of them needs it.',
)


class Route(NamedTuple):
    """about: a sentence; properties, required: of a request; gives: keys of the answer; results: key of the answer
    under which all but its head stand, '' where the head is all."""

    about: str
    properties: dict[str, Schema]
    required: tuple[str, ...]
    gives: dict[str, str]
    results: str
    steps: Callable[[Reader, Value], Iterator[dict | None]]


def source(v: Value) -> Text:
    """Returns what a request gives to read. Raises LensError."""
    if v['token_ids']:
        return v['token_ids']
    if v['messages']:
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
    return (ranked(row) if best_of else row).to_json() | {'mse': _mse(row.cosine)}


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
    how = check(v['sampling_params'] or {}, SAMPLING, 'sampling_params')
    seed = secrets.randbelow(2**31) if how['sampling_seed'] is None else how['sampling_seed']
    settings = {'length': how['max_new_tokens'], 'temperature': how['temperature'], 'seed': seed}
    d = reader.base.config.d_model
    if wrong := [len(x) for x in v['input_embeds'] if len(x) != d]:
        raise LensError(f'input_embeds has a row of {wrong[0]} numbers, the decoder reads {d}.')
    said = prompted.say(reader, v['input_embeds'], **settings)
    text = reader.tokenizer.decode(said.ids, skip_special_tokens=how['skip_special_tokens'])
    logp = [[p, i, None] for p, i in zip(said.logp, said.ids, strict=True)]
    about = {'prompt_tokens': len(v['input_embeds']), 'completion_tokens': len(said.ids), 'output_token_logprobs': logp}
    yield {'text': text, 'meta_info': about | {'finish_reason': {'type': 'stop' if said.stopped else 'length'}}}


def _vectors(reader: Reader, given: list[list]) -> np.ndarray:
    """Raises LensError where one is not of the lens."""
    d = reader.base.config.d_model
    if wrong := [len(x) for x in given if len(x) != d]:
        raise LensError(f'An activation of {wrong[0]} numbers was given, those of this lens have {d}.')
    return np.asarray(given, np.float32)


_POSITIONS = {'type': 'array', 'items': {'type': 'integer'}, 'minItems': 0, 'maxItems': MOST_EXPLANATIONS}
AT = may(_POSITIONS, about='Tokens that are read, -1 the last one. All, if it is empty or missing.')
ONE: Schema = {'type': 'integer', 'default': -1}
TOKENS = {'tokens': 'array', 'prompt_length': 'integer', 'text': 'string'}
FIGURES = {'description': 'string', 'nmse': 'number', 'mse': 'number', 'cosine_similarity': 'number'}
ROUTES = {
    '/tokenize': Route('Tokens of a text or chat, and whose they are.', SOURCE, (), TOKENS, '', tokenize),
    '/explain': Route(
        'What the subject carries at tokens of a text or chat, in words.',
        SOURCE
        | DRAWN
        | {
            'positions': AT,
            'reverse': {'type': 'boolean', 'default': False, 'description': 'From the last position to the first.'},
            'prompt_length': may({'type': 'integer', 'minimum': 0}, about='Tokens from there on are `generated`.'),
        },
        (),
        {
            'layer_index': 'integer',
            'total': 'integer',
            'prompt_length': 'integer',
            'tokens': 'array',
            'results': 'array',
        },
        'results',
        explain,
    ),
    '/describe': Route(
        'Activations in words.',
        DRAWN
        | {
            'activations': {'type': 'array', 'items': VECTOR, 'minItems': 1, 'maxItems': MOST_TEXTS},
            'context': CONTEXT,
            'per_prompt': {
                'type': 'integer',
                'minimum': 1,
                'maximum': MOST_TEXTS,
                'default': 1,
                'description': 'So many of them after each other are one prompt, one in each of its slots.',
            },
        },
        ('activations',),
        {'layer_index': 'integer', 'total': 'integer', 'results': 'array'},
        'results',
        describe,
    ),
    '/extract': Route(
        'Activations of a text or chat.',
        SOURCE | {'positions': AT},
        (),
        {'layer_index': 'integer', 'tokens': 'array'},
        'tokens',
        extract,
    ),
    '/score': Route(
        'How well words recover an activation.',
        {'activation': VECTOR, 'description': STRING, 'context': may(IDS, about='The tokens up to the one it is of.')},
        ('activation', 'description'),
        FIGURES,
        '',
        score,
    ),
    '/compare': Route(
        'The difference of two activations, a - b, in words.',
        {
            'activation_a': may(VECTOR, about='Give both, or two texts.'),
            'activation_b': may(VECTOR, about='Give both, or two texts.'),
            'text_a': may(STRING, about='Its activation at position_a is a.'),
            'text_b': may(STRING, about='Its activation at position_b is b.'),
            'position_a': ONE,
            'position_b': ONE,
            **{k: DRAWN[k] for k in ('temperature', 'seed', 'max_new_tokens')},
        },
        (),
        FIGURES | {'diff_norm': 'number', 'results': 'array'},
        '',
        compare,
    ),
    '/completion': Route(
        'How the subject goes on: the most probable token each time, to the end of its turn or of what was asked for.',
        SOURCE
        | {
            'completion_tokens': {'type': 'integer', 'minimum': 1, 'maximum': MOST_STEPS, 'default': 16},
            'temperature': {'type': 'number', 'minimum': 0, 'maximum': 5, 'description': 'Changes nothing.'},
            'stream': DRAWN['stream'],
        },
        (),
        TOKENS | {'completion': 'string'},
        '',
        completion,
    ),
    '/generate': Route(
        'What the decoder says after a prompt of rows, the activation among them, as servers of language models take it.',
        {
            'input_embeds': {'type': 'array', 'items': VECTOR, 'minItems': 2, 'maxItems': 1 << 15},
            'sampling_params': SAMPLING,
            'stream': {'enum': [False]},
        },
        ('input_embeds',),
        {'text': 'string', 'meta_info': 'object'},
        '',
        generate,
    ),
    '/edit': Route(
        'Other words for one activation, put back: what the subject then predicts, beside controls of the same size.',
        SOURCE
        | {
            'position': ONE,
            'description': STRING,
            'before': may(
                STRING, IDS, about='The words that are replaced, or their tokens; those of the lens, if it is missing.'
            ),
            'unrelated': may(STRING, about='Words of the control.'),
            'strength': {'type': 'number', 'minimum': -100, 'maximum': 100, 'default': 1.0},
            'mode': {'enum': list(steer.MODES), 'default': steer.MODES[0]},
            'steps': {
                'enum': list(EDIT_STEPS),
                'default': EDIT_STEPS[1],
                'description': 'Tokens that it goes on with.',
            },
            'seed': DRAWN['seed'],
        },
        ('description',),
        {
            'position': 'integer',
            'token': 'string',
            'before': 'string',
            'after': 'string',
            'size': 'number',
            'outcomes': 'object',
        },
        '',
        edit,
    ),
}


def request_schema(route: Route) -> Schema:
    """Returns what the body of a request may be."""
    return record(route.properties, *route.required)
