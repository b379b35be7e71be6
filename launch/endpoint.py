"""What the launch scripts ask of ports, servers and the registry, with the standard library alone.

    endpoint.py free-port HOST                  prints a port that nobody listens on
    endpoint.py check-port HOST PORT            fails if it is taken
    endpoint.py wait URL SECONDS                returns when the server has answered a completion
    endpoint.py register FILE URL OWNER         adds a line, in place of those of the same owner
    endpoint.py unregister FILE OWNER           removes them

URL ends in /v1. A registry has one URL per line, `URL  # OWNER`; it is replaced as a whole, under a lock.
"""

import contextlib
import fcntl
import http.client
import json
import os
import pathlib
import socket
import sys
import time
import urllib.error
import urllib.request

PAUSE_S, LINE_EVERY_S, HEALTH_TIMEOUT_S = 0.5, 15.0, 5.0
# a proxy of the environment is not for servers of our own
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NotYet(Exception):
    """The server does not answer as it should, for now."""


class Never(Exception):
    """Waiting will not help."""


def free_port(host):
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def check_port(host, port):
    if not (port.isdigit() and 0 < int(port) < 65536):
        raise Never(f'{port!r} is no port: give a number from 1 to 65535, or none for a free one.')
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, int(port)))
        except OSError as e:
            raise Never(
                f'Port {port} of {host} cannot be used ({e.strerror}): give another --port, or none for a free one.'
            ) from None


def ask(url, timeout, body=None):
    """(status, text). Raises NotYet where there is no answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {'Content-Type': 'application/json'}
    if os.environ.get('VLLM_API_KEY'):  # vLLM asks for it
        headers['Authorization'] = f'Bearer {os.environ["VLLM_API_KEY"]}'
    request = urllib.request.Request(url, data, headers)
    try:
        try:
            response = OPENER.open(request, timeout=timeout)
        except urllib.error.HTTPError as e:
            response = e
        with response:
            return response.status, response.read().decode('utf-8', 'replace')
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise NotYet(str(getattr(e, 'reason', e)) or type(e).__name__) from None


def try_once(url, seconds):
    """Returns the name of the model after health and a completion. Raises NotYet or Never."""
    status, _ = ask(url.removesuffix('/v1') + '/health', HEALTH_TIMEOUT_S)
    if status != 200:
        raise NotYet(f'HTTP {status} from /health')
    status, text = ask(url + '/models', HEALTH_TIMEOUT_S)
    if status != 200:
        raise NotYet(f'HTTP {status} from /v1/models')
    try:
        model = json.loads(text)['data'][0]['id']
    except (ValueError, KeyError, IndexError, TypeError):
        raise NotYet('the answer of /v1/models is no list of models') from None
    body = {'model': model, 'max_tokens': 1}
    # A server can be healthy and end at its first request.
    status, chat = ask(url + '/chat/completions', seconds, body | {'messages': [{'role': 'user', 'content': 'Hello'}]})
    if 400 <= status < 500:
        print(f'chats are refused (HTTP {status}: {chat[:300].strip()}); trying plain text', flush=True)
        status, text = ask(url + '/completions', seconds, body | {'prompt': 'Hello'})
        if 400 <= status < 500:
            raise Never(f'{url} refuses a completion (HTTP {status}: {text[:300].strip()}).')
    if status != 200:
        raise NotYet(f'HTTP {status} from a completion')
    return model


def wait(url, seconds):
    began = said = time.monotonic()
    while True:
        left = began + seconds - time.monotonic()
        try:
            return try_once(url, max(left, 1))
        except NotYet as e:
            problem = e
        now = time.monotonic()
        if now >= began + seconds:
            raise Never(f'{url} is not ready after {seconds:g} s ({problem}).')
        if now - said >= LINE_EVERY_S:
            said = now
            print(f'{url}: not ready after {now - began:.0f} s ({problem})', flush=True)
        time.sleep(PAUSE_S)


def rewrite(file, owner, url=None):
    """Lines of `owner` go, and `url` comes in their place; readers see the old file or the new one."""
    path = pathlib.Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f'{path}.lock', 'w') as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
        lines = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in lines if line.partition('#')[2].strip() != owner]
        if url:
            lines.append(f'{url}  # {owner}')
        new = pathlib.Path(f'{path}.new')
        new.write_text(''.join(line + '\n' for line in lines))
        os.replace(new, path)


def main(action, *values):
    try:
        if action == 'free-port':
            print(free_port(*values))
        elif action == 'check-port':
            check_port(*values)
        elif action == 'wait':
            print(f'model {wait(values[0], float(values[1]))} answers', flush=True)
        elif action == 'register':
            file, url, owner = values
            rewrite(file, owner, url)
        elif action == 'unregister':
            rewrite(*values)
        else:
            raise Never(f'{action} is unknown.')
    except (Never, OSError) as e:
        sys.exit(f'error: {e}')


if __name__ == '__main__':
    main(*sys.argv[1:])
