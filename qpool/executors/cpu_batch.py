"""``cpu_batch``: the compiled engine in this process, the whole batch at once, without a pool.

Owns what has been compiled for each way the model is called. Arguments that are tensors are inputs
of the compiled function; all others are constants of it, known by content.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record

from qpool.executors.base import Executor, Options
from qpool.shipping import dumps
from workers import compiled, recipes
from workers.errors import ConfigurationError
from workers.method import Method, differentiable
from workers.protocol import Plan, Sharded


@dataclasses.dataclass
class _Way:
    """One way of calling one method."""

    method: Method
    choice: compiled.Choice | None = None


class CpuBatchExecutor(Executor):
    """Calls the model here, with Strawberry Fields' engines traced and the call compiled.

    Gradients are TensorFlow's own, of any order.
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
        way, inputs = self._way(method, args, kwargs)
        if not tf.executing_eagerly():  # the graph around it is compiled, or not, as it is
            return way.method(*inputs)
        if way.choice is None:
            self._choose(way, inputs)
        return _differentiable_call(way.method, inputs, recipes.trainable_variables(self.model))

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        method = "__call__" if callable(self.model) else "generate"
        variables = recipes.trainable_variables(self.model)
        way, (z,) = self._way(method, (z,), {})
        seeds = [tf.convert_to_tensor(seed) for seed in tf.nest.flatten(cotangent)]
        rows = []
        if way.choice is None:
            self._choose(way, [z])
        for n in range(len(z)):
            row = [z[n : n + 1]]
            found = way.method.compiled_vjp(row, variables, [s[n : n + 1] for s in seeds])
            rows.append(found[-len(variables) :])
        return [
            tf.stack([tf.zeros_like(v) if g is None else tf.convert_to_tensor(g) for g in column])
            for v, column in zip(variables, zip(*rows, strict=True), strict=True)
        ]

    def stats(self) -> dict[str, Any]:
        choices = [way.choice for way in self._ways.values() if way.choice]
        return {
            "strategy": "cpu_batch",
            "compiled": [
                {"level": c.level, "why_not_better": c.reason, "seconds": c.seconds}
                for c in choices
            ],
        }

    def _way(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Way, list[tf.Tensor]]:
        inputs: list[tf.Tensor] = []

        def mark(value: Any, first: bool) -> Any:
            if first and not tf.is_tensor(value) and not isinstance(value, np.ndarray):
                value = tf.convert_to_tensor(value)
            if not tf.is_tensor(value):
                return value
            inputs.append(tf.convert_to_tensor(value))
            return Sharded(len(inputs) - 1)

        marked = tuple(mark(value, place == 0) for place, value in enumerate(args))
        named = {name: mark(value, False) for name, value in kwargs.items()}
        key = (method, dumps((marked, named), "the arguments"))
        if key not in self._ways:
            function = self.model if method == "__call__" else getattr(self.model, method)
            plan = Plan(0, 0, method, key[1], (True,) * len(inputs), 0)
            self._ways[key] = _Way(Method(plan, function, marked, named, True))
        return self._ways[key], inputs

    @staticmethod
    def _choose(way: _Way, inputs: list[tf.Tensor]) -> None:
        outputs = tf.nest.flatten(way.method(*inputs))
        if not inputs or not all(map(tf.is_tensor, outputs)):
            way.choice = compiled.Choice("eager", "it takes or returns NumPy arrays", 0.0)
            return
        before = way.method

        def use(function: Any, level: str) -> None:
            way.method = dataclasses.replace(
                before, plan=dataclasses.replace(before.plan, level=level)
            )
            way.method.__dict__["compiled"] = function

        way.choice = compiled.choose(before, inputs, outputs, use)
        if way.choice.level == "eager":
            way.method = before


def _differentiable_call(
    method: Method, inputs: list[tf.Tensor], variables: list[tf.Variable]
) -> Any:
    """The compiled call, with a backward pass that makes it again.

    That costs less than a tape over a compiled function; see ``Replica._vjp``.
    """
    if method.plan.level == "eager":
        return method.compiled(*inputs)
    with record.stop_recording():  # the backward pass is the one below
        outputs = method.compiled(*inputs)
    flat = tf.nest.flatten(outputs)

    @tf.custom_gradient
    def connect(*tensors: tf.Tensor) -> Any:
        def pull_back(*cotangents: tf.Tensor) -> Any:
            seeds = [c for c, x in zip(cotangents, flat, strict=True) if differentiable(x)]
            found = iter(method.compiled_vjp(list(inputs), variables, seeds))
            return [next(found) if differentiable(x) else None for x in tensors]

        return flat, pull_back

    connected = connect(*inputs, *map(tf.convert_to_tensor, variables))
    return tf.nest.pack_sequence_as(outputs, tf.nest.flatten(connected))
