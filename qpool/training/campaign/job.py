"""One run of a campaign, wherever it is placed: what it is given, what it says, how it ends.

Owns running it in this process. Where the process is, and who listens, is ``runner``'s (this
machine) or ``on_ray``'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpool.training.campaign import progress, records
from workers.errors import DivergedError, QPoolError

if TYPE_CHECKING:
    from qpool.training.building import Kept

#: Seconds between two reports of a training run.
_EVERY = 0.5

#: How a run may end beside what ``records`` says: asked to, or because the disk is full.
STOPPED, DISK = "stopped", "disk"


@dataclasses.dataclass(frozen=True)
class Job:
    """A run: ``settings`` for `qpool train`, or for the ``function`` that was pickled by value.

    ``program`` names what is compiled: a process may run jobs of equal ones, one after another.
    ``workers`` is how many a pool of its own has here; ``choose`` has it measure which strategy is
    fastest on its cores, and train nothing.
    """

    name: str
    directory: str
    log: str
    settings: dict[str, Any]
    function: bytes | None = None
    program: str = ""
    workers: int | None = None
    choose: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """Where a run stands, ``at`` seconds of its own clock. ``evaluated`` are figures of the step's
    evaluation, if it had one."""

    step: int
    steps: int
    figures: dict[str, float]
    evaluated: dict[str, float] | None = None
    at: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How it ended: a state of ``records``, ``STOPPED`` or ``DISK``; ``result`` of ``choose``."""

    state: str
    reason: str = ""
    result: dict[str, Any] | None = None
    cpu_seconds: float = 0.0


def run(job: Job, say: Callable[[Report], None], kept: Kept | None = None) -> Ended:
    """Run it in this process, to its end or to the signal that stops it; nothing is raised."""
    try:
        result = _run(job, say, kept)
    except Exception as error:
        traceback.print_exc()
        if _is_of_the_disk(error):
            return Ended(DISK, _words(error), None, time.process_time())
        state = records.DIVERGED if isinstance(error, DivergedError) else records.FAILED
        return Ended(state, _words(error), None, time.process_time())
    state = STOPPED if (result or {}).get("stopped") else records.FINISHED
    return Ended(state, "", result if job.choose else None, time.process_time())


def _run(job: Job, say: Callable[[Report], None], kept: Kept | None) -> dict[str, Any] | None:
    out = Path(job.directory)
    if job.function is not None:
        _call(job, out, say)
        return None
    from rich.console import Console

    from qpool.training import building
    from qpool.training import run as runs
    from qpool.training.config import Config

    config = Config.of(job.settings)
    if job.choose:
        chosen, why = building.chosen(dataclasses.replace(config, strategy="auto", workers=None))
        fixed = {name: getattr(chosen, name) for name in ("strategy", "threads", "tile")}
        return {**fixed, "why": why["chosen"]}
    console = Console(file=sys.stderr, width=100)
    watch = _watch(config.steps, say)
    if (out / "run.json").exists():
        return runs.resume(out, workers=job.workers, console=console, watch=watch, kept=kept)
    config = dataclasses.replace(config, workers=job.workers or config.workers)
    return runs.train(config, out, console, watch, kept)


def _call(job: Job, out: Path, say: Callable[[Report], None]) -> None:
    """A user's function, and its result on disk."""
    import cloudpickle

    from qpool.training.directory import write_json

    out.mkdir(parents=True, exist_ok=True)
    assert job.function is not None
    function = cloudpickle.loads(job.function)

    def listener(step: int, steps: int, figures: dict[str, float]) -> None:
        say(Report(step, steps, figures, figures))

    with progress.listening(out, listener):
        found = progress.as_figures(function(dict(job.settings)))
    write_json(out / "result.json", found)


def _watch(steps: int, say: Callable[[Report], None]) -> Any:
    """Reports now and then, and each evaluation when it is made."""
    said = 0.0

    def watch(step: int, figures: dict[str, float], evaluated: dict[str, float] | None) -> None:
        nonlocal said
        now = time.monotonic()
        if evaluated or step == steps or now - said >= _EVERY:
            said = now
            say(Report(step, steps, figures, evaluated))

    return watch


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """What this process and its libraries print goes to the end of that file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        before = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for handle, own in enumerate(before, 1):
                os.dup2(own, handle)
                os.close(own)


def stop_this_process() -> None:
    """What SIGTERM does: a training run writes a checkpoint first; others end."""
    signal.raise_signal(signal.SIGTERM)


def _words(error: BaseException) -> str:
    """An error for a table: qpool's own say what to do, others are named."""
    return str(error) if isinstance(error, QPoolError) else f"{type(error).__name__}: {error}"


def _is_of_the_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
