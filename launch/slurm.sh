#!/usr/bin/env bash
# One run under Slurm, one launcher a node. Submit it from the folder that holds launch/, with the arguments of
# `hsivi train`:
#
#   sbatch --nodes=2 launch/slurm.sh cifar10 --outdir runs/cifar10
#
#SBATCH --job-name=hsivi
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
# TERM comes 3 minutes before the time is over, or when the job is preempted. The run saves itself at its next student
# update, and goes on from there when the same command is submitted again.
set -euo pipefail
if [[ -z "${SLURM_JOB_NODELIST:-}" ]]; then
    echo "slurm.sh: SLURM_JOB_NODELIST is not set; submit this with sbatch, or use launch/multinode.sh" >&2
    exit 2
fi
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export IP_ADDR=${hosts%%$'\n'*} NUM_NODES=$SLURM_JOB_NUM_NODES
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))} GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
# The deepspeed launcher's own Slurm mode sets neither RANK nor MASTER_ADDR, so each node gets a launcher that is told
# both.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c 'NODE_RANK=$SLURM_NODEID exec launch/multinode.sh "$@"' multinode "$@"
