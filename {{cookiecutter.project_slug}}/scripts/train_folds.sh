#!/usr/bin/env bash
# Trains every fold of the split file in turn, each into a folder of its own, joins what they predict of the samples that
# they did not train on into predictions/valid.csv, and prints the scores over all folds.
#
#   scripts/train_folds.sh --logdir logs/folds --stages.0.epochs 3      # logs/folds/fold_0, logs/folds/fold_1, …
#   LAUNCH=scripts/train_ddp.sh scripts/train_folds.sh                  # with another of the scripts here
#
# Start it again with the same flags when it was cut: folds that are finished say so and are not trained again, the one
# that was cut goes on, bit for bit. All other flags go to train.py; --fold and --resume are given here.
source "$(dirname "$0")/common.sh"

logdir=logs/folds
flags=()
only_show=
launch=${LAUNCH:-scripts/train_device.sh}
while [[ $# -gt 0 ]]; do
    case "$1" in
        --logdir) logdir=${2:?"error: --logdir needs a folder"}; shift ;;
        --logdir=*) logdir=${1#*=} ;;
        --help | -h | --show-schedule) only_show=1; flags+=("$1") ;;
        --fold | --fold=* | --resume | --no-resume)
            echo "error: $1 is given by scripts/train_folds.sh itself; leave it out." >&2
            exit 2
            ;;
        *) flags+=("$1") ;;
    esac
    shift
done

if [[ -n $only_show ]]; then  # train.py only speaks, and trains nothing
    exec "$launch" "${flags[@]}"
fi

# How many folds there are stands in the first run's record: its split file may be made by that run.
fold=0
folds=1
while [[ $fold -lt $folds ]]; do
    "$launch" ${flags[@]+"${flags[@]}"} --fold "$fold" --logdir "$logdir/fold_$fold" --resume
    folds=$(sed -n 's/^ *"folds": \([0-9]*\).*/\1/p' "$logdir/fold_0/run.json")
    fold=$((fold + 1))
done
runs=()
for ((fold = 0; fold < folds; fold++)); do runs+=("$logdir/fold_$fold"); done
# Each sample as the run predicts it that did not train on it.
"${python[@]}" -m tools.predict --run "${runs[@]}" --split valid --output "$logdir/predictions" --overwrite
run "${python[@]}" -m batteries.evaluation.cross_validation "$logdir"
