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
from qpool.training.campaign.lane import Begin, Stop
from qpool.training.campaign.records import FAILED, FINISHED

#: A run's process. What it imports before it is forked makes a run begin in a second, not in six.
_LANE = Program(
    "qpool.training.campaign.lane",
    (
        "qpool.training.campaign.lane",
        "qpool.training.building",
        "qpool.training.run",
        "qpool.training.trainer",
        "qpool.training.journal",
        "qpool.training.display",
        "qpool.training.plots",
        "qpool.models",
        "qpool.generator",
        "qpool.executors.cpu_batch",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "sklearn.datasets",
    ),
    ChildProcess,
)

#: Seconds between two readings of memory.
_READ_MEMORY = 2.0


class Places(abc.ABC):
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
class _Lane:
    """A process on its cores, with the job that it is at, or none while it waits for another."""

    child: ChildProcess
    cores: tuple[int, ...]
    job: Job | None
    program: str
    stopped: bool = False


class LocalPlaces(Places):
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
        self._launcher = make_launcher(start_method, threads, _LANE)
        self._launcher.prepare()
        self._lanes: dict[int, _Lane] = {}
        self._compiled: set[str] = set()
        self._largest = 0
        self._read = 0.0

    def ready(self, job: Job) -> bool:
        if job.program and job.program not in self._compiled:
            lanes = self._lanes.values()
            if any(lane.job and lane.program == job.program for lane in lanes):
                return False
        return self._launcher.ready(wait=False) and self._fits()

    def start(self, job: Job) -> None:
        number = self._place(job.program)
        lane = self._lanes.get(number)
        if lane is None:
            child = self._launcher.launch(number)
            lane = self._lanes[number] = _Lane(child, self._cores[number], job, job.program)
        lane.job = job
        compiled = not job.program or job.program in self._compiled
        pinned = lane.cores if hasattr(os, "sched_setaffinity") else ()
        wide = pinned if compiled or not pinned else self._all
        with contextlib.suppress(OSError):  # it has ended, and ``wait`` will say so
            lane.child.send(Begin(job, pinned, wide, self._threads, os.getpid(), tuple(sys.path)))

    def _place(self, program: str) -> int:
        """A free place, one whose process has the program where there is one; of another program
        the process goes."""
        free = [n for n in range(self.count) if n not in self._lanes or not self._lanes[n].job]
        for number in free:
            if program and number in self._lanes and self._lanes[number].program == program:
                return number
        number = min(free, key=lambda n: n in self._lanes)
        self._end(number)
        return number

    def _end(self, number: int) -> str:
        """End the process at a place, if there is one; how it ended."""
        lane = self._lanes.pop(number, None)
        if lane is None:
            return ""
        lane.child.kill()
        return lane.child.collect()

    def wait(self, seconds: float) -> list[tuple[str, Report | Ended]]:
        channels: dict[Any, int] = {lane.child.channel: n for n, lane in self._lanes.items()}
        said: list[tuple[str, Report | Ended]] = []
        if not any(lane.job for lane in self._lanes.values()):
            time.sleep(seconds)
            return said
        for channel in multiprocessing.connection.wait(list(channels), seconds):
            number = channels[channel]
            lane = self._lanes[number]
            message: Report | Ended
            try:
                message = lane.child.receive()
            except (EOFError, OSError):
                message = Ended(FAILED, f"its process {lane.child.collect()}")
                del self._lanes[number]
            if lane.job is None:
                continue  # it ended while it waited
            if isinstance(message, Ended) and message.state != FINISHED:
                self._end(number)  # nothing is known of the state that it is in
            said.append((lane.job.name, message))
            self._compiled.add(lane.program)
            if isinstance(message, Ended):
                lane.job = None
                if not lane.program or lane.stopped:
                    self._end(number)
        self._read_memory()
        return said

    def _at(self, name: str) -> int:
        return next(n for n, lane in self._lanes.items() if lane.job and lane.job.name == name)

    def stop(self, name: str) -> None:
        lane = self._lanes[self._at(name)]
        lane.stopped = True
        with contextlib.suppress(OSError):  # it has ended, and ``wait`` will say so
            lane.child.send(Stop())

    def kill(self, name: str) -> None:
        self._end(self._at(name))

    def close(self) -> None:
        for number in list(self._lanes):
            self._end(number)
        self._launcher.close()

    def _fits(self) -> bool:
        import psutil

        return packing.fits(psutil.virtual_memory().available, len(self._lanes), self._largest)

    def _read_memory(self) -> None:
        import psutil

        if time.monotonic() - self._read < _READ_MEMORY:
            return
        self._read = time.monotonic()
        for lane in self._lanes.values():
            try:
                process = psutil.Process(lane.child.pid)
                held = [p.memory_info() for p in (process, *process.children(recursive=True))]
            except psutil.Error:
                continue
            own = sum(info.rss - getattr(info, "shared", 0) for info in held)
            self._largest = max(self._largest, own)


def make(
    *,
    cores: Sequence[int],
    each: int,
    most: int | None = None,
    threads: int = 1,
    start_method: str | None = None,
    address: str | None = None,
    ray: bool = False,
) -> Places:
    """Places on this machine's ``cores``, ``each`` of them a run; with ``ray``, on a cluster's.

    ``threads`` bounds what a run's process takes by itself; a pool of its own has more.
    """
    if not ray:
        return LocalPlaces(cores, each, most, threads, start_method)
    from qpool.training.campaign.on_ray import RayPlaces

    return RayPlaces(address, each, most, threads)
