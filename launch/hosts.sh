#!/usr/bin/env bash
# Training on several machines that are reached by ssh, one process on each; when one dies, or a connection is lost, all
# start again from the last checkpoint.
#
#   HOSTS='node1 user@node2' launch/hosts.sh --config=configs/gptoss.py --workdir=runs/gptoss --config.mesh.data=-1
#   HOSTS=hosts.txt launch/hosts.sh …                  # one host per line, comments after #
#
# All arguments go to lens.main; process I runs on host I. ssh must work without a question (keys, known hosts), the
# name of the first host must mean that host on all of them, and WORKDIR must be on a file system that they share. The
# output of the first host goes to the terminal, that of host I to WORKDIR/logs/process-I.log here.
#
# Variables:
#   HOSTS         needed: the hosts, or a file
#   PORT          port of the first host where the processes find each other, default 12355
#   REPO_DIR      folder of the repository on the hosts, absolute or from the home folder; default: that of this one
#   PYTHON        interpreter on the hosts, absolute or from REPO_DIR, default .venv/bin/python
#   REMOTE_ENV    variables for the processes, such as 'HF_HUB_OFFLINE=1 XLA_FLAGS="--a --b"'
#   MAX_RESTARTS, PAUSE_S, GRACE_S, STOP_S    as in launch/train_local.sh. When a process has died the connections are
#                 cut after GRACE_S, and what hangs on a host gets SIGKILL GRACE_S later
#
# SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C: all save, then it ends with exit code 0, and the same command goes on later.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=hosts.sh
. "$root/launch/common.sh"

[ "${1-}" != -- ] || shift
read_training "$@"
needs ssh
[ "${HOSTS-}" ] || die "HOSTS is needed, the hosts or a file of them: see the head of launch/$program."
[[ ${PORT:=12355} =~ ^[0-9]+$ ]] || die "PORT=$PORT is no port."
export PORT PYTHON=${PYTHON:-.venv/bin/python} REPO_DIR=${REPO_DIR:-$root}
supervise_from_here hosts --workdir="$workdir" -- "$@"
