#!/usr/bin/env bash
# One process of a training, as `srun` of slurm/train.sh starts it; the arguments are train.py's.
#
# 75 (saved, to be continued) is passed on by the file $PPREID_STATUS and not by this script's own status: srun's
# --kill-on-bad-exit would kill the processes that are still leaving, and report them as killed. The file is on the
# first node, where rank 0 and the batch script run. The first failure there is kept: what follows from it is not news.
set -euo pipefail

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID

# Ignored signals stay so in Python until it listens, and after it: slurm/train.sh sends USR2 again and again.
trap '' USR2
# This shell must outlive the TERM that Slurm sends to all processes of a task, and see Python's status.
trap : TERM

status=0
python train.py "$@" || status=$?
if ((status != 0)); then
    (set -o noclobber && echo "$status" >"$PPREID_STATUS") 2>/dev/null || :
fi
if ((status == 75)); then status=0; fi
exit "$status"
