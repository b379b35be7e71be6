#!/usr/bin/env bash
# Chats with thinking on a Slurm cluster, in one command: server jobs, generation, tokens, and no job left at the end.
#
#   make vllm-env     # once, on a node with a GPU: srun --gres=gpu:1 make vllm-env
#   SERVERS=4 SBATCH_ARGS='--partition=gpu --time=08:00:00' launch/generate_slurm.sh openai/gpt-oss-20b \
#       --input_dataset=HuggingFaceH4/ultrachat_200k --input_split=train_sft --output_path=data/rollouts
#
# MODEL, options, results and signals are those of launch/generate_local.sh. It needs no GPU and lives as long as the
# generation: run it on a login node, or from here by sbatch --cpus-per-task=16 --wrap='launch/generate_slurm.sh …'.
# Server jobs that end (time limit, lost node, preemption) are submitted again. Repository and OUTPUT_PATH are on a file
# system that all nodes share; OUTPUT_PATH.slurm has the registry and the logs. Variables, beside generate_local.sh's:
#   SERVERS            server jobs, default 1
#   GPUS_PER_SERVER    GPUs of a job on each of its nodes, default 8; 0: CPU servers
#   NODES_PER_SERVER   default 1. More: one server over so many nodes through Ray, for models that one node cannot hold
#   SBATCH_ARGS        options of sbatch, separated by blanks: --partition, --account, --time, …
#   HOST               address that the servers bind, default 0.0.0.0: whoever reaches their ports can send requests
#   MAX_RESUBMITS      default 3 for each server; when they are used up it goes on with the servers that are left
#   POLL_S             seconds between two looks at the queue, default 10
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -e "$root/launch/generation.sh" ] || { echo "error: sbatch runs a copy: submit by --wrap='launch/generate_slurm.sh …'." >&2 && exit 1; }
. "$root/launch/generation.sh"
read_generation "$@"
needs sbatch squeue scancel
servers=${SERVERS:-1} gpus=${GPUS_PER_SERVER:-8} nodes=${NODES_PER_SERVER:-1} poll_s=${POLL_S:-10}
submits=$((servers + ${MAX_RESUBMITS:-3 * servers}))
folder=$(realpath -m "$out.slurm")
registry=$folder/servers.txt name=lens-$(cksum <<<"$folder" | cut -d ' ' -f 1)
only_one "$folder/lock" "Another coordinator is writing $out: wait for it, or choose another --output_path."
serve=("$root/launch/serve_vllm.sh" "$model" --host="${HOST:-0.0.0.0}" --registry="$registry")
read -r -a sbatch <<<"sbatch --parsable --job-name=$name --nodes=$nodes --ntasks-per-node=1"
if ((gpus)); then sbatch+=(--gres="gpu:$gpus") serve+=(--tensor-parallel-size="$((nodes * gpus))"); fi
read -r -a sbatch_args <<<"${SBATCH_ARGS-}"
sbatch+=(--output="$folder/server-%j.log" "${sbatch_args[@]}")
serve+=("${vllm_args[@]}")
job_script="#!/usr/bin/env bash
exec$(printf ' %q' "${serve[@]}") --log=$(printf '%q' "$folder")/vllm-\$SLURM_JOB_ID.log"

# The ids of the server jobs that wait or run; with those of a run that was killed, which have the same name.
queued() { squeue --noheader --user="$(id -un)" --name="$name" --states=PENDING,CONFIGURING,RUNNING --format=%i; }
jobs='' looked=-$poll_s
refill() {
  if ((SECONDS - looked < poll_s)); then return; fi
  looked=$SECONDS
  ids=$(queued) || return 0 # the controller is busy: at the next look
  for id in $jobs; do
    if grep -qx "$id" <<<"$ids"; then continue; fi
    echo "Job $id has ended; the last lines of its log:"
    tail -n 10 "$folder/server-$id.log" || true
    register "$registry" "job $id"
  done
  while (($(wc -w <<<"$ids") < servers && submits > 0)); do
    submits=$((submits - 1))
    id=$("${sbatch[@]}" <<<"$job_script" 9>&-) || break
    ids+=$'\n'${id%%;*}
    echo "Job ${id%%;*} submitted"
  done
  jobs=$ids
  [[ $jobs = *[0-9]* ]] || die "There is no server job (SBATCH_ARGS, MAX_RESUBMITS); logs: $folder."
}

cancel() {
  local last=$((SECONDS + 90))
  scancel --user="$(id -un)" --name="$name" || true
  while [ "$(queued)" ] && ((SECONDS < last)); do sleep 0.5; done
  rm -f "$registry"
}
finish() { [ -z "$working" ] || stop_group "$working" 60 && cancel; }
at_exit finish
cancel # what a run that was killed has left
show "${sbatch[@]}"
echo "$job_script"
work refill "${generate[@]}" --server_registry="$registry" 9>&-
cancel
pretokenize
