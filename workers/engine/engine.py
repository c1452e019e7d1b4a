"""Strawberry Fields' engine over the traced backend: programs that run inside ``tf.function``.

Owns how a program's parameters are evaluated (Strawberry Fields does it with NumPy and a fresh
``sympy.lambdify`` each time, neither of which can be traced) and which operations cannot be traced
at all. The physics is the backend's.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import strawberryfields as sf
import sympy
import tensorflow as tf
from scipy.special import gammaln
from strawberryfields import ops
from strawberryfields.engine import Engine
from strawberryfields.parameters import FreeParameter, MeasuredParameter, ParameterError

from workers.engine import circuit, projections
from workers.engine.backend import TracedTFBackend
from workers.errors import UntraceableError

#: Operations whose parameters are evaluated here, with the backend's method for each. All others
#: are applied by Strawberry Fields, with its own evaluation, which needs eager tensors.
_TRACEABLE: dict[type, str] = {
    ops.Coherent: "prepare_coherent_state",
    ops.Squeezed: "prepare_squeezed_state",
    ops.DisplacedSqueezed: "prepare_displaced_squeezed_state",
    ops.Thermal: "prepare_thermal_state",
    ops.LossChannel: "loss",
    ops.Dgate: "displacement",
    ops.Sgate: "squeeze",
    ops.Rgate: "rotation",
    ops.Kgate: "kerr_interaction",
    ops.Vgate: "cubic_phase",
    ops.BSgate: "beamsplitter",
    ops.MZgate: "mzgate",
    ops.S2gate: "two_mode_squeeze",
    ops.CKgate: "cross_kerr_interaction",
}

#: What a run may be told, of all that a program's options may hold.
_RUN_OPTIONS = ("eval", "session", "feed_dict", "shots", "crop", "space_unroll", "modes")

#: Outcomes of one run, counted and measured ones, are of the dtype that holds them all.
_PRECEDENCE = (tf.int32, tf.int64, tf.float32, tf.float64, tf.complex64, tf.complex128)

#: Operations that Strawberry Fields applies with nothing but TensorFlow or constants.
_CONSTANT = (ops.Vacuum, ops.Fock, ops.Ket, ops.DensityMatrix, ops._Delete, ops._New_modes)


class TracedEngine(Engine):
    """``sf.Engine("tf", ...)`` that can be traced, compiled and differentiated twice.

    Args:
        backend: "tf", or a ``TracedTFBackend``.
        backend_options: as for ``sf.Engine``: ``cutoff_dim``, and optionally ``dtype``, ``pure``,
            ``batch_size``. Without ``batch_size`` the batch is the leading axis of the arguments.

    ``run(program, args=...)`` returns Strawberry Fields' own ``Result`` and ``FockStateTF``. In a
    ``tf.function`` (with or without ``jit_compile``) an operation that needs numbers rather than
    tensors is an ``UntraceableError`` that names it. Photon numbers and quadratures that are
    measured are drawn by TensorFlow there, from the same distribution as Strawberry Fields'.
    """

    backend_options: dict[str, Any]
    _symbolic_samples: tf.Tensor | None = None

    def __new__(cls, backend: Any = "tf", *, backend_options: dict[str, Any] | None = None) -> Any:
        return object.__new__(cls)

    def __init__(self, backend: Any = "tf", *, backend_options: dict[str, Any] | None = None):
        if isinstance(backend, str):
            if backend != "tf":
                raise ValueError(
                    f'TracedEngine runs the "tf" backend, not {backend!r}; use sf.Engine for others'
                )
            backend = TracedTFBackend()
        super().__init__(backend, backend_options=backend_options)

    @tf.autograph.experimental.do_not_convert  # neither Strawberry Fields nor networkx bears it
    def run(
        self, program: Any, *, args: Any = None, compile_options: Any = None, **kwargs: Any
    ) -> sf.Result:
        """See ``LocalEngine.run``."""
        args = {key: _as_value(value) for key, value in (args or {}).items()}
        _check_batches(args)
        programs = list(program) if isinstance(program, Sequence) else [program]
        self._symbolic_samples = None
        before = [] if tf.executing_eagerly() else self._bound_before(programs)
        try:
            with circuit.noting_failures():
                result = self._run_all(programs, args, compile_options or {}, kwargs)
        finally:
            for parameter, value in before:
                parameter.val = value
        if self._symbolic_samples is not None:  # a result does not take them: it asks their length
            self.samples, result._result["output"] = (
                self._symbolic_samples,
                [self._symbolic_samples],
            )
        return result

    def _bound_before(self, programs: list[Any]) -> list[tuple[FreeParameter, Any]]:
        """What parameters have bound that a graph's tensors will be bound to, which would keep the
        graph for as long as there are parameters of these names. They get it back. (One that has
        been unpickled has nothing, not even None.)"""
        parameters = [p for program in programs for p in program.free_params.values()]
        return [(p, getattr(p, "val", None)) for p in parameters]

    def _run_all(
        self, programs: list[Any], args: Any, compile_options: Any, kwargs: dict[str, Any]
    ) -> sf.Result:
        if not _selects_tensors(programs):
            whole = programs if len(programs) > 1 else programs[0]
            return super().run(whole, args=args, compile_options=compile_options, **kwargs)
        # Strawberry Fields asks such a tensor whether it is true. What else it does then:
        options: dict[str, Any] = {"shots": 1, "modes": None}
        for options_of in (*(p.run_options for p in programs), kwargs):
            options |= {name: v for name, v in options_of.items() if name in _RUN_OPTIONS}
        if (options["shots"] or 1) > 1:
            raise NotImplementedError("Post-selection cannot be used together with multiple shots.")
        return super()._run(programs, args=args, compile_options=compile_options, **options)

    def _run_program(self, prog: sf.Program, **kwargs: Any) -> Any:
        if isinstance(prog, sf.TDMProgram):  # its samples are cut into time bins
            return super()._run_program(prog, **kwargs)
        samples: dict[int, list[Any]] = {}
        for command in prog.circuit:
            values = self._apply(command, prog, **kwargs)
            if values is not None:
                for column, register in enumerate(command.reg):
                    samples.setdefault(register.ind, []).append(values[..., column])
        combined, samples = self._combine_and_sort_samples(samples)
        return list(prog.circuit), combined, samples

    def _combine_and_sort_samples(self, samples_dict: dict[int, list[Any]]) -> Any:
        if samples_dict and not tf.executing_eagerly():  # which Strawberry Fields does in NumPy
            last = [values[-1] for _, values in sorted(samples_dict.items())]
            dtype = max((value.dtype for value in last), key=_PRECEDENCE.index)
            self._symbolic_samples = tf.stack([tf.cast(value, dtype) for value in last], -1)
            return np.empty((0, 0)), samples_dict
        # Strawberry Fields looks for the batch in the options; here it may come with the arguments.
        asked: dict[str, Any] = self.backend_options
        size = self.backend.circuit.batch_size
        self.backend_options = {**asked, "batch_size": size if isinstance(size, int) else 0}
        try:
            return super()._combine_and_sort_samples(samples_dict)
        finally:
            self.backend_options = asked

    def _apply(self, command: Any, prog: sf.Program, **kwargs: Any) -> Any:
        op = command.op
        modes = [register.ind for register in command.reg]
        if any(isinstance(p, np.ndarray) and p.dtype == object for p in op.p):
            return self._apply_as_is(command, **kwargs)
        if isinstance(op, ops.Catstate):
            a, phi, p = (evaluate(p, prog) for p in op.p[:3])
            ket = cat_state(a, phi, p, self.backend.get_cutoff_dim())
            self.backend.prepare_ket_state(ket, *modes)
            return None
        if isinstance(op, ops.MeasureFock | ops.MeasureHomodyne) and _is_of_tensors(op, kwargs):
            return self._measure(command, prog, modes, kwargs.get("shots", 1))
        method = _TRACEABLE.get(type(op))
        if method is None:
            return self._apply_as_is(command, **kwargs)
        number = isinstance(op.p[0], int | float | np.ndarray)
        if isinstance(op, ops.Gate) and number and np.all(op.p[0] == 0):
            return None  # the identity, as in Strawberry Fields
        parameters = [evaluate(p, prog) for p in op.p]
        if isinstance(op, ops.Gate) and op.dagger:
            parameters[0] = -parameters[0]
        if isinstance(op, ops.Vgate):
            parameters[0] = parameters[0] * np.sqrt(sf.hbar / 2)
        try:
            getattr(self.backend, method)(*parameters, *modes)
        except ValueError as error:
            raise ValueError(f"{_described(command)}: {error}") from error
        return None

    def _measure(self, command: Any, prog: sf.Program, modes: list[int], shots: Any) -> Any:
        """The outcome that was asked for, or is drawn, as Strawberry Fields returns it: ([batch,]
        1, modes)."""
        if shots is None:  # Strawberry Fields' way to leave measurements out
            return None
        op = command.op
        if isinstance(op, ops.MeasureFock):
            if op.select is None:
                select = self.backend.draw_numbers(modes)
            else:
                select = _selected(op.select, len(modes), prog)
            values = self.backend.measure_fock(modes, select=select)
        else:
            scale = np.sqrt(sf.hbar / 2)  # the backend knows nothing of hbar
            phi = evaluate(op.p[0], prog)
            if op.select is None:
                select = self.backend.draw_quadrature(phi, modes[0])
            else:
                select = evaluate(op.select, prog) / scale
            values = self.backend.measure_homodyne(phi, modes[0], select=select)
            values *= tf.cast(scale, values.dtype)
        for column, register in enumerate(command.reg):
            register.val = tf.transpose(values)[column]
        return values

    def _apply_as_is(self, command: Any, **kwargs: Any) -> Any:
        """Strawberry Fields' own way, which looks at numbers."""
        fixed = isinstance(command.op, ops.Ggate) and all(map(_is_number, command.op.p))
        if tf.executing_eagerly() or fixed or isinstance(command.op, _CONSTANT):
            return command.op.apply(command.reg, self.backend, **kwargs)
        raise UntraceableError(
            f"{_described(command)} cannot be traced: Strawberry Fields computes it with "
            "NumPy, from numbers that a tf.function does not have yet. Run this program eagerly, "
            "or take the operation out of the tf.function"
        )


def evaluate(parameter: Any, program: sf.Program) -> Any:
    """The value of a gate's parameter in this program: a number, an array or a tensor.

    Expressions of free and measured parameters are compiled once each. Values are looked up by
    name: sympy takes symbols of one name for the same and hands out expressions that it made of
    another program's, which are bound to other values.

    Raises:
        ParameterError: a free parameter without a value, or a mode that was not measured.
    """
    if not isinstance(parameter, sympy.Basic):
        return _as_value(parameter)
    if isinstance(parameter, FreeParameter | MeasuredParameter):
        return _bound(parameter, program)
    atoms, function, tensor_function = _expression(parameter)
    if not atoms:
        return float(parameter) if parameter.is_real else complex(parameter)
    values = [_bound(atom, program) for atom in atoms]
    if any(tf.is_tensor(value) for value in values):
        return tensor_function(*values)
    return function(*values)


def _bound(atom: FreeParameter | MeasuredParameter, program: sf.Program) -> Any:
    """What this program has bound to, or measured for, the parameter of that name."""
    if isinstance(atom, FreeParameter):
        return _as_value(program.free_params.get(atom.name, atom)._eval_evalf(None))
    register = program.reg_refs.get(atom.regref.ind, atom.regref)
    if tf.is_symbolic_tensor(register.val):
        found = register.val if not register.val.dtype.is_complex else tf.math.real(register.val)
        return tf.reshape(found, [] if found.shape.num_elements() == 1 else [-1])
    return MeasuredParameter._eval_evalf(types.SimpleNamespace(regref=register), None)


def cat_state(a: Any, phi: Any, p: Any, cutoff: int) -> tf.Tensor:
    """The cat state N (|alpha> + exp(i pi p) |-alpha>), alpha = a exp(i phi): ([batch,] cutoff).

    Its parameters are constants to a gradient, as they are to Strawberry Fields, which makes the
    state in NumPy. That formula, with the norm of the state that is not cut.
    """
    a, phi, p = (_real(value, name) for value, name in ((a, "a"), (phi, "phi"), (p, "p")))
    n = np.arange(cutoff)
    angle = phi[..., None] * n
    # (1 + exp(i pi p) (-1)^n), for the turned half; |alpha> is a sum of a^n exp(i phi n) |n>.
    turn = np.pi * (p[..., None] + n)
    real, imaginary = 1 + tf.cos(turn), tf.sin(turn)
    size = tf.exp(-0.5 * a**2) / tf.sqrt(2 * (1 + tf.cos(np.pi * p) * tf.exp(-2 * a**2)))
    scaled = size[..., None] * tf.pow(a[..., None], n.astype(float)) / np.exp(0.5 * gammaln(n + 1))
    cosine, sine = scaled * tf.cos(angle), scaled * tf.sin(angle)
    return tf.complex(cosine * real - sine * imaginary, cosine * imaginary + sine * real)


def _real(value: Any, name: str) -> tf.Tensor:
    value = tf.stop_gradient(value if tf.is_tensor(value) else np.asarray(value))
    if value.dtype.is_complex:
        raise ValueError(f"{name} of a cat state is complex; expected a real number")
    return tf.cast(value, tf.float64)


def _selected(select: Any, modes: int, program: sf.Program) -> Any:
    """Photon numbers, (modes,) or (batch, modes), from numbers, parameters and tensors."""
    values = [tf.convert_to_tensor(evaluate(value, program)) for value in select]
    if (
        len(values) == 1 and values[0].shape.rank
    ):  # a tensor, which Strawberry Fields puts in a list
        only = values[0]
        alone = only.shape.rank == 1 and modes == 1 and only.shape[0] != 1
        return only[:, None] if alone else only
    values = [tf.cast(value, tf.int64) for value in values]
    if any(value.shape.rank == 1 for value in values) and len(values) == modes:
        size = next(tf.shape(value) for value in values if value.shape.rank == 1)
        return tf.stack([tf.broadcast_to(value, size) for value in values], -1)
    return tf.stack(values)


def _is_of_tensors(measurement: Any, options: dict[str, Any]) -> bool:
    """Whether its outcome is asked for, or drawn once, without what is NumPy's alone."""
    if measurement.select is not None:
        return True
    once = (options.get("shots", 1) or 1) == 1
    return once and getattr(measurement, "dark_counts", None) is None and projections.drawn_here()


def _is_number(parameter: Any) -> bool:
    """Whether it is an array that has values, and always these."""
    return isinstance(parameter, np.ndarray) or (
        isinstance(parameter, tf.Tensor) and hasattr(parameter, "numpy")
    )


def _selects_tensors(programs: Sequence[sf.Program]) -> bool:
    selects = (getattr(command.op, "select", None) for p in programs for command in p.circuit or ())
    return any(tf.is_tensor(select) or isinstance(select, np.ndarray) for select in selects)


def _described(command: Any) -> str:
    """The command as Strawberry Fields writes it, where it can: its message for some fails."""
    try:
        return str(command)
    except Exception:
        return f"{type(command.op).__name__} | {', '.join(map(str, command.reg))}"


@functools.lru_cache(maxsize=1024)
def _expression(
    expression: sympy.Basic,
) -> tuple[list[Any], Callable[..., Any], Callable[..., Any]]:
    atoms = sorted(expression.atoms(MeasuredParameter, FreeParameter), key=str)
    return (
        atoms,
        sympy.lambdify(atoms, expression, "numpy"),
        sympy.lambdify(atoms, expression, "tensorflow"),
    )


def _as_value(value: Any) -> Any:
    """Variables of TensorFlow and Keras as tensors; everything else as it is."""
    if isinstance(value, tf.Variable) or hasattr(value, "__tf_tensor__"):
        return tf.convert_to_tensor(value)
    return value


def _check_batches(args: dict[Any, Any]) -> None:
    """Arguments of one length, or a ValueError that names two that differ."""
    lengths: dict[str, int] = {}
    for name, value in args.items():
        shape = getattr(value, "shape", np.shape(value))
        if len(shape) == 1 and shape[0] is not None:
            lengths[str(name)] = shape[0]
    if len(set(lengths.values())) > 1:
        first, *others = lengths.items()
        other = next(item for item in others if item[1] != first[1])
        raise ValueError(
            f"the arguments' batch sizes differ: expected one, came {first[1]} for {first[0]!r} "
            f"and {other[1]} for {other[0]!r}"
        )


__all__ = ["ParameterError", "TracedEngine", "evaluate"]
