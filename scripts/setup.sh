#!/usr/bin/env bash
# Installs the system packages that building Fulgur needs, and nothing that is already there.
# With apt-get it installs them itself (through sudo for ordinary users); elsewhere it prints what to install.
set -euo pipefail

debian_packages=(
    build-essential pkg-config clang libclang-dev
    libavcodec-dev libavformat-dev libavutil-dev libswscale-dev libswresample-dev
)
ffmpeg_libraries=(libavcodec libavformat libavutil libswscale libswresample)

say() { printf 'setup: %s\n' "$*" >&2; }

# libclang is found the way bindgen finds it: by llvm-config's folder, by the linker's cache, or by LIBCLANG_PATH.
have_libclang() {
    [[ -n "${LIBCLANG_PATH:-}" ]] && return 0
    ldconfig -p 2>/dev/null | grep -q 'libclang[-.0-9]*\.so' && return 0
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null
}

missing() {
    command -v cc >/dev/null || echo "a C compiler"
    command -v pkg-config >/dev/null || { echo "pkg-config"; return 0; }
    command -v clang >/dev/null || echo "clang"
    have_libclang || echo "libclang"
    local library
    for library in "${ffmpeg_libraries[@]}"; do
        pkg-config --exists "$library" || echo "$library (development files)"
    done
}

as_root() {
    if [[ "$(id -u)" -eq 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        say "no root and no sudo; as root, run: $*"
        exit 1
    fi
}

absent="$(missing)"
if [[ -n "$absent" ]]; then
    say "missing: $(paste -sd ',' <<<"$absent" | sed 's/,/, /g')"
    if command -v apt-get >/dev/null; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "${debian_packages[@]}"
    else
        say "this is not a Debian or Ubuntu system; install the equivalents of: ${debian_packages[*]}"
        say "(Fedora: gcc pkgconf clang-devel ffmpeg-devel; Arch: base-devel clang ffmpeg; macOS: brew install ffmpeg llvm pkgconf)"
        exit 1
    fi
    absent="$(missing)"
    if [[ -n "$absent" ]]; then
        say "still missing after the installation: $(paste -sd ',' <<<"$absent" | sed 's/,/, /g')"
        exit 1
    fi
fi

if ! command -v "${CARGO:-cargo}" >/dev/null; then
    say "cargo is missing; install Rust 1.88 or newer from https://rustup.rs, then open a new shell"
    exit 1
fi
