#!/usr/bin/env bash
# One vLLM server over all nodes of a Slurm job: a Ray head on the first node, workers on the others.
# generate_ray_slurm.sh submits it; alone: sbatch --nodes=2 --ntasks-per-node=1 --gres=gpu:8 --wrap=
# 'launch/serve_ray.sh MODEL --tensor-parallel-size 16 --host 0.0.0.0'
#
# MODEL and options are those of launch/serve_vllm.sh, and so are the variables. More variables:
#   HEAD_IP      address of the first node for the others, default what `hostname --ip-address` says first
#   RAY_WAIT_S   seconds for all nodes to join, default 300
# When a node is lost the server ends, with exit code 1.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/common.sh"

[ "${SLURM_JOB_NODELIST-}" ] || die "serve_ray.sh runs in a Slurm job: see the head of the script."
check_model "${1-}"
if [ -z "${VLLM_COMMAND-}" ]; then
  use_vllm_env
  [ -x "$venv/bin/ray" ] || "$venv/bin/pip" install --quiet 'ray[cgraph]>=2.48' ||
    die "$venv has no Ray: on a machine with a network, give $venv/bin/pip install 'ray[cgraph]'."
fi
needs srun scontrol ray
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=${HEAD_IP:-$(hostname --ip-address)}
head_ip=${head_ip%% *}
port=$("${PYTHON:-python3}" "$root/launch/endpoint.py" free-port "$head_ip")
export RAY_ADDRESS=$head_ip:$port RAY_USAGE_STATS_ENABLED=0

groups=()
finish() {
  local i
  # the server first, the head last
  for ((i = ${#groups[@]} - 1; i >= 0; i--)); do stop_group "${groups[i]}" 40; done
}
at_exit finish

launch() {
  show "$@"
  start_group "$@" </dev/null
  groups+=("$started")
}

# Dies if a process of ours has ended.
check() {
  local pid
  for pid in "${groups[@]}"; do alive "$pid" || die "$1"; done
}

# Waits until Ray has $1 nodes.
await_nodes() {
  local last=$((SECONDS + ${RAY_WAIT_S:-300})) found=0
  while true; do
    found=$(timeout 30 ray status 2>/dev/null | grep -cE '^ *[0-9]+ node_' || true)
    ((found < $1)) || return 0
    check "Ray ended while it waited for $1 nodes."
    ((SECONDS < last)) || die "Ray has $found of $1 nodes after ${RAY_WAIT_S:-300} s."
    nap 1
  done
}

# beside the batch step, which has the node too; what the job has per task is not inherited
step=(srun --overlap --ntasks-per-node=1 --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
launch "${step[@]}" --nodes=1 --nodelist="${nodes[0]}" \
  env -u RAY_ADDRESS ray start --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false --block
await_nodes 1
if ((${#nodes[@]} > 1)); then
  workers=$(IFS=, && echo "${nodes[*]:1}")
  launch "${step[@]}" --nodes="$((${#nodes[@]} - 1))" --nodelist="$workers" ray start --address="$RAY_ADDRESS" --block
  await_nodes "${#nodes[@]}"
fi
launch "$root/launch/serve_vllm.sh" "$@" --distributed-executor-backend=ray
while true; do
  check "The server ended, or a node was lost."
  nap 1
done
