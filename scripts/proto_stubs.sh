#!/usr/bin/env bash
# Generate the stubs of src/pdserve/proto/*.proto:   proto_stubs.sh VENV          in place
#                                                    proto_stubs.sh VENV --check  fail if the committed ones differ
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath "${1:?usage: proto_stubs.sh VENV [--check]}")

generate() {
  PATH="$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I src \
    --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" --mypy_grpc_out=quiet:"$1" src/pdserve/proto/*.proto
}

if [[ "${2:-}" != --check ]]; then
  generate src
  exit
fi
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
generate "$fresh"
# Hand-written modules lie beside the stubs.
mkdir "$fresh/committed"
cp proto/*_pb2*.py* "$fresh/committed"
if ! diff -ru --exclude='*.proto' "$fresh/committed" "$fresh/pdserve/proto"; then
  echo "the committed stubs differ from the protos: run make proto" >&2
  exit 1
fi
