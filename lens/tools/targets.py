"""Devices that are not there: where its plugin is installed, XLA compiles for an H100 or a TPU on a machine without one.

`devices` stands in for jax.devices(): a mesh over them, abstract arguments, and jit(f).trace(...).lower().compile() gives
the program, its memory and its text. Nothing runs.
"""

import importlib.util
import math
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from lens.errors import LensError


class Target(NamedTuple):
    """A kind of device. platform: as XLA names it; memory_gb: of one, in 1e9 bytes; slices: shapes in which TPUs are let."""

    platform: str
    memory_gb: float
    slices: tuple[str, ...] = ()


V5E = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
V5P = ('1x1x1', '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8')
TARGETS = {
    'h100': Target('cuda', 80.0),
    'v5e': Target('tpu', 16.0, V5E),
    'v5p': Target('tpu', 95.0, V5P),
    'cpu': Target('cpu', 80.0),
}
PLUGINS = {'cuda': ('jax_cuda13_plugin', 'jax_cuda12_plugin'), 'tpu': ('libtpu',), 'cpu': ('jax',)}
# Before JAX starts. Without a device nothing can be tried out.
ENVIRONMENT = {
    'cuda': {'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'},
    'tpu': {
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # it keeps other processes out, for the sake of chips
    },
    'cpu': {},
}
XLA_FLAGS = {'cuda': '--xla_gpu_autotune_level=0'}
# What XLA asks a device for, of an H100 SXM with CUDA 13 and the cuDNN of jax[cuda13].
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 23 patch: 0 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.23.0"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  pcie_bandwidth: 34359738368
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  ecc_enabled: true
}
"""


def installed(name: str) -> bool:
    """Returns whether the compiler for a target is here."""
    found = [importlib.util.find_spec(plugin) for plugin in PLUGINS[TARGETS[name].platform]]
    return any(spec and spec.origin for spec in found)


def default() -> str:
    """Returns the first target whose compiler is installed."""
    return next(filter(installed, TARGETS))


def prepare(name: str) -> None:
    """Sets the environment of a target; JAX must not have started. What is set already stays."""
    platform = TARGETS[name].platform
    for key, value in ENVIRONMENT[platform].items():
        os.environ.setdefault(key, value)
    if platform in XLA_FLAGS:
        os.environ['XLA_FLAGS'] = f'{XLA_FLAGS[platform]} {os.environ.get("XLA_FLAGS", "")}'
    jax.config.update('jax_platforms', 'cpu')  # nothing waits for a device


def devices(name: str, n: int) -> list:
    """Returns n devices of a target, after `prepare`. Raises LensError where there is no such slice or no compiler."""
    target = TARGETS[name]
    if not installed(name):
        raise LensError(f'no compiler for {name}: install {" or ".join(PLUGINS[target.platform])}.')
    if target.platform == 'cpu':
        jax.config.update('jax_num_cpu_devices', n)
        return jax.devices()[:n]
    if target.platform == 'cuda':
        of = {'target_config': H100, 'topology': f'1x1x{n}'}
        return topologies.get_topology_desc(platform='cuda', **of).devices
    slices = {math.prod(map(int, shape.split('x'))): shape for shape in target.slices}
    if n not in slices:
        raise LensError(f'no slice of {name} has {n} devices: {", ".join(map(str, slices))} do.')
    return topologies.get_topology_desc(platform='tpu', topology_name=f'{name}:{slices[n]}').devices
