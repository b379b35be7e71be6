"""What a chat is: messages of other shapes, the column that holds them, thinking in tags."""

import re

from lens.errors import LensError

from .tables import Table

KNOWN_COLUMNS = ('messages', 'conversation', 'conversations', 'chat', 'dialog', 'dialogue', 'turns', 'prompt')
ROLES = {'human': 'user', 'gpt': 'assistant', 'bot': 'assistant', 'model': 'assistant'}
KNOWN_ROLES = ('system', 'developer', 'user', 'assistant', 'tool')


def messages_of(value) -> list[dict]:
    """Returns [{role, content[, thinking]}] of a chat; raises ValueError that says what is wrong with it.

    Accepts role/content and from/value, a struct of lists (older Parquet), and strings that alternate user, assistant.
    """
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise ValueError('no list of messages')
    if all(isinstance(turn, str) for turn in value):
        return [{'role': ('user', 'assistant')[i % 2], 'content': clean(turn)} for i, turn in enumerate(value)]
    return [_message(i, turn) for i, turn in enumerate(value)]


def _message(i: int, turn) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f'message {i} is no {{role, content}}')
    role = turn.get('role', turn.get('from'))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in KNOWN_ROLES:
        raise ValueError(f'message {i} has the role {role!r}')
    content = turn.get('content', turn.get('value'))
    if isinstance(content, list):  # parts
        texts = [p.get('text') if isinstance(p, dict) else None for p in content]
        content = None if None in texts else ''.join(texts)
    if not isinstance(content, str):
        raise ValueError(f'message {i} has no text')
    out = {'role': role, 'content': clean(content)}
    thinking = next((t for k in ('thinking', 'reasoning_content', 'reasoning') if (t := turn.get(k))), None)
    return out | {'thinking': clean(thinking)} if isinstance(thinking, str) and role == 'assistant' else out


def clean(text: str) -> str:
    """Puts '?' for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return text.encode('utf-8', 'replace').decode()


def find_column(table: Table, name: str | None = None) -> str:
    """Finds the chat column of a table: `name`, or the one that holds chats in its first rows. Raises LensError."""
    columns = ', '.join(table.columns) or 'none'
    if name is not None and name not in table.columns:
        raise LensError(f'{table.name} has no column {name}; its columns: {columns}.')
    found = {}
    for row in table.first():
        for key, value in row.items():
            try:
                messages_of(value)
            except ValueError:
                continue
            strings = isinstance(value, list) and isinstance(value[0], str)
            if not strings or key == name or key in KNOWN_COLUMNS:
                found[key] = found.get(key, 0) + 1
    if name is not None:
        if name not in found:
            raise LensError(f'Column {name} of {table.name} holds no chats: lists of {{role, content}} are needed.')
        return name
    if not found:
        raise LensError(f'{table.name} has no column of chats (lists of {{role, content}}); its columns: {columns}.')
    known = [c for c in KNOWN_COLUMNS if c in found]
    if not known and len(found) > 1:
        raise LensError(f'{table.name} has several columns of chats ({", ".join(found)}): name one.')
    return known[0] if known else next(iter(found))


def special_ids(tokenizer) -> list[int]:
    """Returns what decoding leaves out."""
    return [*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)]


def native_thinking(tokenizer) -> bool:
    """Tells whether the chat template renders a field `thinking` of an assistant message itself."""
    template = tokenizer.chat_template
    text = ' '.join(template.values()) if isinstance(template, dict) else template or ''
    return bool(re.search(r"\.thinking\b|\[['\"]thinking['\"]\]|['\"]thinking['\"] in\b", text))


def inline_thinking(messages: list[dict]) -> list[dict]:
    """Returns {role, content} alone, `thinking` in <think> tags and a newline before the content."""
    tags = (f'<think>{m["thinking"]}</think>\n' if m.get('thinking') else '' for m in messages)
    return [{'role': m['role'], 'content': tag + m['content']} for m, tag in zip(messages, tags, strict=True)]


def split_thinking(text: str) -> tuple[str | None, str]:
    """Returns (thinking or None, content) of a text with <think>…</think>: the reverse of inline_thinking.

    An opening tag may stand in the prompt, a closing one be cut off.
    """
    before, opened, rest = text.partition('<think>')
    if opened and '</think>' not in before:
        thinking, _, after = rest.partition('</think>')
        before = '' if before.isspace() else before
    elif '</think>' in text:
        before, (thinking, _, after) = '', text.partition('</think>')
    else:
        return None, text
    return thinking or None, before + after.removeprefix('\n')
