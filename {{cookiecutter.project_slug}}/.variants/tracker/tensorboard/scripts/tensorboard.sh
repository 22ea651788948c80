#!/usr/bin/env bash
# Shows the curves of all runs in the browser: scripts/tensorboard.sh [logs/one_run] [flags of tensorboard]
source "$(dirname "$0")/common.sh"
logdir=logs
if [[ $# -gt 0 && "$1" != -* ]]; then
    logdir=$1
    shift
fi
run "${python[@]}" -m tensorboard.main --logdir "$logdir" "$@"
