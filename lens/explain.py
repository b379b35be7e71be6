"""Reads a text with a trained lens, token by token.

python -m lens.explain --lens=runs/tiny --text='Once Lena found a compass.'
python -m lens.explain --lens=exports/x --chat=chat.json --positions=-20: --html=chat.html --json=chat.json

A table says for each token what the words are, how much of the activation is lost in them (high, medium, low: error below
0.3, below 0.5, above), and what the subject predicts next; the page has samples, alternatives and controls as well.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from lens import commands

    commands.explain()

import pathlib
import re
import sys

import rich.console
import rich.progress

from lens import reader, spoken
from lens.errors import LensError, shown

MOST_BYTES = 1 << 24  # of a file that is read


def places(given: str, n: int) -> list[int] | None:
    """Returns the positions that '3,7,-1' or '10:20' names in a text of n tokens; None for all. Raises LensError."""
    out = []
    for part in filter(None, given.replace(' ', '').split(',')):
        match = re.fullmatch(r'(-?\d{1,9})?(:)?(-?\d{1,9})?', part)
        if not match or (match[3] and not match[2]):
            raise LensError(f'--positions={shown(given)} must be like 3,7,-1 or 10:20.')
        first, last = (None if x is None else int(x) for x in (match[1], match[3]))
        some = range(*slice(first, last).indices(n)) if match[2] else [first % n if -n <= first < n else first]
        if not some:
            raise LensError(f'--positions={shown(given)} names no token of the text, which has {n}.')
        out += some
    return [*dict.fromkeys(out)] or None


def source(text: str | None, chat: str | None, file: str | None) -> str | list[dict]:
    """Returns the text or the messages that one of the flags gives. Raises LensError."""
    given = {'--text': text, '--chat': chat, '--file': file}
    if sum(x is not None for x in given.values()) != 1:
        raise LensError('Give one of --text, --chat and --file: what is to be read.')
    if text is not None:
        return text
    path = pathlib.Path(chat or file or '')
    if not path.is_file():
        raise LensError(f'{shown(path)} is no file: give a text with --file, or messages in JSON with --chat.')
    if path.stat().st_size > MOST_BYTES:
        raise LensError(f'{path} has {path.stat().st_size} bytes, at most {MOST_BYTES} are read: give a part of it.')
    try:
        content = path.read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as e:
        raise LensError(f'{path} is no UTF-8 text ({e.reason} at byte {e.start}): convert it.') from None
    return spoken.read_chat(content, str(path)) if chat is not None else content


def check_out(json: str, html: str) -> None:
    """Raises LensError where a file cannot be written there, before minutes of work."""
    for name, path in (('json', json), ('html', html)):
        folder = pathlib.Path(path).absolute().parent
        if path and (not folder.is_dir() or pathlib.Path(path).is_dir()):
            raise LensError(f'--{name}={shown(path)} cannot be written: give a file in a folder that is there.')


def main(lens, text, chat, file, positions, samples, best_of, temperature, seed, json, html, subject) -> None:
    what = source(text, chat, file)
    check_out(json, html)
    say = rich.console.Console(stderr=True, highlight=False)
    say.print(f'Opening {shown(lens)}', markup=False)
    opened = reader.load(lens, subject)
    found = opened.tokens(what)
    at = places(positions, len(found.ids))
    bar = rich.progress.Progress(console=say, transient=True, disable=not sys.stderr.isatty())
    count = len(found.ids) if at is None else len(at)
    say.print(
        f'{count} of {len(found.ids)} tokens, block {opened.layer} of {shown(opened.about()["subject"])}', markup=False
    )
    with bar:
        task = bar.add_task('Reading', total=count)
        how = {'temperature': temperature, 'seed': seed, 'progress': lambda done, _: bar.update(task, completed=done)}
        if best_of:
            reading = opened.best_of(what, best_of, at, **how)
        else:
            reading = opened.explain(what, at, samples=samples, **how)
    rich.console.Console(highlight=False).print(reading.table())
    written = []
    for name, path, write in (('JSON', json, reading.save), ('Page', html, reading.to_page)):
        if path:
            write(path)
            written.append(f'{name}: {path}')
    print('  '.join(written) or 'The page with samples, alternatives and controls: --html=FILE; in JSON: --json=FILE')
