"""Strawberry Fields programs as values: run on named arguments, compared by content, kept as text.

Owns what the layers, the models and the pooled engine all ask of a program. What becomes of its
state is theirs.
"""

from __future__ import annotations

import copy
import fractions
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy
import tensorflow as tf

from workers import sf_compat
from workers.engine.scope import stock_wanted
from workers.errors import ConfigurationError


def state(
    program: Any, arguments: Mapping[str, Any], cutoff_dim: int, dtype: Any = tf.complex64
) -> Any:
    """Strawberry Fields' state after ``program``, from the vacuum.

    Args:
        program: an ``sf.Program``.
        arguments: the value of each free parameter by name, a scalar or (batch,).
        cutoff_dim: Fock states kept per mode.
        dtype: of the state, ``tf.complex64`` or ``tf.complex128``.

    Returns:
        A ``FockStateTF`` with a batch axis if any argument has one (under the stock engine, which
        has none for a batch of one, without it then).
    """
    sf_compat.install()
    import strawberryfields as sf

    from workers.engine import TracedEngine

    options: dict[str, Any] = {"cutoff_dim": cutoff_dim, "dtype": dtype}
    if not stock_wanted():
        return TracedEngine("tf", backend_options=options).run(program, args=dict(arguments)).state
    sizes = {np.shape(value)[0] for value in arguments.values() if np.ndim(value) == 1}
    if sizes == {1}:
        arguments = {name: tf.reshape(value, []) for name, value in arguments.items()}
    elif sizes:
        options["batch_size"] = max(sizes)
    return sf.Engine("tf", backend_options=options).run(program, args=dict(arguments)).state


def measured(program: Any) -> list[str]:
    """The measurements in a program, and the parameters that come from some, for errors."""
    from strawberryfields import ops

    return [
        str(command)
        for command in program.circuit
        if isinstance(command.op, ops.Measurement) or command.op.measurement_deps
    ]


def fingerprint(program: Any) -> tuple[Any, ...]:
    """What programs that do the same have in common: modes, each command with its numbers."""
    commands = []
    for command in program.circuit:
        op = command.op
        rest = {k: v for k, v in vars(op).items() if k not in ("p", "_measurement_deps")}
        commands.append(
            (
                type(op).__module__,
                type(op).__qualname__,
                tuple(_content(value) for value in op.p),
                tuple(sorted((name, _content(value)) for name, value in rest.items())),
                tuple(register.ind for register in command.reg),
            )
        )
    return (type(program).__name__, program.init_num_subsystems, *commands)


def _content(value: Any) -> Any:
    if isinstance(value, sympy.Basic):
        ratios = [number for number in value.atoms(sympy.Rational) if not number.is_Integer]
        return sympy.srepr(value.xreplace({n: sympy.Float(float(n)) for n in ratios}))
    if tf.is_tensor(value) or isinstance(value, np.ndarray):
        array = np.asarray(value)
        return array.shape, array.dtype.str, array.tobytes()
    return repr(value)


#: What Strawberry Fields writes for a free parameter: Blackbird reads it as a string.
_QUOTED = re.compile(r'"([^"]*\{[^"]*)"')


def as_text(program: Any) -> str:
    """The program in Blackbird, Strawberry Fields' own language: it comes back the same.

    Raises:
        ConfigurationError: the language cannot say this program.
    """
    import strawberryfields as sf

    try:
        text: str = sf.io.to_blackbird(_for_text(program)).serialize()
        text = _QUOTED.sub(r"\1", text)
        same = fingerprint(from_text(text)) == fingerprint(_for_text(program))
    except Exception as error:
        raise ConfigurationError(
            f"this program cannot be saved: Strawberry Fields' Blackbird cannot write it ({error})"
        ) from error
    if not same:
        raise ConfigurationError(
            "this program cannot be saved: what Strawberry Fields' Blackbird writes of it comes "
            "back as another program. Build it of gates with plain parameters, or save the "
            "weights alone (save_weights)"
        )
    return text


def from_text(text: str) -> Any:
    """The program that ``as_text`` wrote."""
    sf_compat.install()
    import strawberryfields as sf

    return sf.io.loads(text)


def _written_exactly(value: Any) -> Any:
    """An expression whose numbers sympy, which writes 15 digits of a float, writes so that they
    come back the same."""

    def exact(number: Any) -> Any:
        wanted = float(number)
        if float(str(sympy.Float(wanted))) == wanted:
            return sympy.Float(wanted)
        simple = fractions.Fraction(wanted).limit_denominator(10**6)
        ratio = simple if float(simple) == wanted else fractions.Fraction(wanted)
        return sympy.Rational(ratio.numerator, ratio.denominator)

    if not isinstance(value, sympy.Basic):
        return value
    return value.xreplace({n: exact(n) for n in value.atoms(sympy.Number) if not n.is_Integer})


def _for_text(program: Any) -> Any:
    """The same program with each inverse gate as the gate of the opposite first parameter, and
    all numbers such that they can be written."""
    import strawberryfields as sf

    plain = sf.Program(program.init_num_subsystems, name=program.name)
    for command in program.circuit:
        op = copy.copy(command.op)
        op.p = [_written_exactly(value) for value in op.p]
        if getattr(op, "dagger", False):
            op.p[0] = -op.p[0]
            op.dagger = False
        plain.append(op, [plain.reg_refs[register.ind] for register in command.reg])
    return plain
