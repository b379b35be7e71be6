# Shell functions of the launch scripts, which source it after `set -euo pipefail` and set `root`.
# shellcheck shell=bash disable=SC2013,SC2034,SC2064,SC2154 # variables that the scripts set or use
die() {
  echo "error: $*" >&2
  exit 1
}

needs() {
  for program in "$@"; do command -v "$program" >/dev/null || die "$program is missing: $(basename "$0") needs it. PYTHON names an interpreter."; done
}
needs setsid setpriv flock
show() { echo "+$(printf ' %q' "$@")"; }
alive() { kill -0 "$1" 2>/dev/null; }

# $1 seconds that a signal may interrupt: bash runs a trap only after a foreground command, but at once in `wait`.
nap() {
  sleep "$1" &
  local id=$! # a trap may start others
  wait "$id" || kill "$id" 2>/dev/null || true
}

# Refuses, with the sentence $2, while another process holds the file $1; where there are no locks it is not known.
only_one() {
  mkdir -p "$(dirname "$1")"
  exec 9>"$1"
  flock -n -E 75 9 || (($? != 75)) || die "$2"
}

# Signals end the script with the usual codes, and the end, however it comes, runs the function $1 undisturbed.
at_exit() {
  trap "trap '' HUP INT TERM; $1" EXIT
  for signal in HUP INT TERM; do trap "exit $((128 + $(kill -l "$signal")))" "$signal"; done
}

# Starts a command as group $started, deaf to Ctrl-C, that reads $input and gets SIGTERM at the end, or kill -9, of this script.
start_group() {
  setsid setpriv --pdeathsig TERM "$@" <<<"${input-}" &
  started=$!
}

signal_group() { kill "-$1" -- "-$2" 2>/dev/null || kill "-$1" "$2" 2>/dev/null || true; } # it may not exist yet, or no more

# True while a process of group $1 runs; processes that have ended and that nobody collects do not count.
group_runs() {
  kill -0 -- "-$1" 2>/dev/null || alive "$1" || return 1
  grep -qsE "^[0-9]+ \(.*\) [^ZX] [0-9]+ $1 " /proc/[0-9]*/stat # id, name, state, parent, group
}

family() { for id in $(cat "/proc/$1/task/"*/children 2>/dev/null); do echo "$id" && family "$id"; done; } # all that descends from $1
# Ends group $1 and what descends from its leader: SIGTERM, and SIGKILL for what still runs after $2 s, or when that has ended.
stop_group() {
  local last=$((SECONDS + $2)) others
  mapfile -t others < <(family "$1")
  signal_group TERM "$1"
  while group_runs "$1"; do
    alive "$1" || sleep 1 # for those that clean up after it
    if ((SECONDS >= last)) || ! alive "$1"; then signal_group KILL "$1"; fi
    sleep 0.1
  done
  kill -KILL "${others[@]}" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}

# The last value of option $1 among the other arguments, which write it --a_b=V, --a-b=V or with a blank.
option_value() {
  local name=--${1//_/[-_]}
  printf '%s\n' "${@:2}" '' | sed -nE "/^$name\$/{n;h}; /^$name=/{s/[^=]*=//;h}; \${x;p}"
}

# Refuses arguments, those after $1, that lack one of the options $1.
needs_options() {
  for option in $1; do [ "$(option_value "$option" "${@:2}")" ] || die "--$option is needed: see the head of $(basename "$0")."; done
}
