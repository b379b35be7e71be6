#!/usr/bin/env bash
# Serves a model with vLLM until it is stopped; the server is ready when a line says so.
#
#   launch/serve_vllm.sh openai/gpt-oss-20b --tensor-parallel-size 8     # 8 GPUs
#   launch/serve_vllm.sh MODEL_DIR --max-model-len 4096                  # one GPU, or the CPU where there is none
#
# MODEL is a Hub id or a directory in Hugging Face layout. All options but these go to vLLM:
#   --host H             address to bind, default 127.0.0.1: this machine alone; to 0.0.0.0 anyone can send requests
#   --port P             default: a free one
#   --ready-timeout S    seconds until the first completion, default 1800 (download, load and compile)
#   --log FILE           output of the server, default runs/vllm/PORT.log
#   --registry FILE      the URL is a line of this file while the server is ready (see data_gen.generate)
# Variables: VENV, its environment (default .venv-vllm here, made where it is missing); PYTHON, which makes it (python3);
# VLLM_COMMAND, words that start another server with vLLM's options; HEAD_IP, in a Slurm job of several nodes, over which
# Ray spreads the server: address of the first for the others (default what `hostname --ip-address` says first).
# SIGTERM, SIGHUP, Ctrl-C or kill -9 end all its processes. Exit code 1, with the end and the first error of the log, where
# it ends by itself or is not ready in time.
# shellcheck disable=SC2016,SC2329 # what the keeper runs, and what a trap calls
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/generation.sh"
model=${1-}
check_model "$model"
shift
host=127.0.0.1 port='' ready_timeout=1800 log='' registry='' options=()
while (($#)); do
  name=${1%%=*}
  case $name in
    --host | --port | --ready-timeout | --log | --registry)
      [ "$name" != "$1" ] || (($# > 1)) || die "$1 needs a value."
      if [ "$name" = "$1" ]; then set -- "$1=$2" "${@:3}"; fi
      name=${name#--}
      printf -v "${name//-/_}" %s "${1#*=}"
      ;;
    --api-key) die 'All users of a machine see its command lines: give the key as the variable VLLM_API_KEY.' ;;
    *) options+=("$1") ;;
  esac
  shift
done
[[ $ready_timeout =~ ^[0-9]+$ ]] || die "--ready-timeout=$ready_timeout is no number of seconds."
[[ $host =~ ^[A-Za-z0-9_:][A-Za-z0-9_.:-]*$ ]] || die "--host=$host is no address to bind."
endpoint=("${PYTHON:-python3}" "$root/launch/endpoint.py")
port=${port:-$("${endpoint[@]}" free-port "$host")}
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || die "--port=$port is no port: give a number, or none for a free one."
! (: <>"/dev/tcp/$host/$port") 2>/dev/null || die "Port $port of $host is in use: give another --port, or none for a free one."
log=${log:-runs/vllm/$port.log} && mkdir -p "$(dirname "$log")"
owner=${SLURM_JOB_ID:-} owner=${owner:+job $owner} owner=${owner:-process $$} server='' waiter=''

# Starts a command as $server, with a keeper that outlives kill -9 of this script, ends all its processes and takes the
# URL out of the registry.
keep() {
  start_group bash -c 'set -euo pipefail; root=$1 registry=$2 owner=$3 started=""; . "$root/launch/generation.sh"
    leave() { [ -z "$registry" ] || register "$registry" "$owner" || true; [ -z "$started" ] || stop_group "$started" 20; }
    at_exit leave
    start_group "${@:4}"
    wait "$started" 2>/dev/null' keeper "$root" "$registry" "$owner" "$@"
  server=$started
}
finish() {
  if [ "$waiter" ]; then kill "$waiter" 2>/dev/null || true; fi
  if [ "$server" ]; then stop_group "$server" 30; fi
  if [ "$registry" ]; then register "$registry" "$owner" || true; fi
}
at_exit finish
read -r -a command <<<"${VLLM_COMMAND-}"
if [ -z "${VLLM_COMMAND-}" ]; then
  venv=$(realpath -m "${VENV:-$root/.venv-vllm}")
  keep env VENV="$venv" "$root/launch/vllm_env.sh"
  wait "$server" ||
    die "$venv could not be made: on a machine of the same kind that has a network, give \`make vllm-env\`."
  export PATH="$venv/bin:$PATH" # vLLM calls ninja when it builds kernels
  command=("$venv/bin/python" -m vllm.entrypoints.openai.api_server)
  if ! nvidia-smi >/dev/null 2>&1; then
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB
    command+=(--enforce-eager)
  fi
fi
command+=(--model "$model" --host "$host" --port "$port" "${options[@]}")
nodes=${SLURM_JOB_NUM_NODES:-1} url=http://$host:$port/v1
if ((nodes > 1)); then
  command -v ray >/dev/null || "$venv/bin/pip" install --quiet 'ray[cgraph]>=2.49' || die "There is no Ray: pip install 'ray[cgraph]'."
  head_ip=${HEAD_IP:-$(hostname --ip-address | cut -d ' ' -f 1)}
  # beside the batch step, which has the first node too; the server starts there when all nodes have joined
  command=(srun --overlap --nodes="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} ray symmetric-run --min-nodes "$nodes"
    --address "$head_ip:$("${endpoint[@]}" free-port "$head_ip")" -- "${command[@]}" --distributed-executor-backend=ray)
  export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 RAY_USAGE_STATS_ENABLED=0
fi
case $host in 0.0.0.0 | ::) url=http://$(uname -n):$port/v1 ;; esac
if [ -d "$model" ]; then export HF_HUB_OFFLINE=1; fi
export VLLM_NO_USAGE_STATS=1
unset VLLM_COMMAND VLLM_ARGS # vLLM warns of variables with its prefix that it does not know

fail() {
  echo "The last lines of $log:" >&2
  plain() { LC_ALL=C tr -d '\000-\010\013-\037\177' <"$log" | cut -b -1000; }
  plain | grep -avE '^nanobind: |^ - (leaked|\.\.\.) ' | tail -n 30 >&2 || true # what compiled modules did not free
  first=$(plain | grep -av WARNING | grep -m 1 -oE '[A-Za-z]+Error: .+' || true)
  die "$1${first:+ The first error of its log: $first}"
}

show "${command[@]}"
echo "Log: $log"
SECONDS=0
keep "${command[@]}" >"$log" 2>&1 || die "The log $log cannot be written: name another by --log."
setpriv --pdeathsig TERM "${endpoint[@]}" wait "$url" "$ready_timeout" &
waiter=$!
while alive "$waiter" && alive "$server"; do nap 0.2; done
alive "$server" || fail "The server of $model ended before it was ready."
wait "$waiter" || fail "The server of $model did not become ready."
if [ "$registry" ]; then register "$registry" "$owner" "$url"; fi
echo "Ready after $SECONDS s: $url"
wait "$server" || true
fail "The server of $model ended."
