"""lens: read the hidden states of language models as text."""

import os

__version__ = '0.1.0'

_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, 'configs')):
    # A checkout has configs/ and data_gen/ beside this folder; there, too, they are lens.configs and lens.data_gen.
    __path__ = [*__path__, os.path.dirname(_here)]
