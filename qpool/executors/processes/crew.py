"""The workers' lives: started, greeted, awaited, buried and replaced.

    launched --Hello--> ready --death, or silence past the deadline--> buried, successor launched

Owns processes, channels and deadlines, and turns what happens on them into the events that
``dispatch`` decides on. Knows nothing of tiles, arrays or TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from qpool.executors.processes.dispatch import Event, Finished, Joined, Lost, Raised
from qpool.executors.processes.process import Launcher, WorkerProcess
from workers import protocol
from workers.arena import Segment
from workers.errors import StartupError, WorkerLostError
from workers.waiting import Waiter

log = logging.getLogger("qpool")

#: Seconds for a worker to come up: an interpreter, TensorFlow, the model.
START_TIMEOUT = 300.0

#: Seconds for workers to end by themselves when the pool closes.
_CLOSE_TIMEOUT = 2.0

#: Consecutive failed starts after which a pool stops trying to replace a worker.
_FAILED_STARTS = 3

#: Seconds between looks at the progress counters while nothing is heard.
_LOOK = 5.0


@dataclasses.dataclass
class Measured:
    """What a worker reported: seconds of compute, and its CPU seconds."""

    compute: float = 0.0
    cpu: float = 0.0


class Crew:
    """The workers of one pool, by number.

    ``timeout`` is how long a busy worker may go without finishing a tile, as ``progress`` (slot
    -> tiles finished) tells.
    """

    def __init__(
        self,
        launcher: Launcher,
        cores: Sequence[tuple[int, ...]],
        threads: int,
        timeout: float,
    ) -> None:
        self.launcher = launcher
        self.ready: dict[int, WorkerProcess] = {}
        self.measured = {number: Measured() for number in range(len(cores))}
        self.replaced = 0
        self._cores = cores
        self._threads = threads
        self._timeout = timeout
        self._joining: dict[int, WorkerProcess] = {}
        #: Worker -> tickets of the messages it has not answered.
        self._owed: dict[int, set[int]] = {}
        self._failed_starts = 0
        self._waiter = Waiter()
        self._owner = os.getpid()
        self._segment: Callable[[], Segment]
        self._progress: Callable[[int], int]

    # -- life ------------------------------------------------------------------------------

    def start(self, segment: Callable[[], Segment], progress: Callable[[int], int]) -> None:
        """Launch every worker and wait for each one's Hello."""
        self._segment, self._progress = segment, progress
        for number in range(len(self._cores)):
            self._launch(number)
        deadline = time.monotonic() + START_TIMEOUT
        while self._joining:
            for worker in self._heard(deadline):
                self._greet(worker)
            if self._joining and time.monotonic() > deadline:
                raise StartupError(
                    f"workers {sorted(self._joining)} did not come up in {START_TIMEOUT:.0f} s"
                )

    def close(self) -> None:
        """Tell all to stop, and kill those that do not. Does nothing in a forked copy."""
        if os.getpid() != self._owner:
            return
        everyone = [*self.ready.values(), *self._joining.values()]
        for worker in everyone:
            with contextlib.suppress(OSError, ValueError):
                worker.send(protocol.Stop())
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        for worker in everyone:
            with contextlib.suppress(OSError, EOFError):
                while worker.channel.poll(max(0.0, deadline - time.monotonic())):
                    worker.channel.recv_bytes()
            worker.kill()
            worker.collect()
        self.ready.clear()
        self._joining.clear()
        self.launcher.close()

    def bury(self, worker: WorkerProcess) -> Lost:
        """A worker is lost: make sure that it is dead, start its successor, say how it ended."""
        worker.kill()
        self._waiter.remove(worker.channel)
        cause = f"worker {worker.number} (pid {worker.pid}) {worker.collect()}"
        self.ready.pop(worker.number, None)
        self._joining.pop(worker.number, None)
        self._owed.pop(worker.number, None)
        self.replaced += 1
        log.warning("%s; its tiles run again elsewhere, and a new worker is started", cause)
        finished = self._progress(worker.number) - worker.answered
        self._launch(worker.number)
        return Lost(worker.number, cause, finished)

    def _launch(self, number: int) -> None:
        segment = self._segment()
        worker = self.launcher.launch(number, segment.handle)
        worker.answered = self._progress(number)
        worker.told["segment"] = segment
        start = protocol.Start(
            worker=number,
            slot=number,
            cores=self._cores[number],
            threads=self._threads,
            coordinator=os.getpid(),
            segment=segment,
            path=tuple(sys.path),
        )
        with contextlib.suppress(OSError):  # dead already: its end of file will be seen
            worker.send(start)
        self._waiter.add(worker.channel)
        self._joining[number] = worker

    def _greet(self, worker: WorkerProcess) -> None:
        """Take a Hello; StartupError if the worker ended instead."""
        del self._joining[worker.number]
        try:
            worker.hello = worker.receive()
        except (EOFError, OSError) as error:
            self._waiter.remove(worker.channel)
            raise StartupError(
                f"worker {worker.number} {worker.collect()} while starting; its own output is above"
            ) from error
        worker.greeted = time.monotonic(), worker.cpu_seconds()
        wanted = self._cores[worker.number]
        if wanted and not worker.hello.pinned:
            log.warning(
                "worker %d asked for cores %s and is on %s",
                worker.number,
                wanted,
                worker.hello.cores,
            )
        self.ready[worker.number] = worker
        self._failed_starts = 0

    # -- messages --------------------------------------------------------------------------

    def send(self, worker: WorkerProcess, ticket: int, messages: Sequence[Any]) -> None:
        """Send messages, the last of which is answered under ``ticket``; OSError if it is dead."""
        self._owed.setdefault(worker.number, set()).add(ticket)
        for message in messages:
            worker.send(message)

    def ask_all(self, messages: dict[int, Sequence[Any]]) -> dict[int, Any]:
        """Send each worker its messages and return the one reply of each.

        All replies are taken before an error is raised. StartupError if a worker ends meanwhile.
        """
        replies: dict[int, Any] = {}
        lost = []
        for number, wanted in messages.items():
            with contextlib.suppress(OSError):
                for message in wanted:
                    self.ready[number].send(message)
        deadline = time.monotonic() + START_TIMEOUT
        waiting = {number: self.ready[number] for number in messages}
        while waiting:
            for worker in self._heard(deadline):
                if worker.number in self._joining:
                    self._try_greet(worker)
                    continue
                del waiting[worker.number]
                try:
                    replies[worker.number] = worker.receive()
                except (EOFError, OSError):
                    lost.append(self.bury(worker).cause)
            if waiting and time.monotonic() > deadline:
                for worker in waiting.values():
                    worker.kill()
                deadline += _CLOSE_TIMEOUT
        if lost:
            raise StartupError(f"{'; '.join(lost)} while building the model")
        return replies

    def settle(self) -> None:
        """Wait for answers that an interrupted call left behind."""
        while self._owed:
            self.events()

    def events(self) -> list[tuple[Event, Any]]:
        """Wait until something happens, and say what: events, with replies where there are any."""
        happened: list[tuple[Event, Any]] = []
        for worker in self._wait():
            if worker.number in self._joining:
                if self._try_greet(worker):
                    happened.append((Joined(worker.number), None))
                continue
            try:
                reply = worker.receive()
            except (EOFError, OSError):
                happened.append((self.bury(worker), None))
                continue
            event = self._event(worker, reply)
            if event is not None:
                happened.append((event, reply))
        return happened

    def _event(self, worker: WorkerProcess, reply: Any) -> Event | None:
        if isinstance(reply, protocol.Built):
            return None
        if isinstance(reply, protocol.Failed) and not reply.ticket:
            # A model or a plan failed; the message that needs it will too, and is due to this.
            worker.failure = worker.failure or reply.error
            worker.told = {"segment": worker.told["segment"]}
            return None
        owed = self._owed[worker.number]
        owed.discard(reply.ticket)
        if not owed:
            del self._owed[worker.number]
        worker.answered = reply.finished
        if isinstance(reply, protocol.Failed):
            error, worker.failure = worker.failure or reply.error, None
            return Raised(worker.number, reply.ticket, error)
        if isinstance(reply, protocol.Computed):
            measured = self.measured[worker.number]
            measured.compute += reply.compute_seconds
            measured.cpu = reply.cpu_seconds
        return Finished(worker.number, reply.ticket)

    def _try_greet(self, worker: WorkerProcess) -> bool:
        try:
            self._greet(worker)
        except StartupError as error:
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                raise
            log.warning("%s; trying again", error)
            self._launch(worker.number)
            return False
        return True

    # -- waiting ---------------------------------------------------------------------------

    def _heard(self, deadline: float) -> list[WorkerProcess]:
        """Workers that have something to say, or have died, by the deadline."""
        channels = self._waiter.wait(max(0.0, deadline - time.monotonic()))
        by_channel = {
            worker.channel: worker for worker in (*self.ready.values(), *self._joining.values())
        }
        return [by_channel[channel] for channel in channels]

    def _wait(self) -> list[WorkerProcess]:
        """Workers that can be read; busy ones silent past the deadline are killed, then seen."""
        heard = self._heard(time.monotonic() + min(self._timeout, _LOOK))
        began = time.monotonic()
        progress = {number: self._progress(number) for number in self._owed}
        while not heard:
            if not self._owed and not self._joining:
                raise WorkerLostError("no worker is left and none is starting")
            for number, tiles in progress.items():
                if self._progress(number) != tiles:
                    progress[number] = self._progress(number)
                    began = time.monotonic()
            silent = time.monotonic() - began
            if self._owed and silent > self._timeout:
                for worker in [self.ready[number] for number in self._owed]:
                    log.warning(
                        "worker %d (pid %d) finished no tile for %.0f s (timeout=); it is killed",
                        worker.number,
                        worker.pid,
                        silent,
                    )
                    worker.kill()
            elif not self._owed and silent > START_TIMEOUT:
                raise StartupError(f"no worker came up in {START_TIMEOUT:.0f} s")
            heard = self._heard(time.monotonic() + min(self._timeout, _LOOK))
        return heard
