"""The one kind of error that a user can mend, and what its message may hold."""

import importlib.util
import unicodedata

SHOWN_CHARS = 300  # of a text of others in a message


class LensError(ValueError):
    """Bad input. The message is one sentence that names the file or key and the remedy; entry points
    print it without a traceback and exit with code 1."""


def shown(text: object, most: int = SHOWN_CHARS) -> str:
    """Returns a text of others as it may stand in a message or on a terminal: one line, no control characters and none
    that change the direction of what follows, at most `most` characters."""
    line = ' '.join(str(text)[: 4 * most].split())
    line = ''.join('\ufffd' if unicodedata.category(c) in ('Cc', 'Cf', 'Cs') else c for c in line)
    return line if len(line) <= most else line[: most - 2] + ' \u2026'


def need_package(name: str, extra: str, what: str) -> None:
    """Raises LensError where the package `name` is not installed. extra: of lens, which brings it; what: needs it."""
    if importlib.util.find_spec(name) is None:
        raise LensError(f"{what} needs the package {name}: pip install 'lens[{extra}]', in a checkout '.[{extra}]'.")
