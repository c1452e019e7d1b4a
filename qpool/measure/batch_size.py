"""The largest useful batch: measured, within a budget of memory.

Owns the search. A larger batch is useful as long as it makes more samples a second; a step of it
must fit.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import psutil
import tensorflow as tf

from workers.errors import ConfigurationError, InputError
from workers.replica import serialization
from workers.tensors import leaves

log = logging.getLogger("qpool")

#: A batch twice as large has to make so many times more samples a second.
_WORTH = 1.05

#: Of the memory that is free, the share that is the budget if none is given.
_SHARE = 0.5

#: Seconds that one size is measured for, at least one step.
_SECONDS = 0.3

#: The batch for which ``auto`` chooses how all sizes are computed.
_MIDDLING = 64

#: No batch is suggested beyond this, whatever it gains.
_LARGEST = 1 << 14


@dataclasses.dataclass(frozen=True)
class Measured:
    """A training step of ``batch`` samples. ``memory_bytes`` are what all processes hold."""

    batch: int
    seconds: float
    memory_bytes: int

    @property
    def samples_per_second(self) -> float:
        return self.batch / self.seconds


class SuggestedBatch(int):
    """A number of samples, with ``measured``, the sizes that were tried, and ``why`` it is not a
    larger one."""

    measured: tuple[Measured, ...]
    why: str

    @classmethod
    def of(cls, batch: int, measured: Iterable[Measured], why: str) -> SuggestedBatch:
        made = cls(batch)
        made.measured, made.why = tuple(measured), why
        return made


def suggest_batch(
    generator: Any,
    sample: Any = None,
    *,
    memory_bytes: int | None = None,
    largest: int | None = None,
) -> SuggestedBatch:
    """The largest batch whose training step is worth its size.

    Batches of 1, 2, 4, ... samples are computed, forward and weight gradient, until samples a
    second grow by less than a twentieth from one to the next, or the next step might not fit.

    Args:
        generator: a pooled generator (or any model).
        sample: one row of its input, shape (1, ...) or more rows; default: normal draws of its
            ``latent_dim``.
        memory_bytes: what this process and the workers may hold beyond what they do now; default:
            half of the memory that is free.
        largest: no batch above this.

    Returns:
        An int that says how it was found: ``.measured`` and ``.why``.

    Raises:
        ConfigurationError: ``largest`` or ``memory_bytes`` is not positive.
        InputError: the generator cannot say its ``latent_dim``, and no ``sample`` is given.
    """
    budget = psutil.virtual_memory().available * _SHARE if memory_bytes is None else memory_bytes
    limit = min(_LARGEST, largest or _LARGEST)
    if limit < 1 or budget <= 0:
        raise ConfigurationError(
            f"largest and memory_bytes must be positive, not {largest} and {memory_bytes}"
        )
    row = _row(generator, sample)
    call, executor = _call_of(generator, row)
    calls = getattr(executor, "calls", 0)
    before = _held(generator)

    def measure(batch: int) -> Measured:
        z = tf.constant(np.repeat(row, batch, axis=0))
        seconds = _seconds(lambda: _step(generator, call, z))
        return Measured(batch, seconds, max(0, _held(generator) - before))

    try:
        return search(measure, int(budget), limit)
    finally:
        if executor is not None:
            executor.calls = calls  # draws follow from a call's number


def _call_of(generator: Any, row: np.ndarray) -> tuple[Callable[[Any], Any], Any]:
    """How the generator is called, by one strategy for all sizes; and its executor, if pooled."""
    handle = getattr(generator, "_qpool", None)
    if handle is None:
        return generator, None
    executor = handle.executor()
    if hasattr(executor, "executor_for"):  # auto: what it takes for a middling batch
        executor = executor.executor_for(tf.constant(np.repeat(row, _MIDDLING, axis=0)))
    method = "__call__" if "__call__" in handle.methods else handle.methods[0]
    return lambda z: executor.call(method, (z,), {}), executor


def search(measure: Callable[[int], Measured], budget: int, limit: int) -> SuggestedBatch:
    """Double the batch while that pays, fits and is allowed."""
    tried = [measure(1)]
    useful = tried[0]
    why = f"{limit} is the largest allowed"
    while tried[-1].batch * 2 <= limit:
        last = tried[-1]
        former = tried[-2].memory_bytes if len(tried) > 1 else 0
        if last.memory_bytes + 2 * max(last.memory_bytes - former, 0) > budget:
            why = (
                f"{2 * last.batch} samples might not fit in {budget / 2**20:.0f} MiB: "
                f"{last.batch} take {last.memory_bytes / 2**20:.0f}"
            )
            break
        tried.append(measure(2 * last.batch))
        doublings = (tried[-1].batch // useful.batch).bit_length() - 1
        if tried[-1].samples_per_second > _WORTH**doublings * useful.samples_per_second:
            useful = tried[-1]
        elif tried[-1].batch >= 4 * useful.batch:  # two sizes in a row that did not pay
            why = (
                f"{tried[-1].batch} samples at once make {tried[-1].samples_per_second:.0f} a "
                f"second, {useful.batch} make {useful.samples_per_second:.0f}"
            )
            break
    log.info("a batch of %d samples: %s", useful.batch, why)
    return SuggestedBatch.of(useful.batch, tried, why)


def _row(generator: Any, sample: Any) -> np.ndarray:
    if sample is not None:
        row = np.asarray(sample)[:1]
        if not len(row):
            raise InputError("sample has no rows; expected one row of the generator's input")
        return row
    width = getattr(generator, "latent_dim", None)
    if not isinstance(width, int):
        raise InputError("the generator has no latent_dim; pass a sample of its input")
    dtype = serialization.trainable_variables(generator)[0].dtype
    draws = np.random.default_rng(0).standard_normal((1, width))
    return draws.astype(tf.as_dtype(dtype).real_dtype.as_numpy_dtype)


def _step(generator: Any, call: Callable[[Any], Any], z: tf.Tensor) -> None:
    with tf.GradientTape() as tape:
        outputs = leaves(call(z))
    tape.gradient(outputs, serialization.trainable_variables(generator))


def _seconds(step: Callable[[], Any]) -> float:
    """Of one step, after a first that compiles."""
    step()
    done, began = 0, time.perf_counter()
    while not done or time.perf_counter() - began < _SECONDS:
        step()
        done += 1
    return (time.perf_counter() - began) / done


def _held(generator: Any) -> int:
    """Bytes that this process and the generator's workers hold."""
    found = psutil.Process(os.getpid()).memory_info().rss
    stats = generator.stats() if hasattr(generator, "stats") else {}
    workers = stats.get("pool", {}).get("workers", ())
    return int(found + sum(worker["memory_bytes"] for worker in workers))
