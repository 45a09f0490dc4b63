#!/usr/bin/env bash
# One process of a training, as `srun` of slurm/train.sh starts it; the arguments are train.py's.
#
# 75 (saved, to be continued) is passed on by the file $PPREID_STATUS and not by this script's own status: srun's
# --kill-on-bad-exit would kill the processes that are still leaving, and report them as killed. The file is on the
# first node, where rank 0 and the batch script run. The first failure there is kept: what follows from it is not news.
set -euo pipefail

# shellcheck source=slurm/common.sh
source slurm/common.sh

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID

# A job that is preempted gets TERM in its tasks alone, maybe while Python still starts. Ignored signals stay so in Python
# until it listens: it doesn't die of it, and is told again and again. (slurm/train.sh's own USR2 comes again by itself.)
trap '' USR2
trap hear TERM
tell_once() { kill -USR2 "$python"; }
(
    trap '' TERM
    exec python train.py "$@"
) &
python=$!
await "$python"
if ((status != 0)); then
    (set -o noclobber && echo "$status" >"$PPREID_STATUS") 2>/dev/null || :
fi
if ((status == SAVED)); then status=0; fi
exit "$status"
