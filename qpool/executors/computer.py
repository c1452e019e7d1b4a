"""What computes a model's batches, whatever computes them: the interface that a model's place
(``remote.RemoteModel``) needs.

Owns what all computers keep: models' plans, the numbers of calls, and what is let go of before the
next call.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from workers.exchange import protocol
from workers.layout import ArraySpec


class Computer(abc.ABC):
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
        self._abandoned: list[int] = []
        self._forgotten: list[int] = []

    @property
    @abc.abstractmethod
    def workers(self) -> int:
        """How many tiles may be computed at the same time."""

    @abc.abstractmethod
    def add(self, shipment: bytes, weights: Sequence[np.ndarray], engine: str) -> int:
        """Take a model in and return its number.

        ``shipment`` unpickles to a ``workers.replica.recipes.Shipped``; ``weights`` are the values
        of all its variables, in its order; ``engine`` is what its Strawberry Fields engines are.
        """

    @abc.abstractmethod
    def discard(self, number: int) -> None:
        """Forget a model everywhere."""

    @abc.abstractmethod
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
        """Run the plan on the first rows, to learn what comes out, and compile it. ``wanted`` are
        the sources that ``both`` will be asked for."""

    @abc.abstractmethod
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
    ) -> tuple[int, list[Any], Any]:
        """Compute a batch.

        Returns the call's number, the outputs (one row per sample, taken by ``copy``) and homes:
        who computed, and with ``keep`` holds for the backward pass, which tiles.
        """

    @abc.abstractmethod
    def backward(
        self,
        plan: int,
        tile: int,
        call: int,
        homes: Any,
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
        row per tile. ``homes``, ``inputs`` and ``weights`` are those of the forward call: tiles
        that are no longer kept are computed again from them.

        With ``tangents``, cotangents of the gradients by source, that whole computation is pulled
        back: returned are the gradients of its result for the sources, then for the cotangents
        that are not None.
        """

    @abc.abstractmethod
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
    ) -> tuple[list[Any], list[np.ndarray]]:
        """Compute a batch and pull ``cotangents`` back that do not depend on it, at once.

        Returns the outputs, as ``forward`` does, and the gradients of ``sources``, variables, of
        the outputs whose cotangent is not None, as ``backward`` does.
        """

    @abc.abstractmethod
    def stats(self) -> dict[str, Any]:
        """What was measured; ``seconds`` are of the coordinator, by phase."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give everything back. Calling it again does nothing."""

    def add_plan(
        self, model: int, method: str, arguments: bytes, as_tensor: tuple[bool, ...], rows: int
    ) -> int:
        """Register one way of calling a model's method."""
        return self.adopt(protocol.Plan(0, model, method, arguments, as_tensor, rows))

    def adopt(self, plan: protocol.Plan, number: int | None = None) -> int:
        """Register a plan that may have been surveyed elsewhere; return its number here.

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

    def _learn(self, plan: int, surveyed: protocol.Surveyed) -> None:
        """From now on the plan is as the survey found it."""
        self._plans[plan] = dataclasses.replace(
            self._plans[plan],
            least_rows=surveyed.least_rows,
            draws=surveyed.draws,
            reproducible=surveyed.reproducible,
            level=surveyed.level,
            by_rows=surveyed.by_rows,
            narrowed=surveyed.narrowed,
            outputs=surveyed.outputs,
        )
