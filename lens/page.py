"""A reading as one HTML file that needs nothing else, and as a table for notebooks.

The file holds page.css and page.js of this folder and asks for nothing from outside: its content security policy names
these two by hash and forbids all else, so that no text in it can do anything. Texts are escaped, control characters and
those that turn the direction of others replaced.
"""

import base64
import hashlib
import importlib.resources
import json
from typing import Any

import jinja2
from markupsafe import Markup

from lens.errors import PROSE, harmless

OTHERS, LEAST_PERCENT = 3, 5  # most alternatives of a token of an explanation, and how probable they are
STEPS = (0.15, 0.3, 0.5, 0.8)  # of the error: a colour from each to the next
CONTROLS = {  # of a row -> what the page says of it
    'context': 'no words, the last tokens of the text alone',
    'blind': 'words of a decoder that sees no activation',
    'mean': 'the mean activation of this text',
}


def _clean(x: Any) -> Any:
    """Returns JSON values with harmless texts and numbers of four digits."""
    if isinstance(x, dict):
        return {_clean(k): _clean(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_clean(v) for v in x]
    if isinstance(x, float):
        return float(f'{x:.4g}')
    return harmless(x, PROSE) if isinstance(x, str) else x


def _percent(p: float) -> int:
    return round(100 * p)


class _Strings(dict):
    """Numbers of texts, in the order of their first use: most tokens come often."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


def _compact(row: dict, strings: _Strings) -> list:
    """A row of Reading.to_json as page.js reads it: texts by number, probabilities and saliences in percent."""

    def choices(values, most: int, least: float = 0.0) -> list[int]:
        some = [(t, p) for t, p in values if 100 * p >= least][:most]
        return [n for t, p in some for n in (strings[t], _percent(p))]

    def word(w: dict) -> list:
        others = choices([c for c in w['alternatives'] if c[0] != w['token']], OTHERS, LEAST_PERCENT)
        own = [
            strings[w['token']],
            _percent(w['p']),
            0 if w.get('salience') is None else _percent(w['salience']),
            *others,
        ]
        return own if others or own[2] else own[:2]

    explanations = [
        [
            e['nmse'],
            e['cosine'],
            int(e['sampled']),
            [word(w) for w in e['words']],
        ]
        for e in row['explanations']
    ]
    tops = [choices(row[k], 5) for k in ('next_tokens', 'logit_lens')]
    own = [row['position'], strings[row['token']], row['role'], row['l2_norm'], row['beyond']]
    return [*own, row['flags'], [row['controls'].get(k) for k in CONTROLS], *tops, explanations]


def _json(value) -> Markup:
    """JSON that may stand in a script element of the page."""
    text = json.dumps(value, ensure_ascii=False, separators=(',', ':'))
    for c in '<>&\u2028\u2029':
        text = text.replace(c, f'\\u{ord(c):04x}')
    return Markup(text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def step(error: float) -> int:
    """Returns the colour of an error: 0 where little is lost, up to len(STEPS)."""
    return sum(error >= s for s in STEPS)


def _shown(token: str) -> str:
    """What is seen of a token in the text, without the blanks before it; something, where that is nothing."""
    return token.lstrip(' ').replace('\n', '\u21b5\n').replace('\t', '\u21e5') or '\u2423'


def _blanks(token: str) -> str:
    """The blanks before a token that shows something: they have no colour."""
    rest = token.lstrip(' ')
    return token[: len(token) - len(rest)] if rest else ''


PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader('lens', ''), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
)
PAGES.filters |= {'shown': _shown, 'blanks': _blanks, 'step': step}


def _groups(value: dict) -> list[tuple[str, list[dict]]]:
    """(roles, tokens) of each message; a token has its row, or none where it was not read."""
    rows = {row['position']: row for row in value['rows']}
    text = value['text'] or [[row['token'], row['role'], -1] for row in value['rows']]
    out, last = [], None
    for i, (token, role, message) in enumerate(text):
        if message != last:
            out.append((set(), []))
            last = message
        if role != 'special':
            out[-1][0].add(role)
        out[-1][1].append({'i': i, 'token': token, 'role': role, 'row': rows.get(i)})
    order = ('system', 'user', 'tool', 'thinking', 'final', 'text')
    return [(', '.join(sorted(roles, key=lambda r: (*order, r).index(r))), tokens) for roles, tokens in out]


def html(reading, notes: dict | None = None) -> str:
    """Returns the page of a lens.reading.Reading. notes: position -> {'lit', 'text'}, what a reader has put at tokens."""
    value, strings = _clean(reading.to_json()), _Strings()
    rows = [_compact(row, strings) for row in value['rows']]
    beyond = any(row['beyond'] is not None for row in value['rows'])
    return _page(value, {'strings': list(strings), 'rows': rows}, ('page',), notes or {}, beyond=beyond)[0]


def live(about: dict, beyond: bool, chat: bool, most_samples: int) -> tuple[str, str]:
    """Returns the page of a server, which reads what is typed in it, and its content security policy.

    about: of Reader.about; beyond: whether the lens reads tokens of the text; chat: whether the subject reads chats.
    """
    value = {'about': _clean(about), 'rows': [], 'text': []}
    names = {'strings': [], 'rows': [], 'names': list(CONTROLS)}
    how = {'beyond': beyond, 'chat': chat, 'most_samples': most_samples}
    return _page(value, names, ('page', 'live'), {}, **how)


def _page(value: dict, data: dict, parts: tuple[str, ...], notes: dict, **how) -> tuple[str, str]:
    """The page with styles and scripts of `parts`, and its policy."""
    files = importlib.resources.files('lens')
    css, js = ([files.joinpath(f'{part}.{kind}').read_text('utf-8') for part in parts] for kind in ('css', 'js'))
    policy = {'default-src': ["'none'"], 'style-src': map(_hash, css), 'script-src': map(_hash, js)}
    policy |= {'base-uri': ["'none'"], 'form-action': ["'none'"]} | (
        {'connect-src': ["'self'"]} if len(parts) > 1 else {}
    )
    said = '; '.join(f'{name} {" ".join(allowed)}' for name, allowed in policy.items())
    source = PAGES.get_template('page.html.jinja').render(
        about=value['about'],
        rows=value['rows'],
        groups=_groups(value),
        data=_json(data | {'controls': list(CONTROLS.values())}),
        notes=_json(_clean(notes)),
        css=map(Markup, css),
        js=map(Markup, js),
        policy=said,
        live=len(parts) > 1,
        **how,
    )
    return source, f"{said}; frame-ancestors 'none'"


def table(reading) -> str:
    """Returns the rows as an HTML table for a notebook."""
    return PAGES.from_string(TABLE).render(rows=_clean(reading.to_json())['rows'], title=harmless(reading.title()))


TABLE = """<table><caption style="text-align:left">{{ title }}</caption>
<thead><tr><th>#</th><th>token</th><th>error</th><th style="text-align:left">explanation</th><th>then</th></tr></thead><tbody>
{% for r in rows %}{% for e in r.explanations %}<tr><td>{{ r.position if loop.first }}</td>
<td style="white-space:pre"><bdi>{{ r.token | shown if loop.first }}</bdi></td>
<td>{{ '%.2f' % e.nmse }}{% if loop.first %} {{ r.label }}{% endif %}</td>
<td style="text-align:left"><bdi>{{ e.text }}</bdi>{% if loop.first %}{% for f in r.flags %} <small>({{ f }})</small>{% endfor %}{% endif %}</td>
<td style="white-space:pre"><bdi>{{ r.next_tokens[0][0] | shown if loop.first and r.next_tokens }}</bdi></td></tr>
{% endfor %}{% endfor %}</tbody></table>"""
