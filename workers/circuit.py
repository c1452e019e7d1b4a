"""A circuit applied to a state, gate by gate, as blocks.

Owns how the state lies in memory while the gates are applied, and their order. A density matrix is
a tensor with two axes a mode; the gate on the second one is conjugated.

Layout: a real array (2 D^n, batch), the batch last and contiguous. Its rows are the amplitudes'
real and imaginary parts in an order that suits the next gate, so that each gate is one batched
product of real matrices, (blocks, 2 D, 2 D) times (blocks, 2 D, rest x batch), after one gather of
whole rows; a gate of phases alone turns each amplitude. Modes that have not met stay separate
factors, vacuum as long as nothing acts on one.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from workers.matrices import Stacks, Values, matrices_of, stacked, within_xla
from workers.plan import Circuit, Step, partner, plan

#: Columns that a matrix product should have at least before rows are cut into more blocks: fewer
#: starve it, more push the operands out of the cache.
_WIDTH = 512

#: Numbers of a row that are moved at once.
_VECTOR = 8

_checkpoints = ContextVar("checkpoints", default=False)
_traces = ContextVar("traces", default=True)
_parts = ContextVar("parts", default=True)

#: What computes the circuits of a graph that is being traced, if not :func:`run` itself.
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
        if _traces.get():
            return _compiled(circuit)(stacks, state)
        return _run(circuit, stacks, state, compile_parts=False)
    compute = _checkpointed if _checkpoints.get() else _run
    return compute(circuit, stacks, state, compile_parts=_parts.get())


@dataclass
class Tally:
    """Circuits that were run: how many, and how many numbers were multiplied in them, about."""

    runs: int = 0
    products: float = 0.0

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
    """Count the circuits that are run within."""
    counted = Tally()
    before = _tally.set(counted)
    try:
        yield counted
    finally:
        _tally.reset(before)


@contextlib.contextmanager
def computed_by(function: Callable[..., tf.Tensor]) -> Iterator[None]:
    """What is traced within this has ``function`` compute circuits, with the arguments of
    :func:`run`."""
    before = _computed_by.set(function)
    try:
        yield
    finally:
        _computed_by.reset(before)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Eager calls within this run operation by operation: a few calls of a circuit that is not
    called again so are over before it is traced, which takes seconds.

    The numbers are those of a traced call but for rounding.
    """
    before = _traces.set(False)
    try:
        yield
    finally:
        _traces.reset(before)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Graphs that are traced within this and are not for XLA have no parts that are: they are
    ready in a third of the time, and take twice as long."""
    before = _parts.set(False)
    try:
        yield
    finally:
        _parts.reset(before)


@contextlib.contextmanager
def checkpointing() -> Iterator[None]:
    """Gradient checkpointing: what is traced within this keeps a circuit's parameters alone for its
    gradient, which makes the state again (Griewank and Walther, ACM TOMS 26, 19, 2000).

    For functions whose tape is outside: hundreds of tensors would leave the compiled function for
    the backward pass to take in again, which costs more than a second forward pass.
    """
    before = _checkpoints.set(True)
    try:
        yield
    finally:
        _checkpoints.reset(before)


def _checkpointed(
    circuit: Circuit, stacks: Stacks, state: tf.Tensor | None, *, compile_parts: bool
) -> tf.Tensor:
    given = [x for x in (*stacks, state) if x is not None]

    def compute(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        left = iter(tensors)
        shared, of_samples, start = (None if x is None else next(left) for x in (*stacks, state))
        return _run(circuit, (shared, of_samples), start, compile_parts=compile_parts)

    @tf.custom_gradient
    def made(*tensors: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        def pull_back(cotangent: tf.Tensor) -> list[tf.Tensor | None]:
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                found = compute(tensors)
            gradients: list[tf.Tensor | None] = tape.gradient(
                found, list(tensors), output_gradients=cotangent
            )
            return gradients

        return compute(tensors), pull_back

    found: tf.Tensor = made(*given)
    return found


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
    matrices = matrices_of(circuit, stacks, compiled=compile_parts)
    product = _Product(circuit, state)
    # What comes after the last gate that differs from sample to sample is one matrix for all.
    # With more samples than that matrix has columns, make it, and apply it once.
    shared = next((n for n in range(len(steps), 0, -1) if steps[n - 1].batched), 0)
    work = list(zip(steps, matrices, strict=True))
    for step, matrix in work[:shared]:
        product.apply(step, matrix)
    if len(work) - shared > 1 and product.batch >= 2 * circuit.cutoff**circuit.axes:
        product.apply_as_one(work[shared:])
    else:
        for step, matrix in work[shared:]:
            product.apply(step, matrix)
    found = product.state()
    used = set().union(*(step.parameters for step in steps))
    values = Values(circuit.batched, stacks)
    idle = [values.one(n) for n in range(len(circuit.batched)) if n not in used]
    return _connected(found, idle, circuit)


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


@dataclass
class _Factor:
    """Some axes of the state: rows in a known order, one column a sample (or one for all).

    ``order[row]`` says which row of the plain order (axes as listed, real and imaginary part
    last) lies there.
    """

    axes: tuple[int, ...]
    rows: tf.Tensor
    order: np.ndarray


class _Product:
    """A state as a product of factors."""

    def __init__(self, circuit: Circuit, state: tf.Tensor | None) -> None:
        self._circuit = circuit
        self._cutoff = circuit.cutoff
        self._axes = circuit.axes
        self._dtype = tf.as_dtype(circuit.dtype)
        self._real = self._dtype.real_dtype
        self._factors: list[_Factor | None] = [None] * circuit.axes  # None: vacuum
        self._batched = any(circuit.batched)
        if state is not None:
            size = self._cutoff**self._axes
            self._batched |= len(state.shape) > self._axes
            amplitudes = tf.transpose(tf.reshape(state, [-1, size]))
            rows = tf.stack([tf.math.real(amplitudes), tf.math.imag(amplitudes)], 1)
            self._set(tuple(range(self._axes)), tf.reshape(rows, [2 * size, -1]))

    def apply(self, step: Step, matrix: tf.Tensor) -> None:
        if step.vacuum:
            self._fill(step.axes[0], matrix)
            return
        factor = self._join(step.axes)
        want, blocks = _order(factor.axes, step, self._cutoff, factor.rows.shape[-1])
        size = 2 * self._cutoff
        if not step.cores or step.batched:
            rows = _permute(factor.rows, factor.order, want)
        else:
            rows, matrix = _gather(factor.rows, matrix, _places(factor.order, want))
        if not step.cores:
            self._put(_Factor(factor.axes, self._turned(rows, matrix, blocks, step), want))
            return
        if step.batched:
            # No axis of blocks where there is one block: oneDNN's product in TensorFlow (2.18 to
            # 2.21) reads beyond its operand where it stretches (1, 1, ...) to (batch, 1, ...).
            rest = len(want) // (blocks * size)
            parts = [size, rest, -1] if len(matrix.shape) == 3 else [blocks, size, rest, -1]
            last = len(parts) - 1
            split = tf.transpose(tf.reshape(rows, parts), [last, *range(last)])
            made = tf.transpose(tf.matmul(matrix, split), [*range(1, last + 1), 0])
        else:
            if len(matrix.shape) == 2:
                matrix = tf.tile(matrix[None], [blocks, 1, 1])
            made = tf.matmul(matrix, tf.reshape(rows, [blocks, size, -1]))
        rows = tf.reshape(made, [len(want), -1])
        self._put(_Factor(factor.axes, rows, want))

    def _turned(self, rows: tf.Tensor, phases: tf.Tensor, blocks: int, step: Step) -> tf.Tensor:
        """Amplitudes times exp(i angle), ``phases`` its real and imaginary part."""
        if step.batched:
            phases = tf.transpose(phases, [*range(1, len(phases.shape)), 0])
        else:
            phases = phases[..., None]
        of_pair = [-1] if step.keeps == "one" else [blocks]
        cosine, sine = (
            tf.reshape(part, [*of_pair, 1, self._cutoff, 1, tf.shape(part)[-1]])
            for part in tf.unstack(phases)
        )
        parts = tf.reshape(
            rows, [blocks, 2, self._cutoff, -1, rows.shape[-1] or tf.shape(rows)[-1]]
        )
        sign = np.reshape([-1.0, 1.0], [2, 1, 1, 1]).astype(self._real.as_numpy_dtype)
        made = parts * cosine + tf.reverse(parts, [1]) * (sine * sign)
        return tf.reshape(made, [rows.shape[0], -1])

    @property
    def batch(self) -> int:
        """The number of samples, as far as it is known."""
        return max((f.rows.shape[-1] or 1 for f in self._factors if f is not None), default=1)

    def apply_as_one(self, work: Sequence[tuple[Step, tf.Tensor]]) -> None:
        """Apply steps that are the same for all samples, multiplied with each other first."""
        size = self._cutoff**self._axes
        axes = tuple(range(self._axes))
        identity = np.eye(2 * size, size)
        product = _Product(self._circuit, None)
        order = np.arange(2 * size).reshape(size, 2).T.reshape(-1)  # all real parts, then the rest
        product._put(_Factor(axes, tf.constant(identity, self._real), order))
        for step, matrix in work:
            product.apply(step, matrix)
        made = product._join(axes)
        factor = self._join(axes)
        ids = np.arange(2 * size).reshape([self._cutoff] * self._axes + [2])
        wants = [
            ids.transpose([self._axes, *(f.axes.index(axis) for axis in axes)]).reshape(-1)
            for f in (made, factor)
        ]
        columns = _permute(made.rows, made.order, wants[0])
        real, imaginary = tf.unstack(tf.reshape(columns, [2, size, size]))
        matrix = tf.concat([columns, tf.concat([-imaginary, real], 0)], 1)
        rows = _permute(factor.rows, factor.order, wants[1])
        self._put(_Factor(axes, tf.matmul(matrix, rows), order))

    def state(self) -> tf.Tensor:
        factor = self._join(range(self._axes))
        size = self._cutoff**self._axes
        rank = self._axes
        ids = np.arange(2 * size).reshape([self._cutoff] * rank + [2])
        position = [factor.axes.index(axis) for axis in range(rank)]
        want = ids.transpose([rank, *position]).reshape(-1)
        rows = _permute(factor.rows, factor.order, want)
        amplitudes = tf.complex(*tf.unstack(tf.reshape(rows, [2, size, -1])))
        shape = [self._cutoff] * rank
        if self._batched:
            return tf.reshape(tf.transpose(amplitudes), [-1, *shape])
        return tf.reshape(amplitudes, shape)

    # -- within ---------------------------------------------------------------------------

    def _factor(self, axis: int) -> _Factor:
        factor = self._factors[axis]
        if factor is None:
            vacuum = np.zeros((2 * self._cutoff, 1))
            vacuum[0] = 1
            return self._set((axis,), tf.constant(vacuum, self._real))
        return factor

    def _set(self, axes: tuple[int, ...], rows: tf.Tensor) -> _Factor:
        return self._put(_Factor(axes, rows, np.arange(rows.shape[0])))

    def _put(self, factor: _Factor) -> _Factor:
        for axis in factor.axes:
            self._factors[axis] = factor
        return factor

    def _fill(self, axis: int, column: tf.Tensor) -> None:
        """Put an axis that was in vacuum into the state ``column``, ([batch,] 2 D)."""
        rows = tf.transpose(tf.reshape(column, [-1, 2 * self._cutoff]))
        order = np.arange(2 * self._cutoff).reshape(-1, 2).T.reshape(-1)
        self._put(_Factor((axis,), rows, order))

    def _join(self, axes: Sequence[int]) -> _Factor:
        """One factor that holds all these axes."""
        joined: list[_Factor] = []
        for axis in axes:
            factor = self._factor(axis)
            if all(factor is not known for known in joined):
                joined.append(factor)
        return functools.reduce(self._merge, joined)

    def _merge(self, left: _Factor, right: _Factor) -> _Factor:
        parts = []
        for factor in (left, right):
            rows = _permute(factor.rows, factor.order, np.arange(len(factor.order)))
            parts.append(tf.unstack(tf.reshape(rows, [rows.shape[0] // 2, 2, -1]), axis=1))
        (a, b), (c, d) = parts
        a, b, c, d = a[:, None], b[:, None], c[None], d[None]
        rows = tf.stack([a * c - b * d, a * d + b * c], 2)
        rows = tf.reshape(rows, [len(left.order) * len(right.order) // 2, -1])
        return self._set(left.axes + right.axes, rows)


def _order(
    axes: tuple[int, ...], step: Step, cutoff: int, batch: int | None
) -> tuple[np.ndarray, int]:
    """The order of rows that a step wants, (blocks, 2 x D, rest), and its number of blocks."""
    rank = len(axes)
    ids = np.arange(2 * cutoff**rank).reshape([cutoff] * rank + [2])
    acted = [axes.index(axis) for axis in step.axes]
    others = [n for n in range(rank) if n not in acted]
    if step.keeps != "one":
        ids = ids.transpose([*acted, rank, *others])
        block, n0 = np.mgrid[:cutoff, :cutoff]
        pairs = ids[n0, partner(step.keeps, block, n0, cutoff)]  # block, n0, part, others
        return np.swapaxes(pairs, 1, 2).reshape(-1), cutoff
    outer = 0
    while (
        not step.batched
        and outer < len(others)
        and cutoff ** (len(others) - outer - 1) * (batch or 1) >= _WIDTH
    ):
        outer += 1
    ids = ids.transpose([*others[:outer], rank, *acted, *others[outer:]])
    return ids.reshape(-1), cutoff**outer


def _permute(rows: tf.Tensor, order: np.ndarray, want: np.ndarray) -> tf.Tensor:
    """Rows that lie in one order, in another."""
    return _gather(rows, tf.zeros([], rows.dtype), _places(order, want))[0]


def _places(order: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Where the rows that are wanted lie in an order."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places[want]


def _gather(rows: tf.Tensor, beside: tf.Tensor, index: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
    """``rows[index]`` for a permutation, and ``beside`` as it is; the vjp is a gather too.

    Within XLA, ``beside`` has a zero added that comes from the gathered rows: a gather that is used
    twice is a loop of its own, over whole rows. One that is used once is put into the loop of its
    user, say a product's operand of another shape, and fetches number by number (4 times slower).
    """
    if np.array_equal(index, np.arange(len(index))):
        return rows, beside
    batch = rows.shape[-1]
    apart = within_xla() and batch is not None

    @tf.custom_gradient
    def gather(
        rows: tf.Tensor, beside: tf.Tensor
    ) -> tuple[tuple[tf.Tensor, tf.Tensor], Callable[..., tuple[tf.Tensor, tf.Tensor]]]:
        if apart:
            # The loop over so few numbers is unrolled, into one or two of the machine's vectors.
            few = math.gcd(batch, _VECTOR)
            found = tf.gather(tf.reshape(rows, [len(index), -1, few]), index)
            zero = tf.cast(found[0, 0, 0] > np.inf, beside.dtype)
            made = tf.reshape(found, [len(index), -1]), beside + zero
        else:
            made = tf.gather(rows, index), tf.identity(beside)
        return made, lambda of_rows, of_beside: _gather(of_rows, of_beside, np.argsort(index))

    made: tuple[tf.Tensor, tf.Tensor] = gather(rows, beside)
    return made
