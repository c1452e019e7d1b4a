"""A list of gates -> the state that they make: plan, build the matrices together, apply.

Owns the order of the work. Given the gates, it (1) fuses neighbouring one-mode gates into one
matrix and phases into the matrices beside them, (2) builds all matrices of one form in one batched
computation, those that depend on the sample apart from those that do not, (3) applies them to the
state, as blocks. Knows nothing of Strawberry Fields: it sees axes of a tensor, each of size D. A
density matrix is a tensor with two axes a mode; the gate on the second one is conjugated.

Layout while the gates are applied: a real array (2 D^n, batch), the batch last and contiguous. Its
rows are the amplitudes' real and imaginary parts in an order that suits the next gate, so that each
gate is one batched product of real matrices, (blocks, 2 D, 2 D) times (blocks, 2 D, rest x batch),
after one gather of whole rows. Modes that have not met stay separate factors, vacuum as long as
nothing acts on it.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.ops import control_flow_util

from workers import gates
from workers.gates import FLOAT, Complex

#: Columns that a matrix product should have at least before rows are cut into more blocks: fewer
#: starve it, more push the operands out of the cache.
_WIDTH = 512


@dataclass(frozen=True)
class Kind:
    """A gate: its core and its phases, each a factor times a polynomial of the photon numbers.

    ``phase`` names the parameter that the phases are linear in. ``before`` and ``after`` give
    their factor for each term of ``_TERMS``.
    """

    parameters: tuple[str, ...]
    modes: int = 1
    core: Callable[[tf.Tensor, int], tf.Tensor | Complex] | None = None
    vacuum: Callable[[tf.Tensor, int], tf.Tensor] | None = None
    phase: int = 1
    before: tuple[tuple[str, float], ...] = ()
    after: tuple[tuple[str, float], ...] = ()
    keeps: str = "sum"


#: Phases are polynomials in the photon numbers of the first and the second mode.
_TERMS = ("n0", "n0^2", "n1", "n1^2", "n0 n1")

#: One gate, one row. A pair's core keeps the sum or the difference of its photon numbers.
KINDS = {
    "rotation": Kind(("phi",), phase=0, after=(("n0", 1),)),
    "kerr": Kind(("kappa",), phase=0, after=(("n0^2", 1),)),
    "displacement": Kind(
        ("r", "phi"),
        core=gates.displacement,
        vacuum=gates.displaced_vacuum,
        before=(("n0", -1),),
        after=(("n0", 1),),
    ),
    "squeezing": Kind(
        ("r", "phi"),
        core=gates.squeezing,
        vacuum=gates.squeezed_vacuum,
        before=(("n0", -0.5),),
        after=(("n0", 0.5),),
    ),
    "cubic_phase": Kind(("gamma",), core=gates.cubic_phase),
    "cross_kerr": Kind(("kappa",), modes=2, phase=0, after=(("n0 n1", 1),)),
    "beamsplitter": Kind(
        ("theta", "phi"),
        modes=2,
        core=gates.beamsplitter,
        before=(("n0", 1),),
        after=(("n0", -1),),
    ),
    "mach_zehnder": Kind(
        ("phi_in", "phi_ex"), modes=2, core=gates.mach_zehnder, before=(("n0", 1),)
    ),
    "two_mode_squeezing": Kind(
        ("r", "phi"),
        modes=2,
        core=gates.two_mode_squeezing,
        before=(("n0", -1),),
        after=(("n0", 1),),
        keeps="difference",
    ),
    "loss": Kind(("T",), modes=2, core=gates.loss, keeps="difference"),
}


@dataclass(frozen=True)
class Gate:
    """A gate on axes of the state. ``parameters`` are positions in the list of all parameters."""

    kind: str
    axes: tuple[int, ...]
    parameters: tuple[int, ...]
    conjugate: bool = False


@dataclass(frozen=True)
class Circuit:
    """What is known before any number is: the key under which a compiled circuit is kept.

    Attributes:
        axes: number of axes of the state.
        cutoff: their size D.
        dtype: of the state, "complex64" or "complex128".
        gates: in the order of their application.
        batched: for each parameter, whether it has a batch axis.
        prepared: whether it starts from a given state rather than from the vacuum.
    """

    axes: int
    cutoff: int
    dtype: str
    gates: tuple[Gate, ...]
    batched: tuple[bool, ...]
    prepared: bool = False


def run(circuit: Circuit, parameters: Sequence[tf.Tensor], state: tf.Tensor | None) -> tf.Tensor:
    """The state after all gates.

    Args:
        circuit: what to run.
        parameters: real, scalars or of shape (batch,) as ``circuit.batched`` says.
        state: complex, ([batch,] D, ..., D), if ``circuit.prepared``.

    Returns:
        complex, (D, ..., D), with a batch axis in front if any parameter or the state has one.
    """
    if tf.executing_eagerly():
        return _compiled(circuit)(list(parameters), state)
    return _run(circuit, parameters, state)


@functools.lru_cache(maxsize=256)
def _compiled(circuit: Circuit) -> tf.types.experimental.PolymorphicFunction:
    # Its parts are not compiled: an eager call would wait for seconds at each new batch size.
    return tf.function(functools.partial(_run, circuit, compile_parts=False), autograph=False)


def _run(
    circuit: Circuit,
    parameters: Sequence[tf.Tensor],
    state: tf.Tensor | None,
    *,
    compile_parts: bool = True,
) -> tf.Tensor:
    steps = plan(circuit)
    matrices: list[tf.Tensor] = [None] * len(steps)
    stacks = _matrices(circuit, compile_parts)(*_stacks(parameters, circuit.batched))
    for numbers, stack in zip(_alike(steps).values(), stacks, strict=True):
        for number, matrix in zip(numbers, tf.unstack(stack), strict=True):
            matrices[number] = matrix
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
    return product.state()


@functools.lru_cache(maxsize=256)
def _matrices(circuit: Circuit, compiled: bool) -> tf.types.experimental.PolymorphicFunction:
    """The function that makes the matrices, compiled if wanted: it is many small operations.

    It returns one stack for each group of steps that ``_alike`` makes.
    """
    steps = plan(circuit)
    dtype = tf.as_dtype(circuit.dtype).real_dtype

    @tf.function(jit_compile=compiled or None, autograph=False)
    def matrices(shared: tf.Tensor | None, of_samples: tf.Tensor | None) -> list[tf.Tensor]:
        values = _Values(circuit.batched, shared, of_samples)
        return _build(steps, circuit.cutoff, values, dtype)

    return matrices


# -- planning: pure ---------------------------------------------------------------------------


#: A phase: for each term of _TERMS the parameters it is linear in, as (position, factor).
_Angle = tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Step:
    """One matrix: cores with phases before, between and after them, on one axis or on a pair.

    Attributes:
        axes: one or two.
        keeps: "one", or what a pair's core keeps, "sum" or "difference".
        cores: (kind, parameter) of each, the first one applied first; a pair has one at most.
        angles: one more than cores.
        batched: whether any of its parameters has a batch axis.
        vacuum: whether it acts on an axis in vacuum, so that only the first column is wanted.
    """

    axes: tuple[int, ...]
    keeps: str
    cores: tuple[tuple[str, int], ...]
    angles: tuple[_Angle, ...]
    conjugate: bool
    batched: bool
    vacuum: bool = False


@dataclass
class _Run:
    """Gates on one axis that nothing has come between yet."""

    conjugate: bool = False
    cores: list[tuple[str, int]] = field(default_factory=list)
    angles: list[list[tuple[str, int, float]]] = field(default_factory=lambda: [[]])


@functools.lru_cache(maxsize=256)
def plan(circuit: Circuit) -> tuple[Step, ...]:
    """Fuse the gates into steps."""
    steps: list[Step] = []
    runs: dict[int, _Run] = defaultdict(_Run)
    vacuum = set() if circuit.prepared else set(range(circuit.axes))

    def emit(step: Step) -> None:
        used = [p for _, p in step.cores] + [p for angle in step.angles for _, p, _ in angle]
        steps.append(replace(step, batched=any(circuit.batched[p] for p in used)))
        vacuum.difference_update(step.axes)

    def flush(axis: int) -> None:
        run = runs.pop(axis, None)
        if run is None or (axis in vacuum and not run.cores):
            return  # phases do nothing to the vacuum
        angles = tuple(map(tuple, run.angles))
        cores = tuple(run.cores)
        emit(Step((axis,), "one", cores, angles, run.conjugate, False, axis in vacuum))

    for gate in circuit.gates:
        kind = KINDS[gate.kind]
        before, after = (
            [(term, gate.parameters[kind.phase], factor) for term, factor in phases]
            for phases in (kind.before, kind.after)
        )
        if kind.modes == 1:
            run = runs[gate.axes[0]]
            run.conjugate = gate.conjugate
            run.angles[-1] += before
            if kind.core:
                run.cores.append((gate.kind, gate.parameters[0]))
                run.angles.append([])
            run.angles[-1] += after
            continue
        if kind.keeps == "sum" and vacuum.issuperset(gate.axes):
            ready = [axis for axis in gate.axes if runs[axis].cores]
            if not ready:
                continue  # photons are only moved, and there are none
        for name, axis in zip(("n0", "n1"), gate.axes, strict=True):
            if axis in runs and not runs[axis].cores and axis not in vacuum:
                # A gate on a pair takes the phases before it along; its conjugation is one for
                # all, which for loss (not conjugated, on a ket and a bra) is put right here.
                run = runs.pop(axis)
                sign = 1.0 if run.conjugate == gate.conjugate else -1.0
                before += [
                    (term.replace("n0", name), p, sign * factor)
                    for term, p, factor in run.angles[0]
                ]
            else:
                flush(axis)
        cores = ((gate.kind, gate.parameters[0]),) if kind.core else ()
        angles = (tuple(before), tuple(after)) if cores else (tuple(before + after),)
        emit(Step(gate.axes, kind.keeps, cores, angles, gate.conjugate, False))
    for axis in sorted(runs):
        flush(axis)
    return tuple(steps)


# -- building: all matrices of one form together ----------------------------------------------


def _stacks(
    parameters: Sequence[tf.Tensor], batched: Sequence[bool]
) -> tuple[tf.Tensor | None, tf.Tensor | None]:
    """The parameters without a batch axis as (P,), those with one as (Q, batch)."""

    def stack(flag: bool) -> tf.Tensor | None:
        chosen = [p for p, other in zip(parameters, batched, strict=True) if other == flag]
        if not chosen:
            return None
        if len({value.dtype for value in chosen}) > 1:
            chosen = [tf.cast(value, FLOAT) for value in chosen]
        return tf.cast(tf.stack(chosen), FLOAT)  # hundreds of scalars, but one cast

    return stack(False), stack(True)


class _Values:
    """The parameters' values, found by their positions."""

    def __init__(
        self, batched: Sequence[bool], shared: tf.Tensor | None, of_samples: tf.Tensor | None
    ) -> None:
        self._stacks = {False: shared, True: of_samples}
        counts = {False: 0, True: 0}
        self._places = []
        for flag in batched:
            self._places.append((flag, counts[flag]))
            counts[flag] += 1

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
        return total


def _alike(steps: Sequence[Step]) -> dict[tuple, list[int]]:
    """Steps by what makes their matrices: in one group they differ in their parameters only."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for number, step in enumerate(steps):
        names = tuple(name for name, _ in step.cores)
        key = (step.keeps, names, step.batched, step.vacuum, step.conjugate)
        groups[key].append(number)
    return dict(groups)


def _build(
    steps: Sequence[Step], cutoff: int, values: _Values, dtype: tf.DType
) -> list[tf.Tensor]:
    """For each group the matrices, as real ones: (K, [batch,] [blocks,] 2 D, 2 D).

    Of steps on the vacuum, the real and imaginary parts of the columns: (K, [batch,] 2 D).
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
    blocks = real.shape[1 + step.batched : -2].as_list()
    # Not by concatenation, which XLA compiles to a slow loop: by products with 2 x 2 matrices.
    one, turn = (
        np.reshape(matrix, [2, 1, 2, 1]).astype(real.dtype.as_numpy_dtype)
        for matrix in ([[1, 0], [0, 1]], [[0, -1], [1, 0]])
    )
    pairs = real[..., None, :, None, :] * one + imaginary[..., None, :, None, :] * turn
    return tf.reshape(_once(pairs), [real.shape[0], *batch, *blocks, size, size])


def _build_alike(
    group: list[Step], cutoff: int, values: _Values, dtype: tf.DType
) -> Complex:
    """(K, [batch,] [blocks,] D, D) for K steps that differ in their parameters only.

    Angles and cores are computed in double precision; what is made of them has the state's own.
    """
    batched, vacuum = group[0].batched, group[0].vacuum
    grid = _grid(group[0].keeps, cutoff)  # (terms, [blocks,] D)
    waves = [
        _waves([step.angles[segment] for step in group], values, grid, dtype, batched=batched)
        for segment in range(len(group[0].angles))
    ]
    if not group[0].cores:
        real, imaginary = waves[0] or (tf.ones([len(group), *grid.shape[1:]], dtype), None)
        return tf.linalg.diag(real), None if imaginary is None else tf.linalg.diag(imaginary)
    result: Complex | None = None
    for segment, (name, _) in enumerate(group[0].cores):
        rows = [[(step.cores[segment][1], 1.0)] for step in group]
        argument = values.linear(rows, batched=batched)
        kind = KINDS[name]
        if result is None and vacuum:
            make = kind.vacuum or (lambda r, d, core=kind.core: _first_column(core(r, d)))
            result = _complex(make(argument, cutoff), dtype)
        else:
            core = _complex(kind.core(argument, cutoff), dtype)
            if result is None:
                result = _times(core, waves[0], axis=-2)
            else:
                result = _compose(core, result, vector=vacuum)
        result = _times(result, waves[segment + 1], axis=None if vacuum else -1)
    return result


def _waves(
    angles: Sequence[_Angle],
    values: _Values,
    grid: np.ndarray,
    dtype: tf.DType,
    *,
    batched: bool,
) -> Complex | None:
    """exp(i angle) at each point of the grid: (K, [batch,] [blocks,] D). None if all are 0."""
    if not any(angles):
        return None
    terms = [t for t in _TERMS if any(t == term for angle in angles for term, _, _ in angle)]
    rows = [[(p, f) for t, p, f in angle if t == term] for angle in angles for term in terms]
    linear = values.linear(rows, batched=batched)
    linear = tf.reshape(linear, [len(angles), len(terms), -1])
    shape = grid.shape[1:]
    grid = grid[[_TERMS.index(term) for term in terms]].reshape(len(terms), -1)
    angle = tf.einsum("ktb,tg->kbg", linear, tf.constant(grid, FLOAT))
    angle = tf.reshape(angle, [len(angles), *([-1] if batched else []), *shape])
    return _once(tf.cast(tf.cos(angle), dtype)), _once(tf.cast(tf.sin(angle), dtype))


@tf.custom_gradient
def _once(x: tf.Tensor):
    """x, computed on its own: XLA would put its loop into the loops of all that use it."""
    graph = tf.compat.v1.get_default_graph()
    within_xla = control_flow_util.GraphOrParentsInXlaContext(graph)
    kept = gen_xla_ops.xla_optimization_barrier([x])[0] if within_xla else tf.identity(x)
    return kept, lambda cotangent: _once(cotangent)


def _grid(keeps: str, cutoff: int) -> np.ndarray:
    """The terms of a phase at each row of a matrix: (terms, D), for a pair (terms, D, D)."""
    if keeps == "one":
        n0, n1 = np.arange(cutoff), np.zeros(cutoff, int)
    else:
        block, n0 = np.mgrid[:cutoff, :cutoff]
        n1 = _partner(keeps, block, n0, cutoff)
    return np.stack([n0, n0**2, n1, n1**2, n0 * n1]).astype(float)


def _partner(keeps: str, block: np.ndarray, n0: np.ndarray, cutoff: int) -> np.ndarray:
    """The photon number of the second mode in a block, for each of the first."""
    return (block - n0) % cutoff if keeps == "sum" else (n0 - block) % cutoff


def _complex(matrix: tf.Tensor | Complex, dtype: tf.DType) -> Complex:
    parts = matrix if isinstance(matrix, tuple) else (matrix, None)
    return tuple(None if part is None else tf.cast(part, dtype) for part in parts)


def _first_column(matrix: tf.Tensor | Complex) -> tf.Tensor | Complex:
    if isinstance(matrix, tuple):
        return tuple(part[..., 0] for part in matrix)
    return matrix[..., 0]


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


# -- applying ---------------------------------------------------------------------------------


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
        rows = _permute(factor.rows, factor.order, want)
        size = 2 * self._cutoff
        if step.batched:
            split = tf.reshape(rows, [blocks, size, len(want) // (blocks * size), -1])
            split = tf.transpose(split, [3, 0, 1, 2])
            if len(matrix.shape) == 3:
                matrix = matrix[:, None]
            made = tf.transpose(tf.matmul(matrix, split), [1, 2, 3, 0])
        else:
            if len(matrix.shape) == 2:
                matrix = tf.tile(matrix[None], [blocks, 1, 1])
            made = tf.matmul(matrix, tf.reshape(rows, [blocks, size, -1]))
        rows = tf.reshape(made, [len(want), -1])
        self._put(_Factor(factor.axes, rows, want))

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
        pairs = ids[n0, _partner(step.keeps, block, n0, cutoff)]  # block, n0, part, others
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
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return _gather(rows, places[want])


def _gather(rows: tf.Tensor, index: np.ndarray) -> tf.Tensor:
    """``rows[index]`` for a permutation: unlike tf.gather's, its vjp is a gather too."""
    if np.array_equal(index, np.arange(len(index))):
        return rows

    @tf.custom_gradient
    def gather(rows: tf.Tensor):
        return tf.gather(rows, index), lambda cotangent: _gather(cotangent, np.argsort(index))

    return gather(rows)
