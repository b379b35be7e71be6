"""URLs of servers: which are some, and what of them may be shown."""

import contextlib
import re
import urllib.parse

from lens.errors import shown

with contextlib.suppress(ImportError):  # comes with aiohttp, of the extra [datagen]
    import yarl


def normal_url(text: str) -> str | None:
    """Returns the base URL with its /v1, or None where `text` is no http URL."""
    text = text.strip()
    try:
        parts = urllib.parse.urlsplit(text)
        valid = parts.scheme in ('http', 'https') and bool(parts.hostname) and parts.port != 0
        valid = valid and text.isprintable() and ' ' not in text and bool(yarl.URL(text).host)
    except ValueError:  # a port that is no number
        return None
    parts = parts._replace(path=parts.path.rstrip('/') or '/v1', fragment='')
    return urllib.parse.urlunsplit(parts) if valid else None


def public(url: str) -> str:
    """Returns what may be shown of a URL, be it a good one or not: no user, password, query and fragment."""
    head, _, rest = url.rpartition('@')
    scheme = re.match('[a-z]+://', head)
    return shown((scheme[0] if scheme else '') + re.split('[?#]', rest, maxsplit=1)[0])


def secrets_of(parts: urllib.parse.SplitResult) -> set[str]:
    """Returns the texts of a URL that must not be shown: its password, or the user where there is none, and the values of
    its query; as they are written, meant and sent."""
    login = parts.password or parts.username
    written = {login, *(pair.partition('=')[2] for pair in parts.query.split('&'))} - {None, ''}
    meant = {urllib.parse.unquote(x) for x in written}
    return written | meant | {urllib.parse.quote(x) for x in meant}
