"""The server of lens.serve, an ASGI application: its page, the routes of lens.api, and whom it answers.

It answers this machine under its own names alone, so that no other name can be made to lead here, and no page of another
site: requests are JSON, which such a page cannot send without being allowed to, and nobody is.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Mapping

from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lens import __version__, api, jobs, page, schemas
from lens.errors import LensError, shown
from lens.reader import Reader
from lens.reading import MOST_SAMPLES, Reading

NAMES = ('127.0.0.1', 'localhost', '::1')
MOST_BYTES = 1 << 25  # of the body of a request
HEARTBEAT_S = 10
# What open servers call the requests that they take at a time.
CONCURRENT = ('max_concurrent', 'max_concurrent_explains', 'max_describe_requests')
CONCURRENT += ('source_max_concurrent', 'reconstructor_max_concurrent')
GONE = 499  # what nobody sees: the client is not there any more
HEADERS = {
    'cache-control': 'no-store',
    'cross-origin-opener-policy': 'same-origin',
    'cross-origin-resource-policy': 'same-origin',
    'referrer-policy': 'no-referrer',
    'x-content-type-options': 'nosniff',
    'x-frame-options': 'DENY',
}
ANSWERS = {
    400: 'The request cannot be answered: `detail` says why in a sentence.',
    403: 'It comes from another site, or for another host.',
    413: f'The body has more than {MOST_BYTES} bytes.',
    415: 'The body is not said to be JSON.',
    429: 'Too many requests are waiting.',
    500: 'A fault of the program.',
}


class Refused(Exception):
    """A request that is answered by a status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def stranger(headers: Mapping[str, str], method: str) -> str:
    """Returns why a request is not of this machine and a page of this server, '' where it is."""
    host, origin = headers.get('host', ''), headers.get('origin')
    try:
        name = urllib.parse.urlsplit(f'//{host}').hostname
        same = origin is None or urllib.parse.urlsplit(origin)[:2] == ('http', host)
    except ValueError:
        return 'Host or Origin is no address.'
    if name not in NAMES:
        return f'Host {shown(host, 80) or "missing"} is not this machine: use 127.0.0.1 or localhost.'
    if not same or (method != 'GET' and headers.get('sec-fetch-site', 'none') not in ('none', 'same-origin')):
        return 'This server answers its own page alone, no other site.'
    return ''


def _no_number(x: str):
    raise ValueError(f'{x} is no number of JSON')


async def body(request: Request):
    """Returns the JSON of a request. Raises Refused."""
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != 'application/json':
        raise Refused(415, f'Content-Type is {shown(kind, 60) or "missing"}: send application/json.')
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise Refused(413, f'The body has more than {MOST_BYTES} bytes: send less.')
    try:
        return json.loads(data.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f'The body is no JSON ({shown(e, 100)}): send an object.') from None


def page_of(value, about: dict) -> str:
    """Returns the page of a reading that a client has, with its notes. about: of the lens. Raises LensError."""
    value = schemas.checked(value, schemas.Page)
    try:
        return page.html(dataclasses.replace(Reading.from_json(value['reading']), about=about), value['notes'])
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as e:
        raise LensError(f'This is no reading with notes ({shown(e, 100)}): send what /explain has given.') from None


def openapi() -> dict:
    """Returns the description of all routes, OpenAPI 3.1."""

    def answer(about: str, schema: dict, kind: str = 'application/json') -> dict:
        return {'description': about, 'content': {kind: {'schema': schema}}}

    detail = {'type': 'object', 'properties': {'detail': {'type': 'string'}}, 'required': ['detail']}
    failures = {str(k): answer(v, detail) for k, v in ANSWERS.items()}

    def post(about: str, takes: dict, gives: dict) -> dict:
        asked = {'required': True, 'content': {'application/json': {'schema': takes}}}
        return {'post': {'summary': about, 'requestBody': asked, 'responses': {'200': gives} | failures}}

    health = {'200': answer('It runs.', {'type': 'object'})} | {k: failures[k] for k in ('403', '500')}
    paths = {'/health': {'get': {'summary': 'Whether it runs, and what it takes.', 'responses': health}}}
    every = [r.takes for r in api.ROUTES.values()] + [schemas.Page]
    takes, defined = models_json_schema([(x, 'validation') for x in every], ref_template='#/components/schemas/{model}')
    of_page = answer('The file.', {'type': 'string'}, 'text/html')
    paths['/page'] = post('A reading as a page.', takes[schemas.Page, 'validation'], of_page)
    for path, route in api.ROUTES.items():
        keys = {k: {'type': v} for k, v in route.gives.items()}
        gives = answer('The answer.', {'type': 'object', 'required': list(keys), 'properties': keys})
        if 'stream' in route.takes.model_fields:
            gives['content'] |= {'text/event-stream': {}}
        paths[path] = post(route.about, takes[route.takes, 'validation'], gives)
    about = {'title': 'lens', 'version': __version__, 'description': 'The activations of a language model in words.'}
    return {'openapi': '3.1.0', 'info': about, 'paths': paths, 'components': {'schemas': defined['$defs']}}


def refused(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({'detail': sentence}, status, {'retry-after': '5'} if status == 429 else None)


async def failed(request: Request, e: Exception) -> Response:
    """The answer where one cannot be made."""
    path = shown(request.url.path, 80)
    if isinstance(e, ClientDisconnect):
        return Response(status_code=GONE)
    if isinstance(e, HTTPException):
        about = {404: f'There is no {path}: /openapi.json names the routes.'}
        about |= {405: f'{shown(request.method, 20)} is not for {path}.'}
        return JSONResponse({'detail': about.get(e.status_code, e.detail)}, e.status_code, e.headers)
    if isinstance(e, Refused | LensError):
        return refused(e.status if isinstance(e, Refused) else 429 if isinstance(e, jobs.Full) else 400, str(e))
    return refused(500, jobs.BROKEN)


class Server:
    """A lens and the thread that works with it. queue: requests that may wait or run at a time."""

    def __init__(self, reader: Reader, queue: int):
        self.reader, self.worker = reader, jobs.Worker(queue)
        chats = bool(reader.tokenizer.chat_template)
        self.html, self.policy = page.live(reader.about(), reader.context_tokens > 0, chats, MOST_SAMPLES)
        self.description = openapi()

    async def root(self, request: Request) -> Response:
        if 'application/json' in request.headers.get('accept', ''):  # clients of open servers look here whether it runs
            return await self.health(request)
        return Response(self.html, media_type='text/html', headers={'content-security-policy': self.policy})

    async def describe(self, request: Request) -> Response:
        return JSONResponse(self.description)

    async def health(self, request: Request) -> Response:
        reader, config = self.reader, self.reader.base.config
        about = {'status': 'ok', 'verbalizer_model': reader.name, 'source_model': reader.about()['subject']}
        about |= {'extraction_layer': reader.layer, 'd_model': config.d_model, 'max_positions': config.max_positions}
        about |= {'reconstructor_available': True, 'completion_available': True}
        about['num_cuda_devices'] = sum(d.platform == 'gpu' for d in reader.run.mesh.devices.flat)
        about |= dict.fromkeys(CONCURRENT, self.worker.most)
        return JSONResponse(about | {'waiting': self.worker.count, 'limits': api.LIMITS})

    async def page(self, request: Request) -> Response:
        made = await asyncio.to_thread(page_of, await body(request), self.reader.about())
        return Response(made, media_type='text/html')

    async def answer(self, request: Request, route: api.Route) -> Response:
        value = schemas.checked(await body(request), route.takes)
        job = self.worker.submit(route.steps(self.reader, value))
        try:
            return await until_gone(request, self._answer(job, route, value.get('stream')))
        except BaseException:
            job.cancel()
            raise

    async def _answer(self, job: jobs.Job, route: api.Route, stream: bool) -> Response:
        given = aiter(job)
        head = await anext(given)
        if stream:
            return StreamingResponse(events(job, head, given), media_type='text/event-stream')
        results = [x async for x in given]
        return JSONResponse(head | {route.results: results} if route.results else head)


async def until_gone(request: Request, work: Awaitable):
    """Awaits work for a client. Raises ClientDisconnect once it has gone away."""

    async def gone() -> None:
        while (await request.receive())['type'] != 'http.disconnect':
            pass

    tasks = [asyncio.ensure_future(x) for x in (work, gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def events(job: jobs.Job, head: dict, given: AsyncIterator) -> AsyncIterator[str]:
    """Yields an answer as server-sent events, a comment where nothing comes for long."""

    def event(x: dict) -> str:
        return f'data: {json.dumps(x, ensure_ascii=False)}\n\n'

    following = None
    try:
        yield event(head)
        while True:
            following = following or asyncio.ensure_future(anext(given, None))
            done, _ = await asyncio.wait([following], timeout=HEARTBEAT_S)
            if done and following.result() is None:
                break
            yield event(following.result()) if done else ': more is to come\n\n'
            following = None if done else following
    except (LensError, RuntimeError) as e:
        yield event({'detail': str(e)})
    finally:
        job.cancel()
        if following:
            following.cancel()
    yield 'data: [DONE]\n\n'


def application(reader: Reader, queue: int):
    """Returns the ASGI application. queue: requests that may wait or run at a time."""
    server = Server(reader, queue)

    @contextlib.asynccontextmanager
    async def life(app):
        yield
        await asyncio.to_thread(server.worker.close)

    gets = {'/': server.root, '/health': server.health, '/openapi.json': server.describe}
    posts = {path: functools.partial(server.answer, route=r) for path, r in api.ROUTES.items()} | {'/page': server.page}
    routes = [Route(path, f, methods=['GET']) for path, f in gets.items()]
    routes += [Route(path, f, methods=['POST']) for path, f in posts.items()]
    handlers = dict.fromkeys((HTTPException, ClientDisconnect, Refused, LensError, RuntimeError, Exception), failed)
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=life)

    async def guarded(scope, receive, send):
        async def with_headers(message):
            if message['type'] == 'http.response.start':
                own = ((k.encode(), v.encode()) for k, v in HEADERS.items())
                message['headers'] = [*message.get('headers', ()), *own]
            await send(message)

        if scope['type'] == 'http':
            headers = {k.decode('latin-1').lower(): v.decode('latin-1') for k, v in scope['headers']}
            if why := stranger(headers, scope['method']):
                return await refused(403, why)(scope, receive, with_headers)
        await app(scope, receive, with_headers)

    return guarded
