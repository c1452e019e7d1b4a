"""``cpu_batch``: the compiled engine in this process, the whole batch at once, without a pool.

Owns what has been compiled for each way the model is called. Arguments that are tensors are inputs
of the compiled function; all others are constants of it, known by content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from qpool import tapes
from qpool.executors.base import Executor, Options
from qpool.shipping import dumps
from workers import compiled, recipes
from workers.draws import global_states
from workers.engine import traced_engines
from workers.errors import ConfigurationError, GradientError
from workers.matrices import within_xla
from workers.method import Method, differentiable
from workers.protocol import Plan, Sharded

log = logging.getLogger("qpool")


@dataclasses.dataclass
class _Way:
    """One way of calling one method."""

    method: Method
    choice: compiled.Choice | None = None
    #: All that the model's call may read; ``method.variables`` are those that gradients are for.
    variables: Sequence[tf.Variable] = ()


class CpuBatchExecutor(Executor):
    """Calls the model here, with Strawberry Fields' engines traced and the call compiled.

    Gradients are TensorFlow's own, of any order. A model that changes its variables, or draws from
    NumPy or ``random``, is not compiled, and neither is a call with an ndarray for its first
    argument (the model would find a tensor in its place).
    """

    def __init__(self, model: Any, options: Options) -> None:
        super().__init__(model, options)
        if options.engine != "traced":
            raise ConfigurationError(
                f"strategy='cpu_batch' is the compiled engine; engine={options.engine!r} rules it "
                "out. Use strategy='sequential' for Strawberry Fields as it is"
            )
        self._ways: dict[Any, _Way] = {}

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = self.model if method == "__call__" else getattr(self.model, method)
        if any(isinstance(value, np.ndarray) for value in args[:1]):
            with traced_engines():
                return function(*args, **kwargs)
        way, inputs = self._way(method, function, args, kwargs)
        if not tf.executing_eagerly():
            if within_xla():  # it is compiled with all that is around it
                return way.method(*inputs)
            if way.choice is None:
                way.choice = self._choose_for_graph(way, inputs)
            return (way.method.compiled if way.choice else way.method)(*inputs)
        if way.choice is None:
            way.choice = self._choose(way, inputs)
        with self._counted(args):
            if way.choice.level == "xla" and tapes.recording():
                return _on_tape(way, inputs)
            return way.method.compiled(*inputs)

    @property
    def within_xla(self) -> bool:
        """Whether XLA has compiled every way in which the model has been called."""
        choices = [way.choice for way in self._ways.values()]
        return bool(choices) and all(choice and choice.level == "xla" for choice in choices)

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        method = "__call__" if callable(self.model) else "generate"
        variables = recipes.trainable_variables(self.model)
        z = tf.convert_to_tensor(z)
        rows = []
        for n in range(len(z)):
            with tf.GradientTape() as tape:
                outputs = tf.nest.flatten(self.call(method, (z[n : n + 1],), {}))
            seeds = [seed[n : n + 1] for seed in tf.nest.flatten(cotangent)]
            rows.append(
                tape.gradient(
                    outputs,
                    variables,
                    output_gradients=seeds,
                    unconnected_gradients=tf.UnconnectedGradients.ZERO,
                )
            )
        return [tf.stack([tf.convert_to_tensor(g) for g in c]) for c in zip(*rows, strict=True)]

    def stats(self) -> dict[str, Any]:
        choices = [way.choice for way in self._ways.values() if way.choice]
        return {
            "strategy": "cpu_batch",
            **self._rate(),
            "compiled": [
                {"level": c.level, "why_not_better": c.reason, "seconds": c.seconds}
                for c in choices
            ],
        }

    def _way(
        self, method: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Way, list[tf.Tensor]]:
        inputs: list[tf.Tensor] = []

        def mark(value: Any, first: bool) -> Any:
            if first and not tf.is_tensor(value):
                value = tf.convert_to_tensor(value)
            if not tf.is_tensor(value):
                return value
            inputs.append(tf.convert_to_tensor(value))
            return Sharded(len(inputs) - 1)

        marked = tuple(mark(value, place == 0) for place, value in enumerate(args))
        named = {name: mark(value, False) for name, value in kwargs.items()}
        plain = len(marked) == len(inputs) and not named  # else constants are a part of the key
        key = (method, len(inputs) if plain else dumps((marked, named), "the arguments"))
        if key not in self._ways:
            plan = Plan(0, 0, method, b"", (True,) * len(inputs), 0)
            self._ways[key] = _Way(Method(plan, function, marked, named, True))
        return self._ways[key], inputs

    def _choose_for_graph(self, way: _Way, inputs: list[tf.Tensor]) -> compiled.Choice | None:
        """What draws in the place of the graph's inputs show; None if they cannot be had."""
        if not all(x.dtype.is_floating and x.shape[1:].is_fully_defined() for x in inputs):
            return None
        with tf.init_scope():
            draws = [
                tf.random.stateless_normal((2, *x.shape[1:].as_list()), (n, 0), dtype=x.dtype)
                for n, x in enumerate(inputs)
            ]
            try:
                return self._choose(way, draws)
            except Exception as error:  # the model's own, of draws that it does not take
                log.info("it is traced as it is, not compiled: on normal draws %r", error)
                return None

    def _choose(self, way: _Way, inputs: list[tf.Tensor]) -> compiled.Choice:
        """Compile, unless the call does more than compute; it leaves no trace in the model."""
        shipped = recipes.inspect(self.model, {})
        known = shipped.variables
        before = [variable.numpy() for variable in known]
        sources = global_states()
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(way.method(*inputs))
        changed = [
            variable
            for variable, value in zip(known, before, strict=True)
            if variable.numpy().tobytes() != value.tobytes()
        ]
        for variable, value in zip(known, before, strict=True):
            if any(variable is other for other in changed):
                variable.assign(value)
        reason = ""
        if changed:
            reason = f"the call changes its variable {changed[0].name!r}"
        elif shipped.draws or global_states() != sources:
            reason = "the model draws random numbers"
        elif not inputs or not all(map(tf.is_tensor, outputs)):
            reason = "it takes or returns NumPy arrays"
        if reason:
            return compiled.Choice("eager", reason, 0.0)
        others = [v for v in tape.watched_variables() if all(v is not x for x in known)]
        way.variables = [*known, *others]  # those of a closure too
        floating = [v for v in way.variables if v.dtype.is_floating or v.dtype.is_complex]
        original = dataclasses.replace(way.method, variables=floating)

        def use(function: Any, level: str) -> None:
            plan = dataclasses.replace(original.plan, level=level)
            way.method = dataclasses.replace(original, plan=plan)
            way.method.__dict__["compiled"] = function

        return compiled.choose(original, inputs, outputs, use)


def _on_tape(way: _Way, inputs: list[tf.Tensor]) -> Any:
    """The compiled call, of which a tape keeps the arguments and the variables' values alone.

    A tape over the compiled function itself would take hundreds of tensors out of it: making the
    forward pass again within the compiled vjp costs a third of that. In forward mode, in a graph
    and where the gradient is recorded again, all is TensorFlow's own.
    """
    method = way.method
    values = [variable.value() for variable in way.variables]
    if tapes.forward_mode([*inputs, *values]):
        return method.compiled(*inputs)
    with tapes.pause():
        result = method.compiled(*inputs)
    outputs = tf.nest.flatten(result)

    @tf.custom_gradient
    def made(*_: Any) -> Any:
        def pull_back(*cotangents: Any) -> list[Any]:
            given = [  # a gather's cotangent comes as IndexedSlices
                tf.convert_to_tensor(cotangent)
                for cotangent, output in zip(cotangents, outputs, strict=True)
                if differentiable(output)
            ]
            with _holding(way.variables, values):
                if tapes.recording() or not tf.executing_eagerly():
                    found = _vjp_on_tape(method, inputs, given)
                else:
                    found = method.compiled_vjp(*inputs, *given)
            gradients = iter(found)
            return [next(gradients) if differentiable(x) else None for x in (*inputs, *values)]

        return outputs, pull_back

    outputs = tf.nest.flatten(made(*inputs, *values))
    return tf.nest.pack_sequence_as(result, outputs)


def _vjp_on_tape(method: Method, inputs: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    """What the compiled vjp gives, such that tapes outside can differentiate it."""
    sources = [*(x for x in inputs if differentiable(x)), *method.variables]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        outputs = [x for x in tf.nest.flatten(method.compiled(*inputs)) if differentiable(x)]
    found: list[Any] = tape.gradient(outputs, sources, output_gradients=cotangents)
    return found


@contextlib.contextmanager
def _holding(variables: Sequence[tf.Variable], values: Sequence[tf.Tensor]) -> Iterator[None]:
    """Within this, the variables have these values: those of the call that is pulled back."""
    with tf.init_scope(), tapes.pause():
        changed = [
            (variable, value, now)
            for variable, value in zip(variables, values, strict=True)
            if (now := tapes.value(variable)).tobytes() != np.asarray(value).tobytes()
        ]
    if changed and not tf.executing_eagerly():
        raise GradientError(
            f"the variable {changed[0][0].name!r} has changed since the call whose gradient is "
            "taken in a graph (tape.jacobian?): expected it as it was. Take it before the update"
        )
    for variable, value, _ in changed:
        variable.assign(value)
    try:
        yield
    finally:
        for variable, _, later in changed:
            variable.assign(later)
