"""``cpu_batch``: the compiled engine in this process, the whole batch at once, without a pool.

Owns what has been compiled for each way the model is called. Arguments that are tensors are inputs
of the compiled function; all others are constants of it, known by content.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from qpool.executors.base import Executor, Options
from qpool.shipping import dumps
from workers import compiled, recipes
from workers.draws import global_states
from workers.engine import traced_engines
from workers.errors import ConfigurationError
from workers.method import Method
from workers.protocol import Plan, Sharded


@dataclasses.dataclass
class _Way:
    """One way of calling one method."""

    method: Method
    choice: compiled.Choice | None = None


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
        if not tf.executing_eagerly():  # the graph around it is compiled, or not, as it is
            return way.method(*inputs)
        if way.choice is None:
            way.choice = self._choose(way, inputs)
        with self._counted(args):
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
        key = (method, dumps((marked, named), "the arguments"))
        if key not in self._ways:
            plan = Plan(0, 0, method, key[1], (True,) * len(inputs), 0)
            self._ways[key] = _Way(Method(plan, function, marked, named, True))
        return self._ways[key], inputs

    def _choose(self, way: _Way, inputs: list[tf.Tensor]) -> compiled.Choice:
        """Compile, unless the call does more than compute; it leaves no trace in the model."""
        shipped = recipes.inspect(self.model, {})
        before = [variable.numpy() for variable in shipped.variables]
        sources = global_states()
        outputs = tf.nest.flatten(way.method(*inputs))
        changed = [
            variable
            for variable, value in zip(shipped.variables, before, strict=True)
            if variable.numpy().tobytes() != value.tobytes()
        ]
        for variable, value in zip(shipped.variables, before, strict=True):
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
        original = way.method

        def use(function: Any, level: str) -> None:
            plan = dataclasses.replace(original.plan, level=level)
            way.method = dataclasses.replace(original, plan=plan)
            way.method.__dict__["compiled"] = function

        return compiled.choose(original, inputs, outputs, use)
