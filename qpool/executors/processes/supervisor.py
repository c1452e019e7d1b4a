"""The workers' lives: started, greeted, warmed, awaited, buried and replaced.

    launched --Hello--> rehearsing --Rehearsed--> ready --death, or silence--> buried, vacant
       ^                                                                          |
       `---------------- as soon as it can be without anybody waiting for it -----'

Owns processes, channels and deadlines, and turns what happens on them into the events that
``dispatch`` decides on. Knows nothing of tiles, arrays or TensorFlow.

A worker is dead, and known to be, before what it was given is given to another: there is no late
write. An exception in the middle of anything here (Ctrl-C) leaves nothing worse than a worker that
is killed and replaced: what is vacant is seen, not remembered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from qpool.children.condition import STOPPED_TIMEOUT, is_stopped
from qpool.children.launchers import Launcher
from qpool.children.process import WorkerProcess
from qpool.executors.devices import Seat
from qpool.executors.processes.dispatch import Event, Finished, Joined, Lost, Raised
from qpool.executors.processes.timeouts import Timeouts
from workers.errors import PoolClosedError, StartupError
from workers.exchange import protocol
from workers.exchange.arena import Segment
from workers.exchange.faults import Fault
from workers.exchange.waiting import Waiter

log = logging.getLogger("qpool")

#: Seconds for a worker to come up: an interpreter, TensorFlow, the models and their compiling.
START_TIMEOUT = 600.0

#: Seconds for workers to end by themselves when the pool closes.
_CLOSE_TIMEOUT = 2.0

#: Consecutive failed starts after which a pool stops trying for a while, and the seconds of that.
_FAILED_STARTS = 3
_PAUSE = 60.0

#: Seconds between looks at the progress counters while nothing is heard, and while a place is
#: vacant that could not be filled at once.
_LOOK = 2.0
_SHORT_LOOK = 0.05

#: For so many seconds after the last tile of a new kind a worker counts as warming up: its size is
#: the largest that it had then.
_WARM_SECONDS = 30.0


@dataclasses.dataclass
class Measured:
    """What a worker reported: seconds of compute, its CPU seconds, its own bytes of memory."""

    compute: float = 0.0
    cpu: float = 0.0
    memory: int = 0


class Supervisor:
    """The workers of one pool, by number.

    ``progress`` tells the tiles that the worker in a slot has finished; ``rehearsal`` what a new
    worker should be told before it takes part. ``growth``: a worker whose own memory exceeds so
    many times its warmed-up size is replaced between steps. ``spin``: seconds that a worker polls
    for its next message before it sleeps.
    """

    def __init__(
        self,
        launcher: Launcher,
        seats: Sequence[Seat],
        threads: int,
        timeouts: Timeouts,
        growth: float,
        spin: float,
    ) -> None:
        self.launcher = launcher
        self.ready: dict[int, WorkerProcess] = {}
        self.measured = {number: Measured() for number in range(len(seats))}
        self.replaced = 0
        self.retired = 0
        self.silenced = 0
        #: Faults for the workers launched next, one entry each: only tests have any.
        self.faults_at_start: deque[tuple[Fault, ...]] = deque()
        self._seats = seats
        self._threads = threads
        self._timeouts = timeouts
        self._growth = growth
        self._spin = spin
        self._joining: dict[int, WorkerProcess] = {}
        #: Successors of workers that are still at work and to be retired.
        self._standby: dict[int, WorkerProcess] = {}
        self._places = (self.ready, self._joining, self._standby)
        #: Numbers whose last rehearsal ended badly: the next worker joins without one.
        self._unrehearsed: set[int] = set()
        self._failed_starts = 0
        self._retry_at = 0.0
        self._starting = False
        self._closed = False
        #: Seconds of waiting that no worker's silence has been charged with yet.
        self._unjudged = 0.0
        self._waiter: Waiter[WorkerProcess] = Waiter()
        self._owner = os.getpid()
        self._segment: Callable[[], Segment]
        self._progress: Callable[[int], int]
        self._rehearsal: Callable[[WorkerProcess], list[Any]]

    # -- life ------------------------------------------------------------------------------

    def start(
        self,
        segment: Callable[[], Segment],
        progress: Callable[[int], int],
        rehearsal: Callable[[WorkerProcess], list[Any]],
    ) -> None:
        """Launch every worker and wait for each one's Hello."""
        self._segment, self._progress, self._rehearsal = segment, progress, rehearsal
        self._starting = True
        while len(self.ready) < len(self._seats):
            self.events()
        self._starting = False

    def close(self) -> None:
        """Tell all to stop, and kill those that do not. Does nothing in a forked copy."""
        if os.getpid() != self._owner:
            return
        self._closed = True
        everyone = self._everyone()
        for worker in everyone:
            with contextlib.suppress(OSError, ValueError):
                worker.send(protocol.Stop())
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        for worker in everyone:
            with contextlib.suppress(OSError, EOFError):
                while worker.channel.poll(max(0.0, deadline - time.monotonic())):
                    worker.channel.recv_bytes()
            worker.kill()
        for worker in everyone:
            worker.collect()
        self.ready.clear()
        self._joining.clear()
        self._standby.clear()
        self.launcher.close()

    def bury(self, worker: WorkerProcess) -> Lost:
        """A worker is lost: see that it is dead, and say how it ended. Its place is vacant."""
        cause = self._end(worker)
        self.replaced += 1
        first, _, more = cause.partition("\n")
        log.warning("%s; its tiles run again elsewhere, and a new worker is started", first)
        if more:
            log.info("its traceback:\n%s", more)
        return Lost(worker.number, cause, self._progress(worker.number) - worker.answered)

    def _end(self, worker: WorkerProcess) -> str:
        """Kill a worker, forget it, and say how it ended."""
        worker.kill()
        for place in self._places:
            if place.get(worker.number) is worker:
                del place[worker.number]
        self._waiter.remove(worker)
        return f"worker {worker.number} (pid {worker.pid}) {worker.collect()}"

    def _fill(self) -> None:
        """Launch a worker for each vacant place, where nobody has to wait for that."""
        if len(self.ready) == len(self._seats):
            return
        vacant = [
            number
            for number in range(len(self._seats))
            if number not in self.ready and number not in self._joining
        ]
        if not vacant:
            return
        alone = not self.ready and not self._joining
        if not alone and time.monotonic() < self._retry_at:
            return
        try:
            if self.launcher.ready(wait=alone):
                for number in vacant:
                    self._launch(number)
        except StartupError as error:
            self._start_failed(str(error))

    def _launch(self, number: int) -> None:
        segment = self._segment()
        worker = self.launcher.launch(number, segment.handle)
        worker.told["segment"] = segment
        start = protocol.Start(
            worker=number,
            slot=number,
            cores=self._seats[number].cores,
            device=self._seats[number].device,
            threads=self._threads,
            coordinator=os.getpid(),
            segment=segment,
            path=tuple(sys.path),
            spin=self._spin,
            faults=self.faults_at_start.popleft() if self.faults_at_start else (),
        )
        self._joining[number] = worker
        self._waiter.add(worker, worker.channel, worker.handle)
        with contextlib.suppress(OSError):  # dead already: its end of file will be seen
            worker.send(start)

    def _start_failed(self, cause: str) -> None:
        self._failed_starts += 1
        if self._failed_starts < _FAILED_STARTS:
            log.warning("%s; trying again", cause.partition("\n")[0])
            return
        self._failed_starts = 0
        if self._starting or not (self.ready or self._joining):
            raise StartupError(
                f"{_FAILED_STARTS} workers in a row did not come up; expected each to import "
                f"TensorFlow and Strawberry Fields and to say so. The last one: {cause}"
            )
        self._retry_at = time.monotonic() + _PAUSE
        log.warning(
            "%d workers in a row did not come up (%s); going on with %d of %d, the next try is in "
            "%.0f s",
            _FAILED_STARTS,
            cause.partition("\n")[0],
            len(self.ready),
            len(self._seats),
            _PAUSE,
        )

    # -- messages --------------------------------------------------------------------------

    def send(
        self,
        worker: WorkerProcess,
        ticket: int,
        messages: Sequence[Any],
        kinds: Sequence[Hashable],
    ) -> None:
        """Send messages, the last of which is answered under ``ticket``; OSError if it is dead.

        ``kinds`` are those of the tiles asked for, in order (see ``timeouts``).
        """
        if not worker.owed:
            worker.silent = (0.0, worker.answered)
        worker.owed[ticket] = tuple(kinds)
        for message in messages:
            worker.send(message)

    def settle(self) -> None:
        """Wait for answers that an interrupted call left behind; exchange workers that grew."""
        while any(worker.owed for worker in self.ready.values()):
            self.events()
        for number, worker in list(self._standby.items()):
            if number in self.ready:
                self._end(self.ready[number])
            del self._standby[number]
            self._admit(worker)
        for number, worker in self.ready.items():
            outgrown = worker.memory > self._growth * worker.warm_memory > 0
            if not outgrown or number in self._joining:
                continue
            with contextlib.suppress(StartupError):  # then at a later call
                if self.launcher.ready(wait=False):
                    self._launch(number)
                    worker.warm_memory = 0
                    self.retired += 1
                    log.warning(
                        "worker %d (pid %d) has grown to %.0f MiB, more than %g times its size "
                        "when it was warm; a new one takes over",
                        number,
                        worker.pid,
                        worker.memory / 2**20,
                        self._growth,
                    )

    def events(self) -> list[tuple[Event, Any]]:
        """Wait until something is heard, or for a while, and say what happened."""
        happened: list[tuple[Event, Any]] = []
        if self._closed:
            raise PoolClosedError("the pool was closed while a call was under way")
        for worker in self._wait():
            takes_part = self.ready.get(worker.number) is worker
            try:
                reply = worker.receive(ended=worker in self._waiter.ended)
                worker.silent = (0.0, getattr(reply, "finished", worker.silent[1]))
                event = self._event(worker, reply) if takes_part else self._joins(worker, reply)
            except (EOFError, OSError):
                if takes_part:
                    happened.append((self.bury(worker), None))
                else:
                    self._lost_joining(worker)
                continue
            except BaseException:
                worker.kill()  # half a message may have been read, or a whole one not noted
                raise
            if event is not None:
                happened.append((event, reply))
        return happened

    def _event(self, worker: WorkerProcess, reply: Any) -> Event | None:
        if worker.note_last_words(reply):
            return None
        if isinstance(reply, protocol.Failed) and not reply.ticket:
            # A model or a plan failed; the message that needs it will too, and is due to this.
            worker.failure = worker.failure or reply.error
            worker.told = {"segment": worker.told["segment"]}
            return None
        kinds = worker.owed.pop(reply.ticket)
        worker.answered = reply.finished
        if isinstance(reply, protocol.Failed):
            error, worker.failure = worker.failure or reply.error, None
            return Raised(worker.number, reply.ticket, error)
        if isinstance(reply, protocol.Computed):
            self._measure(worker, reply, kinds)
        return Finished(worker.number, reply.ticket)

    def _measure(
        self, worker: WorkerProcess, reply: protocol.Computed, kinds: Sequence[Hashable]
    ) -> None:
        measured = self.measured[worker.number]
        measured.compute += reply.seconds
        measured.cpu = reply.cpu_seconds
        measured.memory = worker.memory = reply.memory
        for kind, seconds in zip(kinds, reply.tile_seconds, strict=True):
            if kind in worker.seen:
                self._timeouts.learn(kind, seconds)
        now = time.monotonic()
        if not worker.seen.issuperset(kinds):
            worker.seen.update(kinds)
            worker.new_until, worker.warm_memory = now, 0
        if now - worker.new_until < _WARM_SECONDS:
            worker.warm_memory = max(worker.warm_memory, reply.memory)

    def stats(self) -> list[dict[str, Any]]:
        """What is known of each worker, by number; see ``Pool.stats``."""
        found = []
        for number, measured in self.measured.items():
            worker = self.ready.get(number)
            hello = worker.hello if worker is not None else None
            found.append(
                {
                    "worker": number,
                    "pid": hello.pid if hello else None,
                    "cores": hello.cores if hello else (),
                    "device": self._seats[number].device,
                    "pinned": bool(hello and hello.pinned),
                    "threads": hello.threads if hello else {},
                    "versions": hello.versions if hello else {},
                    "import_seconds": hello.import_seconds if hello else 0.0,
                    "compute_seconds": measured.compute,
                    "cpu_seconds": worker.cpu_seconds() if worker else measured.cpu,
                    "cpu_use": worker.cpu_use() if worker else 0.0,
                    "memory_bytes": measured.memory,
                }
            )
        return found

    # -- joining ---------------------------------------------------------------------------

    def _joins(self, worker: WorkerProcess, reply: Any) -> Event | None:
        """Greet a new worker, have it rehearse, then let it take part."""
        if worker.note_last_words(reply):
            return None
        if isinstance(reply, protocol.Failed):  # it will be told again, and then it matters
            log.warning("new worker %d could not rehearse: %s", worker.number, reply.error)
            worker.told = {"segment": worker.told["segment"]}
            worker.seen.clear()
            return None
        if isinstance(reply, protocol.Hello):
            self._greet(worker, reply)
            if worker.number not in self._unrehearsed and (news := self._rehearsal(worker)):
                for message in [*news, protocol.Confirm(0, None)]:
                    worker.send(message)
                return None
        del self._joining[worker.number]
        if worker.number in self.ready:
            self._standby[worker.number] = worker
            return None
        return self._admit(worker)

    def _greet(self, worker: WorkerProcess, hello: protocol.Hello) -> None:
        worker.hello = hello
        worker.greeted = time.monotonic(), worker.cpu_seconds()
        wanted = self._seats[worker.number].cores
        if wanted and not hello.pinned:
            log.warning(
                "worker %d asked for cores %s and is on %s", worker.number, wanted, hello.cores
            )

    def _admit(self, worker: WorkerProcess) -> Event:
        worker.answered = self._progress(worker.number)
        self.ready[worker.number] = worker
        self._unrehearsed.discard(worker.number)
        self._failed_starts = 0
        return Joined(worker.number)

    def _lost_joining(self, worker: WorkerProcess) -> None:
        if worker.hello is not None:
            self._unrehearsed.add(worker.number)
        self._start_failed(f"{self._end(worker)}, while starting")

    # -- waiting ---------------------------------------------------------------------------

    def _wait(self) -> list[WorkerProcess]:
        """Workers that can be read, after a while if need be; silent ones are killed, then seen."""
        self._fill()
        whole = len(self.ready) + len(self._joining) >= len(self._seats)
        look = min(_LOOK, (self._timeouts.fixed or _LOOK) / 4)
        began = time.monotonic()
        heard = self._waiter.wait(look if whole else _SHORT_LOOK)
        # A coordinator that was stopped, or a machine that slept, heard nothing for that reason.
        self._unjudged += min(time.monotonic() - began, look + 1.0)
        if self._unjudged >= look:
            for worker in self._everyone():
                if worker not in heard:
                    self._judge(worker, self._unjudged)
            self._unjudged = 0.0
        known = []
        for worker in heard:
            if any(place.get(worker.number) is worker for place in self._places):
                known.append(worker)
            else:
                self._waiter.remove(worker)
        return known

    def _everyone(self) -> list[WorkerProcess]:
        return [worker for place in self._places for worker in place.values()]

    def _judge(self, worker: WorkerProcess, waited: float) -> None:
        """Add to a busy worker's silence, and end it if that has become too long."""
        joining = self._joining.get(worker.number) is worker
        if not worker.owed and not joining:
            return
        progress = self._progress(worker.number)
        silence, seen = worker.silent
        silence = 0.0 if progress != seen and not joining else silence + waited
        worker.silent = (silence, progress)
        kinds: list[Hashable] = [None]
        now = 0
        if joining:
            allowed = START_TIMEOUT
        else:
            kinds = [kind for kinds in worker.owed.values() for kind in kinds] or [None]
            now = min(progress - worker.answered, len(kinds) - 1)
            first = kinds[now] not in worker.seen and kinds[now] not in kinds[:now]
            allowed = self._timeouts.seconds(kinds[now], first=first)
        stopped = STOPPED_TIMEOUT < silence <= allowed and is_stopped(worker.pid)
        if stopped or silence > allowed:
            log.warning(
                "worker %d (pid %d) %s for %.0f s, and is killed%s",
                worker.number,
                worker.pid,
                "was stopped" if stopped else "finished nothing",
                silence,
                "" if stopped else " (timeout=)",
            )
            if not stopped:
                self._timeouts.stretch(kinds[now], allowed)
            self.silenced += 1
            worker.kill()
