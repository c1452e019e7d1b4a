"""Where something was found, and whether it is still there.

Owns what counts as the same: of a variable itself, of a number, an array or a program what it is.
Knows nothing of who looks there.
"""

from __future__ import annotations

import contextlib
import sys
import types
from dataclasses import dataclass
from typing import Any

import numpy as np

#: What is compiled as a constant, and may be another one later.
PLAIN = (bool, int, float, complex, str)

#: Numbers of an array that is compared in each call.
_LARGEST = 4096


@dataclass(frozen=True, eq=False)
class Place:
    """Something that a model or a function leads to, by the ``key`` of the ``space`` that it was
    found in: an object's attributes, a module's globals, or a variable of what is around it."""

    space: Any
    key: str
    value: Any

    def is_there(self) -> bool:
        """Whether it has not been bound anew."""
        return found_at(self.space, self.key) is self.value


@dataclass(frozen=True, eq=False)
class Program(Place):
    """A program of Strawberry Fields', and the ``gates`` that it had."""

    gates: tuple[Any, ...]

    def is_there(self) -> bool:
        """Whether it has those, or another one of them. What had none is built by the call."""
        found = found_at(self.space, self.key)
        if found is self.value and len(found.circuit) == len(self.gates):
            return True
        return type(found) is type(self.value) and self.gates in ((), gates_of(found))


@dataclass(frozen=True, eq=False)
class Setting(Place):
    """A number, a text or a small array that a call looks at: what was compiled has it as a
    constant. ``now`` is what it was, also of an array that is written to; ``own``: that of one
    object, and not of all in a process that look there."""

    now: Any
    own: bool

    def is_there(self) -> bool:
        """Whether it is the same."""
        found = found_at(self.space, self.key)
        if found is self.value and not isinstance(found, np.ndarray):
            return True
        return bool(as_it_is_now(found) == self.now)

    @property
    def told(self) -> tuple[Any, ...]:
        """Equal where it is the same."""
        space = self.space.own if isinstance(self.space, Inherited) else self.space
        return self.key, id(space), self.now


@dataclass(frozen=True, eq=False)
class Inherited:
    """Attributes of an object that are its class's until it has its own."""

    own: dict[str, Any]
    of_class: Any


def found_at(space: Any, key: str) -> Any:
    """What is there, None if nothing is."""
    if isinstance(space, dict):
        return space.get(key)
    if isinstance(space, Inherited):
        return space.own[key] if key in space.own else space.of_class.get(key)
    with contextlib.suppress(ValueError):  # an empty cell
        return space.cell_contents
    return None


def as_it_is_now(value: Any) -> Any:
    """What stays equal while a plain value or a small array does; None of anything else."""
    if isinstance(value, PLAIN):
        return value
    if type(value).__name__ == "EagerTensor":
        value = value._numpy()
    if not isinstance(value, np.ndarray | np.generic):
        return None
    array = np.asarray(value)
    if array.size > _LARGEST or array.dtype.kind not in "biufc":
        return None
    return array.shape, array.dtype.str, array.tobytes()


def is_program(value: Any) -> bool:
    """One of Strawberry Fields'."""
    module = sys.modules.get("strawberryfields.program")
    return isinstance(module, types.ModuleType) and isinstance(value, module.Program)


def gates_of(program: Any) -> tuple[Any, ...]:
    """What is equal for programs that do the same: gates, the modes that they act on, numbers by
    their values, free parameters by their names, and anything else by what it is."""
    return tuple(
        (
            type(command.op),
            tuple(register.ind for register in command.reg),
            tuple(map(_parameter, command.op.p)),
            repr(getattr(command.op, "select", None)),
        )
        for command in program.circuit
    )


def _parameter(value: Any) -> Any:
    now = as_it_is_now(value)
    if now is not None:
        return now
    symbolic = type(value).__module__.partition(".")[0] in ("sympy", "strawberryfields")
    return str(value) if symbolic else id(value)
