"""Serves a trained lens on this machine: a page that reads what is typed, and the same by HTTP.

python -m lens.serve --lens=runs/tiny
python -m lens.serve --lens=exports/x --port=8400

The page is at the address that it prints; /openapi.json there describes the routes. Only this machine is answered, and only
pages of this server may ask; for another machine, forward the port: ssh -L 8123:127.0.0.1:8123 HOST.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from lens import commands

    commands.serve()

import contextlib
import socket
import sys

from lens.errors import LensError, need_package, shown

HOST, LEAVE_S = '127.0.0.1', 2


def listen(port: int) -> socket.socket:
    """Returns a socket that is bound to a port of this machine, 0 for any. Raises LensError."""
    out = socket.socket()
    out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        out.bind((HOST, port))
    except (OSError, OverflowError) as e:
        out.close()
        why = getattr(e, 'strerror', None) or e
        raise LensError(f'--port={port} cannot be listened on ({shown(why)}): give another, or 0 for any.') from None
    return out


def main(lens, port, queue, subject, question) -> None:
    for name in ('pydantic', 'starlette', 'uvicorn'):
        need_package(name, 'serve', 'lens.serve')
    import uvicorn

    from lens import reader, web

    with contextlib.closing(listen(port)) as listening:
        print(f'Opening {shown(lens)}', file=sys.stderr)
        app = web.application(reader.load(lens, subject, question=question), queue)
        print(f'http://{HOST}:{listening.getsockname()[1]}  Ctrl-C ends it', flush=True)
        how = {'log_level': 'warning', 'timeout_graceful_shutdown': LEAVE_S, 'server_header': False}
        uvicorn.Server(uvicorn.Config(app, limit_concurrency=4 * queue + 16, **how)).run(sockets=[listening])
