"""Strawberry Fields' engine over the traced backend: programs that run inside ``tf.function``.

Owns how a program's parameters are evaluated (Strawberry Fields does it with NumPy and a fresh
``sympy.lambdify`` each time, neither of which can be traced) and which operations cannot be traced
at all. The physics is the backend's.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import strawberryfields as sf
import sympy
import tensorflow as tf
from strawberryfields import ops
from strawberryfields.engine import Engine, LocalEngine
from strawberryfields.parameters import FreeParameter, MeasuredParameter, ParameterError

from workers.backend import TracedTFBackend
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
    tensors, a measurement for one, is an ``UntraceableError`` that names it.
    """

    backend_options: dict[str, Any]

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
        return super().run(program, args=args, compile_options=compile_options, **kwargs)

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
        method = _TRACEABLE.get(type(op))
        if method is None or any(isinstance(p, np.ndarray) and p.dtype == object for p in op.p):
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
            raise ValueError(f"{command}: {error}") from error
        return None

    def _apply_as_is(self, command: Any, **kwargs: Any) -> Any:
        """Strawberry Fields' own way, which looks at numbers."""
        if tf.executing_eagerly() or isinstance(command.op, _CONSTANT):
            return command.op.apply(command.reg, self.backend, **kwargs)
        raise UntraceableError(
            f"{command} cannot be traced: Strawberry Fields computes it with NumPy, from numbers "
            "that a tf.function does not have yet. Run this program eagerly, or take the "
            "operation out of the tf.function"
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
    return MeasuredParameter._eval_evalf(types.SimpleNamespace(regref=register), None)


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


@contextlib.contextmanager
def traced_engines(wanted: bool = True) -> Iterator[None]:
    """Within, ``sf.Engine("tf", ...)`` makes a TracedEngine (or, unless wanted, stock ones).

    It holds for this thread's calls alone. Engines are otherwise what they were.
    """
    _install()
    token = _traced.set(wanted)
    try:
        yield
    finally:
        _traced.reset(token)


def stock_wanted() -> bool:
    """Whether stock engines were asked for, of code that would choose a TracedEngine."""
    return _traced.get() is False


#: Whether engines are traced ones; None where nobody has said.
_traced: contextvars.ContextVar[bool | None] = contextvars.ContextVar("traced", default=None)


@functools.cache
def _install() -> None:
    original = LocalEngine.__new__

    def new(cls: type, backend: Any, *, backend_options: dict[str, Any] | None = None) -> Any:
        if cls in (Engine, LocalEngine) and backend == "tf" and _traced.get():
            return object.__new__(TracedEngine)
        if issubclass(cls, TracedEngine):
            return object.__new__(cls)
        return original(cls, backend, backend_options=backend_options)

    LocalEngine.__new__ = new


__all__ = ["ParameterError", "TracedEngine", "evaluate", "stock_wanted", "traced_engines"]
