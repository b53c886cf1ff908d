#!/usr/bin/env bash
# Trains on a Cloud TPU pod through queued resources. docs/launch.md describes every step.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/tpu.sh VERB [settings] [-- main.py arguments]

  create    request the TPU and wait until it is ACTIVE
  install   copy the committed tree to all hosts and install the project there
  run       start main.py on all hosts, in the background; refuses while one of them still runs
  status    one line per host: idle, running, done, failed N, interrupted
  logs      follow the log of host 0, or of --worker=N|all
  stop      send SIGTERM on all hosts: the run saves and exits
  resume    create, install and run whatever is missing, then watch until the run is done:
            a preempted TPU is deleted and requested again, and the same command is started;
            the result of another command is ignored
  delete    release the TPU

settings (flag, or environment variable)
  --name=NAME        TPU_NAME      name of the queued resource and of its node
  --project=PROJECT  TPU_PROJECT
  --zone=ZONE        TPU_ZONE      such as us-west4-a
  --type=TYPE        TPU_TYPE      create, resume: accelerator type, such as v5litepod-16, v5p-8, v6e-16
  --runtime=VERSION  TPU_RUNTIME   create, resume: the TPU software; default: the one for the type
  --spot             TPU_SPOT=1    create, resume: cheap and preemptible
  --setup=COMMAND    TPU_SETUP     install, resume: shell command run on all hosts at the end, such as copying data
  --worker=N|all                   logs: which host
  --poll=SECONDS                   create, resume: time between two checks, default 60
  --dry-run                        print the commands instead of running them

main.py also gets --distributed. --workdir must be on gs://.
USAGE
}

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$HERE/common.sh"

NAME=${TPU_NAME:-} PROJECT=${TPU_PROJECT:-} ZONE=${TPU_ZONE:-} TYPE=${TPU_TYPE:-} RUNTIME=${TPU_RUNTIME:-}
SPOT=${TPU_SPOT:-0} SETUP=${TPU_SETUP:-} WORKER=0 POLL=60
ARGUMENTS=()
HOST='bash madformer_jax/launch/host.sh' # path on the hosts, from the home folder
SCRATCH=
# The state that --dry-run assumes, since it asks no host.
REQUESTED=0 STARTED=0

parse() {
  while (($#)); do
    case $1 in
      --name=*) NAME=${1#*=} ;;
      --project=*) PROJECT=${1#*=} ;;
      --zone=*) ZONE=${1#*=} ;;
      --type=*) TYPE=${1#*=} ;;
      --runtime=*) RUNTIME=${1#*=} ;;
      --spot) SPOT=1 ;;
      --setup=*) SETUP=${1#*=} ;;
      --worker=*) WORKER=${1#*=} ;;
      --poll=*) POLL=${1#*=} ;;
      --dry-run) DRY_RUN=1 ;;
      --)
        shift
        ARGUMENTS=("$@")
        return
        ;;
      -h | --help)
        usage
        exit
        ;;
      *) die "unknown setting '$1' (--help lists all; main.py's arguments come after --)." ;;
    esac
    shift
  done
}

check_type() {
  require "$TYPE" --type TPU_TYPE
  [[ -n $RUNTIME ]] && return
  case $TYPE in # https://cloud.google.com/tpu/docs/runtimes
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    *) die "no runtime version known for --type=$TYPE: give --runtime=..." ;;
  esac
}

# tpu GROUP VERB ARGUMENTS: runs gcloud on the project and zone.
tpu() {
  local group=$1 verb=$2
  shift 2
  run gcloud compute tpus "$group" "$verb" "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

# on_all_hosts COMMAND: runs a command on all hosts at once. On a single host it would wait for the others for ever.
on_all_hosts() {
  tpu tpu-vm ssh "$NAME" --worker=all --command="$1"
}

request() {
  local options=(--node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME")
  ((SPOT)) && options+=(--spot)
  say "requesting $TYPE as $NAME in $ZONE"
  tpu queued-resources create "$NAME" "${options[@]}" || return
  REQUESTED=1
}

delete() {
  tpu queued-resources delete "$NAME" --force
}

# Sets STATE to the state of the queued resource, or of its node if the node is not READY. NONE means that no request
# exists; UNKNOWN means that gcloud does not answer.
look() {
  if ((DRY_RUN)); then
    tpu queued-resources describe "$NAME" --format='value(state.state)'
    if ((REQUESTED)); then STATE=ACTIVE; else STATE=NONE; fi
    return
  fi
  if ! STATE=$(tpu queued-resources describe "$NAME" --format='value(state.state)' 2>"$SCRATCH/error"); then
    if grep -q NOT_FOUND "$SCRATCH/error"; then STATE=NONE; else STATE=UNKNOWN; fi
  elif [[ $STATE == ACTIVE ]]; then
    # The node shows a preemption earlier than the queued resource does.
    STATE=$(tpu tpu-vm describe "$NAME" --format='value(state)' 2>"$SCRATCH/error") || STATE=UNKNOWN
    [[ $STATE == READY ]] && STATE=ACTIVE
  fi
  [[ $STATE != UNKNOWN ]] || say "gcloud does not answer: $(tail -n 1 "$SCRATCH/error")"
}

# note MESSAGE: logs a message if it differs from the last one.
LAST=
note() {
  [[ $1 == "$LAST" ]] || say "$1"
  LAST=$1
}

create() {
  request
  while true; do
    look
    note "$NAME is $STATE"
    case $STATE in
      ACTIVE) return ;;
      FAILED | SUSPEND* | PREEMPTED | NONE)
        say "the request came to nothing: see gcloud compute tpus queued-resources describe $NAME; then delete, create."
        exit 1
        ;;
    esac
    pause "$POLL"
  done
}

install() {
  local archive=$SCRATCH/madformer_jax.tar.gz
  # Packed once, so that the run continues with the same code after a preemption.
  [[ -e $archive ]] || pack "$archive" || return
  tpu tpu-vm scp "$archive" "$NAME:madformer_jax.tar.gz" --worker=all || return
  on_all_hosts "mkdir -p madformer_jax && tar -xzf madformer_jax.tar.gz -C madformer_jax && $HOST install" || return
  [[ -z $SETUP ]] || on_all_hosts "$SETUP"
}

start() {
  on_all_hosts "$HOST start -- $(quote "${ARGUMENTS[@]}" --distributed)" || return
  STARTED=1
}

stop() {
  on_all_hosts "! [ -d madformer_jax ] || $HOST stop"
}

# If ARGUMENTS are set, a host with the result of another command counts as idle.
status() {
  local ours=
  ((${#ARGUMENTS[@]} == 0)) || ours=" -- $(quote "${ARGUMENTS[@]}" --distributed)"
  # A fresh machine has no host.sh yet.
  on_all_hosts "if [ -d madformer_jax ]; then $HOST status$ours; else echo madformer \"\$(hostname)\" idle; fi"
}

# Sets HOSTS to the joint state of the hosts: unreachable, failed, interrupted, idle, running or done. An interrupted
# host makes its peers fail, so interrupted wins over failed. A host that maintenance kills lets its peers finish early
# after a save, so idle (a new machine) wins over running and done.
ask_hosts() {
  if ((DRY_RUN)); then
    status
    if ((STARTED)); then HOSTS='done'; else HOSTS=idle; fi
    return
  fi
  local word
  if ! REPORT=$(status 2>"$SCRATCH/error"); then
    HOSTS=unreachable
    return
  fi
  for word in interrupted failed idle running 'done'; do
    HOSTS=$word
    grep -Eq "^madformer [^ ]+ $word" <<<"$REPORT" && return
  done
  HOSTS=unreachable
}

# Starts all hosts unless one still runs: the new processes would wait for ever for the hosts that refuse to start.
run_all() {
  ask_hosts
  if [[ $HOSTS == unreachable ]]; then
    say "hosts cannot be reached: $(tail -n 1 "$SCRATCH/error")"
    exit 1
  fi
  if ((!DRY_RUN)) && grep -Eq '^madformer [^ ]+ running' <<<"$REPORT"; then
    say "$NAME is running already: launch/tpu.sh logs shows what, launch/tpu.sh stop ends it."
    exit 1
  fi
  start
}

resume() {
  while true; do
    look
    if [[ $STATE != ACTIVE ]]; then note "$NAME is $STATE"; fi
    case $STATE in
      NONE) request || say "the request was refused; trying again" ;;
      ACTIVE)
        ask_hosts
        note "$NAME is ACTIVE, its hosts are $HOSTS"
        case $HOSTS in
          done) return ;;
          failed)
            printf '%s\n' "$REPORT" >&2
            say "main.py failed: launch/tpu.sh logs shows why. The TPU is yours, and paid for, until you delete it."
            exit 1
            ;;
          idle | interrupted)
            # The next preemption can interrupt any of these commands. The next check decides.
            if ! { stop && install && start; }; then say "could not start on all hosts; trying again"; fi
            ;;
        esac
        ;;
      PREEMPTED | SUSPENDED | FAILED | TERMINATED) # these states keep their quota until deleted
        delete || say "could not delete $NAME yet; trying again"
        ;;
    esac
    ((DRY_RUN)) || pause "$POLL"
  done
}

logs() {
  tpu tpu-vm ssh "$NAME" --worker="$WORKER" --command='tail -n 100 -F .madformer/log'
}

main() {
  local verb=${1:-}
  (($#)) && shift
  case $verb in
    create | install | run | status | logs | stop | resume | delete) ;;
    -h | --help)
      usage
      return
      ;;
    *) die "unknown verb '$verb': create, install, run, status, logs, stop, resume or delete (--help)." ;;
  esac
  parse "$@"
  require "$NAME" --name TPU_NAME
  require "$PROJECT" --project TPU_PROJECT
  require "$ZONE" --zone TPU_ZONE
  check_seconds "$POLL" --poll
  case $verb in create | resume) check_type ;; esac
  case $verb in run | resume) check_main_arguments ${ARGUMENTS[@]+"${ARGUMENTS[@]}"} ;; esac
  if ((DRY_RUN)); then
    SCRATCH=/nonexistent # appears only in printed commands
  else
    SCRATCH=$(mktemp -d)
    trap 'end_pause; rm -rf "$SCRATCH"' EXIT
  fi
  case $verb in
    create) create ;;
    install) install ;;
    run) run_all ;;
    status) status ;;
    logs) logs ;;
    stop) stop ;;
    resume) resume ;;
    delete) delete ;;
  esac
}

main "$@"
exit
