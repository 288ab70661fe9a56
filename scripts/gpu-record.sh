#!/usr/bin/env bash
# Says whether the kernels that lie here are those that last passed their tests on a GPU (tests/gpu-record.json, which
# `make bench-gpu` writes). Never fails: most machines have no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
now="$({ find kernels -type f \( -name '*.rs' -o -name '*.cu' -o -name '*.cuh' -o -name '*.toml' \); echo Cargo.lock; } |
    LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d ' ' -f 1)"
if grep -qs "\"sources\": \"$now\"" tests/gpu-record.json; then
    echo "gpu-record: these kernels passed their tests on a GPU"
else
    echo "gpu-record: WARNING: the kernels have changed since their tests last passed on a GPU (make bench-gpu)" >&2
fi
