#!/usr/bin/env bash
# Chats with thinking on this machine, in one command: serve, generate, stop the server, tokenize.
#
#   VLLM_ARGS='--tensor-parallel-size 8' launch/generate_local.sh openai/gpt-oss-20b --max_concurrency=256 \
#       --input_dataset=HuggingFaceH4/ultrachat_200k --input_split=train_sft --output_path=data/rollouts
#
# MODEL is a Hub id or a directory. All options go to data_gen.generate. Results: OUTPUT_PATH/dataset and /parquet (rows)
# and /tokens (train and validation arrays). Signals keep what was answered; the same command goes on. Variables:
#   VLLM_ARGS          options of launch/serve_vllm.sh, whose variables this has too, and of vLLM, separated by blanks
#   PRETOKENIZE_ARGS   options of data_gen.pretokenize, such as '--seq_len=2048'
#   LENS_PYTHON        interpreter of data_gen, default .venv/bin/python here
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/generation.sh"
read_generation "$@"
folder=$(mktemp -d) serving=''
finish() {
  for group in $working $serving; do stop_group "$group" 60; done
  rm -rf "$folder"
}
at_exit finish
serve=("$root/launch/serve_vllm.sh" "$model" --registry="$folder/servers.txt" "${vllm_args[@]}")
show "${serve[@]}"
start_group "${serve[@]}"
serving=$started
check_server() { alive "$serving" || die "There is no server: what was answered is kept, and the same command goes on."; }
work check_server "${generate[@]}" --server_registry="$folder/servers.txt" # reads while the server loads, and waits for it
stop_group "$serving" 60
serving=''
pretokenize
