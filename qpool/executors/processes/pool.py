"""The pool: batches sent through persistent workers and shared memory.

    caller's arrays --copy--> arena: inputs -----------> worker: replica computes its tiles
    caller's arrays <--copy-- arena: outputs, gradients <-------'
                      messages (a few numbers each) over one pipe per worker

Owns the order of things: what is written, told, sent, awaited, read. The workers' lives are
``crew``'s, the arena's layout is ``store``'s, what to do when a worker is lost is ``dispatch``'s,
and TensorFlow is ``gradient``'s. One batch at a time: callers from several threads take turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qpool import tiles
from qpool.executors.processes import topology
from qpool.executors.processes.claims import Claims
from qpool.executors.processes.crew import Crew
from qpool.executors.processes.patience import Patience
from qpool.executors.processes.perform import Homes, Performer
from qpool.executors.processes.process import make_launcher
from qpool.executors.processes.store import Store
from workers import protocol
from workers.errors import ConfigurationError, PoolClosedError
from workers.faults import Fault
from workers.layout import ArraySpec
from workers.protocol import Kind

log = logging.getLogger("qpool")


@dataclasses.dataclass
class _Counters:
    """What is measured of the pool as a whole; floats are seconds of wall time."""

    forward_calls: int = 0
    backward_calls: int = 0
    tiles: int = 0
    recomputed_tiles: int = 0
    weight_updates: int = 0
    copy_in: float = 0.0
    weights: float = 0.0
    copy_out: float = 0.0


class Pool:
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
    ``seed`` starts the random draws of models that draw.

    The processes start when the first model comes or with :meth:`start`, whichever is first; what
    they import is loaded in the background from now on.
    Use it as a context manager, or call :meth:`close`; an interpreter that exits closes it too.
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
    ) -> None:
        budget = topology.budget()
        count = budget.workers if workers is None else workers
        for name, value in (("workers", count), ("threads", threads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(
                    f"{name} must be a whole number of at least 1, not {value!r}"
                )
        if timeout is not None and not timeout > 0:
            raise ConfigurationError(f"timeout must be more than 0 seconds, not {timeout!r}")
        if not max_growth > 1:
            raise ConfigurationError(f"max_growth must be more than 1, not {max_growth!r}")
        if count * threads > len(budget.cpus):
            warnings.warn(
                f"{count} workers of {threads} thread(s) on {len(budget.cpus)} CPUs: they will "
                "share cores, unpinned, and be slower than fewer workers",
                RuntimeWarning,
                stacklevel=2,
            )
        self.seed = seed
        self._count = count
        claims = Claims()
        cores = topology.assign(count, () if pin is False else budget.cpus, threads)
        if cores[0] and not pin:
            cores = topology.assign(count, claims.take(budget.cpus, count * threads), threads)
            if not cores[0]:
                log.warning(
                    "other pools of this machine are pinned to cores that this one needs: its "
                    "workers are not pinned (pin=True pins them in any case)"
                )
        launcher = make_launcher(start_method, threads)
        launcher.prepare()
        self._crew = Crew(launcher, cores, threads, Patience(timeout), max_growth)
        self._performer: Performer | None = None
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        #: How many calls there have been. A run that is resumed sets it to where it was.
        self.calls = 0
        self._plans: dict[int, protocol.Plan] = {}
        self._forgotten: list[int] = []
        self._abandoned: list[int] = []
        self._counters = _Counters()
        self._started: float | None = None
        self._closed = False
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _let_go, self._crew, claims)

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
        return f"<qpool.Pool of {self._count} workers, {self._crew.launcher.name}, {state}>"

    def start(self) -> Pool:
        """Start the workers and wait until each has said who it is. Does nothing twice."""
        with self._lock:
            self._check_open()
            if self._started is None:
                try:
                    store = Store(self._count)
                    performer = self._performer = Performer(self._crew, store, self.seed)
                    self._crew.start(lambda: store.segment, store.progress, performer.rehearsal)
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
                    self._performer.store.arena.close()

    # -- models ----------------------------------------------------------------------------

    def add(self, shipment: bytes, weights: Sequence[np.ndarray], engine: str) -> int:
        """Build a replica of a model in every worker and return the model's number.

        ``shipment`` unpickles to a ``workers.recipes.Shipped``; ``weights`` are the values of all
        its variables, in its order; ``engine`` is what its Strawberry Fields engines are.
        """
        with self._lock:
            store = self._ready()
            number = next(self._numbers)
            store.add(number, shipment, weights, engine)
            performer = self._performing()
            performer.forget_rehearsals()

            def message(ticket: int, _tiles: tuple[int, ...]) -> protocol.Confirm:
                return protocol.Confirm(ticket, number)

            homes = self._one_each()
            try:
                performer.perform(number, len(homes), message, homes)
            except BaseException:
                self.discard(number)
                raise
            return number

    def discard(self, number: int) -> None:
        """Forget a model everywhere."""
        with self._lock:
            performer = self._performer
            if self._closed or performer is None or not performer.store.remove(number):
                return
            self._plans = {n: p for n, p in self._plans.items() if p.model != number}
            performer.forget_rehearsals(number)
            for worker in self._crew.ready.values():
                worker.told.pop(("model", number), None)
                with contextlib.suppress(OSError):
                    worker.send(protocol.Discard(number))

    def abandon(self, number: int) -> None:
        """Discard a model before the next call. Cheap, and safe from a finalizer."""
        self._abandoned.append(number)

    def add_plan(
        self, model: int, method: str, arguments: bytes, as_tensor: tuple[bool, ...], rows: int
    ) -> int:
        """Register one way of calling a model's method; workers hear of it when they need it."""
        with self._lock:
            number = next(self._numbers)
            self._plans[number] = protocol.Plan(number, model, method, arguments, as_tensor, rows)
            return number

    def survey(
        self,
        plan: int,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        *,
        gradient: bool,
        largest_tile: int,
    ) -> protocol.Surveyed:
        """Have every worker run the plan on the first rows, and return what the first one reports.

        One would be enough to learn what comes out; all of them are warm afterwards.
        """
        with self._lock:
            store = self._ready()
            few = [array[: max(8, largest_tile, self._plans[plan].rows)] for array in inputs]
            frame = store.frame(("survey", plan, len(few[0])), few, len(few[0]))
            version = self._write(plan, frame, few, weights)

            def message(ticket: int, _tiles: tuple[int, ...]) -> protocol.Survey:
                return protocol.Survey(ticket, plan, frame.frame, version, gradient, largest_tile)

            homes = self._one_each()
            model = self._plans[plan].model
            _, replies = self._performing().perform(
                model, len(homes), message, homes, self._plans[plan], frame
            )
            surveyed: protocol.Surveyed = min(replies, key=lambda reply: reply.ticket)
            self._plans[plan] = dataclasses.replace(
                self._plans[plan],
                least_rows=surveyed.least_rows,
                draws=surveyed.draws,
                reproducible=surveyed.reproducible,
                level=surveyed.level,
                outputs=surveyed.outputs,
            )
            return surveyed

    # -- batches ---------------------------------------------------------------------------

    def forward(
        self,
        plan: int,
        tile: int,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        outputs: Sequence[ArraySpec],
        *,
        keep: bool,
        copy: Callable[[np.ndarray], Any] = np.array,
    ) -> tuple[int, list[Any], Homes]:
        """Compute a batch.

        Returns the call's number, the outputs (one row per sample, taken out of the arena by
        ``copy``) and which worker computed, and with ``keep`` holds for the backward pass, which
        tiles.
        """
        with self._lock:
            store = self._ready()
            frame = store.frame(("forward", plan, len(inputs[0]), tile), inputs, tile, outputs)
            version = self._write(plan, frame, inputs, weights)
            call = self.new_call()
            kind = Kind.FORWARD_KEEPING if keep else Kind.FORWARD
            homes = self._compute(plan, frame, call, kind, version, None)
            began = time.perf_counter()
            results = [copy(placed.view(store.buffer)) for placed in frame.outputs]
            self._counters.copy_out += time.perf_counter() - began
            self._counters.forward_calls += 1
            return call, results, homes

    def backward(
        self,
        plan: int,
        tile: int,
        call: int,
        homes: Homes | None,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        cotangents: Sequence[np.ndarray | None],
        sources: Sequence[tuple[int, ArraySpec]],
        *,
        per_tile: bool = False,
        tangents: Sequence[tuple[int, np.ndarray]] = (),
    ) -> list[np.ndarray]:
        """Pull a batch's cotangents back to ``sources``.

        ``sources`` are numbered as in the plan (inputs first, then variables) and come with the
        spec of one input row, or of the variable. Gradients of inputs have one row per sample;
        those of variables are summed over tiles in tile order, or with ``per_tile`` left as one
        row per tile. ``inputs`` and ``weights`` are those of the forward call: tiles that
        are no longer kept are computed again from them.

        With ``tangents``, cotangents of the gradients by source, that whole computation is pulled
        back: returned are the gradients of its result for the sources, then for the cotangents
        that are not None.
        """
        with self._lock:
            store = self._ready()
            kind = Kind.SECOND if tangents else Kind.BACKWARD
            wanted = tuple(n for n, _ in sources), tuple(n for n, _ in tangents)
            frame = store.frame(
                (kind, plan, len(inputs[0]), tile, *wanted),
                inputs,
                tile,
                (),
                cotangents,
                [(n, spec) for n, spec in sources if n < len(inputs)],
                [(n, spec) for n, spec in sources if n >= len(inputs)],
                tangents,
            )
            version = self._write(plan, frame, inputs, weights)
            store.write(frame.cotangents, cotangents)
            store.write([placed for _, placed in frame.tangents], [x for _, x in tangents])
            self._compute(plan, frame, call, kind, version, homes)
            began = time.perf_counter()
            found = {n: placed.view(store.buffer).copy() for n, placed in frame.input_gradients}
            for n, placed in frame.weight_gradients:
                partials = placed.view(store.buffer)
                found[n] = partials.copy() if per_tile else tiles.sum_in_order(partials)
            of_cotangents = [p.view(store.buffer).copy() for p in frame.cotangent_gradients if p]
            self._counters.copy_out += time.perf_counter() - began
            self._counters.backward_calls += 1
            return [*(found[n] for n, _ in sources), *of_cotangents]

    def new_call(self) -> int:
        """A number for a call of a model; the random draws within the call follow from it."""
        self.calls += 1
        return self.calls

    def forget(self, call: int) -> None:
        """Free what is kept for a call's backward pass. Cheap, and safe from a finalizer."""
        self._forgotten.append(call)

    def inject(self, worker: int, *faults: Fault) -> None:
        """Have a worker fail on purpose, at its next work. For tests and ``scripts/soak``."""
        with self._lock, contextlib.suppress(OSError, KeyError):
            self._crew.ready[worker].send(protocol.Inject(faults))

    # -- measuring -------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What was measured since the pool started.

        ``seconds`` of the coordinator's wall time by phase; per worker its pid, cores, seconds of
        compute, ``cpu_seconds`` as the system counts them, and ``cpu_use``: CPU seconds over wall
        seconds since it said Hello.
        """
        with self._lock:
            counters = dataclasses.asdict(self._counters)
            performer = self._performer
            seconds = {
                "copy_in": counters.pop("copy_in"),
                "weights": counters.pop("weights"),
                "send": performer.sending if performer else 0.0,
                "wait": performer.waiting if performer else 0.0,
                "copy_out": counters.pop("copy_out"),
            }
            return {
                "start_method": self._crew.launcher.name,
                "elapsed_seconds": time.monotonic() - self._started if self._started else 0.0,
                "seconds": seconds,
                **counters,
                "replaced_workers": self._crew.replaced,
                "silent_workers": self._crew.silenced,
                "outgrown_workers": self._crew.retired,
                "retried_tiles": performer.retried if performer else 0,
                "segment_bytes": performer.store.arena.size if performer else 0,
                "workers": self._crew.stats(),
            }

    # -- within ----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError("the pool is closed; make a new one")
        if os.getpid() != self._owner:
            raise PoolClosedError(
                "this pool belongs to the process that made it; make one in this process"
            )

    def _ready(self) -> Store:
        """The store, when the workers are up and none still writes for an interrupted call."""
        self.start()
        self._crew.settle()
        while self._abandoned:
            self.discard(self._abandoned.pop())
        if self._forgotten:
            forgotten, self._forgotten = tuple(self._forgotten), []
            for worker in self._crew.ready.values():
                with contextlib.suppress(OSError):
                    worker.send(protocol.Forget(forgotten))
        return self._performing().store

    def _one_each(self) -> Homes:
        """One tile for each worker that is ready: something that all are to do."""
        return {n: (place,) for place, n in enumerate(sorted(self._crew.ready))}

    def _performing(self) -> Performer:
        assert self._performer is not None, "the pool has been started"
        return self._performer

    def _write(
        self,
        plan: int,
        frame: protocol.Frame,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
    ) -> int:
        """Put inputs and weights in the arena; return the weights' version."""
        store = self._performing().store
        began = time.perf_counter()
        store.write(frame.inputs, inputs)
        copied = time.perf_counter()
        model = self._plans[plan].model
        self._counters.weight_updates += store.write_weights(model, weights)
        self._counters.copy_in += copied - began
        self._counters.weights += time.perf_counter() - copied
        return store.models[model].version

    def _compute(
        self,
        plan: int,
        frame: protocol.Frame,
        call: int,
        kind: Kind,
        version: int,
        homes: Homes | None,
    ) -> Homes:
        """Have every tile of the frame computed; return which worker computed which."""

        def message(ticket: int, indices: tuple[int, ...]) -> protocol.Compute:
            return protocol.Compute(ticket, kind, call, plan, frame.frame, version, indices)

        known = self._plans[plan]
        step, replies = self._performing().perform(
            known.model,
            tiles.count(frame.batch, frame.tile),
            message,
            homes,
            known,
            frame,
            kind,
        )
        self._counters.tiles += len(step.done_by)
        self._counters.recomputed_tiles += sum(reply.recomputed for reply in replies)
        done: Homes = {}
        for tile, worker in sorted(step.done_by.items()):
            done[worker] = (*done.get(worker, ()), tile)
        return done


def _let_go(crew: Crew, claims: Claims) -> None:
    try:
        crew.close()
    finally:
        claims.release()
