"""Which assistant turn of a chat is written anew, what is sent for it, and the record that its answer gives."""

import dataclasses

from lens.errors import LensError

from . import chat_data
from .servers import Answer, Failed

MARGIN = 16  # tokens that a prompt must leave below the target to be chosen
BACK_OFFS = 8  # earlier assistant turns that are tried when the system line leaves no room


class Skip(Exception):
    """The row cannot be used; the text says why."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One request: the original turns before the answer, what is sent, and what they count."""

    index: int
    turns: list[dict]
    messages: list[dict]
    original_tokens: int
    prompt_tokens: int
    max_tokens: int


class Planner:
    """Chooses the turn and makes the record; the only user of the tokenizer. options: generate.GenerateOptions."""

    def __init__(self, tokenizer, options):
        self.tokenizer, self.options = tokenizer, options
        self.template = chat_data.chat_template(tokenizer, options.tokenizer or options.model)
        self.native = chat_data.native_thinking(self.template)
        self.controls = chat_data.control_tokens(tokenizer)
        level = options.reasoning_level
        self.system = options.system_prompt or (f'Reasoning: {level}' if level else None)
        self._check_template()

    def _check_template(self) -> None:
        name = self.options.tokenizer or self.options.model
        try:
            self.count(self.request([{'role': 'user', 'content': 'Hello'}]))
        except Skip as e:
            raise LensError(
                f'The chat template of {name} refuses a system line ({e}): give --reasoning_level= without a level.'
            ) from None

    def sendable(self, turns: list[dict]) -> list[dict]:
        """Returns only role and content; earlier thinking goes into the content where the template does not take it."""
        if not self.native:
            return chat_data.inline_thinking(turns)
        return [{'role': m['role'], 'content': m['content']} for m in turns]

    def request(self, turns: list[dict]) -> list[dict]:
        """Returns `sendable` turns, the system line in place of a leading system message."""
        if self.system is None:
            return self.sendable(turns)
        rest = turns[1:] if turns[0]['role'] == 'system' else turns
        return [{'role': 'system', 'content': self.system}, *self.sendable(rest)]

    def count(self, messages: list[dict]) -> int:
        try:
            how = {'chat_template': self.template, 'add_generation_prompt': True, 'return_dict': False}
            return len(self.tokenizer.apply_chat_template(messages, **how))
        except ImportError as e:
            raise LensError(f'Chat templates need a package: {" ".join(str(e).split())}.') from None
        except Exception as e:  # whatever a template raises about these messages
            raise Skip(f'the chat template refuses it: {" ".join(str(e).split())[:300]}') from None

    def plan(self, index: int, value) -> Plan:
        """Raises Skip."""
        o = self.options
        try:
            turns = chat_data.messages_of(value)
        except ValueError as e:
            raise Skip(str(e)) from None
        roles = [m['role'] for m in turns]
        places = [i for i, role in enumerate(roles) if role == 'assistant' and 'user' in roles[:i]]
        if not places and roles[-1] == 'user':  # a question that nobody has answered
            places = [len(turns)]
        if not places:
            raise Skip('no assistant turn after a user turn')
        called = next((i for i, m in enumerate(turns) if m['role'] == 'tool' or 'tool_calls' in m), len(turns))
        places = [i for i in places if i <= called]
        if not places:
            raise Skip('no assistant turn before the first tool call, which is not sent')
        if token := chat_data.find_control(turns[: places[-1]], self.controls):
            raise Skip(f'a message holds the control token {token}')
        lengths = {}
        for i in places:
            lengths[i] = self.count(self.sendable(turns[:i]))
            if lengths[i] >= 2 * o.target_total_tokens:  # no later prompt is short
                break
        fitting = [i for i, n in lengths.items() if n + MARGIN < o.target_total_tokens]
        if not fitting:
            raise Skip(f'no prompt below {o.target_total_tokens - MARGIN} tokens')
        chosen = min(fitting, key=lambda i: abs(lengths[i] - o.anchor_prompt_tokens))
        at = places.index(chosen)
        for i in reversed(places[max(at - BACK_OFFS, 0) : at + 1]):
            messages = self.request(turns[:i])
            tokens = self.count(messages)
            budget = min(o.max_completion_tokens, o.target_total_tokens - tokens)
            if budget >= 1:
                return Plan(index, turns[:i], messages, lengths[i], tokens, budget)
        raise Skip(f'with the system line no prompt is below {o.target_total_tokens} tokens')

    def record(self, plan: Plan, answer: Answer) -> dict:
        """Returns the line of data.jsonl. Raises Failed where the answer is empty or malformed."""
        thinking, content = extract(answer.message)
        said = [{'content': content, 'thinking': thinking}]
        if token := chat_data.find_control(said, self.controls) or chat_data.find_control(said, chat_data.CONTROL):
            raise Failed(f'the answer holds the control token {token}')
        if not thinking and not content:
            raise Failed('the answer is empty')
        message = {'role': 'assistant', 'content': content}
        tokens = {'original_prompt_tokens': plan.original_tokens, 'prompt_tokens_with_system': plan.prompt_tokens}
        tokens['content_tokens'] = self.tokens(content)
        if thinking:
            message['thinking'], tokens['thinking_tokens'] = thinking, self.tokens(thinking)
        return {
            'index': plan.index,
            'messages': [*plan.turns, message],
            'system': self.system,
            'finish_reason': answer.finish_reason,
            'model': self.options.model,
            'tokens': tokens,
        }

    def tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)['input_ids'])


def extract(message: dict) -> tuple[str | None, str]:
    """Returns (thinking or None, content) of the message of an answer. Raises Failed."""
    content = message.get('content')
    try:
        thinking = chat_data.thinking_of(message)
        if not isinstance(content, str | None):
            raise TypeError
        return chat_data.split_thinking(chat_data.clean(content or ''), thinking)
    except TypeError:
        raise Failed('content or thinking of the answer is no text') from None
    except ValueError as e:
        raise Failed(f'the answer has {e}') from None
