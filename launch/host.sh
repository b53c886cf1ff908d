#!/usr/bin/env bash
# Installs, starts and stops main.py on one host of a pod. tpu.sh and gke_xpk.sh run it on all hosts.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/host.sh VERB [-- main.py arguments]

  install              virtual environment .venv with the project, JAX for TPU and the hub
  start -- ARGUMENTS   main.py in the background, output to ~/.madformer/log; refuses while one runs
  status               idle | running | done | failed N | interrupted; with -- ARGUMENTS also idle
                       if the last run had other arguments
  stop                 sends SIGTERM, so that the run saves, and SIGKILL after 90 s
  run -- ARGUMENTS     main.py in the foreground
  container -- ARGUMENTS   installs the project with pip, then as run (GKE)

A run that got SIGTERM exits with status 143, whatever main.py returns. A saved but unfinished
training is therefore never reported as done.

environment: MADFORMER_STATE (default ~/.madformer), MADFORMER_COMMAND (default: python -m madformer_jax.main),
  MADFORMER_GRACE (seconds before SIGKILL, default 90)
USAGE
}

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$HERE/common.sh"
cd "$ROOT"
STATE=${MADFORMER_STATE:-$HOME/.madformer}
PROJECT='.[tpu,cloud,hub]' # workdirs in gs://; the paper's configs fetch their VAE from the hub
ASKED= # the quoted arguments whose status is requested; empty means any arguments
GRACE=${MADFORMER_GRACE:-90} # a run saves and exits within 30 s

# Runs a command and passes SIGTERM, SIGINT and SIGHUP on as SIGTERM. Returns its exit status, or 143 after a signal.
supervise() {
  local child='' stopped=0 code=0
  trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' HUP INT TERM
  "$@" &
  child=$!
  ((!stopped)) || kill -TERM "$child"
  while true; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break # wait also returns when a signal arrives
  done
  if ((stopped)); then code=143; fi
  return "$code"
}

# Runs main.py with the arguments given.
main_py() {
  local python=python3 command
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
  # A command of several words, hence the unquoted expansion.
  # shellcheck disable=SC2206
  command=(${MADFORMER_COMMAND:-$python -u -m madformer_jax.main})
  supervise "${command[@]}" "$@"
}

# Runs main.py in the background and writes its last status. It and its children hold the lock, so a leftover process
# that holds the TPU counts as running.
background() {
  local code=0
  main_py "$@" || code=$?
  case $code in
    0) echo 'done' ;;
    130 | 143) echo 'interrupted' ;;
    *) echo "failed $code" ;;
  esac >"$STATE/status.new"
  mv "$STATE/status.new" "$STATE/status"
}

is_running() {
  [[ -e $STATE/lock ]] && ! flock --nonblock "$STATE/lock" true
}

status() {
  local word=idle
  [[ -e $STATE/status ]] && word=$(<"$STATE/status")
  if is_running; then
    word=running
  elif [[ -n $ASKED && $(cat "$STATE/command" 2>/dev/null) != "$ASKED" ]]; then
    word=idle
  elif [[ $word == running ]]; then
    word=interrupted # no process and no last status: the host restarted or the run was killed
  fi
  echo "madformer $(hostname) $word"
}

start() {
  mkdir -p "$STATE"
  exec 9>"$STATE/lock"
  if ! flock --nonblock 9; then
    echo "host.sh: a run is already going on $(hostname); stop it first (launch/tpu.sh stop)." >&2
    exit 1
  fi
  echo running >"$STATE/status" # written first, so that the status of the previous run is never read as this one's
  quote "$@" >"$STATE/command"
  # A session of its own outlives ssh. The run inherits the lock through descriptor 9.
  setsid nohup bash "$HERE/host.sh" background -- "$@" >>"$STATE/log" 2>&1 </dev/null &
  echo "$!" >"$STATE/pid"
  status
}

stop() {
  local pid deadline=$((SECONDS + GRACE))
  is_running || { status; return; }
  pid=$(<"$STATE/pid")
  kill -TERM "$pid" 2>/dev/null || true
  while is_running && ((SECONDS < deadline)); do sleep 0.5; done
  if is_running; then
    kill -KILL -- "-$pid" 2>/dev/null || true # the whole session, data workers included
    sleep 1
  fi
  status
}

install() {
  # TPU images have Python 3.10 and JAX needs 3.11 or newer, so uv fetches one.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --quiet --user 'uv>=0.5,<1'
  uv venv --quiet --allow-existing --python 3.11 .venv
  uv pip install --quiet --python .venv/bin/python --editable "$PROJECT"
  .venv/bin/python -c 'import jax, madformer_jax; print("installed: jax", jax.__version__)'
}

verb=${1:-}
(($#)) && shift
[[ ${1:-} == -- ]] && shift
case $verb in
  install | stop) "$verb" ;;
  start | background) "$verb" "$@" ;;
  status)
    ASKED=$(quote "$@")
    status
    ;;
  run) main_py "$@" ;;
  container)
    # Process 1 of a container receives only the signals that it traps.
    supervise python3 -m pip install --quiet --editable "$PROJECT"
    main_py "$@"
    ;;
  -h | --help) usage ;;
  *) die "unknown verb '$verb': install, start, status, stop, run or container." ;;
esac
