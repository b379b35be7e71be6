"""What a row of a data set is: a chat or a text."""

import dataclasses
import re

from lens.errors import LensError

from . import chat_data
from .tables import Table

EFFORTS = ('low', 'medium', 'high')
EFFORT_LINE = re.compile(rf'\A\s*Reasoning: ({"|".join(EFFORTS)})[ \t]*(?:\n+|\Z)')
PAIRS = {  # format -> columns of the question, the answer and the thinking
    'question': ('question', 'answer', 'thinking'),
    'pair': ('user_content', 'assistant_content', 'assistant_thinking'),
}


class BadRow(ValueError):
    """A row that gives no document; the message is the reason under which it is counted."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """messages: {role, content[, thinking]}; no blank thinking. effort: low | medium | high."""

    messages: list[dict]
    effort: str


def row_format(table: Table, column: str | None = None) -> tuple[str, str]:
    """Finds (format, column) of a table: question | pair | chat | text, tried in this order. Raises LensError."""
    have = set(table.columns)
    if column is None:
        for name, (first, second, _) in PAIRS.items():
            if {first, second} <= have:
                return name, first
    try:
        return 'chat', chat_data.find_column(table, column)
    except LensError as e:
        wanted = column or 'text'
        values = (row[wanted] for row in table.first() if row.get(wanted) is not None)
        if isinstance(next(values, None), str):
            return 'text', wanted
        raise LensError(f'{str(e).rstrip(".")}; it has no texts to read in a column {wanted} either.') from None


def parse(row: dict | None, form: str, column: str, effort: str) -> Chat | str:
    """Reads the document of a row in the format `row_format` gave. effort: where the row names none. Raises BadRow."""
    if row is None:
        raise BadRow('not a JSON object')
    if form == 'text':
        if not isinstance(row.get(column), str):
            raise BadRow(f'no text in {column}')
        return chat_data.clean(row[column])
    messages = _messages(row, form, column)
    effort = next((row[k] for k in ('system_reasoning_effort', 'reasoning_effort') if row.get(k)), effort)
    if form == 'chat' and isinstance(row.get('system'), str):  # what data_gen.generate sent as the system line
        rest = messages[1:] if messages[0]['role'] == 'system' else messages
        messages = [{'role': 'system', 'content': row['system']}, *rest]
    if messages[0]['role'] == 'system' and (line := EFFORT_LINE.match(messages[0]['content'])):
        effort = line[1]
    if effort not in EFFORTS:
        raise BadRow('unknown reasoning effort')
    return Chat([_message(m) for m in messages], effort)


def _messages(row: dict, form: str, column: str) -> list[dict]:
    if form in PAIRS:
        user, assistant, thinking = (row.get(k) for k in PAIRS[form])
        value = [{'role': 'user', 'content': user}, {'role': 'assistant', 'content': assistant, 'thinking': thinking}]
    else:
        value = row.get(column)
    try:
        return chat_data.messages_of(value)
    except ValueError as e:
        reason = re.sub(r'message \d+', 'a message', str(e))
        raise BadRow('a message has an unknown role' if 'has the role' in reason else reason) from None


def _message(message: dict) -> dict:
    """Without blank texts; <think>…</think> at the start of an answer becomes the field `thinking`."""
    content, thinking = message['content'], message.get('thinking')
    if message['role'] == 'assistant' and not thinking and content.lstrip().startswith('<think>'):
        thinking, content = chat_data.split_thinking(content)
    out = {'role': message['role'], 'content': content if content.strip() else ''}
    if thinking and thinking.strip():
        out['thinking'] = thinking
    elif message['role'] == 'assistant' and not out['content']:
        raise BadRow('an empty assistant message')
    return out
