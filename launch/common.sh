# Shell functions of the launch scripts, which source it after `set -euo pipefail` and set `root`.
# shellcheck shell=bash disable=SC2034,SC2154 # variables that the scripts set or use

die() {
  echo "error: $*" >&2
  exit 1
}

needs() {
  local program
  for program in "$@"; do
    command -v "$program" >/dev/null || die "$program is not on the PATH: $(basename "$0") needs it."
  done
}
needs setsid setpriv flock

# Prints a command as it could be typed.
show() {
  printf '+'
  printf ' %q' "$@"
  echo
}

# $1 seconds that a signal may interrupt: bash runs a trap only after a foreground command, but at once in `wait`.
nap() {
  sleep "$1" &
  wait $!
}

alive() { kill -0 "$1" 2>/dev/null; }

# Signals end the script with the usual codes, and the end, however it comes, runs the function $1.
# It cannot be interrupted.
at_exit() {
  # shellcheck disable=SC2064
  trap "trap '' HUP INT TERM; $1" EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

# Starts a command as the leader of a process group of its own, out of reach of the terminal's Ctrl-C; its id is
# $started. The command gets SIGTERM when this script ends by kill -9.
start_group() {
  setsid setpriv --pdeathsig TERM "$@" &
  started=$!
}

# True while a process of group $1 runs; processes that have ended and that nobody collects do not count.
group_runs() {
  kill -0 -- "-$1" 2>/dev/null || alive "$1" || return 1
  grep -qsE "^[0-9]+ \(.*\) [^ZX] [0-9]+ $1 " /proc/[0-9]*/stat # id, name, state, parent, group
}

# Ends the group that start_group made: SIGTERM, and SIGKILL for what still runs after $2 seconds, or 3 seconds after
# its leader has ended.
stop_group() {
  local last=$((SECONDS + $2)) led=1
  # right after its start the group does not exist yet
  kill -TERM -- "-$1" 2>/dev/null || kill -TERM "$1" 2>/dev/null || true
  while group_runs "$1"; do
    if ((led)) && ! alive "$1"; then
      led=0
      last=$((last < SECONDS + 3 ? last : SECONDS + 3))
    fi
    if ((SECONDS >= last)); then
      kill -KILL -- "-$1" 2>/dev/null || true
      last=$((SECONDS + 5))
    fi
    sleep 0.1
  done
  wait "$1" 2>/dev/null || true
}

# The value of option $1 among the other arguments, which write it --a_b=V, --a-b=V or with a blank.
option_value() {
  local name=${1//_/-} value='' given
  shift
  while (($#)); do
    given=${1%%=*}
    given=${given//_/-}
    if [ "$given" = "--$name" ]; then
      if [[ $1 = *=* ]]; then value=${1#*=}; else value=${2-}; fi
    fi
    shift
  done
  echo "$value"
}

# Refuses a path that is no model; what could be a Hub id is left to the server.
check_model() {
  case $1 in
    '' | -*) die "The first argument is the model, a Hub id or a directory: $(basename "$0") MODEL [options]" ;;
  esac
  if [ -d "$1" ]; then
    [ -e "$1/config.json" ] || die "$1 has no config.json: give a directory in Hugging Face layout or a Hub id."
  elif [ -e "$1" ] || [ -d "${1%%/*}" ] || [[ $1 = [/.~]* || $1 = */*/* ]]; then
    die "$1 is no directory: give one in Hugging Face layout or a Hub id."
  fi
}
# Makes the environment of the server unless it is complete, and puts it on the PATH: vLLM calls ninja when it builds
# kernels. Its folder is $venv. Jobs on several nodes wait for one another.
use_vllm_env() {
  venv=$(realpath -m "${VENV:-$root/.venv-vllm}")
  if [ ! -e "$venv/ready" ]; then
    mkdir -p "$venv"
    # flock fails on a file system without locks
    {
      flock 8 || true
      VENV=$venv "$root/launch/vllm_env.sh"
    } 8>"$venv/.lock" ||
      die "$venv could not be made: on a machine of the same kind that has a network, give \`make vllm-env\`."
  fi
  export PATH="$venv/bin:$PATH"
}

# Reads the arguments of a generation, `MODEL [options of data_gen.generate]`: sets $model, $out and $generate, the
# command that still lacks its servers.
read_generation() {
  local name
  model=${1-}
  check_model "$model"
  shift
  for name in input_dataset output_path; do
    [ "$(option_value "$name" "$@")" ] || die "--$name is needed: see the head of $0."
  done
  out=$(option_value output_path "$@")
  out=${out%/}
  tokenizer=$(option_value tokenizer "$@")
  python=${LENS_PYTHON:-$root/.venv/bin/python}
  command -v "$python" >/dev/null || die "$python is missing: give \`make\` first, or set LENS_PYTHON."
  generate=("$python" -m data_gen.generate --model="$model" --resume "$@")
}

# From the rows in $out/dataset to $out/tokens, with the options of PRETOKENIZE_ARGS; sets $pretokenizing.
pretokenize() {
  local options command
  read -r -a options <<<"${PRETOKENIZE_ARGS-}"
  command=("$python" -m data_gen.pretokenize --input="$out/dataset" --tokenizer="${tokenizer:-$model}")
  # the rows may be more than those of an earlier run
  command+=(--out="$out/tokens" --force "${options[@]}")
  show "${command[@]}"
  start_group "${command[@]}"
  pretokenizing=$started
  wait "$pretokenizing" || die "The rows are in $out/dataset, but not as tokens: the same command tries again."
  pretokenizing=''
}

# Checks the arguments of a training, those of lens.main, and sets $workdir.
read_training() {
  local name
  for name in config workdir; do
    [ "$(option_value "$name" "$@")" ] || die "--$name is needed: see the head of launch/$program."
  done
  workdir=$(option_value workdir "$@")
}

# Sets and exports PYTHON, the interpreter of a training on this machine.
use_python() {
  export PYTHON=${PYTHON:-$root/.venv/bin/python}
  command -v "$PYTHON" >/dev/null || die "$PYTHON is missing: give \`make\` first, or set PYTHON."
}

# Becomes launch/supervise.py with the arguments $@, where the training itself runs on other machines.
supervise_from_here() {
  local here=$root/.venv/bin/python
  command -v "$here" >/dev/null || here=python3
  exec "$here" "$root/launch/supervise.py" "$@"
}
