#!/usr/bin/env bash
#SBATCH --job-name=ppreid-sweep
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@300
# Sweep on a Slurm cluster. From the repository's root:
#
#   sbatch --nodes=4 slurm/sweep.sh CONFIG [key=value …]       one job with Ray over its nodes
#   sbatch --array=0-7 slurm/sweep.sh CONFIG [key=value …]     tasks that share the sweep's folder, without Ray
#
# A trial runs on one node and takes what resources.* of CONFIG says. What differs between clusters is in slurm/site.sh,
# made from slurm/site.example.sh; stops, requeues and the exit status are those of slurm/train.sh, and 1 also where all
# trials failed.
set -euo pipefail

readonly me=sweep.sh
[[ -f slurm/common.sh ]] || {
    echo "error: submit it from the repository's root: $PWD has no slurm/common.sh" >&2
    exit 2
}
# shellcheck source=slurm/common.sh
source slurm/common.sh

enter_job "$@"
config=$1
shift

tell_once() { kill -USR2 "$driver"; }

source_site
check_environment "$config"
read_output sweep.config:SweepConfig "$config" "$@"

sweep=(python -m ppreid_dist.sweep --config "$config" --resume)
ray=''
if [[ -v SLURM_ARRAY_TASK_ID ]]; then
    sweep+=(--backend array)
else
    # Ray's head is on the first node, where this script runs. The port is above those that Ray gives to its workers
    # (10002 to 19999) and below those that Linux gives to clients.
    if [[ ! -v MASTER_ADDR ]]; then
        read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    fi
    port=$((20000 + SLURM_JOB_ID % 12000))
    # Without it anyone who reaches the node could run programs as this user.
    RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
    gpus=()
    if ((${SLURM_GPUS_ON_NODE:-0} > 0)); then gpus=(--gpus-per-node="$SLURM_GPUS_ON_NODE"); fi
    # Ray is alone on a node, and shares its GPUs out itself.
    unset SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU SLURM_GPU_BIND SLURM_NTASKS SLURM_NTASKS_PER_NODE
    unset SLURM_TRES_PER_TASK SLURM_TRES_BIND
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${gpus[@]}" \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" --mpi=none --kill-on-bad-exit=0 --no-kill --export=ALL \
        bash slurm/ray_node.sh "$MASTER_ADDR" "$port" &
    ray=$!
    sweep+=(--address "$MASTER_ADDR:$port" --nodes "$SLURM_JOB_NUM_NODES")
fi

# What is done: rows of trials, and the newest checkpoints.
progress() { { find "$output" \( -name trial.json -o -name latest \) -printf '%p %T@\n' 2>/dev/null || :; } | sort; }
before=$(progress)

# When the front was written. A sweep whose trials all failed ends by 1 as a crashed one does, but has written it.
front() { find "$output/front.json" -printf '%T@\n' 2>/dev/null || :; }
front_before=$(front)

# An ignored signal stays so in Python until it listens.
(
    trap '' USR2
    exec "${sweep[@]}" "$@"
) &
driver=$!
await "$driver"
if ((status != 0 && status != 2 && status != SAVED)) &&
    [[ $(progress) != "$before" && $(front) == "$front_before" ]]; then
    say "crashed by status $status, after something was done"
    status=$SAVED
fi
if [[ -n $ray ]]; then
    kill "$ray" 2>/dev/null || :
    wait "$ray" || :
fi
leave "$status"
