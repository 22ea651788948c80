#!/usr/bin/env bash
# Train with DistributedDataParallel: one process per GPU, or two processes on a machine without GPUs.
#
#   scripts/train_ddp.sh --logdir logs/ddp
#   NPROC=2 scripts/train_ddp.sh --device cpu
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/train_ddp.sh    # on the first of two nodes
#
# All flags are passed to train.py. --batch-size is the number of samples per optimizer step over all processes.
source "$(dirname "$0")/common.sh"
run "${python[@]}" -m batteries.distributed.launch train.py "$@"
