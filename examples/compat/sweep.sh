#!/bin/bash
#SBATCH --job-name=slurm-hello
#SBATCH --array=3-9:3%2
#SBATCH --ntasks=1 --cpus-per-task=1
#SBATCH --mem=512M
#SBATCH --time=00:10:00
#SBATCH --signal=TERM@30
#SBATCH --output=%x-%A_%a.out
#SBATCH --mail-type=END
#SBATCH --chdir=.

# an array of three tasks: 3, 6 and 9, of which two run at a time
echo "task $SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX on $(scontrol show hostnames | head -n 1)"
srun --cpu-bind=cores sh -c 'echo "rank $SLURM_PROCID of $SLURM_NTASKS with $SLURM_CPUS_PER_TASK CPU"'
