#!/usr/bin/env bash
# Prepare this machine for runs: Python, the repository's .venv, large memory pages, gcsfuse. A second
# call does nothing.
#
#   bash tpu/setup_vm.sh              # on a TPU VM (tpu.py setup calls it on every host)
#   bash tpu/setup_vm.sh --dry-run    # print the commands, change nothing
#
# JAXPPO_PYTHON (3.12)                  the Python version; uv downloads it if it is missing (the images
#                                       have 3.10, which is too old)
# JAXPPO_PINS (tpu/requirements.txt)    file of exact versions; empty: the newest versions that
#                                       pyproject.toml allows
# JAXPPO_EXTRAS (tpu,demo,tasks,track)  the extras to install if JAXPPO_PINS is empty
# JAXPPO_GCSFUSE                        not empty: install gcsfuse, which mounts gs:// as a folder
# JAXPPO_PAGES                          another file in place of the kernel's switch for large pages
#
# To try it without a TPU and without a gigabyte of downloads use --dry-run, or stand-ins for uv, sudo
# and gcsfuse first in PATH and a new HOME, as tests/tpu/test_setup.py does.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${JAXPPO_PYTHON:-3.12}
pins=${JAXPPO_PINS-tpu/requirements.txt}
extras=${JAXPPO_EXTRAS:-tpu,demo,tasks,track}
uv_version=0.13.9 # installed if there is no uv
dry=
case ${1:-} in
  '') ;;
  --dry-run) dry=yes ;;
  *)
    echo "error: setup_vm.sh [--dry-run], but got $1" >&2
    exit 2
    ;;
esac
export PATH="$HOME/.local/bin:$PATH"

lacking= # what could not be installed; the rest is done anyway
finish() { # finish LINE: print the last line and exit
  echo "$1"
  if [ -n "$lacking" ]; then
    echo "error: $lacking could not be installed, and runs on gs:// need it; run this again, or without JAXPPO_GCSFUSE" >&2
    exit 1
  fi
  exit 0
}

run() {
  echo "+ $*"
  [ -n "$dry" ] || "$@"
}

as_root() { # fails if sudo would ask for a password
  if [ "$(id -u)" = 0 ]; then
    run "$@"
  else
    sudo -n true 2>/dev/null && run sudo -n "$@"
  fi
}

# Large pages: libtpu starts and copies faster with them (v5e and later). A reboot turns them off, so
# check each time.
pages=${JAXPPO_PAGES:-/sys/kernel/mm/transparent_hugepage/enabled}
if [ -e "$pages" ] && ! grep -q '\[always\]' "$pages"; then
  { [ -w "$pages" ] && run tee "$pages" <<<always; } || as_root tee "$pages" <<<always ||
    echo "note: $pages cannot be written; left as it is"
fi

if [ -n "${JAXPPO_GCSFUSE:-}" ] && ! command -v gcsfuse >/dev/null; then
  # shellcheck source=/dev/null
  release=gcsfuse-$(. /etc/os-release && echo "${VERSION_CODENAME:-jammy}")
  key=/usr/share/keyrings/cloud.google.asc
  patience="-o=DPkg::Lock::Timeout=600" # a new machine is busy with its own updates
  if ! { as_root curl -fsSL -o "$key" https://packages.cloud.google.com/apt/doc/apt-key.gpg &&
    as_root tee /etc/apt/sources.list.d/gcsfuse.list <<<"deb [signed-by=$key] https://packages.cloud.google.com/apt $release main" &&
    as_root apt-get $patience -q update && as_root apt-get $patience -qy install gcsfuse; }; then
    lacking=gcsfuse
  fi
fi

stamp=$(cat pyproject.toml ${pins:+"$pins"} <(echo "$python $extras") | sha256sum | cut -d ' ' -f 1)
if [ -f .venv/.jaxppo-setup ] && [ "$(cat .venv/.jaxppo-setup)" = "$stamp" ]; then
  finish "set up already: $PWD/.venv"
fi

if ! command -v uv >/dev/null; then # Debian's Python refuses packages: then use an environment
  run mkdir -p "$HOME/.local/bin"
  run python3 -m pip install --quiet --user "uv==$uv_version" || {
    run python3 -m venv "$HOME/.local/uv" && run "$HOME/.local/uv/bin/pip" install --quiet "uv==$uv_version" &&
      run ln -sf "$HOME/.local/uv/bin/uv" "$HOME/.local/bin/uv"
  } || {
    echo "error: uv cannot be installed; see https://docs.astral.sh/uv, and run this again" >&2
    exit 1
  }
fi
run uv venv --quiet --clear --python "$python" .venv
if [ -n "$pins" ]; then
  run uv pip install --quiet --python .venv/bin/python -r "$pins"
  run uv pip install --quiet --python .venv/bin/python --no-deps -e .
else
  run uv pip install --quiet --python .venv/bin/python -e ".[$extras]"
fi
if [ -n "$dry" ]; then
  lacking=
  finish "dry run: nothing was changed"
fi
echo "$stamp" >.venv/.jaxppo-setup
finish "set up: $PWD/.venv"
