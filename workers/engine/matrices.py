"""The matrices of a circuit's steps: all of one form in one batched computation.

Owns how gates' cores and phases are multiplied into real matrices. Those that depend on the sample
are built apart from those that do not, so that a weight's gate is built once for all samples.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from workers.custom_gradient import custom_gradient
from workers.engine.gates import FLOAT, Complex, Pullback
from workers.engine.plan import KINDS, TERMS, Circuit, Form, Step, partner, plan
from workers.engine.repeats import Run
from workers.tensors import matmul, matvec, may_loop, permuted, within_xla

#: The parameters without a batch axis as (P,), those with one as (Q, batch); None for none.
Stacks = tuple[tf.Tensor | None, tf.Tensor | None]


def matrices_of(
    circuit: Circuit, stacks: Stacks, runs: Sequence[Run], *, compiled: bool
) -> list[Any]:
    """What each run of steps of ``plan(circuit)`` is applied with; the runs are all of them.

    Of a single step, its matrix, real: ([batch,] [blocks,] 2 D, 2 D). Of a step on the vacuum, the
    real and imaginary parts of the column: ([batch,] 2 D). Of a step without cores, those of the
    diagonal: ([batch,] 2, [blocks,] D). Of a loop, a stack of them for each form that its steps
    have, in their order.
    ``compiled``: by XLA, also outside of it: they are many small operations.
    """
    steps = plan(circuit)
    # Within XLA not as a function of its own: the shapes that its backward pass takes from its
    # forward pass would have XLA take the parameters for constants, and compile for each value.
    alone = compiled and may_loop() and not within_xla()
    make = _compiled(circuit) if alone else _making(circuit)
    found: list[dict[Form, tf.Tensor]] = [{} for _ in runs]
    for (form, numbers), stack in zip(_formed(steps).items(), make(*stacks), strict=True):
        counts = [sum(run.first <= n < run.first + run.size for n in numbers) for run in runs]
        sizes = [count for count in counts if count]
        parts = tf.unstack(stack) if max(sizes) == 1 else tf.split(stack, sizes)
        places = [place for place, count in enumerate(counts) if count]
        for place, part in zip(places, parts, strict=True):
            alone = runs[place].size == 1 and max(sizes) > 1
            found[place][form] = part[0] if alone else part
    return [
        made if run.size > 1 else next(iter(made.values()))
        for run, made in zip(runs, found, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _compiled(circuit: Circuit) -> tf.types.experimental.PolymorphicFunction:
    return tf.function(_making(circuit), jit_compile=True, autograph=False)


def _making(circuit: Circuit) -> Callable[..., list[tf.Tensor]]:
    """The function that makes the matrices: a stack for each form of steps of ``_formed``."""
    steps = plan(circuit)
    dtype = tf.as_dtype(circuit.dtype).real_dtype

    def matrices(shared: tf.Tensor | None, of_samples: tf.Tensor | None) -> list[tf.Tensor]:
        values = Values(circuit.batched, (shared, of_samples))
        return _build(steps, circuit.cutoff, values, dtype)

    return matrices


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


def _formed(steps: Sequence[Step]) -> dict[Form, list[int]]:
    """Steps by form, in their order."""
    found: dict[Form, list[int]] = defaultdict(list)
    for number, step in enumerate(steps):
        found[step.form].append(number)
    return dict(found)


def _build(steps: Sequence[Step], cutoff: int, values: Values, dtype: tf.DType) -> list[tf.Tensor]:
    """For each form the matrices, as real ones: (K, [batch,] [blocks,] 2 D, 2 D).

    Of steps on the vacuum, the real and imaginary parts of the columns: (K, [batch,] 2 D); of
    steps without cores, those of the diagonals: (K, [batch,] 2, [blocks,] D).
    """
    alike = _alike(steps).values()
    groups = [[steps[number] for number in numbers] for numbers in alike]
    cores, waves = _ingredients(groups, cutoff, values, dtype)
    made: dict[Form, list[tf.Tensor]] = defaultdict(list)
    places: dict[Form, list[int]] = defaultdict(list)
    for number, (group, numbers) in enumerate(zip(groups, alike, strict=True)):
        segments = range(len(group[0].angles))
        real, imaginary = _combined(
            group,
            [cores[number, n] for n in segments[:-1]],
            [waves.get((number, n)) for n in segments],
            [len(group), *_grid(group[0].keeps, cutoff).shape[1:]],
            dtype,
        )
        imaginary = tf.zeros_like(real) if imaginary is None else imaginary
        if group[0].conjugate:
            imaginary = -imaginary
        made[group[0].form].append(_as_real(real, imaginary, group[0]))
        places[group[0].form] += numbers
    return [permuted(tf.concat(made[form], 0), np.argsort(places[form])) for form in _formed(steps)]


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


#: A group of steps that are alike, and which of its cores or angles.
_Spot = tuple[int, int]


def _ingredients(
    groups: Sequence[Sequence[Step]], cutoff: int, values: Values, dtype: tf.DType
) -> tuple[dict[_Spot, Complex], dict[_Spot, Complex]]:
    """Of each group the cores, (K, [batch,] [blocks,] D, D), the first column of one on the vacuum;
    and exp(i angle) where there is any angle, (K, [batch,] [blocks,] D).

    What is linear in the parameters is one product, cores of a kind are made together, and so are
    all angles of a grid. Computed in double precision, they get the state's own at last.
    """
    cores: dict[_Spot, Complex] = {}
    waves: dict[_Spot, Complex] = {}
    for batched in (False, True):
        kinds: dict[tuple[str, bool], list[_Spot]] = defaultdict(list)
        grids: dict[str, list[_Spot]] = defaultdict(list)
        for number, group in enumerate(groups):
            if group[0].batched != batched:
                continue
            vacuum = group[0].vacuum
            for n, (name, _) in enumerate(group[0].cores):
                kinds[name, vacuum and n == 0].append((number, n))
            for n in range(vacuum, len(group[0].angles)):  # the first does nothing to the vacuum
                if any(step.angles[n] for step in group):
                    grids[group[0].keeps].append((number, n))
        terms = {
            keeps: [t for t in TERMS if any(t in _terms(groups[g], n) for g, n in spots)]
            for keeps, spots in grids.items()
        }
        of_cores = [
            [[(step.cores[n][1], 1.0)] for g, n in spots for step in groups[g]]
            for spots in kinds.values()
        ]
        of_angles = [
            [
                [(p, factor) for t, p, factor in step.angles[n] if t == term]
                for g, n in spots
                for step in groups[g]
                for term in terms[keeps]
            ]
            for keeps, spots in grids.items()
        ]
        rows = [*of_cores, *of_angles]
        if not rows:
            continue
        linear = values.linear([row for part in rows for row in part], batched=batched)
        parts = _cut(linear, [len(part) for part in rows])
        for ((name, column), spots), part in zip(kinds.items(), parts[: len(kinds)], strict=True):
            made = _core(name, part, cutoff, dtype, column=column)
            cores.update(_by_spot(made, spots, groups))
        for (keeps, spots), part in zip(grids.items(), parts[len(kinds) :], strict=True):
            count = sum(len(groups[g]) for g, _ in spots)
            made = _waves(part, count, keeps, terms[keeps], cutoff, dtype, batched=batched)
            waves.update(_by_spot(made, spots, groups))
    return cores, waves


def _terms(group: Sequence[Step], n: int) -> set[str]:
    """The terms of a group's angles in one place."""
    return {term for step in group for term, _, _ in step.angles[n]}


def _cut(x: tf.Tensor, sizes: Sequence[int]) -> list[tf.Tensor]:
    return [x] if len(sizes) == 1 else tf.split(x, sizes)


def _by_spot(
    made: Complex, spots: Sequence[_Spot], groups: Sequence[Sequence[Step]]
) -> dict[_Spot, Complex]:
    """What was made for all spots, each group's share by its spot."""
    sizes = [len(groups[number]) for number, _ in spots]
    real = _cut(made[0], sizes)
    imaginary = [None] * len(sizes) if made[1] is None else _cut(made[1], sizes)
    return dict(zip(spots, zip(real, imaginary, strict=True), strict=True))


def _core(name: str, argument: tf.Tensor, cutoff: int, dtype: tf.DType, *, column: bool) -> Complex:
    """The cores of a kind of gate; their first columns, if only those are asked for."""
    kind = KINDS[name]
    if column and kind.vacuum:
        return _complex(kind.vacuum(argument, cutoff), dtype)
    assert kind.core is not None
    made = _complex(kind.core(argument, cutoff), dtype)
    return _first_column(made) if column else made


def _waves(
    linear: tf.Tensor,
    count: int,
    keeps: str,
    terms: Sequence[str],
    cutoff: int,
    dtype: tf.DType,
    *,
    batched: bool,
) -> Complex:
    """exp(i angle) at each point of a grid, of the angles' terms: (count x terms, [batch])."""
    grid = _grid(keeps, cutoff)
    shape = grid.shape[1:]
    grid = grid[[TERMS.index(term) for term in terms]].reshape(len(terms), -1)
    if batched:
        linear = tf.transpose(tf.reshape(linear, [count, len(terms), -1]), [0, 2, 1])
        rows = [count, -1]
    else:
        linear = tf.reshape(linear, [count, len(terms)])
        rows = [count]
    # Not einsum: that of older TensorFlows has no double precision within XLA.
    angle = tf.reshape(tf.matmul(linear, tf.constant(grid, FLOAT)), [*rows, *shape])
    return _once(tf.cast(tf.cos(angle), dtype)), _once(tf.cast(tf.sin(angle), dtype))


def _combined(
    group: Sequence[Step],
    cores: Sequence[Complex],
    waves: Sequence[Complex | None],
    shape: Sequence[int],
    dtype: tf.DType,
) -> Complex:
    """(K, [batch,] [blocks,] D, D) for K steps that differ in their parameters only; the diagonal
    alone, (K, [batch,] [blocks,] D), without cores."""
    vacuum = group[0].vacuum
    if not cores:
        return waves[0] or (tf.ones(shape, dtype), None)
    axis = None if vacuum else -1
    result = cores[0] if vacuum else _times(cores[0], waves[0], axis=-2)
    result = _times(result, waves[1], axis=axis)
    for core, after in zip(cores[1:], waves[2:], strict=True):
        result = _times(_compose(core, result, vector=vacuum), after, axis=axis)
    return result


@custom_gradient
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
    product = matvec if vector else matmul
    (a, b), (c, d) = left, right
    real, imaginary = product(a, c), None
    if b is not None and d is not None:
        real -= product(b, d)
    if d is not None:
        imaginary = product(a, d)
    if b is not None:
        imaginary = product(b, c) if imaginary is None else imaginary + product(b, c)
    return real, imaginary
