"""What a chat is: messages of other shapes, the column that holds them, thinking in fields, tags and channels."""

import json
import re

from lens.errors import LensError, shown

from .tables import Table

# columns of whole chats, the likelier first
KNOWN_COLUMNS = ('messages', 'conversation', 'conversations', 'chat', 'dialog', 'dialogue', 'turns')
ROLES = {  # other names, in small letters
    'user': ('human', 'prompter'),
    'assistant': ('gpt', 'bot', 'model', 'ai', 'chatgpt', 'bing', 'bard', 'claude', 'function_call', 'tool_call'),
    'tool': ('observation', 'function', 'function_response', 'tool_response', 'tool_result', 'ipython'),
    'system': (),
    'developer': (),
}
ROLES = {name: role for role, names in ROLES.items() for name in (role, *names)}
CALLS = ('function_call', 'tool_call')  # roles whose text is a call
# fields of an answer, or columns beside one
THINKING = (
    'thinking',
    'reasoning_content',
    'reasoning',
    'assistant_thinking',
    'thought',
    'thoughts',
    'reasoning_details',
)
# How models write their thinking before the answer: (opening, closing)
TAGS = [(f'<{t}>', f'</{t}>') for t in ('think', 'thinking', 'thought', 'reasoning', 'seed:think')]
TAGS += [('<|begin_of_thought|>', '<|end_of_thought|>'), ('[THINK]', '[/THINK]'), ('◁think▷', '◁/think▷')]
SOLUTION = re.compile(r'\s*<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>\s*)?\Z', re.DOTALL)
CHANNEL = re.compile(  # a message of an answer in Harmony
    r'(?:<\|start\|>)?(?:assistant)?<\|channel\|>(analysis|commentary|final)\s*<\|message\|>(.*?)'
    r'(?:<\|end\|>|<\|return\|>|(?=<\|start\|>)|(?=<\|channel\|>)|\Z)',
    re.DOTALL,
)
BARE = re.compile(  # the same without its control tokens
    r'assistant(?:analysis|final)|analysis(?=[^a-z\s.,:;!?…\'()/-]|.*assistantfinal)', re.DOTALL
)
NEXT = re.compile(r'assistant(analysis|commentary|final)')
CONTROL = re.compile(r'<\|[A-Za-z][\w:/ .-]{0,40}\|>|<(?:start|end)_of_turn>')  # of a format, whichever it is


def messages_of(value) -> list[dict]:
    """Returns [{role, content[, thinking, tool_calls]}] of a chat; raises ValueError that says what is wrong with it.

    Accepts role/content and from/value, a struct of lists (older Parquet), strings that alternate user, assistant, and
    any of these as JSON. The thinking of an answer is a field of its own, wherever it stood.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise ValueError('no list of messages')
    if all(isinstance(turn, str) for turn in value):
        value = [{'role': ('user', 'assistant')[i % 2], 'content': turn} for i, turn in enumerate(value)]
    out = []
    for i, turn in enumerate(value):
        out.append(_message(i, turn))
        if (
            turn.get('channel') == 'final' and i and value[i - 1].get('channel') == 'analysis'
        ):  # one answer in two parts
            answer, analysis = out.pop(), out.pop()
            out.append(analysis | {k: v for k, v in answer.items() if k != 'thinking'})
    return out


def _parsed(text: str):
    try:
        return json.loads(text) if text.lstrip()[:1] in ('[', '{') else None
    except (ValueError, RecursionError):
        return None


def _message(i: int, turn) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f'message {i} is no {{role, content}}')
    name = next((v for k in ('role', 'from') if (v := turn.get(k)) is not None), None)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f'message {i} has the role {shown(repr(name), 40)}')
    content = next((v for k in ('content', 'value') if (v := turn.get(k)) is not None), None)
    calls = turn.get('tool_calls') or ([turn['function_call']] if turn.get('function_call') else [])
    if name.strip().lower() in CALLS:
        content, calls = '', _parsed(content) if isinstance(content, str) else content
    calls = [_call(i, call) for call in (calls if isinstance(calls, list) else [calls])]
    try:
        thinking = thinking_of(turn)
    except TypeError as e:
        raise ValueError(f'message {i} has {e}') from None
    if role != 'assistant' and (thinking or calls):
        raise ValueError(f'message {i} has thinking or calls and is not of the assistant')
    if isinstance(content, list):  # parts
        texts = [p.get('text') if isinstance(p, dict) else None for p in content]
        content = None if None in texts else ''.join(texts)
    if content is None and (thinking or calls):
        content = ''
    if not isinstance(content, str):
        raise ValueError(f'message {i} has no text')
    content = clean(content)
    if role == 'assistant':
        if turn.get('channel') == 'analysis':
            thinking, content = content, ''
        elif turn.get('channel') not in (None, '', 'final'):
            raise ValueError(f'message {i} has a channel that is neither analysis nor final')
        thinking, content = split_thinking(content, thinking)
    out = {'role': role, 'content': content}
    if role == 'tool':
        out |= {k: turn[k] for k in ('name', 'tool_call_id') if isinstance(turn.get(k), str)}
    return out | ({'thinking': thinking} if thinking else {}) | ({'tool_calls': calls} if calls else {})


def _call(i: int, call) -> dict:
    """A call as chat templates take it: the arguments are an object and not its JSON."""
    function = call.get('function', call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get('name'), str):
        raise ValueError(f'message {i} has a tool call without a name')
    arguments = function.get('arguments') or {}
    if isinstance(arguments, str):
        arguments = arguments if (parsed := _parsed(arguments)) is None else parsed
    call_id = {'id': call['id']} if isinstance(call.get('id'), str) else {}
    return call_id | {'type': 'function', 'function': {'name': clean(function['name']), 'arguments': arguments}}


def thinking_of(message: dict) -> str | None:
    """Returns the thinking that a message has in a field. Raises TypeError where that is no text."""
    value = next((v for k in THINKING if (v := message.get(k))), None)
    if isinstance(value, list):  # reasoning_details
        texts = [p.get('text') or p.get('summary') if isinstance(p, dict) else None for p in value]
        value = ''.join(texts) if all(isinstance(t, str) for t in texts) else texts
    if not isinstance(value, str | None):
        raise TypeError('thinking that is no text')
    return value and clean(value)


def clean(text: str) -> str:
    """Puts '?' for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return text.encode('utf-8', 'replace').decode()


def chat_columns(table: Table) -> dict[str, bool]:
    """Returns the columns that hold chats in the first rows -> whether most of those end with an answer.

    Lists of strings are chats in columns of a known name alone, and only where nothing else is one.
    """
    ends, strings = {}, {}
    for row in table.first():
        for key, value in row.items():
            try:
                last = messages_of(value)[-1]
            except ValueError:
                continue
            words = isinstance(value, list) and isinstance(value[0], str)
            if not words or key in KNOWN_COLUMNS:
                (strings if words else ends).setdefault(key, []).append(last['role'] == 'assistant')
    texts = any(isinstance(row.get('text'), str) for row in table.first())
    return {key: 2 * sum(v) > len(v) for key, v in (ends or ({} if texts else strings)).items()}


def check_column(table: Table, name: str) -> bool:
    """Whether the column `name` holds chats. Raises LensError where there is no such column."""
    if name not in table.columns:
        columns = shown(', '.join(map(str, table.columns)) or 'none')
        raise LensError(f'{table.name} has no column {name}; its columns: {columns}.')
    for row in table.first():
        try:
            messages_of(row.get(name))
            return True
        except ValueError:
            continue
    return False


def control_tokens(tokenizer) -> re.Pattern:
    """Returns what finds the control tokens of a tokenizer in a text: special ones, and others of the form <|…|>."""
    tokens = {str(t) for t in tokenizer.all_special_tokens}
    tokens |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special or CONTROL.fullmatch(str(t))}
    return re.compile('|'.join(map(re.escape, sorted(tokens - {''}, key=len, reverse=True))) or r'(?!)')


def find_control(messages: list[dict], tokens: re.Pattern) -> str | None:
    """Returns a control token that stands among the words of the messages, or None."""
    texts = (text for m in messages for text in (m['content'], m.get('thinking')) if text)
    return next((found[0] for text in texts if (found := tokens.search(text))), None)


def chat_template(tokenizer, name: str = 'The tokenizer') -> str:
    """Returns the chat template that chats go through. Raises LensError where there is none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if 'default' not in template:
            raise LensError(
                f'{name} has the chat templates {shown(", ".join(template)) or "none"}, of which none is the default: '
                'save the one to use as chat_template.jinja in its directory.'
            )
        template = template['default']
    if not template:
        raise LensError(f'{name} has no chat template, which chats need: use the directory of a chat model.')
    return template


def native_thinking(template: str) -> bool:
    """Tells whether a chat template renders a field `thinking` of an assistant message itself."""
    return bool(re.search(r"\.thinking\b|\[['\"]thinking['\"]\]|['\"]thinking['\"] in\b", template))


def inline_thinking(messages: list[dict]) -> list[dict]:
    """Returns the messages without `thinking`, which is in <think> tags and a newline before the content."""
    return [
        {k: v for k, v in m.items() if k != 'thinking'}
        | ({'content': f'<think>{m["thinking"]}</think>\n{m["content"]}'} if m.get('thinking') else {})
        for m in messages
    ]


def split_thinking(text: str, known: str | None = None) -> tuple[str | None, str]:
    """Returns (thinking or None, content) of an answer: the reverse of inline_thinking.

    known: its thinking that stands in a field, which comes before that of the text. The thinking may stand in tags (an opening one in the prompt, a closing one cut off) or in the channels of Harmony,
    with or without their control tokens. Raises ValueError where channels cannot be told apart.
    """
    found, content = _split(text)
    return '\n'.join(dict.fromkeys(t for t in (known, found) if t)) or None, content


def _split(text: str) -> tuple[str | None, str]:
    if '<|channel|>' in text or '<|message|>' in text or BARE.match(text.lstrip()):
        return _split_channels(text.lstrip())
    for opening, closing in TAGS:
        before, closed, after = text.partition(closing)
        opened = before.lstrip().startswith(opening)
        if opened or (closed and opening == '<think>' and opening not in before):
            thinking = before.lstrip().removeprefix(opening) if opened else before
            solution = SOLUTION.match(after)
            return thinking or None, solution[1] if solution else after.removeprefix('\n')
    return None, text


def _split_channels(text: str) -> tuple[str | None, str]:
    """(thinking or None, content) of analysis and final messages of Harmony."""
    said = {'analysis': [], 'final': []}
    raw = '<|' in text
    if not raw:
        parts = NEXT.split(text if text.startswith('assistant') else f'assistant{text}')
        pieces, rest = list(zip(parts[1::2], parts[2::2], strict=True)), ''
    else:
        pieces, rest = CHANNEL.findall(text), CHANNEL.sub('', text).strip()
    for channel, body in pieces:
        said.get(channel, []).append(body)
    channels = [channel for channel, _ in pieces]
    finals = channels.count('final')
    known = pieces and set(channels) <= said.keys() and (channels[-1] == 'final' if finals else raw)  # or cut off
    if rest or not known or finals > 1:
        raise ValueError('channels of Harmony that cannot be told apart')
    return '\n'.join(said['analysis']) or None, ''.join(said['final'])
