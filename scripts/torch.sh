#!/usr/bin/env bash
# Install torch into a virtual environment: `scripts/torch.sh VENV`.
#
# With an NVIDIA device: the default build, which carries CUDA. Without one: the CPU build
# (`+cpu`), a tenth of the size, where pip's configured indexes and links offer it; otherwise the
# default build, which runs on a CPU as well. RealFlow names no index: configure pip for a mirror.
set -euo pipefail

version=2.13.0
venv=${1:?"usage: scripts/torch.sh VENV"}
pip=("$venv/bin/python" -m pip install --quiet)

# `===` compares the whole text, so that a local build such as +cpu cannot stand in for CUDA's.
default_build=("${pip[@]}" "torch===$version")

if "$venv/bin/python" -c "import sys, importlib.metadata as m
sys.exit(0 if m.version('torch').split('+')[0] == '$version' else 1)" 2>/dev/null; then
    echo "torch $version is already in $venv"
elif [ -e /dev/nvidiactl ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
    echo "NVIDIA device found: installing torch $version with CUDA"
    "${default_build[@]}"
else
    echo "no NVIDIA device: installing torch $version for CPU"
    if ! "${pip[@]}" "torch==$version+cpu"; then
        echo "no CPU build of torch $version in pip's indexes and links:" \
            "installing the default build, which brings CUDA libraries (several GB) and runs on a CPU too"
        "${default_build[@]}"
    fi
fi
