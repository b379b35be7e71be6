#!/usr/bin/env bash
# Sourced by hosts.sh and train_tpu.sh for `on_host`; on the other machines, which run one training of a WORKDIR at a time:
#
#   launch/on_host.sh WORKDIR COMMAND…    runs COMMAND with the variables of stdin; what a lost connection left is killed
#   launch/on_host.sh WORKDIR -NAME       sends signal NAME to it
# shellcheck disable=SC1091,SC2034,SC2154 # variables that the scripts set or use
set -euo pipefail
ssh_options=(-oBatchMode=yes -oConnectTimeout=15 -oServerAliveInterval=15 -oServerAliveCountMax=4) # no questions; lost in a minute

# What the shell of another machine is given: this script with WORKDIR and the words $@, in REPO_DIR. REMOTE_ENV comes by
# stdin: all users of a machine see its command lines.
on_host() {
  local word
  printf 'cd %q && exec launch/on_host.sh' "$REPO_DIR"
  for word in "$workdir" "$@"; do printf " '%s'" "${word//\'/\'\\\'\'}"; done
}
if [ "$0" != "${BASH_SOURCE[0]}" ]; then return; fi
. "$(dirname "$0")/common.sh"
lock=${TMPDIR:-/tmp}/lens-$UID-$(realpath -m "$1" | cksum | tr -d ' ')
exec 9>>"$lock" # held by COMMAND, whose group is in the file
send() { flock -n 9 || signal_group "$1" "$(<"$lock")"; }
if [[ $2 = -* ]]; then send "${2#-}" && exit; fi
variables="PYTHONUNBUFFERED=1 $(cat)"
eval "export $variables" 2>/dev/null || die 'REMOTE_ENV has to be words NAME=VALUE, quoted as for a shell.'
send KILL
flock -w 60 9 || die "$(uname -n) still runs an earlier start in $1, which SIGKILL does not end."
echo $$ >"$lock"
# ssh says 255 of what a signal ends: this script outlives it, with the code of a shell
trap : HUP INT TERM USR1
"${@:2}"
