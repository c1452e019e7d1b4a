"""A circuit applied to a state: how it is computed, and what counts or replaces it.

Owns the order of a circuit's steps: which are applied one by one, which as a loop, which as one
matrix; and how much of it is compiled or kept for a gradient. The state is ``product``'s, the
gates' numbers are ``matrices``'.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from workers.context import during
from workers.engine import gates
from workers.engine.exported import Exportable
from workers.engine.matrices import Stacks, Values, matrices_of, stacked
from workers.engine.plan import Circuit, Step, meetings, plan
from workers.engine.product import Product
from workers.engine.repeats import Run, runs
from workers.tensors import in_graph, in_loops

_checkpoints = ContextVar("checkpoints", default=False)
_first = ContextVar("first", default=0.0)
_parts = ContextVar("parts", default=True)

#: Bytes that a loop may keep for its gradient, which it writes twice, first zeros: of few steps and
#: of many, which take long to compile where they are written out. One core of a Sapphire Rapids, 2
#: MB of cache, forward and back: with 0.7 and 1.3 MB as long as written out, with 3 to 10 MB 1.13
#: to 1.27 times (2 and 3 modes, 64 to 90 steps; compiled in two thirds of the time). On a Zen 5
#: EPYC as long with 16 MB, and 1.3 times with 32.
_KEPT = 2 * 2**20
_KEPT_OF_MANY = 16 * 2**20

#: Steps that are many.
_MANY = 128

#: Runs of a circuit after which it is traced: one takes about as long as eight of them.
_WORTH_TRACING = 8

#: The part of all steps that may be applied to axes which need not be one factor yet.
_EARLY = 1 / 20

#: What computes the circuits of a graph that is being traced, if not ``run`` itself.
_computed_by: ContextVar[Callable[..., tf.Tensor] | None] = ContextVar("computed_by", default=None)
_tally: ContextVar[Tally | None] = ContextVar("tally", default=None)


def run(circuit: Circuit, parameters: Sequence[tf.Tensor], state: tf.Tensor | None) -> tf.Tensor:
    """The state after all gates.

    Args:
        circuit: what to run.
        parameters: real, scalars or of shape (batch,) as ``circuit.batched`` says.
        state: complex, ([batch,] D, ..., D), if ``circuit.prepared``.

    Returns:
        complex, (D, ..., D), with a batch axis in front if any parameter or the state has one.
    """
    computed_by = _computed_by.get()
    if computed_by is not None and not tf.executing_eagerly():
        return computed_by(circuit, parameters, state)
    if (tally := _tally.get()) is not None:
        tally.add(circuit, parameters, state)
    stacks = stacked(parameters, circuit.batched)
    if tf.executing_eagerly():
        if not (first := _first.get()) or next(_met(circuit)) > first:
            return in_graph(_compiled(circuit), stacks, state)
        return _run(circuit, stacks, state, compile_parts=False)
    given = [x for x in (*stacks, state) if x is not None]
    (found,) = _exportable(circuit)(*given, checkpointed=_checkpoints.get())
    return found


@dataclass
class Tally:
    """Circuits that were run: how many, and how many numbers were multiplied in them, about.

    ``failures``: what was raised in runs of programs, each in a line. ``went_on``: an engine went
    on with the state that an earlier call had left it in. ``began``: engines that a call began with
    as they are after a reset; ``engines``: all that ran.
    """

    runs: int = 0
    products: float = 0.0
    went_on: bool = False
    failures: list[str] = field(default_factory=list)
    began: list[Any] = field(default_factory=list)
    engines: list[Any] = field(default_factory=list)

    def add(
        self, circuit: Circuit, parameters: Sequence[tf.Tensor], state: tf.Tensor | None
    ) -> None:
        self.runs += 1
        batch = max(
            [value.shape[0] or 1 for value in parameters if value.shape.rank]
            + [state.shape[0] or 1 for _ in [0] if state is not None and circuit.batched_state]
            + [1]
        )
        size = 4 * circuit.cutoff ** (circuit.axes + 1) * batch
        self.products += size * sum(bool(step.cores) for step in plan(circuit))


@contextlib.contextmanager
def tally() -> Iterator[Tally]:
    """Count the circuits that are run within; who counts around this counts them too."""
    counted = Tally()
    try:
        with during(_tally, counted):
            yield counted
    finally:
        if (outer := _tally.get()) is not None:
            outer.runs += counted.runs
            outer.products += counted.products
            outer.failures += counted.failures
            outer.went_on |= counted.went_on
            outer.began += counted.began
            outer.engines += counted.engines


def noted() -> Tally | None:
    """What has been counted and noted so far."""
    tally = _tally.get()
    if tally is None:
        return None
    return replace(
        tally, failures=[*tally.failures], began=[*tally.began], engines=[*tally.engines]
    )


def take_back(before: Tally | None) -> None:
    """Have what was counted and noted be what it was ``before``: it is done again."""
    tally = _tally.get()
    if tally is not None and before is not None:
        vars(tally).update(vars(before))


def run_elsewhere() -> None:
    """Note that Strawberry Fields computes a state by itself."""
    tally = _tally.get()
    if tally is not None:
        tally.runs += 1


def going_on() -> None:
    """Note that an engine goes on with the state of an earlier call."""
    tally = _tally.get()
    if tally is not None:
        tally.went_on = True


def running(engine: Any) -> None:
    """Note that an engine is run in a call."""
    tally = _tally.get()
    if tally is not None:
        tally.engines.append(engine)


def beginning(engine: Any) -> None:
    """Note that an engine is run for the first time since it was reset before the call."""
    tally = _tally.get()
    if tally is not None:
        tally.began.append(engine)


@contextlib.contextmanager
def noting_failures() -> Iterator[None]:
    """What is raised within is in the tally too: the caller may catch it."""
    try:
        yield
    except Exception as error:
        tally = _tally.get()
        if tally is not None:
            text = (str(error).strip().splitlines() or [""])[0][:200]
            tally.failures.append(f"{type(error).__name__}: {text}")
        raise


def computed_by(function: Callable[..., tf.Tensor] | None) -> AbstractContextManager[Any]:
    """What is traced within this has ``function`` compute circuits, with the arguments of
    ``run``; None is ``run`` itself."""
    return during(_computed_by, function)


@contextlib.contextmanager
def untraced(first: float = _WORTH_TRACING) -> Iterator[None]:
    """Eager calls within this run operation by operation, the ``first`` ones of each circuit: a few
    are over before it is traced. A loop over rows has more, which a trace makes four times as fast.

    The numbers are those of a traced call but for rounding.
    """
    with during(_first, first):
        yield


def uncompiled() -> AbstractContextManager[Any]:
    """Graphs that are traced within this and are not for XLA have no parts that are: they are
    ready in a third of the time, and take twice as long."""
    return during(_parts, False)


def checkpointing() -> AbstractContextManager[Any]:
    """Gradient checkpointing: what is traced within this keeps a circuit's parameters alone for its
    gradient, which makes the state again.

    For functions whose tape is outside: hundreds of tensors would leave the compiled function for
    the backward pass to take in again, which costs more than a second forward pass.
    """
    return during(_checkpoints, True)


@functools.lru_cache(maxsize=256)
def _exportable(circuit: Circuit) -> Exportable:
    """The circuit as a function of those of its parameters' stacks, and its state, that it has."""
    there = [False in circuit.batched, True in circuit.batched, circuit.prepared]

    def compute(*tensors: tf.Tensor) -> list[tf.Tensor]:
        left = iter(tensors)
        shared, of_samples, state = (next(left) if flag else None for flag in there)
        return [_run(circuit, (shared, of_samples), state, compile_parts=_parts.get())]

    tables = [gates.tables(gate.kind, circuit.cutoff) for gate in circuit.gates]
    constants = {id(table): table for found in tables for table in found}
    return Exportable(repr(circuit), compute, tuple(constants.values()))


@functools.lru_cache(maxsize=256)
def _met(circuit: Circuit) -> Iterator[int]:
    """Counts the eager runs of a circuit that may not be traced."""
    return itertools.count(1)


@functools.lru_cache(maxsize=256)
def _compiled(circuit: Circuit) -> tf.types.experimental.PolymorphicFunction:
    # Its parts are not compiled: an eager call would wait for seconds at each new batch size.
    # For the same reason it is traced for any size, once it has met two.
    return tf.function(
        functools.partial(_run, circuit, compile_parts=False),
        autograph=False,
        reduce_retracing=True,
    )


def _run(
    circuit: Circuit,
    stacks: Stacks,
    state: tf.Tensor | None,
    *,
    compile_parts: bool,
) -> tf.Tensor:
    steps = plan(circuit)
    columns = _columns(circuit, stacks, state)
    # What comes after the last gate that differs from sample to sample is one matrix for all.
    # With more samples than that matrix has columns, make it, and apply it once.
    # A step of a mode in vacuum gives a state, not a matrix: it comes before that.
    before = [n + 1 for n, step in enumerate(steps) if step.batched or step.vacuum]
    shared = max(before, default=0)
    if len(steps) - shared < 2 or (columns or 1) < 2 * circuit.cutoff**circuit.axes:
        shared = len(steps)
    together, first, rest = runs_of(circuit, shared, columns if in_loops() else None)
    matrices = matrices_of(circuit, stacks, [*first, *rest], compiled=compile_parts)
    product = Product(circuit, state, columns)
    for run, matrix in zip(first, matrices[: len(first)], strict=True):
        if together and not steps[run.first].vacuum:
            product.join()
        _apply(product, steps, run, matrix)
    if rest:
        whole = Product.identity(circuit)
        for run, matrix in zip(rest, matrices[len(first) :], strict=True):
            _apply(whole, steps, run, matrix)
        product.apply_all_of(whole)
    found = product.state()
    used = set().union(*(step.parameters for step in steps))
    values = Values(circuit.batched, stacks)
    idle = [values.one(n) for n in range(len(circuit.batched)) if n not in used]
    return _connected(found, idle, circuit)


@functools.lru_cache(maxsize=256)
def runs_of(
    circuit: Circuit, shared: int, columns: int | None
) -> tuple[bool, list[Run], list[Run]]:
    """The circuit's steps as runs: those before ``shared``, and those of the matrix after it.

    Whether all axes are to be one factor from the first step on, too: a few steps are applied to
    more than they need be, and more of them are in a loop. ``columns`` is the number of samples,
    None where there shall be no loops.
    """
    steps = plan(circuit)
    size = circuit.cutoff**circuit.axes
    kept = len(steps) * size * tf.as_dtype(circuit.dtype).size
    singles = [Run(n) for n in range(len(steps))]
    first, rest = singles[:shared], singles[shared:]
    most = _KEPT if len(steps) <= _MANY else _KEPT_OF_MANY
    if columns is not None and rest and kept * size <= most:
        found = runs([step.form for step in steps[shared:]])
        rest = [replace(run, first=run.first + shared) for run in found]
    if columns is None or kept * columns > most:
        return False, first, rest
    met, alone = meetings(steps[:shared], circuit.axes)
    everything = frozenset(range(circuit.axes))
    together = alone is not None and alone <= _EARLY * len(steps)
    if together:
        met = [None if step.vacuum else everything for step in steps[:shared]]
    first = runs(
        [axes and (step.form, axes) for step, axes in zip(steps[:shared], met, strict=True)]
    )
    return together, first, rest


def _apply(product: Product, steps: Sequence[Step], run: Run, found: Any) -> None:
    """Apply a run with what ``matrices_of`` made for it."""
    if run.size == 1:
        product.apply(steps[run.first], found)
    else:
        product.repeat(steps[run.first : run.first + run.size], run.period, found)


def _columns(circuit: Circuit, stacks: Stacks, state: tf.Tensor | None) -> int | None:
    """How many samples there are: 1 if nothing has a batch, None if it is not known."""
    if state is not None and circuit.batched_state:
        return state.shape[0]
    if any(step.batched for step in plan(circuit)):
        assert stacks[1] is not None
        return stacks[1].shape[-1]
    return 1


def _connected(state: tf.Tensor, idle: Sequence[tf.Tensor], circuit: Circuit) -> tf.Tensor:
    """``state``, depending on parameters that change nothing (a rotated vacuum).

    Their gradient is 0 rather than none, their batch is the state's, and a NaN is one everywhere.
    """
    if not idle:
        return state
    nothing = tf.zeros([], state.dtype.real_dtype)
    for parameter in idle:
        nothing += 0.0 * tf.cast(parameter, nothing.dtype)
    if len(nothing.shape) == 1:
        nothing = tf.reshape(nothing, [-1, *[1] * circuit.axes])
    nothing = tf.cast(nothing, state.dtype.real_dtype)
    return state + tf.complex(nothing, tf.zeros_like(nothing))  # a cast's gradient would warn
