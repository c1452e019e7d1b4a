"""What every way of computing tiles has in common: a batch's way into the arena and out of it.

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
from qpool.executors.computer import Computer
from qpool.executors.store import Store
from workers.exchange import protocol
from workers.exchange.protocol import Kind
from workers.layout import ArraySpec

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


class BatchComputer(Computer):
    """A computer whose tiles lie in an arena of this machine."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._counters = Counters()

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
        wanted: tuple[int, ...],
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

    def survey(
        self,
        plan: int,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        *,
        gradient: bool,
        largest_tile: int,
        wanted: tuple[int, ...] = (),
    ) -> protocol.Surveyed:
        with self._lock:
            store = self._ready()
            few = [array[: max(8, largest_tile, self._plans[plan].rows)] for array in inputs]
            frame = store.frame(("survey", plan, len(few[0])), few, len(few[0]))
            version = self._write(store, plan, frame, few, weights)
            surveyed = self._survey(
                self._plans[plan],
                frame,
                version,
                gradient=gradient,
                largest_tile=largest_tile,
                wanted=wanted,
            )
            self._learn(plan, surveyed)
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
        call: int | None = None,
        first: int = 0,
    ) -> tuple[int, list[Any], Homes]:
        """See ``Computer.forward``. What is computed may be a part of a larger batch: its
        ``call``, and the number of the part's ``first`` tile in it."""
        with self._lock:
            store = self._ready()
            key = ("forward", plan, len(inputs[0]), tile, first)
            frame = store.frame(key, inputs, tile, outputs, first=first)
            version = self._write(store, plan, frame, inputs, weights)
            call = self.new_call() if call is None else call
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
        first: int = 0,
    ) -> list[np.ndarray]:
        """See ``Computer.backward``; ``first`` as in ``forward``."""
        with self._lock:
            store = self._ready()
            kind = Kind.SECOND if tangents else Kind.BACKWARD
            wanted = tuple(n for n, _ in sources), tuple(n for n, _ in tangents)
            frame = store.frame(
                (kind, plan, len(inputs[0]), tile, first, *wanted),
                inputs,
                tile,
                (),
                cotangents,
                [(n, spec) for n, spec in sources if n < len(inputs)],
                [(n, spec) for n, spec in sources if n >= len(inputs)],
                tangents,
                first=first,
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

    def both(
        self,
        plan: int,
        tile: int,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        outputs: Sequence[ArraySpec],
        cotangents: Sequence[np.ndarray | None],
        sources: Sequence[tuple[int, ArraySpec]],
        *,
        copy: Callable[[np.ndarray], Any] = np.array,
        per_tile: bool = False,
        call: int | None = None,
        first: int = 0,
    ) -> tuple[list[Any], list[np.ndarray]]:
        """See ``Computer.both``; ``call`` and ``first`` as in ``forward``."""
        with self._lock:
            store = self._ready()
            given = tuple(n for n, cotangent in enumerate(cotangents) if cotangent is not None)
            wanted = tuple(n for n, _ in sources)
            frame = store.frame(
                (Kind.BOTH, plan, len(inputs[0]), tile, first, given, wanted),
                inputs,
                tile,
                outputs,
                cotangents,
                of_weights=sources,
                first=first,
            )
            version = self._write(store, plan, frame, inputs, weights)
            store.write(frame.cotangents, cotangents)
            call = self.new_call() if call is None else call
            self._compute(self._plans[plan], frame, call, Kind.BOTH, version, None)
            began = time.perf_counter()
            results = [copy(placed.view(store.buffer)) for placed in frame.outputs]
            partials = [placed.view(store.buffer) for _, placed in frame.weight_gradients]
            gradients = [p.copy() if per_tile else tiles.sum_in_order(p) for p in partials]
            self._counters.copy_out += time.perf_counter() - began
            self._counters.forward_calls += 1
            self._counters.backward_calls += 1
            return results, gradients

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
