#!/bin/sh
# Rehearse a run of several processes on this machine, each with one CPU device.
#   sh tools/launch/local.sh COUNT CONFIG [--field value ...]
# Ends with the code of a process that failed: 75 when the same command goes on.
set -eu
count=$1 config=$2
shift 2
port=${PORT:-8476}
export JAX_PLATFORMS=cpu
pids=
for process in $(seq 0 $((count - 1))); do
    mis-jax train "$config" --distributed.coordinator "127.0.0.1:$port" \
        --distributed.num-processes "$count" --distributed.process-id "$process" "$@" &
    pids="$pids $!"
done
trap 'kill $pids 2>/dev/null' INT TERM
code=0
for pid in $pids; do
    wait "$pid" || code=$?
done
exit "$code"
