#!/usr/bin/env bash
# Training on a TPU pod, one process on each worker, through gcloud; when one dies, JAX ends the others within two
# minutes, and all start again from the last checkpoint.
#
#   TPU_NAME=pod ZONE=us-east5-b launch/train_tpu.sh --config=configs/gptoss.py --workdir=/mnt/shared/gptoss \
#       --config.mesh.data=-1
#
# Before, once: the repository as REPO_DIR on all workers, by `gcloud compute tpus tpu-vm scp --recurse --worker=all`, and
# there, by `… ssh --worker=all --command=…`: python3 -m venv .venv && .venv/bin/pip install --editable '.[tpu]'
# WORKDIR and the data must be on a file system that all share, and the agent know gcloud's key, that it may reach all at
# once: ssh-add ~/.ssh/google_compute_engine. Variables, beside REMOTE_ENV, REPO_DIR (default lens) and PYTHON of
# launch/hosts.sh: TPU_NAME and ZONE, needed; PROJECT, by default that of gcloud.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/restart.sh"
. "$root/launch/on_host.sh"
needs gcloud
[[ ${TPU_NAME-} = [!-]* && ${ZONE-} ]] || die "TPU_NAME and ZONE are needed: see the head of launch/train_tpu.sh."
REPO_DIR=${REPO_DIR:-lens}
where=("--zone=$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all)
training=("${PYTHON:-.venv/bin/python}" -m lens.main "$@" --coordinator=auto)
from=''
if [ "${REMOTE_ENV-}" ]; then # by a file of mode 0600, as gcloud has one stdin for all workers
  from=' <.remote-env' file=$(mktemp) && trap 'rm -f "$file"' EXIT
  printf %s "$REMOTE_ENV" >"$file"
  gcloud compute tpus tpu-vm scp "$file" "$TPU_NAME:$REPO_DIR/.remote-env" "${where[@]}"
fi
to_all() {
  command=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --command="$(on_host "$@")$from" -- "${ssh_options[@]}")
}
command_of() { to_all "${training[@]}"; }
signal_all() {
  to_all "-$1"
  "${command[@]}" </dev/null || true
}
supervise 1
