"""The one progress bar of every command."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

TERMINAL, LOG = 0.5, 30.0
"""Seconds between two drawings of a bar, for who looks on, and where they would fill a file."""


def progress_bar(items: Iterable[Any] | None = None, *, shown: bool, **options: Any) -> "tqdm[Any]":
    """A bar of tqdm over ``items``, or moved by hand, on stderr; drawn rarely where that isn't a
    terminal, as in a job's log.
    """
    pause = TERMINAL if sys.stderr.isatty() else LOG
    # By itself tqdm draws after `maxinterval`, however long the pause.
    return tqdm(items, disable=not shown, mininterval=pause, maxinterval=max(pause, 10.0), **options)
