# The restart loop of the training launchers, sourced with the arguments of lens.main: `supervise N` runs N
# processes, the array `command` that the script's command_of sets for process $1, until all end with 0. When one dies, all
# start again from the last checkpoint, but not after an error of the user (exit code 1) or a signal, which is passed on.
# shellcheck shell=bash disable=SC1091,SC2064,SC2154
. "$root/launch/common.sh"
user_error=1 groups=() asked='' restarts=0 newest='' most=${MAX_RESTARTS:-10} pause_s=${PAUSE_S:-5}
needs_options 'config workdir' "$@"
workdir=$(option_value workdir "$@")

all_codes() { [[ $codes =~ ^(' '($1))*$ ]]; }
# A script whose processes are on other machines has its own.
signal_all() { for leader in "${groups[@]}"; do signal_group "$1" "$leader"; done; }

pass_on() { # $1: the signal that came, $2: what the processes get
  if [ "$asked$1" = INTINT ]; then set -- INT KILL; fi # a second Ctrl-C
  asked=$1
  echo "SIG$1: SIG$2 to all processes, until they end"
  signal_all "$2"
}

supervise() {
  only_one "$workdir/logs/launcher.lock" "Another launcher is training in $workdir: wait for it, or choose another --workdir."
  for name in INT HUP TERM; do trap "pass_on $name TERM" "$name"; done
  trap 'pass_on USR1 USR1' USR1
  while true; do
    groups=() running=() codes='' rounds=0 began=$SECONDS
    for ((i = 0; i < $1 && ${#asked} == 0; i++)); do
      command_of "$i"
      ((restarts)) || show "${command[@]}"
      if ((i)); then start_group "${command[@]}" >>"$workdir/logs/process-$i.log" 2>&1; else start_group "${command[@]}"; fi
      groups[i]=$started running[i]=$started
    done
    # others wait for ever for one that died, whose cause may end within 0.8 s too; after a signal they may be saving
    while ((${#running[@]} && rounds < (${#asked} ? 50 : 4))); do
      nap 0.2
      for i in "${!running[@]}"; do
        if alive "${running[i]}"; then continue; fi
        if wait "${running[i]}"; then code=0; else code=$?; fi
        unset 'running[i]'
        codes+=" $code"
        if ((code)); then echo "process $i ended with code $code"; fi
        if ((code && i)); then tail -n 20 "$workdir/logs/process-$i.log"; fi
      done
      all_codes 0 || rounds=$((rounds + 1))
    done
    if ((${#running[@]})); then signal_all KILL; fi
    for group in "${groups[@]}"; do stop_group "$group" 0; done
    if all_codes "0${asked:+|138|143}"; then return; fi # 138, 143: it came before the first step or after the last
    [ -z "$asked" ] || die 'Ended without saving; the same command goes on from the last checkpoint.'
    # 70, 134: what the end of a process does to its peers
    if all_codes "0|70|134|$user_error" && [[ "$codes " = *" $user_error "* ]]; then
      die 'The training ended with an error that no restart mends, see above.'
    fi
    found=$(find "$workdir/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' -printf '%f\n' 2>/dev/null | sort -n | tail -n 1)
    if [ "$found" != "$newest" ] || ((SECONDS - began > 3600)); then restarts=0 newest=$found; fi # they may be elsewhere
    ((restarts++ < most)) || die "No new checkpoint in $workdir after $most restarts: given up."
    echo "Restart $restarts of $most, from checkpoint ${newest:-0}, in $pause_s s"
    nap "$pause_s"
  done
}
