#!/usr/bin/env bash
# Compiles everything with `--features cuda`, without a GPU, so that GPU code does not rot unseen: lints of the Rust code,
# nvcc on our kernels, and a report of registers that spill. What was compiled once is remembered by its hash in
# ~/.cache/fulgur and not compiled again. Takes about 12 minutes on two cores the first time.
set -euo pipefail
cd "$(dirname "$0")/.."

cache="${XDG_CACHE_HOME:-$HOME/.cache}/fulgur"
features=(--workspace --all-targets --no-default-features --features cuda)
# Oldest architecture that the kernels run on; the driver compiles for newer ones.
architecture=sm_80

say() { printf 'check-cuda: %s\n' "$*" >&2; }

hash="$({
    git ls-files -z -- kernels Cargo.toml Cargo.lock '*/Cargo.toml' scripts/check-cuda.sh | xargs -0 sha256sum
    # GPU code outside of kernels: whatever asks for the feature.
    git grep -lz 'feature = "cuda"' -- '*.rs' | xargs -0 sha256sum
    echo "${features[*]}"
    "${CARGO:-cargo}" --version
} | sha256sum | cut -d ' ' -f 1)"
if [[ -f "$cache/compiled/$hash" ]]; then
    say "compiled before, as $hash"
    cat "$cache/compiled/$hash"
    exit 0
fi

if ! command -v nvcc >/dev/null && [[ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]]; then
    if ! scripts/cuda-toolkit.sh; then
        say "SKIPPED: there is no CUDA toolkit here, and none could be fetched"
        exit 0
    fi
    # shellcheck source=/dev/null
    . "$cache/cuda-13.0/env.sh"
fi
export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-90}"

# A target folder of its own: candle's kernels are compiled once for all checkouts.
CARGO_TARGET_DIR="$cache/target" "${CARGO:-cargo}" clippy --locked --keep-going "${features[@]}" -- -D warnings

nvcc="$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for source in kernels/cuda/*.cu; do
    "$nvcc" -cubin -arch="$architecture" -std=c++17 -O3 -Xptxas -v -o "$work/cubin" "$source" 2>&1 |
        awk -v file="$(basename "$source")" '
            /Compiling entry function/ { split($0, part, "\x27"); name = part[2] }
            /bytes stack frame/ { if ($1 > 0 || $5 > 0 || $9 > 0) print file, name ":", $0; kernels++ }
            END { printf "%s: %d kernels\n", file, kernels > "/dev/stderr" }'
done | c++filt >"$work/spills"
{
    echo "kernels with a stack frame or spilled registers ($architecture): $(wc -l <"$work/spills")"
    cat "$work/spills"
} | tee "$work/report"

mkdir -p "$cache/compiled"
mv "$work/report" "$cache/compiled/$hash"
