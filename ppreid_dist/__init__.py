"""Distributed training of person re-identification whose stored features resist reversal."""

__version__ = "0.1.0"
