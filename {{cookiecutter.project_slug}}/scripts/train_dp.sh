#!/usr/bin/env bash
# Train with nn.DataParallel: one process that divides each micro-batch over all visible GPUs.
#
#   scripts/train_dp.sh --logdir logs/dp
#   CUDA_VISIBLE_DEVICES=0,1 scripts/train_dp.sh
#
# All flags are passed to train.py. Batch norm statistics are computed per GPU, and one Python process serves all GPUs:
# train_ddp.sh is faster and has neither limitation. Without a GPU this trains on the CPU and logs that.
source "$(dirname "$0")/common.sh"
run "${python[@]}" train.py --data-parallel "$@"
