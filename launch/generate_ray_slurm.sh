#!/usr/bin/env bash
# Chats with thinking from one server that is spread over several nodes of a Slurm cluster: tensor parallelism through
# Ray, for models that one node cannot hold. In all else like launch/generate_slurm.sh, whose variables it has.
#
#   NODES=2 GPUS_PER_NODE=8 SBATCH_ARGS='--partition=gpu --time=08:00:00' \
#       launch/generate_ray_slurm.sh openai/gpt-oss-120b --input_dataset=… --output_path=data/rollouts
#
# Variables:
#   NODES           nodes of the one server job, default 2
#   GPUS_PER_NODE   default 8; --tensor-parallel-size is NODES × GPUS_PER_NODE. Another split, by VLLM_ARGS:
#                   '--tensor-parallel-size 8 --pipeline-parallel-size 2'
set -euo pipefail
export SERVERS=1 NODES_PER_SERVER="${NODES:-2}" GPUS_PER_SERVER="${GPUS_PER_NODE:-8}"
exec "$(dirname "${BASH_SOURCE[0]}")/generate_slurm.sh" "$@"
