#!/usr/bin/env bash
# Training in one or several processes on this machine; when one dies, all start again from the last checkpoint.
#
#   launch/train_local.sh --config=configs/tiny.py --workdir=runs/tiny --config.sft.steps=600
#   DEVICES_PER_PROCESS=1 launch/train_local.sh -n 8 --config=configs/gptoss.py --workdir=runs/gptoss   # 8 GPUs
#
# All arguments after `-n N` go to lens.main. Process 0 writes to the terminal, process I to WORKDIR/logs/process-I.log.
# SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C: all save, then it ends with exit code 0, and the same command goes on later. A
# second Ctrl-C ends at once. Exit code 1 of a process is an error of the user: no restart. Variables:
#   DEVICES_PER_PROCESS  GPUs of each process, its part of CUDA_VISIBLE_DEVICES, or of 0, 1, 2, …; default: all see all
#   MAX_RESTARTS         restarts in a row without a new checkpoint before it gives up, default 10
#   PAUSE_S              seconds before a restart, default 5
#   PYTHON               interpreter, default .venv/bin/python here
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/common.sh"
count=1 each=${DEVICES_PER_PROCESS:-0} python=${PYTHON:-$root/.venv/bin/python}
if [ "${1-}" = -n ]; then
  [[ ${2-} =~ ^[1-9][0-9]*$ ]] || die "-n needs a number of processes: -n 2."
  count=$2 && shift 2
fi
. "$root/launch/restart.sh"
needs "$python"
training=("$python" -m lens.main "$@")
IFS=, read -r -a devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((count * each - 1)))}"
((${#devices[@]} >= count * each)) || die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has ${#devices[@]} devices, and $count processes with DEVICES_PER_PROCESS=$each need more."
command_of() {
  local part=("${devices[@]:$1 * each:each}")
  command=(env PYTHONUNBUFFERED=1)
  if ((each)); then command+=(CUDA_VISIBLE_DEVICES="$(IFS=, && echo "${part[*]}")"); fi
  command+=("${training[@]}")
  if ((count == 1)); then return; fi
  if (($1 == 0)); then address=127.0.0.1:$("$python" "$root/launch/endpoint.py" free-port 127.0.0.1); fi
  command+=(--coordinator="$address" --num_processes="$count" --process_id="$1")
}
supervise "$count"
