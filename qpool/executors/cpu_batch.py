"""``cpu_batch``: the compiled engine in this process, the whole batch at once, without a pool.

Owns what has been compiled for each way the model is called. Arguments that are tensors are inputs
of the compiled function; all others are constants of it, known by content.

Where a tape is outside of the compiled function, gradients are checkpointed (``workers.circuit``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from qpool.executors.base import Executor, Options, argument_names
from qpool.shipping import dumps
from workers import affinity, circuit, compiled, recipes, survey
from workers.draws import global_states
from workers.errors import ConfigurationError, ModelError
from workers.matrices import within_xla
from workers.method import Method
from workers.protocol import Plan, Sharded
from workers.scope import traced_engines

log = logging.getLogger("qpool")

#: Operations that do more than compute, or whose checks XLA drops. Reads of variables, and draws
#: from a seed that is an argument, are none of them.
_EFFECTS = re.compile(
    r"Assign|Resource(?!Gather)|Random|Multinomial|(Parameterized)?TruncatedNormal"
    r"|Stateful(?!PartitionedCall)|(Eager)?PyFunc|Assert|CheckNumerics|Print"
)


@dataclasses.dataclass
class _Way:
    """One way of calling one method. ``sharded``: which of its inputs have a row a sample."""

    method: Method
    sharded: tuple[bool, ...]
    choice: compiled.Choice | None = None


class CpuBatchExecutor(Executor):
    """Calls the model here, with Strawberry Fields' engines traced and the call compiled.

    Gradients are TensorFlow's own, of any order. A model that changes variables, draws, or has
    TensorFlow check numbers is not compiled, and neither is a call with an ndarray or a container
    for its first argument (the model would find a tensor in its place).

    From now on this process keeps the memory that it frees (``workers.affinity.keep_memory``).
    """

    def __init__(self, model: Any, options: Options) -> None:
        super().__init__(model, options)
        if options.engine != "traced":
            raise ConfigurationError(
                f"strategy='cpu_batch' is the compiled engine; engine={options.engine!r} rules it "
                "out. Use strategy='sequential' for Strawberry Fields as it is"
            )
        affinity.keep_memory()
        self._ways: dict[Any, _Way] = {}

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = self.model if method == "__call__" else getattr(self.model, method)
        if within_xla() or _is_for_the_model_alone(args, kwargs):
            return _as_it_is(function, args, kwargs)
        way, inputs = self._way(method, function, args, kwargs)
        if way.choice is None:
            if tf.executing_eagerly():
                before = _State(self.model)
                with circuit.untraced(), circuit.tally() as run:
                    result = _as_it_is(function, args, kwargs)
                way.choice = self._choose(way, inputs, result, before, run.runs)
                return result
            way.choice = self._choose_by_draws(way, inputs)
        with self._counted(args) if tf.executing_eagerly() else contextlib.nullcontext():
            if way.choice is None or way.choice.level == "eager":
                return _as_it_is(function, args, kwargs)
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
        sharded: list[bool] = []

        def mark(value: Any, name: str, first: bool) -> Any:
            if first and not tf.is_tensor(value):
                value = tf.convert_to_tensor(value)
            if not tf.is_tensor(value):
                return value
            inputs.append(tf.convert_to_tensor(value))
            sharded.append(first or name in self.options.sharded)
            return Sharded(len(inputs) - 1)

        names = argument_names(self.model, method) if len(args) > 1 else ()
        marked = tuple(
            mark(value, names[place] if place < len(names) else "", place == 0)
            for place, value in enumerate(args)
        )
        named = {
            name: mark(value, name, not args and place == 0)
            for place, (name, value) in enumerate(kwargs.items())
        }
        key = (
            method,
            (marked, named) == ((Sharded(0),), {}) or dumps((marked, named), "arguments"),
        )
        if key not in self._ways:
            if key[1] is not True:  # constants as they are now, whatever becomes of the caller's
                marked, named = pickle.loads(key[1])
            plan = Plan(0, 0, method, b"", (True,) * len(inputs), 0)
            self._ways[key] = _Way(Method(plan, function, marked, named, True), tuple(sharded))
        return self._ways[key], inputs

    def _choose_by_draws(self, way: _Way, inputs: list[tf.Tensor]) -> compiled.Choice | None:
        """What draws in the place of a graph's inputs show; None if they cannot be had."""
        if not all(x.dtype.is_floating and x.shape[1:].is_fully_defined() for x in inputs):
            return None
        with tf.init_scope():
            draws = [
                tf.random.stateless_normal((2, *x.shape[1:].as_list()), (n, 0), dtype=x.dtype)
                for n, x in enumerate(inputs)
            ]
            before = _State(self.model)
            try:
                with circuit.untraced(), circuit.tally() as run:
                    found = way.method(*draws)
                return self._choose(way, draws, found, before, run.runs)
            except Exception as error:  # the model's own, of draws that it does not take
                log.info("it is traced as it is, not compiled: on normal draws %r", error)
                return None
            finally:
                before.put_back()

    def _choose(
        self, way: _Way, inputs: list[tf.Tensor], result: Any, before: _State, circuits: int
    ) -> compiled.Choice:
        """Compile, unless the call that gave ``result`` did more than compute."""
        outputs = tf.nest.flatten(result)
        reason = before.what_changed()
        if not reason and not (inputs and all(map(tf.is_tensor, outputs))):
            reason = "it takes or returns NumPy arrays"
        if reason:
            return compiled.Choice("eager", reason, 0.0)
        original = way.method
        choice = None
        rows = int(inputs[0].shape[0]) if inputs[0].shape.rank else 0
        looped = rows > 1 and survey.loops((rows, circuits), (rows, circuits))
        for by_rows in [way.sharded] * looped + [()]:
            plan = dataclasses.replace(original.plan, by_rows=by_rows)
            trial = dataclasses.replace(original, plan=plan)

            def use(function: Any, level: str, trial: Method = trial) -> None:
                plan = dataclasses.replace(trial.plan, level=level)
                way.method = dataclasses.replace(trial, plan=plan)
                way.method.__dict__["compiled"] = function

            choice = compiled.choose(_computing(trial), inputs, outputs, use)
            if choice.level != "eager":
                break
        assert choice is not None
        return choice


def _computing(method: Method) -> Callable[..., Any]:
    """The call, for a tape that is outside of what is compiled; it must do no more than compute."""

    def call(*inputs: tf.Tensor) -> Any:
        with circuit.checkpointing():
            found = method(*inputs)
        if not tf.executing_eagerly():
            definition = tf.compat.v1.get_default_graph().as_graph_def()
            inner = (node for function in definition.library.function for node in function.node_def)
            effects = {n.op for n in (*definition.node, *inner) if _EFFECTS.match(n.op)}
            if effects:
                raise ModelError(f"it does more than compute: {', '.join(sorted(effects))}")
        return found

    return call


class _State:
    """What a call may change in a model, and in what it draws from."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._shipped = recipes.inspect(model, {})
        self._values = [variable.numpy() for variable in self._shipped.variables]
        self._sources = global_states()

    def what_changed(self) -> str:
        """Why the call did more than compute; empty if it did not."""
        for variable, value in zip(self._shipped.variables, self._values, strict=True):
            if not _same(variable.numpy(), value):
                return f"the call changes its variable {variable.name!r}"
        if self._shipped.draws or global_states() != self._sources:
            return "the model draws random numbers"
        weights = getattr(self._model, "trainable_weights", ())
        regularised = sum(getattr(v, "regularizer", None) is not None for v in weights)
        if survey.losses(self._model) > regularised:
            return "the call adds losses"
        return ""

    def put_back(self) -> None:
        """Give the variables that were changed their values again."""
        for variable, value in zip(self._shipped.variables, self._values, strict=True):
            if not _same(variable.numpy(), value):
                variable.assign(value)


def _same(a: Any, b: Any) -> bool:
    """To the bit; of strings, which are objects, by value."""
    a, b = np.asarray(a), np.asarray(b)
    return bool(np.array_equal(a, b)) if a.dtype == object else a.tobytes() == b.tobytes()


def _as_it_is(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called with what is around it, compiled or not."""
    with traced_engines():
        return function(*args, **kwargs)


def _is_for_the_model_alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a compiled call would be given something else than the model is: a tensor for an
    array, a constant for what a tape may be watching."""
    if args and isinstance(args[0], np.ndarray | list | tuple | dict):
        return True
    parts = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, list | tuple | dict)]
    return any(tf.is_tensor(leaf) for leaf in tf.nest.flatten(parts))
