# The restart loop of the training launchers, sourced after common.sh with the arguments of lens.main: `supervise N` runs
# N processes until all end with 0, and starts all again, from the last checkpoint, when one dies. Exit code 1 is an error
# of the user and not tried again. A signal is passed on, and after it nothing is started. The script has a function
# command_of, which sets the array `command` for process $1. Variables of the user: see launch/train_local.sh.
# shellcheck shell=bash disable=SC2154
user_error=1 groups=() asked='' restarts=0 newest=''
needs_options 'config workdir' "$@"
workdir=$(option_value workdir "$@")

# A script whose processes are on other machines has its own.
signal_all() { for group in "${groups[@]}"; do signal_group "$1" "$group"; done; }

pass_on() { # $1: the signal that came, $2: what the processes get
  if [ "$asked$1" = INTINT ]; then set -- INT KILL; fi # a second Ctrl-C
  asked=$1
  echo "SIG$1: SIG$2 to all processes, until they end"
  signal_all "$2"
}

all_codes() { [[ $codes =~ ^(' '($1))*$ ]]; }

attempt() { # one start of $1 processes, up to the end of all; sets codes
  local i code running rounds=0
  groups=() codes=''
  for ((i = 0; i < $1 && ${#asked} == 0; i++)); do
    command_of "$i"
    ((restarts)) || show "${command[@]}"
    if ((i)); then start_group "${command[@]}" >>"$workdir/logs/process-$i.log" 2>&1; else start_group "${command[@]}"; fi
    groups[i]=$started
  done
  running=("${groups[@]}")
  # The others wait for ever for one that died, whose cause may be among those that end at the same time; after a signal
  # they may be saving.
  while ((${#running[@]} && rounds < (${#asked} ? 50 : 4))); do
    nap 0.2
    for i in "${!running[@]}"; do
      if alive "${running[i]}"; then continue; fi
      code=0
      wait "${running[i]}" || code=$?
      unset 'running[i]'
      codes+=" $code"
      ((code)) || continue
      echo "process $i ended with code $code"
      ((i == 0)) || tail -n 20 "$workdir/logs/process-$i.log"
    done
    all_codes 0 || rounds=$((rounds + 1))
  done
  if ((${#running[@]})); then signal_all KILL; fi
  for i in "${groups[@]}"; do stop_group "$i" 0; done
}

supervise() {
  local most=${MAX_RESTARTS:-10} found began name
  mkdir -p "$workdir/logs"
  only_one "$workdir/logs/launcher.lock" "Another launcher is training in $workdir: wait for it, or choose another --workdir."
  for name in INT HUP TERM; do trap "pass_on $name TERM" "$name"; done
  trap 'pass_on USR1 USR1' USR1
  while true; do
    began=$SECONDS
    attempt "$1"
    if all_codes "0${asked:+|138|143}"; then return; fi # 138, 143: asked to stop before or after lens.main handles signals
    [ -z "$asked" ] || die 'Ended without saving; the same command goes on from the last checkpoint.'
    # 70, 134: what the end of a process does to its peers
    if all_codes "0|70|134|$user_error" && [[ "$codes " = *" $user_error "* ]]; then
      die 'The training ended with an error that no restart mends, see above.'
    fi
    found=$(find "$workdir/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' -printf '%f\n' 2>/dev/null | sort -n | tail -n 1)
    # checkpoints on other machines may not be seen from here
    if [ "$found" != "$newest" ] || ((SECONDS - began > 3600)); then restarts=0 newest=$found; fi
    ((restarts++ < most)) || die "No new checkpoint in $workdir after $most restarts: given up."
    echo "Restart $restarts of $most, from checkpoint ${newest:-0}, in ${PAUSE_S:=5} s"
    nap "$PAUSE_S"
  done
}
