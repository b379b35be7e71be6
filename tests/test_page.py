"""The page of a reading: one file, small, whatever its texts are, in which nothing but its own script runs."""

import base64
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest

from lens import page
from lens.reading import Choice, Explanation, Reading, Row, Word

HOSTILE = (
    '</script><script>alert(1)</script>',
    '"><img src=x onerror=alert(1)>',
    "'-alert(1)-'",
    '<!--',
    '{{ 7 * 7 }}',
    '\u202egnp',
    '\x1b[2J',
    '\u2028',
)
BEYOND = {'context': 0.4, 'blind': 1.1, 'mean': 0.6}


def reading(text: str = ' word', tokens: int = 3, words: int = 2, context: bool = True) -> Reading:
    """Every text of others in it is `text`, numbered in long readings."""

    def name(k: int) -> str:
        return text if tokens < 9 else f'{text}{k % 997}'

    def choices(k):
        return tuple(Choice(name(k + i), p) for i, p in enumerate((0.6, 0.2, 0.1, 0.04, 0.01)))

    said = [tuple(Word(name(7 * k + i), i, 0.6, choices(k + i), 0.1 * i) for i in range(words)) for k in range(tokens)]
    rows = tuple(
        Row(
            name(k),
            k,
            k,
            ('user', 'thinking', text)[k % 3],
            21.0 + k,
            (Explanation(''.join(w.token for w in said[k]), said[k], 0.1 + k % 9 / 10, 0.9),),
            choices(k),
            choices(k + 1),
            BEYOND if context else {'mean': 0.6},
            ('early',) if k == 0 else (),
            k % 3,
        )
        for k in range(tokens)
    )
    about = {'subject': text, 'layer': 1, 'lens': text, 'step': 5, 'min_pos': 2, 'error': 'nmse'}
    return Reading(rows, about, tuple((r.token, r.role, r.message) for r in rows))


class Parsed(html.parser.HTMLParser):
    """Elements with their attributes, and the texts inside."""

    def __init__(self, source: str):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize('text', HOSTILE)
def test_texts_are_shown_and_do_nothing(text):
    source = page.html(reading(text))
    ours, usual = Parsed(source), Parsed(page.html(reading()))
    assert [(tag, sorted(a)) for tag, a in ours.elements] == [(tag, sorted(a)) for tag, a in usual.elements]
    assert not any(k.startswith('on') or k == 'style' for _, a in ours.elements for k in a)
    assert '\u202e' not in source and '\x1b' not in source
    inside = re.search(r'id="data">(.*?)</script>', source, re.S)[1]
    assert not set(inside) & set('<>&\u2028'), 'the parser of a browser stays in the element'
    data = json.loads(inside)
    assert data['strings'][data['rows'][0][1]] == page._clean(text)
    table = Parsed(page.table(reading(text)))
    assert [tag for tag, _ in table.elements] == [tag for tag, _ in Parsed(page.table(reading())).elements]


def test_its_policy_lets_its_own_script_and_style_run_and_nothing_else():
    source = page.html(reading())
    policy = next(
        a['content'] for tag, a in Parsed(source).elements if a.get('http-equiv') == 'Content-Security-Policy'
    )
    allowed = dict(part.strip().split(' ', 1) for part in policy.split(';'))
    assert allowed['default-src'] == "'none'"
    for kind, directive in (('style', 'style-src'), ('script', 'script-src')):
        inside = re.search(f'<{kind}>(.*?)</{kind}>', source, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert allowed[directive] == f"'sha256-{digest}'"
    assert not re.search(r'(?:src|href)="(?!#)|url\(|@import|https?://', source)


def test_two_hundred_tokens_are_three_hundred_kilobytes_at_most():
    assert len(page.html(reading(' wor', 200, 24)).encode()) < 300_000


def test_the_data_are_those_of_the_reading():
    r = reading(' a"b', 3)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.html(r), re.S)[1])
    strings, rows = data['strings'], data['rows']
    assert len(rows) == 3 and len(data['controls']) == len(page.CONTROLS)
    position, token, role, norm, beyond, flags, controls, following, _, explanations = rows[0]
    assert (position, strings[token], role, norm, flags) == (0, ' a"b', 'user', 21.0, ['early'])
    assert beyond == pytest.approx(r[0].beyond, rel=1e-3) and controls == [0.4, 1.1, 0.6]
    assert following == [token, 60, token, 20, token, 10, token, 4, token, 1]
    (nmse, cosine, sampled, words), *_ = explanations
    assert (nmse, cosine, sampled, len(words)) == (0.1, 0.9, 0, 2)
    assert words[1] == [token, 60, 10]  # the others are the same text here
    other = json.loads(re.search(r'id="data">(.*?)</script>', page.html(reading(' w', 10)), re.S)[1])
    said = other['rows'][0][-1][0][-1][1]
    assert [other['strings'][i] for i in said[:1] + said[3::2]] == [' w1', ' w2', ' w3'] and said[4::2] == [20, 10]


def test_what_is_not_there_is_not_told():
    source = page.html(reading(context=False))
    assert 'by-beyond' not in source.split('<script')[0] and 'by-beyond' in page.html(reading()).split('<script')[0]
    assert Reading((), reading().about) is not None and 'id="t0"' not in page.html(Reading((), reading().about))


def luminance(colour: str) -> float:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize('mode', [0, 1])
def test_contrasts(mode):
    """4.5 to 1 for texts in both modes (WCAG AA)."""
    css = re.search(r'<style>(.*?)</style>', page.html(reading()), re.S)[1]
    colours = dict(re.findall(r'--([\w]+): (#\w{6});', css.split(':root {')[1 + mode].split('}')[0]))
    pairs = [('ink', b) for b in ('paper', 'card', 'mark', 'q0', 'q1', 'q2', 'q3', 'q4')]
    pairs += [(f, b) for f in ('soft', 'accent') for b in ('paper', 'card')]
    for front, back in pairs:
        low, high = sorted(luminance(colours[k]) for k in (front, back))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)
