#!/usr/bin/env bash
# Serves a model with vLLM until it is stopped; the server is ready when a line says so.
#
#   launch/serve_vllm.sh openai/gpt-oss-20b --tensor-parallel-size 8     # 8 GPUs
#   launch/serve_vllm.sh MODEL_DIR --max-model-len 4096                  # one GPU, or the CPU where there is none
#
# MODEL is a Hub id or a directory in Hugging Face layout. Options:
#   --host H             address to bind, default 127.0.0.1: this machine alone. 0.0.0.0 is every interface, so that
#                        other nodes can send requests; anyone who reaches the port can.
#   --port P             default: a free one
#   --ready-timeout S    seconds until the first completion, default 1800 (download, load and compile)
#   --log FILE           output of the server, default runs/vllm/PORT.log
#   --registry FILE      the URL is a line of this file while the server is ready (see data_gen.generate)
# All others go to vLLM: --tensor-parallel-size, --max-model-len, --served-model-name, --dtype, …
#
# Variables:
#   VENV           environment of the server, default .venv-vllm here; made by launch/vllm_env.sh where it is missing
#   VLLM_COMMAND   words that start another server with the options of vLLM's; no environment is made then
#   PYTHON         interpreter of the helper launch/endpoint.py, and of an environment to be made (default python3)
#   VLLM_CPU_KVCACHE_SPACE   GiB of cache of the CPU build, default 1
#
# SIGTERM, SIGHUP or Ctrl-C end the server with all its processes, and so does kill -9 of this script. Exit code 1, the
# last lines of the log and its first error, where the server ends by itself or is not ready in time.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/common.sh"

model=${1-}
check_model "$model"
shift
host=127.0.0.1 port='' ready_timeout=1800 log='' registry='' options=()
while (($#)); do
  case $1 in
    --host | --port | --ready-timeout | --log | --registry)
      (($# > 1)) || die "$1 needs a value."
      set -- "$1=$2" "${@:3}"
      continue
      ;;
    --host=*) host=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --ready-timeout=*) ready_timeout=${1#*=} ;;
    --log=*) log=${1#*=} ;;
    --registry=*) registry=${1#*=} ;;
    *) options+=("$1") ;;
  esac
  shift
done
[[ $ready_timeout =~ ^[0-9]+$ ]] || die "--ready-timeout=$ready_timeout is no number of seconds."

endpoint=("${PYTHON:-python3}" "$root/launch/endpoint.py")
if [ "$port" ]; then
  "${endpoint[@]}" check-port "$host" "$port"
else
  port=$("${endpoint[@]}" free-port "$host")
fi
log=${log:-runs/vllm/$port.log}
mkdir -p "$(dirname "$log")"
: >"$log" || die "The log $log cannot be written: name another by --log."

if [ "${VLLM_COMMAND-}" ]; then
  read -r -a command <<<"$VLLM_COMMAND"
else
  use_vllm_env
  command=("$venv/bin/python" -m vllm.entrypoints.openai.api_server)
  if ! nvidia-smi >/dev/null 2>&1; then
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
    command+=(--enforce-eager)
  fi
fi
command+=(--model "$model" --host "$host" --port "$port" "${options[@]}")
export VLLM_NO_USAGE_STATS=1
unset VLLM_COMMAND VLLM_ARGS # vLLM warns of variables with its prefix that it does not know
if [ -d "$model" ]; then export HF_HUB_OFFLINE=1; fi
case $host in
  0.0.0.0 | ::) url=http://$(uname -n):$port/v1 ;;
  *) url=http://$host:$port/v1 ;;
esac
owner="${SLURM_JOB_ID:+job $SLURM_JOB_ID}"
owner=${owner:-process $$}

server='' waiter=''
# shellcheck disable=SC2329 # a trap calls it
finish() {
  if [ "$registry" ]; then "${endpoint[@]}" unregister "$registry" "$owner" || true; fi
  if [ "$waiter" ]; then kill "$waiter" 2>/dev/null || true; fi
  if [ "$server" ]; then stop_group "$server" 20; fi
}
at_exit finish

fail() {
  local first
  echo "The last lines of $log:" >&2
  # compiled modules list at the end what they did not free
  grep -avE '^nanobind: |^ - (leaked|\.\.\.) ' "$log" | tail -n 30 >&2 || true
  first=$(grep -av WARNING "$log" | grep -m 1 -oE '[A-Za-z]+Error: .+' || true)
  die "$1${first:+ The first error of its log: $first}"
}

show "${command[@]}"
echo "Log: $log"
SECONDS=0
start_group "${command[@]}" >"$log" 2>&1 </dev/null
server=$started
"${endpoint[@]}" wait "$url" "$ready_timeout" &
waiter=$!
while alive "$waiter"; do
  alive "$server" || fail "The server of $model ended before it was ready."
  nap 0.2
done
wait "$waiter" || fail "The server of $model did not become ready."
alive "$server" || fail "The server of $model ended before it was ready."
if [ "$registry" ]; then "${endpoint[@]}" register "$registry" "$url" "$owner"; fi
echo "Ready after $SECONDS s: $url"
wait "$server" || true
fail "The server of $model ended."
