"""The pool: batches sent through persistent workers, over one pipe each, and shared memory.

Owns what is public of it, and that workers are up and told what they need. A batch's way is
``arena_pool``'s, the workers' lives are ``supervisor``'s, what to do when a worker is lost is
``dispatch``'s, and TensorFlow is ``gradient``'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from qpool.children.launchers import Launcher, make_launcher
from qpool.executors import topology
from qpool.executors.arena_pool import ArenaPool, Assignment
from qpool.executors.devices import Seat, parse
from qpool.executors.processes.claims import Claims
from qpool.executors.processes.perform import Message, Performer, Work
from qpool.executors.processes.supervisor import Supervisor
from qpool.executors.processes.timeouts import Timeouts
from qpool.executors.shared_arrays import SharedArrays
from workers.errors import ConfigurationError, PoolClosedError
from workers.exchange import protocol
from workers.exchange.faults import Fault
from workers.exchange.protocol import Kind
from workers.exchange.waiting import SPIN_SECONDS

log = logging.getLogger("qpool")


class Pool(ArenaPool):
    """Persistent worker processes, shared by any number of models.

    ``workers`` is how many (default: the physical cores of this process's CPU budget),
    ``threads`` how many threads and cores each gets. ``start_method`` is ``"forkserver"``
    (Linux's default), ``"spawn"`` or None. Workers are pinned to cores that
    no other pool of this machine is pinned to, if there are enough (``pin=True``: in any case;
    False: the system places them).
    ``timeout`` is how many seconds a worker may go without progress before it is replaced; the
    default follows from how long its tiles have taken: fifty times the slowest, between ten
    seconds and ten minutes. A worker's first tile of a shape, which may have to be compiled, has
    ten minutes in any case. ``max_growth``: a worker whose own memory has grown to more than so
    many times its size when it was warm is replaced between two calls.
    ``seed`` starts the random draws of models that draw. ``devices``, in place of ``workers``, says
    what each worker computes on: ``["cpu:0-13", "gpu:0"]`` (see ``qpool.executors.devices``).
    Shards then follow measured speed, and the same bits are not promised.

    The processes start when the first model comes or with ``start``, whichever is first; what
    they import is loaded in the background from now on. On Linux they are forks of a process that
    has it loaded, which all pools of a program share; after the last one is closed it is kept for a
    minute, for the next.
    Use it as a context manager, or call ``close``; an interpreter that exits closes it too.

        with qpool.Pool(workers=14) as pool:
            generator = qpool.parallelize(model, pool=pool)
            critic = qpool.parallelize(other, pool=pool)

    Raises:
        ConfigurationError: no such number of workers or threads, start method, device or time.
        StartupError: workers end as they start, again and again (from ``start``, or a call).
        PoolClosedError: it is used after ``close``.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        threads: int = 1,
        start_method: str | None = None,
        pin: bool | None = None,
        timeout: float | None = None,
        max_growth: float = 2.0,
        seed: int = 0,
        devices: Sequence[str] | None = None,
    ) -> None:
        budget = topology.budget()
        seats = None
        if devices is not None:
            if workers is not None:
                raise ConfigurationError(
                    f"devices= says how many workers there are; leave workers={workers} out"
                )
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            seats = parse(devices, budget.cpus, threads, visible)
            workers = len(seats)
        count = budget.workers if workers is None else workers
        launcher = check(count, threads, start_method, timeout)
        if not max_growth > 1:
            raise ConfigurationError(f"max_growth must be more than 1, not {max_growth!r}")
        if seats is None and count * threads > len(budget.cpus):
            warnings.warn(
                f"{count} workers of {threads} thread(s) on {len(budget.cpus)} CPUs: they will "
                "share cores, unpinned, and be slower than fewer workers",
                RuntimeWarning,
                stacklevel=2,
            )
        super().__init__(seed)
        self._count = count
        claims = Claims()
        if seats is None:
            seats = self._seats(count, threads, budget, pin, claims)
        elif pin is False:
            seats = [Seat(seat.device, ()) for seat in seats]
        self._mixed = len({seat.device.partition(":")[0] for seat in seats}) > 1
        if self._mixed:
            log.warning(
                "workers on different devices: who computes a tile follows measured speed, and the "
                "same bits are not promised"
            )
        launcher.prepare()
        # Where workers take every core, the coordinator is woken on one of theirs.
        spin = SPIN_SECONDS if count * threads < len(budget.cpus) else 0.0
        self._supervisor = Supervisor(launcher, seats, threads, Timeouts(timeout), max_growth, spin)
        self._performer: Performer | None = None
        self._started: float | None = None
        self._closed = False
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _let_go, self._supervisor, claims)

    @staticmethod
    def _seats(
        count: int, threads: int, budget: topology.Budget, pin: bool | None, claims: Claims
    ) -> list[Seat]:
        """Cores for workers that are all alike."""
        cores = topology.assign(count, () if pin is False else budget.cpus, threads)
        if cores[0] and not pin:
            cores = topology.assign(count, claims.take(budget.cpus, count * threads), threads)
            if not cores[0]:
                log.warning(
                    "other pools of this machine are pinned to cores that this one needs: its "
                    "workers are not pinned (pin=True pins them in any case)"
                )
        return [Seat("cpu", own) for own in cores]

    # -- life ------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """How many workers the pool has."""
        return self._count

    @property
    def closed(self) -> bool:
        """Whether the pool was closed."""
        return self._closed

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "running" if self._started else "not started"
        return f"<qpool.Pool of {self._count} workers, {self._supervisor.launcher.name}, {state}>"

    def start(self) -> Pool:
        """Start the workers and wait until each has said who it is. Does nothing twice."""
        with self._lock:
            self._check_open()
            if self._started is None:
                try:
                    shared = SharedArrays(self._count)
                    performer = self._performer = Performer(self._supervisor, shared, self.seed)
                    if self._mixed:
                        performer.speeds = dict.fromkeys(range(self._count), 1.0)
                    self._supervisor.start(
                        lambda: shared.segment, shared.progress, performer.rehearsal
                    )
                except BaseException:
                    self.close()
                    raise
                self._started = time.monotonic()
            return self

    def close(self) -> None:
        """End the workers and free the arena. Calling it again does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._finalizer()
                if self._performer is not None:
                    self._performer.shared.arena.close()

    # -- models ----------------------------------------------------------------------------

    def add(self, shipment: bytes, weights: Sequence[np.ndarray], engine: str) -> int:
        """Build a replica of a model in every worker and return the model's number."""
        with self._lock:
            shared = self._ready()
            number = next(self._numbers)
            shared.add(number, shipment, weights, engine)
            self._performing().forget_rehearsals()

            def message(ticket: int, _tiles: tuple[int, ...]) -> protocol.Confirm:
                return protocol.Confirm(ticket, number)

            try:
                self._on_all(Work(number), message)
            except BaseException:
                self.discard(number)
                raise
            return number

    def discard(self, number: int) -> None:
        """Forget a model everywhere."""
        with self._lock:
            performer = self._performer
            if self._closed or performer is None or not performer.shared.remove(number):
                return
            self._drop_plans(number)
            performer.forget_rehearsals(number)
            for worker in self._supervisor.ready.values():
                worker.told.pop(("model", number), None)
                with contextlib.suppress(OSError):
                    worker.send(protocol.Discard(number))

    def inject(self, worker: int, *faults: Fault) -> None:
        """Have a worker fail on purpose, at its next work. For tests and ``scripts/soak``."""
        with self._lock, contextlib.suppress(OSError, KeyError):
            self._supervisor.ready[worker].send(protocol.Inject(faults))

    # -- measuring -------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What was measured since the pool started.

        ``seconds`` of the coordinator's wall time by phase; per worker its pid, cores, seconds of
        compute, ``cpu_seconds`` as the system counts them, and ``cpu_use``: CPU seconds over wall
        seconds since it said Hello.
        """
        with self._lock:
            counters = self._counters.by_name()
            performer = self._performer
            copying = counters.pop("seconds")
            seconds = {
                "copy_in": copying["copy_in"],
                "weights": copying["weights"],
                "send": performer.sending if performer else 0.0,
                "wait": performer.waiting if performer else 0.0,
                "copy_out": copying["copy_out"],
            }
            return {
                "start_method": self._supervisor.launcher.name,
                "elapsed_seconds": time.monotonic() - self._started if self._started else 0.0,
                "seconds": seconds,
                **counters,
                "replaced_workers": self._supervisor.replaced,
                "silent_workers": self._supervisor.silenced,
                "outgrown_workers": self._supervisor.retired,
                "retried_tiles": performer.retried if performer else 0,
                "segment_bytes": performer.shared.arena.size if performer else 0,
                "workers": self._supervisor.stats(),
            }

    # -- within ----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError("the pool is closed; make a new one")
        if os.getpid() != self._owner:
            raise PoolClosedError(
                "this pool belongs to the process that made it; make one in this process"
            )

    def _ready(self) -> SharedArrays:
        """The arena's arrays, when the workers are up and none still writes for an interrupted
        call."""
        self.start()
        self._supervisor.settle()
        if forgotten := self._let_go_of_models_and_calls():
            for worker in self._supervisor.ready.values():
                with contextlib.suppress(OSError):
                    worker.send(protocol.Forget(forgotten))
        return self._performing().shared

    def _on_all(self, work: Work, message: Message) -> list[Any]:
        """The replies of all workers that are ready, each of which is assigned one tile. Where none
        is, an unassigned tile waits for the next one."""
        assignment: Assignment = {
            n: (place,) for place, n in enumerate(sorted(self._supervisor.ready))
        }
        number = max(len(assignment), 1)
        return self._performing().perform(work, number, message, assignment)[1]

    def _performing(self) -> Performer:
        assert self._performer is not None, "the pool has been started"
        return self._performer

    def _probe(
        self,
        plan: protocol.Plan,
        frame: protocol.Frame,
        version: int,
        purpose: protocol.Purpose,
    ) -> protocol.Probed:
        """What the first worker reports. All of them do it, since each has to trace what it is to
        compute; one of them compiles it."""

        def message(ticket: int, places: tuple[int, ...]) -> protocol.Probe:
            return protocol.Probe(
                ticket,
                plan.plan,
                frame.frame,
                version,
                purpose,
                gradient_first=places[0] % 2 == 1,
            )

        replies = self._on_all(Work(plan.model, plan, frame), message)
        probed: protocol.Probed = min(replies, key=lambda reply: reply.ticket)
        return probed

    def _compute(
        self,
        plan: protocol.Plan,
        frame: protocol.Frame,
        call: int,
        kind: Kind,
        version: int,
        assignment: Assignment | None,
    ) -> Assignment:
        def message(ticket: int, indices: tuple[int, ...]) -> protocol.Compute:
            return protocol.Compute(ticket, call, plan.plan, frame.frame, version, indices, kind)

        performer = self._performing()
        work = performer.work(plan, frame, kind)
        step, replies = performer.perform(work, len(work.kinds), message, assignment)
        self._counters.tiles += len(step.done_by)
        self._counters.recomputed_tiles += sum(reply.recomputed for reply in replies)
        shards = [reply.seconds for reply in replies]
        self._counters.slowest_shard_seconds += max(shards, default=0.0)
        self._counters.mean_shard_seconds += sum(shards) / max(len(shards), 1)
        done: Assignment = {}
        for tile, worker in sorted(step.done_by.items()):
            done[worker] = (*done.get(worker, ()), tile)
        return done


def check(workers: int, threads: int, start_method: str | None, timeout: float | None) -> Launcher:
    """The launcher for a pool of these options, which has started nothing yet.

    Raises:
        ConfigurationError: an option that no pool could have.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name} must be a whole number of at least 1, not {value!r}")
    if timeout is not None and not timeout > 0:
        raise ConfigurationError(f"timeout must be more than 0 seconds, not {timeout!r}")
    return make_launcher(start_method, threads)


def _let_go(supervisor: Supervisor, claims: Claims) -> None:
    try:
        supervisor.close()
    finally:
        claims.release()
