# Shell functions of the scripts that serve and ask models.
# shellcheck shell=bash disable=SC1091,SC2034,SC2154
. "$root/launch/common.sh"

# Refuses a path that is no model; what could be a Hub id is left to the server.
check_model() {
  [[ $1 != '' && $1 != -* ]] || die "The first argument is the model, a Hub id or a directory: $(basename "$0") MODEL [options]"
  if [ -e "$1/config.json" ]; then return; fi
  if [ -e "$1" ] || [ -d "${1%%/*}" ] || [[ $1 = [/.~]* || $1 = */*/* ]]; then
    die "$1 has no config.json: give a directory in Hugging Face layout or a Hub id."
  fi
}

# In registry $1 the line of owner $2 becomes URL $3, or goes. Readers see the old file or the new one; where the file
# system has no locks, writers do not wait for one another.
register() (
  flock 8 || true
  { grep -v "  # $2\$" "$1" || true; [ -z "${3-}" ] || echo "$3  # $2"; } >"$1.new" 2>/dev/null
  mv "$1.new" "$1"
) 8>"$1.lock"

# Reads the arguments `MODEL [options of data_gen.generate]`; sets $generate, the command that still lacks its servers.
read_generation() {
  model=${1-}
  check_model "$model"
  shift
  needs_options 'input_dataset output_path' "$@"
  out=$(option_value output_path "$@")
  out=${out%/}
  tokenizer=$(option_value tokenizer "$@") python=${LENS_PYTHON:-$root/.venv/bin/python} working=''
  needs "$python"
  generate=("$python" -m lens.data_gen.generate --model="$model" --resume "$@")
  read -r -a vllm_args <<<"${VLLM_ARGS-}"
}

# Runs a command in the group $working, which the script ends where it ends; meanwhile $1, a function, every 0.5 s.
work() {
  local code
  show "${@:2}"
  start_group "${@:2}"
  working=$started
  while alive "$working"; do "$1"; nap 0.5; done
  if wait "$working"; then code=0; else code=$?; fi
  working=''
  return "$code"
}

# From the rows in $out/dataset to $out/tokens, with the options of PRETOKENIZE_ARGS.
pretokenize() {
  read -r -a options <<<"${PRETOKENIZE_ARGS-}"
  # --force: the rows may be more than those of an earlier run
  work : "$python" -m lens.data_gen.pretokenize --input="$out/dataset" --tokenizer="${tokenizer:-$model}" \
    --out="$out/tokens" --force "${options[@]}" ||
    die "The rows are in $out/dataset, but not as tokens: the same command tries again."
}
