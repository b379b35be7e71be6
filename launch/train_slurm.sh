#!/usr/bin/env bash
# Training on the nodes of a Slurm job, one process on each; saved and queued again when its time ends or it is
# preempted; when a process dies, all start again from the last checkpoint.
#
#   SBATCH_ARGS='--nodes=4 --gres=gpu:8 --time=08:00:00' launch/train_slurm.sh --config=… --workdir=…   # submits itself
#   sbatch --nodes=4 --gres=gpu:8 --time=08:00:00 launch/train_slurm.sh --config=… --workdir=…       # from the repository
#
# All arguments go to lens.main. Repository and WORKDIR are on a file system that all nodes share. 300 seconds before
# the time limit, or when it is to be preempted, Slurm sends a signal: all processes save and end, and unless the run is
# finished (WORKDIR/summary.json) the job is queued again. A job that scancel ends is not.
#
# Variables:
#   SBATCH_ARGS   options of sbatch where the script submits itself, separated by blanks
#   MAX_RESTARTS, PAUSE_S, STOP_S    as in launch/train_local.sh
#   GRACE_S       seconds for Slurm to end the other processes when one has died, default 60 (its KillWait is 30)
#   REPO_DIR      folder of the repository; default where this script is or, of a copy of sbatch's, where sbatch was
#                 called
#   PYTHON        interpreter, default .venv/bin/python there
#
#SBATCH --job-name=lens
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -e "$root/launch/supervise.py" ] || root=${REPO_DIR:-${SLURM_SUBMIT_DIR-}}
if [ ! -e "$root/launch/supervise.py" ]; then
  echo "error: sbatch runs a copy of this script: call sbatch from the repository, or set REPO_DIR to it." >&2
  exit 1
fi
program=train_slurm.sh
. "$root/launch/common.sh"

[ "${1-}" != -- ] || shift
read_training "$@"
use_python
export REPO_DIR=$root
if [ -z "${SLURM_JOB_ID-}" ]; then
  needs sbatch
  read -r -a sbatch_args <<<"${SBATCH_ARGS-}"
  show sbatch "${sbatch_args[@]}" "$root/launch/$program" -- "$@"
  exec sbatch "${sbatch_args[@]}" "$root/launch/$program" -- "$@"
fi

needs srun scontrol squeue
export GRACE_S=${GRACE_S:-60}
supervisor='' received='' trapped=''
pass_on() {
  received+=" $1" trapped=1
  if [ "$supervisor" ]; then kill "-$1" "$supervisor" 2>/dev/null || true; fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
"$PYTHON" "$root/launch/supervise.py" slurm --workdir="$workdir" -- "$@" &
supervisor=$!
# a trap ends `wait` with a code above 128, and the supervisor goes on
while true; do
  trapped='' code=0
  wait "$supervisor" || code=$?
  if [ -z "$trapped" ] || ((code <= 128)); then break; fi
done
((code == 0)) || exit "$code"

if [ -e "$workdir/summary.json" ]; then exit 0; fi
# Preemption may signal the step alone; then it has saved, and nothing was received here.
[ "$received" ] || [ -d "$workdir/checkpoints" ] || die "The training ended without a result in $workdir."
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
if [ "$state" = RUNNING ]; then
  show scontrol requeue "$SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID" || die "Slurm does not queue the job again: submit it by the same command."
else
  echo "Job $SLURM_JOB_ID is being ended (${state:-state unknown}), not queued again: the same command goes on."
fi
