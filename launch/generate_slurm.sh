#!/usr/bin/env bash
# Chats with thinking on a Slurm cluster, in one command: server jobs, generation, tokens, and no job left at the end.
#
#   make vllm-env     # once, on a node with a GPU: srun --gres=gpu:1 make vllm-env
#   SERVERS=4 SBATCH_ARGS='--partition=gpu --time=08:00:00' launch/generate_slurm.sh openai/gpt-oss-20b \
#       --input_dataset=HuggingFaceH4/ultrachat_200k --input_split=train_sft --output_path=data/rollouts \
#       --max_concurrency=1024
#
# This script is the coordinator. It needs no GPU, has to live as long as the generation and tokenizes at the end: run
# it on a login node, or as a CPU job, from here: sbatch --cpus-per-task=16 --wrap='launch/generate_slurm.sh …'.
# It submits the server jobs, each of which writes its URL to a registry when it is ready; the generation uses those
# that are there. Jobs that end (time limit, lost node, preemption) are submitted again. Repository and OUTPUT_PATH are
# on a file system that all nodes share.
#
# MODEL is a Hub id or a directory. All options go to data_gen.generate. Results: OUTPUT_PATH/dataset and /parquet
# (rows) and OUTPUT_PATH/tokens (arrays); OUTPUT_PATH.slurm has the registry and the logs of the servers. The same
# command goes on where it was stopped; after a kill -9 it first cancels the jobs that were left.
#
# Variables:
#   SERVERS            server jobs, default 1
#   GPUS_PER_SERVER    GPUs of a job and its --tensor-parallel-size, default 8. For many one-GPU servers:
#                      SERVERS=32 GPUS_PER_SERVER=1. 0: CPU servers
#   NODES_PER_SERVER   default 1. More: one server over so many nodes through Ray, with GPUS_PER_SERVER on each
#                      (launch/generate_ray_slurm.sh)
#   SBATCH_ARGS        options of sbatch, separated by blanks: --partition, --account, --time, …
#   VLLM_ARGS          options of launch/serve_vllm.sh and of vLLM, separated by blanks
#   PRETOKENIZE_ARGS   options of data_gen.pretokenize
#   HOST               address that the servers bind, default 0.0.0.0: they must be reached from the coordinator's
#                      node, and whoever reaches their ports can send requests
#   MAX_RESUBMITS      default 3 for each server; when they are used up it goes on with the servers that are left
#   POLL_S             seconds between two looks at the queue, default 10
#   LENS_PYTHON        interpreter of data_gen, default .venv/bin/python here
#   and those of launch/serve_vllm.sh, which the jobs inherit
#
# SIGTERM, SIGHUP or Ctrl-C keep what was answered and cancel all jobs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -e "$root/launch/common.sh" ]; then
  echo "error: sbatch runs a copy of this script: submit it by --wrap='launch/generate_slurm.sh …'." >&2
  exit 1
fi
. "$root/launch/common.sh"

read_generation "$@"
needs sbatch squeue scancel
servers=${SERVERS:-1} gpus=${GPUS_PER_SERVER:-8} nodes=${NODES_PER_SERVER:-1} poll_s=${POLL_S:-10}
resubmits=${MAX_RESUBMITS:-$((3 * servers))}
read -r -a sbatch_args <<<"${SBATCH_ARGS-}"
read -r -a vllm_args <<<"${VLLM_ARGS-}"

mkdir -p "$out.slurm"
folder=$(cd "$out.slurm" && pwd)
registry=$folder/servers.txt
exec 9>"$folder/lock"
held=0
flock -n -E 75 9 || held=$? # another code: a file system without locks
((held != 75)) || die "Another coordinator is writing $out: wait for it, or choose another --output_path."
endpoint=("${PYTHON:-python3}" "$root/launch/endpoint.py")
generate+=(--server_registry="$registry")

script=serve_vllm.sh
if ((nodes > 1)); then script=serve_ray.sh; fi
serve=("$root/launch/$script" "$model" --host="${HOST:-0.0.0.0}" --registry="$registry")
sbatch=(sbatch --parsable --job-name="lens-$(basename "$out")" --nodes="$nodes" --ntasks-per-node=1)
sbatch+=(--output="$folder/server-%j.log")
if ((gpus > 0)); then
  sbatch+=(--gres="gpu:$gpus")
  serve+=(--tensor-parallel-size="$((nodes * gpus))")
fi
sbatch+=("${sbatch_args[@]}")
serve+=("${vllm_args[@]}")
# the name of the job's own log of vLLM is known in the job alone
job_script="#!/usr/bin/env bash
exec$(printf ' %q' "${serve[@]}") --log=$(printf '%q' "$folder")/vllm-\$SLURM_JOB_ID.log"

jobs=() generating='' pretokenizing=''

# Remembers the jobs for a run after a kill -9.
write_jobs() { printf '%s\n' "${jobs[@]}" >"$folder/jobs.txt"; }

submit() {
  # One command, so that a signal comes before or after it: no job is submitted and not known.
  if jobs+=("$(trap '' HUP INT TERM && "${sbatch[@]}" <<<"$job_script" 9>&-)"); then
    jobs[-1]=${jobs[-1]%%;*}
    write_jobs
    echo "Job ${jobs[-1]} submitted"
  else
    unset 'jobs[-1]'
    return 1
  fi
}

# Sets $queued to the ids of all jobs of the user that wait or run, between blanks; fails if the queue cannot be read.
read_queue() {
  local lines id state
  lines=$(squeue --noheader --user="$(id -un)" --format='%i %T') || return 1
  queued=' '
  while read -r id state; do
    if [ "$state" != COMPLETING ]; then queued+="$id "; fi
  done <<<"$lines"
}

# Takes jobs that have ended off the list and the registry, and submits others in their place.
refill() {
  local id kept=()
  read_queue || return 0 # the controller is busy: at the next look
  for id in "${jobs[@]}"; do
    if [[ $queued = *" $id "* ]]; then
      kept+=("$id")
    else
      echo "Job $id has ended; the last lines of its log:"
      tail -n 10 "$folder/server-$id.log" || true
      "${endpoint[@]}" unregister "$registry" "job $id"
    fi
  done
  jobs=("${kept[@]}")
  write_jobs
  while ((${#jobs[@]} < servers && resubmits > 0)); do
    resubmits=$((resubmits - 1))
    submit || break
  done
  ((${#jobs[@]} || resubmits)) || die "No server job is left, and MAX_RESUBMITS is used up; logs: $folder."
}

# Cancels the jobs $@ and waits until they have ended.
cancel() {
  local id left last=$((SECONDS + 90))
  (($#)) || return 0
  show scancel "$@"
  scancel "$@" || true
  while ((SECONDS < last)); do
    if read_queue; then
      left=''
      for id in "$@"; do [[ $queued != *" $id "* ]] || left+=" $id"; done
      [ "$left" ] || return 0
    fi
    sleep 0.5
  done
  echo "warning: not yet out of the queue:$left" >&2
}

finish() {
  local pid
  for pid in $pretokenizing $generating; do stop_group "$pid" 60; done
  cancel "${jobs[@]}"
  rm -f "$registry" "$folder/jobs.txt"
}

if [ -e "$folder/jobs.txt" ]; then
  mapfile -t jobs < <(grep . "$folder/jobs.txt" || true)
  echo 'Cancelling the jobs of a run that was killed'
fi
at_exit finish
cancel "${jobs[@]}"
jobs=()
rm -f "$registry"

show "${sbatch[@]}"
echo "$job_script"
for ((i = 0; i < servers; i++)); do
  submit || die "sbatch refuses the job: its options are in SBATCH_ARGS."
done
show "${generate[@]}"
start_group "${generate[@]}" </dev/null 9>&-
generating=$started
looked=$SECONDS
while alive "$generating"; do
  if ((SECONDS - looked >= poll_s)); then
    refill
    looked=$SECONDS
  fi
  nap 0.5
done
code=0
wait "$generating" || code=$?
generating=''
((code == 0)) || exit "$code"
cancel "${jobs[@]}"
jobs=()
pretokenize
