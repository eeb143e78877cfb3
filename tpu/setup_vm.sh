#!/usr/bin/env bash
# Makes this machine ready for runs: Python, the repository's .venv, large memory pages, gcsfuse. A second call does nothing.
#
#   bash tpu/setup_vm.sh              # on a TPU VM (tpu.py setup calls it on every host)
#   bash tpu/setup_vm.sh --dry-run    # print the commands, change nothing
#
# JAXPPO_PYTHON (3.12)      the Python to use: the images have 3.10, which is too old. uv fetches it when it is not there.
# JAXPPO_EXTRAS (tpu,demo)  the extras to install when requirements/tpu.txt, which pins them all, is missing
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${JAXPPO_PYTHON:-3.12}
extras=${JAXPPO_EXTRAS:-tpu,demo}
uv_version=0.13.9 # of the installer, where there is no uv
dry=
case ${1:-} in '') ;; --dry-run) dry=yes ;; *)
  echo "error: setup_vm.sh [--dry-run], but got $1" >&2
  exit 2
  ;;
esac
export PATH="$HOME/.local/bin:$PATH"

run() {
  echo "+ $*"
  [ -n "$dry" ] || "$@"
}

as_root() { # fails where it would ask for a password
  if [ "$(id -u)" = 0 ]; then
    run "$@"
  else
    sudo -n true 2>/dev/null && run sudo -n "$@"
  fi
}

# Large pages: libtpu starts and copies faster with them (v5e and later). They are off again after a reboot, so look each time.
pages=${JAXPPO_PAGES:-/sys/kernel/mm/transparent_hugepage/enabled}
if [ -e "$pages" ] && ! grep -q '\[always\]' "$pages"; then
  if [ -w "$pages" ]; then
    run tee "$pages" <<<always
  elif ! as_root tee "$pages" <<<always; then
    echo "note: $pages cannot be written without sudo; left as it is"
  fi
fi

if [ -n "${JAXPPO_GCSFUSE:-}" ] && ! command -v gcsfuse >/dev/null; then
  # shellcheck source=/dev/null
  release=gcsfuse-$(. /etc/os-release && echo "${VERSION_CODENAME:-jammy}")
  key=/usr/share/keyrings/cloud.google.asc
  if ! { as_root curl -fsSL -o "$key" https://packages.cloud.google.com/apt/doc/apt-key.gpg &&
    as_root tee /etc/apt/sources.list.d/gcsfuse.list <<<"deb [signed-by=$key] https://packages.cloud.google.com/apt $release main" &&
    as_root apt-get -q update && as_root apt-get -qy install gcsfuse; }; then
    echo "note: gcsfuse could not be installed; runs on gs:// need it"
  fi
fi

if [ -f requirements/tpu.txt ]; then
  what="-r requirements/tpu.txt"
else
  what=".[$extras]"
fi
stamp=$(cat pyproject.toml requirements/tpu.txt 2>/dev/null <(echo "$python $what") | sha256sum | cut -d ' ' -f 1) || true
if [ -f .venv/.jaxppo-setup ] && [ "$(cat .venv/.jaxppo-setup)" = "$stamp" ]; then
  echo "set up already: $PWD/.venv"
  exit 0
fi

if ! command -v uv >/dev/null; then
  run python3 -m pip install --quiet --user "uv==$uv_version" ||
    run sh -c "curl -LsSf https://astral.sh/uv/$uv_version/install.sh | env UV_NO_MODIFY_PATH=1 sh"
fi
run uv venv --quiet --clear --python "$python" .venv
if [ -f requirements/tpu.txt ]; then
  run uv pip install --quiet --python .venv/bin/python -r requirements/tpu.txt
  run uv pip install --quiet --python .venv/bin/python --no-deps -e .
else
  run uv pip install --quiet --python .venv/bin/python -e ".[$extras]"
fi
if [ -n "$dry" ]; then
  echo "dry run: nothing was changed"
else
  echo "$stamp" >.venv/.jaxppo-setup
  echo "set up: $PWD/.venv"
fi
