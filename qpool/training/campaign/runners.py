"""Where runs are placed: on cores of this machine, each in a process of its own.

Owns starting, hearing and ending those processes. Which run is next is ``campaign``'s.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import multiprocessing.connection
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from qpool.children.launchers import Program, make_launcher
from qpool.children.process import ChildProcess
from qpool.training.campaign import packing
from qpool.training.campaign.job import Ended, Job, Report
from qpool.training.campaign.records import FAILED, FINISHED
from qpool.training.campaign.runner import Begin, Stop

#: A run's process. What it imports before it is forked makes a run begin in a second, not in six.
_RUNNER = Program(
    "qpool.training.campaign.runner",
    (
        "qpool.training.campaign.runner",
        "qpool.training.building",
        "qpool.training.run",
        "qpool.training.trainer",
        "qpool.training.journal",
        "qpool.training.display",
        "qpool.training.plots",
        "qpool.models",
        "qpool.generator",
        "qpool.executors.in_place.cpu_batch",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "sklearn.datasets",
    ),
    ChildProcess,
)

#: Seconds between two readings of memory.
_READ_MEMORY = 2.0


class Runners(abc.ABC):
    """Runs by name, each at a place until it has ended."""

    #: How many runs there is room for at all, and how many cores one of them has.
    count: int
    cores_each: int

    @abc.abstractmethod
    def ready(self, job: Job) -> bool:
        """Whether that run would begin at once, if it were started now at a free place."""

    @abc.abstractmethod
    def start(self, job: Job) -> None:
        """Begin a run at a free place."""

    @abc.abstractmethod
    def wait(self, seconds: float) -> list[tuple[str, Report | Ended]]:
        """What the runs said, waiting for so long at most. A run has ended when it says so, and
        then its place is free."""

    @abc.abstractmethod
    def stop(self, name: str) -> None:
        """Ask a run to end, with a checkpoint where it can."""

    @abc.abstractmethod
    def kill(self, name: str) -> None:
        """End a run now; it says nothing any more, and its place is free."""

    @abc.abstractmethod
    def close(self) -> None:
        """End all that is left."""


@dataclasses.dataclass
class _Runner:
    """A process on its cores, with the job that it is at, or none while it waits for another."""

    child: ChildProcess
    cores: tuple[int, ...]
    job: Job | None
    program: str
    stopped: bool = False


class LocalRunners(Runners):
    """Processes of this machine, pinned apart.

    The first job of a program compiles it, on all cores; others of it wait until it has, and find
    it on disk, or in the process that they follow in.
    """

    def __init__(
        self,
        cores: Sequence[int],
        each: int,
        most: int | None,
        threads: int,
        start_method: str | None,
    ) -> None:
        self._all = tuple(cores)
        self._threads = threads
        self._cores = packing.places(cores, each, most)
        self.count = len(self._cores)
        self.cores_each = max(len(place) for place in self._cores)
        self._launcher = make_launcher(start_method, threads, _RUNNER)
        self._launcher.prepare()
        self._runners: dict[int, _Runner] = {}
        self._compiled: set[str] = set()
        self._largest = 0
        self._read = 0.0

    def ready(self, job: Job) -> bool:
        if job.program and job.program not in self._compiled:
            runners = self._runners.values()
            if any(runner.job and runner.program == job.program for runner in runners):
                return False
        return self._launcher.ready(wait=False) and self._fits()

    def start(self, job: Job) -> None:
        number = self._place(job.program)
        runner = self._runners.get(number)
        if runner is None:
            child = self._launcher.launch(number)
            runner = self._runners[number] = _Runner(child, self._cores[number], job, job.program)
        runner.job = job
        compiled = not job.program or job.program in self._compiled
        pinned = runner.cores if hasattr(os, "sched_setaffinity") else ()
        wide = pinned if compiled or not pinned else self._all
        with contextlib.suppress(OSError):  # it has ended, and ``wait`` will say so
            runner.child.send(Begin(job, pinned, wide, self._threads, os.getpid(), tuple(sys.path)))

    def _place(self, program: str) -> int:
        """A free place, one whose process has the program where there is one; of another program
        the process goes."""
        free = [n for n in range(self.count) if n not in self._runners or not self._runners[n].job]
        for number in free:
            if program and number in self._runners and self._runners[number].program == program:
                return number
        number = min(free, key=lambda n: n in self._runners)
        self._end(number)
        return number

    def _end(self, number: int) -> str:
        """End the process at a place, if there is one; how it ended."""
        runner = self._runners.pop(number, None)
        if runner is None:
            return ""
        runner.child.kill()
        return runner.child.collect()

    def wait(self, seconds: float) -> list[tuple[str, Report | Ended]]:
        channels: dict[Any, int] = {runner.child.channel: n for n, runner in self._runners.items()}
        said: list[tuple[str, Report | Ended]] = []
        if not any(runner.job for runner in self._runners.values()):
            time.sleep(seconds)
            return said
        for channel in multiprocessing.connection.wait(list(channels), seconds):
            number = channels[channel]
            runner = self._runners[number]
            message: Report | Ended
            try:
                message = runner.child.receive()
            except (EOFError, OSError):
                message = Ended(FAILED, f"its process {runner.child.collect()}")
                del self._runners[number]
            if runner.job is None:
                continue  # it ended while it waited
            if isinstance(message, Ended) and message.state != FINISHED:
                self._end(number)  # nothing is known of the state that it is in
            said.append((runner.job.name, message))
            self._compiled.add(runner.program)
            if isinstance(message, Ended):
                runner.job = None
                if not runner.program or runner.stopped:
                    self._end(number)
        self._read_memory()
        return said

    def _at(self, name: str) -> int:
        return next(
            n for n, runner in self._runners.items() if runner.job and runner.job.name == name
        )

    def stop(self, name: str) -> None:
        runner = self._runners[self._at(name)]
        runner.stopped = True
        with contextlib.suppress(OSError):  # it has ended, and ``wait`` will say so
            runner.child.send(Stop())

    def kill(self, name: str) -> None:
        self._end(self._at(name))

    def close(self) -> None:
        for number in list(self._runners):
            self._end(number)
        self._launcher.close()

    def _fits(self) -> bool:
        import psutil

        return packing.fits(psutil.virtual_memory().available, len(self._runners), self._largest)

    def _read_memory(self) -> None:
        import psutil

        if time.monotonic() - self._read < _READ_MEMORY:
            return
        self._read = time.monotonic()
        for runner in self._runners.values():
            try:
                process = psutil.Process(runner.child.pid)
                held = [p.memory_info() for p in (process, *process.children(recursive=True))]
            except psutil.Error:
                continue
            own = sum(info.rss - getattr(info, "shared", 0) for info in held)
            self._largest = max(self._largest, own)
