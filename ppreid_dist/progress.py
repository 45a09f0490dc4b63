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


def say(line: str) -> None:
    """A line of its own on stdout, above the bar."""
    if sys.stderr.isatty():
        tqdm.write(line)
    else:
        print(line, flush=True)  # there tqdm would blank the bar's line in the file first


def note(bar: "tqdm[Any]", text: str) -> None:
    """Behind the bar: at once on a terminal, else when it is drawn next."""
    bar.set_postfix_str(text, refresh=sys.stderr.isatty())
