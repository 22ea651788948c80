#!/usr/bin/env bash
# Train in a SLURM job on any number of nodes. Two minutes before the time limit, or when the job is preempted, the run is
# saved and the job is queued again to resume it.
#
#   sbatch scripts/train_slurm.sh --logdir logs/slurm          # in the repository's root directory
#   sbatch --nodes 2 --gpus-per-node 4 --time 8:00:00 scripts/train_slurm.sh --logdir logs/slurm
#
# All flags are passed to train.py. Pass options of your cluster, such as a partition, to sbatch, or add them below.
#SBATCH --job-name=experiment
#SBATCH --output=logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# SLURM runs a copy of this file, so the directory of the file is not the repository's.
cd -- "${SLURM_SUBMIT_DIR:?"error: start this script with sbatch: sbatch scripts/train_slurm.sh"}"
source scripts/common.sh

NNODES=$SLURM_JOB_NUM_NODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES MASTER_ADDR

case " $* " in *" --resume "*) ;; *) set -- "$@" --resume ;; esac
# One launcher per node, with one process per GPU.
# shellcheck disable=SC2016
srun bash -c 'NODE_RANK=$SLURM_NODEID exec scripts/train_ddp.sh "$@"' train_ddp.sh "$@" &
step=$!
stopped=
trap 'stopped=1; kill -USR1 "$step"' USR1  # srun forwards it to its tasks
code=0
wait "$step" || code=$?
if [[ -n $stopped ]]; then  # the signal ended the first wait; wait for the run
    code=0
    wait "$step" || code=$?
    [[ $code -eq 0 ]] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
