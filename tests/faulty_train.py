"""train.py with a fault: ``faulty_train.py STEP …`` makes the loss of the last process NaN at a step."""

import sys

from ppreid_dist import distributed
from ppreid_dist.cli import train_main
from ppreid_dist.training import step as step_module

at, honest, calls = int(sys.argv.pop(1)), step_module.triplet_loss, []


def poisoned(*arguments: object) -> object:
    calls.append(1)
    here = len(calls) == at + 1 and distributed.rank() == distributed.world_size() - 1
    return honest(*arguments) * (float("nan") if here else 1)  # type: ignore[arg-type]


step_module.triplet_loss = poisoned  # type: ignore[assignment]
train_main()
