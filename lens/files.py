"""Small files: each appears at once, by rename, and is read with one sentence for what is wrong with it."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Iterator

from lens.errors import LensError, shown


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file that appears whole. Raises OSError, which names the file."""
    tmp = path.with_name(f'.{path.name}.tmp')
    try:
        tmp.write_text(text)
        os.replace(tmp, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise OSError(e.errno, e.strerror, str(path)) from e  # a write tells no name


def write_json(path: pathlib.Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + '\n')


def write_jsonl(path: pathlib.Path, rows) -> None:
    write_text(path, ''.join(json.dumps(r) + '\n' for r in rows))


def read_json(path: pathlib.Path, remedy: str, error: type[LensError] = LensError) -> dict:
    """Returns the JSON object of a file. Raises `error`, which names file and remedy, where there is no good one."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise error(f'{path} does not exist: {remedy}.') from None
    except (OSError, ValueError, RecursionError) as e:
        raise error(f'{path} is not valid JSON ({e}): {remedy}.') from None
    if not isinstance(value, dict):
        raise error(f'{path} holds no JSON object: {remedy}.')
    return value


def json_object(text: str | bytes) -> dict | None:
    """Returns the object that a text is in JSON, None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """Returns the objects of all complete lines, [] where there is no file; a torn last line (the writer was killed)
    and blank ones are left out. Raises LensError for a line that is no JSON object."""
    text = path.read_text(errors='replace') if path.exists() else ''
    rows = {n: json_object(line) for n, line in enumerate(text.split('\n')[:-1], 1) if line.strip()}
    if bad := [n for n, row in rows.items() if row is None]:
        raise LensError(f'{path} is damaged: line {bad[0]} is no JSON object; remove that line.')
    return list(rows.values())


def find(path: str | os.PathLike, *roots: pathlib.Path) -> pathlib.Path:
    """Returns where a relative path is: from the current folder, else from each root, else, for configs/…, what ships
    with the package, which stands in it or, in a checkout, beside it. A path that is nowhere comes back as it is."""
    path, package = pathlib.Path(path), pathlib.Path(__file__).parent
    home = package if (package / 'configs').is_dir() else package.parent
    shipped = [home] if path.parts[:1] == ('configs',) else []
    return next((p for p in (root / path for root in (pathlib.Path(), *roots, *shipped)) if p.exists()), path)


def take_lock(file, message: str) -> None:
    """Locks an open file until it is closed. Raises LensError with `message` where another process has it locked.

    A file system without locks is written without.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LensError(message) from None
    except OSError:
        pass


@contextlib.contextmanager
def lock(path: pathlib.Path, what: str, remedy: str) -> Iterator[None]:
    """Keeps other processes out of `what`, for which the lock file `path` stands; the lock goes with its process.

    Raises LensError, which names the process that holds it and the remedy.
    """
    with path.open('a+') as file:
        file.seek(0)
        take_lock(file, f'{what} is in use by {shown(file.read()) or "another process"}: {remedy}.')
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield


@contextlib.contextmanager
def new_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `out` that becomes `out` at the end, or disappears where the body fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = pathlib.Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    try:
        yield tmp
        tmp.chmod(0o755)
        os.replace(tmp, out)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
