#!/usr/bin/env bash
# Chats with thinking on this machine, in one command: serve, generate, stop the server, tokenize.
#
#   VLLM_ARGS='--tensor-parallel-size 8' launch/generate_local.sh openai/gpt-oss-20b \
#       --input_dataset=HuggingFaceH4/ultrachat_200k --input_split=train_sft --output_path=data/rollouts \
#       --max_concurrency=256
#
# MODEL is a Hub id or a directory. All options go to data_gen.generate. Results: OUTPUT_PATH/dataset and /parquet (rows)
# and OUTPUT_PATH/tokens (train and validation arrays). The same command goes on where it was stopped.
#
# Variables:
#   VLLM_ARGS          options of launch/serve_vllm.sh and of vLLM, separated by blanks
#   PRETOKENIZE_ARGS   options of data_gen.pretokenize, such as '--seq_len=2048'
#   LENS_PYTHON        interpreter of data_gen, default .venv/bin/python here
#   and those of launch/serve_vllm.sh
#
# SIGTERM, SIGHUP or Ctrl-C keep what was answered and leave no process behind.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/common.sh"

read_generation "$@"
read -r -a vllm_args <<<"${VLLM_ARGS-}"
folder=$(mktemp -d)
generate+=(--server_registry="$folder/servers.txt")
serve=("$root/launch/serve_vllm.sh" "$model" --registry="$folder/servers.txt" "${vllm_args[@]}")

serving='' generating='' pretokenizing=''
finish() {
  local pid
  for pid in $pretokenizing $generating $serving; do stop_group "$pid" 60; done
  rm -rf "$folder"
}
at_exit finish

show "${serve[@]}"
start_group "${serve[@]}" </dev/null
serving=$started
# it reads the input while the server loads, and waits for it
show "${generate[@]}"
start_group "${generate[@]}" </dev/null
generating=$started
while alive "$generating"; do
  alive "$serving" || die "There is no server: what was answered is kept, and the same command goes on."
  nap 0.5
done
code=0
wait "$generating" || code=$?
generating=''
((code == 0)) || exit "$code"
stop_group "$serving" 60
serving=''
pretokenize
