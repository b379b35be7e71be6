"""How every command starts: flags, one clear sentence for what a user can mend, exit codes, output that nobody reads."""

import contextlib
import difflib
import io
import logging as std_logging
import os
import signal
import sys
import threading
import traceback
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from lens.errors import LensError, shown

BROKEN = 70  # EX_SOFTWARE of sysexits.h
LEAVE_S = 4.0  # for an exit after an error: all processes of a run leave together if it is an error of all
DEBUG = flags.DEFINE_bool('debug', False, 'Show tracebacks of user errors; training stops where a NaN arises.')


def flat_keys(config, prefix: str = '') -> list[str]:
    """Returns the dotted names of all keys of a ConfigDict."""
    out = []
    for k, v in config.items():
        out += flat_keys(v, f'{prefix}{k}.') if hasattr(v, 'items') else [prefix + k]
    return out


def check_config(argv: list[str]) -> None:
    """Refuses a --config file that does not load, and overrides of keys that it does not have: it names the nearest
    one of the whole file, for `--config.steps` sft.steps. Raises LensError."""
    file = next((a.split('=', 1)[1] for a in argv if a.startswith('--config=')), None)
    if file is None:
        return
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=holder, sys_argv=[])
    try:
        holder(['', f'--config={file}'])
        known = flat_keys(holder.config)
    except Exception as e:  # whatever the file itself raises
        raise LensError(
            f'--config={file} does not load: {(str(e).splitlines() or [type(e).__name__])[-1].strip()}'
        ) from e
    for name in (a.split('=', 1)[0].removeprefix('--config.') for a in argv if a.startswith('--config.')):
        if name not in known:
            short = {k.rpartition('.')[2]: k for k in reversed(known)}
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            near += [short[k] for k in difflib.get_close_matches(name.rpartition('.')[2], short, n=1, cutoff=0.6)]
            hint = f'; the nearest key is config.{near[0]}' if near else f'; its keys: {", ".join(known)}'
            raise LensError(f'config.{name} is not a key of {file}{hint}.')


def _parse(argv: list[str]) -> list[str]:
    try:
        check_config(argv[1:])
        return flags.FLAGS(argv)
    except (LensError, flags.Error) as e:
        sys.exit(f'error: {" ".join(str(e).split())}')


def _leave(code: int) -> NoReturn:
    """Ends this process with `code`, after LEAVE_S at the latest: at the exit JAX waits minutes for the other processes
    of a run and then aborts, and these may wait in a collective for this process."""
    print(end='', flush=True)
    print(end='', flush=True, file=sys.stderr)
    timer = threading.Timer(LEAVE_S, os._exit, (code,))
    timer.daemon = True
    timer.start()
    sys.exit(code)


class _Output(io.FileIO):
    """A standard stream that outlives its reader, its terminal and a full disk: what nobody takes is dropped."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _outlive_readers() -> None:
    """Lets no print fail: also a command that says what it does writes its files to the end."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # `>&-`: no file of the run may become its output
        pass
    os.close(number)
    for number, name in enumerate(('stdout', 'stderr'), 1):
        if getattr(sys, name) is not getattr(sys, f'__{name}__'):
            continue  # somebody reads it in this process
        old = getattr(sys, name) or io.TextIOWrapper(io.BytesIO(), encoding='utf-8')
        with contextlib.suppress(OSError):
            old.flush()
        raw = _Output(number, 'w', closefd=False)
        how = {'line_buffering': old.line_buffering, 'write_through': old.write_through}
        buffer = raw if old.write_through else io.BufferedWriter(raw)
        setattr(sys, name, io.TextIOWrapper(buffer, old.encoding, 'backslashreplace', **how))


def sentence(e: Exception) -> str:
    """Returns what a user can mend, '' where it is a fault of the program."""
    if isinstance(e, LensError | OSError):
        return str(e)
    if any(f.filename.endswith('jax/_src/xla_bridge.py') for f in traceback.extract_tb(e.__traceback__)):
        asked = f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")}'
        return f'JAX finds no device ({asked}; {shown(e) or "no plugin"}): install JAX for it, or choose another one.'
    if isinstance(e, MemoryError) or (type(e).__name__ == 'JaxRuntimeError' and 'RESOURCE_EXHAUSTED' in str(e)):
        return f'The memory is not enough ({shown(e)}): python -m lens.main --plan with the same flags says what helps.'
    return ''


def run(main) -> None:
    """Runs `main(argv)` by absl: a LensError, a failure of the disk, a device or memory that is not there prints its
    sentence and exits with code 1, anything else its traceback and exits with BROKEN, after which launch/restart.sh
    starts a run again."""

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # Orbax reports every save at INFO
        # and one that fails by a dozen tracebacks, where lens.checkpoint says a sentence
        std_logging.getLogger('absl').addFilter(lambda record: 'orbax' not in record.pathname)
        try:
            return main(argv)
        except KeyboardInterrupt:
            print('Stopped by Ctrl-C.', file=sys.stderr)
            _leave(128 + signal.SIGINT)
        except Exception as e:
            said = sentence(e)
            if DEBUG.value or not said:
                traceback.print_exc()
            if said:
                print(f'error: {said}', file=sys.stderr)
            _leave(1 if said else BROKEN)

    _outlive_readers()
    app.run(guarded, flags_parser=_parse)
