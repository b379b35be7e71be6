"""A scripted OpenAI-compatible server on 127.0.0.1: answers that follow from the request alone, and faults."""

import contextlib
import hashlib
import http.server
import json
import random
import socket
import threading
import time

FAULTS = ('cut', '500', '429', 'hang', 'malformed', 'no choices')
WORDS = ['rabbit', 'meadow', 'river', 'lantern', 'story', 'morning', 'forest', 'hill', 'winter', 'bread']


def answer_to(messages: list[dict], max_tokens: int) -> tuple[str, str]:
    """(thinking, content): words drawn from a digest of the request."""
    digest = hashlib.sha256(json.dumps([messages, max_tokens]).encode()).digest()
    words = [WORDS[b % len(WORDS)] for b in digest]
    return ' '.join(words[: 3 + digest[0] % 20]), ' '.join(words[: 3 + digest[1] % 20]) + '.'


def faults_at_random(rate: float, seed: int):
    """A script: every request has a fault with probability `rate`, each kind as often."""
    draw, lock = random.Random(seed), threading.Lock()

    def script(number: int, body: dict) -> str | None:
        with lock:
            return draw.choice(FAULTS) if draw.random() < rate else None

    return script


class FakeServer:
    """Context manager. script(number, body) names the fault of a request, or None.

    field: where the thinking goes: thinking, reasoning, reasoning_content, tags or none.
    A request whose last message contains REFUSE gets a 400. answer(body): another content, without thinking.
    usage: whether tokens are reported. key: API key without which nothing is answered.
    """

    def __init__(
        self,
        model='tiny',
        script=None,
        field='reasoning',
        delay=0.0,
        hang=2.0,
        retry_after='1',
        port=0,
        answer=None,
        usage=True,
        key=None,
    ):
        self.model, self.script, self.field = model, script, field
        self.answer, self.usage, self.key = answer, usage, key
        self.delay, self.hang, self.retry_after, self._port = delay, hang, retry_after, port
        self.requests: list[dict] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()

    def __enter__(self):
        self._http = _Http(('127.0.0.1', self._port), _Handler)
        self._http.fake = self
        self._port = self._http.server_address[1]  # the same after a restart
        self.url = f'http://127.0.0.1:{self._port}/v1'
        threading.Thread(target=self._http.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._http.shutdown()
        self._http.server_close()
        self._http.drop_connections()

    def arrive(self, body: dict) -> int:
        with self._lock:
            self.requests.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            return len(self.requests) - 1

    def leave(self) -> None:
        with self._lock:
            self.in_flight -= 1

    def completion(self, body: dict) -> dict:
        thinking, content = answer_to(body['messages'], body['max_tokens'])
        message = {'role': 'assistant', 'content': content}
        if self.answer:
            thinking, message['content'] = '', self.answer(body)
        elif self.field == 'tags':
            message['content'] = f'<think>{thinking}</think>\n{content}'
        elif self.field != 'none':
            message[self.field] = thinking
        usage = {'completion_tokens': len(f'{thinking} {message["content"]}'.split())}
        usage['prompt_tokens'] = sum(len(m['content'].split()) for m in body['messages'])
        choice = {'message': message, 'finish_reason': 'stop'}
        return {'id': 'x', 'choices': [choice]} | ({'usage': usage} if self.usage else {})


class RawServer:
    """Context manager. answer(request, send) answers a request whose bytes are `request` by send(bytes), which raises
    OSError when the client has gone; `sent` counts bytes. requests: what arrived."""

    def __init__(self, answer):
        self.answer, self.requests, self.sent = answer, [], 0
        self.ended = threading.Event()  # an answer has come to its end, be it because the client has gone

    def __enter__(self):
        self._listening = socket.create_server(('127.0.0.1', 0))
        self.url = f'http://127.0.0.1:{self._listening.getsockname()[1]}/v1'
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._listening.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection):
        def send(data: bytes):
            connection.sendall(data)
            self.sent += len(data)

        with connection, contextlib.suppress(OSError):
            while request := connection.recv(2**16):
                self.requests.append(request)
                self.answer(request, send)
                break
        self.ended.set()


def response(body: bytes, *headers: str, status: int = 200, length: bool = True) -> bytes:
    """The bytes of an answer."""
    lines = [
        f'HTTP/1.1 {status} X',
        'Connection: close',
        *headers,
        *([f'Content-Length: {len(body)}'] if length else []),
        '',
        '',
    ]
    return '\r\n'.join(lines).encode() + body


class _Http(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args):
        self._connections = set()
        super().__init__(*args)

    def process_request(self, request, address):
        self._connections.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request):
        self._connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self):
        for request in list(self._connections):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, address):
        """Clients that are killed are expected."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def _send(self, status: int, text: str, **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def _let_in(self) -> bool:
        key = self.server.fake.key
        if key and self.headers['Authorization'] != f'Bearer {key}':
            self._send(401, '{"error": {"message": "wrong API key"}}')
            return False
        return True

    def do_GET(self):
        fake = self.server.fake
        if not self._let_in():
            return None
        if self.path != '/v1/models':
            return self._send(404, '{}')
        return self._send(200, json.dumps({'object': 'list', 'data': [{'id': fake.model, 'object': 'model'}]}))

    def do_POST(self):
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        if not self._let_in():
            return
        number = fake.arrive(body)
        try:
            self._answer(fake, number, body)
        finally:
            fake.leave()

    def _answer(self, fake: FakeServer, number: int, body: dict) -> None:
        fault = fake.script(number, body) if fake.script else None
        time.sleep(fake.hang if fault == 'hang' else fake.delay)
        text = json.dumps(fake.completion(body))
        last = body['messages'][-1]['content']
        if 'REFUSE' in last:
            self._send(400, json.dumps({'error': {'message': 'this request is refused', 'code': 400}}))
        elif body['model'] != fake.model:
            self._send(404, json.dumps({'error': {'message': f'The model {body["model"]} does not exist'}}))
        elif fault == 'cut':
            self.send_response(200)
            self.send_header('Content-Length', str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2].encode())
            self.close_connection = True
        elif fault == 'hang':
            self.close_connection = True
        elif fault == 'refuse':
            self._send(400, json.dumps({'error': {'message': 'refused by script'}}))
        elif fault == '500':
            self._send(500, 'Internal Server Error')
        elif fault == '429':
            self._send(429, '{"error": {"message": "too many requests"}}', Retry_After=fake.retry_after)
        elif fault == 'malformed':
            self._send(200, text[: len(text) // 2])
        elif fault == 'no choices':
            self._send(200, '{"choices": []}')
        else:
            self._send(200, text)
