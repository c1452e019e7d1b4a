"""The matrices of a circuit's steps: all of one form in one batched computation.

Owns how gates' cores and phases are multiplied into real matrices. Those that depend on the sample
are built apart from those that do not, so that a weight's gate is built once for all samples.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from workers.gates import FLOAT, Complex, Pullback
from workers.plan import KINDS, TERMS, Angle, Circuit, Step, partner, plan

#: The parameters without a batch axis as (P,), those with one as (Q, batch); None for none.
Stacks = tuple[tf.Tensor | None, tf.Tensor | None]


def matrices_of(circuit: Circuit, stacks: Stacks, *, compiled: bool) -> list[tf.Tensor]:
    """The matrix of each step of ``plan(circuit)``, real: ([batch,] [blocks,] 2 D, 2 D).

    Of a step on the vacuum, the real and imaginary parts of the column: ([batch,] 2 D). Of a step
    without cores, those of the diagonal: ([batch,] 2, [blocks,] D).
    ``compiled``: by XLA, also outside of it: they are many small operations.
    """
    steps = plan(circuit)
    found: list[tf.Tensor] = [None] * len(steps)
    # Within XLA not as a function of its own: the shapes that its backward pass takes from its
    # forward pass would have XLA take the parameters for constants, and compile for each value.
    make = _compiled(circuit) if compiled and not within_xla() else _making(circuit)
    made = make(*stacks)
    for numbers, stack in zip(_alike(steps).values(), made, strict=True):
        for number, matrix in zip(numbers, tf.unstack(stack), strict=True):
            found[number] = matrix
    return found


@functools.lru_cache(maxsize=256)
def _compiled(circuit: Circuit) -> tf.types.experimental.PolymorphicFunction:
    return tf.function(_making(circuit), jit_compile=True, autograph=False)


def _making(circuit: Circuit) -> Callable[..., list[tf.Tensor]]:
    """The function that makes the matrices: a stack for each group of steps of ``_alike``."""
    steps = plan(circuit)
    dtype = tf.as_dtype(circuit.dtype).real_dtype

    def matrices(shared: tf.Tensor | None, of_samples: tf.Tensor | None) -> list[tf.Tensor]:
        values = Values(circuit.batched, (shared, of_samples))
        return _build(steps, circuit.cutoff, values, dtype)

    return matrices


def within_xla() -> bool:
    """Whether what is being traced is for XLA."""
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def stacked(parameters: Sequence[tf.Tensor], batched: Sequence[bool]) -> Stacks:
    """The parameters, in the precision that matrices are made in."""

    def stack(flag: bool) -> tf.Tensor | None:
        chosen = [p for p, other in zip(parameters, batched, strict=True) if other == flag]
        if not chosen:
            return None
        if len({value.dtype for value in chosen}) > 1:
            chosen = [tf.cast(value, FLOAT) for value in chosen]
        return tf.cast(tf.stack(chosen), FLOAT)  # hundreds of scalars, but one cast

    return stack(False), stack(True)


class Values:
    """The parameters' values, found by their positions."""

    def __init__(self, batched: Sequence[bool], stacks: Stacks) -> None:
        self._stacks = dict(zip((False, True), stacks, strict=True))
        counts = {False: 0, True: 0}
        self._places = []
        for flag in batched:
            self._places.append((flag, counts[flag]))
            counts[flag] += 1

    def one(self, position: int) -> tf.Tensor:
        """A parameter: a scalar, or (batch,)."""
        flag, place = self._places[position]
        stack = self._stacks[flag]
        assert stack is not None
        return stack[place]

    def linear(self, rows: Sequence[Sequence[tuple[int, float]]], *, batched: bool) -> tf.Tensor:
        """Sums of (parameter, factor), one a row: (rows,); if ``batched`` (rows, batch or 1)."""
        total = None
        for flag, stack in self._stacks.items():
            if stack is None:
                continue
            matrix = np.zeros((len(rows), stack.shape[0]))
            for row, terms in enumerate(rows):
                for position, factor in terms:
                    if self._places[position][0] == flag:
                        matrix[row, self._places[position][1]] += factor
            if not matrix.any():
                continue
            if flag:
                part = tf.matmul(tf.constant(matrix, FLOAT), stack)
            else:
                part = tf.linalg.matvec(tf.constant(matrix, FLOAT), stack)
                part = part[:, None] if batched else part
            total = part if total is None else total + part
        if total is None:  # all of them cancel
            return tf.zeros([len(rows), 1] if batched else [len(rows)], FLOAT)
        return total


def _alike(steps: Sequence[Step]) -> dict[tuple, list[int]]:
    """Steps by what makes their matrices: in one group they differ in their parameters only."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for number, step in enumerate(steps):
        names = tuple(name for name, _ in step.cores)
        key = (step.keeps, names, step.batched, step.vacuum, step.conjugate)
        groups[key].append(number)
    return dict(groups)


def _build(steps: Sequence[Step], cutoff: int, values: Values, dtype: tf.DType) -> list[tf.Tensor]:
    """For each group the matrices, as real ones: (K, [batch,] [blocks,] 2 D, 2 D).

    Of steps on the vacuum, the real and imaginary parts of the columns: (K, [batch,] 2 D); of
    steps without cores, those of the diagonals: (K, [batch,] 2, [blocks,] D).
    """
    stacks = []
    for numbers in _alike(steps).values():
        group = [steps[number] for number in numbers]
        real, imaginary = _build_alike(group, cutoff, values, dtype)
        imaginary = tf.zeros_like(real) if imaginary is None else imaginary
        if group[0].conjugate:
            imaginary = -imaginary
        stacks.append(_as_real(real, imaginary, group[0]))
    return stacks


def _as_real(real: tf.Tensor, imaginary: tf.Tensor, step: Step) -> tf.Tensor:
    """Complex (K, ..., D, D) -> real (K, ..., 2 D, 2 D), [[Re, -Im], [Im, Re]]."""
    size = 2 * real.shape[-1]
    batch = [-1] if step.batched else []
    if step.vacuum:
        column = tf.concat([real, imaginary], -1)
        return tf.reshape(column, [real.shape[0], *batch, size])
    if not step.cores:
        return tf.stack([real, imaginary], 1 + step.batched)
    blocks = real.shape[1 + step.batched : -2].as_list()
    # Not by concatenation, which XLA compiles to a slow loop: by products with 2 x 2 matrices.
    one, turn = (
        np.reshape(matrix, [2, 1, 2, 1]).astype(real.dtype.as_numpy_dtype)
        for matrix in ([[1, 0], [0, 1]], [[0, -1], [1, 0]])
    )
    pairs = real[..., None, :, None, :] * one + imaginary[..., None, :, None, :] * turn
    return tf.reshape(_once(pairs), [real.shape[0], *batch, *blocks, size, size])


def _build_alike(group: list[Step], cutoff: int, values: Values, dtype: tf.DType) -> Complex:
    """(K, [batch,] [blocks,] D, D) for K steps that differ in their parameters only; the diagonal
    alone, (K, [batch,] [blocks,] D), without cores.

    Angles and cores are computed in double precision; what is made of them has the state's own.
    """
    batched, vacuum = group[0].batched, group[0].vacuum
    grid = _grid(group[0].keeps, cutoff)  # (terms, [blocks,] D)
    waves = [
        None  # what comes first does nothing to the vacuum
        if vacuum and not segment
        else _waves([step.angles[segment] for step in group], values, grid, dtype, batched=batched)
        for segment in range(len(group[0].angles))
    ]
    if not group[0].cores:
        return waves[0] or (tf.ones([len(group), *grid.shape[1:]], dtype), None)

    def core(segment: int) -> Complex:
        rows = [[(step.cores[segment][1], 1.0)] for step in group]
        argument = values.linear(rows, batched=batched)
        kind = KINDS[group[0].cores[segment][0]]
        if segment == 0 and vacuum and kind.vacuum:
            return _complex(kind.vacuum(argument, cutoff), dtype)
        assert kind.core is not None
        made = _complex(kind.core(argument, cutoff), dtype)
        return _first_column(made) if segment == 0 and vacuum else made

    axis = None if vacuum else -1
    result = core(0) if vacuum else _times(core(0), waves[0], axis=-2)
    result = _times(result, waves[1], axis=axis)
    for segment in range(1, len(group[0].cores)):
        result = _compose(core(segment), result, vector=vacuum)
        result = _times(result, waves[segment + 1], axis=axis)
    return result


def _waves(
    angles: Sequence[Angle],
    values: Values,
    grid: np.ndarray,
    dtype: tf.DType,
    *,
    batched: bool,
) -> Complex | None:
    """exp(i angle) at each point of the grid: (K, [batch,] [blocks,] D). None if all are 0."""
    if not any(angles):
        return None
    terms = [t for t in TERMS if any(t == term for angle in angles for term, _, _ in angle)]
    rows = [[(p, f) for t, p, f in angle if t == term] for angle in angles for term in terms]
    linear = values.linear(rows, batched=batched)
    linear = tf.reshape(linear, [len(angles), len(terms), -1])
    shape = grid.shape[1:]
    grid = grid[[TERMS.index(term) for term in terms]].reshape(len(terms), -1)
    # Not einsum: that of older TensorFlows has no double precision within XLA.
    angle = tf.matmul(tf.transpose(linear, [0, 2, 1]), tf.constant(grid, FLOAT))
    angle = tf.reshape(angle, [len(angles), *([-1] if batched else []), *shape])
    return _once(tf.cast(tf.cos(angle), dtype)), _once(tf.cast(tf.sin(angle), dtype))


@tf.custom_gradient
def _once(x: tf.Tensor) -> tuple[tf.Tensor, Pullback]:
    """x, computed on its own: XLA would put its loop into the loops of all that use it.

    It does so with sines and cosines, which it takes for cheap, and with what comes from a barrier,
    which it drops before. A gather is dear to it: one of all rows, as they are, is left alone.
    """
    if not within_xla() or not x.shape.is_fully_defined():
        kept = tf.identity(x)
    else:
        rows = tf.reshape(x, [-1, x.shape[-1] if x.shape.num_elements() > x.shape[-1] else 1])
        kept = tf.reshape(tf.gather(rows, np.arange(rows.shape[0])), x.shape)
    return kept, lambda cotangent: _once(cotangent)


def _grid(keeps: str, cutoff: int) -> np.ndarray:
    """The terms of a phase at each row of a matrix: (terms, D), for a pair (terms, D, D)."""
    if keeps == "one":
        n0: np.ndarray = np.arange(cutoff)
        n1: np.ndarray = 0 * n0
    else:
        block, n0 = np.mgrid[:cutoff, :cutoff]
        n1 = partner(keeps, block, n0, cutoff)
    return np.stack([n0, n0**2, n1, n1**2, n0 * n1]).astype(float)


def _complex(matrix: tf.Tensor | Complex, dtype: tf.DType) -> Complex:
    real, imaginary = matrix if isinstance(matrix, tuple) else (matrix, None)
    return tf.cast(real, dtype), None if imaginary is None else tf.cast(imaginary, dtype)


def _first_column(matrix: Complex) -> Complex:
    real, imaginary = matrix
    return real[..., 0], None if imaginary is None else imaginary[..., 0]


def _times(x: Complex, phases: Complex | None, axis: int | None) -> Complex:
    """x times phases, along its columns (axis=-2 is broadcast) or rows; both may be real."""
    if phases is None:
        return x
    c, s = (part if axis is None else tf.expand_dims(part, axis) for part in phases)
    real, imaginary = x
    if imaginary is None:
        return real * c, real * s
    return real * c - imaginary * s, real * s + imaginary * c


def _compose(left: Complex, right: Complex, *, vector: bool) -> Complex:
    product = tf.linalg.matvec if vector else tf.linalg.matmul
    (a, b), (c, d) = left, right
    real, imaginary = product(a, c), None
    if b is not None and d is not None:
        real -= product(b, d)
    if d is not None:
        imaginary = product(a, d)
    if b is not None:
        imaginary = product(b, c) if imaginary is None else imaginary + product(b, c)
    return real, imaginary
