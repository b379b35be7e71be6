"""Eight fake CPU devices and a tiny random world in which every dimension is distinct."""

import gc
import itertools
import os
import pathlib
import signal

import jaxlib.version

# Imports and traces make millions of objects and next to no garbage: looking for it takes a quarter of their time.
gc.disable()
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# Tiny shapes: compiling is all the time there is.
FLAGS = ['--xla_backend_optimization_level=0', '--xla_llvm_disable_expensive_passes=true']
# Devices must start independent collectives in one order: tests run eight of them on two cores.
FLAGS += ['--xla_cpu_enable_concurrency_optimized_scheduler=false']
# Half of what compiling costs. XLA aborts on a flag that it does not know, and this one is gone from 0.11 on.
FLAGS += ['--xla_cpu_parallel_codegen_split_count=1']
FLAGS += ['--xla_cpu_use_fusion_emitters=false'] if jaxlib.version.__version_info__ < (0, 11) else []
# What is in XLA_FLAGS already, say --xla_cpu_max_isa=AVX2 to imitate another machine, stays.
os.environ['XLA_FLAGS'] = ' '.join([*FLAGS, os.environ.get('XLA_FLAGS', '')])
# Many tests compile the same programs, in processes of their own too: compile each once.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.pytest_cache/xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# A collective of eight devices blocks eight threads, and several that do not depend on each other run at once:
# XLA's pools have one thread per core and would deadlock on two.
os.environ['NPROC'] = '64'
jax.devices()
del os.environ['NPROC']

import numpy as np
import pytest
from xdist.scheduler import LoadFileScheduling

from lens.signals import OF_TERMINALS, SIGNALS
from tests import small_run
from tests.tiny_world import LAYER as LAYER
from tests.tiny_world import LENGTH, TINY, make_base, make_lens

# Files whose tests run the same programs, or import the models of transformers (seconds), are one process's.
TOGETHER = {
    'runs': 'extension refusals resume train',
    'evaluations': 'evaluate study',
    'readers': 'reader serve',
    'models': 'benchmark_cpu export families families_sharded functional hf_errors moe mxfp4 pretrain roles_families '
    'tiny_chat transformer writing',
}
OF_FILE = {f'tests/test_{name}.py': key for key, names in TOGETHER.items() for name in names.split()}
MAPS, MOST_MAPS, LOOK_EVERY = pathlib.Path('/proc/self/maps'), 30_000, 20
_tests_run = itertools.count(1)


class Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return OF_FILE.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log) if config.getvalue('dist') == 'loadfile' else None


def pytest_collection_finish():
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


def pytest_runtest_teardown():
    """Compiled programs hold memory maps, of which Linux lets a process have 65,530: beyond that XLA aborts."""
    if next(_tests_run) % LOOK_EVERY == 0 and MAPS.exists() and MAPS.read_bytes().count(b'\n') > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def handlers():
    """Gives back the handlers of signals that a test has changed: what is ignored stays so in the programs that later
    tests start."""
    before = {s: signal.getsignal(s) for s in SIGNALS + OF_TERMINALS}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture(scope='session')
def base():
    return make_base()


@pytest.fixture(scope='session')
def tokens():
    return np.random.default_rng(1).integers(0, TINY.vocab_size, (8, 11)).astype(np.int32)


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    return small_run.make_world(tmp_path_factory.mktemp('world'))


@pytest.fixture(scope='session')
def lens(base):
    return make_lens(base)


@pytest.fixture(scope='session')
def batch(tokens):
    """8 documents, 2 activations each, with given explanations."""
    rng = np.random.default_rng(3)
    return {
        'tokens': tokens,
        'positions': np.sort(rng.permuted(np.tile(np.arange(2, 11), (8, 1)), axis=1)[:, :2]).astype(np.int32),
        'explanations': rng.integers(0, TINY.vocab_size, (8, 2, LENGTH)).astype(np.int32),
    }
