"""A worker pool on one machine: a batch's way into the arena and out of it.

    caller's arrays --copy--> arena: inputs -----------> whoever computes the tiles
    caller's arrays <--copy-- arena: outputs, gradients <-------'

Owns the order of things (what is written, computed, read) on one machine. Who computes the tiles
is a subclass's business: ``processes.pool`` or ``threads``.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qpool import tiles
from qpool.batches import Operands, Results, Task
from qpool.executors.shared_arrays import SharedArrays
from qpool.executors.worker_pool import Counters, WorkerPool
from workers.exchange import protocol
from workers.exchange.protocol import Kind

#: Who computed which tiles, and keeps them for the backward pass.
Assignment = dict[int, tuple[int, ...]]


@dataclasses.dataclass
class ArenaCounters(Counters):
    """Those of batches that are written to an arena."""

    recomputed_tiles: int = 0
    copy_in: float = 0.0

    PHASES = ("copy_in", "weights", "copy_out")


class ArenaPool(WorkerPool):
    """A pool whose tiles lie in an arena of this machine."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._counters = ArenaCounters()

    @abc.abstractmethod
    def _ready(self) -> SharedArrays:
        """The arena's arrays, when a batch may be written to them; raises where it is closed."""

    @abc.abstractmethod
    def _probe(
        self,
        plan: protocol.Plan,
        frame: protocol.Frame,
        version: int,
        purpose: protocol.Purpose,
    ) -> protocol.Probed:
        """What the plan does with the frame's first rows."""

    @abc.abstractmethod
    def _compute(
        self,
        plan: protocol.Plan,
        frame: protocol.Frame,
        call: int,
        kind: Kind,
        version: int,
        assignment: Assignment | None,
    ) -> Assignment:
        """Have every tile of the frame computed; return who computed which."""

    def probe(
        self,
        plan: int,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        purpose: protocol.Purpose,
    ) -> protocol.Probed:
        with self._lock:
            shared = self._ready()
            operands = Operands(self._first_rows(plan, inputs, purpose), weights)
            frame = shared.frame(Task(plan, Kind.FORWARD, operands.batch), operands)
            version = self._write(shared, plan, frame, operands)
            probed = self._probe(self._plans[plan], frame, version, purpose)
            self._learn(plan, probed)
            return probed

    def compute(
        self,
        task: Task,
        operands: Operands,
        *,
        call: int | None = None,
        assignment: Assignment | None = None,
        copy: Callable[[np.ndarray], Any] = np.array,
        first: int = 0,
    ) -> Results:
        """See ``WorkerPool.compute``. What is computed may be a part of a larger batch: ``first``
        is the number of the part's first tile in it."""
        with self._lock:
            shared = self._ready()
            frame = shared.frame(task, operands, first)
            version = self._write(shared, task.plan, frame, operands)
            call = self.new_call() if call is None else call
            assignment = self._compute(
                self._plans[task.plan], frame, call, task.kind, version, assignment
            )
            began = time.perf_counter()
            outputs = [copy(view) for view in shared.views(frame.outputs)]
            gradients = [view.copy() for view in shared.views(p for _, p in frame.input_gradients)]
            for partials in shared.views(p for _, p in frame.weight_gradients):
                gradients.append(partials.copy() if task.per_tile else tiles.sum_in_order(partials))
            gradients += [view.copy() for view in shared.views(frame.cotangent_gradients)]
            self._counters.batch(task.kind, time.perf_counter() - began)
            return Results(call, outputs, gradients, assignment)

    def _write(
        self, shared: SharedArrays, plan: int, frame: protocol.Frame, operands: Operands
    ) -> int:
        """Put a batch's numbers in the arena; return the weights' version."""
        began = time.perf_counter()
        shared.write(frame.inputs, operands.inputs)
        shared.write(frame.cotangents, operands.cotangents)
        shared.write([placed for _, placed in frame.tangents], [x for _, x in operands.tangents])
        copied = time.perf_counter()
        model = self._plans[plan].model
        self._counters.weight_updates += shared.write_weights(model, operands.weights)
        self._counters.copy_in += copied - began
        self._counters.weights += time.perf_counter() - copied
        return shared.models[model].version
