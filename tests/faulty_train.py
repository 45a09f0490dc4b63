"""train.py with a fault of its last process at a step: ``faulty_train.py nan STEP …`` makes its loss NaN there, ``die``
kills it, but not after a launcher has started it again; ``linger`` lets the interpreter hang when it is to end."""

import atexit
import os
import signal
import sys
import time

from ppreid_dist import distributed
from ppreid_dist.cli import train_main
from ppreid_dist.training import step as step_module

fault, at, honest, calls = sys.argv.pop(1), int(sys.argv.pop(1)), step_module.triplet_loss, []


def poisoned(*arguments: object) -> object:
    calls.append(1)
    here = len(calls) == at + 1 and distributed.rank() == distributed.world_size() - 1
    if here and fault == "die" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*arguments) * (float("nan") if here and fault == "nan" else 1)  # type: ignore[arg-type]


step_module.triplet_loss = poisoned  # type: ignore[assignment]
if fault == "linger":
    atexit.register(time.sleep, 600)
train_main()
