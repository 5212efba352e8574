# shellcheck shell=bash
# Sourced by the scripts beside it: installs Debian packages, but only those that are missing.

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# installed PACKAGE: its version, or nothing.
installed() {
  { dpkg-query -W -f='${db:Status-Status} ${Version}\n' "$1" 2>/dev/null || true; } |
    sed -n 's/^installed //p'
}

# need PACKAGE...: after it, all of them are there.
need() {
  local package missing=()
  for package; do
    [ -n "$(installed "$package")" ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  apt_get_install "${missing[@]}"
}

apt_get_install() {
  local log sudo=() lists=${XDG_CACHE_HOME:-$HOME/.cache}/vmring-ci/package-lists
  command -v apt-get >/dev/null || die "not a Debian: install these first: $*"
  [ "$(id -u)" = 0 ] || sudo=(sudo -n)
  printf 'installing %s\n' "$*"
  log=$(mktemp)
  # The lists are fetched once per run, not once per package.
  if [ -z "$(find "$lists" -mmin -60 2>/dev/null)" ]; then
    "${sudo[@]}" apt-get -q -o DPkg::Lock::Timeout=300 update >"$log" 2>&1 || {
      cat "$log" >&2
      die "apt-get update failed"
    }
    mkdir -p "${lists%/*}"
    touch "$lists"
  fi
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
    --no-install-recommends install "$@" >"$log" 2>&1 || {
    tail -n 30 "$log" >&2
    die "apt-get could not install: $*"
  }
  rm -f "$log"
}

# Debian's own Rust, the only one whose standard library comes with its sources in a package: the
# sources make it possible to build std for macOS, and for Linux with ThreadSanitizer. It lies in
# /usr and does not touch rustup. Its parts must be of one version.
need_debian_rust() {
  local package version
  local packages=(rustc-web cargo-web rust-web-src rust-web-clippy)
  version=$(installed rustc-web)
  for package in "${packages[@]}"; do
    if [ -z "$version" ] || [ "$(installed "$package")" != "$version" ]; then
      apt_get_install "${packages[@]}"
      break
    fi
  done
  debian_rust_version=$(installed rustc-web)
  # The major version of the LLVM it was built with names the packages that fit it.
  debian_rust_llvm=$(/usr/bin/rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
  debian_rust_host=$(/usr/bin/rustc -vV | sed -n 's/^host: //p')
  export debian_rust_version debian_rust_llvm debian_rust_host
}
