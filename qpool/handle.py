"""What a pooled object has beside the model's own attributes: executors, and what calls look at.

Owns the choice of strategy per call, and what is made anew when something has changed between two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qpool import notices
from qpool.engines import HeldEngine, held_engines
from qpool.executors import Executor, Options, executor_class
from workers.errors import PoolClosedError
from workers.replica import functions, places, watched

if TYPE_CHECKING:
    from qpool.executors.in_place.unpooled import Unpooled

log = logging.getLogger("qpool")

#: How often what calls look at may change before they are computed as they are, where fewer than
#: so many calls come between two changes.
_CHANGES, _CALLS = 3, 20

#: For how many values of them what was made is kept, beside the present ones.
_VARIANTS = 3


class Handle:
    """What a pooled model has beside the model's own attributes."""

    def __init__(
        self, model: Any, methods: tuple[str, ...], strategy: str, options: Options
    ) -> None:
        self.model = model
        self.methods = methods
        self.strategy = strategy
        self.options = options
        self.closed = False
        self.pooled_calls = 0
        self._executors: dict[type[Executor], Executor] = {}
        self._unpooled: Unpooled | None = None
        self._variants: dict[Any, dict[type[Executor], Executor]] = {}
        self._retired: list[Executor] = []
        self._changes = self._renewed_at = 0
        self._written_to: set[tuple[int, str]] = set()
        self._look()

    def executor(self, strategy: str | None = None) -> Executor:
        """The strategy's executor, made when it is first asked for."""
        if self.closed:
            raise PoolClosedError("this generator was closed; parallelize the model again")
        if not all(held.is_there() for held in self._held):
            replaced = [held for held in self._held if not held.is_there()]
            log.info("%s was replaced: all is made anew", ", ".join(str(h.key) for h in replaced))
            self._let_go()
            self._look()
            self._is_restless([h.key for h in replaced if not isinstance(h, HeldEngine)])
        if not all(setting.is_there() for setting in self._settings):
            self._renew()
        restless = self._changes > _CHANGES
        chosen = executor_class("sequential" if restless else strategy or self.strategy)
        if chosen not in self._executors:
            self._executors[chosen] = chosen(self.model, self.options)
        return self._executors[chosen]

    def called(self) -> None:
        """After a call: what it has changed itself is not looked at any more."""
        changed = [place for place in self._writable if not place.is_there()]
        if changed:
            self._written_to |= {place.where for place in changed}
            self._look_at([p for p in (*self._settings, *self._held) if p not in changed])

    def unpooled(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a method that is not pooled: on the traced engine, unless stock is asked for."""
        stock = self.options.engine == "stock" or self.strategy == "sequential"
        if self.closed or stock:
            return function(*args, **kwargs)
        self.executor()  # which sees to it that its engines are those of the model
        if self._unpooled is None:
            from qpool.executors.in_place.unpooled import Unpooled

            self._unpooled = Unpooled(self.model, lambda: self.pooled_calls)
        return self._unpooled.call(name, function, args, kwargs)

    def summary(self) -> str:
        """See ``qpool.notices.summary``."""
        stats = {"strategy": "closed"} if self.closed else self.executor().stats()
        unpooled = self._unpooled.stats() if self._unpooled else []
        left = [str(engine) for engine in self._engines if engine.backend != "tf"]
        return notices.summary(notices.name_of(self.model), stats, unpooled, left)

    def stats(self) -> dict[str, Any]:
        unpooled = self._unpooled.stats() if self._unpooled else []
        return {**self.executor().stats(), "unpooled": unpooled}

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._let_go()
            drop_traces(self.model)

    def _look(self) -> None:
        """See which engines the model holds, and what a function finds in its module."""
        function = isinstance(self.model, functions.FunctionModel)
        found, self._may_be_written = watched.watched(self.model, self.methods)
        looked_at = [place for place in found if place.where not in self._written_to]
        looked_at += self.model.look() if function else []
        self._engines = held_engines(self.model)
        self._look_at([*self._engines, *looked_at])

    def _look_at(self, found: Sequence[HeldEngine | places.Place]) -> None:
        """Have a change of these be seen by the next call."""
        self._settings = [place for place in found if isinstance(place, places.Setting)]
        self._told = tuple(setting.told for setting in self._settings)
        self._held = [place for place in found if place not in self._settings]
        self._writable = [
            place
            for place in found
            if isinstance(place, places.Place)
            if place.is_container or place.where in self._may_be_written
        ]

    def _renew(self) -> None:
        """Take what was made for the numbers that calls look at now, or make it."""
        changed = [setting for setting in self._settings if not setting.is_there()]
        others = [setting.key for setting in changed]
        log.info("%s changed: what was computed with it is for another time", ", ".join(others))
        before = self._executors
        self._variants[self._told] = before
        if not all(setting.own for setting in changed):
            # Each replica has attributes of its own, but all of a process have one module.
            for executors in self._variants.values():
                self._retire(executors)
            self._variants.clear()
        self._look()
        known = self._variants.pop(self._told, None)
        if known is None:
            if self._is_restless(others):
                self._let_go()
                return
            known = {kind: executor.sibling() for kind, executor in before.items()}
        self._executors = known
        while len(self._variants) > _VARIANTS:
            self._retire(self._variants.pop(next(iter(self._variants))))

    def _is_restless(self, changed: list[str]) -> bool:
        """Whether what calls look at has changed so often that they are computed as they are."""
        if not changed:
            return False
        often = self.pooled_calls - self._renewed_at < _CALLS
        self._changes, self._renewed_at = self._changes + 1 if often else 0, self.pooled_calls
        if self._changes > _CHANGES:
            notices.restless(self.model, changed, self.options)
        return self._changes > _CHANGES

    def _retire(self, executors: dict[type[Executor], Executor]) -> None:
        """Close them, but for those that others live by."""
        for executor in executors.values():
            if executor.is_needed:
                self._retired.append(executor)
            else:
                executor.close()

    def _let_go(self) -> None:
        for executors in (self._executors, *self._variants.values()):
            for executor in executors.values():
                executor.close()
        for executor in self._retired:
            executor.close()
        self._executors = {}
        self._variants.clear()
        self._retired.clear()
        self._unpooled = None


def drop_traces(model: Any) -> None:
    """Have Keras trace anew: what it traced before is bound to the other of the two objects."""
    for name in ("train_function", "test_function", "predict_function"):
        if name in vars(model):
            vars(model)[name] = None
