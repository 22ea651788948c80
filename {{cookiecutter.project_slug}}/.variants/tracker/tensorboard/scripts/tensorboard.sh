#!/usr/bin/env bash
# Show the curves of all runs, or of one run, in the browser: scripts/tensorboard.sh [logs/one_run] [tensorboard flags]
source "$(dirname "$0")/common.sh"
logdir=logs
if [[ $# -gt 0 && "$1" != -* ]]; then
    logdir=$1
    shift
fi
run "${python[@]}" -m tensorboard.main --logdir "$logdir" "$@"
