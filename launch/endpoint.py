"""What the launch scripts ask of ports and servers, with the standard library alone.

endpoint.py free-port HOST      prints a port that nobody listens on
endpoint.py wait URL SECONDS    returns when the server at URL, which ends in /v1, has answered a completion
"""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import sys
import time
import urllib.error
import urllib.request

PORTS = range(61440, 65536)  # beyond those that the system gives to connections: still free when the server listens
PAUSE_S, LINE_EVERY_S, MODELS_S, MOST_BYTES = 0.5, 15.0, 5.0, 2**20
OPENER = urllib.request.OpenerDirector()  # neither proxies of the environment nor redirects are for servers of our own
for name in ('HTTPHandler', 'HTTPDefaultErrorHandler', 'HTTPErrorProcessor'):
    OPENER.add_handler(getattr(urllib.request, name)())


def free_port(host):
    for port in random.SystemRandom().sample(PORTS, 99):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind((host, port))
            return port
    sys.exit(f'error: no port of {host} can be used: is it an address of this machine?')


def ask(url, timeout_s, body=None):
    # vLLM asks for the key where it has been given one
    headers = {'Content-Type': 'application/json', 'Authorization': f'Bearer {os.environ.get("VLLM_API_KEY", "")}'}
    request = urllib.request.Request(url, body and json.dumps(body).encode(), headers)
    with OPENER.open(request, timeout=timeout_s) as response:
        return json.loads(response.read(MOST_BYTES))


def plain(text):
    return ''.join(c if c.isprintable() else '?' for c in str(text)[:300])


def wait(url, seconds):
    """Returns the name of the model when the server is ready; exits where it is not in time, or never will be."""
    began = said = time.monotonic()
    problem = ''
    while (left_s := began + seconds - time.monotonic()) > 0:
        try:
            model = ask(url + '/models', MODELS_S)['data'][0]['id']
            # a server can list its models and end at its first request
            ask(url + '/completions', max(left_s, 1), {'model': model, 'max_tokens': 1, 'prompt': 'Hello'})
            return model
        except urllib.error.HTTPError as e:
            problem = f'HTTP {e.code} from {e.url}'
            if e.url.endswith('/completions') and e.code < 500:
                text = plain(e.read(300).decode(errors='replace'))
                sys.exit(f'error: {url} refuses a completion (HTTP {e.code}: {text}).')
        except (OSError, ValueError, LookupError, TypeError, RecursionError, http.client.HTTPException) as e:
            problem = plain(f'{type(e).__name__}: {e}')
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            print(f'{url}: not ready after {said - began:.0f} s ({problem})', flush=True)
        time.sleep(PAUSE_S)
    sys.exit(f'error: {url} is not ready after {seconds:g} s ({problem}).')


if __name__ == '__main__':
    if sys.argv[1] == 'free-port':
        print(free_port(sys.argv[2]))
    else:
        signal.alarm(int(sys.argv[3]) + 9)  # an answer may drip for ever
        print(f'model {plain(wait(sys.argv[2], float(sys.argv[3])))} answers', flush=True)
