#!/usr/bin/env bash
# Training on the nodes of a Slurm job, one process on each; saved and queued again when its time ends or it is
# preempted; when a process dies, all start again from the last checkpoint.
#
#   SBATCH_ARGS='--nodes=4 --gres=gpu:8 --time=08:00:00' launch/train_slurm.sh --config=… --workdir=…   # submits itself
#   sbatch --nodes=4 --gres=gpu:8 --time=08:00:00 launch/train_slurm.sh --config=… --workdir=…       # from the repository
#
# Repository and WORKDIR are on a file system that all nodes share. 300 seconds before the time limit, or when it is to be
# preempted, Slurm sends a signal: all processes save and end, and unless the run is finished (WORKDIR/summary.json) the
# job is queued again. A job that scancel ends is not. Variables, beside those of launch/train_local.sh:
#   SBATCH_ARGS   options of sbatch where the script submits itself, separated by blanks
#   REPO_DIR      folder of the repository; default where this script is or, of a copy of sbatch's, where sbatch was called
#
#SBATCH --job-name=lens
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -e "$root/launch/restart.sh" ] || root=${REPO_DIR:-${SLURM_SUBMIT_DIR-}}
[ -e "$root/launch/restart.sh" ] || { echo 'error: sbatch runs a copy of this script: call sbatch from the repository, or set REPO_DIR to it.' >&2 && exit 1; }
. "$root/launch/restart.sh"
python=${PYTHON:-$root/.venv/bin/python}
needs "$python" sbatch srun squeue scontrol
if [ -z "${SLURM_JOB_ID-}" ]; then
  read -r -a sbatch <<<"sbatch ${SBATCH_ARGS-}"
  show "${sbatch[@]}" "$root/launch/train_slurm.sh" "$@"
  REPO_DIR=$root exec "${sbatch[@]}" "$root/launch/train_slurm.sh" "$@"
fi
# srun returns the highest code of all: an error of the user has to be above those that follow from it, or are its own
user_error=255
# shellcheck disable=SC2016
task='trap : TERM USR1; "$@"; code=$?; exit $((code == 1 ? 255 : code))' # a signal goes to all processes of a step
command=(env PYTHONUNBUFFERED=1 SLURM_EXIT_ERROR=71 srun --ntasks-per-node=1 --kill-on-bad-exit=1
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash -c "$task" task "$python" -m lens.main "$@")
command_of() { :; }
supervise 1
if [ -e "$workdir/summary.json" ]; then exit; fi
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
[ "$state" = RUNNING ] || die "Job $SLURM_JOB_ID is being ended (${state:-state unknown}), not queued again: the same command goes on."
show scontrol requeue "$SLURM_JOB_ID"
scontrol requeue "$SLURM_JOB_ID" || die "Slurm does not queue the job again: submit it by the same command."
