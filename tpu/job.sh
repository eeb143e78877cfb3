#!/usr/bin/env bash
# One run on this machine: started detached, watched, stopped. tpu.py calls it on every host of a slice; other launchers use exec.
#
#   job.sh start NAME -- COMMAND...    in the background; the output goes to ~/.jaxppo-jobs/NAME/log, the exit code to .../code
#   job.sh status NAME                 one line: jaxppo-host HOST running | exit CODE | lost | none
#   job.sh stop NAME                   SIGTERM, so that the run saves and ends with 75; SIGKILL after 90 s
#   job.sh log NAME [LINES [named]]    the last lines (100); named: each begins with the host's name, where many hosts answer
#   job.sh exec -- COMMAND...          in the foreground
#
# COMMAND runs in the repository with its .venv first in PATH and the NAME=VALUE lines of ~/.jaxppo.env. Its --runs gs://BUCKET/...
# is mounted (gcsfuse), since all hosts need to see one folder; --resume is added when the run was begun before. All hosts look
# before any of them begins: the script makes nothing until its processes have joined.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
self=$repository/tpu/job.sh
grace=${JAXPPO_STOP_SECONDS:-90}

fail() {
  echo "error: $*" >&2
  exit 2
}

failed_now() { # what may pass by itself: the run is started again
  echo "error: $*" >&2
  exit 1
}

read_environment() {
  local line
  [ -f "$HOME/.jaxppo.env" ] || return 0
  while IFS= read -r line || [ -n "$line" ]; do # never evaluated: a value may hold anything
    [[ ${line%%=*} =~ ^[A-Za-z_][A-Za-z0-9_]*$ && $line == *=* ]] && export "${line%%=*}=${line#*=}"
  done <"$HOME/.jaxppo.env"
  return 0
}

# The folder where gs://BUCKET/PATH is seen on this machine. Metadata is never cached: another host may have written just now.
# Orbax renames folders, which a bucket without a hierarchical namespace does file by file, up to the limit.
mounted() {
  local path=${1#gs://}
  local bucket=${path%%/*}
  local point=$HOME/gs/$bucket
  if ! mountpoint -q "$point"; then
    fusermount -uz "$point" 2>/dev/null || true # one whose gcsfuse has died
    command -v gcsfuse >/dev/null || fail "gcsfuse is missing, so $1 cannot be mounted; run tpu/setup_vm.sh with sudo, or install it"
    mkdir -p "$point"
    local attempt
    for attempt in 1 2 3 4 5; do # one host of many may have a bad moment
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --rename-dir-limit=200000 \
        "$bucket" "$point" >&2 && break
      [ "$attempt" -lt 5 ] ||
        failed_now "gs://$bucket cannot be mounted; does it exist, and may this machine's service account use it?"
      sleep "${JAXPPO_MOUNT_SECONDS:-10}"
    done
  fi
  local probe
  probe=$point/.jaxppo-probe-$(hostname)
  # dd and fsync: an object is made when its file is closed, and a shell does not hear what closing says
  { echo probe | dd of="$probe" conv=fsync status=none && rm -f "$probe"; } 2>/dev/null || fail "gs://$bucket cannot be written; give this machine's service account the role roles/storage.objectUser"
  echo "$point${path#"$bucket"}"
}

# A run has its settings there from its first moment on (and refuses to begin again), a task's whole way its stages.
begun() {
  [ -e "$1/config.json" ] || [ -d "$1/start" ] || [ -d "$1/supervised" ]
}

run_here() {
  [ $# -gt 0 ] || fail "no command; job.sh exec -- COMMAND..."
  read_environment
  cd "$repository"
  [ -d .venv/bin ] && export PATH="$repository/.venv/bin:$PATH"
  local words=("$@") runs=runs name='' resume='' before='' word
  for word in "$@"; do
    case $before in --runs) runs=$word ;; --name) name=$word ;; esac
    case $word in --runs=*) runs=${word#*=} ;; --name=*) name=${word#*=} ;; --resume) resume=given ;; esac
    before=$word
  done
  if [[ $runs == gs://* ]]; then
    runs=$(mounted "$runs")
    words+=(--runs "$runs") # the last one counts
  fi
  if [ -z "$resume" ] && [ -n "$name" ] && begun "$runs/$name"; then
    words+=(--resume)
  fi
  echo "$(date -u +%FT%TZ) $(hostname): ${words[*]}" >&2
  exec "${words[@]}"
}

verb=${1:-}
shift || true
if [ "$verb" = exec ]; then
  [ "${1:-}" = -- ] && shift
  run_here "$@"
fi
name=${1:-}
[[ $name =~ ^[A-Za-z0-9._-]{1,64}$ && $name =~ [^.] ]] || fail "job.sh ${verb:-VERB} NAME: NAME is 1 to 64 letters, digits, '.', '_' or '-'"
shift
jobs=$HOME/.jaxppo-jobs
folder=$jobs/$name

# Whether a run's wrapper is alive: a process number may have been given to somebody else.
running() {
  [ -f "$jobs/$1/pid" ] && tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$jobs/$1/pid")/cmdline" | grep -qF -- "wrapper $1 -- "
}

status() {
  if running "$name"; then
    echo running
  elif [ -s "$folder/code" ]; then
    echo "exit $(cat "$folder/code")"
  elif [ -f "$folder/pid" ]; then
    echo lost # killed with its wrapper, or the machine was started anew
  else
    echo none
  fi
}

case $verb in
  start)
    [ "${1:-}" = -- ] && shift
    [ $# -gt 0 ] || fail "no command; job.sh start NAME -- COMMAND..."
    if running "$name"; then
      echo "$(hostname): $name is running already"
      exit 0
    fi
    for other in "$jobs"/*/; do # chips belong to one process
      other=$(basename "$other")
      running "$other" && fail "$(hostname): $other is running here; stop it first"
    done
    [ -d "$repository/.venv/bin" ] || fail "$repository is not set up; run tpu/setup_vm.sh"
    mkdir -p "$folder"
    chmod 700 "$folder"
    rm -f "$folder/code"
    nohup setsid bash "$self" wrapper "$name" -- "$@" >>"$folder/log" 2>&1 </dev/null &
    echo $! >"$folder/pid"
    echo "$(hostname): $name started"
    ;;
  wrapper) # outlives the signal that ends the job, and writes down the code
    shift
    trap : TERM INT
    code=0
    bash "$self" exec -- "$@" || code=$?
    echo "$code" >"$folder/code.new"
    mv "$folder/code.new" "$folder/code"
    ;;
  status)
    echo "jaxppo-host $(hostname) $(status)"
    ;;
  stop)
    if running "$name"; then
      pid=$(cat "$folder/pid")
      kill -TERM -- "-$pid" 2>/dev/null || true
      for ((i = 0; i < grace * 5; i++)); do
        running "$name" || break
        sleep 0.2
      done
      if running "$name"; then
        kill -KILL -- "-$pid" 2>/dev/null || true
        echo 137 >"$folder/code"
        sleep 0.2
      fi
    fi
    echo "jaxppo-host $(hostname) $(status)"
    ;;
  log)
    if [ "${2:-}" = named ]; then
      tail -n "${1:-100}" "$folder/log" | sed "s/^/$(hostname): /"
    else
      tail -n "${1:-100}" "$folder/log"
    fi
    ;;
  *)
    fail "job.sh VERB: one of start, status, stop, log, exec"
    ;;
esac
