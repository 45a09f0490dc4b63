"""Train one extractor: ``accelerate launch train.py --config FILE [--resume] [key=value …]``."""

from ppreid_dist.cli import train_main

if __name__ == "__main__":
    train_main()
