#!/usr/bin/env bash
#SBATCH --job-name=ppreid
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@300
# Train on a Slurm cluster. From the repository's root:
#
#   sbatch slurm/train.sh CONFIG [key=value …]
#   sbatch --nodes=2 --gpus-per-node=4 --cpus-per-gpu=8 slurm/train.sh CONFIG …    one process a GPU
#   sbatch --ntasks=4 --cpus-per-task=8 slurm/train.sh CONFIG …                    CPUs: one process a task
#   sbatch --array=0-4 slurm/train.sh CONFIG …      seeds 0 to 4; seed N in OUTPUT/seed_N, where OUTPUT is the
#                                                   setting `output` of CONFIG with the command line's settings
#
# What differs between clusters is in slurm/site.sh, made from slurm/site.example.sh.
# Five minutes before the time limit, or on SIGUSR2 or SIGTERM, the run saves and the job requeues itself, at most
# REQUEUES_MAX times (50), and goes on where it was. Exit status: 0 done; 2 an error to mend; 75 saved but not
# requeued; anything else a crash (a lost node, a killed process). After a crash the job comes back, too, if it had
# saved a checkpoint since it started: else the same would happen again and again.
set -euo pipefail

readonly me=train.sh
[[ -f slurm/common.sh ]] || {
    echo "error: submit it from the repository's root: $PWD has no slurm/common.sh" >&2
    exit 2
}
# shellcheck source=slurm/common.sh
source slurm/common.sh

enter_job "$@"
config=$1
shift

tell_once() { scancel --quiet --signal=USR2 "$job"; }

source_site
check_environment "$config"

read_output experiment:Config "$config" "$@"

if [[ -v SLURM_ARRAY_TASK_ID ]]; then
    output=$output/seed_$SLURM_ARRAY_TASK_ID
    # Quoted for YAML: a path may have " #" or ": " in it.
    quoted=$(python -c 'import json, sys; print(json.dumps(sys.argv[1], ensure_ascii=False))' "$output")
    set -- "$@" "seed=$SLURM_ARRAY_TASK_ID" "output=$quoted"
fi

# The name of the run's newest checkpoint.
newest() { cat "$output/checkpoints/latest" 2>/dev/null || :; }

# Rank 0 runs on the first node. The port is below those that Linux gives to clients.
if [[ ! -v MASTER_ADDR ]]; then
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
fi
export MASTER_ADDR MASTER_PORT=$((12000 + SLURM_JOB_ID % 16000))

cpus=${SLURM_CPUS_PER_TASK:-1}
shape=()
if ((${SLURM_GPUS_ON_NODE:-0} > 0)); then
    tasks=$((SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES))
    cpus=$((SLURM_CPUS_ON_NODE / SLURM_GPUS_ON_NODE))
    ((cpus > 0)) || fail "$SLURM_CPUS_ON_NODE CPUs can't serve $SLURM_GPUS_ON_NODE GPUs: give --cpus-per-gpu to sbatch"
    # Every task must see all GPUs of the job on its node, and takes the one of its LOCAL_RANK. These would bind it to
    # one (Slurm from 24.05 on says it in SLURM_TRES_…, too); --gpu-bind=none would show it those of other jobs, too.
    unset SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU SLURM_GPU_BIND
    unset SLURM_TRES_PER_TASK SLURM_TRES_BIND
    shape=(--ntasks="$tasks" --ntasks-per-node="$SLURM_GPUS_ON_NODE" --gpus-per-node="$SLURM_GPUS_ON_NODE")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PPREID_STATUS=$scratch/status
before=$(newest)

# --export: under `sbatch --export=NONE` the tasks would get nothing of what was set above.
srun "${shape[@]}" --cpus-per-task="$cpus" --mpi=none --kill-on-bad-exit=1 --export=ALL \
    bash slurm/task.sh --config "$config" --resume "$@" &
await $!
# A mistake stays one on whatever node it was seen; what else happened the first node knows best.
if ((status != 2)) && [[ -s $PPREID_STATUS ]]; then status=$(<"$PPREID_STATUS"); fi
if ((status != 0 && status != 2 && status != SAVED)) && [[ $(newest) != "$before" ]]; then
    say "crashed by status $status, after a checkpoint of this start"
    status=$SAVED
fi
leave "$status"
