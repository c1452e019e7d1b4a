"""Which strategy to begin with, from what a first call of the model does.

Owns the rule. The numbers in it were measured (``qpool bench auto``): a guess has to be good enough
for the minutes until something else has been tried.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qpool.executors.auto.choices import Candidate
from qpool.executors.base import Options
from workers.engine import circuit
from workers.engine.scope import aside, called

if TYPE_CHECKING:
    from qpool.executors.topology import Budget

#: Products of a training step's circuits that one core computes in a second, compiled.
_PRODUCTS_PER_SECOND = 2e10

#: Seconds that threads have to save a step to be begun with: compiling for them takes longer.
_WORTH_THREADS = 15e-3

#: Seconds of a step that is not compiled from which processes are worth their start.
_WORTH_PROCESSES = 0.05

#: Cores from which one process' threads, which share Python's lock, are not the way to use them.
_MANY_CORES = 8


@dataclass(frozen=True)
class Work:
    """A forward call: circuits that it ran, numbers multiplied in them, seconds it took eagerly."""

    circuits: int
    products: float
    seconds: float

    @property
    def step_seconds(self) -> float:
        """What a compiled training step will take in one thread, about."""
        return 3.0 * self.products / _PRODUCTS_PER_SECOND

    def __str__(self) -> str:
        return (
            f"its first call ran {self.circuits} circuits, {self.products:.1e} products, in "
            f"{self.seconds:.2f} s"
        )


def work_of(
    model: Any, options: Options, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Work:
    """Call the model once, eagerly, and count. What it raises is left to the real call to raise."""
    function = model if method == "__call__" else getattr(model, method)
    began = time.perf_counter()
    with (
        contextlib.suppress(Exception),
        aside(),
        circuit.untraced(),
        circuit.tally() as run,
    ):
        called(function, args, kwargs, options.engine != "stock")
    return Work(run.runs, run.products, time.perf_counter() - began)


def in_order(
    work: Work, batch: int, cores: Budget, options: Options, rows: int, *, draws: bool
) -> list[Candidate]:
    """What to begin with, and what to take where that cannot be.

    Args:
        work: of a forward call of the batch.
        batch: rows of it.
        cores: what this process may use.
        options: as the model was parallelized.
        rows: the batch size that the model's engines are fixed to; 0 for any.
        draws: whether the model draws: then tiles say where its draws are.
    """
    tile = options.tile
    workers = max(1, min(cores.workers // options.threads, batch))
    processes = Candidate("processes", workers, options.threads, tile)
    threads = Candidate("threads", workers, tile=tile)
    alone = Candidate("threads", 1, tile=tile or min(1 << (batch - 1).bit_length(), 1024))
    if options.engine == "stock":
        ways = [Candidate("sequential")] if not rows or batch == rows else []
        worth = workers > 1 and 3 * work.seconds > _WORTH_PROCESSES
        return [processes, *ways] if worth or not ways else [*ways, processes]
    whole = [] if draws or (rows and batch != rows) else [Candidate("cpu_batch")]
    if rows:
        return [*whole, threads, processes]
    if work.step_seconds * (1 - 1 / workers) < _WORTH_THREADS:
        return [*whole, alone, threads, processes]
    shared = [threads] if workers < _MANY_CORES else [processes, threads]
    return [*shared, *whole, alone]
