"""What every way of computing tiles has in common: a batch's way into the arena and out of it.

    caller's arrays --copy--> arena: inputs -----------> whoever computes the tiles
    caller's arrays <--copy-- arena: outputs, gradients <-------'

Owns the order of things (what is written, computed, read), the plans and the numbers of calls.
Who computes the tiles is a subclass's business: ``processes.pool`` or ``threads``. One batch at a
time: callers from several threads take turns.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qpool import tiles
from qpool.executors.store import Store
from workers import protocol
from workers.layout import ArraySpec
from workers.protocol import Kind

#: Who computed which tiles, and keeps them for the backward pass.
Homes = dict[int, tuple[int, ...]]


@dataclasses.dataclass
class Counters:
    """What is measured of the batches; floats are seconds of wall time."""

    forward_calls: int = 0
    backward_calls: int = 0
    tiles: int = 0
    recomputed_tiles: int = 0
    weight_updates: int = 0
    slowest_shard_seconds: float = 0.0
    mean_shard_seconds: float = 0.0
    copy_in: float = 0.0
    weights: float = 0.0
    copy_out: float = 0.0


class BatchComputer(abc.ABC):
    """Computes batches of any number of models, tile by tile. ``seed`` starts their draws."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        #: How many calls there have been. A run that is resumed sets it to where it was.
        self.calls = 0
        self._plans: dict[int, protocol.Plan] = {}
        self._counters = Counters()
        self._abandoned: list[int] = []
        self._forgotten: list[int] = []

    @property
    @abc.abstractmethod
    def workers(self) -> int:
        """How many tiles may be computed at the same time."""

    @abc.abstractmethod
    def add(self, shipment: bytes, weights: Sequence[np.ndarray], engine: str) -> int:
        """Take a model in and return its number.

        ``shipment`` unpickles to a ``workers.recipes.Shipped``; ``weights`` are the values of all
        its variables, in its order; ``engine`` is what its Strawberry Fields engines are.
        """

    @abc.abstractmethod
    def discard(self, number: int) -> None:
        """Forget a model everywhere."""

    def abandon(self, number: int) -> None:
        """Discard a model before the next call. Cheap, and safe from a finalizer."""
        self._abandoned.append(number)

    def forget(self, call: int) -> None:
        """Free what is kept for a call's backward pass. Cheap, and safe from a finalizer."""
        self._forgotten.append(call)

    def _let_go_of_models_and_calls(self) -> tuple[int, ...]:
        """Discard what was abandoned; the calls that may be forgotten now."""
        while self._abandoned:
            self.discard(self._abandoned.pop())
        forgotten, self._forgotten = tuple(self._forgotten), []
        return forgotten

    @abc.abstractmethod
    def stats(self) -> dict[str, Any]:
        """What was measured; ``seconds`` are of the coordinator, by phase."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give everything back. Calling it again does nothing."""

    @abc.abstractmethod
    def _ready(self) -> Store:
        """The store, when a batch may be written to it; raises where the computer is closed."""

    @abc.abstractmethod
    def _survey(
        self,
        plan: protocol.Plan,
        frame: protocol.Frame,
        version: int,
        *,
        gradient: bool,
        largest_tile: int,
    ) -> protocol.Surveyed:
        """What the plan does with the frame's first rows."""

    @abc.abstractmethod
    def _compute(
        self,
        plan: protocol.Plan,
        frame: protocol.Frame,
        call: int,
        kind: Kind,
        version: int,
        homes: Homes | None,
    ) -> Homes:
        """Have every tile of the frame computed; return who computed which."""

    def add_plan(
        self, model: int, method: str, arguments: bytes, as_tensor: tuple[bool, ...], rows: int
    ) -> int:
        """Register one way of calling a model's method."""
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
        """Run the plan on the first rows, to learn what comes out, and compile it."""
        with self._lock:
            store = self._ready()
            few = [array[: max(8, largest_tile, self._plans[plan].rows)] for array in inputs]
            frame = store.frame(("survey", plan, len(few[0])), few, len(few[0]))
            version = self._write(store, plan, frame, few, weights)
            surveyed = self._survey(
                self._plans[plan], frame, version, gradient=gradient, largest_tile=largest_tile
            )
            self._plans[plan] = dataclasses.replace(
                self._plans[plan],
                least_rows=surveyed.least_rows,
                draws=surveyed.draws,
                reproducible=surveyed.reproducible,
                level=surveyed.level,
                outputs=surveyed.outputs,
            )
            return surveyed

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
        ``copy``) and who computed, and with ``keep`` holds for the backward pass, which tiles.
        """
        with self._lock:
            store = self._ready()
            frame = store.frame(("forward", plan, len(inputs[0]), tile), inputs, tile, outputs)
            version = self._write(store, plan, frame, inputs, weights)
            call = self.new_call()
            kind = Kind.FORWARD_KEEPING if keep else Kind.FORWARD
            homes = self._compute(self._plans[plan], frame, call, kind, version, None)
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
            version = self._write(store, plan, frame, inputs, weights)
            store.write(frame.cotangents, cotangents)
            store.write([placed for _, placed in frame.tangents], [x for _, x in tangents])
            self._compute(self._plans[plan], frame, call, kind, version, homes)
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

    def _counters_by_name(self) -> dict[str, Any]:
        counters = dataclasses.asdict(self._counters)
        seconds = {phase: counters.pop(phase) for phase in ("copy_in", "weights", "copy_out")}
        return {"seconds": seconds, **counters}

    def _write(
        self,
        store: Store,
        plan: int,
        frame: protocol.Frame,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
    ) -> int:
        """Put inputs and weights in the arena; return the weights' version."""
        began = time.perf_counter()
        store.write(frame.inputs, inputs)
        copied = time.perf_counter()
        model = self._plans[plan].model
        self._counters.weight_updates += store.write_weights(model, weights)
        self._counters.copy_in += copied - began
        self._counters.weights += time.perf_counter() - copied
        return store.models[model].version
