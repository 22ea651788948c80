#!/usr/bin/env bash
# Trains on one device. All flags go to train.py; relative paths count from the repository's root.
#
#   scripts/train_device.sh --logdir logs/first
#   DEVICE=cuda:1 scripts/train_device.sh        # or cpu, mps; auto takes a GPU where there is one
source "$(dirname "$0")/common.sh"
run "${python[@]}" train.py ${DEVICE:+--device "$DEVICE"} "$@"
