"""A run's directory: what says that it is one, whose it is, and how a file gets into it.

Owns ``run.json``, the mark of who is at work there, and writing whole or not at all. What the other
files mean is ``run``'s and ``journal``'s.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workers.errors import CheckpointError, ConfigurationError

#: Counts up when a run directory comes to mean something else.
FORMAT = 1

#: Says which process is at work in a directory.
_MARK = "running.json"


def asked(out: Path) -> dict[str, Any]:
    """What ``run.json`` says."""
    try:
        said: Any = json.loads((out / "run.json").read_text())
        found = said["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{out} is not a run of qpool: expected a directory with a run.json that `qpool train` "
            f"wrote ({type(error).__name__}: {error})"
        ) from error
    if found != FORMAT:
        raise CheckpointError(
            f"the run in {out} is of format {found}; this version of qpool reads format {FORMAT}. "
            "Go on with the version that wrote it"
        )
    return dict(said)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Have the directory to ourselves, or say who has it."""
    import psutil

    mark = out / _MARK
    me = psutil.Process()
    other = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
        said = json.loads(mark.read_text())
        process = psutil.Process(said["pid"])
        other = process if process.create_time() == said["created"] else None
    if other is not None and other != me:
        raise ConfigurationError(
            f"{out} is in use by process {other.pid}, which is training there; wait for it, or "
            "stop it"
        )
    write_json(mark, {"pid": me.pid, "created": me.create_time()})
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def host() -> dict[str, Any]:
    """Platform and versions, as they are written down with a run.

    Nothing is imported for them: the pool loads TensorFlow first (see ``building``).
    """
    import platform
    import sys
    from importlib import metadata

    import qpool
    from workers import cache

    return {
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "qpool": qpool.__version__,
        "tensorflow": cache.tensorflow_version(),
        "strawberryfields": metadata.version("strawberryfields"),
        "numpy": metadata.version("numpy"),
        "scipy": metadata.version("scipy"),
    }


def left_over(path: Path) -> bool:
    """Whether a run that was killed before it had begun may have left this."""
    return path.name == _MARK or path.suffix == ".part"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(beside, path)
