"""What tests of bad inputs share: junk, JSON that is changed or ruined, and a `Kind`, which tries inputs and counts them."""

import contextlib
import copy
import os
import pathlib
import shutil
import signal
import tempfile
import unicodedata

import hypothesis
from hypothesis import strategies as st
from hypothesis.strategies import sampled_from as one_of

from lens.errors import LensError

LIMIT_S, MOST_BYTES, MOST_CHARS = 30, 1 << 30, 1000  # of one input; of all of a kind; of a sentence
TRIES, LEAST = 300, 60  # inputs of each of seven kinds, and how many of them must differ
STATUS, FORGET = pathlib.Path('/proc/self/status'), pathlib.Path('/proc/self/clear_refs')
NOT_FINITE = (float('nan'), float('inf'), -float('inf'))
ODD = ('', ' ', 'nan', 'x\0', '\ud800', '\u202ex', '\x1b[31m', "{'a': '\n'}", '-1', '9' * 400, 'ä' * 2000)
HUGE = (2**31, 2**63, -(2**70), 10**300)
JUNK = one_of((None, True, 0, -1, 1.5, [], {}, [[]], {'a': 1}, [None], *HUGE, *NOT_FINITE, *ODD))
JUNK |= st.recursive(st.none() | st.integers() | st.text(max_size=8), lambda x: st.lists(x, max_size=3), max_leaves=4)
NO_JSON = (b'', b'3', b'[' * 100_000, b'{"a": ' + b'[' * 100_000, b'{"a": %s}' % (b'9' * 5000))


class Hang(BaseException):
    """An input takes too long; no library takes this for an error of its own."""


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since FORGET was written; 0 where nothing tells."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


class Kind:
    """What becomes of the inputs of a kind: those tried, those refused, what was said last."""

    def __init__(self):
        self.tried, self.refused, self.said = set(), set(), ''

    def attempt(self, act, what, wrong: bool = False, errors=LensError):
        """Returns act(), None where it refuses. Fails where `wrong` inputs pass, and for all but `errors`.

        what: the input, as a failure shows it.
        """

        def expire(*_):
            raise Hang(f'{what!r:.300}')

        self.tried.add(repr(what))
        before = signal.signal(signal.SIGALRM, expire)
        signal.alarm(LIMIT_S)
        try:
            out = act()
        except errors as e:
            self.refused.add(repr(what))
            self.said = str(e)
            check_sentence(e)
            return None
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        assert not wrong, f'{what!r:.300} passes'
        return out


def check_sentence(e: BaseException) -> None:
    text = str(e)
    harmless = not {unicodedata.category(c) for c in text} & {'Cc', 'Cf', 'Cs', 'Zl', 'Zp'}
    assert text and harmless and len(text) <= MOST_CHARS, f'{text!r:.1200}'
    assert text.endswith('.') or not isinstance(e, LensError | SystemExit), text  # the others are parts of sentences
    assert not isinstance(e, SystemExit) or text.startswith('error: '), text


def inputs(refused: float):
    """Makes a test of test(kind, draw, places) for one input. refused: the least share of inputs that must be."""
    how = {'derandomize': True, 'deadline': None, 'database': None, 'max_examples': TRIES}
    how |= {'suppress_health_check': list(hypothesis.HealthCheck)}

    def wrap(test):
        def run(places):
            kind = Kind()
            with contextlib.suppress(OSError):  # the peaks of other tests
                FORGET.write_text('5')
            before = memory('VmRSS')
            example = hypothesis.given(st.data())(lambda data: test(kind, data.draw, places))
            hypothesis.settings(**how)(example)()
            assert len(kind.tried) >= LEAST, f'only {len(kind.tried)} inputs differ'
            share = len(kind.refused) / len(kind.tried)
            assert share >= refused, f'only {share:.0%} are refused'
            assert memory('VmHWM') - before < MOST_BYTES

        return run

    return wrap


def steps(value, path=()):
    """Yields the places in a JSON value, of what is long those of the first ones."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, x in list(items)[:8]:
        yield from steps(x, (*path, k))


def changed(draw, value):
    """Returns a JSON value in which one thing is another, gone, twice, or of another name."""
    *path, last = draw(one_of([p for p in steps(value) if p]))
    out, how = copy.deepcopy(value), draw(one_of(('drop', 'junk', 'junk', 'name', 'twice')))
    inner = out
    for k in path:
        inner = inner[k]
    old = inner.pop(last) if how in ('drop', 'name') else inner[last]
    if how == 'name' and isinstance(inner, dict):
        inner[draw(st.text(max_size=5))] = old
    elif how in ('junk', 'twice'):
        inner[last] = draw(JUNK) if how == 'junk' else [old] * 2
    return out


def ruined(draw, good: bytes) -> bytes:
    """Returns bytes that are no JSON object, made of one."""
    good = good.strip()
    at = draw(st.integers(0, len(good) - 1))
    torn = (good[:at], good[:at] + b'\xff' + good[at:], good[:at] + b'\0' + good[at:])
    return draw(one_of((*torn, *torn, good * 2, good.decode().encode('utf-16'), b'[%s]' % good, *NO_JSON)))


@contextlib.contextmanager
def copied(folder: pathlib.Path, name: str, content: bytes | None = None):
    """Yields a copy of a folder in which one file is another, or gone."""
    with tempfile.TemporaryDirectory() as tmp:
        new = pathlib.Path(shutil.copytree(folder, pathlib.Path(tmp) / folder.name, copy_function=os.link))
        (new / name).unlink()
        if content is not None:
            (new / name).write_bytes(content)
        yield new
