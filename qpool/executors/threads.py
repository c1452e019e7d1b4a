"""``threads``: the pool's tiles, computed by threads of this process in the place of workers.

Owns the threads and the one replica that they share. What is compiled runs outside Python's lock,
so tiles are computed side by side, without pipes or further processes; whatever runs eagerly holds
that lock (and Strawberry Fields binds a program's parameters for one run at a time), so its tiles
are computed one after another.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from qpool import tiles
from qpool.executors import topology
from qpool.executors.arena_pool import ArenaPool, Assignment
from qpool.executors.base import Options
from qpool.executors.shared_arrays import SharedArrays
from qpool.executors.tiled import TiledExecutor
from workers.errors import ConfigurationError, PoolClosedError
from workers.exchange import protocol
from workers.exchange.protocol import Kind
from workers.process import affinity
from workers.replica.replica import Replica


class ThreadPool(ArenaPool):
    """Computes batches with ``threads`` threads (default: the cores of the CPU budget).

    From now on this process keeps the memory that it frees (``affinity.keep_memory``).
    """

    def __init__(self, threads: int | None = None, *, seed: int = 0) -> None:
        super().__init__(seed)
        count = topology.budget().workers if threads is None else threads
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigurationError(f"workers must be a whole number of at least 1, not {count!r}")
        affinity.keep_memory()
        self._count = count
        self._shared = SharedArrays(0)
        self._replicas: dict[int, Replica] = {}
        #: Where each replica was last told that its weights lie.
        self._told: dict[int, Any] = {}
        #: What has been compiled: it is done by one thread, once.
        self._seen: set[Any] = set()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="qpool")
        self._owner = os.getpid()
        self._closed = False
        self._finalizer = weakref.finalize(self, _let_go, self._threads, self._shared)

    @property
    def workers(self) -> int:
        return self._count

    def add(self, shipment: bytes, weights: Sequence[np.ndarray], engine: str) -> int:
        with self._lock:
            shared = self._ready()
            number = next(self._numbers)
            shared.add(number, shipment, weights, engine)
            places = shared.models[number].places
            build = protocol.Build(number, shipment, places, self.seed, engine)
            try:
                self._replicas[number] = self._alone(Replica, build, None, alone=False)
            except BaseException:
                self.discard(number)
                raise
            self._told[number] = places, shared.segment
            return number

    def discard(self, number: int) -> None:
        with self._lock:
            self._shared.remove(number)
            self._replicas.pop(number, None)
            self._told.pop(number, None)
            self._drop_plans(number)

    def stats(self) -> dict[str, Any]:
        """Counts of calls and tiles, and the coordinator's seconds of copying."""
        with self._lock:
            return {"threads": self._count, **self._counters.by_name()}

    def close(self) -> None:
        """End the threads and free the arena. Calling it again does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._finalizer()
                self._replicas.clear()

    def _ready(self) -> SharedArrays:
        if self._closed:
            raise PoolClosedError("the strategy's threads were ended; parallelize the model again")
        if os.getpid() != self._owner:
            raise PoolClosedError(
                "these threads belong to the process that started them; parallelize the model in "
                "this process"
            )
        if forgotten := self._let_go_of_models_and_calls():
            for replica in self._replicas.values():
                replica.forget(forgotten)
        return self._shared

    def _probe(
        self,
        plan: protocol.Plan,
        frame: protocol.Frame,
        version: int,
        purpose: protocol.Purpose,
    ) -> protocol.Probed:
        replica = self._replica(plan)
        request = protocol.Probe(0, plan.plan, frame.frame, version, purpose)
        return self._alone(replica.probe, request, frame, 0, self._shared.arena.views)

    def _compute(
        self,
        plan: protocol.Plan,
        frame: protocol.Frame,
        call: int,
        kind: Kind,
        version: int,
        assignment: Assignment | None,
    ) -> Assignment:
        replica, buffer = self._replica(plan), self._shared.arena.views

        def compute(first: int, stop: int) -> None:
            for index in range(first, stop):
                replica.compute(kind, plan.plan, frame, call, index, buffer)

        number = tiles.count(frame.batch, frame.tile)
        recomputed = replica.recomputed
        self._alone(replica.load, plan.plan, version, buffer)
        tangents = tuple(source for source, _ in frame.tangents)
        form = plan.plan, plan.level, kind, frame.tile, tangents
        if plan.level == "eager" or plan.draws:
            self._alone(compute, 0, number)
        else:
            done = form not in self._seen
            if done:
                self._alone(compute, 0, 1)
                self._seen.add(form)
            shards = tiles.shards(number - done, self._count)
            self._together([(compute, a + done, b + done) for a, b in shards if b > a])
        self._counters.tiles += number
        self._counters.recomputed_tiles += replica.recomputed - recomputed
        return {0: tuple(range(number))}

    def _replica(self, plan: protocol.Plan) -> Replica:
        """The plan's replica, told what has changed."""
        replica, model = self._replicas[plan.model], self._shared.models[plan.model]
        told = model.places, self._shared.segment
        if self._told[plan.model] != told:  # also where growing has mapped the arena anew
            replica.weights.place(model.places)
            self._told[plan.model] = told
        replica.add_plan(plan)
        return replica

    def _alone(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call it in one of the threads: a tape of the caller's would see what is read here."""
        return self._wait([self._threads.submit(function, *args, **kwargs)])[0]

    def _together(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._wait([self._threads.submit(*call) for call in calls])

    @staticmethod
    def _wait(futures: Sequence[Future]) -> list[Any]:
        """All results; an interrupted call waits for what is being computed, which writes."""
        try:
            wait(futures)
        except BaseException:
            for future in futures:
                future.cancel()
            with contextlib.suppress(BaseException):
                wait(futures)
            raise
        return [future.result() for future in futures]


def _let_go(threads: ThreadPoolExecutor, shared: SharedArrays) -> None:
    threads.shutdown(cancel_futures=True)
    shared.arena.close()


class ThreadExecutor(TiledExecutor):
    """Computes a model's tiles in threads of this process."""

    def _make(self, options: Options) -> ThreadPool:
        self._owns = True  # a pool that was given is for ``processes``
        return ThreadPool(options.workers, seed=options.seed)

    def stats(self) -> dict[str, Any]:
        return {"strategy": "threads", **super().stats()}
