# shellcheck shell=bash
# Shared by the launch scripts; sourced, never run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=${DRY_RUN:-0}

# One line about a wrong or missing setting, exit status 2.
die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# A line about progress, with the time, for whoever reads the terminal the next morning.
say() {
  printf '%s  %s\n' "$(date '+%F %T')" "$1" >&2
}

# require VALUE FLAG VARIABLE: the setting must have been given.
require() {
  [[ -n $1 ]] || die "no $2: give $2=... or set $3 (--help lists all settings)."
}

# The arguments as one line that a shell reads back as the same arguments.
quote() {
  local word line=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "${line# }"
}

# pause SECONDS: as `sleep`, but traps run at once, and a signal to the sleep itself does not end a script with `set -e`.
PAUSE=
pause() {
  sleep "$1" >/dev/null 2>&1 &
  PAUSE=$!
  if wait "$PAUSE"; then PAUSE=; else end_pause; fi
}

# Ends the `sleep` of a pause that a signal cut short.
end_pause() {
  [[ -z $PAUSE ]] || kill "$PAUSE" 2>/dev/null || true
  PAUSE=
}

# Runs a command; --dry-run prints it instead.
run() {
  if ((DRY_RUN)); then quote "$@"; else "$@"; fi
}

# pack FILE: the committed tree as a tar archive, so that every host runs the same known code.
pack() {
  if [[ -n $(git -C "$ROOT" status --porcelain --untracked-files=no) ]]; then
    say "uncommitted changes in $ROOT are not copied: only what is committed runs."
  fi
  run git -C "$ROOT" archive --format=tar.gz --output="$1" HEAD
}

# Without main.py's arguments, or with a workdir that dies with the machine, there is nothing to start or to resume.
check_main_arguments() {
  local argument workdir=
  (($#)) || die "no arguments for main.py: give them after --, as in -- --config=configs/ffhq1024.py --workdir=gs://..."
  for argument in "$@"; do
    [[ $argument == --workdir=* ]] && workdir=${argument#--workdir=}
  done
  [[ $workdir == gs://* ]] || die "--workdir=$workdir must be on gs://: all hosts write to it, and it outlives them."
}

# Jobs that share a workdir do so in a sweep alone.
check_sweep() {
  local argument
  for argument in "$@"; do
    [[ $argument == --mode=sweep ]] && return
  done
  die "--array needs --mode=sweep among the arguments for main.py: only the runs of a sweep are shared."
}

if ((BASH_VERSINFO[0] < 5)); then die "bash $BASH_VERSION is too old: 5.0 or newer is needed."; fi
