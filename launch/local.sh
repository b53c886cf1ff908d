#!/usr/bin/env bash
# Starts several processes on this machine that train together over loopback, to try the multi-host code.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/local.sh N [--port=PORT] [--grace=SECONDS] [--dry-run] -- main.py arguments

Starts N processes of main.py, joined through --coordinator, --num_processes and --process_id.
Every line of output carries the number of its process. Ctrl-C, SIGTERM and SIGHUP go to all processes as SIGTERM; the
script waits for them and exits with status 130, 143 or 129. When a process fails, the others get SIGTERM, and the script
exits with the status of the failed one. Processes that still run after --grace (default 60) seconds get SIGKILL.

They run on the CPU unless JAX_PLATFORMS says otherwise. XLA_FLAGS=--xla_force_host_platform_device_count=4 gives
each process four devices. MADFORMER_COMMAND replaces "python -m madformer_jax.main".
USAGE
}

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$HERE/common.sh"

N='' PORT=$((20000 + $$ % 20000)) GRACE=60
while (($#)); do
  case $1 in
    --port=*) PORT=${1#*=} ;;
    --grace=*) GRACE=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --)
      shift
      break
      ;;
    -h | --help)
      usage
      exit
      ;;
    [1-9]*) N=$1 ;;
    *) die "unknown setting '$1' (--help lists all; main.py's arguments come after --)." ;;
  esac
  shift
done
[[ $N =~ ^[1-9][0-9]*$ ]] || die "no number of processes: launch/local.sh 2 -- --config=..."
[[ $PORT =~ ^[1-9][0-9]*$ ]] || die "--port=$PORT is not a port: give a number."
check_seconds "$GRACE" --grace
(($#)) || die "no arguments for main.py: give them after --, as in -- --config=configs/digits.py --workdir=runs/a"

# A command of several words, hence the unquoted expansion.
# shellcheck disable=SC2206
COMMAND=(${MADFORMER_COMMAND:-python -u -m madformer_jax.main})
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

PIDS=() RESULT=0 DEADLINE=
# stop STATUS: sends SIGTERM to all processes. The first status is the exit status of the script.
stop() {
  ((RESULT)) || RESULT=$1
  [[ -n $DEADLINE ]] || DEADLINE=$((SECONDS + GRACE))
  ((${#PIDS[@]} == 0)) || kill -TERM "${PIDS[@]}" 2>/dev/null || true
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

for ((i = 0; i < N; i++)); do
  process=("${COMMAND[@]}" "$@" "--coordinator=127.0.0.1:$PORT" "--num_processes=$N" "--process_id=$i")
  if ((DRY_RUN)); then
    quote "${process[@]}"
  else
    "${process[@]}" > >(trap '' HUP INT TERM; exec sed -u "s/^/[$i] /") 2>&1 &
    PIDS[i]=$!
  fi
done
((!RESULT)) || stop "$RESULT" # a signal that arrived during the start

while ((${#PIDS[@]})); do
  for i in "${!PIDS[@]}"; do
    kill -0 "${PIDS[i]}" 2>/dev/null && continue
    code=0
    wait "${PIDS[i]}" || code=$?
    unset 'PIDS[i]'
    if ((code && !RESULT)); then
      say "process $i failed with exit status $code: stopping the others"
      stop "$code"
    fi
  done
  if [[ -n $DEADLINE ]] && ((SECONDS >= DEADLINE && ${#PIDS[@]})); then
    kill -KILL "${PIDS[@]}" 2>/dev/null || true # a process that waits for a dead peer ignores SIGTERM
  fi
  pause 0.1
done
exit "$RESULT"
