# shellcheck shell=bash
# Functions that the launch scripts share. Source this file; do not run it.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=${DRY_RUN:-0}

# die MESSAGE: prints one line about a wrong or missing setting and exits with status 2.
die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# say MESSAGE: prints a line about progress with the time.
say() {
  printf '%s  %s\n' "$(date '+%F %T')" "$1" >&2
}

# require VALUE FLAG VARIABLE: exits unless VALUE is set.
require() {
  [[ -n $1 ]] || die "no $2: give $2=... or set $3 (--help lists all settings)."
}

# check_seconds VALUE FLAG: exits unless VALUE is a whole number of seconds.
check_seconds() {
  [[ $1 =~ ^(0|[1-9][0-9]*)$ ]] || die "$2=$1 is not a number of seconds: give a whole number."
}

# quote ARGUMENTS: prints one line that a shell reads back as the same arguments.
quote() {
  local word line=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "${line# }"
}

# pause SECONDS: sleeps, but runs traps at once. A signal to the sleep does not end a script with `set -e`.
PAUSE=
pause() {
  sleep "$1" >/dev/null 2>&1 &
  PAUSE=$!
  if wait "$PAUSE"; then PAUSE=; else end_pause; fi
}

# Ends the `sleep` of a pause that a signal interrupted.
end_pause() {
  [[ -z $PAUSE ]] || kill "$PAUSE" 2>/dev/null || true
  PAUSE=
}

# run COMMAND: runs a command, or prints it with --dry-run.
run() {
  if ((DRY_RUN)); then quote "$@"; else "$@"; fi
}

# pack FILE: writes the committed tree as a tar archive, so that every host runs the same code.
pack() {
  if [[ -n $(git -C "$ROOT" status --porcelain --untracked-files=no) ]]; then
    say "uncommitted changes in $ROOT are not copied: only what is committed runs."
  fi
  run git -C "$ROOT" archive --format=tar.gz --output="$1" HEAD
}

# check_main_arguments ARGUMENTS: requires arguments for main.py with a workdir that outlives the hosts.
check_main_arguments() {
  local argument workdir=
  (($#)) || die "no arguments for main.py: give them after --, as in -- --config=configs/ffhq1024.py --workdir=gs://..."
  for argument in "$@"; do
    [[ $argument == --workdir=* ]] && workdir=${argument#--workdir=}
  done
  [[ $workdir == gs://* ]] || die "--workdir=$workdir must be on gs://: all hosts write to it, and it outlives them."
}

# check_sweep ARGUMENTS: requires --mode=sweep, because only the jobs of a sweep share a workdir.
check_sweep() {
  local argument
  for argument in "$@"; do
    [[ $argument == --mode=sweep ]] && return
  done
  die "--array needs --mode=sweep among the arguments for main.py: only the runs of a sweep are shared."
}

if ((BASH_VERSINFO[0] < 5)); then die "bash $BASH_VERSION is too old: 5.0 or newer is needed."; fi
