# What differs between clusters. Copy it to slurm/site.sh, which git ignores, and edit the copy.
# Source it in the shell that you submit from, since sbatch reads the SBATCH_* variables there. In the job,
# slurm/train.sh sources it again.
# shellcheck shell=bash

# Where the jobs go, and what each gets. On CPUs give --ntasks and --cpus-per-task to sbatch instead of the GPUs.
export SBATCH_ACCOUNT=my_account
export SBATCH_PARTITION=gpu
export SBATCH_TIMELIMIT=12:00:00
export SBATCH_GPUS_PER_NODE=4
export SBATCH_CPUS_PER_GPU=8

# Software.
# module load python/3.12 cuda/13
# shellcheck source=/dev/null
source .venv/bin/activate

# The network between nodes: the interface that NCCL and gloo use, where the first one isn't it. MASTER_ADDR is the
# first node's name; set it where that name belongs to another network.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)-ib

# Scratch: downloaded backbones and wandb's files. Compute nodes often have no network: fetch the backbone once on a
# login node. Runs and shards are where output=… and data.shards=… say, on a file system that all nodes share.
# export HF_HOME=$SCRATCH/huggingface HF_HUB_OFFLINE=1
# export WANDB_DIR=$SCRATCH WANDB_MODE=offline
