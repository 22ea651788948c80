#!/usr/bin/env bash
# Cross-validation: train every fold of the split file in turn, each in a separate directory; combine the predictions of
# the validation samples in predictions/valid.csv, and print the scores over all folds.
#
#   scripts/train_folds.sh --logdir logs/folds --stages.0.epochs 3      # logs/folds/fold_0, logs/folds/fold_1, …
#   LAUNCH=scripts/train_ddp.sh scripts/train_folds.sh                  # with another launch script
#
# After an interruption, start it again with the same flags: finished folds are not trained again, and the interrupted
# fold resumes exactly. All flags are passed to train.py, except --fold and --resume, which this script sets.
source "$(dirname "$0")/common.sh"

flags=()
train=1
launch=${LAUNCH:-scripts/train_device.sh}

while [[ $# -gt 0 ]]; do
    case "$1" in
        --logdir) set_logdir "${2:?"error: --logdir needs a directory"}"; shift ;;
        --logdir=*) set_logdir "${1#*=}" ;;
        --help | -h | --show-schedule) train=; flags+=("$1") ;;
        --fold | --fold=* | --resume | --no-resume)
            echo "error: $1 is set by scripts/train_folds.sh; leave it out." >&2
            exit 2
            ;;
        *) flags+=("$1") ;;
    esac
    shift
done
logdir=${logdir:-logs/folds}

if [[ -z $train ]]; then  # train.py only prints
    exec "$launch" "${flags[@]}"
fi

# The number of folds is read from the first run, because that run may create the split file.
fold=0
folds=1
while [[ $fold -lt $folds ]]; do
    "$launch" ${flags[@]+"${flags[@]}"} --fold "$fold" --logdir "$logdir/fold_$fold" --resume
    folds=$(sed -n 's/^ *"folds": \([0-9]*\).*/\1/p' "$logdir/fold_0/run.json")
    fold=$((fold + 1))
done
runs=()
for ((fold = 0; fold < folds; fold++)); do runs+=("$logdir/fold_$fold"); done
# Each sample is predicted by the run that did not train on it.
"${python[@]}" -m tools.predict --run "${runs[@]}" --split valid --output "$logdir/predictions" --overwrite
run "${python[@]}" -m batteries.evaluation.cross_validation "$logdir"
