"""The bridge between TensorFlow's autodiff and the pool: a ``tf.custom_gradient``.

    FORWARD   inputs, weights         --> workers --> outputs        (they keep their tapes)
    BACKWARD  cotangents              --> workers --> vjp, reassembled in tile order
    SECOND    cotangents of that vjp  --> workers --> its own vjp
    THIRD     cotangents of that one  --> this process (``third_order``)

Only this package knows both tapes and the pool. Weights enter as explicit inputs, so whatever
watches the model's variables sees them used; gradients leave in the same order.

What cannot be differentiated again (a model that workers run eagerly; anything a fourth time) is
refused: a pulled-back cotangent is a number by the time it is here, and treating it as a constant
would be wrong without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import tensorflow as tf

from qpool.batches import Operands
from qpool.bridge import symbolic, tapes, third_order
from qpool.bridge.arguments import Arguments, is_eager
from qpool.bridge.exchanges import Exchanges
from qpool.bridge.variables import TapedReader
from workers.custom_gradient import custom_gradient
from workers.errors import InputError, SecondOrderGradientError
from workers.exchange.protocol import Kind
from workers.layout import ArraySpec
from workers.replica import serialization
from workers.tensors import asked_for, beside, mapped, tensor_of

if TYPE_CHECKING:
    from qpool.executors.remote import KnownPlan, RemoteModel


class Bridge:
    """Differentiable calls of one remote model."""

    def __init__(
        self,
        model: Any,
        remote: RemoteModel,
        sharded: Sequence[str],
        in_place: Callable[..., Any] | None = None,
    ) -> None:
        """``in_place(method, args, kwargs)`` computes a call in this process, for third
        derivatives."""
        self._in_place = in_place
        self._model = model
        self._remote = remote
        self._arguments = Arguments(model, sharded)
        self._weights = TapedReader(remote.variables)
        self._functions: dict[Any, Callable[..., Any]] = {}

    def close(self) -> None:
        """Have workers forget the model."""
        self._remote.close()

    # -- calls -----------------------------------------------------------------------------

    def call(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: Sequence[Any] | None = None,
    ) -> Any:
        """Call a pooled method; what it returns is differentiable, thrice where it is compiled.

        ``weights`` are tensors to take in the place of the model's variables.
        """
        arguments, inputs, as_tensor = self._arguments.split(method, args, kwargs)
        if tf.executing_eagerly() and all(is_eager(x) for x in inputs):
            arrays = [np.asarray(x) for x in inputs]
            self._arguments.check(method, arrays)
            recording = tapes.recording()

            def values() -> list[np.ndarray]:
                return self._weights() if weights is None else [np.asarray(w) for w in weights]

            plan = self._remote.plan(
                method, arguments, as_tensor, arrays, values, gradient=recording
            )
            if not recording:
                operands = Operands(arrays, values())
                result = self._remote.compute(plan, Kind.FORWARD, operands, copy=tensor_of)
                return self._pack(plan, result.outputs)
        else:
            plan = self._plan_of_graph(method, arguments, as_tensor, inputs)
        tensors = [tf.convert_to_tensor(x) for x in inputs]
        if weights is not None:
            variables = [tf.convert_to_tensor(w) for w in weights]
        elif tf.executing_eagerly():
            variables = self._weights.tensors()
        else:
            variables = [v.value() for v in self._remote.variables]
        outputs = self._function(plan, len(inputs))(*tensors, *variables)
        return self._pack(plan, outputs)

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        """One (batch, *variable.shape) tensor for each trainable variable."""
        if not tf.executing_eagerly():
            raise InputError("per_sample_gradients works eagerly only; call it outside tf.function")
        method = "__call__" if callable(self._model) else "generate"
        arguments, inputs, as_tensor = self._arguments.split(method, (z,), {})
        arrays = [np.asarray(x) for x in inputs]
        self._arguments.check(method, arrays)
        weights = self._weights()
        plan = self._remote.plan(
            method, arguments, as_tensor, arrays, lambda: weights, gradient=True
        )
        batch = len(arrays[0])
        seeds = [
            self._cotangent(spec, batch, seed)
            for spec, seed in zip(plan.outputs, beside(plan.structure, cotangent), strict=True)
        ]
        call = self._remote.pool.new_call()
        connected = plan.sources
        found = self._remote.compute(
            plan,
            Kind.BACKWARD,
            Operands(arrays, weights, seeds),
            call=call,
            wanted=connected,
            per_sample=True,
        ).gradients
        by_source: dict[int | None, Any] = dict(zip(connected, found, strict=True))
        gradients = []
        sources = self._trainable_sources(len(inputs))
        variables = serialization.trainable_variables(self._model)
        for variable, source in zip(variables, sources, strict=True):
            gradient = by_source.get(source)
            gradients.append(
                tf.zeros((batch, *variable.shape), variable.dtype)
                if gradient is None
                else tensor_of(gradient)
            )

        @custom_gradient
        def once(*_: Any) -> tuple[list[Any], Callable[..., Any]]:
            return gradients, _refuse("the gradients of single samples have no derivative here")

        depends_on = [z, *self._remote.variables, *beside(plan.structure, cotangent)]
        return list(once(*(tf.convert_to_tensor(x) for x in depends_on)))

    @property
    def remote(self) -> RemoteModel:
        """The model in the pool."""
        return self._remote

    def _trainable_sources(self, inputs: int) -> list[int | None]:
        """For each trainable variable its number as a source; None for one without gradients."""
        places = {
            id(self._remote.variables[v]): inputs + n
            for n, v in enumerate(self._remote.differentiable)
        }
        return [places.get(id(v)) for v in serialization.trainable_variables(self._model)]

    # -- plans -----------------------------------------------------------------------------

    def _plan_of_graph(
        self,
        method: str,
        arguments: bytes,
        as_tensor: tuple[bool, ...],
        inputs: Sequence[Any],
        wanted: tuple[int, ...] = (),
    ) -> KnownPlan:
        """The plan for symbolic inputs: known from an earlier call, or probed with stand-ins."""
        specs = symbolic.specs(inputs)
        if len(specs) == 1:
            self._arguments.check_width(method, (None, *specs[0].shape))
        plan = self._remote.find(method, arguments, as_tensor, tuple(specs))
        if plan is not None and plan.connected is not None:
            return plan
        with tf.init_scope():  # out of the graph: variables have values there
            for positive in (False, True):
                stand_ins = symbolic.stand_ins(inputs, specs, positive=positive)
                try:
                    return self._remote.plan(
                        method,
                        arguments,
                        as_tensor,
                        stand_ins,
                        self._weights,
                        gradient=True,
                        wanted=wanted,
                    )
                except Exception:  # the model's own, of a stand-in that it does not take
                    if positive:
                        raise
        raise AssertionError("unreachable")

    def _pack(self, plan: KnownPlan, outputs: Sequence[Any]) -> Any:
        if tf.executing_eagerly():
            outputs = [
                x if tensor else x.numpy() for x, tensor in zip(outputs, plan.tensors, strict=True)
            ]
        if plan.structure == 0:  # the only output, by itself
            return outputs[0]
        if plan.flat:
            return type(plan.structure)(outputs)
        return mapped(lambda index: outputs[index], plan.structure)

    # -- the custom gradient ---------------------------------------------------------------

    def _function(self, plan: KnownPlan, inputs: int) -> Callable[..., Any]:
        """The differentiable function of a plan, built once: (inputs, weights) -> outputs."""
        if plan.number not in self._functions:
            self._functions[plan.number] = self._build(plan, inputs)
        return self._functions[plan.number]

    def _build(self, plan: KnownPlan, inputs: int) -> Callable[..., Any]:
        check = functools.partial(self._arguments.check, "")
        exchanges = Exchanges(self._remote, plan, inputs, check)

        @custom_gradient
        def pooled_call(*tensors: Any) -> tuple[list[Any], Callable[..., Any]]:
            sources = plan.sources
            if plan.level == "eager" and tf.executing_eagerly():  # a compiled vjp gives all anyway
                sources = [n for n in sources if n >= inputs or tapes.watched([tensors[n]])]
            outputs, ticket = exchanges.forward(tensors)

            def pull_back(*cotangents: Any) -> list[Any]:
                given = [  # a gather's cotangent comes as IndexedSlices
                    tf.convert_to_tensor(c)
                    for c, spec in zip(cotangents, plan.outputs, strict=True)
                    if spec.is_float
                ]
                found = pooled_vjp(ticket, sources, *tensors, *given)
                of_source = dict(zip(sources, found, strict=True))
                if plan.leads and tf.executing_eagerly():
                    reached = plan.reached(asked_for(cotangents))
                    of_source = {n: x for n, x in of_source.items() if n in reached}
                if plan.level == "eager" and tf.executing_eagerly():
                    of_source = {n: x for n, x in of_source.items() if plan.connects(n, x)}
                return [None if n is None else of_source.get(n) for n in exchanges.places]

            return outputs, pull_back

        def pooled_vjp(ticket: Any, wanted: list[int], *arguments: Any) -> list[Any]:
            @custom_gradient
            def vjp(*arguments: Any) -> tuple[list[Any], Callable[..., Any]]:
                def pull_back_again(*tangents: Any) -> list[Any]:
                    if plan.level == "eager":
                        _refuse(_EAGER_ONLY.format(plan.reason))()
                    dense = [tf.convert_to_tensor(tangent) for tangent in tangents]
                    return self._second(plan, exchanges, ticket, arguments, dense)

                return exchanges.backward(ticket, wanted, arguments), pull_back_again

            if not wanted:
                return []
            if tf.executing_eagerly() and not tapes.recording():  # nobody differentiates it again
                return exchanges.backward(ticket, wanted, arguments)
            found = vjp(*arguments)
            return list(found) if isinstance(found, list | tuple) else [found]

        return pooled_call

    def _second(
        self,
        plan: KnownPlan,
        exchanges: Exchanges,
        ticket: Any,
        arguments: Sequence[Any],
        tangents: Sequence[Any],
    ) -> list[Any]:
        """Gradients for the vjp's arguments (inputs, weights, cotangents), from its results'."""
        places, wanted = exchanges.places, plan.sources

        @custom_gradient
        def pooled_second(*tensors: Any) -> tuple[list[Any], Callable[..., Any]]:
            given = tensors[: len(arguments)], tensors[len(arguments) :]
            found = exchanges.second(ticket, *given)
            return found, lambda *given: self._third(plan, places, tensors, found, given)

        found = pooled_second(*arguments, *tangents)
        of_source = dict(zip(wanted, found, strict=False))
        of_arguments = [None if n is None else of_source.get(n) for n in places]
        return [*of_arguments, *found[len(wanted) :]]

    def _third(
        self,
        plan: KnownPlan,
        places: Sequence[int | None],
        tensors: Sequence[Any],
        second: Sequence[Any],
        given: Sequence[Any],
    ) -> list[Any]:
        """Gradients for all that the ``second`` derivative is of, from its results'."""
        in_place, wanted = self._in_place, plan.sources
        end = len(places)
        inputs = end - len(self._remote.variables)
        if in_place is None or plan.draws or not all(plan.as_tensor[1:inputs]):
            _refuse(
                "there is no third one of a qpool.Engine (workers.engine.TracedEngine has it), of "
                "a model that draws, or of one that is given further batches as ndarrays"
            )()
        # One object may be an input and a cotangent; of each there is a derivative of its own.
        tensors = [tf.identity(x) for x in tensors]
        given = [tf.convert_to_tensor(x) for x in given]
        args, kwargs = self._arguments.joined(plan.arguments, plan.as_tensor, tensors[:inputs])
        third_order.check_weights(tensors[inputs:end], self._remote.variables)
        variables = [self._remote.variables[n] for n in self._remote.differentiable]
        every = [*tensors[:inputs], *variables]

        computed = third_order.pulled_back(
            lambda: in_place(plan.method, args, kwargs),
            [every[n] for n in wanted],
            tensors[end : len(tensors) - len(wanted)],
            tensors[len(tensors) - len(wanted) :],
            given,
            second,
        )

        @custom_gradient
        def third(*_: Any) -> tuple[list[Any], Callable[..., Any]]:
            return computed, _refuse("there are a first, a second and a third one, and no fourth")

        found = third(*tensors, *given)
        of_source = dict(zip(wanted, found, strict=False))
        return [*(None if n is None else of_source.get(n) for n in places), *found[len(wanted) :]]

    @staticmethod
    def _cotangent(spec: ArraySpec, batch: int, seed: Any) -> np.ndarray | None:
        if not spec.is_float:
            return None
        array = np.asarray(seed, spec.dtype)
        if array.shape != (batch, *spec.shape):
            raise InputError(
                f"a cotangent has the shape of its output: expected {(batch, *spec.shape)}, "
                f"came {array.shape}"
            )
        return array


#: Why a model that is not compiled has no second derivative here.
_EAGER_ONLY = (
    "workers run this model eagerly ({}), with gates of Strawberry Fields whose second derivative "
    "is lost without a word"
)


def _refuse(why: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any) -> NoReturn:
        raise SecondOrderGradientError(
            "a derivative of a derivative was asked of the pool (a gradient penalty, a Hessian, "
            f"or an outer tape around tape.gradient), and cannot be had: {why}. Use "
            "strategy='cpu_batch' or 'sequential' for this call, or take the penalty on a part "
            "that is not pooled; or the inner derivatives, with tapes of its own, within the "
            "pooled method"
        )

    return refuse
