"""A text or a chat as tokens: their ids, what each of them shows, whose words they are."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from lens.errors import LensError, shown, text

MARK = re.compile('\ue000(\\d+)-(\\d+)\ue001')
WHITE = np.isin(np.arange(0x3002), [ord(c) for c in ' \t\n\r\x0b\x0c\x85\xa0\u3000'])  # by character code
PARTS = ('content', 'thinking')  # of a message, by number
ROLES = {'assistant': 'final', 'developer': 'system'}  # role of a message -> of the tokens of its content
WINDOW = 6  # tokens that a decoder looks back at: no character has more bytes, no tokenizer joins more blanks
BROKEN = '\ufffd'  # what a part of a character is decoded to


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids with, for each, the text that it shows (all parts of a character show it), (index, count) of the parts of
    a character, a role (system, user, thinking, final, tool, special, text) and the number of its message, -1 for none."""

    ids: list[int]
    texts: list[str]
    fragments: list[tuple[int, int]]
    roles: list[str]
    messages: list[int]


def of_ids(tokenizer, ids: Sequence[int], vocab_size: int) -> Tokens:
    """Returns token ids with what they show. Raises LensError for ids that the subject does not have."""
    ids = [int(i) for i in np.asarray(ids).reshape(-1)]
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise LensError(f'token id {wrong[0]} is none of the subject, which has 0..{vocab_size - 1}.')
    return _tokens(tokenizer, ids, pieces(tokenizer, ids), None, None)


def of_text(tokenizer, words: str) -> Tokens:
    """Returns a text as the tokenizer reads it, with what it puts before and after. Raises LensError."""
    text(words, 'text')
    if not words.strip():
        raise LensError('The text is empty: give one with words in it.')
    ids = tokenizer(words, return_attention_mask=False)['input_ids']
    return _tokens(tokenizer, ids, pieces(tokenizer, ids), None, None)


def of_chat(tokenizer, messages: Sequence[Mapping]) -> Tokens:
    """Returns a chat rendered by the template of the tokenizer; a chat that does not end with the assistant opens its
    turn. messages: role and content, and perhaps thinking, of each. Raises LensError."""
    chat = [_message(i, m) for i, m in enumerate(messages)]
    if not chat:
        raise LensError('The chat has no messages: give at least one with role and content.')
    if not tokenizer.chat_template:
        raise LensError('The tokenizer of the subject has no chat template: give the chat as text.')
    controls = [t for t in tokenizer.get_added_vocab() if len(t) > 2]
    for i, m in enumerate(chat):
        for part in (m['content'], m.get('thinking', '')):
            if found := [t for t in controls if t in part]:
                raise LensError(f'message {i} of the chat holds the control token {shown(found[0])}: give it as text.')
    rendered = _render(tokenizer, chat)
    texts = {(i, n): m[k] for i, m in enumerate(chat) for n, k in enumerate(PARTS) if m.get(k)}
    marked = [m | {k: mark(i, n) for n, k in enumerate(PARTS) if (i, n) in texts} for i, m in enumerate(chat)]
    spans = align(rendered, _render(tokenizer, marked), texts) or []  # none, where the template changes texts
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    role_C, message_C = ['special'] * (len(rendered) + 1), np.full(len(rendered) + 1, -1)
    for start, end, (i, part) in spans:
        role = chat[i]['role']
        role_C[start:end] = ['thinking' if part else ROLES.get(role, role)] * (end - start)
        message_C[start:end] = i
    ids, starts = encoded['input_ids'], inked(rendered, np.array(encoded['offset_mapping']).reshape(-1, 2)).tolist()
    roles, own = [role_C[s] for s in starts], [int(message_C[s]) for s in starts]
    shows = pieces(tokenizer, ids)
    return _tokens(tokenizer, ids, shows, roles, _whose(own, shows))


def read_chat(content: str | bytes, name: str) -> list[dict]:
    """Returns the messages of a JSON file: a list of them, or an object with `messages`. Raises LensError."""
    try:
        found = json.loads(content)
    except ValueError as e:
        raise LensError(f'{name} is not valid JSON ({e}): give a list of messages with role and content.') from None
    found = found.get('messages') if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise LensError(f'{name} holds no list of messages: give one, each with role and content.')
    return found


def pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns what each token adds to the text; what is part of a character shows nothing before its last one."""
    out = []
    for i in range(len(ids)):
        first = max(i - WINDOW, 0)
        before, whole = (tokenizer.decode(ids[first:end]).rstrip(BROKEN) if end > first else '' for end in (i, i + 1))
        out.append(whole[len(before) :] if whole.startswith(before) else tokenizer.decode([ids[i]]))
    return out


def mark(message: int, part: int) -> str:
    """Returns what stands for a part of a message, by their numbers."""
    return f'\ue000{message}-{part}\ue001'


def align(
    rendered: str, skeleton: str, texts: Mapping[tuple[int, int], str]
) -> list[tuple[int, int, tuple[int, int]]] | None:
    """Finds (start, end, (message, part)) of every text in `rendered`; None where the template changes texts. skeleton: the
    same with marks.

    texts: (message, part) of the mark -> text, which the template may have stripped of white space.
    """
    parts = MARK.split(skeleton)
    at, out = len(parts[0]), []
    ok = rendered.startswith(parts[0])
    for i, k, literal in zip(map(int, parts[1::3]), map(int, parts[2::3]), parts[3::3], strict=True):
        text = texts[i, k]
        for form in (text, text.strip(), text.strip('\n'), text.lstrip(), text.rstrip(), text.lstrip('\n')):
            end = at + len(form)
            if rendered.startswith(form, at) and rendered.startswith(literal, end):
                out.append((at, end, (i, k)))
                at = end + len(literal)
                break
        else:
            ok = False
    return out if ok and at == len(rendered) else None


def inked(text: str, offsets_Nx2: np.ndarray) -> np.ndarray:
    """Returns for tokens [N], from their character ranges in `text`, where their first character stands that is no white
    space: it says whose they are. Of one that has none, where it starts."""
    white = WHITE[np.minimum(np.frombuffer(text.encode('utf-32-le'), np.uint32), len(WHITE) - 1)]
    ink = np.where(white, len(text), np.arange(len(text)))
    ink = np.append(np.minimum.accumulate(ink[::-1])[::-1], len(text))  # the next character to be seen
    start, end = offsets_Nx2.T
    return np.where(ink[start] < end, ink[start], start)


def _tokens(tokenizer, ids, shows: list[str], roles, messages) -> Tokens:
    """Gives the parts of a character its text, and control tokens their role."""
    special = set(tokenizer.all_special_ids)
    texts, fragments, start = list(shows), [(0, 1)] * len(ids), 0
    for i, show in enumerate(shows):
        if not show and i + 1 < len(ids) and BROKEN in tokenizer.decode([ids[i]]):
            continue
        if i > start:
            texts[start : i + 1] = [show] * (i + 1 - start)
            fragments[start : i + 1] = [(k, i + 1 - start) for k in range(i + 1 - start)]
        start = i + 1
    roles = roles or ['text'] * len(ids)
    roles = ['special' if i in special else role for i, role in zip(ids, roles, strict=True)]
    return Tokens(list(ids), texts, fragments, roles, messages or [-1] * len(ids))


def _message(i: int, m) -> dict:
    if not isinstance(m, Mapping) or not isinstance(m.get('role'), str) or not isinstance(m.get('content'), str):
        raise LensError(
            f'message {i} of the chat is {shown(repr(m), 80)}: give an object with role and content, texts.'
        )
    out = {k: text(m[k], f'{k} of message {i}') for k in ('role', 'content')}
    thinking = m.get('thinking') or m.get('reasoning_content')
    return out | ({'thinking': text(thinking, f'thinking of message {i}')} if thinking else {})


def _render(tokenizer, chat: list[dict]) -> str:
    template = tokenizer.chat_template
    if 'thinking' not in str(template):
        chat = [
            {'role': m['role'], 'content': f'<think>{m["thinking"]}</think>\n{m["content"]}'} if 'thinking' in m else m
            for m in chat
        ]
    asks = chat[-1]['role'] != 'assistant'
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks)
    except Exception as e:  # a template raises what it likes
        raise LensError(
            f'The chat template of the subject refuses the chat ({shown(str(e), 100)}): change roles or order.'
        ) from None


def _whose(own: list[int], shows: list[str]) -> list[int]:
    """Gives tokens of the template to messages: what closes one to it, with the white space after it, the others to the
    next; what opens an answer that is still to come to one more."""
    out, n = list(own), len(own)
    for i in range(1, n):
        closes = out[i - 1] >= 0 and own[i] < 0 and (own[i - 1] >= 0 or not shows[i].strip())
        out[i] = out[i - 1] if closes else own[i]
    following = max(own, default=-1) + 1 or -1
    for i in range(n - 1, -1, -1):
        following = out[i] if out[i] >= 0 else following
        out[i] = following
    return out


def word_starts(tokenizer, ids: Sequence[int]) -> list[int]:
    """Returns which tokens begin a word: the first one, and those that show a blank first."""
    shows = pieces(tokenizer, ids)
    return [i for i, show in enumerate(shows) if i == 0 or show[:1].isspace()]
