#!/usr/bin/env bash
# Trains in a SLURM job, on any number of machines. Two minutes before its time is over the run is saved and the job queued
# again, to go on where it was; so it does where the job has to make room for another.
#
#   sbatch scripts/train_slurm.sh --logdir logs/slurm          # from the repository's root
#   sbatch --nodes 2 --gpus-per-node 4 --time 8:00:00 scripts/train_slurm.sh --logdir logs/slurm
#
# All flags go to train.py. What your cluster wants besides, such as a partition, goes to sbatch or into the lines below.
#SBATCH --job-name=experiment
#SBATCH --output=logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
cd -- "${SLURM_SUBMIT_DIR:?"error: this is for sbatch: sbatch scripts/train_slurm.sh"}"  # SLURM runs a copy of this file
source scripts/common.sh

NNODES=$SLURM_JOB_NUM_NODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES MASTER_ADDR

# One launcher on each machine, with one process for each of its GPUs.
# shellcheck disable=SC2016
srun bash -c 'NODE_RANK=$SLURM_NODEID exec scripts/train_ddp.sh "$@"' train_ddp.sh "$@" --resume &
step=$!
stopped=
trap 'stopped=1; kill -USR1 "$step"' USR1  # srun passes it on to its tasks
code=0
wait "$step" || code=$?
if [[ -n $stopped ]]; then  # the first wait ended with the signal, this one ends with the run
    code=0
    wait "$step" || code=$?
    [[ $code -eq 0 ]] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
