#!/usr/bin/env bash
# Start, watch and stop a run on this machine. tpu.py calls this on every host of a slice; other
# launchers use exec.
#
#   job.sh start NAME -- COMMAND...    run in the background; output in ~/.jaxppo-jobs/NAME/log,
#                                      exit code in ~/.jaxppo-jobs/NAME/code
#   job.sh status NAME                 print: jaxppo-host HOST running | exit CODE | lost | none
#   job.sh stop NAME                   SIGTERM, so that the run saves and ends with 75; SIGKILL after 90 s
#   job.sh log NAME [LINES [named]]    print the last lines (100); named: with the host's name
#   job.sh exec -- COMMAND...          run in the foreground
#
# COMMAND runs in the repository with its .venv first in PATH and the NAME=VALUE lines of
# ~/.jaxppo.env. Its --runs gs://BUCKET/... is mounted with gcsfuse, so that all hosts share a folder.
# --resume is added if the run has started before. All hosts check this before the run starts: the
# script writes nothing until its processes have joined.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
self=$repository/tpu/job.sh
grace=${JAXPPO_STOP_SECONDS:-90}

fail() {
  echo "error: $*" >&2
  exit 2
}

fail_for_now() { # a transient error: the run is started again
  echo "error: $*" >&2
  exit 1
}

read_environment() {
  local line
  [ -f "$HOME/.jaxppo.env" ] || return 0
  while IFS= read -r line || [ -n "$line" ]; do # never evaluated: a value may contain anything
    line=${line#$'\xef\xbb\xbf'} # a byte order mark
    [[ ${line%%=*} =~ ^[A-Za-z_][A-Za-z0-9_]*$ && $line == *=* ]] && export "${line%%=*}=${line#*=}"
  done < <(tr '\r' '\n' <"$HOME/.jaxppo.env")
  return 0
}

# Mount gs://BUCKET/PATH and print its folder. Metadata are not cached, since other hosts write, too.
# Orbax renames folders, which a bucket without a hierarchical namespace does file by file, up to the
# limit.
mounted() {
  local path=${1#gs://}
  local bucket=${path%%/*}
  local point=$HOME/gs/$bucket
  if ! mountpoint -q "$point"; then
    fusermount -uz "$point" 2>/dev/null || true # a mount whose gcsfuse has died
    command -v gcsfuse >/dev/null || fail "gcsfuse is missing, so $1 cannot be mounted; run tpu/setup_vm.sh with sudo, or install it"
    mkdir -p "$point"
    local attempt
    for attempt in 1 2 3 4 5; do # the first attempts may fail on some of many hosts
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --rename-dir-limit=200000 \
        "$bucket" "$point" >&2 && break
      [ "$attempt" -lt 5 ] ||
        fail_for_now "gs://$bucket cannot be mounted; does it exist, and may this machine's service account use it?"
      sleep "${JAXPPO_MOUNT_SECONDS:-10}"
    done
  fi
  local probe
  probe=$point/.jaxppo-probe-$(hostname)
  # dd with fsync: the object is created when the file is closed, and a shell ignores errors of closing
  { echo probe | dd of="$probe" conv=fsync status=none && rm -f "$probe"; } 2>/dev/null ||
    fail "gs://$bucket cannot be written; give this machine's service account the role roles/storage.objectUser"
  echo "$point${path#"$bucket"}"
}

# Whether a run has started: it writes its settings first, a task the folders of its stages.
has_started() {
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
    words+=(--runs "$runs") # the last --runs counts
  fi
  if [ -z "$resume" ] && [ -n "$name" ] && has_started "$runs/$name"; then
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

# Whether a run's wrapper is alive. Its process id may belong to another process by now.
running() {
  [ -f "$jobs/$1/pid" ] && tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$jobs/$1/pid")/cmdline" | grep -qF -- "wrapper $1 -- "
}

status() {
  if running "$name"; then
    echo running
  elif [ -s "$folder/code" ]; then
    echo "exit $(cat "$folder/code")"
  elif [ -f "$folder/pid" ]; then
    echo lost # killed with its wrapper, or the machine was restarted
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
    for other in "$jobs"/*/; do # only one process can use the chips
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
  wrapper) # survives the signal that ends the job, and stores its exit code
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
