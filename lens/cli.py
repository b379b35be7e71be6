"""How every command starts: flags and --help, one clear sentence for what a user can mend, exit codes, output that
nobody reads."""

import ast
import contextlib
import difflib
import functools
import importlib
import importlib.util
import io
import logging as std_logging
import os
import pathlib
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from lens import files
from lens.errors import LensError, number, shown, text

BROKEN = 70  # EX_SOFTWARE of sysexits.h
LEAVE_S = 4.0  # for an exit after an error: all processes of a run leave together if it is an error of all
HELP = ('-h', '--h', '-help', '--help', '-helpshort', '--helpshort', '-?')
KEYS = 'configs/base.py'  # every key of a recipe, with its meaning
WIDTH = 100  # of the lines of --help
LONGEST_NAME = 200  # of a flag; absl looks for names like it, one call deeper for each letter
LONGEST_SENTENCE = 900  # characters of what is wrong
MOST_COUNT = 2**53  # of a flag
# Of a GPU's memory that JAX takes, three quarters where nobody says; what it leaves is for cuBLAS, NCCL and the driver.
MEMORY_FRACTION = 0.92
MEMORY_KEYS = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')  # JAX refuses to be told by both
# cuBLAS reads the weights of a layer where they lie in the stack; kernels by Triton get a copy of them, at every token.
GPU_FLAGS = {'--xla_gpu_enable_triton_gemm': 'false'}
DEBUG = flags.DEFINE_bool('debug', False, 'Show tracebacks of user errors; training stops where a NaN arises.')


def flat_keys(config, prefix: str = '') -> list[str]:
    """Returns the dotted names of all keys of a ConfigDict."""
    out = []
    for k, v in config.items():
        out += flat_keys(v, f'{prefix}{k}.') if hasattr(v, 'items') else [prefix + k]
    return out


def find_config(argv: list[str]) -> list[str]:
    """Returns the arguments with --config=FILE in one, FILE where files.find has it, also in what ships with lens."""
    out = list(argv)
    for i in [i for i, a in enumerate(argv[:-1]) if a in ('--config', '-config')][::-1]:
        out[i : i + 2] = [f'--config={argv[i + 1]}']
    for i, (name, equals, value) in enumerate(a.partition('=') for a in out):
        if name.lstrip('-') == 'config' and equals:
            file, colon, recipe = value.partition(':')
            out[i] = f'--config={files.find(file)}{colon}{recipe}'
    return out


def load_config(file: str):
    """Returns the ConfigDict of FILE or FILE:RECIPE. Raises LensError where it does not load."""
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=holder, sys_argv=[])
    try:
        holder(['', f'--config={file}'])
        hasattr(holder.config, 'items')  # raises what the file has raised
        if not isinstance(holder.config, ml_collections.ConfigDict):
            raise TypeError(f'get_config returns {type(holder.config).__name__}, it must return a ConfigDict')
        return holder.config
    except (Exception, SystemExit) as e:  # whatever the file itself raises
        last = (str(e).strip() or type(e).__name__).splitlines()[-1]
        raise LensError(f'--config={shown(file)} does not load: {shown(last)}') from e


def check_config(argv: list[str]) -> None:
    """Refuses a --config file that does not load, and overrides of keys that it does not have: it names the nearest
    one of the whole file, for `--config.steps` sft.steps. Raises LensError."""
    file = next((a.split('=', 1)[1] for a in argv if a.startswith('--config=')), None)
    if file is None:
        return
    known = flat_keys(load_config(file))
    for name in (a.split('=', 1)[0].removeprefix('--config.') for a in argv if a.startswith('--config.')):
        if name not in known:
            short = {k.rpartition('.')[2]: k for k in reversed(known)}
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            near += [short[k] for k in difflib.get_close_matches(name.rpartition('.')[2], short, n=1, cutoff=0.6)]
            hint = f'; the nearest key is config.{near[0]}' if near else f'; its keys: {", ".join(known)}'
            raise LensError(f'config.{name} is not a key of {file}{hint}.')


def meanings(source: str) -> dict[str, str]:
    """Returns what the comments of a recipe say: dotted key -> the comment on the line that sets it in get_config; keys
    that other functions set are those of a block for each phase, PHASE.key."""
    lines, out = source.splitlines(), {}
    for function in (f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)):
        place = '' if function.name == 'get_config' else 'PHASE.'
        for node in (x for x in ast.walk(function) if isinstance(x, ast.Assign)):
            rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
            if isinstance(node.targets[0], ast.Attribute) and rest.startswith('#'):
                out.setdefault(place + ast.unparse(node.targets[0]).partition('.')[2], rest.lstrip('# '))
    return out


def key_lines(file: str, all_keys: str = KEYS) -> list[str]:
    """Returns a line for every key of a recipe, value and meaning; of blocks of phases the values in the order of phases.

    all_keys: the file whose comments say what keys mean. Raises LensError where the recipe does not load.
    """
    config = load_config(file)
    meant = meanings(files.find(all_keys).read_text('utf-8'))
    of_recipe = meanings(pathlib.Path(file.partition(':')[0]).read_text('utf-8'))
    meaning = meant | {k: x for k, x in of_recipe.items() if k not in meant}
    keys, values = flat_keys(config), {}
    blocks = [k.removesuffix('.objective') for k in keys if k.endswith('.objective')]
    running = [*config.get('phases', ())]
    for key in sorted(keys, key=lambda k: [*running, k.partition('.')[0]].index(k.partition('.')[0])):
        block, _, name = key.partition('.')
        if block not in blocks or block in running:
            value = functools.reduce(lambda c, k: c[k], key.split('.'), config)
            values.setdefault(f'PHASE.{name}' if block in blocks else key, {})[shown(repr(value), 40)] = None
    order = {key: i for i, key in enumerate(meaning)}
    found = sorted(values, key=lambda k: (k.startswith('PHASE.'), order.get(k, len(order))))
    return [f'  --config.{k}={" | ".join(values[k])}  # {meaning.get(k, "")}' for k in found]


def own_flags(values: flags.FlagValues) -> list[flags.Flag]:
    """Returns the flags of a command in the order in which it defines them, --debug last, without those of absl."""
    of_modules = values.flags_by_module_dict().items()
    found = [f for module, of_one in of_modules if not module.startswith('absl.') for f in of_one]
    return sorted(found, key=lambda f: f.name == DEBUG.name)


def _flag_line(flag: flags.Flag) -> str:
    name = f'[no]{flag.name}' if flag.boolean else flag.name
    default = '' if flag.default in (None, '') or flag.default is False else f' [{flag.default}]'
    return textwrap.fill(
        f'--{name}: {flag.help}{default}',
        WIDTH,
        initial_indent='  ',
        subsequent_indent='      ',
        break_on_hyphens=False,
    )


def help_text(about: str, values: flags.FlagValues, argv: Sequence[str] = (), all_keys: str = KEYS) -> str:
    """Returns what --help prints: the first text of the module `about`, which is not imported for that, the flags, and
    the keys of --config=FILE of argv, or all that a recipe may have. Raises LensError where FILE does not load."""
    loaded = sys.modules.get(about)
    doc = (loaded.__doc__ if loaded else ast.get_docstring(_tree(about))) or ''
    about = loaded.__spec__.name if loaded and loaded.__spec__ else about
    if about.startswith('lens.data_gen.'):  # where it is installed there is no other
        doc = doc.replace('python -m data_gen', 'python -m lens.data_gen')
    lines = [doc.strip(), '', 'Flags, with [their defaults]:']
    lines += map(_flag_line, own_flags(values))
    if 'config' in values:
        file = next((a.partition('=')[2] for a in argv if a.startswith('--config=')), '')
        lines += ['', f'Keys of {file or all_keys} and their values, PHASE for each of config.phases in its order:']
        lines += key_lines(file or str(files.find(all_keys)), all_keys)
    return '\n'.join([*lines, '', '--helpfull names the flags of libraries too.'])


def _tree(module: str) -> ast.Module:
    return ast.parse(pathlib.Path(importlib.util.find_spec(module).origin).read_text('utf-8'))


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


def _check_names(argv: list[str]) -> None:
    """Ends the command where absl would fail: at files of flags, which no command takes, and names without end."""
    for argument in argv:
        name = argument.lstrip('-').partition('=')[0]
        if argument.startswith('-') and (name == 'flagfile' or len(name) > LONGEST_NAME):
            sys.exit(f'error: {shown(argument, 60)} is no flag of this command; --help lists them.')


def define_config(text: str) -> flags.FlagHolder:
    """Defines --config, a recipe that must be given, with its keys. text: for --help."""
    _check_names(sys.argv[1:])  # to define it reads the command line
    config = config_flags.DEFINE_config_file('config', None, text)
    flags.mark_flag_as_required('config')
    return config


def _parse(argv: list[str], about: str, all_keys: str) -> list[str]:
    try:
        _check_names(argv[1:])
        argv[1:] = find_config(argv[1:])  # in sys.argv, where config_flags looks for overrides
        if set(argv) & set(HELP):
            print(help_text(about, flags.FLAGS, argv, all_keys), flush=True)
            sys.exit(0)
        check_config(argv[1:])
        left = flags.FLAGS(argv)
        for name in flags.FLAGS:
            check_value(flags.FLAGS[name].value, f'--{name}')
        if left[1:]:
            raise LensError(f'{left[1]} is no flag of this command: flags are --NAME=VALUE, and --help lists them.')
        return left
    except flags.UnrecognizedFlagError as e:
        near = difflib.get_close_matches(e.flagname, [f.name for f in own_flags(flags.FLAGS)], n=1, cutoff=0.5)
        hint = f'the nearest is --{near[0]}' if near else '--help lists them'
        sys.exit(f'error: --{shown(e.flagname, 60)} is no flag of this command; {hint}.')
    except (LensError, flags.Error) as e:
        sys.exit(f'error: {shown(str(e).rstrip("."), LONGEST_SENTENCE)}.')


def _leave(code: int) -> NoReturn:
    """Ends this process with `code`, after LEAVE_S at the latest: at the exit JAX waits minutes for the other processes
    of a run and then aborts, and these may wait in a collective for this process."""
    print(end='', flush=True)
    print(end='', flush=True, file=sys.stderr)
    timer = threading.Timer(LEAVE_S, os._exit, (code,))
    timer.daemon = True
    timer.start()
    sys.exit(code)


def set_up_accelerators() -> None:
    """Gives JAX, which has not started yet, MEMORY_FRACTION of a GPU and GPU_FLAGS, where the environment says nothing
    else."""
    if not any(key in os.environ for key in MEMORY_KEYS):
        os.environ[MEMORY_KEYS[0]] = str(MEMORY_FRACTION)
    said = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = ' '.join([said, *(f'{k}={v}' for k, v in GPU_FLAGS.items() if k not in said)]).strip()


def start(module: str, *values: flags.FlagHolder, all_keys: str = KEYS) -> None:
    """Runs main(*values) of a module, which is imported after the flags are parsed, as `run` says."""
    set_up_accelerators()
    run(lambda _: importlib.import_module(module).main(*(v.value for v in values)), module, all_keys)


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


def _tell_unraisable(tell: Callable, args) -> None:
    """Leaves out what TensorStore says, by a traceback for each file, after Orbax has given up what it writes."""
    if str(args.exc_value) != 'Event loop is closed':
        tell(args)


def sentence(e: Exception) -> str:
    """Returns what a user can mend, '' where it is a fault of the program."""
    if isinstance(e, OSError) and e.filename and e.strerror:
        return f'{shown(e.filename)} cannot be read or written: {e.strerror}.'
    if isinstance(e, LensError | OSError):
        return str(e)
    if any(f.filename.endswith('jax/_src/xla_bridge.py') for f in traceback.extract_tb(e.__traceback__)):
        asked = f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")}'
        return f'JAX finds no device ({asked}; {shown(e) or "no plugin"}): install JAX for it, or choose another one.'
    if isinstance(e, MemoryError) or (type(e).__name__ == 'JaxRuntimeError' and 'RESOURCE_EXHAUSTED' in str(e)):
        return f'The memory is not enough ({shown(e)}): python -m lens.main --plan with the same flags says what helps.'
    return ''


def run(main: Callable, about: str = '__main__', all_keys: str = KEYS) -> None:
    """Runs `main(argv)` by absl: a LensError, a failure of the disk, a device or memory that is not there prints its
    sentence and exits with code 1, anything else its traceback and exits with BROKEN, after which launch/restart.sh
    starts a run again.

    about: the module whose first text --help prints. all_keys: the recipe whose keys it lists without --config.
    """

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # Orbax reports every save at INFO
        # and one that fails by a dozen tracebacks, where lens.checkpoint says a sentence
        std_logging.getLogger('absl').addFilter(lambda record: 'orbax' not in record.pathname)
        sys.unraisablehook = functools.partial(_tell_unraisable, sys.unraisablehook)
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
                print(f'error: {shown(said, LONGEST_SENTENCE)}', file=sys.stderr)
            _leave(1 if said else BROKEN)

    _outlive_readers()
    app.run(guarded, flags_parser=functools.partial(_parse, about=about, all_keys=all_keys))
