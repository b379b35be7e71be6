"""A command line from a frozen dataclass: a flag for every field."""

import dataclasses
import re
import sys

from absl import flags

from lens import cli
from lens.errors import LensError

DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}  # others are texts


def option(default, text: str, minimum: float | None = None, maximum: float | None = None, choices=()):
    """Returns a field of the options of a command; `text`, the bounds and the choices are those of its flag."""
    metadata = {'help': text, 'bounds': {'lower_bound': minimum, 'upper_bound': maximum}, 'choices': choices}
    return dataclasses.field(default=default, metadata=metadata)


def need(options, *names: str) -> None:
    """Raises LensError where one of the options is empty."""
    for name in names:
        if not getattr(options, name):
            raise LensError(f'--{name} is needed.')


def command(options: type, act) -> None:
    """Runs the command line and prints the text that act(options) returns; names may be written with dashes. The module
    of `options` says what --help prints first."""
    fields = dataclasses.fields(options)
    for f in fields:
        if f.metadata['choices']:
            flags.DEFINE_enum(f.name, f.default, f.metadata['choices'], f.metadata['help'])
        else:
            bounds = f.metadata['bounds'] if f.type in (int, float) else {}
            DEFINE.get(f.type, flags.DEFINE_string)(f.name, f.default, f.metadata['help'], **bounds)
    sys.argv[1:] = [
        re.sub(r'^--?[a-z][a-z-]*', lambda m: '--' + m[0].lstrip('-').replace('-', '_'), a) for a in sys.argv[1:]
    ]
    cli.run(lambda _: print(act(options(**{f.name: flags.FLAGS[f.name].value for f in fields}))), options.__module__)
