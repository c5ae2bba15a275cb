#!/usr/bin/env bash
# Make the virtual environment and install RealFlow into it: `scripts/setup.sh VENV`.
set -euo pipefail

venv=${1:?"usage: scripts/setup.sh VENV"}
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}

if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "RealFlow needs Python 3.11 or newer; found: ${python:-none}. Install it, or name it: make PYTHON=/path" >&2
    exit 1
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt)
scripts/torch.sh "$venv"
echo "installing what RealFlow needs (requirements/constraints.txt)"
"${pip[@]}" setuptools wheel
# No isolation: the extension is built against the torch that is installed here.
"${pip[@]}" --no-build-isolation -e '.[dev]'
echo "RealFlow is installed in $venv"
