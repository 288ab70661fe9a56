#!/usr/bin/env bash
# Installs the system packages that building Fulgur needs, and nothing that is already there.
# With apt-get it installs them itself (through sudo for ordinary users); elsewhere it prints what to install.
# It needs no make, curl or sudo: in a bare container run it as root, then `cargo build --release`.
set -euo pipefail

debian_packages=(
    build-essential pkg-config clang libclang-dev ca-certificates
    libavcodec-dev libavformat-dev libavutil-dev libswscale-dev libswresample-dev
)
# The first versions that have the interface we use: FFmpeg 5.1, in Debian 12, Ubuntu 24.04 and newer.
ffmpeg_libraries=(libavcodec=59.37 libavformat=59.27 libavutil=57.28 libswscale=6.7 libswresample=4.7)
rust_needed=1.88

say() { printf 'setup: %s\n' "$*" >&2; }

# libclang is found the way bindgen finds it: by LIBCLANG_PATH, by llvm's folders, or in those of the linker.
# libclang-cpp, which comes with the compiler, is another library.
have_libclang() {
    [[ -n "${LIBCLANG_PATH:-}" ]] && return 0
    local folder
    for folder in /usr/lib/llvm-*/lib /usr/lib/*-linux-gnu* /usr/lib64 /usr/lib /usr/local/lib; do
        compgen -G "$folder/libclang.so*" >/dev/null && return 0
        compgen -G "$folder/libclang-[0-9]*.so*" >/dev/null && return 0
    done
    return 1
}

# cargo fetches crates over HTTPS and trusts the system's certificates, which bare containers lack.
have_certificates() {
    [[ -n "${SSL_CERT_FILE:-}${CARGO_HTTP_CAINFO:-}" ]] || [[ -s /etc/ssl/certs/ca-certificates.crt ]]
}

missing() {
    command -v cc >/dev/null || echo "a C compiler"
    if command -v apt-get >/dev/null; then
        have_certificates || echo "certificates"
    fi
    command -v clang >/dev/null || echo "clang"
    have_libclang || echo "libclang"
    command -v pkg-config >/dev/null || { echo "pkg-config"; return 0; }
    local library name version
    for library in "${ffmpeg_libraries[@]}"; do
        name="${library%=*}" version="${library#*=}"
        if ! pkg-config --exists "$name"; then
            echo "$name (development files)"
        elif ! pkg-config --atleast-version="$version" "$name"; then
            echo "$name $version (found $(pkg-config --modversion "$name"))"
        fi
    done
}

list() { paste -sd ',' <<<"$1" | sed 's/,/, /g'; }

check_rust() {
    local found advice="install Rust $rust_needed or newer: https://rustup.rs, or apt-get install rustup where there is one"
    if ! command -v "${CARGO:-cargo}" >/dev/null; then
        local home="${CARGO_HOME:-${HOME:-/root}/.cargo}"
        if [[ -x "$home/bin/cargo" ]]; then
            say "cargo is installed, but not on the path of this shell; run: . \"$home/env\""
        else
            say "cargo is missing; $advice; then open a new shell"
        fi
        exit 1
    fi
    found="$("${CARGO:-cargo}" --version | sed -n 's/^cargo \([0-9]*\.[0-9]*\).*/\1/p')"
    if [[ -n "$found" && "$(printf '%s\n' "$rust_needed" "$found" | sort -V | head -n 1)" != "$rust_needed" ]]; then
        say "found Rust $found, expected $rust_needed or newer; $advice"
        exit 1
    fi
}

install_packages() {
    if ! command -v apt-get >/dev/null; then
        say "this is not a Debian or Ubuntu system; install the equivalents of: ${debian_packages[*]}"
        say "(Fedora: gcc pkgconf clang-devel ffmpeg-devel; Arch: base-devel clang ffmpeg; macOS: brew install ffmpeg llvm pkgconf)"
        exit 1
    fi
    local as_root=()
    if [[ "$(id -u)" -ne 0 ]]; then
        if ! command -v sudo >/dev/null; then
            say "neither root nor sudo; as root, run:"
            say "apt-get update && apt-get install -y --no-install-recommends ${debian_packages[*]}"
            exit 1
        fi
        as_root=(sudo)
    fi
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        "${debian_packages[@]}" >&2
}

check_rust
absent="$(missing)"
if [[ -n "$absent" ]]; then
    say "missing: $(list "$absent")"
    install_packages
    absent="$(missing)"
    if [[ -n "$absent" ]]; then
        say "still missing after the installation: $(list "$absent")"
        say "without FFmpeg the program still trains and computes: cargo build --release --no-default-features"
        exit 1
    fi
fi
