"""A model's method, called in one way: with which arguments, compiled to which level.

Owns how arrays become the arguments of a call, and what has been compiled for it. Knows nothing of
tiles or of what becomes of the outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from workers import compiled
from workers.engine import traced_engines
from workers.protocol import Plan, Sharded


@dataclass(frozen=True, eq=False)
class Method:
    """A plan, ready to be called with rows.

    ``traced``: the Strawberry Fields engines that the call makes are traced ones.
    """

    plan: Plan
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    traced: bool

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        """The call, at the level that the plan says."""
        return compiled.at_level(self, self.plan.level)

    @property
    def functions(self) -> dict[str, Any]:
        """What has been compiled so far."""
        return {name: f for name, f in self.__dict__.items() if name.startswith("compiled")}

    @functools.cached_property
    def compiled_vjp(self) -> Callable[..., Any]:
        """(inputs, sources that are variables, cotangents) -> gradients, the call in it."""

        def vjp(inputs: list[Any], variables: Sequence[tf.Variable], cotangents: list[Any]) -> Any:
            with tf.GradientTape() as tape:
                sources = [x for x in inputs if differentiable(x)]
                tape.watch(sources)
                tape.watch(variables)
                outputs = [x for x in tf.nest.flatten(self(*inputs)) if differentiable(x)]
            return tape.gradient(outputs, [*sources, *variables], output_gradients=cotangents)

        return compiled.at_level(vjp, self.plan.level)

    def __call__(self, *inputs: Any) -> Any:
        args = [inputs[a.index] if isinstance(a, Sharded) else a for a in self.args]
        kwargs = {
            name: inputs[a.index] if isinstance(a, Sharded) else a
            for name, a in self.kwargs.items()
        }
        with traced_engines(self.traced):
            return self.call(*args, **kwargs)


def as_the_model_wants(plan: Plan, arrays: list[np.ndarray]) -> list[Any]:
    """Copies, either way: a model may keep what it is given."""
    return [
        tf.constant(array) if as_tensor else array.copy()
        for array, as_tensor in zip(arrays, plan.as_tensor, strict=True)
    ]


def differentiable(value: Any) -> bool:
    return isinstance(value, tf.Tensor) and (value.dtype.is_floating or value.dtype.is_complex)
