#!/usr/bin/env bash
# Check the layers and the purity rule. The import graph knows neither links nor packages without __init__.py,
# so it is built from a copy that has real folders and an __init__.py in proto/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lint=${1:?usage: lint_imports.sh PATH_OF_LINT_IMPORTS}

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -rL src/pdserve "$copy/pdserve"
touch "$copy/pdserve/proto/__init__.py"
PYTHONPATH=$copy "$lint" --config pyproject.toml --no-cache --no-logo
