"""lens: read the hidden states of language models as text.

import lens
reader = lens.load('runs/tiny')         # a run, an exported lens, or one that ships with the package
print(reader.explain('Lena found a compass.'))
"""

import importlib
import os

__version__ = '0.1.0'

_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, 'configs')):
    # A checkout has configs/ and data_gen/ beside this folder; there, too, they are lens.configs and lens.data_gen.
    __path__ = [*__path__, os.path.dirname(_here)]


def load(path, subject: str = '', **how):
    """Opens a trained lens as an instrument: a lens.reader.Reader, whose methods explain texts and more.

    path: a workdir, a folder of lens.export, or the name of a lens that ships with the package. subject: where the model
    that it reads is, if not where it was. how: of lens.reader.load. Raises lens.errors.LensError.
    """
    return importlib.import_module('lens.reader').load(path, subject, **how)
