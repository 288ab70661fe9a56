#!/usr/bin/env bash
# Puts a CUDA toolkit together from the wheels that NVIDIA publishes on PyPI, for compiling with `--features cuda` on a
# machine that has none. Usage: scripts/cuda-toolkit.sh [FOLDER], then `. FOLDER/env.sh`. The default folder is
# ~/.cache/fulgur/cuda-13.0; it takes 1.5 GB, and appears whole or not at all. Needs python3 with pip, unzip and gcc.
set -euo pipefail

folder="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/fulgur/cuda-13.0}"
wheels=(
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35
)
# Libraries that programs are linked to, with the version in the names of their files.
libraries=(cublas:13 cublasLt:13 curand:10 nvrtc:13)

say() { printf 'cuda-toolkit: %s\n' "$*" >&2; }

if [[ -f "$folder/env.sh" ]]; then
    say "$folder is complete"
    exit 0
fi
for tool in python3 unzip gcc; do
    if ! command -v "$tool" >/dev/null; then
        say "$tool not found; on Debian and Ubuntu: apt-get install python3-pip unzip gcc"
        exit 1
    fi
done

mkdir -p "$(dirname "$folder")"
work="$(mktemp -d "$folder.XXXXXX")"
trap 'rm -rf "$work"' EXIT

say "downloading ${#wheels[@]} wheels"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work/wheels" "${wheels[@]}"
for wheel in "$work"/wheels/*.whl; do
    unzip -q -o "$wheel" -d "$work/files"
done
made="$work/files/nvidia/cu13"
# Wheels do not keep the permission to execute.
find "$made/bin" "$made/nvvm/bin" -type f -exec chmod +x {} +
ln -sfn lib "$made/lib64"
for library in "${libraries[@]}"; do
    ln -sf "lib${library%:*}.so.${library#*:}" "$made/lib/lib${library%:*}.so"
done
# Programs take the runtime along.
ln -sf libcudart_static.a "$made/lib/libcudart.a"

# The driver's library comes with the driver. To link without one, an empty library with the names of its functions
# does; it must never be where programs look for libraries when they run.
mkdir -p "$made/lib/stubs"
grep -hoE '\bcu[A-Z][A-Za-z0-9_]+' "$made/include/cuda.h" | sort -u |
    sed 's/.*/int &(void) { return 34; }/' >"$work/driver.c"
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$made/lib/stubs/libcuda.so" "$work/driver.c"

cat >"$made/env.sh" <<ENV
export CUDA_HOME="$folder" CUDA_PATH="$folder" PATH="$folder/bin:\$PATH"
export LIBRARY_PATH="$folder/lib:$folder/lib/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
# Candle asks a GPU for this where there is one.
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-90}"
ENV
rm -rf "$folder"
mv "$made" "$folder"
say "ready; . $folder/env.sh"
