#!/usr/bin/env bash
# The unit tests pass in a clone whose folder is called pdserve.
# There, one __init__.py at the root would make pytest import the clone itself as the package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath -s "${1:?usage: clone_named_pdserve.sh PATH_OF_PYTHON}")

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet --no-local . "$folder/pdserve"
cd "$folder/pdserve"
PYTHONPATH=$PWD/src "$python" -m pytest -q -p no:cacheprovider --no-header -n 2 --dist loadfile tests/unit
