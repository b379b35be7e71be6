"""Two processes save a checkpoint, half of it each; then a file that the second alone reads is cut short.

python -m tests.damaged_part --coordinator=… --num_processes=2 --process_id=I DIRECTORY
"""

import argparse
import os
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from lens import distributed, sharding
from lens.checkpoint import Checkpoints, Keep

ROWS, COLUMNS = 2, 50_001


def values(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(ROWS, COLUMNS)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--coordinator')
    parser.add_argument('--num_processes', type=int)
    parser.add_argument('--process_id', type=int)
    parser.add_argument('directory', type=pathlib.Path)
    args = parser.parse_args()
    distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    mesh = sharding.make_mesh(2, 1)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    with jax.set_mesh(mesh), Checkpoints(args.directory, Keep(2), say=print) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {'w': sharding.put(values(step), place)}, {'step': step})
        checkpoints.wait()
        if distributed.is_first():
            (part,) = (args.directory / '2/state/ocdbt.process_1/d').glob('*')
            os.truncate(part, part.stat().st_size // 2)
        multihost_utils.sync_global_devices('damaged')
        like = {'w': jax.ShapeDtypeStruct((ROWS, COLUMNS), np.float32, sharding=place)}
        step, (info, state) = checkpoints.newest(lambda s: (checkpoints.info(s), checkpoints.restore(s, like)))
        same = all(np.array_equal(s.data, values(step)[s.index]) for s in state['w'].addressable_shards)
        print(f'read {step} {info["step"]} {same}')


if __name__ == '__main__':
    main()
