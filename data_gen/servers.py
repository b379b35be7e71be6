"""OpenAI-compatible servers: which of them are up, what an answer means, and how fast they are.

A server that fails is left alone for a time that doubles, then tried with one request; an answer brings it back.
A registry file with one URL per line adds and removes servers while requests run.
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
import time
import urllib.parse

from lens.errors import LensError

from . import chat_data

with contextlib.suppress(ImportError):  # of the extra [datagen]: what asks servers says so, and --help needs none
    import aiohttp

BACKOFF_S, BACKOFF_MAX_S = 0.5, 30.0
ASK_AGAIN_S = 5.0  # for servers that were away
START_S = 5.0  # how long servers given by URL may take to answer at the start
NONE_LEFT_S = 1.0  # without a server for this long, the wait is said
MODELS_TIMEOUT_S = 10.0
SPEED_WINDOW_S, MOST_RECENT = 30.0, 10_000  # answers that speed looks at
MOST_TOKENS = 2**31 - 1  # of one answer or prompt
NO_REFUSAL = (401, 402, 403, 405, 408, 425, 429)  # a 4xx that says nothing about the one request


say = functools.partial(print, flush=True)  # above the bar of a terminal, which rich keeps below what is printed


class Failed(Exception):
    """No answer. counts: whether this was an attempt at the job, and not a server that is busy or away.

    pause_s: after which the server wants to be asked again. refused: the HTTP status with which a server says that it
    will never answer this request.
    """

    def __init__(self, reason: str, counts: bool = True, pause_s: float | None = None, refused: int | None = None):
        super().__init__(reason)
        self.counts, self.pause_s, self.refused = counts, pause_s, refused


@dataclasses.dataclass(frozen=True)
class Answer:
    message: dict
    finish_reason: str | None
    tokens: int | None
    raw: str
    server: 'Server'
    prompt_tokens: int | None = None


class Server:
    """One URL and what is known of it."""

    def __init__(self, url: str):
        self.url = url
        self.label = urllib.parse.urlsplit(url).netloc
        self.serves: bool | None = None  # the wanted model; None: not yet known
        self.problem = 'not yet asked'
        self.in_flight = self.failures = 0
        self.retry_at = self.failed_at = 0.0
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=MOST_RECENT)
        self._since = time.monotonic()

    def ready(self, now: float) -> bool:
        return bool(self.serves) and now >= self.retry_at and (not self.failures or not self.in_flight)

    def fail(self, started: float, failure: Failed) -> None:
        """Notes a failure. Requests under way when one was noticed do not add to it; to refuse one is no failure."""
        now = time.monotonic()
        self.problem = str(failure)
        if failure.refused:
            self.failures = 0
        elif failure.pause_s is not None:
            self.retry_at = max(self.retry_at, now + failure.pause_s)
        elif started >= self.failed_at:
            self.failures, self.failed_at = self.failures + 1, now
            pause = min(BACKOFF_S * 2 ** min(self.failures - 1, 10), BACKOFF_MAX_S)
            self.retry_at = max(self.retry_at, now + pause)

    def add_tokens(self, tokens: int) -> None:
        self._recent.append((time.monotonic(), tokens))

    def speed(self) -> float:
        """Returns the generated tokens per second of the last half minute."""
        now = time.monotonic()
        tokens = sum(n for at, n in tuple(self._recent) if at > now - SPEED_WINDOW_S)  # another thread appends
        return tokens / max(min(now - self._since, SPEED_WINDOW_S), 0.5)


def normal_url(text: str) -> str | None:
    """Returns the base URL with its /v1, or None where `text` is no http URL."""
    try:
        parts = urllib.parse.urlsplit(text.strip().rstrip('/'))
        valid = parts.scheme in ('http', 'https') and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return None
    return urllib.parse.urlunsplit(parts if parts.path else parts._replace(path='/v1')) if valid else None


def retry_after(value: str) -> float | None:
    """Returns the seconds of a Retry-After header, a number or a date; None where it is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def parse_answer(raw: str, server: Server) -> Answer:
    """Raises Failed where `raw` is not the answer of a chat completion."""
    try:
        body = json.loads(raw)
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

    interval_s: between two readings of the registry. key: API key that all of them get.
    """

    def __init__(
        self, urls: str, model: str, timeout: float, *, registry='', interval_s=ASK_AGAIN_S, key: str | None = None
    ):
        self._fixed = {text: normal_url(text) for text in urls.split(',') if text.strip()}
        if wrong := [text for text, url in self._fixed.items() if url is None]:
            raise LensError(f'{wrong[0]!r} in --server_urls is no URL such as http://localhost:8000/v1.')
        self._registry = pathlib.Path(registry) if registry else None
        self._interval_s, self._model, self._timeout = interval_s, model, timeout
        self._headers = {'Authorization': f'Bearer {key}'} if key else {}
        self._listed: list[str] = []
        self._number = itertools.count()
        self._said_none = False
        self.all: dict[str, Server] = {}

    async def __aenter__(self):
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=self._headers)
        return self

    async def __aexit__(self, *exc):
        await self._session.close()

    def read_registry(self) -> None:
        """Brings `all` up to date; what cannot be read leaves the list as it was."""
        if self._registry:
            with contextlib.suppress(OSError):
                lines = self._registry.read_text('utf-8', 'replace').splitlines()
                self._listed = [u for line in lines if (u := normal_url(line.partition('#')[0]))]
        wanted = dict.fromkeys([*self._fixed.values(), *self._listed])
        for url in self.all.keys() - wanted.keys():
            say(f'server {url} was removed from the registry')
        self.all = {url: self.all.get(url) or Server(url) for url in wanted}

    async def _ask_models(self, server: Server) -> None:
        """Finds out whether the server serves the model."""
        try:
            limit = aiohttp.ClientTimeout(total=min(MODELS_TIMEOUT_S, self._timeout))
            async with self._session.get(server.url + '/models', timeout=limit) as response:
                status, raw = response.status, await response.read()
            if status != 200:
                wants = ', it wants an API key or refuses the one given' if status in (401, 403) else ''
                raise ValueError(f'HTTP {status} from /models{wants}')
            names = [m['id'] for m in json.loads(raw)['data']]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError, RecursionError) as e:
            server.serves, server.problem = None, _reason(e)
            return
        server.serves = self._model in names
        if not server.serves:
            problem = chat_data.clean(f'serves {", ".join(map(str, names)) or "no model"}, not {self._model}')
            if server.problem != problem:
                say(f'server {server.url} is left out: it {problem}')
            server.problem = problem

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
            if self._registry and not said:
                said = True
                say(f'no server yet: waiting for one in {self._registry}')
            await asyncio.sleep(self._interval_s if self._registry else 0.5)
            await self._admit()

    async def watch(self) -> None:
        """Runs until it is cancelled: the registry, and servers that were away when they were first asked."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self._admit()

    async def _pick(self) -> Server:
        """The server whose turn it is; waits, and says so once, while there is none."""
        none_since = time.monotonic()
        while not (ready := [s for s in self.all.values() if s.ready(time.monotonic())]):
            if any(s.in_flight for s in self.all.values()):
                none_since = time.monotonic()
            elif not self._said_none and time.monotonic() - none_since > NONE_LEFT_S:
                self._said_none = True
                problems = '; '.join(f'{s.label}: {s.problem}' for s in self.all.values())
                say(f'no server is left ({problems or "the registry is empty"}): waiting for one')
            await asyncio.sleep(0.1)
        return ready[next(self._number) % len(ready)]

    async def complete(self, body: dict) -> Answer:
        """Makes one attempt. Raises Failed."""
        server, started = await self._pick(), time.monotonic()
        server.in_flight += 1
        try:
            answer = await self._post(server, body)
            server.failures = 0
        except Failed as e:
            server.fail(started, e)
            raise
        finally:
            server.in_flight -= 1
        if self._said_none:
            self._said_none = False
            say(f'server {server.url} answers: going on')
        return answer

    async def _post(self, server: Server, body: dict) -> Answer:
        limit = aiohttp.ClientTimeout(total=self._timeout, sock_connect=min(MODELS_TIMEOUT_S, self._timeout))
        try:
            async with self._session.post(server.url + '/chat/completions', json=body, timeout=limit) as response:
                raw = (await response.read()).decode('utf-8', 'replace')
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as e:
            raise Failed(_reason(e), counts=False) from None
        except TimeoutError:
            raise Failed(f'no answer within {self._timeout:g} s') from None
        except (aiohttp.ClientError, OSError) as e:
            raise Failed(_reason(e)) from None
        if response.status == 200:
            return parse_answer(raw, server)
        reason = f'HTTP {response.status}: {_error_text(raw)}'
        if 400 <= response.status < 500 and response.status not in NO_REFUSAL:
            await self._ask_models(server)
            raise Failed(reason, server.serves is not False, refused=response.status if server.serves else None)
        pause_s = retry_after(response.headers.get('Retry-After', '')) if response.status in (429, 503) else None
        raise Failed(reason, response.status not in (401, 402, 403, 429, 503), pause_s)


def _error_text(raw: str) -> str:
    """The message of an OpenAI-style error, or the text itself."""
    try:
        body = json.loads(raw)
        error = body.get('error', body)
        return chat_data.clean(str(error.get('message', error) if isinstance(error, dict) else error))[:1000]
    except (ValueError, AttributeError, RecursionError):
        return raw[:1000]


def _reason(e: BaseException) -> str:
    """One line that says why there is no answer."""
    if isinstance(e, TimeoutError):
        return 'no answer in time'
    if isinstance(e, (KeyError, TypeError)):
        return 'the answer of /models is not a list of models'
    return ' '.join(str(e).split()) or type(e).__name__
