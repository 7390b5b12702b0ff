#!/bin/bash
#SBATCH --job-name=slurm-ranks
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --time=10

# one task on each of two nodes: srun starts them
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun sh -c 'echo "rank $SLURM_PROCID of $SLURM_NTASKS meets at $MASTER_ADDR"'
