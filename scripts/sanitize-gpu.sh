#!/usr/bin/env bash
# Runs small cases of all operators under compute-sanitizer: out-of-bounds accesses, races in shared memory, reads of memory
# that nothing wrote. All at the same time, as most of it is the host's work. Takes a program that was built elsewhere as its
# argument, and tools after it.
set -euo pipefail
cd "$(dirname "$0")/.."
check="${1:-target/release/examples/check_cuda}"
tools=("${@:2}")
((${#tools[@]})) || tools=(memcheck racecheck initcheck)
groups=("decay" "additive" "projected parts split eos" "norm layer attention rotary embedding cross_entropy adamw"
    "rms_norm add_ residual swiglu gated lrpe linear modulated" "ema token_shift stft log-mel inverse")
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
declare -A running
for tool in "${tools[@]}"; do
    for group in "${!groups[@]}"; do
        read -ra names <<<"${groups[group]}"
        # Products of cuBLAS are written by bulk copies on newer GPUs, which initcheck does not see: what composed attention
        # reads of them would count as unwritten.
        if [[ $tool == initcheck ]]; then names=("${names[@]/#attention/attention in tiles}"); fi
        # racecheck loses launches of several threads, and then hangs; the kernels of parts are those of the other groups.
        if [[ $tool == racecheck ]]; then names=("${names[@]/#parts/projected}"); fi
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$check" "${names[@]}" small >"$work/$tool-$group" 2>&1 &
        running["$tool-$group"]=$!
    done
done
failed=0
for job in "${!running[@]}"; do
    code=0
    wait "${running[$job]}" || code=$?
    tool="${job%-*}" group="${job##*-}"
    # What races in a kernel of cuBLAS is not ours.
    if [[ $tool == racecheck && $code == 9 ]] && ! grep 'Race reported' "$work/$job" | grep -qv 'at nvjet_'; then
        echo "sanitize-gpu: racecheck, ${groups[group]}: hazards in kernels of cuBLAS alone" >&2
        code=0
    fi
    echo "sanitize-gpu: $tool, ${groups[group]}: exit code $code; $(grep -E 'SUMMARY|checks passed' "$work/$job" | tr '\n' ' ')" >&2
    if ((code)); then
        failed=1
        cat "$work/$job" >&2
    fi
done
exit "$failed"
