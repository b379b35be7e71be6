"""Small files: each appears at once, by rename, and is read with one sentence for what is wrong with it."""

import contextlib
import fcntl
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from lens.errors import LensError, shown

MOST_BYTES, MOST_DEPTH = 1 << 26, 64  # of a small JSON file
MOST_DIGITS = 40  # of a whole number in it: tokenizers say 10^30 for a length without end
MOST_FIGURE = 1e300  # of metrics.jsonl: far above the squares of float32; a chart multiplies it
KINDS = {dict: 'an object', list: 'a list', str: 'a text', int: 'a whole number', float: 'a number'}
NO_KEYS = MappingProxyType({})
STRING, BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL), re.compile(r'[][{}]')


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


def _check_keys(value: dict, keys: Mapping[str, type]) -> None:
    for key, kind in keys.items():
        x = value.get(key)
        whole = isinstance(x, int) and not isinstance(x, bool)
        number = whole or (isinstance(x, float) and math.isfinite(x))
        if not (number if kind is float else whole if kind is int else isinstance(x, kind)):
            have = f'{key}={shown(repr(x), 40)}' if key in value else f'no {key}'
            raise ValueError(f'holds {have}, expected {KINDS[kind]}')


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f'holds a number of {len(digits)} digits')
    return int(digits)


def parse_object(text: str | bytes, keys: Mapping[str, type] = NO_KEYS) -> dict:
    """Returns the object that a text is in JSON. keys: what it must have, of a type of KINDS; a float is a finite number.

    Raises ValueError, whose message continues a sentence that begins with the file, also for what is nested deeper than
    MOST_DEPTH and for whole numbers of more than MOST_DIGITS.
    """
    text = text.decode('utf-8-sig') if isinstance(text, bytes) else text
    if text.count('[') + text.count('{') > MOST_DEPTH:  # json.loads goes as deep as the stack
        steps = (1 if c in '[{' else -1 for c in BRACKET.findall(STRING.sub('', text)))
        if max(itertools.accumulate(steps), default=0) > MOST_DEPTH:
            raise ValueError(f'is nested more than {MOST_DEPTH} deep')
    value = json.loads(text, parse_int=_whole)
    if not isinstance(value, dict):
        raise ValueError('holds no JSON object')
    _check_keys(value, keys)
    return value


def read_json(
    path: pathlib.Path, remedy: str, error: type[LensError] = LensError, keys: Mapping[str, type] = NO_KEYS
) -> dict:
    """Returns the JSON object of a small file. keys: see parse_object.

    Raises `error`, which names file and remedy, where there is no good one: also for what is no file (reading a pipe
    would wait), for more than MOST_BYTES, and for all that parse_object refuses.
    """
    try:
        return parse_object(read_bytes(path, MOST_BYTES), keys)
    except FileNotFoundError:
        raise error(f'{path} does not exist: {remedy}.') from None
    except OSError as e:
        raise error(f'{path} cannot be read ({e.strerror}): {remedy}.') from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise error(f'{path} is not valid JSON ({e}): {remedy}.') from None
    except ValueError as e:
        raise error(f'{path} {e}: {remedy}.') from None


def read_bytes(path: pathlib.Path, most: float = math.inf) -> bytes:
    """Returns the content of a file of at most so many bytes. Raises OSError, and ValueError, whose message continues a
    sentence that begins with the file, for what reading does not come to the end of: a pipe, a device."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError('is no file')
    if about.st_size > most:
        raise ValueError(f'has {about.st_size} bytes, at most {most} are read')
    return path.read_bytes()


def json_object(text: str | bytes) -> dict | None:
    """Returns the object that a text is in JSON, None where it is none."""
    try:
        return parse_object(text)
    except ValueError:
        return None


def split_jsonl(
    path: pathlib.Path, parse: Callable[[bytes], dict] = parse_object
) -> tuple[list[dict], dict[int, bytes]]:
    """Returns the objects of all complete lines, none where there is no file, and the damaged lines by their number; a
    torn last line (the writer was killed) and blank ones are left out.

    parse: raises ValueError for a damaged line. Raises LensError where the file cannot be read.
    """
    rows, damaged = [], {}
    try:
        text = read_bytes(path)
    except FileNotFoundError:
        return rows, damaged
    except OSError as e:
        raise LensError(f'{path} cannot be read ({e.strerror}): remove it.') from None
    except ValueError as e:
        raise LensError(f'{path} {e}: remove it.') from None
    for n, line in enumerate(text.split(b'\n')[:-1], 1):
        try:
            if line.strip():
                rows.append(parse(line))
        except ValueError:
            damaged[n] = line
    return rows, damaged


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """Returns the objects of split_jsonl. Raises LensError for a line that is none."""
    rows, damaged = split_jsonl(path)
    if damaged:
        raise LensError(f'{path} is damaged: line {min(damaged)} is no JSON object; remove that line.')
    return rows


def _metrics_row(line: bytes) -> dict:
    row = parse_object(line, {'step': int, 'phase': str, 'kind': str, 'wall_s': float})
    for key in row.keys() - {'phase', 'kind'}:
        if not isinstance(row[key], int | float) or MOST_FIGURE < abs(row[key]) < math.inf:
            raise ValueError(f'holds {key}, which is no number of a run')
    return row


def read_metrics(path: pathlib.Path, say: Callable[[str], None] = print, keep: bool = False) -> list[dict]:
    """Returns the rows of a metrics.jsonl: step, phase, kind, wall_s and figures, which are numbers or NaN.

    Damaged lines are left out, which `say` is told; with `keep` they are added to a file beside it. Raises LensError.
    """
    rows, damaged = split_jsonl(path, _metrics_row)
    if damaged:
        beside = path.with_name(f'{path.name}.damaged')
        if keep:
            with beside.open('ab') as file:
                file.writelines(line + b'\n' for line in damaged.values())
        where = f'moved to {beside}' if keep else 'left out'
        say(f'warning: {path} is damaged: {len(damaged)} of its lines, from line {min(damaged)} on, are {where}.')
    return rows


def find(path: str | os.PathLike, *roots: pathlib.Path, holds: str = '') -> pathlib.Path:
    """Returns where a relative path is: from the current folder, else from the first of `roots` that has it, else, for
    configs/… and lenses/…, what ships with the package, which stands in it or, in a checkout, beside it. A path that is nowhere comes
    back as it is. holds: a file that a folder must hold to be taken from elsewhere."""
    path = pathlib.Path(path)
    if os.path.exists(path):  # false for a name that no file can have
        return path
    shipped = [home()] if path.parts[:1] in (('configs',), ('lenses',)) else []
    return next((p for p in (root / path for root in (*roots, *shipped)) if os.path.exists(p / holds)), path)


def home() -> pathlib.Path:
    """Returns where what ships with the package is, configs/ and lenses/: in it or, in a checkout, beside it."""
    package = pathlib.Path(__file__).parent
    return package if (package / 'configs').is_dir() else package.parent


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


def check_free(out: pathlib.Path, remedy: str = 'give an empty or a new folder as --out') -> None:
    """Raises LensError, with the remedy, where `out` is there and is no empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LensError(f'{out} holds something already: {remedy}.')


@contextlib.contextmanager
def new_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `out` that becomes `out` at the end, or disappears where the body fails.

    Raises LensError, which names `out`, for an OSError: a write that fails often tells no name, or that of the temporary
    folder.
    """
    tmp = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tmp = pathlib.Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
        yield tmp
        tmp.chmod(0o755)
        os.replace(tmp, out)
    except OSError as e:
        raise LensError(
            f'{out} cannot be written ({e.strerror or shown(e)}): free some disk, or choose another place.'
        ) from e
    finally:
        if tmp:  # gone, where it has become `out`
            shutil.rmtree(tmp, ignore_errors=True)
