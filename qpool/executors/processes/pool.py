"""The pool: persistent workers, one arena, and batches sent through both.

    caller's arrays --copy--> arena: inputs -----------> worker: replica computes its tiles
    caller's arrays <--copy-- arena: outputs, gradients <-------'
                      messages (a few numbers each) over one pipe per worker

Owns the workers' lives, the arena's contents and the order of things. Decides nothing about
tiles and losses (``dispatch`` does), knows nothing of TensorFlow (``gradient`` does). One batch
at a time: callers from several threads wait for each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qpool import tiles
from qpool.executors.processes import topology
from qpool.executors.processes.dispatch import (
    Complete,
    Event,
    Finished,
    GiveUp,
    Instruction,
    Joined,
    Lost,
    Raised,
    Send,
    Step,
)
from qpool.executors.processes.process import Launcher, WorkerProcess, make_launcher
from workers import protocol
from workers.arena import Arena
from workers.errors import (
    ConfigurationError,
    PoolClosedError,
    RemoteError,
    StartupError,
    WorkerLostError,
)
from workers.layout import ArraySpec, Placed, place
from workers.main import SLOT_BYTES, progress_counter
from workers.protocol import Kind
from workers.waiting import Waiter

log = logging.getLogger("qpool")

#: Seconds for a worker to come up: an interpreter, TensorFlow, the model.
START_TIMEOUT = 300.0

#: Seconds a worker may go without finishing a tile. A first call may compile for minutes.
DEFAULT_TIMEOUT = 600.0

#: Seconds for workers to end by themselves when the pool closes.
_CLOSE_TIMEOUT = 2.0

#: Consecutive failed starts after which a pool stops trying to replace a worker.
_FAILED_STARTS = 3

_FIRST_SEGMENT = 1 << 20


@dataclasses.dataclass
class _Counters:
    """What is measured of the pool as a whole; seconds of wall time."""

    calls: int = 0
    backward_calls: int = 0
    tiles: int = 0
    recomputed_tiles: int = 0
    replaced_workers: int = 0
    weight_updates: int = 0
    copy_in: float = 0.0
    weights: float = 0.0
    send: float = 0.0
    wait: float = 0.0
    copy_out: float = 0.0


@dataclasses.dataclass
class _WorkerCounters:
    tiles: int = 0
    compute: float = 0.0
    cpu: float = 0.0
    cpu_at_start: float | None = None


class Pool:
    """Persistent worker processes, shared by any number of models.

    ``workers`` is how many (default: the physical cores of this process's CPU budget),
    ``threads`` how many threads and cores each gets. ``start_method`` is ``"forkserver"``
    (Linux's default), ``"spawn"`` or None. ``pin=False`` leaves placement to the system.
    ``timeout`` is how many seconds a worker may go without progress before it is replaced.
    ``seed`` starts the random draws of models that draw.

    The processes start when the first model comes or with :meth:`start`, whichever is first.
    Use it as a context manager, or call :meth:`close`; an interpreter that exits closes it too.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        threads: int = 1,
        start_method: str | None = None,
        pin: bool = True,
        timeout: float | None = None,
        seed: int = 0,
    ) -> None:
        budget = topology.budget()
        count = budget.workers if workers is None else workers
        for name, value in (("workers", count), ("threads", threads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} must be a whole number of at least 1, not {value!r}")
        if timeout is not None and not timeout > 0:
            raise ConfigurationError(f"timeout must be more than 0 seconds, not {timeout!r}")
        self.seed = seed
        self._count = count
        self._threads = threads
        self._timeout = DEFAULT_TIMEOUT if timeout is None else float(timeout)
        self._cores = topology.assign(count, budget.cpus, threads) if pin else [()] * count
        if count * threads > len(budget.cpus):
            warnings.warn(
                f"{count} workers of {threads} thread(s) on {len(budget.cpus)} CPUs: they will "
                "share cores, unpinned, and be slower than fewer workers",
                RuntimeWarning,
                stacklevel=2,
            )
        self._launcher: Launcher = make_launcher(start_method, threads)
        self._lock = threading.RLock()
        self._workers: dict[int, WorkerProcess] = {}
        self._joining: dict[int, WorkerProcess] = {}
        self._owed: dict[int, set[int]] = {}
        self._failed_starts = 0
        self._ids = itertools.count(1)
        self._ticket = 1
        self._calls = itertools.count(1)
        self._models: dict[int, _Model] = {}
        self._plans: dict[int, protocol.Plan] = {}
        self._frames: dict[Any, protocol.Frame] = {}
        self._scratch = count * SLOT_BYTES
        self._arena: Arena | None = None
        self._waiter = Waiter()
        self._started: float | None = None
        self._counters = _Counters()
        self._worker_counters = {n: _WorkerCounters() for n in range(count)}
        self._forgotten: list[int] = []
        self._closed = False
        self._state = _Resources(self._launcher, os.getpid())
        self._finalizer = weakref.finalize(self, _Resources.release, self._state)

    # -- life ------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """How many workers the pool has."""
        return self._count

    @property
    def closed(self) -> bool:
        return self._closed

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "running" if self._started else "not started"
        return f"<qpool.Pool of {self._count} workers, {self._launcher.name}, {state}>"

    def start(self) -> Pool:
        """Start the workers and wait until each has said who it is. Does nothing twice."""
        with self._lock:
            self._check_open()
            if self._started is not None:
                return self
            self._arena = self._state.arena = Arena.create(max(_FIRST_SEGMENT, self._scratch))
            try:
                for number in range(self._count):
                    self._launch(number)
                deadline = time.monotonic() + START_TIMEOUT
                while self._joining:
                    for worker in self._readable([*self._joining.values()], deadline):
                        self._greet(worker)
                    if time.monotonic() > deadline:
                        raise StartupError(
                            f"workers {sorted(self._joining)} did not come up in "
                            f"{START_TIMEOUT:.0f} s"
                        )
            except BaseException:
                self.close()
                raise
            self._started = time.monotonic()
            return self

    def close(self) -> None:
        """End the workers and free the arena. Calling it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._models.clear()
            self._frames.clear()
            self._finalizer()

    # -- models ----------------------------------------------------------------------------

    def add(
        self, shipment: bytes, weights: Sequence[np.ndarray]
    ) -> int:
        """Build a replica of a model in every worker and return the model's number.

        ``shipment`` unpickles to a ``workers.recipes.Shipped``; ``weights`` are the values of all
        its variables, in its order.
        """
        with self._lock:
            self.start()
            self._settle()
            number = next(self._ids)
            specs = [ArraySpec.of(weight) for weight in weights]
            model = _Model(shipment, specs, (), version=0)
            self._models[number] = model
            try:
                self._arrange()
                self._write_weights(model, weights)
                self._tell_all(number)
            except BaseException:
                self.discard(number)
                raise
            return number

    def discard(self, number: int) -> None:
        """Forget a model everywhere."""
        with self._lock:
            if self._models.pop(number, None) is None or self._closed:
                return
            for plan in [p for p, v in self._plans.items() if v.model == number]:
                del self._plans[plan]
            for worker in self._workers.values():
                with contextlib.suppress(OSError):
                    worker.send(protocol.Discard(number))
                for key in [k for k in worker.told if k[0] == "model" and k[1] == number]:
                    del worker.told[key]

    def add_plan(
        self, model: int, method: str, arguments: bytes, as_tensor: tuple[bool, ...], rows: int
    ) -> int:
        """Register one way of calling a model's method; workers hear of it when they need it."""
        with self._lock:
            number = next(self._ids)
            self._plans[number] = protocol.Plan(number, model, method, arguments, as_tensor, rows)
            return number

    def survey(
        self,
        plan: int,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        *,
        gradient: bool,
    ) -> protocol.Surveyed:
        """Have one worker run the plan on the first rows and report what comes out."""
        with self._lock:
            self._ready()
            few = [x[: max(8, self._plans[plan].rows)] for x in inputs]
            frame = self._frame(("survey", plan), few, len(few[0]), 0, [], [], [], [])
            model = self._models[self._plans[plan].model]
            self._write_weights(model, weights)
            buffer = self._buffer
            for array, placed in zip(few, frame.inputs, strict=True):
                placed.view(buffer)[...] = array

            def message(ticket: int, _tiles: tuple[int, ...]) -> protocol.Survey:
                return protocol.Survey(ticket, plan, frame.frame, model.version, gradient)

            replies = self._perform(plan, frame, 1, message, None)[1]
            surveyed: protocol.Surveyed = replies[0]
            self._plans[plan] = dataclasses.replace(
                self._plans[plan], draws=surveyed.draws, reproducible=surveyed.reproducible
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
    ) -> tuple[int, list[Any], dict[int, tuple[int, ...]]]:
        """Compute a batch.

        Returns the call's number, the outputs (one row per sample, taken out of the arena by
        ``copy``) and which worker computed, and with ``keep`` holds for the backward pass, which
        tiles.
        """
        with self._lock:
            self._ready()
            batch = len(inputs[0])
            frame = self._frame(("forward", plan, batch, tile), inputs, batch, tile, outputs, [], [], [])
            call = next(self._calls)
            self._write(frame, inputs, weights, plan)
            kind = Kind.FORWARD_KEEPING if keep else Kind.FORWARD
            homes = self._compute(plan, frame, call, kind, None)
            began = time.perf_counter()
            results = [copy(placed.view(self._buffer)) for placed in frame.outputs]
            self._counters.copy_out += time.perf_counter() - began
            self._counters.calls += 1
            return call, results, homes

    def backward(
        self,
        plan: int,
        tile: int,
        call: int,
        homes: dict[int, tuple[int, ...]] | None,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        cotangents: Sequence[np.ndarray | None],
        sources: Sequence[tuple[int, ArraySpec]],
        *,
        per_tile: bool = False,
    ) -> list[np.ndarray]:
        """Pull a batch's cotangents back to ``sources``.

        ``sources`` are numbered as in the plan (inputs first, then trainable variables) and come
        with the spec of one input row, or of the variable. Gradients of inputs have one row per
        sample; those of variables are summed over tiles in tile order, or with ``per_tile`` left
        as one row per tile. ``inputs`` and ``weights`` are those of the forward call: tiles that
        are no longer kept are computed again from them.
        """
        with self._lock:
            self._ready()
            batch = len(inputs[0])
            of_inputs = [(n, spec) for n, spec in sources if n < len(inputs)]
            of_weights = [(n, spec) for n, spec in sources if n >= len(inputs)]
            frame = self._frame(
                ("backward", plan, batch, tile, tuple(n for n, _ in sources)),
                inputs,
                batch,
                tile,
                [],
                cotangents,
                of_inputs,
                of_weights,
            )
            self._write(frame, inputs, weights, plan)
            for cotangent, placed in zip(cotangents, frame.cotangents, strict=True):
                if placed is not None:
                    placed.view(self._buffer)[...] = cotangent
            self._compute(plan, frame, call, Kind.BACKWARD, homes)
            began = time.perf_counter()
            found = {n: placed.view(self._buffer).copy() for n, placed in frame.input_gradients}
            for n, placed in frame.weight_gradients:
                partials = placed.view(self._buffer)
                found[n] = partials.copy() if per_tile else tiles.sum_in_order(partials)
            self._counters.copy_out += time.perf_counter() - began
            self._counters.backward_calls += 1
            return [found[n] for n, _ in sources]

    def forget(self, call: int) -> None:
        """Free what is kept for a call's backward pass. Cheap, and safe from a finalizer."""
        self._forgotten.append(call)

    # -- measuring -------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What was measured since the pool started.

        ``seconds`` of wall time by phase, and per worker: pid, cores, tiles, seconds of compute,
        CPU seconds as the system counted them, and ``cpu_use``, CPU seconds over wall seconds
        since its first tile's batch.
        """
        with self._lock:
            elapsed = time.monotonic() - self._started if self._started is not None else 0.0
            counters = dataclasses.asdict(self._counters)
            phases = ("copy_in", "weights", "send", "wait", "copy_out")
            workers = []
            for number, measured in self._worker_counters.items():
                process = self._workers.get(number)
                hello = process.hello if process is not None else None
                workers.append(
                    {
                        "worker": number,
                        "pid": hello.pid if hello else None,
                        "cores": hello.cores if hello else (),
                        "pinned": hello.pinned if hello else False,
                        "threads": hello.threads if hello else {},
                        "versions": hello.versions if hello else {},
                        "tiles": measured.tiles,
                        "compute_seconds": measured.compute,
                        "cpu_seconds": self._cpu_seconds(process, measured),
                    }
                )
            return {
                "workers": workers,
                "start_method": self._launcher.name,
                "elapsed_seconds": elapsed,
                "seconds": {phase: counters.pop(phase) for phase in phases},
                "segment_bytes": self._arena.size if self._arena else 0,
                **counters,
            }

    @staticmethod
    def _cpu_seconds(process: WorkerProcess | None, measured: _WorkerCounters) -> float:
        """CPU time of the process now, as the system counts it; the last reported if it is gone."""
        import psutil

        if process is not None:
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(process.pid).cpu_times()
                return float(times.user + times.system)
        return measured.cpu

    # -- workers ---------------------------------------------------------------------------

    def _launch(self, number: int) -> None:
        assert self._arena is not None
        segment = self._arena.segment
        worker = self._launcher.launch(number, segment.handle)
        self._state.workers.append(worker)
        worker.told[("segment",)] = segment
        with contextlib.suppress(OSError):  # dead already: its end of file will be seen
            worker.send(
                protocol.Start(
                    worker=number,
                    slot=number,
                    cores=self._cores[number],
                    threads=self._threads,
                    coordinator=os.getpid(),
                    segment=segment,
                    path=tuple(sys.path),
                )
            )
        self._waiter.add(worker.channel)
        self._joining[number] = worker

    def _greet(self, worker: WorkerProcess) -> None:
        """Take a Hello; StartupError if the worker ended instead."""
        try:
            hello = worker.receive()
        except (EOFError, OSError) as error:
            self._joining.pop(worker.number, None)
            self._waiter.remove(worker.channel)
            how = worker.collect()
            raise StartupError(
                f"worker {worker.number} {how} while starting; its own output is above"
            ) from error
        worker.hello = hello
        wanted = self._cores[worker.number]
        if wanted and not hello.pinned:
            log.warning(
                "worker %d asked for cores %s and is on %s", worker.number, wanted, hello.cores
            )
        del self._joining[worker.number]
        self._workers[worker.number] = worker
        self._failed_starts = 0

    def _bury(self, worker: WorkerProcess, cause: str | None = None) -> str:
        """A worker is lost: make sure that it is dead, say how, start its successor."""
        worker.kill()
        self._waiter.remove(worker.channel)
        how = worker.collect()
        self._workers.pop(worker.number, None)
        self._joining.pop(worker.number, None)
        self._owed.pop(worker.number, None)
        if worker in self._state.workers:
            self._state.workers.remove(worker)
        measured = self._worker_counters[worker.number]
        measured.cpu = 0.0
        cause = cause or f"worker {worker.number} (pid {worker.pid}) {how}"
        self._counters.replaced_workers += 1
        log.warning("%s; its tiles run again elsewhere, and a new worker is started", cause)
        self._launch(worker.number)
        return cause

    def _readable(self, workers: Sequence[WorkerProcess], deadline: float) -> list[WorkerProcess]:
        """Those of ``workers`` that have something to say (or have died), by the deadline."""
        remaining = max(0.0, deadline - time.monotonic())
        by_channel = {worker.channel: worker for worker in workers}
        ready = self._waiter.wait(remaining)
        return [by_channel[channel] for channel in ready if channel in by_channel]

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError("the pool is closed; make a new one")
        if os.getpid() != self._state.owner:
            raise PoolClosedError(
                "this pool belongs to the process that made it; make one in this process"
            )

    def _ready(self) -> None:
        self._check_open()
        self.start()
        self._settle()
        if self._forgotten:
            forgotten, self._forgotten = tuple(self._forgotten), []
            for worker in self._workers.values():
                with contextlib.suppress(OSError):
                    worker.send(protocol.Forget(forgotten))

    def _settle(self) -> None:
        """Wait for answers that an interrupted call left behind: until then the arena is theirs."""
        while self._owed:
            self._await(None)

    # -- telling workers what they lack ----------------------------------------------------

    def _tell(self, worker: WorkerProcess, key: tuple, message: Any) -> bool:
        """Send ``message`` unless this worker has been told the same; True if it was sent."""
        if worker.told.get(key) is message:
            return False
        worker.send(message)
        worker.told[key] = message
        return True

    def _tell_segment(self, worker: WorkerProcess) -> None:
        segment = self._arena.segment if self._arena else None
        if worker.told[("segment",)] != segment:
            worker.send(protocol.Remap(segment))  # type: ignore[arg-type]
            worker.told[("segment",)] = segment

    def _tell_model(self, worker: WorkerProcess, number: int) -> None:
        """Build a replica; the Built or Failed that answers is taken by ``_await``."""
        model = self._models[number]
        self._tell_segment(worker)
        key = ("model", number)
        if worker.told.get(key) is None:
            worker.send(protocol.Build(number, model.shipment, model.places, self.seed))
            worker.told[key] = model.places
        elif worker.told[key] is not model.places:
            worker.send(protocol.Place(number, model.places))
            worker.told[key] = model.places

    def _tell_all(self, number: int) -> None:
        """Build a model everywhere and wait for it: a worker is ready only after that."""
        waiting = {}
        for worker in list(self._workers.values()):
            try:
                self._tell_model(worker, number)
                waiting[worker.number] = worker
            except OSError:
                self._bury(worker)
        deadline = time.monotonic() + START_TIMEOUT
        while waiting:
            for worker in self._readable([*waiting.values()], deadline):
                try:
                    reply = worker.receive()
                except (EOFError, OSError):
                    cause = self._bury(worker)
                    raise StartupError(f"{cause} while it built the model") from None
                if isinstance(reply, protocol.Failed):
                    self._drain_builds({n: w for n, w in waiting.items() if w is not worker})
                    raise _with_cause(reply.error)
                worker.built[number] = reply.seconds
                del waiting[worker.number]
            if waiting and time.monotonic() > deadline:
                raise StartupError(
                    f"workers {sorted(waiting)} did not build the model in {START_TIMEOUT:.0f} s"
                )

    def _drain_builds(self, waiting: dict[int, WorkerProcess]) -> None:
        for worker in waiting.values():
            try:
                worker.receive()
            except (EOFError, OSError):
                self._bury(worker)

    # -- the arena -------------------------------------------------------------------------

    @property
    def _buffer(self) -> memoryview:
        assert self._arena is not None
        return self._arena.buffer

    def _arrange(self) -> None:
        """Lay all models' weights after the progress counters; what follows is scratch."""
        assert self._arena is not None
        offset = self._count * SLOT_BYTES
        for model in self._models.values():
            kept = [p.view(self._buffer).copy() for p in model.places]
            places, offset = place(model.specs, offset)
            if places != model.places:
                model.moved, model.places = kept, places
        self._reserve(offset)
        for model in self._models.values():
            for former, placed in zip(model.moved, model.places, strict=False):
                placed.view(self._buffer)[...] = former
            model.moved = []
        self._scratch = offset
        self._frames.clear()

    def _reserve(self, size: int) -> None:
        """Grow the arena to ``size`` bytes, by a half at least, so that it grows seldom."""
        assert self._arena is not None
        if size > self._arena.size:
            self._arena.grow(max(size, self._arena.size * 3 // 2))

    def _frame(
        self,
        key: Any,
        inputs: Sequence[np.ndarray],
        batch: int,
        tile: int,
        outputs: Sequence[ArraySpec],
        cotangents: Sequence[np.ndarray | None],
        of_inputs: Sequence[tuple[int, ArraySpec]],
        of_weights: Sequence[tuple[int, ArraySpec]],
    ) -> protocol.Frame:
        """The frame of this key, laid out anew if there is none that fits."""
        specs = [ArraySpec.of(x) for x in inputs]
        frame = self._frames.get(key)
        if frame is not None and [p.spec for p in frame.inputs] == specs:
            return frame
        seeds = [None if c is None else ArraySpec.of(c) for c in cotangents]
        rows = tiles.count(batch, tile) if tile else 0
        wanted = [
            *specs,
            *(spec.with_rows(batch) for spec in outputs),
            *(spec for spec in seeds if spec is not None),
            *(spec.with_rows(batch) for _, spec in of_inputs),
            *(spec.with_rows(rows) for _, spec in of_weights),
        ]
        placed, end = place(wanted, self._scratch)
        self._reserve(end)
        remaining = iter(placed)

        def take(count: int) -> tuple[Placed, ...]:
            return tuple(itertools.islice(remaining, count))

        frame = protocol.Frame(
            next(self._ids),
            batch,
            tile,
            take(len(specs)),
            take(len(outputs)),
            tuple(None if spec is None else next(remaining) for spec in seeds),
            tuple((n, next(remaining)) for n, _ in of_inputs),
            tuple((n, next(remaining)) for n, _ in of_weights),
        )
        if len(self._frames) >= 256:  # batch sizes that never come back must not pile up
            self._frames.clear()
            for worker in self._workers.values():
                worker.told = {k: v for k, v in worker.told.items() if k[0] != "frame"}
        self._frames[key] = frame
        return frame

    def _write(
        self,
        frame: protocol.Frame,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        plan: int,
    ) -> None:
        began = time.perf_counter()
        buffer = self._buffer
        for array, placed in zip(inputs, frame.inputs, strict=True):
            placed.view(buffer)[...] = array
        copied = time.perf_counter()
        self._write_weights(self._models[self._plans[plan].model], weights)
        self._counters.copy_in += copied - began
        self._counters.weights += time.perf_counter() - copied

    def _write_weights(self, model: _Model, weights: Sequence[np.ndarray]) -> None:
        """Put the values in the arena if any bit differs from what is there."""
        buffer = self._buffer
        views = [placed.view(buffer) for placed in model.places]
        if model.version and all(
            v.tobytes() == np.asarray(w).tobytes() for v, w in zip(views, weights, strict=True)
        ):
            return
        for view, weight in zip(views, weights, strict=True):
            view[...] = weight
        model.version += 1
        self._counters.weight_updates += 1

    # -- performing a step -----------------------------------------------------------------

    def _compute(
        self,
        plan: int,
        frame: protocol.Frame,
        call: int,
        kind: Kind,
        homes: dict[int, tuple[int, ...]] | None,
    ) -> dict[int, tuple[int, ...]]:
        """Have every tile of the frame computed; return which worker computed which."""
        version = self._models[self._plans[plan].model].version

        def message(ticket: int, indices: tuple[int, ...]) -> protocol.Compute:
            return protocol.Compute(ticket, kind, call, plan, frame.frame, version, indices)

        number = tiles.count(frame.batch, frame.tile)
        step, _ = self._perform(plan, frame, number, message, homes)
        self._counters.tiles += number
        done: dict[int, tuple[int, ...]] = {}
        for tile, worker in sorted(step.done_by.items()):
            done[worker] = (*done.get(worker, ()), tile)
        return done

    def _perform(
        self,
        plan: int,
        frame: protocol.Frame,
        number: int,
        message: Callable[[int, tuple[int, ...]], Any],
        homes: dict[int, tuple[int, ...]] | None,
    ) -> tuple[Step, list[Any]]:
        """Run a step to its end: perform instructions, turn what happens into events."""
        step = Step(number, list(self._workers), self._ticket, homes)
        replies: list[Any] = []
        todo: list[Instruction] = step.begin()
        try:
            while True:
                began = time.perf_counter()
                while todo:
                    instruction = todo.pop(0)
                    if isinstance(instruction, Complete):
                        return step, replies
                    if isinstance(instruction, GiveUp):
                        raise self._failure(instruction, frame)
                    self._ticket = step.next_ticket
                    todo += self._send(step, instruction, plan, frame, message)
                sent = time.perf_counter()
                for event, reply in self._await(step):
                    if reply is not None:
                        replies.append(reply)
                    todo += step.on(event)
                self._counters.send += sent - began
                self._counters.wait += time.perf_counter() - sent
        finally:
            self._ticket = step.next_ticket

    def _send(
        self,
        step: Step,
        instruction: Send,
        plan: int,
        frame: protocol.Frame,
        message: Callable[[int, tuple[int, ...]], Any],
    ) -> list[Instruction]:
        """Tell a worker what it lacks, then what to compute."""
        worker = self._workers[instruction.worker]
        self._owed.setdefault(worker.number, set()).add(instruction.ticket)
        try:
            self._tell_segment(worker)
            self._tell_model(worker, self._plans[plan].model)
            self._tell(worker, ("plan", plan), self._plans[plan])
            self._tell(worker, ("frame", frame.frame), frame)
            worker.send(message(instruction.ticket, instruction.tiles))
        except OSError:
            return step.on(Lost(worker.number, self._bury(worker)))
        return []

    def _await(self, step: Step | None) -> Iterator[tuple[Event, Any]]:
        """Wait for something to happen, and say what. Without a step, only clear up."""
        events: list[tuple[Event, Any]] = []
        for worker in self._wait_for_some(step):
            if worker.number in self._joining:
                events += self._try_greet(worker)
                continue
            try:
                reply = worker.receive()
            except (EOFError, OSError):
                events.append((Lost(worker.number, self._bury(worker)), None))
                continue
            event = self._take(worker, reply)
            if event is not None:
                events.append(event)
        return iter(events)

    def _take(self, worker: WorkerProcess, reply: Any) -> tuple[Event, Any] | None:
        if isinstance(reply, protocol.Built):
            worker.built[reply.model] = reply.seconds
            return None
        owed = self._owed.get(worker.number, set())
        if isinstance(reply, protocol.Failed):
            if not reply.ticket:
                # A Build or a Plan failed; so will the message that needs it, and says so again.
                worker.failure = worker.failure or reply.error
                worker.told = {key: v for key, v in worker.told.items() if key[0] == "segment"}
                return None
            owed.discard(reply.ticket)
            error, worker.failure = worker.failure or reply.error, None
            event: Event = Raised(worker.number, reply.ticket, error)
        else:
            owed.discard(reply.ticket)
            event = Finished(worker.number, reply.ticket)
            if isinstance(reply, protocol.Computed):
                measured = self._worker_counters[worker.number]
                measured.tiles += 1
                measured.compute += reply.compute_seconds
                measured.cpu = reply.cpu_seconds
                self._counters.recomputed_tiles += reply.recomputed
        if not owed:
            self._owed.pop(worker.number, None)
        return event, reply

    def _try_greet(self, worker: WorkerProcess) -> list[tuple[Event, Any]]:
        try:
            self._greet(worker)
        except StartupError as error:
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                raise
            log.warning("%s; trying again", error)
            self._launch(worker.number)
            return []
        return [(Joined(worker.number), None)]

    def _wait_for_some(self, step: Step | None) -> list[WorkerProcess]:
        """Workers that can be read; ones that are silent past the deadline are killed first."""
        busy = [self._workers[n] for n in self._owed if n in self._workers]
        candidates = [*busy, *self._joining.values()]
        if step is not None and not candidates:
            raise WorkerLostError("no worker is left and none is starting")
        began = time.monotonic()
        progress = {w.number: int(self._progress(w)) for w in busy}
        while True:
            ready = self._readable(candidates, time.monotonic() + min(self._timeout, 5.0))
            if ready:
                return ready
            for worker in busy:
                if int(self._progress(worker)) != progress[worker.number]:
                    progress[worker.number] = int(self._progress(worker))
                    began = time.monotonic()
            if busy and time.monotonic() - began > self._timeout:
                for worker in busy:
                    log.warning(
                        "worker %d (pid %d) finished no tile for %.0f s (timeout=); it is killed",
                        worker.number,
                        worker.pid,
                        self._timeout,
                    )
                    worker.kill()
            elif not busy and time.monotonic() - began > START_TIMEOUT:
                raise StartupError(f"no worker came up in {START_TIMEOUT:.0f} s")

    def _progress(self, worker: WorkerProcess) -> int:
        return int(progress_counter(self._buffer, worker.number)[0])

    @staticmethod
    def _failure(instruction: GiveUp, frame: protocol.Frame) -> BaseException:
        if instruction.error is not None:
            return _with_cause(instruction.error)
        rows = ", ".join(
            f"{t * frame.tile}-{min((t + 1) * frame.tile, frame.batch) - 1}"
            for t in instruction.tiles
        )
        attempts = "\n".join(f"  {cause}" for cause in instruction.causes)
        return WorkerLostError(
            f"samples {rows} took {len(instruction.causes)} workers with them, one after "
            f"another; the pool is usable, these samples are not:\n{attempts}"
        )


@dataclasses.dataclass
class _Model:
    """What the pool knows of a model: how to build it, and where its weights lie."""

    shipment: bytes
    specs: list[ArraySpec]
    places: tuple[Placed, ...]
    version: int
    moved: list[np.ndarray] = dataclasses.field(default_factory=list)


class _Resources:
    """What must be released when the pool goes, however it goes. Must not refer to the pool."""

    def __init__(self, launcher: Launcher, owner: int) -> None:
        self.launcher = launcher
        self.owner = owner
        self.workers: list[WorkerProcess] = []
        self.arena: Arena | None = None

    def release(self) -> None:
        if os.getpid() != self.owner:
            return  # a fork of the coordinator: none of this is ours
        for worker in self.workers:
            with contextlib.suppress(OSError, ValueError):
                worker.send(protocol.Stop())
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        for worker in self.workers:
            with contextlib.suppress(OSError, EOFError):
                while worker.channel.poll(max(0.0, deadline - time.monotonic())):
                    worker.channel.recv_bytes()
            worker.kill()
            worker.collect()
        self.workers.clear()
        self.launcher.close()
        if self.arena is not None:
            self.arena.close()


def _with_cause(error: BaseException) -> BaseException:
    if isinstance(error, RemoteError) and error.original is not None:
        error.__cause__ = error.original
    return error

