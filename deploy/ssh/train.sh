#!/usr/bin/env bash
# Train over ssh: the coordinator here, a worker on every HOST.
#
#     deploy/ssh/train.sh ADDRESS RUN HOST... [-- SETTING...]
#
# ADDRESS   name or IP address of this machine, as the hosts reach it
# RUN       run folder: made, or gone on with if it is there; the keys are in RUN.keys
# HOST      where ssh logs in without asking
# SETTING   settings of esjax serve; for a run that is there, only --steps, --seconds and --data.text count
#
# PORT (5555): hosts must reach it and the next one. ESJAX_THERE (esjax): the command on the hosts.
#
# Ctrl-C or SIGTERM: the coordinator writes a last checkpoint, then the workers leave. A worker also leaves when its ssh
# connection ends, however it does; none is left behind.
set -euo pipefail
set -m # every process in a group of its own: Ctrl-C comes here alone, and is passed on once

if [ $# -lt 3 ] || [ "$3" = -- ]; then
    sed -n '2,/^set/s/^#[ ]\{0,1\}//p' "$0" >&2
    exit 2
fi
address=$1 run=${2%/}
shift 2
hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    hosts+=("$1")
    shift
done
if [ $# -gt 0 ]; then shift; fi

port=${PORT:-5555}
there=${ESJAX_THERE:-esjax}
url=tcp://$address:$port
keys=$run.keys
if [ -e "$run/run.json" ]; then folder=(--resume "$run"); else folder=(--out "$run"); fi

plain() { tr -c 'A-Za-z0-9._\n-' _ <<<"$1"; } # what a token may be called
connect() { ssh -o BatchMode=yes -o ConnectTimeout=20 "$@"; }

# Runs on a host, with the lifeline as its standard input: when that ends, the worker is told to leave.
# shellcheck disable=SC2016 # it is the host that expands it
worker='
esjax=$1
exec 3<&0
"$esjax" join "$2" --token-file ".esjax/$3" </dev/null &
worker=$!
(cat <&3; kill -TERM "$worker") >/dev/null 2>&1 &
lifeline=$!
wait "$worker"
code=$?
kill "$lifeline" 2>/dev/null
exit "$code"
'

scratch=$(mktemp -d)
mkfifo "$scratch/lifeline"
exec 9<>"$scratch/lifeline" # who reads it waits, until the last one that could write to it is gone: this script

coordinator=
# shellcheck disable=SC2317 # called by a trap
stop() { if [ -n "$coordinator" ]; then kill -TERM "$coordinator" 2>/dev/null || true; fi; }
wait_for() { while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done; }
# shellcheck disable=SC2317 # called by a trap
finish() {
    stop
    if [ -n "$coordinator" ]; then wait_for "$coordinator"; fi
    exec 9>&-
    wait
    rm -r "$scratch"
}
trap finish EXIT

for host in "${hosts[@]}"; do
    name=$(plain "$host")
    if [ ! -e "$keys/$name.token" ]; then
        esjax token new "$keys" "$name" --address "$url" >/dev/null
    fi
done

esjax serve "${folder[@]}" --bind "tcp://0.0.0.0:$port" --keys "$keys" "$@" 9>&- &
coordinator=$!
trap stop INT TERM

for host in "${hosts[@]}"; do
    token=$(plain "$(basename -- "$run")").token
    {
        # The token is readable by its owner alone from its first byte.
        copy="umask 077; mkdir -p .esjax && rm -f .esjax/$token && cat >.esjax/$token"
        if connect "$host" "$copy" <"$keys/$(plain "$host").token"; then
            connect "$host" "sh -c '$worker' sh '$there' '$url' '$token'" 2>&1 |
                while IFS= read -r line; do echo "[$host] $line"; done || true
        fi
        echo "[$host] its worker has ended"
    } <"$scratch/lifeline" 9>&- &
done

wait_for "$coordinator"
code=0
wait "$coordinator" || code=$?
coordinator=
exit "$code"
