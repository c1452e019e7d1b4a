"""A pool of workers, whatever they are (processes, threads, the nodes of a cluster): the interface
that a model's place in it (``remote.RemoteModel``) needs.

Owns what all of them keep: models' plans, the numbers of calls, and what is let go of before the
next call.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import numpy as np

from qpool.batches import Operands, Results, Task
from workers.exchange import protocol
from workers.exchange.protocol import Kind

#: Rows that a probe may call a model with, to tell what its calls cost and whether rows are alone.
_PROBED_ROWS = 8


@dataclasses.dataclass
class Counters:
    """What is measured of the batches; floats are seconds of wall time."""

    forward_calls: int = 0
    backward_calls: int = 0
    tiles: int = 0
    weight_updates: int = 0
    slowest_shard_seconds: float = 0.0
    mean_shard_seconds: float = 0.0
    weights: float = 0.0
    copy_out: float = 0.0

    #: The phases of a batch in the coordinator's process, each of which is counted.
    PHASES: ClassVar[tuple[str, ...]] = ("weights", "copy_out")

    def batch(self, kind: Kind, copying: float) -> None:
        """Count one that has been computed, and was copied out in so many seconds."""
        self.forward_calls += kind.makes_outputs
        self.backward_calls += kind.makes_gradients
        self.copy_out += copying

    def by_name(self) -> dict[str, Any]:
        """For ``stats()``: the phases under ``seconds``."""
        found = dataclasses.asdict(self)
        return {"seconds": {phase: found.pop(phase) for phase in self.PHASES}, **found}


class WorkerPool(abc.ABC):
    """Computes batches of any number of models, tile by tile. ``seed`` starts their draws.

    One batch at a time: callers from several threads take turns.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        #: How many calls there have been. A run that is resumed sets it to where it was.
        self.calls = 0
        self._plans: dict[int, protocol.Plan] = {}
        #: How many plans there have been of a kind: see ``protocol.Plan.twin``.
        self._alike: Counter[Hashable] = Counter()
        self._abandoned: list[int] = []
        self._forgotten: list[int] = []

    @property
    @abc.abstractmethod
    def workers(self) -> int:
        """How many tiles may be computed at the same time."""

    @abc.abstractmethod
    def add(self, shipment: bytes, weights: Sequence[np.ndarray], engine: str) -> int:
        """Take a model in and return its number.

        ``shipment`` unpickles to a ``workers.replica.serialization.Shipped``; ``weights`` are the
        values of all its variables, in its order; ``engine`` is what its Strawberry Fields engines
        are.
        """

    @abc.abstractmethod
    def discard(self, number: int) -> None:
        """Forget a model everywhere."""

    @abc.abstractmethod
    def probe(
        self,
        plan: int,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        purpose: protocol.Purpose,
    ) -> protocol.Probed:
        """Run the plan on the first rows, to learn what comes out, and compile it."""

    @abc.abstractmethod
    def compute(
        self,
        task: Task,
        operands: Operands,
        *,
        call: int | None = None,
        assignment: Any = None,
        copy: Callable[[np.ndarray], Any] = np.array,
    ) -> Results:
        """Compute a batch.

        ``call`` is the number of the call that it belongs to, None for a new one. ``assignment``
        says who holds which tiles since the forward pass of that call: tiles that are no longer
        kept are computed again from the operands, which are those of the forward pass. ``copy``
        takes an output out of what lies where the next batch will.
        """

    @abc.abstractmethod
    def stats(self) -> dict[str, Any]:
        """What was measured; ``seconds`` are of the coordinator, by phase."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give everything back. Calling it again does nothing."""

    def add_plan(
        self,
        model: int,
        method: str,
        arguments: bytes,
        as_tensor: tuple[bool, ...],
        rows: int,
        shapes: tuple[tuple[int, ...], ...],
    ) -> int:
        """Register one way of calling a method of a model with variables of these shapes."""
        with self._lock:
            call = method, arguments, as_tensor, shapes
            twin = self._alike[call]
            self._alike[call] += 1
        return self.adopt(protocol.Plan(0, model, method, arguments, as_tensor, rows, twin=twin))

    def adopt(self, plan: protocol.Plan, number: int | None = None) -> int:
        """Register a plan that may have been probed elsewhere; return its number here.

        With ``number``, it comes in the place of that one.
        """
        with self._lock:
            number = next(self._numbers) if number is None else number
            self._plans[number] = dataclasses.replace(plan, plan=number)
            return number

    def abandon(self, number: int) -> None:
        """Discard a model before the next call. Cheap, and safe from a finalizer."""
        self._abandoned.append(number)

    def forget(self, call: int) -> None:
        """Free what is kept for a call's backward pass. Cheap, and safe from a finalizer."""
        self._forgotten.append(call)

    def new_call(self) -> int:
        """A number for a call of a model; the random draws within the call follow from it."""
        self.calls += 1
        return self.calls

    def _let_go_of_models_and_calls(self) -> tuple[int, ...]:
        """Discard what was abandoned; the calls that may be forgotten now."""
        while self._abandoned:
            self.discard(self._abandoned.pop())
        forgotten, self._forgotten = tuple(self._forgotten), []
        return forgotten

    def _drop_plans(self, model: int) -> None:
        self._plans = {n: plan for n, plan in self._plans.items() if plan.model != model}

    def _learn(self, plan: int, probed: protocol.Probed) -> None:
        """From now on the plan is as the probe found it."""
        self._plans[plan] = self._plans[plan].as_found(probed)

    def _first_rows(
        self, plan: int, inputs: Sequence[np.ndarray], purpose: protocol.Purpose
    ) -> list[np.ndarray]:
        """As many as a probe may call the model with: some for what it asks (``prober``), and those
        of the largest tile."""
        rows = max(_PROBED_ROWS, purpose.largest_tile, self._plans[plan].rows)
        return [array[:rows] for array in inputs]
