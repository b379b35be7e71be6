#!/usr/bin/env bash
# Training on a TPU pod, one process on each worker, through gcloud; when one dies, all start again from the last
# checkpoint.
#
#   SETUP=1 TPU_NAME=pod ZONE=us-east5-b launch/train_tpu.sh --config=configs/gptoss.py --workdir=/mnt/shared/gptoss \
#       --config.mesh.data=-1
#
# All arguments go to lens.main, in REPO_DIR on every worker. WORKDIR and the data must be on a file system that all
# workers share. gcloud reaches all workers at once only when its ssh key is known to the agent: ssh-add
# ~/.ssh/google_compute_engine. The output of all workers goes to the terminal.
#
# Variables:
#   TPU_NAME, ZONE   needed
#   PROJECT       default: that of gcloud
#   SETUP         1: first copies this repository (what git does not ignore) to REPO_DIR on all workers, and installs
#                 it with jax[tpu] in REPO_DIR/.venv
#   SETUP_PYTHON  interpreter there that makes .venv, 3.11 or later, default python3
#   REPO_DIR      folder of the repository on the workers, absolute or from the home folder, default lens
#   PYTHON        interpreter on the workers, absolute or from REPO_DIR, default .venv/bin/python
#   REMOTE_ENV    variables for the processes, such as 'HF_HUB_OFFLINE=1 XLA_FLAGS="--a --b"'
#   MAX_RESTARTS, PAUSE_S, GRACE_S, STOP_S    as in launch/train_local.sh. When a process has died the connections are
#                 cut after GRACE_S, and what hangs on a worker gets SIGKILL GRACE_S later
#
# SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C: all save, then it ends with exit code 0, and the same command goes on later.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=train_tpu.sh
. "$root/launch/common.sh"

[ "${1-}" != -- ] || shift
read_training "$@"
needs gcloud
for name in TPU_NAME ZONE; do
  [ "${!name-}" ] || die "$name is needed: see the head of launch/$program."
done
export PYTHON=${PYTHON:-.venv/bin/python} REPO_DIR=${REPO_DIR:-lens}
where=("--zone=$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all)

set_up() {
  local folder archive=lens-repository.tar.gz copy command install
  needs git tar
  folder=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$folder'" EXIT
  (cd "$root" && git ls-files -z --cached --others --exclude-standard) |
    tar -C "$root" --null --files-from=- --ignore-failed-read -czf "$folder/$archive"
  copy=(gcloud compute tpus tpu-vm scp "$folder/$archive" "$TPU_NAME:$archive" "${where[@]}")
  show "${copy[@]}"
  "${copy[@]}" || die "The repository could not be copied to $TPU_NAME."
  command=$(printf 'mkdir -p %q && tar -xzf %q -C %q && cd %q && %q -m venv .venv && %s' "$REPO_DIR" "$archive" \
    "$REPO_DIR" "$REPO_DIR" "${SETUP_PYTHON:-python3}" ".venv/bin/pip install --quiet --editable '.[tpu]'")
  install=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --command="$command")
  show "${install[@]}"
  "${install[@]}" </dev/null || die "The repository could not be installed on $TPU_NAME."
  rm -rf "$folder"
}
[ "${SETUP-}" != 1 ] || set_up
supervise_from_here tpu --workdir="$workdir" -- "$@"
