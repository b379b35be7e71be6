#!/usr/bin/env bash
# Training on several machines that are reached by ssh, one process on each; when one dies, or a connection is lost, all
# start again from the last checkpoint.
#
#   HOSTS='node1 user@node2' launch/hosts.sh --config=configs/gptoss.py --workdir=runs/gptoss --config.mesh.data=-1
#
# Process I runs on host I, with all arguments. ssh must work without a question, the name of the first host must mean it
# on all, and WORKDIR be on a file system that they share. The output of host 0 comes to the terminal, that of host I to
# WORKDIR/logs/process-I.log here. Variables, beside those of launch/train_local.sh:
#   HOSTS         needed: the hosts, or a file with one on each line and comments after #
#   PORT          port of the first host where the processes find each other, default 12355
#   REPO_DIR      folder of the repository on the hosts, absolute or from the home folder; default: that of this one
#   PYTHON        interpreter on the hosts, absolute or from REPO_DIR, default .venv/bin/python
#   REMOTE_ENV    variables for the processes, such as 'HF_HUB_OFFLINE=1 XLA_FLAGS="--a --b"'; no command line shows them
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/restart.sh"
. "$root/launch/on_host.sh"
needs ssh
port=${PORT:-12355} input=${REMOTE_ENV-} name='[A-Za-z0-9_.][A-Za-z0-9_.-]*' REPO_DIR=${REPO_DIR:-$root} hosts=${HOSTS-}
training=("${PYTHON:-.venv/bin/python}" -m lens.main "$@")
[[ $port =~ ^[0-9]+$ ]] || die "PORT=$port is no port."
if [ -f "$hosts" ]; then hosts=$(sed 's/#.*//' "$hosts"); fi
read -r -d '' -a hosts <<<"$hosts" || true
[[ ${hosts[*]} =~ ^($name@)?$name( ($name@)?$name)*$ && ! $(printf '%s\n' "${hosts[@]}" | sort | uniq -d) ]] ||
  die "HOSTS=${HOSTS-} has to name hosts, each once, or a file of them: see the head of launch/hosts.sh."
to() { command=(ssh "${ssh_options[@]}" -- "${hosts[$1]}" "$(on_host "${@:2}")"); }
command_of() {
  to "$1" "${training[@]}" --coordinator="${hosts[0]#*@}:$port" --num_processes="${#hosts[@]}" --process_id="$1"
}
signal_all() {
  local i ids=()
  for i in "${!hosts[@]}"; do
    to "$i" "-$1"
    "${command[@]}" </dev/null &
    ids+=($!)
  done
  wait "${ids[@]}" || true
}
supervise "${#hosts[@]}"
