"""How every command starts: flags, one clear sentence for what a user can mend, exit codes."""

import difflib
import os
import re
import signal
import sys
import threading
import traceback
from typing import NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from lens.errors import LensError, number, shown, text

BROKEN = 70  # EX_SOFTWARE of sysexits.h
LEAVE_S = 4.0  # for an exit after an error: all processes of a run leave together if it is an error of all
MOST_COUNT = 2**53  # of a flag
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
    found = re.search(r'(?:^|\0)--?config[=\0]([^\0]*)', '\0'.join(argv))
    if found is None:
        return
    file = found[1]
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=holder, sys_argv=[])
    try:
        holder(['', f'--config={file}'])
        if not isinstance(holder.config, ml_collections.ConfigDict):
            raise TypeError(f'get_config returns {type(holder.config).__name__}, it must return a ConfigDict')
        known = flat_keys(holder.config)
    except (Exception, SystemExit) as e:  # whatever the file itself raises
        last = (str(e).strip() or type(e).__name__).splitlines()[-1]
        raise LensError(f'--config={shown(file)} does not load: {shown(last)}') from e
    for name in (a.split('=', 1)[0].removeprefix('--config.') for a in argv if a.startswith('--config.')):
        if name not in known:
            short = {k.rpartition('.')[2]: k for k in reversed(known)}
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            near += [short[k] for k in difflib.get_close_matches(name.rpartition('.')[2], short, n=1, cutoff=0.6)]
            hint = f'; the nearest key is config.{near[0]}' if near else f'; its keys: {", ".join(known)}'
            raise LensError(f'config.{name} is not a key of {file}{hint}.')


def check_value(value, name: str) -> None:
    """Refuses numbers that are not finite or that no command can mean, and texts that are no Unicode, also in lists and
    configurations. Raises LensError."""
    if isinstance(value, ml_collections.ConfigDict):
        for key, x in value.items():
            check_value(x, f'{name}.{key}')
    elif isinstance(value, list | tuple):
        for x in value:
            check_value(x, name)
    elif isinstance(value, float):
        number(value, name, whole=False)
    elif isinstance(value, int) and not isinstance(value, bool):
        number(value, name, -MOST_COUNT, MOST_COUNT)
    elif isinstance(value, str):
        text(value, name)


def _parse(argv: list[str]) -> list[str]:
    try:
        check_config(argv[1:])
        rest = flags.FLAGS(argv)
        for name in flags.FLAGS:
            check_value(flags.FLAGS[name].value, f'--{name}')
        return rest
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


def run(main) -> None:
    """Runs `main(argv)` by absl: a LensError or a failure of the disk prints its sentence and exits with code 1,
    anything else its traceback and exits with BROKEN, after which launch/restart.sh starts a run again."""

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # Orbax reports every save at INFO
        try:
            return main(argv)
        except BrokenPipeError:  # nobody reads the output any more, as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _leave(128 + signal.SIGPIPE)
        except (LensError, OSError, MemoryError) as e:
            if DEBUG.value:
                traceback.print_exc()
            print(f'error: {e}', file=sys.stderr)
            _leave(1)
        except Exception:
            traceback.print_exc()
            _leave(BROKEN)

    app.run(guarded, flags_parser=_parse)
