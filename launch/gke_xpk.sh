#!/usr/bin/env bash
# Trains on TPUs in a GKE cluster through XPK. docs/launch.md describes every step.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/gke_xpk.sh VERB [settings] [-- main.py arguments]

  create    make the cluster with its TPU slices
  run       start main.py as a workload on all hosts of the slices; restarted after preemption or failure
  status    the workloads and their state
  logs      follow the log of the workload's pods
  stop      delete the workload: SIGTERM, so that the run saves; the cluster stays
  delete    delete the cluster

settings (flag, or environment variable)
  --cluster=NAME     XPK_CLUSTER
  --project=PROJECT  XPK_PROJECT
  --zone=ZONE        XPK_ZONE      such as us-west4-a
  --type=TYPE        XPK_TYPE      create, run: TPU type, such as v5litepod-16, v5p-8, v6e-16
  --slices=N                       create, run: number of slices, joined by the data-center network; default 1
  --name=NAME        XPK_WORKLOAD  run, logs, stop: name of the workload
  --spot             XPK_SPOT=1    create: preemptible capacity
  --reservation=NAME XPK_RESERVATION  create: reserved capacity; without --spot and --reservation: on demand
  --array=N                        run: N workloads NAME-0, NAME-1, ..., each on a slice, that share the runs of --mode=sweep
  --image=IMAGE      XPK_IMAGE     run: base image, default python:3.11-slim; an image with the packages starts faster
  --dry-run                        print the commands instead of running them

main.py also gets --distributed. --workdir must be on gs://.
USAGE
}

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$HERE/common.sh"

CLUSTER=${XPK_CLUSTER:-} PROJECT=${XPK_PROJECT:-} ZONE=${XPK_ZONE:-} TYPE=${XPK_TYPE:-} NAME=${XPK_WORKLOAD:-}
SPOT=${XPK_SPOT:-0} RESERVATION=${XPK_RESERVATION:-} IMAGE=${XPK_IMAGE:-python:3.11-slim} ARRAY='' SLICES=1
# More restarts than any run needs for preemptions. A run that fails at once uses them up and then counts as failed.
RESTARTS=50

xpk_on_cluster() {
  run xpk "$@" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
}

create() {
  local capacity=--on-demand
  ((!SPOT)) || capacity=--spot
  [[ -z $RESERVATION ]] || capacity=--reservation=$RESERVATION
  xpk_on_cluster cluster create --tpu-type="$TYPE" --num-slices="$SLICES" "$capacity" --enable-gcsfuse-csi-driver
}

start() {
  TREE=/nonexistent # appears only in the printed commands of --dry-run
  if ((!DRY_RUN)); then
    TREE=$(mktemp -d)
    trap 'rm -rf "$TREE"' EXIT
  fi
  # XPK copies a whole folder into an image, so it gets the committed tree without runs/ and .git.
  pack "$TREE/tree.tar.gz"
  run tar -xzf "$TREE/tree.tar.gz" -C "$TREE"
  run rm "$TREE/tree.tar.gz"
  if [[ -z $ARRAY ]]; then
    workload "$NAME" '' "$@"
    return
  fi
  local i
  for ((i = 0; i < ARRAY; i++)); do workload "$NAME-$i" "MADFORMER_INDEX=$i" "$@"; done
}

# workload NAME VARIABLE=VALUE ARGUMENTS: creates a workload.
workload() {
  local name=$1 variable=$2
  shift 2
  # XPK runs this command in a shell. It ignores the exit status without --restart-on-user-code-failure. With exec,
  # SIGTERM reaches host.sh, which then returns 143, so a saved and stopped run is started again.
  xpk_on_cluster workload create --workload="$name" --tpu-type="$TYPE" --num-slices="$SLICES" \
    --base-docker-image="$IMAGE" --script-dir="$TREE" \
    --max-restarts="$RESTARTS" --restart-on-user-code-failure --termination-grace-period-seconds=120 \
    --command="${variable:+export $variable; }exec bash launch/host.sh container -- $(quote "$@" --distributed)"
}

logs() {
  # XPK makes regional clusters.
  run gcloud container clusters get-credentials "$CLUSTER" --project="$PROJECT" --region="${ZONE%-*}"
  run kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --all-containers --prefix --follow --tail=100 \
    --max-log-requests=128
}

VERB=${1:-}
(($#)) && shift
case $VERB in
  create | run | status | logs | stop | delete) ;;
  -h | --help)
    usage
    exit
    ;;
  *) die "unknown verb '$VERB': create, run, status, logs, stop or delete (--help)." ;;
esac
while (($#)); do
  case $1 in
    --cluster=*) CLUSTER=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --type=*) TYPE=${1#*=} ;;
    --name=*) NAME=${1#*=} ;;
    --spot) SPOT=1 ;;
    --reservation=*) RESERVATION=${1#*=} ;;
    --image=*) IMAGE=${1#*=} ;;
    --array=*) ARRAY=${1#*=} ;;
    --slices=*) SLICES=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --)
      shift
      break
      ;;
    -h | --help)
      usage
      exit
      ;;
    *) die "unknown setting '$1' (--help lists all; main.py's arguments come after --)." ;;
  esac
  shift
done
require "$CLUSTER" --cluster XPK_CLUSTER
require "$PROJECT" --project XPK_PROJECT
require "$ZONE" --zone XPK_ZONE
case $VERB in create | run) require "$TYPE" --type XPK_TYPE ;; esac
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "--slices=$SLICES is not a number of slices: give a whole number above 0."
case $VERB in run | logs | stop) require "$NAME" --name XPK_WORKLOAD ;; esac

case $VERB in
  create) create ;;
  run)
    check_main_arguments "$@"
    if [[ -n $ARRAY ]]; then
      [[ $ARRAY =~ ^[1-9][0-9]*$ ]] || die "--array=$ARRAY is not a number of workloads: give a whole number above 0."
      check_sweep "$@"
    fi
    start "$@"
    ;;
  status) xpk_on_cluster workload list ;;
  logs) logs ;;
  stop) xpk_on_cluster workload delete --workload="$NAME" ;;
  delete) xpk_on_cluster cluster delete ;;
esac
