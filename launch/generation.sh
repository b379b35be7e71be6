# Shell functions of the scripts that serve and ask models, sourced after common.sh.
# shellcheck shell=bash disable=SC2034,SC2154

# Refuses a path that is no model; what could be a Hub id is left to the server.
check_model() {
  case $1 in
    '' | -*) die "The first argument is the model, a Hub id or a directory: $(basename "$0") MODEL [options]" ;;
  esac
  if [ -e "$1/config.json" ]; then return; fi
  if [ -e "$1" ] || [ -d "${1%%/*}" ] || [[ $1 = [/.~]* || $1 = */*/* ]]; then
    die "$1 has no config.json: give a directory in Hugging Face layout or a Hub id."
  fi
}

# In registry $1 the line of owner $2 becomes URL $3, or goes. Readers see the old file or the new one; where the file
# system has no locks, writers do not wait for one another.
register() {
  (
    flock 8 || true
    {
      grep -v "  # $2\$" "$1" || true
      if [ "${3-}" ]; then echo "$3  # $2"; fi
    } >"$1.new" 2>/dev/null
    mv "$1.new" "$1"
  ) 8>"$1.lock"
}

# Reads the arguments of a generation, `MODEL [options of data_gen.generate]`: sets $model, $out and $generate, the
# command that still lacks its servers.
read_generation() {
  model=${1-}
  check_model "$model"
  shift
  needs_options 'input_dataset output_path' "$@"
  out=$(option_value output_path "$@")
  out=${out%/}
  tokenizer=$(option_value tokenizer "$@")
  python=${LENS_PYTHON:-$root/.venv/bin/python}
  needs "$python"
  generate=("$python" -m data_gen.generate --model="$model" --resume "$@")
  read -r -a vllm_args <<<"${VLLM_ARGS-}"
  working=''
}

# Runs a command in the group $working, which the script ends where it ends; meanwhile $1, a function, every 0.5 s.
work() {
  local code=0
  show "${@:2}"
  start_group "${@:2}"
  working=$started
  while alive "$working"; do
    "$1"
    nap 0.5
  done
  wait "$working" || code=$?
  working=''
  return "$code"
}

# From the rows in $out/dataset to $out/tokens, with the options of PRETOKENIZE_ARGS.
pretokenize() {
  local options
  read -r -a options <<<"${PRETOKENIZE_ARGS-}"
  # --force: the rows may be more than those of an earlier run
  work : "$python" -m data_gen.pretokenize --input="$out/dataset" --tokenizer="${tokenizer:-$model}" \
    --out="$out/tokens" --force "${options[@]}" ||
    die "The rows are in $out/dataset, but not as tokens: the same command tries again."
}
