"""OpenAI-compatible servers: which of them are up, what an answer means, and how fast they are.

A server that fails is left alone for a time that doubles, then tried with one request; an answer brings it back.
A registry file with one URL per line adds and removes servers while requests run. Nothing that a server or the registry
says is taken on trust: an answer has a limit in bytes and in seconds, redirects are not followed, what goes into messages
is one short line of printable characters, and keys and passwords are kept out of it.
"""

import asyncio
import collections
import contextlib
import dataclasses
import email.utils
import functools
import itertools
import json
import math
import pathlib
import re
import time
import urllib.parse

from lens.errors import LensError, shown

from . import chat_data
from .urls import normal_url, public, secrets_of

with contextlib.suppress(ImportError):  # of the extra [datagen]: what asks servers says so, and --help needs none
    import aiohttp

BACKOFF_S, BACKOFF_MAX_S = 0.5, 30.0
ASK_AGAIN_S = 5.0  # for servers that were away
START_S = 5.0  # how long servers given by URL may take to answer at the start
NONE_LEFT_S = 1.0  # without a server for this long, the wait is said
MODELS_TIMEOUT_S, MODELS_BYTES = 10.0, 2**20  # of /models; JSON in memory may be 25 times as large
SPEED_WINDOW_S, MOST_RECENT = 30.0, 10_000  # answers that speed looks at
LASTING_S, LASTING_TIMES = 60.0, 5  # every server fails in a way that no waiting mends: then the run ends
PATIENCE_S = 1800.0  # no server gives an answer that can be used: then, too
MOST_REFUSED = 100  # requests that may be refused before the first answer
MOST_PAUSE_S = 300.0  # of a Retry-After
MOST_TOKENS = 10**7  # of one answer or prompt
LEAST_BYTES, BYTES_PER_TOKEN, MOST_BYTES = 2**18, 2**8, 2**23  # of an answer: what is longer is none
MOST_REGISTRY_BYTES, MOST_SAID = 2**16, 100
REASON_CHARS = 1000
LASTING = (401, 402, 403, 404, 405, 410, 501)  # a server that says so goes on saying so
NO_REFUSAL = (*LASTING, 408, 425, 429)  # a 4xx that says nothing about the one request


say = functools.partial(print, flush=True)  # above the bar of a terminal, which rich keeps below what is printed


class Failed(Exception):
    """No answer. counts: whether this was an attempt at the job, and not a server that is busy or away.

    pause_s: after which the server wants to be asked again. refused: the HTTP status with which a server says that it
    will never answer this request. lasting: whether every request to this server ends so.
    """

    def __init__(
        self,
        reason: str,
        counts: bool = True,
        pause_s: float | None = None,
        refused: int | None = None,
        lasting: bool = False,
    ):
        super().__init__(shown(reason, REASON_CHARS))
        self.counts, self.pause_s, self.refused, self.lasting = counts, pause_s, refused, lasting


@dataclasses.dataclass(frozen=True)
class Answer:
    message: dict
    finish_reason: str | None
    tokens: int | None
    raw: str
    server: 'Server'
    prompt_tokens: int | None = None


class Server:
    """One URL and what is known of it. url, label: without password and query, as they may be shown.

    key: API key. secrets: those of all servers, to which its own are added.
    """

    def __init__(self, url: str, key: str | None = None, secrets: set[str] | None = None):
        parts = urllib.parse.urlsplit(url)
        self.label = parts.netloc.rpartition('@')[2]
        self.url = f'{parts.scheme}://{self.label}{parts.path}'
        self._secrets = set() if secrets is None else secrets
        self._secrets |= secrets_of(parts) | ({key} if key else set())
        self.headers = {'Authorization': f'Bearer {key}'} if key else {}
        if parts.username is not None:
            login = [urllib.parse.unquote(x or '') for x in (parts.username, parts.password)]
            self.headers = {'Authorization': aiohttp.encode_basic_auth(*login)}
        self._query = parts.query and f'?{parts.query}'
        self.serves: bool | None = None  # the wanted model; None: not yet known
        self.problem = 'not yet asked'
        self.useful = False  # has given an answer that could be used
        self.lasting: list[float] = []  # the first LASTING_TIMES - 1 of these failures in a row, and the last
        self.in_flight = self.failures = 0
        self.retry_at = self.failed_at = 0.0
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=MOST_RECENT)
        self._since = time.monotonic()

    def at(self, path: str) -> str:
        return self.url + path + self._query

    def hide(self, text: str) -> str:
        """Returns `text` without the keys and passwords of the servers, which they may have repeated."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, '***')
        return text

    def note(self, failure: Failed | None) -> None:
        """Notes a failure; None: an answer that could be used."""
        self.useful |= failure is None
        if failure and failure.lasting:
            self.lasting[LASTING_TIMES - 1 :] = [time.monotonic()]
        elif not failure or not failure.counts:  # it is well, or has gone, and may come back otherwise
            self.lasting.clear()

    def hopeless(self) -> bool:
        """Returns whether all its answers were failures that last, several of them and for LASTING_S."""
        return len(self.lasting) == LASTING_TIMES and self.lasting[-1] - self.lasting[0] >= LASTING_S

    def ready(self, now: float) -> bool:
        return bool(self.serves) and now >= self.retry_at and (not self.failures or not self.in_flight)

    def fail(self, started: float, failure: Failed) -> None:
        """Notes a failure. Requests under way when one was noticed do not add to it; to refuse one is no failure."""
        now = time.monotonic()
        self.problem = str(failure)
        self.note(failure)
        if failure.refused:
            self.failures = 0
        elif failure.pause_s is not None:
            self.retry_at = max(self.retry_at, now + failure.pause_s)
        elif started >= self.failed_at:
            self.failures, self.failed_at = self.failures + 1, now
            most_s = LASTING_S / 6 if self.lasting else BACKOFF_MAX_S  # so that LASTING_S is about what a run lasts
            pause = min(BACKOFF_S * 2 ** min(self.failures - 1, 10), BACKOFF_MAX_S, most_s)
            self.retry_at = max(self.retry_at, now + pause)

    def add_tokens(self, tokens: int) -> None:
        self._recent.append((time.monotonic(), tokens))

    def speed(self) -> float:
        """Returns the generated tokens per second of the last half minute."""
        now = time.monotonic()
        tokens = sum(n for at, n in tuple(self._recent) if at > now - SPEED_WINDOW_S)  # another thread appends
        return tokens / max(min(now - self._since, SPEED_WINDOW_S), 0.5)


def retry_after(value: str) -> float | None:
    """Returns the seconds of a Retry-After header, a number or a date; None where it is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), MOST_PAUSE_S) if math.isfinite(seconds) else None


def parse_answer(raw: str, server: Server) -> Answer:
    """Raises Failed where `raw` is not the answer of a chat completion."""
    try:
        body = json.loads(raw.encode())  # not where its bytes were no UTF-8
        choice = body['choices'][0]
        message, usage, reason = choice['message'], body.get('usage'), choice.get('finish_reason')
        if not isinstance(message, dict):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Failed(f'the answer is not a chat completion: {raw[:200]!r}') from None
    usage = usage if isinstance(usage, dict) else {}
    tokens, prompt_tokens = (_count(usage.get(k)) for k in ('completion_tokens', 'prompt_tokens'))
    reason = chat_data.clean(reason) if isinstance(reason, str) else None
    return Answer(message, reason, tokens, raw, server, prompt_tokens)


def _count(value) -> int | None:
    """A number of tokens; None where `value` cannot be one."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


class Servers:
    """All servers of a run. urls: separated by commas. registry: text file with more. Raises LensError.

    interval_s: between two readings of the registry. key: API key for those whose URL has no password.
    """

    def __init__(
        self, urls: str, model: str, timeout: float, *, registry='', interval_s=ASK_AGAIN_S, key: str | None = None
    ):
        self._fixed = {text: normal_url(text) for text in urls.split(',') if text.strip()}
        if wrong := [text for text, url in self._fixed.items() if url is None]:
            raise LensError(f'{public(wrong[0])!r} in --server_urls is no URL such as http://localhost:8000/v1.')
        if not self._fixed and not registry:
            raise LensError('--server_urls holds no URL: give one, such as http://localhost:8000/v1.')
        self._registry = pathlib.Path(registry) if registry else None
        if self._registry and self._registry.exists() and not self._registry.is_file():
            raise LensError(f'--server_registry={registry} is no text file.')
        self._interval_s, self._model, self._timeout, self._key = interval_s, model, timeout, key
        self._listed: list[str] = []
        self._number = itertools.count()
        self._said: set[str] = set()
        self._secrets: set[str] = set()
        self._said_none = False
        self._refused, self._idle_since = 0, None
        self.all: dict[str, Server] = {}

    async def __aenter__(self):
        connector, cookies = aiohttp.TCPConnector(limit=0), aiohttp.DummyCookieJar()
        self._session = aiohttp.ClientSession(connector=connector, cookie_jar=cookies)
        return self

    async def __aexit__(self, *exc):
        await self._session.close()

    def _say_once(self, text: str) -> None:
        if text not in self._said and len(self._said) < MOST_SAID:
            self._said.add(text)
            say(text)

    def read_registry(self) -> None:
        """Brings `all` up to date; what cannot be read leaves the list as it was."""
        if self._registry and self._registry.is_file():
            with contextlib.suppress(OSError), self._registry.open('rb') as f:
                lines = f.read(MOST_REGISTRY_BYTES).decode('utf-8', 'replace').splitlines()
                texts = [text for line in lines if (text := re.split(r'(?:^|\s)#', line)[0].strip())]
                urls = {text: normal_url(text) for text in texts}
                self._listed = [url for url in urls.values() if url]
                for text in (text for text, url in urls.items() if not url):
                    self._say_once(f'{public(text)!r} in {self._registry} is no URL such as http://localhost:8000/v1')
        wanted = dict.fromkeys([*self._fixed.values(), *self._listed])
        for url in self.all.keys() - wanted.keys():
            say(f'server {self.all[url].url} was removed from the registry')
        self.all = {url: self.all.get(url) or Server(url, self._key, self._secrets) for url in wanted}

    async def _ask_models(self, server: Server) -> None:
        """Finds out whether the server serves the model."""
        serves, failure = None, None
        limit = aiohttp.ClientTimeout(total=min(MODELS_TIMEOUT_S, self._timeout))
        try:
            status, raw, _ = await self._exchange('GET', server, '/models', limit, MODELS_BYTES)
            if status != 200:
                wants = ', it wants an API key or refuses the one given' if status in (401, 403) else ''
                raise Failed(f'HTTP {status} from /models{wants}', lasting=status in LASTING)
            names = [m['id'] for m in json.loads(raw.encode())['data']]
            serves = self._model in names
            if not serves:
                served = shown(server.hide(chat_data.clean(', '.join(map(str, names[:20])))) or 'no model')
                self._say_once(f'server {server.url} is left out: it serves {served}, not {shown(self._model)}')
                raise Failed(f'serves {served}, not {shown(self._model)}', lasting=True)
        except (ValueError, KeyError, TypeError, RecursionError):
            failure = Failed('the answer of /models is not a list of models', lasting=True)
        except Failed as e:
            failure = e
        server.serves = serves
        if failure:
            server.problem = str(failure)
            server.note(failure)

    async def _admit(self) -> None:
        self.read_registry()
        await asyncio.gather(*(self._ask_models(s) for s in list(self.all.values()) if not s.serves))

    async def start(self) -> None:
        """Returns when one server is ready.

        Raises LensError where all serve other models, and without a registry where none answers within START_S.
        """
        began, said = time.monotonic(), False
        await self._admit()
        while not any(s.serves for s in self.all.values()):
            known, late = [*self.all.values()], not self._registry and time.monotonic() - began > START_S
            wrong = [s for s in known if s.serves is False]
            if wrong and (late or len(wrong) == len(known)):
                raise LensError(f'{wrong[0].url} {wrong[0].problem}: give the name it serves as --model.')
            if late:
                raise LensError(
                    f'No server answers at {", ".join(s.url for s in known)} ({known[0].problem}): start one, or name '
                    'another by --server_urls.'
                )
            self.check()
            if self._registry and not said:
                said = True
                say(f'no server yet: waiting for one in {self._registry}')
            await asyncio.sleep(self._interval_s if self._registry else 0.5)
            await self._admit()
        self._idle_since = None

    async def watch(self) -> None:
        """Runs until it is cancelled: the registry, and servers that were away when they were first asked."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self._admit()

    def _problems(self) -> str:
        return shown('; '.join(f'{s.label}: {s.problem}' for s in self.all.values()), REASON_CHARS)

    def check(self) -> None:
        """Raises LensError where to ask on is in vain.

        That is where all answers of every server have been failures that last for LASTING_S, where MOST_REFUSED
        requests were refused before the first answer, and where nothing could be used for PATIENCE_S, or three times
        the timeout. With a registry servers that are away, or not there yet, are waited for until the run is stopped.
        """
        known, now = [*self.all.values()], time.monotonic()
        self._idle_since = None if self._waits() else self._idle_since or now
        idle_s = now - (self._idle_since or now)
        if known and all(s.hopeless() for s in known):
            why = 'No server gives an answer that can be used'
        elif self._refused >= MOST_REFUSED and not any(s.useful for s in known):
            why = f'{self._refused} requests were refused and none was answered'
        elif idle_s > max(PATIENCE_S, 3 * self._timeout):
            why = f'No server has given an answer that can be used for {idle_s / 60:.0f} minutes'
        else:
            return
        remedy = 'look at --model, --server_urls and --api_key_env; what was answered is kept'
        raise LensError(f'{why} ({self._problems()}): {remedy}.')

    def _waits(self) -> bool:
        """Whether servers are awaited without a limit: those of a registry, while none of them is there."""
        return bool(self._registry) and not any(s.serves for s in self.all.values())

    async def _pick(self) -> Server:
        """The server whose turn it is; waits, and says so once, while there is none. Raises LensError."""
        none_since = time.monotonic()
        while not (ready := [s for s in self.all.values() if s.ready(time.monotonic())]):
            if any(s.in_flight for s in self.all.values()):
                none_since = time.monotonic()
            elif not self._said_none and time.monotonic() - none_since > NONE_LEFT_S:
                self._said_none = True
                limit_s = LASTING_S if all(s.lasting for s in self.all.values()) else PATIENCE_S
                limit = '' if self._waits() else f', for about {limit_s:.0f} s'
                say(f'no server is left ({self._problems() or "the registry is empty"}): waiting for one{limit}')
            self.check()
            await asyncio.sleep(0.1)
        return ready[next(self._number) % len(ready)]

    async def complete(self, body: dict) -> Answer:
        """Makes one attempt. Raises Failed, and LensError where there is nobody to ask."""
        server, started = await self._pick(), time.monotonic()
        server.in_flight += 1
        try:
            answer = await self._post(server, body)
            server.failures = 0
        except Failed as e:
            self._refused += bool(e.refused)
            server.fail(started, e)
            self.check()
            raise
        finally:
            server.in_flight -= 1
        if self._said_none:
            self._said_none = False
            say(f'server {server.url} answers: going on')
        return answer

    def judge(self, answer: Answer, failure: Failed | None) -> None:
        """Notes whether the answer could be used. Raises LensError where no server gives one that can."""
        server = answer.server
        if failure is None:
            self._idle_since = None
        else:
            failure.lasting, server.problem = not server.useful, str(failure)
        server.note(failure)
        if failure:
            self.check()

    async def _post(self, server: Server, body: dict) -> Answer:
        limit = aiohttp.ClientTimeout(total=self._timeout, sock_connect=min(MODELS_TIMEOUT_S, self._timeout))
        most = min(LEAST_BYTES + BYTES_PER_TOKEN * body['max_tokens'], MOST_BYTES)
        status, raw, after = await self._exchange('POST', server, '/chat/completions', limit, most, body)
        if status == 200:
            try:
                return parse_answer(raw, server)
            except Failed as e:  # after others that could be used it may be that of a proxy
                reason = str(e) if server.hide(raw) == raw else 'the answer is none, and repeats a key or password'
                raise Failed(reason, lasting=not server.useful) from None
        reason = f'HTTP {status}: {_error_text(server.hide(raw))}'
        if 400 <= status < 500 and (status == 404 or status not in NO_REFUSAL):
            await self._ask_models(server)
            if status != 404 or server.serves is False:
                raise Failed(reason, server.serves is not False, refused=status if server.serves else None)
        pause_s = retry_after(after) if status in (429, 503) else None
        raise Failed(reason, status not in (*LASTING, 429, 503), pause_s, lasting=status in LASTING)

    async def _exchange(self, method: str, server: Server, path: str, timeout, most: int, body: dict | None = None):
        """Returns (status, text, Retry-After) of an answer of at most `most` bytes. Raises Failed."""
        given = {'json': body, 'headers': server.headers, 'timeout': timeout, 'allow_redirects': False}
        try:
            async with self._session.request(method, server.at(path), **given) as response:
                if 300 <= response.status < 400:
                    to = server.hide(public(response.headers.get('Location', '')))
                    raise Failed(
                        f'HTTP {response.status}: it wants to redirect to {to or "nowhere"}', False, lasting=True
                    )
                raw = bytearray()
                async for chunk in response.content.iter_any():
                    raw += chunk
                    if len(raw) > most:
                        response.close()
                        raise Failed(f'the answer is longer than {most} bytes', lasting=not server.useful)
                text = raw.decode('utf-8', 'surrogateescape' if response.status == 200 else 'replace')
                return response.status, text, response.headers.get('Retry-After', '')
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as e:
            raise Failed(server.hide(str(e)) or type(e).__name__, counts=False) from None
        except TimeoutError:
            raise Failed(f'no answer within {timeout.total:g} s') from None
        except (aiohttp.ClientError, OSError, ValueError) as e:  # ValueError: a host that cannot be one
            raise Failed(server.hide(str(e)) or type(e).__name__) from None


def _error_text(raw: str) -> str:
    """The message of an OpenAI-style error, or the text itself."""
    try:
        body = json.loads(raw)
        error = body.get('error', body)
        return chat_data.clean(str(error.get('message', error) if isinstance(error, dict) else error))
    except (ValueError, AttributeError, RecursionError):
        return raw
