"""What runs on a node: a pool over its cores, told and asked by the coordinator.

Owns the node's pool and the way from the coordinator's numbers of models and plans to the pool's.
A node holds no state that matters: all it knows it was told, and can be told again to another.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from qpool.batches import Operands, Task
from qpool.executors import topology
from qpool.executors.cluster import connect
from qpool.executors.processes.pool import Pool
from workers.exchange import protocol


@dataclasses.dataclass(frozen=True)
class Build:
    """A model; ``shipment`` and ``weights`` are references into Ray's object store."""

    model: int
    shipment: Any
    weights: Any
    engine: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's weights, once per change."""

    model: int
    version: int
    weights: Any


News = Build | Weights | protocol.Plan


class Node:
    """The actor."""

    def __init__(self, cpus: int, options: dict[str, Any], path: Sequence[str]) -> None:
        """``cpus`` is what Ray gave to it, ``options`` a pool's; ``path`` is looked at last when
        something is imported: directories of the coordinator's, where this machine has them too.
        """
        sys.path += [entry for entry in path if entry not in sys.path]
        most = max(1, cpus // options["threads"])
        workers = min(most, options.pop("workers") or topology.budget().workers)
        if options["devices"] is not None:  # of the cores that Ray gave
            own = ",".join(map(str, topology.budget().cpus[:cpus]))
            options["devices"] = [f"cpu:{own}" if d == "cpu" else d for d in options["devices"]]
        self._pool = Pool(None if options["devices"] else workers, **options)
        self._models: dict[int, int] = {}
        self._weights: dict[int, list[np.ndarray]] = {}
        self._plans: dict[int, int] = {}
        self._known: dict[int, protocol.Plan] = {}

    def hello(self) -> dict[str, Any]:
        """Who this is; answers before the workers are up."""
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "versions": connect.versions(),
            "workers": self._pool.workers,
        }

    def alive(self) -> None:
        """Answers while something else is computed."""

    def start(self) -> None:
        self._pool.start()

    def probe(
        self,
        news: Sequence[News],
        plan: int,
        inputs: Sequence[np.ndarray],
        purpose: protocol.Purpose,
    ) -> protocol.Probed:
        self._take(news)
        number = self._plans[plan]
        weights = self._weights[self._known[plan].model]
        return self._pool.probe(number, inputs, weights, purpose)

    def compute(
        self,
        news: Sequence[News],
        task: Task,
        call: int,
        first: int,
        assignment: Any,
        operands: Operands,
    ) -> tuple[list[np.ndarray], Any, float]:
        """A part of a batch that begins with its tile number ``first``: outputs, then gradients,
        who computed which tiles of this node, and seconds. Weights are those that it was told."""
        began = time.perf_counter()
        self._take(news)
        found = self._pool.compute(
            dataclasses.replace(task, plan=self._plans[task.plan]),
            dataclasses.replace(operands, weights=self._weights[self._known[task.plan].model]),
            call=call,
            assignment=assignment,
            first=first,
        )
        return [*found.outputs, *found.gradients], found.assignment, time.perf_counter() - began

    def tell(self, news: Sequence[News]) -> None:
        self._take(news)

    def forget(self, calls: Sequence[int]) -> None:
        for call in calls:
            self._pool.forget(call)

    def discard(self, model: int) -> None:
        self._weights.pop(model, None)
        self._pool.discard(self._models.pop(model, -1))
        gone = [number for number, plan in self._known.items() if plan.model == model]
        for number in gone:
            del self._known[number], self._plans[number]

    def stats(self) -> dict[str, Any]:
        return self._pool.stats()

    def close(self) -> None:
        self._pool.close()

    # -- within ----------------------------------------------------------------------------

    def _take(self, news: Sequence[News]) -> None:
        for item in news:
            if isinstance(item, Build):
                if item.model in self._models:
                    continue
                weights = _fetch(item.weights)
                shipment = _fetch(item.shipment)
                self._models[item.model] = self._pool.add(shipment, weights, item.engine)
                self._weights[item.model] = weights
            elif isinstance(item, Weights):
                self._weights[item.model] = _fetch(item.weights)
            else:
                here = dataclasses.replace(item, model=self._models[item.model])
                self._plans[item.plan] = self._pool.adopt(here, self._plans.get(item.plan))
                self._known[item.plan] = item


def _fetch(reference: Any) -> Any:
    return connect.ray().get(reference)
