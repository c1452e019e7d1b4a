"""Calls of a model's methods in this process: each way of calling one is compiled once.

Owns what has been compiled for each way; what that is, is ``choosing``'s. Arguments that are
tensors are inputs of the compiled function; all others are constants of it, known by content.
``cpu_batch`` and the methods that are not pooled (``unpooled``) call by it.

Gradients for a tape outside of the compiled function are ``compiling.taped``'s; where they are
TensorFlow's own, they are checkpointed (``engine.circuit``).
What a call draws from TensorFlow's global generator is drawn from a stream whose key is drawn from
that generator at each call: ``tf.random.set_seed`` makes all of it the same again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tensorflow as tf

from qpool.bridge.arguments import argument_names
from qpool.executors.in_place.inputs import Inputs
from qpool.shipping import dumps
from workers.compiling import compiled
from workers.compiling.compile_cache import Guarded
from workers.compiling.taped import Taped
from workers.engine import circuit
from workers.engine.scope import called, reset_before
from workers.exchange.protocol import Plan, Sharded
from workers.replica import classes
from workers.replica.kept import Kept
from workers.replica.method import Method
from workers.tensors import differentiable, leaves, mapped


@dataclasses.dataclass
class CompiledCall:
    """One way of calling one method.

    ``sharded``: which of its inputs have a row a sample. ``choice`` is None until it is made, for
    so many ``rows``; ``calls`` and ``seconds`` are those of its eager calls before that, ``ran``
    the circuits of the last one, ``drew`` says that it drew what a stream would take over,
    ``seeded`` that it drew from sources that it updates, and ``assigned`` which variables it
    assigned to, by identity. ``kept`` are places in the model of which what was compiled returns
    what it leaves there, ``lost`` those that it leaves nothing in, ``updates`` variables whose new
    values it returns. ``engines`` are those that it begins with as they are after a reset, ``runs``
    all that it runs; ``reset_before`` says that there may be some, which the next call will show.
    ``alike`` are the same with other counts of rows, and ``wider`` the one of them that computes
    it, with more.
    """

    method: Method
    sharded: tuple[bool, ...]
    choice: compiled.Choice | None = None
    rows: int | None = None
    calls: int = 0
    seconds: float = 0.0
    ran: circuit.Tally = dataclasses.field(default_factory=circuit.Tally)
    drew: bool = False
    assigned: Container[int] = ()
    seeded: bool = False
    attributes: Any = None
    changes: int = 0
    kept: Sequence[Kept] = ()
    lost: Sequence[Kept] = ()
    updates: Sequence[tf.Variable] = ()
    engines: Sequence[Any] = ()
    runs: Sequence[weakref.ref[Any]] = ()
    reset_before: bool = False
    alike: Sequence[CompiledCall] = ()
    wider: CompiledCall | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether it may be computed by what was compiled, now."""
        return self.compiles and not any(engine.run_progs for engine in self.engines)

    @property
    def compiles(self) -> bool:
        """Whether there is something compiled that gives what the eager call gave."""
        return self.choice is not None and self.choice.level != "eager"

    @property
    def only_computes(self) -> bool:
        """Whether it is compiled, and calling it once more changes nothing, and gives the same."""
        drawing = self.drew or self.seeded or self.method.stream is not None
        leaves = self.engines or self.updates or self.kept or self.lost
        return self.is_compiled and not (drawing or leaves)

    def taped(self, lock: AbstractContextManager[Any]) -> Callable[..., Any]:
        """What was compiled, by XLA with gradients by one program more; not if it is to update
        variables that it depends on."""
        compiled = self.method.compiled
        if not isinstance(compiled, Guarded) or self.updates:
            return compiled
        known = self.method.__dict__.get("taped")
        if known is None:

            @contextlib.contextmanager
            def around() -> Iterator[None]:
                with lock, reset_before(self.reset_before):
                    yield

            pull_back = functools.partial(_pull_back, self.method)
            aside = sum(len(kept.specs) for kept in self.kept)
            known = self.method.__dict__["taped"] = Taped(compiled, pull_back, around, aside)
        return known

    def widened(self, inputs: Sequence[tf.Tensor], computed: Callable[..., Any]) -> Any:
        """What ``wider``, ``computed``, gives for fewer rows: with the last one repeated, and
        without what that gives."""
        assert self.wider is not None
        rows = self.rows or 0
        more = (self.wider.rows or 0) - rows
        given = (
            tf.concat([x, tf.repeat(x[-1:], more, axis=0)], 0) if flag else x
            for x, flag in zip(inputs, self.wider.sharded, strict=True)
        )
        found = computed(*given)
        if not self.kept:
            return mapped(lambda x: x[:rows], found)
        found, left = found
        fewer = [kept.of_fewer(tensors) for kept, tensors in zip(self.kept, left, strict=True)]
        return mapped(lambda x: x[:rows], found), fewer

    def as_dict(self) -> dict[str, Any]:
        """For ``stats()``; a choice must have been made."""
        assert self.choice is not None
        return {
            "method": self.method.plan.method,
            "level": self.choice.level,
            "by_rows": any(self.method.plan.form.by_rows),
            "together": self.method.plan.form.together,
            "why_not_better": self.choice.reason,
            "seconds": self.choice.seconds,
        }


class CompiledCalls:
    """The ways in which the methods of one model have been called.

    ``lock`` is for a call as a whole, from any thread: all have the model's engines, programs and
    streams of draws.
    """

    def __init__(self, model: Any, sharded: Sequence[str]) -> None:
        self._model = model
        self._sharded = sharded
        self._known: dict[Any, CompiledCall] = {}
        self.lock = threading.RLock()

    def run(self, compiled_call: CompiledCall, inputs: list[tf.Tensor]) -> Any:
        """Call what was compiled."""
        if compiled_call.method.stream is not None:
            compiled_call.method.stream.seed(
                tf.random.uniform([2], maxval=2**31 - 1, dtype=tf.int32)
            )
        if compiled_call.wider is not None:
            found = compiled_call.widened(inputs, compiled_call.wider.taped(self.lock))
        else:
            found = compiled_call.taped(self.lock)(*inputs)
        for engine in compiled_call.runs:
            if (there := engine()) is not None:
                there.has_run()
        if compiled_call.updates:
            found, values = found
            for variable, value in zip(compiled_call.updates, values, strict=True):
                variable.assign(value)
        if compiled_call.kept:
            found, left = found
            for kept, tensors in zip(compiled_call.kept, left, strict=True):
                kept.write(tensors)
        for lost in compiled_call.lost:
            lost.unset()
        return found

    @property
    def decided(self) -> list[CompiledCall]:
        """Those for which a choice was made."""
        return [
            compiled_call
            for compiled_call in self._known.values()
            if compiled_call.choice is not None
        ]

    @property
    def known(self) -> list[CompiledCall]:
        return list(self._known.values())

    def find(
        self,
        method: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        batched: bool = True,
    ) -> tuple[CompiledCall, list[tf.Tensor]]:
        """What is known of this way of calling, and the inputs of the compiled function.

        ``batched``: the first argument is a batch, and becomes a tensor if it is none.

        Raises:
            ShippingError: constants that do not pickle, which could not be told apart.
        """
        arrays = args[0].dtype.name if args and isinstance(args[0], np.ndarray) else ""
        found = Inputs(self._sharded, batched)
        names = argument_names(self._model, method) if len(args) > 1 else ()
        marked = tuple(
            found.marked(value, names[place] if place < len(names) else "", place == 0)
            for place, value in enumerate(args)
        )
        named = {
            name: found.marked(value, name, not args and place == 0)
            for place, (name, value) in enumerate(kwargs.items())
        }
        inputs = found.tensors
        only = (marked, named) == ((Sharded(0),), {})
        constants = b"" if only else dumps((marked, named), "arguments")
        # Not batched, their shapes too: what is right for one need not be for another.
        shapes = () if batched else tuple((*x.shape, x.dtype.name) for x in inputs)
        same = (method, constants, shapes, arrays)
        key = self._with_rows(same, inputs)
        if key not in self._known:
            if not only:  # constants as they are now, whatever becomes of the caller's
                marked, named = classes.loads(constants)
            as_tensor = tuple(not arrays or n > 0 for n in range(len(inputs)))
            plan = Plan(0, 0, method, b"", as_tensor, 0)
            made = Method(plan, function, marked, named, True)
            alike = [known for other, known in self._known.items() if other[: len(same)] == same]
            self._known[key] = CompiledCall(made, tuple(found.sharded), alike=alike)
        return self._known[key], inputs

    def _with_rows(self, key: tuple[Any, ...], inputs: Sequence[tf.Tensor]) -> tuple[Any, ...]:
        """The key, with the count of rows where another one is another call."""
        rows = inputs[0].shape[0] if inputs and inputs[0].shape.rank else 0
        known = self._known.get(key)
        if known is not None and known.rows == 1 != rows:
            key = (*key, "more")  # which one row does not show: loops over them, for one
            known = self._known.get(key)
        if known is not None and any(known.method.plan.form.by_rows) and rows != known.rows:
            # Traced for one row: what it does with another count of rows is to be seen first.
            key = (*key, rows)
        return key


def as_it_is(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called with what is around it, compiled or not."""
    return called(function, args, kwargs)


def _pull_back(
    method: Method, variables: Sequence[tf.Variable], asked: tuple[bool, ...]
) -> Guarded:
    """The call's vector-Jacobian product, the call in it: see ``Taped``."""

    def pulled(*given: tf.Tensor) -> list[tf.Tensor | None]:
        inputs = given[: len(method.plan.as_tensor)]
        sources = [*filter(differentiable, inputs), *variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            outputs = list(itertools.compress(leaves(method(*inputs)), asked))
        found = tape.gradient(outputs, sources, output_gradients=given[len(inputs) :])
        return [None if x is None else tf.convert_to_tensor(x) for x in found]

    made = compiled.at_level(pulled, "xla", repr(asked))
    assert isinstance(made, Guarded)
    return made
