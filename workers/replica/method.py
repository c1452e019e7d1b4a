"""A model's method, called in one way: with which arguments, compiled to which level.

Owns how arrays become the arguments of a call, and what has been compiled for it. Knows nothing of
tiles or of what becomes of the outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from workers.compiling import compiled, rows
from workers.compiling.streams import Stream
from workers.compiling.together import together
from workers.engine import exported
from workers.engine.scope import called
from workers.exchange.protocol import Plan, filled
from workers.replica import functions, serialization
from workers.replica.kept import Keeping
from workers.tensors import differentiable, leaves, tensor_of

_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True, eq=False)
class Method:
    """A plan, ready to be called with rows.

    ``traced``: the Strawberry Fields engines that the call makes are traced ones. ``variables`` are
    those that gradients are for. ``stream`` is what the call has TensorFlow's global generator be.
    ``seen``: what its graph, as long as the model is the same, has shown of its rows.
    """

    plan: Plan
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    traced: bool
    variables: Sequence[tf.Variable] = ()
    stream: Stream | None = None
    seen: rows.Seen = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        """The call, at the level that the plan says."""
        return self._at_level(self, "compiled")

    @property
    def functions(self) -> dict[str, Any]:
        """What has been compiled so far."""
        return {name: f for name, f in self.__dict__.items() if name.startswith("compiled")}

    @functools.cached_property
    def compiled_vjp(self) -> Callable[..., Any]:
        """``vjp``, at the level that the plan says."""
        return self._at_level(self.vjp, "vjp")

    def vjp(self, *arguments: Any) -> Any:
        r"""(\*inputs, \*cotangents) -> gradients for inputs and variables, the call in it."""
        count = len(self.plan.as_tensor)
        inputs, cotangents = arguments[:count], arguments[count:]
        with tf.GradientTape() as tape:
            sources = self.sources(inputs)
            tape.watch(sources)
            tape.watch(self.variables)
            outputs = [x for x in tf.nest.flatten(self(*inputs)) if differentiable(x)]
        return tape.gradient(outputs, [*sources, *self.variables], output_gradients=cotangents)

    @functools.cached_property
    def compiled_second(self) -> Callable[[tuple[int, ...]], Callable[..., Any]]:
        r"""(\*inputs, \*cotangents, \*tangents) -> the vjp of the vjp, both calls in it.

        Made for the places of the gradients of ``compiled_vjp`` that ``tangents`` are cotangents
        of. Returned are gradients for inputs, variables and cotangents.
        """

        @functools.cache
        def made(places: tuple[int, ...]) -> Callable[..., Any]:
            def second(*arguments: Any) -> Any:
                count = len(self.plan.as_tensor)
                inputs, given = arguments[:count], arguments[count:]
                cotangents = given[: len(given) - len(places)]
                sources = [*self.sources(inputs), *self.variables]
                with exported.written_out(), tf.GradientTape() as outer:
                    outer.watch([*sources, *cotangents])
                    with tf.GradientTape() as inner:
                        inner.watch(sources)
                        outputs = [x for x in tf.nest.flatten(self(*inputs)) if differentiable(x)]
                    gradients = inner.gradient(
                        outputs,
                        [sources[n] for n in places],
                        output_gradients=cotangents,
                        unconnected_gradients=tf.UnconnectedGradients.ZERO,
                    )
                return outer.gradient(
                    gradients, [*sources, *cotangents], output_gradients=given[len(cotangents) :]
                )

            return self._at_level(second, f"second {places}")

        return made

    def both(self, given: tuple[int, ...], wanted: tuple[int, ...]) -> Callable[..., Any]:
        r"""(\*inputs, \*cotangents) -> the outputs, then gradients; ``given`` are the places of the
        outputs that the cotangents are for, ``wanted`` those of the variables."""

        def both(*arguments: Any) -> list[Any]:
            count = len(self.plan.as_tensor)
            inputs, cotangents = arguments[:count], arguments[count:]
            sources = [self.variables[n] for n in wanted]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                outputs = leaves(self(*inputs))
            gradients = tape.gradient(
                [outputs[n] for n in given],
                sources,
                output_gradients=cotangents,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            return [*outputs, *map(tf.convert_to_tensor, gradients)]

        return both

    @functools.cached_property
    def compiled_both(self) -> dict[Any, Callable[..., Any]]:
        """``both``, at the level that the plan says, by what it was made for."""
        return {}

    def compiled_both_of(
        self, given: tuple[int, ...], wanted: tuple[int, ...]
    ) -> Callable[..., Any]:
        key = given, wanted
        if key not in self.compiled_both:
            self.compiled_both[key] = self._at_level(self.both(*key), f"both {key}")
        return self.compiled_both[key]

    def _at_level(self, function: Callable[..., Any], of: str) -> Callable[..., Any]:
        return compiled.at_level(function, self.plan.level, self.program(of))

    def program(self, of: str) -> str:
        """What tells ``of``, compiled of this, from other programs: see ``compile_cache``."""
        name = getattr(self.call, "__qualname__", type(self.call).__qualname__)
        shapes = [tuple(variable.shape) for variable in self.variables]
        plan = self.plan
        told = name, plan.arguments, plan.twin, plan.form, shapes, of
        return repr(told)

    def anew(self) -> Method:
        """The method with nothing compiled."""
        plan = dataclasses.replace(self.plan, level="eager")
        return dataclasses.replace(self, plan=plan, seen={})

    def sources(self, inputs: Sequence[Any]) -> list[tf.Tensor]:
        """The inputs that a gradient may be for: not those that the model is given as ndarrays."""
        pairs = zip(inputs, self.plan.as_tensor, strict=True)
        return [x for x, as_tensor in pairs if as_tensor and differentiable(x)]

    def __call__(self, *inputs: Any) -> Any:
        if tf.executing_eagerly():
            return self._call(*inputs)
        form = self.plan.form
        if form.narrowed:
            pairs = zip(inputs, self.plan.as_tensor, strict=True)
            inputs = tuple(x if as_tensor else narrow(x) for x, as_tensor in pairs)
        if form.by_rows:
            found = rows.by_rows(self._call, form.by_rows, self.seen)(*inputs)
            return self.call.of_rows(found) if isinstance(self.call, Keeping) else found
        return (together(self._call) if form.together else self._call)(*inputs)

    def _call(self, *inputs: Any) -> Any:
        args = [filled(a, inputs) for a in self.args]
        kwargs = {name: filled(a, inputs) for name, a in self.kwargs.items()}
        of = getattr(self.call, "__self__", self.call)

        eager = tf.executing_eagerly()
        containers = () if eager else functions.containers(of, self.plan.method).values()

        def call(*args: Any, **kwargs: Any) -> Any:
            draws = _NOTHING if self.stream is None else self.stream.call()
            with draws, _NOTHING if eager else serialization.attributes_kept(of, containers):
                return self.call(*args, **kwargs)

        return called(call, args, kwargs, self.traced, of=of)


def as_the_model_wants(plan: Plan, arrays: list[np.ndarray]) -> list[Any]:
    """Copies, either way: a model may keep what it is given."""
    return [
        tensor_of(array) if as_tensor else array.copy()
        for array, as_tensor in zip(arrays, plan.as_tensor, strict=True)
    ]


def as_tensors(inputs: Sequence[Any]) -> list[tf.Tensor]:
    """What a compiled call takes: tensors, of ndarrays too."""
    return [x if isinstance(x, tf.Tensor) else tensor_of(x) for x in inputs]


def narrow(value: tf.Tensor) -> tf.Tensor:
    """In single precision, if it was in double."""
    singles = {tf.float64: tf.float32, tf.complex128: tf.complex64}
    return tf.cast(value, singles.get(value.dtype, value.dtype))
