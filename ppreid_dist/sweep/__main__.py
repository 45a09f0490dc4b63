"""``python -m ppreid_dist.sweep``, the same as ``ppreid sweep``."""

from ppreid_dist.cli import sweep_main

if __name__ == "__main__":
    sweep_main()
