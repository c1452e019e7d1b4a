"""Candidates that compute the same training step, timed in turns.

Owns the clock: what a step is, how often it is repeated, and when the budget is spent.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Container
from typing import Any, Literal

import tensorflow as tf

from qpool.executors.auto.choices import Candidate, Choice
from qpool.executors.base import Executor
from workers.replica import serialization
from workers.tensors import leaves

#: Seconds that measuring one size of batch may take, where a run waits for it; no further candidate
#: is begun after that.
BUDGET = 30.0

#: A candidate is measured in so many turns with the others, at least, each of so many seconds.
_FIRST_TURNS, _TURNS, _TURN_SECONDS = 2, 5, 0.2

#: A candidate has to be so many times faster to be taken in the place of an earlier, simpler one.
_WORTH = 1.05


#: What calls will be part of: nothing, a graph, or a graph that XLA compiles where it can.
Within = Literal["nothing", "graph", "xla"]


class Autotuner:
    """Candidates that compute the same training step, timed in turns."""

    def __init__(
        self,
        model: Any,
        executor: Callable[[Candidate], Executor],
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        within: Within,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stopped = stopped
        self._executor = executor
        self._step = lambda executor: _step(model, executor, method, args, kwargs, within)
        self._steps: dict[Candidate, Callable[[], Any]] = {}
        self._seconds: dict[Candidate, list[float]] = {}
        self.spent = 0.0
        self._errors: list[Exception] = []
        self._failed: set[Candidate] = set()
        self.skipped: dict[str, str] = {}

    @property
    def best(self) -> float:
        """Seconds of a step of the fastest so far."""
        return self._of(self.leader) if self._seconds else float("inf")

    @property
    def empty(self) -> bool:
        """Whether none has come through so far."""
        return not self._seconds

    @property
    def leader(self) -> Candidate:
        return min(self._seconds, key=self._of)

    def tile_of(self, candidate: Candidate, batch: int) -> int | None:
        """The rows of a tile that the candidate computes; None without tiles."""
        sizes = self._executor(candidate).stats().get("tiles_by_batch", {})
        return candidate.tile or sizes.get(batch)

    @property
    def entered(self) -> set[Candidate]:
        """Those that were tried, with or without success."""
        return {*self._seconds, *self._failed}

    def enter(self, candidate: Candidate) -> None:
        """Compile and time it, unless the budget is spent."""
        if self._stopped():
            raise KeyboardInterrupt
        if self._seconds and self.spent > BUDGET:
            self.skipped[str(candidate)] = f"the budget of {BUDGET:.0f} s was spent"
            return
        began = time.perf_counter()
        try:
            self._enter(candidate)
        finally:
            self.spent += time.perf_counter() - began

    def _enter(self, candidate: Candidate) -> None:
        try:
            step = self._step(self._executor(candidate))
            step()  # compiles
        except Exception as error:  # the model's own, perhaps: another strategy may take it
            self._give_up(candidate, error)
            return
        self._steps[candidate] = step
        self._seconds[candidate] = []
        for _ in range(_FIRST_TURNS):
            self._turn(candidate)

    def _turn(self, candidate: Candidate) -> None:
        step, done, began = self._steps[candidate], 0, time.perf_counter()
        try:
            while not done or time.perf_counter() - began < _TURN_SECONDS:
                if self._stopped():
                    raise KeyboardInterrupt
                step()
                done += 1
        except Exception as error:
            self._give_up(candidate, error)
            del self._steps[candidate], self._seconds[candidate]
            return
        self._seconds[candidate].append((time.perf_counter() - began) / done)

    def _give_up(self, candidate: Candidate, error: Exception) -> None:
        self._errors.append(error)
        self._failed.add(candidate)
        self.skipped[str(candidate)] = f"{type(error).__name__}: {error}"

    def _of(self, candidate: Candidate) -> float:
        return statistics.median(self._seconds[candidate])

    def decide(self, batch: int, alive: Container[Candidate]) -> Choice:
        """The fastest, after further turns of those that are close and still ``alive``."""
        if not self._seconds:
            raise self._errors[0]
        close = [c for c in self._steps if c in alive and self._of(c) < 1.5 * self.best]
        began = time.perf_counter()
        while len(close) > 1 and min(len(self._seconds[c]) for c in close) < _TURNS:
            if self.spent + time.perf_counter() - began > 2 * BUDGET:
                break
            for candidate in close:  # in turns: a machine is not equally quick all the time
                self._turn(candidate)
            close = [candidate for candidate in close if candidate in self._steps]
        self.spent += time.perf_counter() - began
        if not self._seconds:
            raise self._errors[-1]
        best = self.leader
        for candidate in self._seconds:  # the earlier of two that are as good: the simpler one
            if self._of(candidate) < _WORTH * self._of(best):
                best = candidate
                break
        return Choice(
            best,
            batch,
            {str(c): 1e3 * self._of(c) for c in self._seconds},
            self.skipped,
            self.spent,
            datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


def _step(
    model: Any,
    executor: Executor,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    within: Within,
) -> Callable[[], Any]:
    """A forward call and the gradient of a sum of it, for the model's variables: as a loss of each
    sample within the trainer's step ("xla"), else with a tape around the call."""
    variables = serialization.trainable_variables(model)

    def step() -> Any:
        with tf.GradientTape() as tape:
            outputs = [
                x
                for x in leaves(executor.call(method, args, kwargs))
                if tf.is_tensor(x) and (x.dtype.is_floating or x.dtype.is_complex)
            ]
        return tape.gradient(outputs, variables) if outputs else outputs

    def sums(outputs: Any) -> Any:
        real = [tf.cast(tf.math.real(x), tf.float32) for x in leaves(outputs)]
        return sum(tf.reduce_sum(tf.reshape(x, [tf.shape(x)[0], -1]), -1) for x in real)

    def judged() -> Any:
        return executor.loss_and_gradient(method, sums, args)

    if within == "nothing":
        return step
    compiled = False
    if within == "xla":
        executor.call(method, args, kwargs)  # shows how far the executor can compile it
        compiled = executor.within_xla
    function = judged if within == "xla" and len(args) == 1 and not kwargs else step
    found: Callable[[], Any] = tf.function(function, autograph=False, jit_compile=compiled or None)
    return found
