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

# The ids of the jobs with the name $1.
named() { grep -lx "$1" "$FAKE_SLURM"/job-*/name 2>/dev/null | grep -oE 'job-[0-9]+' | cut -d - -f 2 || true; }

signal_job() { processes "$2" | xargs -r kill "-$1" 2>/dev/null || true; }

# Runs the script of job $1 with its words, in the folder where it was submitted; the job has its own log.
start_job() {
  local folder=$FAKE_SLURM/job-$1 words
  mapfile -d '' words <"$folder/words"
  (
    cd "$(cat "$folder/submit_dir")"
    # a job does not inherit the signals that its submitter ignores
    SLURM_JOB_ID=$1 SLURM_JOB_NODELIST=$(cat "$folder/nodes") SLURM_JOB_NUM_NODES=$(tr , '\n' <"$folder/nodes" | wc -l) SLURM_SUBMIT_DIR=$PWD \
      exec setsid env --default-signal=HUP,INT,TERM bash "$folder/script" "${words[@]}"
  ) >>"$(cat "$folder/output")" 2>&1 </dev/null &
  echo $! >"$folder/pid"
}
