# What slurm/train.sh and slurm/sweep.sh share: how a job hears that it must stop, and how it comes back. Sourced from
# the repository's root, with the job's name in $me.
# shellcheck shell=bash disable=SC2034,SC2154 # $me and what it is told in $status are those of who sources it

readonly SAVED=75

say() { echo "$me: $*"; }

fail() {
    echo "error: $*" >&2
    exit 2
}

# Checks, and $job, its number.
enter_job() {
    [[ -v SLURM_JOB_ID ]] || fail "start it by: sbatch slurm/$me CONFIG [key=value …]"
    [[ -f train.py && -f slurm/task.sh ]] || fail "submit it from the repository's root: $PWD has no train.py"
    (($# > 0)) || fail "no configuration: sbatch slurm/$me CONFIG [key=value …]"
    job=$SLURM_JOB_ID
    if [[ -v SLURM_ARRAY_TASK_ID ]]; then
        # One task of an array bears the array's own number, which to scontrol and scancel means all its tasks.
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    trap hear USR2 TERM
}

# A signal may come before what must hear it exists: then it is told once it is awaited. It may not listen yet, either:
# tell_once is called again and again until it has ended.
heard=0
awaited=''
sender=''
hear() {
    interrupted=1
    heard=1
    if [[ -n $awaited ]]; then tell; fi
}

tell() {
    if [[ -z $sender ]]; then
        {
            sleep 0.5 # what has only just been started doesn't ignore the signal yet, and would die of it
            while kill -0 $$; do # this script's: nobody is told after its end
                tell_once || :
                sleep 3
            done
        } >/dev/null 2>&1 &
        sender=$!
        disown "$sender" # or the shell would report its end
    fi
}

# Wait for process $1; its status in $status. A trap ends `wait` early, with a status that isn't the process's.
await() {
    awaited=$1
    if ((heard)); then tell; fi
    while interrupted=0; do
        status=0
        wait "$1" || status=$?
        ((interrupted)) || break
    done
    # Slurm ends this script by TERM when it requeues the job: passed on, that would stop the job's next start.
    trap '' USR2 TERM
    if [[ -n $sender ]]; then kill "$sender" 2>/dev/null || :; fi
}

source_site() {
    unset MASTER_ADDR MASTER_PORT # the submitting shell's, if any
    if [[ -f slurm/site.sh ]]; then
        set +eu # modules and conda don't stand them
        # shellcheck source=slurm/site.example.sh
        source slurm/site.sh
        set -eu
    fi
}

# Whether the environment and the configuration $1 are there, once the site's settings are. A Python of the system's
# has no yaml.
check_environment() {
    python -c 'import yaml' 2>/dev/null ||
        fail "no Python with ppreid_dist: activate its environment in slurm/site.sh (slurm/site.example.sh) or before sbatch"
    [[ -f $1 ]] || fail "$1: no such configuration file"
}

# $output: the folder that is meant by the configuration $2 with the settings behind it, as the program itself reads them by
# its schema $1, MODULE:CLASS. What is no setting, as --retry, is left to the program.
read_output() {
    output=$(python -c '
import sys
from importlib import import_module
from ppreid_dist.errors import PPReIDError
from ppreid_dist.settings import load_settings
schema, config, *words = sys.argv[1:]
module, _, name = schema.partition(":")
settings = [word for word in words if "=" in word and not word.startswith("-")]
try:
    print(load_settings(getattr(import_module(f"ppreid_dist.{module}"), name), config, settings).output)
except PPReIDError as error:
    sys.exit(f"error: {error}")' "$@") || exit 2
}

# A command of Slurm's, which on a busy cluster may not answer the first time.
insist() {
    local try
    for try in 1 2 3 4; do
        if ((try > 1)); then sleep "${PPREID_PAUSE:-10}"; fi
        if "$@"; then return 0; fi
    done
    return 1
}

# End the job by status $1, or requeue it where that says that all is saved.
leave() {
    (($1 == SAVED)) || exit "$1"
    local restarts=${SLURM_RESTART_COUNT:-0} most=${REQUEUES_MAX:-50} state
    if ((restarts >= most)); then
        say "saved; not requeued, since it was $restarts times already (REQUEUES_MAX)"
        exit "$SAVED"
    fi
    # A job that its user cancels also saves and ends by 75, and must not come back.
    state=$(insist squeue --noheader --jobs="$job" --format='%T %r') || state=''
    if [[ -z $state ]]; then
        say "saved; not requeued, since Slurm doesn't answer: continue it by submitting it again"
        exit "$SAVED"
    fi
    if [[ $state != RUNNING* && $state != *TimeLimit ]]; then
        say "saved; not requeued, since Slurm is ending the job ($state)"
        exit "$SAVED"
    fi
    say "saved; requeued, $((restarts + 1)) of at most $most times"
    insist scontrol requeue "$job" || {
        say "saved; scontrol requeue failed: continue it by submitting it again"
        exit "$SAVED"
    }
}
