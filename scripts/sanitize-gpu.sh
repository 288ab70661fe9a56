#!/usr/bin/env bash
# Runs small cases of the recurrences under compute-sanitizer: out-of-bounds accesses, races in shared memory, reads of
# memory that nothing wrote. Takes a program that was built elsewhere as its argument.
set -euo pipefail
cd "$(dirname "$0")/.."
check="${1:-target/release/examples/check_cuda}"
for tool in memcheck racecheck initcheck; do
    echo "sanitize-gpu: $tool" >&2
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$check" decay additive projected parts small
done
