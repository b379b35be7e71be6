# A Slurm of one machine, in the folder $FAKE_SLURM: the processes of job N are those with SLURM_JOB_ID=N in their
# environment, which plays the cgroup.
# shellcheck shell=bash
set -eu
echo "$(basename "$0") $*" >>"$FAKE_SLURM/calls"

# The ids of the processes of job $1.
processes() {
  local file
  for file in $(grep -lsxzF "SLURM_JOB_ID=$1" /proc/[0-9]*/environ); do
    if grep -qsxzF "FAKE_SLURM=$FAKE_SLURM" "$file"; then
      file=${file#/proc/}
      echo "${file%/environ}"
    fi
  done
}

signal_job() { processes "$2" | xargs -r kill "-$1" 2>/dev/null || true; }
