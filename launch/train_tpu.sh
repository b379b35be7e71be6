#!/usr/bin/env bash
# Training on a TPU pod, one process on each worker, through gcloud; when one dies, JAX ends the others within two
# minutes, and all start again from the last checkpoint.
#
#   SETUP=1 TPU_NAME=pod ZONE=us-east5-b launch/train_tpu.sh --config=configs/gptoss.py --workdir=/mnt/shared/gptoss \
#       --config.mesh.data=-1
#
# All arguments go to lens.main, in REPO_DIR on every worker. WORKDIR and the data must be on a file system that all
# workers share. gcloud reaches all workers at once only when its ssh key is known to the agent: ssh-add
# ~/.ssh/google_compute_engine. The output of all goes to the terminal.
#
# Variables, beside REMOTE_ENV, REPO_DIR (default lens) and PYTHON of launch/hosts.sh:
#   TPU_NAME, ZONE   needed; PROJECT by default is that of gcloud
#   SETUP         1: first copies this repository (what git does not ignore) to REPO_DIR on all workers, and installs
#                 it with jax[tpu] in REPO_DIR/.venv, of the interpreter SETUP_PYTHON there, default python3
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/common.sh"
. "$root/launch/restart.sh"
. "$root/launch/on_host.sh"
needs gcloud
[ "${TPU_NAME-}" ] && [ "${ZONE-}" ] || die "TPU_NAME and ZONE are needed: see the head of launch/train_tpu.sh."
REPO_DIR=${REPO_DIR:-lens} archive=lens-repository.tar.gz
where=("--zone=$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all)
training=("${PYTHON:-.venv/bin/python}" -m lens.main "$@" --coordinator=auto)

on_all() { command=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --command="$1" -- "${ssh_options[@]}"); }
command_of() { on_all "$(on_host "${training[@]}")"; }
signal_all() {
  on_all "$(on_host "-$1")"
  "${command[@]}" </dev/null || true
}

if [ "${SETUP-}" = 1 ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  (cd "$root" && git ls-files -z --cached --others --exclude-standard) |
    tar -C "$root" --null --files-from=- --ignore-failed-read -czf "$folder/$archive"
  gcloud compute tpus tpu-vm scp "$folder/$archive" "$TPU_NAME:$archive" "${where[@]}" ||
    die "The repository could not be copied to $TPU_NAME."
  on_all "$(printf 'mkdir -p %q && tar -xzf %q -C %q && cd %q && %q -m venv .venv && %s' "$REPO_DIR" "$archive" \
    "$REPO_DIR" "$REPO_DIR" "${SETUP_PYTHON:-python3}" ".venv/bin/pip install --quiet --editable '.[tpu]'")"
  "${command[@]}" </dev/null || die "The repository could not be installed on $TPU_NAME."
fi
supervise 1
