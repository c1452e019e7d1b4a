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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import strawberryfields as sf
import tensorflow as tf
from strawberryfields import ops
from strawberryfields.backends.tfbackend.backend import TFBackend
from strawberryfields.engine import Engine, LocalEngine

from workers.context import during
from workers.engine import TracedEngine, circuit, projections, symbols
from workers.engine.deferred import refusing_batches
from workers.errors import StatefulCallError, UntraceableError

#: Why a call is not one that can be traced, or computed anywhere.
GOES_ON = (
    "the engine goes on with the state that an earlier call left it in; call engine.reset() before "
    "engine.run(...), or run all programs in one call"
)


class Scope:
    """One call of a model: what its engines were used for.

    ``refuses``: its engines refuse a batch that they were not made for. ``refused``: one did.
    ``bound``: parameters that were given tensors of a graph, and what they had before.
    """

    def __init__(self) -> None:
        self.left_alone: set[str] = set()  # backends of engines that are none of TensorFlow's
        self.traced: list[Scoped] = []
        self.ran: list[Scoped] = []
        self.refuses = self.refused = False
        self.bound: dict[int, tuple[Any, Any]] = {}

    def refuse(self) -> None:
        self.refused = True


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
        for parameter, value in scope.bound.values() if scope else ():
            parameter.val = value  # and would keep the graph


#: What does not catch it when a batch is refused, and is taken to be written for engines that take
#: any: models (or functions), whichever of their methods it was.
_TAKE_BATCHES: weakref.WeakSet[Any] = weakref.WeakSet()


def called(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    wanted: bool = True,
    *,
    of: Any = None,
) -> Any:
    """What ``function``, which is ``of`` a model, returns, called within ``traced_engines``.

    An engine that was made without a ``batch_size`` refuses a batch, as Strawberry Fields' does: a
    model may catch that, and go another way. One that fails of it is called again, and from then
    on, with engines that take any batch.
    """
    of = getattr(function, "__self__", function) if of is None else of
    outer = _scope.get()
    with traced_engines(wanted) as scope:
        if scope is None or scope is outer or _is_known(of):
            return function(*args, **kwargs)
        scope.refuses = True
        noted = circuit.noted()
        try:
            return function(*args, **kwargs)
        except Exception:
            if not scope.refused:
                raise
            circuit.take_back(noted)
            for engine in scope.ran:
                engine.reset()
            scope.refuses = False
            found = function(*args, **kwargs)
            with contextlib.suppress(TypeError):  # what cannot be referred to weakly
                _TAKE_BATCHES.add(of)
            return found


def _is_known(of: Any) -> bool:
    try:
        return of in _TAKE_BATCHES
    except TypeError:
        return False


def stock_wanted() -> bool:
    """Whether stock engines were asked for, of code that would choose a traced one."""
    return _scope.get() is False


#: Whether what is traced may take it that engines are reset before each call of it.
_reset_before: ContextVar[bool] = ContextVar("reset before", default=False)


def reset_before(wanted: bool = True) -> AbstractContextManager[Any]:
    """What is traced within this begins with engines as they are after a reset: whoever calls it
    sees to that, and tells engines of each call (``Scoped.has_run``)."""
    return during(_reset_before, wanted)


class Scoped(TracedEngine):
    """A traced engine that was made within a scope, and may be used in later ones.

    It goes on with its state where the model has it do so. What goes on with the state of an
    earlier call is not one call's business: it cannot be traced.
    """

    #: The calls in which it was run, or else reset, for the last time.
    _last: Scope | None = None
    _reset_in: Scope | bool | None = None

    #: What was run when it was run for the last time; whether the state that this left is gone.
    _programs: tuple[Any, ...] = ()
    _lost = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reset_in = _scope.get()

    def run(self, program: Any, **kwargs: Any) -> Any:
        scope = _scope.get()
        if isinstance(scope, Scope):
            if self._last is not scope:
                self._begin(scope, program)
                scope.ran.append(self)
                circuit.running(self)
            if not tf.executing_eagerly() and self not in scope.traced:
                scope.traced.append(self)
            self._last = scope
        elif self._lost and _replaces_the_state(program):
            self.reset()
        else:
            self.check_state()
        refuse = scope.refuse if isinstance(scope, Scope) and scope.refuses else None
        with refusing_batches(refuse):
            result = super().run(program, **kwargs)
        self._programs = tuple(self.run_progs)
        return result

    def _bound_before(self, programs: list[Any]) -> list[tuple[Any, Any]]:
        """They have it back when the call is over: it may run a program without arguments again."""
        scope, found = _scope.get(), super()._bound_before(programs)
        if not isinstance(scope, Scope):
            return found
        for parameter, value in found:
            scope.bound.setdefault(id(parameter), (parameter, value))
        return []

    def reset(self, backend_options: dict[str, Any] | None = None) -> None:
        """See ``LocalEngine.reset``."""
        super().reset(backend_options)
        self._reset_in, self._lost = _scope.get(), False
        self.backend.why_no_state = ""

    def has_run(self) -> None:
        """Note that what was compiled has run it. The state that it left is not kept."""
        self.run_progs = list(self._programs)
        self._lost = True
        self.backend.why_no_state = (
            "the engine's last run was compiled, and left no state in the engine; keep what "
            "engine.run(...) returns in an attribute of the model, or return it"
        )

    def _begin(self, scope: Scope, program: Any) -> None:
        if not self.run_progs:
            if self._reset_in is not scope:
                circuit.beginning(self)
        elif _reset_before.get() or _replaces_the_state(program):
            self.reset()
        else:
            self._go_on()

    def _go_on(self) -> None:
        if not tf.executing_eagerly():
            raise UntraceableError(GOES_ON)
        self.check_state()
        circuit.going_on()

    def check_state(self) -> None:
        """StatefulCallError if the state that it would go on with is gone."""
        if self._lost:
            raise StatefulCallError(
                "the engine was not reset before this call, as it was before earlier ones, which "
                "were compiled: the state that the last one left was not kept. Call "
                "engine.reset() before each call, or within it"
            )


class StandIn(Scoped):
    """The traced engine that answers in the place of a stock one that a model holds; it has been
    run as often as that one."""

    def __init__(self, held: LocalEngine) -> None:
        options = object.__getattribute__(held, "backend_options")
        super().__init__("tf", backend_options=dict(options))
        self._reset_in = None
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


def aside() -> AbstractContextManager[Any]:
    """What a model runs within this leaves no state in what answers for its engines later."""
    return during(_stand_ins, StandIns())


#: What an engine tells of what it has run.
_OUTSIDE = ("run_progs", "reset", "run", "samples", "print_applied", "backend")


def _outside(engine: LocalEngine, name: str) -> Any:
    """What a program that asks outside of any call whether an engine has been run, runs it, or
    resets it before the next call, is told: of what has answered for it too."""
    found = _stand_ins.get().get(engine) if type(engine) in (Engine, LocalEngine) else None
    own = object.__getattribute__(engine, name)
    if found is None or not found.run_progs:
        return own
    if name != "reset":
        return getattr(found, name)

    def reset(backend_options: dict[str, Any] | None = None) -> None:
        found.reset(backend_options)
        if object.__getattribute__(engine, "run_progs"):
            own(backend_options)
        else:  # it has no circuit to reset
            object.__getattribute__(engine, "backend_options").update(backend_options or {})

    return reset


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
            if name in _OUTSIDE and _scope.get() is None:
                return _outside(self, name)
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
