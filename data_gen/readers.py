"""Rows of one file: JSON lines, JSON values over many lines or in an array, CSV, Parquet, lines of text; compressed or not.

The `datasets` builders know the suffixes, but read JSON through Arrow, which takes dates for times, refuses a column of
texts and lists, and loses a whole file to one torn line; they also copy what they read to the disk. So rows come from
the file itself, one after another, and never more than MOST_CHARS of it is in memory.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterator

from lens.errors import LensError, shown

BATCH = 256  # rows of Parquet that are in memory at a time
HEAD = 1 << 20  # characters that tell how JSON is laid out
MOST_CHARS = 1 << 28  # of one row
FORMATS = {'.jsonl': 'json', '.json': 'json', '.ndjson': 'json', '.csv': 'csv', '.tsv': 'csv', '.txt': 'text'}
FORMATS |= {'.parquet': 'parquet'}
OPEN = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
PACKED = (*OPEN, '.zst', '.zip')
BOMS = {codecs.BOM_UTF8: 'utf-8-sig', codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32'}  # the longer first
BOMS |= {codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
POINTER = b'version https://git-lfs'
SPACE = re.compile(r'[\s,]*')

Row = dict | None  # None: no JSON object


def suffixes(name: str) -> tuple[str, str]:
    """Returns (suffix of the format, suffix of the compression or '') of a file name, in small letters."""
    parts = [s.lower() for s in pathlib.PurePath(name).suffixes[-2:]]
    if parts and parts[-1] in PACKED:
        return (parts[0] if len(parts) == 2 else ''), parts[-1]
    return (parts[-1] if parts else ''), ''


def named_as_file(name: str) -> bool:
    """Returns whether a name has a suffix of a format or of a compression; data sets on the Hub may have others."""
    suffix, packed = suffixes(name)
    return suffix in FORMATS or bool(packed)


def _zip_member(path: pathlib.Path) -> tuple[zipfile.ZipFile, str]:
    archive = zipfile.ZipFile(path)
    names = [n for n in archive.namelist() if not n.endswith('/') and not n.startswith('__MACOSX/')]
    if len(names) != 1:
        raise LensError(f'{path} holds {len(names)} files: unpack it and give one of them, or the folder.')
    return archive, names[0]


def file_format(path: pathlib.Path) -> str:
    """Returns json | csv | text | parquet, which the suffix says. Raises LensError, which names it."""
    with reading(path):
        with path.open('rb') as f:
            if f.read(len(POINTER)) == POINTER:
                raise LensError(f'{path} is a pointer of git lfs and not the file: git lfs pull in that folder.')
        suffix, packed = suffixes(path.name)
        if packed == '.zip':
            suffix = suffixes(_zip_member(path)[1])[0]
    if suffix not in FORMATS or (packed and FORMATS[suffix] == 'parquet'):
        raise LensError(
            f'{path} has the suffix {shown((suffix + packed) or "none", 40)!r}, which says no format: give '
            f'{", ".join(FORMATS)} (all but the last also with {", ".join(PACKED)}).'
        )
    return FORMATS[suffix]


@contextlib.contextmanager
def reading(path: pathlib.Path):
    """Turns what goes wrong while a file is read into a LensError that names it."""
    import pyarrow

    try:
        yield
    except UnicodeError:
        raise LensError(
            f'{path} is no UTF-8 text: convert it, as in iconv -f latin1 -t utf-8 (UTF-16 needs its byte order mark).'
        ) from None
    except PermissionError:
        raise LensError(f'{path} cannot be read: this user has no permission for it.') from None
    except csv.Error as e:
        raise LensError(f'{path} is no CSV file ({e}): quote texts that hold commas, quotes or line ends.') from None
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        RuntimeError,
        pyarrow.ArrowException,
    ) as e:
        reason = shown((str(e).strip().splitlines() or [type(e).__name__])[0].rstrip('.'))
        raise LensError(f'{path} is damaged or of another format than its suffix says ({reason}).') from None


@contextlib.contextmanager
def open_text(path: pathlib.Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """Opens a file of text, unpacked and in the encoding that its byte order mark names, or UTF-8."""
    packed = suffixes(path.name)[1]
    with contextlib.ExitStack() as stack:
        if packed == '.zip':
            archive, name = _zip_member(path)
            raw = stack.enter_context(stack.enter_context(archive).open(name))
        elif packed == '.zst':
            import pyarrow

            raw = stack.enter_context(pyarrow.input_stream(str(path), compression='zstd'))
        else:
            raw = stack.enter_context(OPEN.get(packed, open)(path, 'rb'))
        binary = io.BufferedReader(raw) if not hasattr(raw, 'peek') else raw
        head = binary.peek(4)[:4]
        encoding = next((name for bom, name in BOMS.items() if head.startswith(bom)), 'utf-8')
        yield stack.enter_context(io.TextIOWrapper(binary, encoding, newline=newline))


def _lines(file, path: pathlib.Path) -> Iterator[str]:
    """Empty lines are no rows."""
    while line := file.readline(MOST_CHARS):
        if not line.isspace():
            if len(line) == MOST_CHARS:
                raise LensError(f'{path} has a line of more than {MOST_CHARS} characters.')
            yield line


def _row(value) -> Row:
    """A chat or a text may be the whole of a row."""
    if isinstance(value, list):
        return {'messages': value}
    return {'text': value} if isinstance(value, str) else value if isinstance(value, dict) else None


def _parse_line(line: str) -> Row:
    try:
        return _row(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _is_message(value) -> bool:
    return isinstance(value, dict) and bool({'role', 'from'} & value.keys())


def _one_a_line(head: str) -> bool:
    """Whether JSON that begins with `head` has a row in each line."""
    first, _, others = head.lstrip().partition('\n')
    others, whole, decode = others.strip(), len(head) < HEAD, json.JSONDecoder().raw_decode
    if first.startswith('['):  # an array of rows, or a chat
        try:
            value = decode(first, SPACE.match(first, 1).end())[0]
        except (ValueError, RecursionError):
            return False
        return _is_message(value) or (isinstance(value, str) and bool(others))
    if not others:
        return False  # one object may hold the rows
    try:
        return decode(head.lstrip())[1] <= len(first)
    except ValueError as e:  # the first line is torn, or the head ends within an object of many lines
        return whole or not _cut_off(e)
    except RecursionError:
        return True


def _cut_off(e: ValueError) -> bool:
    """Whether the text may go on to be JSON; not where it has a number of too many digits."""
    return isinstance(e, json.JSONDecodeError) and (e.msg.startswith('Unterminated') or e.pos > len(e.doc) - 16)


def _values(file, name: str) -> Iterator[Row]:
    """Rows of JSON values that follow each other, of the arrays among them, or of the list that a single object holds."""
    decoder, buffer, at, depth, count, only = json.JSONDecoder(), '', 0, 0, 0, None
    while True:
        at = SPACE.match(buffer, at).end()
        mark = buffer[at : at + 1]
        if mark in ('[', ']') and mark and depth == (mark == ']'):
            at, depth = at + 1, depth + (1 if mark == '[' else -1)
            continue
        try:
            value, end = decoder.raw_decode(buffer, at) if mark else (None, None)
        except RecursionError:
            break
        except ValueError as e:
            if not _cut_off(e):
                break
            end = None
        if end is None or (end == len(buffer) and not isinstance(value, dict | list | str)):
            more = file.read(max(HEAD, len(buffer) - at))
            if not more or len(buffer) - at > MOST_CHARS:
                break
            buffer, at = buffer[at:] + more, 0
            continue
        at, count = end, count + 1
        if count == 1 and not depth:
            only = value  # until another one comes
            continue
        if only is not None:
            yield _row(only)
            only = None
        yield _row(value)
    if mark or depth:
        raise LensError(f'{name} is damaged: what follows row {count} is no JSON, or a row of too many characters.')
    yield from map(_row, _held(only))


def _held(only) -> list:
    """The rows of a file that is one value: the list of objects that it holds, if there is one, or itself."""
    if not isinstance(only, dict):
        return [] if only is None else [only]
    lists = [v for v in only.values() if isinstance(v, list) and v and isinstance(v[0], dict) and not _is_message(v[0])]
    return lists[0] if len(lists) == 1 else [only]


def _json(path: pathlib.Path, start: int, parse: bool) -> Iterator[Row]:
    with open_text(path) as file:
        head = file.read(HEAD)
    if '\0' in head:
        raise UnicodeError
    if not head.strip():
        return
    with open_text(path) as file:
        if not _one_a_line(head):
            yield from itertools.islice(_values(file, str(path)), start, None)
            return
        lines = itertools.islice(_lines(file, path), start, None)
        yield from map(_parse_line, lines) if parse else lines


def _csv(path: pathlib.Path, start: int, parse: bool) -> Iterator[Row]:
    csv.field_size_limit(MOST_CHARS)
    with open_text(path, newline='') as file:
        records = csv.reader(file, delimiter='\t' if suffixes(path.name)[0] == '.tsv' else ',', strict=True)
        columns = next(records, [])
        if len(set(columns)) < len(columns):
            raise csv.Error(f'two columns have one name in its first line: {shown(", ".join(columns))}')
        for number, record in enumerate(r for r in records if r):
            if len(record) != len(columns):
                raise csv.Error(
                    f'row {number + 1}, until line {records.line_num}, has {len(record)} fields, the header has '
                    f'{len(columns)}'
                )
            if '\0' in ''.join(record):
                raise UnicodeError
            if number >= start:
                yield dict(zip(columns, record, strict=True))


def _text(path: pathlib.Path, start: int, parse: bool) -> Iterator[Row]:
    with open_text(path) as file:
        for line in itertools.islice(_lines(file, path), start, None):
            if '\0' in line:
                raise UnicodeError
            yield {'text': line.rstrip('\n')}


def _parquet(path: pathlib.Path, start: int, parse: bool) -> Iterator[Row]:
    import pyarrow.parquet

    index = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if index + rows <= start:
                index += rows
                continue
            for batch in file.iter_batches(BATCH, row_groups=[group]):
                if index + batch.num_rows > start:
                    yield from batch.to_pylist()[max(start - index, 0) :]
                index += batch.num_rows


READ = {'json': _json, 'csv': _csv, 'text': _text, 'parquet': _parquet}


def rows(path: pathlib.Path, start: int = 0, parse: bool = True) -> Iterator[Row]:
    """Yields the rows of a file from `start` on. parse: False where only their number counts. Raises LensError."""
    read = READ[file_format(path)]
    with reading(path):
        yield from read(path, start, parse)


def count(path: pathlib.Path) -> int:
    """Returns the number of rows of a file, which is read through for that, unless it is Parquet. Raises LensError."""
    if file_format(path) != 'parquet':
        return sum(1 for _ in rows(path, parse=False))
    import pyarrow.parquet

    with reading(path):
        return pyarrow.parquet.read_metadata(path).num_rows


def columns(path: pathlib.Path, most: int) -> list[str]:
    """Returns the columns of a file; of JSON those of its first `most` rows. Raises LensError."""
    if file_format(path) != 'parquet':
        return list({k: None for row in itertools.islice(rows(path), most) for k in row or ()})
    import pyarrow.parquet

    with reading(path):
        return pyarrow.parquet.read_schema(path).names
