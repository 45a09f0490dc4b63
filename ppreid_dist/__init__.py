"""Distributed training of person re-identification whose stored features are harder to reverse, and how far."""

__version__ = "0.1.0"
