#!/usr/bin/env bash
# Trains with nn.DataParallel: one process, each micro-batch cut over all visible GPUs.
#
#   scripts/train_dp.sh --logdir logs/dp
#   CUDA_VISIBLE_DEVICES=0,1 scripts/train_dp.sh
#
# Batch norm takes its statistics on each GPU alone, and one Python process drives all of them: train_ddp.sh is
# faster and has neither limit. Without a GPU this trains on the CPU, and says so.
source "$(dirname "$0")/common.sh"
run "${python[@]}" train.py --data-parallel "$@"
