#!/usr/bin/env bash
# Installs the system packages that building Fulgur needs, and nothing that is already there.
# On Debian and Ubuntu it installs them with apt-get, through sudo for ordinary users; elsewhere it prints what to
# install. It needs bash and Rust alone: no curl, no git, and as root no sudo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

debian_packages=(
    build-essential pkg-config clang libclang-dev
    libavcodec-dev libavformat-dev libavutil-dev libswscale-dev libswresample-dev
)
ffmpeg_libraries=(libavcodec libavformat libavutil libswscale libswresample)

say() { printf 'setup: %s\n' "$*" >&2; }

# The first two numbers of a version, as one that can be compared: 1.88.0 becomes 1088.
ordinal() {
    local major minor
    IFS=. read -r major minor _ <<<"$1"
    echo $((major * 1000 + minor))
}

# Rust comes first: without it, packages are of no use. An old cargo would complain about the manifest in riddles.
check_rust() {
    local cargo="${CARGO:-cargo}" wanted found
    wanted="$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)"
    if ! command -v "$cargo" >/dev/null; then
        if [[ -x "${CARGO_HOME:-${HOME:-/root}/.cargo}/bin/cargo" ]]; then
            say "cargo is installed, but not on the path of this shell; run: . \"${CARGO_HOME:-${HOME:-/root}/.cargo}/env\""
        else
            say "cargo is missing; install Rust $wanted or newer from https://rustup.rs, then open a new shell"
        fi
        exit 1
    fi
    found="$("$cargo" --version | sed -n 's/^cargo \([0-9]*\.[0-9]*\).*/\1/p')"
    if [[ -n "$found" && "$(ordinal "$found")" -lt "$(ordinal "$wanted")" ]]; then
        say "found Rust $found, expected $wanted or newer; run \`rustup update\`, or install it from https://rustup.rs"
        exit 1
    fi
}

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

missing() {
    command -v cc >/dev/null || echo "a C compiler"
    command -v clang >/dev/null || echo "clang"
    have_libclang || echo "libclang"
    command -v pkg-config >/dev/null || { echo "pkg-config"; return 0; }
    local library
    for library in "${ffmpeg_libraries[@]}"; do
        pkg-config --exists "$library" || echo "$library (development files)"
    done
}

listed() { printf '%s' "$1" | tr '\n' ',' | sed 's/,/, /g'; }

# Words before a command that runs as root; nothing for root itself.
as_root=()
find_root() {
    [[ "$(id -u)" -eq 0 ]] && return 0
    if command -v sudo >/dev/null; then
        as_root=(sudo)
        return 0
    fi
    say "no root and no sudo; as root, run:"
    say "  apt-get update && apt-get install -y --no-install-recommends ${debian_packages[*]}"
    exit 1
}

install_packages() {
    if ! command -v apt-get >/dev/null; then
        say "this is not a Debian or Ubuntu system; install the equivalents of: ${debian_packages[*]}"
        say "(Fedora: gcc pkgconf clang-devel ffmpeg-devel; Arch: base-devel clang ffmpeg; macOS: brew install ffmpeg llvm pkgconf)"
        exit 1
    fi
    find_root
    say "installing them with apt-get"
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq)
    # One broken source must not stop an installation that the others can serve.
    "${apt[@]}" update || say "apt-get update failed; trying with the lists that are here"
    # The progress of dpkg goes to standard error, so that other commands may read standard output.
    if ! "${apt[@]}" install -y --no-install-recommends "${debian_packages[@]}" >&2; then
        say "apt-get could not install them; see its message above"
        exit 1
    fi
}

check_rust
absent="$(missing)"
if [[ -n "$absent" ]]; then
    say "missing: $(listed "$absent")"
    install_packages
    absent="$(missing)"
    if [[ -n "$absent" ]]; then
        say "still missing after the installation: $(listed "$absent")"
        exit 1
    fi
fi
