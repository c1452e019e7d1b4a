"""Calls of a model's methods in this process: each way of calling one is compiled once.

Owns what has been compiled for each way, and whether a call may be: it must do no more than
compute. Arguments that are tensors are inputs of the compiled function; all others are constants of
it, known by content. ``cpu_batch`` and the methods that are not pooled (``unpooled``) call by it.

Gradients for a tape outside of the compiled function are ``compiling.taped``'s; where they are
TensorFlow's own, they are checkpointed (``engine.circuit``).
What a call draws from TensorFlow's global generator is drawn from a stream whose key is drawn from
that generator at each call: ``tf.random.set_seed`` makes all of it the same again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record

from qpool.bridge.arguments import argument_names
from qpool.executors.in_place.effects import returning
from qpool.executors.in_place.inputs import Inputs
from qpool.shipping import dumps
from workers.compiling import compiled, streams
from workers.compiling.compile_cache import Guarded
from workers.compiling.streams import Stream
from workers.compiling.taped import Taped
from workers.engine import circuit
from workers.engine.scope import called, reset_before
from workers.errors import ModelError
from workers.exchange.protocol import Plan, Sharded
from workers.replica import classes, probe
from workers.replica.method import Method
from workers.tensors import differentiable, leaves, mapped

#: Operations that do more than compute, or whose checks XLA drops. Reads of variables, and draws
#: from a seed that is an argument, are none of them.
_EFFECTS = re.compile(
    r"Assign|Resource(?!Gather)|Random|Multinomial|(Parameterized)?TruncatedNormal"
    r"|Stateful(?!PartitionedCall)|(Eager)?PyFunc|Assert|CheckNumerics|Print"
)

#: Those of them that are draws, which a stream may take over.
_DRAWS = re.compile(r"Random(StandardNormal|Uniform|UniformInt)$|TruncatedNormal$")


@dataclasses.dataclass
class CompiledCall:
    """One way of calling one method.

    ``sharded``: which of its inputs have a row a sample. ``choice`` is None until it is made, for
    so many ``rows``; ``calls`` and ``seconds`` are those of its eager calls before that, ``ran``
    the circuits of the last one, ``drew`` says that it drew what a stream would take over,
    ``seeded`` that it drew from sources that it updates, and ``assigned`` which variables it
    assigned to, by identity. ``sets`` are attributes of the model that what was compiled returns
    with the result, ``updates`` variables of whose new values that is so. ``engines`` are those
    that it begins with as they are after a reset; ``reset_before`` says that there may be some,
    which the next call will show. ``alike`` are the same with other counts of rows, and ``wider``
    the one of them that computes it, with more.
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
    sets: tuple[str, ...] = ()
    updates: Sequence[tf.Variable] = ()
    engines: Sequence[Any] = ()
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
        return self.is_compiled and not (drawing or self.engines or self.updates or self.sets)

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
            known = self.method.__dict__["taped"] = Taped(compiled, pull_back, around)
        return known

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
            wider = compiled_call.wider
            found = _widened(compiled_call, wider, inputs, wider.taped(self.lock))
        else:
            found = compiled_call.taped(self.lock)(*inputs)
        for engine in compiled_call.engines:
            engine.has_run()
        if compiled_call.updates:
            found, values = found
            for variable, value in zip(compiled_call.updates, values, strict=True):
                variable.assign(value)
        if compiled_call.sets:
            found, values = found
            vars(self._model).update(zip(compiled_call.sets, values, strict=True))
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

    def choose(
        self,
        compiled_call: CompiledCall,
        inputs: list[tf.Tensor],
        result: Any,
        reason: str,
        levels: Sequence[str] = compiled.LEVELS[:-1],
        sets: tuple[str, ...] = (),
        updated: Sequence[tuple[tf.Variable, Any]] = (),
    ) -> compiled.Choice:
        """Compile, unless for a ``reason``, to what gives the ``result`` of the eager call.

        If that ran as many circuits as it had rows, it is vectorised over them, if it can be.
        ``sets``: attributes that it set to tensors, which what is compiled sets too, unless it is a
        loop. ``updated``: variables to which it gave these values, and which have those of before
        now; what is compiled updates them, and no row stands for all.
        """
        circuits = compiled_call.ran.runs
        rows = int(inputs[0].shape[0]) if any(compiled_call.sharded) and inputs[0].shape.rank else 0
        compiled_call.rows = rows
        looped = not updated and rows > 1 and probe.loops((rows, circuits), (rows, circuits))
        self._have_returned(
            compiled_call,
            () if looped or reason else sets,
            () if reason else [variable for variable, _ in updated],
        )
        if compiled_call.sets:
            result = result, [vars(self._model)[name] for name in compiled_call.sets]
        if compiled_call.updates:
            result = result, [tf.convert_to_tensor(value) for _, value in updated]
        outputs = leaves(result)
        if not reason and not (outputs and all(map(tf.is_tensor, outputs))):
            reason = "it returns NumPy arrays"
        if reason:
            return compiled.Choice("eager", reason, 0.0)
        if looped and (wider := _wider(compiled_call, inputs, outputs)) is not None:
            compiled_call.wider, compiled_call.method = wider, wider.method
            assert wider.choice is not None
            return dataclasses.replace(wider.choice, seconds=0.0)
        effects: set[str] = set()
        find = functools.partial(
            self._choose, compiled_call, inputs, outputs, looped, levels, effects
        )
        choice = compiled.Choice("eager", "the model draws random numbers", 0.0)
        if not compiled_call.drew or compiled_call.method.stream is not None:
            choice = find()
            if choice.level != "eager" or not _only_draws(effects):
                return choice
        original = compiled_call.method
        compiled_call.method = dataclasses.replace(original, stream=Stream(), seen={})
        found = find()
        if found.level == "eager":
            compiled_call.method = original
            return found if compiled_call.drew else choice
        return found

    def _have_returned(
        self,
        compiled_call: CompiledCall,
        sets: tuple[str, ...],
        updated: Sequence[tf.Variable],
    ) -> None:
        """Have what will be compiled return these attributes and variables with its result."""
        call = returning(compiled_call.method.call, self._model, sets, updated)
        compiled_call.sets, compiled_call.updates = sets, updated
        if call is not compiled_call.method.call:
            compiled_call.method = dataclasses.replace(compiled_call.method, call=call, seen={})

    @staticmethod
    def _choose(
        compiled_call: CompiledCall,
        inputs: list[tf.Tensor],
        outputs: list[Any],
        looped: bool,
        levels: Sequence[str],
        effects: set[str],
    ) -> compiled.Choice:
        """``effects`` takes what it was found to do more than compute."""
        original = compiled_call.method
        stream, rows = original.stream, compiled_call.rows or 0
        circuits = compiled_call.ran.runs
        choice: compiled.Choice | None = None
        for form in probe.forms(original.plan, outputs, looped=looped, circuits=circuits):
            if form.by_rows:
                form = dataclasses.replace(form, by_rows=compiled_call.sharded)
            trial = dataclasses.replace(
                original, plan=dataclasses.replace(original.plan, form=form)
            )

            def use(function: Any, level: str, trial: Method = trial) -> None:
                plan = dataclasses.replace(trial.plan, level=level)
                compiled_call.method = dataclasses.replace(trial, plan=plan)
                compiled_call.method.__dict__["compiled"] = function

            alike = streams.constant if stream and form.by_rows else contextlib.nullcontext
            if stream is not None:
                stream.seed(0)
                with circuit.untraced(), alike():
                    outputs = leaves(trial(*inputs))
                    if form.by_rows and not _draws_row_by_row(trial, inputs, rows):
                        continue
            found = compiled.choose(
                _computing(trial, effects),
                inputs,
                outputs,
                use,
                before=lambda: stream.seed(0) if stream is not None else None,
                draws=stream is not None or compiled_call.seeded,
                failed=bool(compiled_call.ran.failures),
                alike=alike,
                levels=levels,
            )
            instead = probe.instead_of_rows(form) if looped and found.level != "eager" else ""
            choice = found.after(choice, instead) if choice and instead else found
            if choice.level != "eager" or (stream is None and _only_draws(effects)):
                break
        assert choice is not None
        return choice


def _wider(
    compiled_call: CompiledCall, inputs: Sequence[tf.Tensor], outputs: list[Any]
) -> CompiledCall | None:
    """The one of those that are alike, with up to four times the rows, that gives these outputs, so
    that none is compiled for the last rows of an epoch, or for each length of an episode."""
    rows = compiled_call.rows or 0
    fit = [
        other
        for other in compiled_call.alike
        if rows < (other.rows or 0) <= 4 * rows and other.wider is None and other.compiles
        if any(other.method.plan.form.by_rows) and other.method.stream is None
    ]
    for other in sorted(fit, key=lambda other: other.rows or 0):
        with record.stop_recording():
            found = leaves(_widened(compiled_call, other, inputs, other.method.compiled))
        if not compiled.first_difference(found, outputs):
            return other
    return None


def _widened(
    compiled_call: CompiledCall,
    wider: CompiledCall,
    inputs: Sequence[tf.Tensor],
    computed: Callable[..., Any],
) -> Any:
    """What ``wider``, ``computed``, gives for the rows, the last one repeated, without what that
    one gives."""
    rows = compiled_call.rows or 0
    more = (wider.rows or 0) - rows
    given = (
        tf.concat([x, tf.repeat(x[-1:], more, axis=0)], 0) if flag else x
        for x, flag in zip(inputs, wider.sharded, strict=True)
    )
    return mapped(lambda x: x[:rows], computed(*given))


def _draws_row_by_row(method: Method, inputs: list[tf.Tensor], rows: int) -> bool:
    """Whether a call that has just been made with so many rows drew as many times what it draws for
    one. What it draws once, for all rows, must not become a draw for each."""
    stream, over = method.stream, method.plan.form.by_rows
    assert stream is not None
    drawn = stream.numbers
    stream.seed(0)
    method(*(x[:1] if flag else x for x, flag in zip(inputs, over, strict=True)))
    return drawn == rows * stream.numbers


def _only_draws(effects: set[str]) -> bool:
    return bool(effects) and all(map(_DRAWS.match, effects))


def as_it_is(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called with what is around it, compiled or not."""
    return called(function, args, kwargs)


def _pull_back(method: Method, variables: Sequence[tf.Variable]) -> Guarded:
    """The call's vector-Jacobian product, the call in it: see ``Taped``."""

    def pulled(*given: tf.Tensor) -> list[tf.Tensor | None]:
        inputs = given[: len(method.plan.as_tensor)]
        sources = [*filter(differentiable, inputs), *variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            outputs = [x for x in leaves(method(*inputs)) if differentiable(x)]
        found = tape.gradient(outputs, sources, output_gradients=given[len(inputs) :])
        return [None if x is None else tf.convert_to_tensor(x) for x in found]

    made = compiled.at_level(pulled, "xla")
    assert isinstance(made, Guarded)
    return made


def _computing(method: Method, noticed: set[str]) -> Callable[..., Any]:
    """The call, for a tape that is outside of what is compiled; it must do no more than compute.
    What it does is ``noticed``."""

    def call(*inputs: tf.Tensor) -> Any:
        with circuit.checkpointing():
            found = method(*inputs)
        if not tf.executing_eagerly():
            definition = tf.compat.v1.get_default_graph().as_graph_def()
            inner = (node for function in definition.library.function for node in function.node_def)
            effects = {n.op for n in (*definition.node, *inner) if _EFFECTS.match(n.op)}
            noticed.update(effects)
            if effects:
                raise ModelError(f"it does more than compute: {', '.join(sorted(effects))}")
        return found

    return call
