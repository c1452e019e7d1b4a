"""What a run says of itself while it goes on. Used by a user's function; does nothing elsewhere.

Knows neither processes nor the campaign: who listens is set by ``listening``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_here = threading.local()


def report(step: int | None = None, steps: int | None = None, **figures: float) -> None:
    """Tell the campaign that this run is at ``step`` of ``steps``, with these figures.

    The table shows them, and a run that says nothing for ``timeout`` seconds is taken to hang.
    Outside of a campaign nothing happens, so a function can be called by itself.
    """
    listener = getattr(_here, "listener", None)
    if listener is not None:
        listener(step or 0, steps or 0, {name: float(value) for name, value in figures.items()})


def run_directory() -> Path:
    """The directory of this run, for its files; the current one outside of a campaign.

    What is in it is there again when a run that was interrupted is begun again.
    """
    return getattr(_here, "directory", None) or Path.cwd()


@contextlib.contextmanager
def listening(
    directory: Path, listener: Callable[[int, int, dict[str, float]], None]
) -> Iterator[None]:
    """Within, this thread's ``report`` calls ``listener``."""
    _here.directory, _here.listener = directory, listener
    try:
        yield
    finally:
        del _here.directory, _here.listener


def as_figures(found: Any) -> dict[str, float]:
    """What a function returned, as numbers by name; TypeError for anything else."""
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise TypeError(
            f"the function returned {found!r:.200}: expected a dictionary of numbers, as "
            "{'loss': 0.1}"
        ) from None
