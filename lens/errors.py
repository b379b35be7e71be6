"""The one kind of error that a user can mend, and what its message may hold."""

import importlib.util
import unicodedata

SHOWN_CHARS = 300  # of a text of others in a message
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 1e30  # of a number that no bound says more about: below JAX's types
LONGEST_TEXT = 100_000  # characters of a flag or key


class LensError(ValueError):
    """Bad input. The message is one sentence that names the file or key and the remedy; entry points
    print it without a traceback and exit with code 1."""


def require(ok: bool, message: str) -> None:
    """Raises LensError unless `ok`."""
    if not ok:
        raise LensError(message)


def shown(text: object, most: int = SHOWN_CHARS) -> str:
    """Returns a text of others as it may stand in a message or on a terminal: one line, no control characters and none
    that change the direction of what follows, at most `most` characters."""
    line = harmless(' '.join(str(text)[: 4 * most].split()))
    return line if len(line) <= most else line[: most - 2] + ' \u2026'


PROSE = '\n\t\u200c\u200d'  # of what is not printable, kept in texts that pages show: lines break, letters join


def harmless(text: str, kept: str = '') -> str:
    """Returns a text of others with U+FFFD in place of control characters, halves of characters and what is not seen but
    changes how the rest is: all but `kept`."""
    if text.isprintable():
        return text
    return ''.join('\ufffd' if unicodedata.category(c) in ('Cc', 'Cf', 'Cs') and c not in kept else c for c in text)


def number(value, name: str, least: float | None = None, most: float | None = None, *, whole: bool = True):
    """Returns `value` once it is known to be an int, or, where not `whole`, any finite number, in least..most. A bound
    that is None is LARGEST_INT or LARGEST_FLOAT. Raises LensError, which begins with NAME=VALUE."""
    largest = LARGEST_INT if whole else LARGEST_FLOAT
    low, high = -largest if least is None else least, largest if most is None else most
    long = isinstance(value, int) and value.bit_length() > 1000  # Python does not print them at any length
    given = f'{name}={"an integer of many digits," if long else shown(repr(value))}'
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise LensError(f'{given} must be a {"whole number" if whole else "number"}.')
    if not low <= value <= high:
        allowed = f'at least {low}' if value < low else f'at most {high}' if value > high else 'finite'
        raise LensError(f'{given} must be {allowed}.')
    return value


def text(value, name: str, most: int = LONGEST_TEXT) -> str:
    """Returns `value` once it is known to be a text that files, terminals and tokenizers take, of at most `most`
    characters. Raises LensError."""
    if not isinstance(value, str):
        raise LensError(f'{name}={shown(repr(value))} must be a text.')
    if len(value) > most:
        raise LensError(f'{name} has {len(value)} characters, it must have at most {most}.')
    if '\0' in value or any('\ud800' <= c <= '\udfff' for c in value):
        raise LensError(f'{name}={shown(repr(value))} must be Unicode without NUL and halves of characters.')
    return value


def need_package(name: str, extra: str, what: str) -> None:
    """Raises LensError where the package `name` is not installed. extra: of lens, which brings it; what: needs it."""
    if importlib.util.find_spec(name) is None:
        raise LensError(f"{what} needs the package {name}: pip install 'lens[{extra}]', in a checkout '.[{extra}]'.")
