"""From the texts of a configuration to token ids: prompts around the slots and the words, tags of explanations."""

import re

from lens.errors import LensError
from lens.models import injection
from lens.models.decoder import Prompt
from lens.response import Tags

EMBED, TEXT = '<embed>', '<text>'
# What a special token looks like in a prompt; other tags are ordinary text.
SPECIAL_LITERAL = r'<\|[^|<>]+\|>|</?s>|<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn)>|\[[A-Z]+\]'


class PromptError(LensError):
    """A prompt or tag cannot be used with the tokenizer of the subject; the message names the key."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise PromptError(message)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)['input_ids']


def _check_specials(tokenizer, text: str, key: str) -> None:
    """Special tokens are written out, and each must be one token of the subject."""
    for literal in re.findall(SPECIAL_LITERAL, text):
        _require(
            len(_ids(tokenizer, literal)) == 1,
            f'{key} holds {literal}, which is no token of the subject: write a special token that its tokenizer has.',
        )


def encoder_prompt(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Token ids before and after the words, which stand where <text> comes last: an earlier one is a tag."""
    key = 'encoder.prompt'
    _require(TEXT in text, f'{key}={text!r} must contain {TEXT}.')
    before, after = text.rsplit(TEXT, 1)
    _check_specials(tokenizer, before + after, key)
    return _ids(tokenizer, before), _ids(tokenizer, after)


def decoder_prompt(tokenizer, text: str, marker: str) -> Prompt:
    """Token ids around the slots. A marker is tokenised with the whole text, as readers of it will do."""
    key = 'decoder.prompt'
    count = text.count(EMBED)
    _require(count >= 1, f'{key}={text!r} must contain {EMBED}.')
    _check_specials(tokenizer, text.replace(EMBED, ''), key)
    if not marker:
        parts = [_ids(tokenizer, part) for part in text.split(EMBED)]
        right, more = list(parts[1]), []
        for part in parts[2:]:
            more.append(len(right))
            right += [0, *part]
        return Prompt(parts[0], right, tuple(more))
    token = _ids(tokenizer, marker)
    _require(len(token) == 1, f'decoder.marker={marker!r} is {len(token)} tokens of the subject, it must be one.')
    ids = _ids(tokenizer, text.replace(EMBED, marker))
    found = injection.sites(ids, token[0])
    _require(
        len(found) == count == ids.count(token[0]),
        f'{key}={text!r} has {count} slots, but with decoder.marker={marker!r} in them its tokens have {len(found)} '
        'inside: put text around each slot and take a marker that does not merge with it.',
    )
    first = found[0]
    return Prompt(ids[:first], ids[first + 1 :], tuple(i - first - 1 for i in found[1:]), token[0])


def tags(tokenizer, opening: str, closing: str) -> Tags:
    """What an explanation stands between."""
    _require(bool(closing) or not opening, f'explanation_open={opening!r} needs an explanation_close.')
    return Tags(tuple(_ids(tokenizer, opening)), tuple(_ids(tokenizer, closing)))
