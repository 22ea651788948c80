#!/usr/bin/env bash
# Train on one device. All flags are passed to train.py; relative paths are relative to the repository's root directory.
#
#   scripts/train_device.sh --logdir logs/first
#   DEVICE=cuda:1 scripts/train_device.sh        # or cpu, mps; the default, auto, prefers a GPU
source "$(dirname "$0")/common.sh"
case " $* " in *" --device"[\ =]*) DEVICE= ;; esac  # the option takes precedence
run "${python[@]}" train.py ${DEVICE:+--device "$DEVICE"} "$@"
