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
#                                                   setting `output` of the command line, or else of CONFIG
#
# What differs between clusters is in slurm/site.sh, made from slurm/site.example.sh.
# Five minutes before the time limit, or on SIGUSR2 or SIGTERM, the run saves and the job requeues itself, at most
# REQUEUES_MAX times (50), and goes on where it was. Exit status: 0 done; 2 an error to mend; 75 saved but not
# requeued; anything else a crash. Only 75 is ever requeued.
set -euo pipefail

readonly SAVED=75

say() { echo "train.sh: $*"; }

fail() {
    echo "error: $*" >&2
    exit 2
}

[[ -v SLURM_JOB_ID ]] || fail "start it by: sbatch slurm/train.sh CONFIG [key=value …]"
[[ -f train.py && -f slurm/task.sh ]] || fail "submit it from the repository's root: $PWD has no train.py"
(($# > 0)) || fail "no configuration: sbatch slurm/train.sh CONFIG [key=value …]"
config=$1
shift

job=$SLURM_JOB_ID
if [[ -v SLURM_ARRAY_TASK_ID ]]; then
    # One task of an array bears the array's own number, which to scontrol and scancel means all its tasks.
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# A signal may come before the step exists, or before Python listens: it is sent again until the step has ended.
sender=''
tell_tasks() {
    while :; do
        scancel --quiet --signal=USR2 "$job" || :
        sleep 3
    done
}
hear() {
    interrupted=1
    if [[ -z $sender ]]; then
        tell_tasks >/dev/null 2>&1 &
        sender=$!
        disown "$sender" # or the shell would report its end
    fi
}
trap hear USR2 TERM

unset MASTER_ADDR MASTER_PORT # the submitting shell's, if any
if [[ -f slurm/site.sh ]]; then
    set +eu # modules and conda don't stand them
    # shellcheck source=slurm/site.example.sh
    source slurm/site.sh
    set -eu
fi

if [[ -v SLURM_ARRAY_TASK_ID ]]; then
    output=''
    for setting in "$@"; do
        if [[ $setting == output=* ]]; then output=${setting#output=}; fi
    done
    if [[ -z $output ]]; then
        read_output='import sys, yaml; print(yaml.safe_load(open(sys.argv[1], encoding="utf-8"))["output"])'
        output=$(python -c "$read_output" "$config" 2>/dev/null) || fail "$config: no output in it: give output=FOLDER"
    fi
    set -- "$@" "seed=$SLURM_ARRAY_TASK_ID" "output=$output/seed_$SLURM_ARRAY_TASK_ID"
fi

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
    # one; --gpu-bind=none would show it those of other jobs, too.
    unset SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU SLURM_GPU_BIND
    shape=(--ntasks="$tasks" --ntasks-per-node="$SLURM_GPUS_ON_NODE" --gpus-per-node="$SLURM_GPUS_ON_NODE")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PPREID_STATUS=$scratch/status

# --export: under `sbatch --export=NONE` the tasks would get nothing of what was set above.
srun "${shape[@]}" --cpus-per-task="$cpus" --kill-on-bad-exit=1 --export=ALL \
    bash slurm/task.sh --config "$config" --resume "$@" &
step=$!
# A trap ends `wait` early, with a status that isn't the step's.
while interrupted=0; do
    status=0
    wait "$step" || status=$?
    ((interrupted)) || break
done
if [[ -n $sender ]]; then kill "$sender" 2>/dev/null || :; fi
if [[ -s $PPREID_STATUS ]]; then status=$(<"$PPREID_STATUS"); fi
((status == SAVED)) || exit "$status"

restarts=${SLURM_RESTART_COUNT:-0}
REQUEUES_MAX=${REQUEUES_MAX:-50}
if ((restarts >= REQUEUES_MAX)); then
    say "saved; not requeued, since it was $restarts times already (REQUEUES_MAX)"
    exit "$SAVED"
fi
# A job that its user cancels also saves and ends by 75, and must not come back.
state=$(squeue --noheader --jobs="$job" --format='%T %r') || state=''
if [[ $state != RUNNING* && $state != *TimeLimit ]]; then
    say "saved; not requeued, since Slurm is ending the job (${state:-unknown})"
    exit "$SAVED"
fi
say "saved; requeued, $((restarts + 1)) of at most $REQUEUES_MAX times"
scontrol requeue "$job" || {
    say "saved; scontrol requeue failed: continue it by submitting it again"
    exit "$SAVED"
}
