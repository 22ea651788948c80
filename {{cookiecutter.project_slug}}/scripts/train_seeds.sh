#!/usr/bin/env bash
# Repeat a recipe: train it with several seeds, each in a separate directory, and print the mean score with its standard
# deviation and a confidence interval. tools/compare.py compares two recipes that were trained in this way.
#
#   scripts/train_seeds.sh --seeds 5 --logdir logs/seeds --stages.0.epochs 3   # logs/seeds/seed_0, logs/seeds/seed_1, …
#   scripts/train_seeds.sh --seeds 2 --all-folds                               # logs/seeds/seed_0_fold_0, …
#   LAUNCH=scripts/train_ddp.sh scripts/train_seeds.sh                         # with another launch script
#
# After an interruption, start it again with the same flags: finished runs are not trained again, and the interrupted one
# resumes exactly. With more seeds, only the new ones are trained. All other flags are passed to train.py, except --seed
# and --resume, which this script sets.
source "$(dirname "$0")/common.sh"

seeds=5
all_folds=
flags=()
train=1
launch=${LAUNCH:-scripts/train_device.sh}

while [[ $# -gt 0 ]]; do
    case "$1" in
        --logdir) set_logdir "${2:?"error: --logdir needs a directory"}"; shift ;;
        --logdir=*) set_logdir "${1#*=}" ;;
        --seeds) seeds=${2:?"error: --seeds needs a number"}; shift ;;
        --seeds=*) seeds=${1#*=} ;;
        --all-folds) all_folds=1 ;;
        --help | -h | --show-schedule) train=; flags+=("$1") ;;
        --seed | --seed=* | --resume | --no-resume)
            echo "error: $1 is set by scripts/train_seeds.sh; leave it out, and give --seeds." >&2
            exit 2
            ;;
        *) flags+=("$1") ;;
    esac
    shift
done
if [[ ! $seeds =~ ^[1-9][0-9]*$ ]]; then
    echo "error: --seeds $seeds must be an integer, 1 or more." >&2
    exit 2
fi
logdir=${logdir:-logs/seeds}

if [[ -z $train ]]; then  # train.py only prints
    exec "$launch" "${flags[@]}"
fi

for ((seed = 0; seed < seeds; seed++)); do
    if [[ -z $all_folds ]]; then
        "$launch" ${flags[@]+"${flags[@]}"} --seed "$seed" --logdir "$logdir/seed_$seed" --resume
        continue
    fi
    # The number of folds is read from the first run, because that run may create the split file.
    folds=1
    for ((fold = 0; fold < folds; fold++)); do
        directory=$logdir/seed_${seed}_fold_$fold
        "$launch" ${flags[@]+"${flags[@]}"} --seed "$seed" --fold "$fold" --logdir "$directory" --resume
        folds=$(sed -n 's/^ *"folds": \([0-9]*\).*/\1/p' "$logdir/seed_0_fold_0/run.json")
    done
done
run "${python[@]}" -m tools.compare "$logdir"
