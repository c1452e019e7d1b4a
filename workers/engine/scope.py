"""Where Strawberry Fields' engines are traced ones: within ``traced_engines``.

A model may make its engines in the call, or hold them: in an attribute, a list, a closure, a global
of its module. Within the scope the first are made as traced engines, and for each of the others a
traced engine answers that is made of the same options; the model's own stays what it was, for calls
outside. A backend that a model runs without an engine is left to itself. Owns that, and what
becomes of a state that one call leaves to the next.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import strawberryfields as sf
import tensorflow as tf
from strawberryfields import ops
from strawberryfields.backends.tfbackend.backend import TFBackend
from strawberryfields.engine import Engine, LocalEngine

from workers.engine import TracedEngine, circuit, projections, symbols
from workers.errors import UntraceableError

#: Why a call is not one that can be traced, or computed anywhere.
GOES_ON = (
    "the engine goes on with the state that an earlier call left it in; call engine.reset() before "
    "engine.run(...), or run all programs in one call"
)


class Scope:
    """One call of a model: what its engines were used for."""

    def __init__(self) -> None:
        self.left_alone: set[str] = set()  # backends of engines that are none of TensorFlow's
        self.traced: list[Scoped] = []


#: The scope that code runs in; False where stock engines were asked for, None where nobody said.
_scope: ContextVar[Scope | bool | None] = ContextVar("scope", default=None)


@contextlib.contextmanager
def traced_engines(wanted: bool = True) -> Iterator[Scope | None]:
    """Within, Strawberry Fields' engines of the "tf" backend are traced ones (or, unless wanted,
    stock ones). It holds for this thread's calls alone. One within another is the same scope."""
    _install()
    outer = _scope.get()
    if wanted and isinstance(outer, Scope):
        yield outer
        return
    scope = Scope() if wanted else None
    token = _scope.set(scope or False)
    try:
        if scope is None:
            yield None
        else:
            with symbols.answered(), projections.drawing():
                yield scope
    finally:
        _scope.reset(token)
        for engine in scope.traced if scope else ():
            engine.reset()  # its state is a graph's, which others cannot use


def stock_wanted() -> bool:
    """Whether stock engines were asked for, of code that would choose a traced one."""
    return _scope.get() is False


class Scoped(TracedEngine):
    """A traced engine that was made within a scope, and may be used in later ones.

    It goes on with its state where the model has it do so. What goes on with the state of an
    earlier call is not one call's business: it cannot be traced.
    """

    _last: Scope | None = None

    def run(self, program: Any, **kwargs: Any) -> Any:
        scope = _scope.get()
        if isinstance(scope, Scope):
            if self.run_progs and self._last is not scope:
                if _replaces_the_state(program):
                    self.reset()
                else:
                    self._go_on()
            if not tf.executing_eagerly() and self not in scope.traced:
                scope.traced.append(self)
            self._last = scope
        return super().run(program, **kwargs)

    def _go_on(self) -> None:
        if not tf.executing_eagerly():
            raise UntraceableError(GOES_ON)
        circuit.going_on()


class StandIn(Scoped):
    """The traced engine that answers in the place of a stock one that a model holds; it has been
    run as often as that one."""

    def __init__(self, held: LocalEngine) -> None:
        options = object.__getattribute__(held, "backend_options")
        super().__init__("tf", backend_options=dict(options))
        self.made_of = dict(options)
        self.run_progs = list(object.__getattribute__(held, "run_progs"))
        self.samples: Any = object.__getattribute__(held, "samples")
        self._held: Any = object.__getattribute__(held, "backend") if self.run_progs else None
        if self._held is not None:  # by which models, too, ask whether it has been run
            self.backend._modemap = copy.deepcopy(self._held._modemap)

    def reset(self, backend_options: dict[str, Any] | None = None) -> None:
        self._held = None
        super().reset(backend_options)

    def _go_on(self) -> None:
        super()._go_on()
        if self._held is not None:
            self.backend.go_on_from(self._held)
            self._held = None


def _replaces_the_state(program: Any) -> bool:
    """Whether what an earlier program left is of no matter: all modes are prepared at once, first
    of all. (One after the other, each is traced out of what was there: a mixed state.)"""
    first: Any = next(iter(program), None) if isinstance(program, Sequence) else program
    command = next(iter(first.circuit), None) if isinstance(first, sf.Program) else None
    if command is None or len(command.reg) != first.init_num_subsystems:
        return False
    at_once = ops.Ket | ops.DensityMatrix if len(command.reg) > 1 else ops.Preparation
    return isinstance(command.op, at_once)


StandIns = weakref.WeakKeyDictionary[LocalEngine, StandIn]

#: The stand-in of each held engine, for as long as that one is there; others within ``aside``.
_stand_ins: ContextVar[StandIns] = ContextVar("stand-ins", default=StandIns())  # noqa: B039


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What a model runs within this leaves no state in what answers for its engines later."""
    token = _stand_ins.set(StandIns())
    try:
        yield
    finally:
        _stand_ins.reset(token)


def _stand_in(engine: LocalEngine) -> StandIn | None:
    """What answers for an engine in the present scope; None if it answers itself."""
    scope = _scope.get()
    if not isinstance(scope, Scope) or type(engine) not in (Engine, LocalEngine):
        return None
    attributes = object.__getattribute__(engine, "__dict__")
    if type(attributes.get("backend")) is not TFBackend:
        if "backend" in attributes:
            scope.left_alone.add(attributes["backend_name"])
        return None
    known = _stand_ins.get()
    found = known.get(engine)
    if found is None or found.made_of != attributes["backend_options"]:
        found = known[engine] = StandIn(engine)
    return found


@functools.cache
def _install() -> None:
    original = LocalEngine.__new__

    def new(cls: type, backend: Any, *, backend_options: dict[str, Any] | None = None) -> Any:
        scope = _scope.get()
        if cls in (Engine, LocalEngine) and backend == "tf" and isinstance(scope, Scope):
            return object.__new__(Scoped)
        if issubclass(cls, TracedEngine):
            return object.__new__(cls)
        return original(cls, backend, backend_options=backend_options)

    def getattribute(self: Any, name: str) -> Any:
        if not name.startswith("__"):
            answering = _stand_in(self)
            if answering is not None:
                return getattr(answering, name)
        return object.__getattribute__(self, name)

    def setattribute(self: Any, name: str, value: Any) -> None:
        object.__setattr__(_stand_in(self) or self, name, value)

    computed = TFBackend.state

    def state(self: TFBackend, modes: Any = None, **kwargs: Any) -> Any:
        if type(self) is TFBackend and isinstance(_scope.get(), Scope):
            circuit.run_elsewhere()
        return computed(self, modes, **kwargs)

    TFBackend.state = state
    LocalEngine.__new__ = new
    LocalEngine.__getattribute__ = getattribute
    LocalEngine.__setattr__ = setattribute
