#!/usr/bin/env bash
# Ray on one node of a job, as `srun` of slurm/sweep.sh starts it: the head on the first one, HOST, at PORT.
#
#   slurm/ray_node.sh HOST PORT
set -euo pipefail

export RAY_USAGE_STATS_ENABLED=0 # nothing is sent anywhere
shared=(--num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --block)
if ((SLURM_PROCID == 0)); then
    exec ray start --head --port="$2" --include-dashboard=false "${shared[@]}"
fi
exec ray start --address="$1:$2" "${shared[@]}"
