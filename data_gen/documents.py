"""What a row of a data set is: a chat or a text."""

import dataclasses
import json
import re

from lens.errors import LensError, shown

from . import chat_data
from .tables import Table

EFFORTS = ('low', 'medium', 'high')
EFFORT_LINE = re.compile(rf'\A\s*Reasoning: ({"|".join(EFFORTS)})[ \t]*(?:\n+|\Z)')
# Columns, in small letters, of a question and its answer: texts, or messages. The first pair goes before any chat.
SURE = (('question', 'answer'), ('user_content', 'assistant_content'))
QUESTIONS = ('question', 'user_content', 'prompt', 'instruction', 'query', 'problem')
ANSWERS = ('answer', 'assistant_content', 'completion', 'chosen', 'response', 'output', 'solution')
GIVEN = ('input', 'context')  # what stands beside a question


class BadRow(ValueError):
    """A row that gives no document; the message is the reason under which it is counted."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """messages: {role, content[, thinking, tool_calls, …]}; no blank thinking. effort: low | medium | high.

    tools: JSON of the list that the model may call, or ''.
    """

    messages: list[dict]
    effort: str
    tools: str = ''


def row_format(table: Table, column: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Finds (pair | chat | text, the columns that are read) of a table. Raises LensError.

    column: one to read, or QUESTION,ANSWER. Without: question and answer; user_content and assistant_content; a column
    of whole chats; a prompt and its answer; a column `text`. Where several could be the answer none is taken.
    """
    if column:
        return _named(table, column)
    names, chats = {c.lower(): c for c in table.columns}, chat_data.chat_columns(table)
    for pair in SURE:
        if names.keys() >= set(pair):
            return 'pair', tuple(names[c] for c in pair)
    known = [c for c in chats if c.lower() in chat_data.KNOWN_COLUMNS]
    if len(known) == 1 and chats[known[0]]:
        return 'chat', (known[0],)
    asked = known or [names[c] for c in QUESTIONS if c in names] or [c for c in chats if not chats[c]]
    asked = asked or [names[c] for c in GIVEN[:1] if c in names]
    answers = [names[c] for c in ANSWERS if c in names]
    if len(asked) == len(answers) == 1 and set(chats) <= {*asked, *answers, 'rejected'}:
        return 'pair', (asked[0], answers[0])
    if set(chats) <= {'chosen', 'rejected'} and 'chosen' in chats:
        return 'chat', ('chosen',)
    several = list(dict.fromkeys([*asked, *answers, *chats] if asked and answers else chats))
    if len(several) > 1:
        raise LensError(
            f'{table.name} has several columns of chats or answers ({shown(", ".join(several))}): name one, or a '
            'question and its answer, as in prompt,response.'
        )
    if chats:
        return 'chat', tuple(chats)
    if _has_text(table, 'text'):
        return 'text', ('text',)
    raise LensError(f'{_no_chats(table)}; it has no texts to read in a column text either.')


def _named(table: Table, column: str) -> tuple[str, tuple[str, ...]]:
    if column not in table.columns and len(pair := tuple(column.split(','))) == 2:
        for name in pair:
            chat_data.check_column(table, name)
        return 'pair', pair
    if chat_data.check_column(table, column):
        return 'chat', (column,)
    if _has_text(table, column):
        return 'text', (column,)
    raise LensError(f'Column {column} of {table.name} holds neither chats (lists of {{role, content}}) nor texts.')


def _has_text(table: Table, column: str) -> bool:
    return isinstance(next((v for row in table.first() if (v := row.get(column)) is not None), None), str)


def _no_chats(table: Table) -> str:
    """Says that there are none, and why the likeliest column holds none."""
    why = ''
    for row in table.first():
        for key in (k for k in row if k.lower() in chat_data.KNOWN_COLUMNS):
            try:
                chat_data.messages_of(row[key])
            except ValueError as e:
                why = why or f' ({key}: {e})'
    columns = shown(', '.join(map(str, table.columns)) or 'none')
    return f'{table.name} has no column of chats, lists of {{role, content}}{why}; its columns: {columns}'


def messages(row: dict | None, form: str, columns: tuple[str, ...]) -> list[dict]:
    """Returns the messages of a row in the format `row_format` gave. Raises ValueError that says why there are none."""
    if row is None:
        raise ValueError('not a JSON object')
    out = _pair(row, *columns) if form == 'pair' else chat_data.messages_of(row.get(columns[0]))
    system, has_system = row.get('system'), out[0]['role'] == 'system'
    if not system and not has_system:
        system = row.get('system_prompt')
    if not isinstance(system, str) or not system.strip():
        return out
    # `system` is what data_gen.generate sent in place of the chat's own
    return [{'role': 'system', 'content': chat_data.clean(system)}, *out[has_system:]]


def _pair(row: dict, question: str, answer: str) -> list[dict]:
    asked, said = row.get(question), row.get(answer)
    row = {k.lower(): v for k, v in row.items()}
    if isinstance(asked, str):
        given = [v for k in GIVEN if k != question.lower() and isinstance(v := row.get(k), str) and v.strip()]
        asked = [{'role': 'user', 'content': '\n\n'.join([asked, *given])}]
    if isinstance(said, str):
        said = [{k: row.get(k) for k in chat_data.THINKING} | {'role': 'assistant', 'content': said}]
    asked, said = (x if isinstance(x, list) else [{'role': 'user', 'content': None}] for x in (asked, said))
    said = chat_data.messages_of(said)
    return said if said[0]['role'] != 'assistant' else chat_data.messages_of(asked) + said


def parse(row: dict | None, form: str, columns: tuple[str, ...], effort: str) -> Chat | str:
    """Reads the document of a row in the format `row_format` gave. effort: where the row names none. Raises BadRow."""
    if row is None:
        raise BadRow('not a JSON object')
    if form == 'text':
        if not isinstance(row.get(columns[0]), str):
            raise BadRow(f'no text in {columns[0]}')
        return chat_data.clean(row[columns[0]])
    try:
        found = messages(row, form, columns)
    except ValueError as e:
        reason = re.sub(r'message \d+', 'a message', str(e))
        raise BadRow('a message has an unknown role' if 'has the role' in reason else reason) from None
    effort = next((row[k] for k in ('system_reasoning_effort', 'reasoning_effort') if row.get(k)), effort)
    if found[0]['role'] == 'system' and (line := EFFORT_LINE.match(found[0]['content'])):
        effort = line[1]
    if effort not in EFFORTS:
        raise BadRow('unknown reasoning effort')
    return Chat([_message(m) for m in found], effort, _tools(row))


def _tools(row: dict) -> str:
    """The tools of a chat. Arrow gives every object the keys of all of them: those without a value are none."""

    def prune(x):
        if isinstance(x, dict):
            return {k: prune(v) for k, v in x.items() if v is not None}
        return [prune(v) for v in x] if isinstance(x, list) else x

    tools = row.get('tools') or row.get('functions')
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        raise BadRow('tools that are no JSON') from None
    return json.dumps(prune(tools), ensure_ascii=False) if tools else ''


def _message(message: dict) -> dict:
    """Without blank texts."""
    out = message | {'content': message['content'] if message['content'].strip() else ''}
    if not out.get('thinking', '').strip():
        out.pop('thinking', None)
        if out['role'] == 'assistant' and not out['content'] and 'tool_calls' not in out:
            raise BadRow('an empty assistant message')
    return out
