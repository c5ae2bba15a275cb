#!/usr/bin/env bash
# Make the virtual environment of the TRL side: `experiments/vs-trl/setup.sh` -> .venv-trl.
# TRL gets its own, so that neither side constrains the other's versions; torch and transformers
# are the same builds in both.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:-$root/.venv-trl}
python=$(command -v python3.11 || command -v python3)
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Python 3.11 or newer is needed; found $("$python" --version)" >&2; exit 1; }

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$root/scripts/torch.sh" "$venv"
"$venv/bin/python" -m pip install --quiet -r "$root/experiments/vs-trl/requirements.txt"
"$venv/bin/python" -c 'import importlib.metadata as m
print(", ".join(f"{name} {m.version(name)}" for name in ("trl", "torch", "transformers", "accelerate", "datasets")))'
