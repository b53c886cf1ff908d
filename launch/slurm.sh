#!/usr/bin/env bash
# Submits launch/slurm.sbatch, which trains on GPUs of one or more Slurm nodes.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/slurm.sh --nodes=N --gpus=GPUS_PER_NODE [--per-node] [--array=N] [--name=NAME] [--dry-run] -- main.py arguments

Starts one process per GPU, or with --per-node one per node that drives all its GPUs. Activate the virtual
environment of the job first. Partition, account, time limit, CPUs and memory come from sbatch's own variables:
SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_CPUS_PER_GPU, SBATCH_MEM_PER_GPU. Output goes to
NAME-JOBID.log; NAME is madformer by default.

Two minutes before the time limit the run saves and the job queues again; it continues from its workdir until
main.py is done. --workdir must be on a file system that all nodes share.

--array=N submits N such jobs with the same arguments, for --mode=sweep. The jobs share its runs. Output goes to
NAME-JOBID_INDEX.log.
USAGE
}

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$HERE/common.sh"

NODES='' GPUS='' PER_NODE=0 NAME=madformer ARRAY=''
while (($#)); do
  case $1 in
    --nodes=*) NODES=${1#*=} ;;
    --gpus=*) GPUS=${1#*=} ;;
    --per-node) PER_NODE=1 ;;
    --name=*) NAME=${1#*=} ;;
    --array=*) ARRAY=${1#*=} ;;
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
[[ $NODES =~ ^[1-9][0-9]*$ ]] || die "no --nodes: give --nodes=N, the number of nodes."
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || die "no --gpus: give --gpus=N, the GPUs of each node."
(($#)) || die "no arguments for main.py: give them after --, such as -- --config=configs/imagenet256.py --workdir=..."

export MADFORMER_DEVICES=
TASKS=$GPUS
if ((PER_NODE)); then
  TASKS=1
  # JAX's Slurm support uses one GPU per process unless this variable lists others.
  MADFORMER_DEVICES=$(seq -s, 0 $((GPUS - 1)))
fi
JOBS=(--output=%x-%j.log)
if [[ -n $ARRAY ]]; then
  [[ $ARRAY =~ ^[1-9][0-9]*$ ]] || die "--array=$ARRAY is not a number of jobs: give a whole number above 0."
  check_sweep "$@"
  JOBS=(--array=0-$((ARRAY - 1)) --output=%x-%A_%a.log)
fi
run sbatch --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$TASKS" --gpus-per-node="$GPUS" --chdir="$ROOT" \
  "${JOBS[@]}" "$HERE/slurm.sbatch" "$@"
