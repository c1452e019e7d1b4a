"""A state as a product of factors, to which steps are applied.

Owns how the state lies in memory while gates are applied. A density matrix is a tensor with two
axes a mode; the gate on the second one is conjugated.

Layout: a real array (2 D^n, batch), the batch last and contiguous. Its rows are the amplitudes'
real and imaginary parts in an order that suits the next gate, so that each gate is one batched
product of real matrices, (blocks, 2 D, 2 D) times (blocks, 2 D, rest x batch), after one gather of
whole rows; a gate of phases alone turns each amplitude. Modes that have not met stay separate
factors, vacuum as long as nothing acts on one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from workers.custom_gradient import custom_gradient
from workers.engine.plan import Circuit, Form, Step, partner
from workers.engine.scan import VECTOR, Place, scan
from workers.tensors import matmul, within_xla

#: Columns that a matrix product should have at least before rows are cut into more blocks: fewer
#: starve it, more push the operands out of the cache.
_WIDTH = 512


@dataclass
class _Factor:
    """Some axes of the state: rows in a known order, one column a sample (or one for all).

    ``order[row]`` says which row of the plain order (axes as listed, real and imaginary part
    last) lies there.
    """

    axes: tuple[int, ...]
    rows: tf.Tensor
    order: np.ndarray


class Product:
    """A state as a product of factors."""

    def __init__(self, circuit: Circuit, state: tf.Tensor | None, columns: int | None) -> None:
        """``columns``: how many samples there will be, as far as it is known."""
        self._cutoff = circuit.cutoff
        self._axes = circuit.axes
        self._columns = columns
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
        if not step.cores or step.batched:
            rows = _permute(factor.rows, factor.order, want)
        else:
            rows, matrix = _gather(factor.rows, matrix, _places(factor.order, want))
        self._put(_Factor(factor.axes, self._act(rows, matrix, step, blocks), want))

    def repeat(
        self, steps: Sequence[Step], period: int, matrices: Mapping[Form, tf.Tensor]
    ) -> None:
        """Apply steps of which each is like the one a period before, all on one factor, in a loop.

        ``matrices``: for each form the matrices of the steps that have it, one after another.
        """
        axes = self._join(steps[0].axes).axes
        if any(step.batched for step in steps):
            self._widen(axes)
        factor = self._join(axes)
        columns = factor.rows.shape[-1]
        orders = [_order(axes, step, self._cutoff, columns) for step in steps]
        wants = [want for want, _ in orders]
        # In the order that a turn leaves behind, which then is what every turn begins with.
        rows = _permute(factor.rows, factor.order, wants[-1])
        befores = [wants[-1], *wants[:-1]]
        index = [_places(before, want) for before, want in zip(befores, wants, strict=True)]
        forms = list(matrices)
        numbers = {form: iter(range(len(steps))) for form in forms}
        where = [next(numbers[step.form]) for step in steps]
        places = [
            Place(
                functools.partial(self._act, step=step, blocks=orders[n][1]),
                np.stack(index[n::period]),
                forms.index(step.form),
                np.array(where[n::period]),
            )
            for n, step in enumerate(steps[:period])
        ]
        self._put(_Factor(axes, scan(places, rows, list(matrices.values())), wants[-1]))

    def join(self) -> None:
        """Make all axes one factor."""
        self._join(range(self._axes))

    def _widen(self, axes: Sequence[int]) -> None:
        """Give the factor a column for each sample, if it has one for all."""
        factor = self._join(axes)
        if factor.rows.shape[-1] != self._columns:
            rows = tf.broadcast_to(factor.rows, [len(factor.order), self._columns])
            self._put(_Factor(factor.axes, rows, factor.order))

    def _act(self, rows: tf.Tensor, matrix: tf.Tensor, step: Step, blocks: int) -> tf.Tensor:
        """A step's matrix on rows in the order that the step wants."""
        if not step.cores:
            return self._turned(rows, matrix, blocks, step)
        size, count = 2 * self._cutoff, rows.shape[0]
        if step.batched:
            # No axis of blocks where there is one block: see ``tensors.matmul``.
            rest = count // (blocks * size)
            parts = [size, rest, -1] if len(matrix.shape) == 3 else [blocks, size, rest, -1]
            last = len(parts) - 1
            split = tf.transpose(tf.reshape(rows, parts), [last, *range(last)])
            made = tf.transpose(matmul(matrix, split), [*range(1, last + 1), 0])
        else:
            if len(matrix.shape) == 2:
                matrix = tf.tile(matrix[None], [blocks, 1, 1])
            made = matmul(matrix, tf.reshape(rows, [blocks, size, -1]))
        return tf.reshape(made, [count, -1])

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

    @classmethod
    def identity(cls, circuit: Circuit) -> Product:
        """Every state of the basis, one a column: what is applied to it becomes one matrix."""
        size = circuit.cutoff**circuit.axes
        product = cls(circuit, None, size)
        order = np.arange(2 * size).reshape(size, 2).T.reshape(-1)  # all real parts, then the rest
        rows = tf.constant(np.eye(2 * size, size), product._real)
        product._put(_Factor(tuple(range(circuit.axes)), rows, order))
        return product

    def apply_all_of(self, made: Product) -> None:
        """Apply what was applied to the identity ``made``, as one matrix."""
        columns, order = made._by_parts()
        size = columns.shape[-1]
        real, imaginary = tf.unstack(tf.reshape(columns, [2, size, size]))
        matrix = tf.concat([columns, tf.concat([-imaginary, real], 0)], 1)
        rows, _ = self._by_parts()
        self._put(_Factor(tuple(range(self._axes)), matmul(matrix, rows), order))

    def state(self) -> tf.Tensor:
        rows, _ = self._by_parts()
        size = self._cutoff**self._axes
        amplitudes = tf.complex(*tf.unstack(tf.reshape(rows, [2, size, -1])))
        shape = [self._cutoff] * self._axes
        if self._batched:
            return tf.reshape(tf.transpose(amplitudes), [-1, *shape])
        return tf.reshape(amplitudes, shape)

    # -- within ---------------------------------------------------------------------------

    def _by_parts(self) -> tuple[tf.Tensor, np.ndarray]:
        """All axes' rows, the real parts before the imaginary ones, and that order."""
        factor = self._join(range(self._axes))
        size = self._cutoff**self._axes
        ids = np.arange(2 * size).reshape([self._cutoff] * self._axes + [2])
        position = [factor.axes.index(axis) for axis in range(self._axes)]
        want = ids.transpose([self._axes, *position]).reshape(-1)
        order = np.arange(2 * size).reshape(size, 2).T.reshape(-1)  # the same, of sorted axes
        return _permute(factor.rows, factor.order, want), order

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

    @custom_gradient
    def gather(
        rows: tf.Tensor, beside: tf.Tensor
    ) -> tuple[tuple[tf.Tensor, tf.Tensor], Callable[..., tuple[tf.Tensor, tf.Tensor]]]:
        if apart:
            # The loop over so few numbers is unrolled, into one or two of the machine's vectors.
            few = math.gcd(batch, VECTOR)
            found = tf.gather(tf.reshape(rows, [len(index), -1, few]), index)
            zero = tf.cast(found[0, 0, 0] > np.inf, beside.dtype)
            made = tf.reshape(found, [len(index), -1]), beside + zero
        else:
            made = tf.gather(rows, index), tf.identity(beside)
        return made, lambda of_rows, of_beside: _gather(of_rows, of_beside, np.argsort(index))

    made: tuple[tf.Tensor, tf.Tensor] = gather(rows, beside)
    return made
