"""Chats and texts to token ids with a role per token.

gpt-oss (any tokenizer with the Harmony tokens) is rendered here, piece by piece: the control tokens and
the words of the headers are `special`. Other chats go through the tokenizer's chat template, which is
rendered twice: as it is, and with a mark in place of every text; the marks tell where each text lies. A
token belongs to the text that holds its first character that is no white space.
"""

import datetime
import functools
import hashlib
import json
import re
from typing import NamedTuple

import numpy as np

from lens.errors import LensError, shown
from lens.spoken import MARK, align, inked, mark
from lens.words import special_ids

from . import chat_data
from .documents import EFFORT_LINE, BadRow, Chat

ROLES = {'system': 0, 'user': 1, 'thinking': 2, 'final': 3, 'special': 4, 'text': 5}  # codes of role.npy
SYSTEM, USER, THINKING, FINAL, SPECIAL, TEXT = ROLES.values()
ROLE_OF = {'system': SYSTEM, 'developer': SYSTEM, 'user': USER, 'tool': USER, 'assistant': FINAL}
DATE = '2025-06-28'  # what templates print for the current date
# Flags of a document; final: the text of its last answer, of which truncation took a part or all.
FLAGS = {'truncated': 1, 'final_cut': 2, 'final_lost': 4, 'unanswered': 8}
TRUNCATED, FINAL_CUT, FINAL_LOST, UNANSWERED = FLAGS.values()
LOST = ('thinking', 'tool calls', 'tools', *(f'{role} messages' for role in ROLE_OF))  # what a template may leave out
CHARS_PER_TOKEN = 64  # a text is cut at so many characters for each token that is kept, before it is tokenised
START, CHANNEL, MESSAGE, END, RETURN = CONTROLS = ('<|start|>', '<|channel|>', '<|message|>', '<|end|>', '<|return|>')
HARMONY_SYSTEM = """You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {date}

Reasoning: {effort}

# Valid channels: analysis, commentary, final. Channel must be included for every message."""


class Encoded(NamedTuple):
    """ids int32 [n] and roles int8 [n] of a document, its flags, and how many parts of each kind of LOST it lost."""

    ids: np.ndarray
    roles: np.ndarray
    flags: int = 0
    lost: tuple[int, ...] = (0,) * len(LOST)


def has_harmony(tokenizer) -> bool:
    return all(i is not None and i != tokenizer.unk_token_id for i in tokenizer.convert_tokens_to_ids(list(CONTROLS)))


def harmony_pieces(chat: Chat, date: str) -> list[tuple[str, int | None]]:
    """Returns a chat in Harmony: (text, role code) in order; None: a control token.

    Every assistant turn keeps its analysis and its final message; the last one ends with <|return|>.
    """
    out = []

    def add(header, body, role, channel=None, end=END):
        out.extend([(START, None), (header, SPECIAL)])
        out.extend([(CHANNEL, None), (channel, SPECIAL)] if channel else [])
        out.extend([(MESSAGE, None), (body, role), (end, None)])

    add('system', HARMONY_SYSTEM.format(date=date, effort=chat.effort), SYSTEM)
    for i, m in enumerate(chat.messages):
        if m['role'] in ('system', 'developer'):
            text = m['content'] if i else EFFORT_LINE.sub('', m['content'], count=1)  # that line is above already
            if text:
                add('developer', f'# Instructions\n\n{text}', SYSTEM)
        elif m['role'] == 'user':
            add('user', m['content'], USER)
        elif m['role'] == 'assistant':
            if 'thinking' in m:
                add('assistant', m['thinking'], THINKING, 'analysis')
            if m['content']:
                add('assistant', m['content'], FINAL, 'final', RETURN if i == len(chat.messages) - 1 else END)
        else:
            raise BadRow('a tool message, which Harmony rendering does not take')
        if 'tool_calls' in m:
            raise BadRow('a tool call, which Harmony rendering does not take')
    return out


def as_sent(message: dict) -> dict:
    """Returns a message with the arguments of its calls in JSON, as OpenAI's servers send them and some templates want."""
    if 'tool_calls' not in message:
        return message
    functions = [c['function'] for c in message['tool_calls']]
    texts = [a if isinstance(a := f['arguments'], str) else json.dumps(a, ensure_ascii=False) for f in functions]
    calls = zip(message['tool_calls'], functions, texts, strict=True)
    return message | {'tool_calls': [c | {'function': f | {'arguments': text}} for c, f, text in calls]}


def token_roles(text: str, spans: list[tuple[int, int, int]], offsets_Nx2: np.ndarray) -> np.ndarray:
    """Returns role codes [N] of tokens from their character ranges in `text`."""
    role_C = np.full(len(text) + 1, SPECIAL, np.int8)
    for start, end, role in spans:
        role_C[start:end] = role
    return role_C[inked(text, offsets_Nx2)]


def _day(date: str) -> datetime.date:
    try:
        if (day := datetime.date.fromisoformat(date)).isoformat() == date:
            return day
    except ValueError:
        pass
    raise LensError(f'--date={shown(date, 40)} is no day: give YYYY-MM-DD.')


def pin_date(template: str, date: str) -> tuple[str, dict]:
    """Returns (template, variables) that print `date` (YYYY-MM-DD) where a chat template prints the current date."""
    day = _day(date)
    formats = {f: day.strftime(f) for _, f in re.findall(r'strftime_now\((["\'])(.*?)\1\)', template)}
    own = '{%- macro strftime_now(format) -%}{{ pinned_dates[format] }}{%- endmacro -%}'
    return (own if formats else '') + template, {'pinned_dates': formats, 'date_string': day.strftime('%d %b %Y')}


class Renderer:
    """Documents to tokens, for one tokenizer; picklable.

    Raises LensError if chats are asked of a tokenizer that has no format for them.
    """

    def __init__(self, tokenizer, *, seq_len: int, truncate: str, date: str, chats: bool):
        self.tokenizer, self.seq_len, self.truncate, self.date = tokenizer, seq_len, truncate, date
        _day(date)
        if not tokenizer.is_fast:
            raise LensError('The tokenizer gives no character offsets: use a directory with tokenizer.json.')
        tokenizer.model_max_length = int(1e30)  # rows are cut here
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.kind = None
        if chats:
            self.kind = 'harmony' if has_harmony(tokenizer) else 'chat_template'
        if self.kind == 'chat_template':
            self.own_template = chat_data.chat_template(tokenizer)
            self.template, self.dates = pin_date(self.own_template, date)
            self.native = chat_data.native_thinking(self.template)
        self.controls = chat_data.control_tokens(tokenizer)
        special = special_ids(tokenizer)
        self.special = np.zeros(max(len(tokenizer), *special, 0) + 1, bool)
        self.special[special] = True
        one = np.array(tokenizer('a')['input_ids'])
        plain = len(tokenizer('a', add_special_tokens=False)['input_ids'])
        before = int(np.argmin(np.append(self.special[one], False)))
        self.prefix, self.suffix = one[:before], one[before + plain :]  # what the tokenizer puts around a text

    def template_sha256(self) -> str:
        """Returns a fingerprint of how chats become text."""
        template = HARMONY_SYSTEM if self.kind == 'harmony' else self.own_template
        return hashlib.sha256(f'{template}{self.date}'.encode()).hexdigest()

    def encode(self, document: Chat | str) -> Encoded:
        """Returns a document of at most seq_len tokens. Raises BadRow, also for a control token among the words."""
        if isinstance(document, str):
            return self._text(document)
        if token := chat_data.find_control(document.messages, self.controls):
            raise BadRow(f'a message holds the control token {shown(token, 40)}')
        encoded = self._harmony(document) if self.kind == 'harmony' else self._templated(document)
        unanswered = document.messages[-1]['role'] != 'assistant'
        return encoded._replace(flags=encoded.flags | UNANSWERED * unanswered)

    def _text(self, text: str) -> Encoded:
        cap = self.seq_len * CHARS_PER_TOKEN
        text = text[:cap] if self.truncate == 'right' else text[-cap:]
        ids = np.array(self.tokenizer(text, return_attention_mask=False)['input_ids'], np.int32)
        return self._cut(ids, np.full(len(ids), TEXT, np.int8), self.prefix, self.suffix)

    def _cut(self, ids: np.ndarray, roles: np.ndarray, prefix=(), suffix=()) -> Encoded:
        n, size = len(ids), self.seq_len
        roles[self.special[ids]] = SPECIAL
        if n <= size:
            return Encoded(ids, roles)
        if self.truncate == 'right':
            keep = np.r_[0 : size - len(suffix), n - len(suffix) : n]
        else:
            keep = np.r_[0 : len(prefix), n - size + len(prefix) : n]
        final = np.flatnonzero(roles == FINAL)
        flags = TRUNCATED
        if len(final):  # the last run of it: the last assistant message
            run = np.arange(final[np.flatnonzero(np.diff(final, prepend=-2) > 1)[-1]], final[-1] + 1)
            left = np.isin(run, keep).sum()
            flags |= FINAL_LOST if left == 0 else FINAL_CUT if left < len(run) else 0
        return Encoded(ids[keep], roles[keep], flags)

    def _harmony(self, chat: Chat) -> Encoded:
        pieces = harmony_pieces(chat, self.date)
        texts = [text for text, role in pieces if role is not None]
        plain = {'add_special_tokens': False, 'split_special_tokens': True, 'return_attention_mask': False}
        encoded = iter(self.tokenizer(texts, **plain)['input_ids'])
        control = self.tokenizer.convert_tokens_to_ids
        ids = [[control(text)] if role is None else next(encoded) for text, role in pieces]
        codes = [SPECIAL if role is None else role for _, role in pieces]
        cut = self._cut(np.concatenate(ids).astype(np.int32), np.repeat(codes, list(map(len, ids))).astype(np.int8))
        return cut._replace(lost=tuple(int(name == 'tools' and bool(chat.tools)) for name in LOST))

    def _templated(self, chat: Chat) -> Encoded:
        text, spans, lost = self.render(chat)
        encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        offsets_Nx2 = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        cut = self._cut(np.array(encoded.ids, np.int32), token_roles(text, spans, offsets_Nx2))
        return cut._replace(lost=lost)

    def render(self, chat: Chat) -> tuple[str, list[tuple[int, int, int]], tuple[int, ...]]:
        """Returns the chat template's text of a chat, (start, end, role) of its parts, and Encoded.lost. Raises BadRow."""
        forms = [chat.messages]
        if any('tool_calls' in m for m in chat.messages):
            forms.append(list(map(as_sent, chat.messages)))
        found, problem = [], None
        for messages in forms:
            try:
                found.append(self._render(messages, chat.effort, chat.tools))
            except BadRow as e:
                problem = problem or e
        if not found:
            raise problem
        return min(found, key=lambda f: sum(f[2]))

    def _render(self, messages: list[dict], effort: str, tools: str) -> tuple:
        rendered = self._apply(messages, effort, tools)
        calls = [m.get('tool_calls', []) for m in messages]
        shape = tuple((m['role'], bool(m['content']), 'thinking' in m) for m in messages)
        called = any(calls) or tools
        skeleton = self._marked(shape, effort, calls, tools) if called else self._skeleton(shape, effort)
        texts, roles, kinds = {}, {}, {}
        for i, m in enumerate(messages):
            parts = [(m['content'], ROLE_OF[m['role']], f'{m["role"]} messages')]
            parts += [(m.get('thinking', ''), THINKING, 'thinking')]
            parts += [(call['function']['name'], SPECIAL, 'tool calls') for call in calls[i]]
            for k, (text, role, kind) in enumerate(parts):
                texts[i, k], roles[i, k] = text, role
                if text:
                    kinds[i, k] = kind
        found = align(rendered, skeleton, texts)
        if found is None:
            raise BadRow('the chat template changes the text')
        spans = [(start, end, roles[part]) for start, end, part in found]
        shown_marks = {(int(i), int(k)) for i, k in MARK.findall(skeleton)}
        gone = [kind for mark, kind in kinds.items() if mark not in shown_marks]
        if tools and not re.search(r'\btools\b', self.template):
            gone.append('tools')
        return rendered, spans, tuple(map(gone.count, LOST))

    def _apply(self, messages: list[dict], effort: str, tools: str = '') -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages if self.native else chat_data.inline_thinking(messages),
                tools=json.loads(tools) if tools else None,
                chat_template=self.template,
                tokenize=False,
                reasoning_effort=effort,
                **self.dates,
            )
        except Exception as e:  # a template raises what it likes
            raise BadRow(f'the chat template refuses it: {shown((str(e).splitlines() or ["?"])[0], 100)}') from None

    def _marked(self, shape: tuple, effort: str, calls: list[list[dict]], tools: str) -> str:
        """The rendering of chats of one shape, with marks in place of their texts and of the names that they call."""
        messages = []
        for i, (role, content, thinking) in enumerate(shape):
            message = {'role': role, 'content': mark(i, 0) if content else ''}
            message |= {'thinking': mark(i, 1)} if thinking else {}
            called = [c | {'function': c['function'] | {'name': mark(i, k)}} for k, c in enumerate(calls[i], 2)]
            messages.append(message | ({'tool_calls': called} if called else {}))
        return self._apply(messages, effort, tools)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (one renderer per process)
    def _skeleton(self, shape: tuple, effort: str) -> str:
        return self._marked(shape, effort, [[]] * len(shape), '')
