#!/usr/bin/env bash
# Training in one or several processes on this machine; when one dies, all start again from the last checkpoint.
#
#   launch/train_local.sh --config=configs/tiny.py --workdir=runs/tiny --config.sft.steps=600
#   DEVICES_PER_PROCESS=1 launch/train_local.sh -n 8 --config=configs/gptoss.py --workdir=runs/gptoss   # 8 GPUs
#
# All arguments after `-n N` go to lens.main. Process 0 writes to the terminal, process I to WORKDIR/logs/process-I.log.
#
# Variables:
#   PROCESSES            as -n, default 1
#   DEVICES_PER_PROCESS  GPUs of each process: process I gets the I-th part of CUDA_VISIBLE_DEVICES, or of 0, 1, 2, … .
#                        Default: every process sees all
#   MAX_RESTARTS         restarts in a row without a new checkpoint before it gives up, default 10
#   PAUSE_S              seconds before a restart, default 5
#   GRACE_S              seconds from SIGTERM to SIGKILL for the others when one has died, default 15
#   STOP_S               seconds to save after a signal, then SIGKILL, default 600
#   PYTHON               interpreter, default .venv/bin/python here
#
# SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C: all save, then it ends with exit code 0, and the same command goes on later. A
# second Ctrl-C ends at once. Exit code 1 of a process is an error of the user: no restart. No process is left behind.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=train_local.sh
. "$root/launch/common.sh"

processes=${PROCESSES:-1}
if [ "${1-}" = -n ]; then
  (($# > 1)) || die "-n needs a number of processes."
  processes=$2
  shift 2
fi
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "$processes is no number of processes: give -n 2."
[ "${1-}" != -- ] || shift
read_training "$@"
use_python
exec "$PYTHON" "$root/launch/supervise.py" local --workdir="$workdir" --processes="$processes" -- "$@"
