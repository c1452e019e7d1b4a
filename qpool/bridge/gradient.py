"""The bridge between TensorFlow's autodiff and the pool: a ``tf.custom_gradient``.

    FORWARD   inputs, weights         --> workers --> outputs        (they keep their tapes)
    BACKWARD  cotangents              --> workers --> vjp, reassembled in tile order
    SECOND    cotangents of that vjp  --> workers --> its own vjp
    THIRD     cotangents of that one  --> this process (``third_order``)

Only this and ``losses`` know both tapes and the pool. Weights enter as explicit inputs, so whatever
watches the model's variables sees them used; gradients leave in the same order. In a graph both
directions are a ``tf.numpy_function``.

What cannot be differentiated again (a model that workers run eagerly; anything a fourth time) is
refused: a pulled-back cotangent is a number by the time it is here, and treating it as a constant
would be wrong without a word.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import tensorflow as tf

from qpool.bridge import symbolic, tapes, third_order
from qpool.bridge.arguments import Arguments, is_eager
from qpool.bridge.variables import Reader
from qpool.executors.worker_pool import Operands
from workers.custom_gradient import custom_gradient
from workers.errors import InputError, SecondOrderGradientError
from workers.exchange.protocol import Kind
from workers.layout import ArraySpec
from workers.replica import serialization
from workers.tensors import beside, mapped, tensor_of, tensors_of

if TYPE_CHECKING:
    from qpool.executors.remote import Plan, RemoteModel

#: Graph calls whose workers are remembered for their backward pass; older ones are recomputed.
_REMEMBERED_CALLS = 64


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
        self._weights = Reader(remote.variables)
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._assignment: OrderedDict[int, dict[int, tuple[int, ...]]] = OrderedDict()

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
    ) -> Plan:
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

    def _pack(self, plan: Plan, outputs: Sequence[Any]) -> Any:
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

    def _function(self, plan: Plan, inputs: int) -> Callable[..., Any]:
        """The differentiable function of a plan, built once: (inputs, weights) -> outputs."""
        if plan.number not in self._functions:
            self._functions[plan.number] = self._build(plan, inputs)
        return self._functions[plan.number]

    def _build(self, plan: Plan, inputs: int) -> Callable[..., Any]:
        @custom_gradient
        def pooled_call(*tensors: Any) -> tuple[list[Any], Callable[..., Any]]:
            sources = plan.sources
            if plan.level == "eager" and tf.executing_eagerly():  # a compiled vjp gives all anyway
                sources = [n for n in sources if n >= inputs or tapes.watched([tensors[n]])]
            if tf.executing_eagerly():
                outputs, ticket = self._forward_eagerly(plan, inputs, tensors)
            else:
                outputs, ticket = self._forward_in_graph(plan, inputs, tensors)

            def pull_back(*cotangents: Any) -> list[Any]:
                given = [  # a gather's cotangent comes as IndexedSlices
                    tf.convert_to_tensor(c)
                    for c, spec in zip(cotangents, plan.outputs, strict=True)
                    if _is_float(spec)
                ]
                found = pooled_vjp(ticket, sources, *tensors, *given)
                of_source = dict(zip(sources, found, strict=True))
                if plan.level == "eager" and tf.executing_eagerly():
                    of_source = {n: x for n, x in of_source.items() if plan.connects(n, x)}
                return [None if n is None else of_source.get(n) for n in self._sources(inputs)]

            return outputs, pull_back

        def pooled_vjp(ticket: Any, wanted: list[int], *arguments: Any) -> list[Any]:
            @custom_gradient
            def vjp(*arguments: Any) -> tuple[list[Any], Callable[..., Any]]:
                if tf.executing_eagerly():
                    found = self._backward_eagerly(plan, inputs, ticket, wanted, arguments)
                else:
                    found = self._backward_in_graph(plan, inputs, ticket, wanted, arguments)

                def pull_back_again(*tangents: Any) -> list[Any]:
                    if plan.level == "eager":
                        _refuse(_EAGER_ONLY.format(plan.reason))()
                    dense = [tf.convert_to_tensor(tangent) for tangent in tangents]
                    return self._second(plan, inputs, ticket, arguments, dense)

                return found, pull_back_again

            if not wanted:
                return []
            if (
                tf.executing_eagerly() and not tapes.recording()
            ):  # nobody will differentiate this again
                return self._backward_eagerly(plan, inputs, ticket, wanted, arguments)
            found = vjp(*arguments)
            return list(found) if isinstance(found, list | tuple) else [found]

        return pooled_call

    def _sources(self, inputs: int) -> list[int | None]:
        """For each argument of the function, its number as a source; None for a constant."""
        place = {index: n for n, index in enumerate(self._remote.differentiable)}
        weights = [
            None if index not in place else inputs + place[index]
            for index in range(len(self._remote.variables))
        ]
        return [*range(inputs), *weights]

    def _forward_eagerly(
        self, plan: Plan, inputs: int, tensors: Sequence[Any]
    ) -> tuple[list[Any], _Ticket]:
        arrays = [np.asarray(x) for x in tensors]
        operands = Operands(arrays[:inputs], arrays[inputs:])
        result = self._remote.compute(plan, Kind.FORWARD_KEEPING, operands, copy=tensor_of)
        return result.outputs, _Ticket(self._remote, result.call, result.assignment)

    def _backward_eagerly(
        self,
        plan: Plan,
        inputs: int,
        ticket: _Ticket,
        wanted: list[int],
        arguments: Sequence[Any],
    ) -> list[Any]:
        arrays = [np.asarray(x) for x in arguments]
        found = self._pull_back(plan, inputs, ticket.call, ticket.assignment, arrays, wanted=wanted)
        return tensors_of(found)

    def _forward_in_graph(
        self, plan: Plan, inputs: int, tensors: Sequence[Any]
    ) -> tuple[list[Any], Any]:
        kind = Kind.FORWARD_KEEPING if tapes.recording() else Kind.FORWARD

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            self._arguments.check("", arrays[:inputs])
            operands = Operands(arrays[:inputs], arrays[inputs:])
            result = self._remote.compute(plan, kind, operands)
            self._assignment[result.call] = result.assignment
            while len(self._assignment) > _REMEMBERED_CALLS:
                self._assignment.popitem(last=False)
            return [np.asarray(result.call, np.int64), *result.outputs]

        types = [tf.int64, *(tf.as_dtype(np.dtype(spec.dtype)) for spec in plan.outputs)]
        ticket, *outputs = tf.numpy_function(run, list(tensors), types)
        ticket.set_shape(())
        batch = tensors[0].shape[0]
        for output, spec in zip(outputs, plan.outputs, strict=True):
            output.set_shape((batch, *spec.shape))
        return outputs, ticket

    def _backward_in_graph(
        self,
        plan: Plan,
        inputs: int,
        ticket: Any,
        wanted: list[int],
        arguments: Sequence[Any],
    ) -> list[Any]:
        if isinstance(ticket, _Ticket):  # an eager call, pulled back within a graph
            self._assignment[ticket.call] = ticket.assignment
            ticket = tf.constant(ticket.call, tf.int64)

        def run(call: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
            assignment = self._assignment.pop(int(call), None)
            return self._pull_back(plan, inputs, int(call), assignment, arrays, wanted=wanted)

        sources = dict(zip(self._sources(inputs), arguments, strict=False))
        types = [sources[n].dtype for n in wanted]
        found = tf.numpy_function(run, [ticket, *arguments], types)
        for gradient, n in zip(found, wanted, strict=True):
            gradient.set_shape(sources[n].shape)
        return list(found)

    def _second(
        self,
        plan: Plan,
        inputs: int,
        ticket: Any,
        arguments: Sequence[Any],
        tangents: Sequence[Any],
    ) -> list[Any]:
        """Gradients for the vjp's arguments (inputs, weights, cotangents), from its results'."""
        places = self._sources(inputs)
        wanted = plan.sources
        cotangents = len(arguments) - len(places)
        shaped_as = [places.index(n) for n in wanted] + [*range(len(places), len(arguments))]

        def run(call: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
            given = zip(wanted, arrays[len(arguments) :], strict=True)
            used = [(n, tangent) for n, tangent in given if np.any(tangent)]
            if not used:
                return [np.zeros_like(arrays[n]) for n in shaped_as]
            return self._pull_back(plan, inputs, int(call), None, arrays[: len(arguments)], used)

        @custom_gradient
        def pooled_second(*tensors: Any) -> tuple[list[Any], Callable[..., Any]]:
            if tf.executing_eagerly():
                arrays = [np.asarray(x) for x in tensors]
                found = tensors_of(run(np.asarray(ticket.call), *arrays))
            else:
                call = ticket.call if isinstance(ticket, _Ticket) else ticket
                types = [tensors[n].dtype for n in shaped_as]
                found = tf.numpy_function(run, [tf.cast(call, tf.int64), *tensors], types)
                for gradient, n in zip(found, shaped_as, strict=True):
                    gradient.set_shape(tensors[n].shape)
            return found, lambda *given: self._third(plan, inputs, wanted, tensors, found, given)

        found = pooled_second(*arguments, *tangents)
        of_source = dict(zip(wanted, found, strict=False))
        of_arguments = [None if n is None else of_source.get(n) for n in places]
        return [*of_arguments, *found[len(found) - cotangents :]]

    def _third(
        self,
        plan: Plan,
        inputs: int,
        wanted: list[int],
        tensors: Sequence[Any],
        second: Sequence[Any],
        given: Sequence[Any],
    ) -> list[Any]:
        """Gradients for all that the ``second`` derivative is of, from its results'."""
        in_place = self._in_place
        if in_place is None or plan.draws or not all(plan.as_tensor[1:inputs]):
            _refuse(
                "there is no third one of a qpool.Engine (workers.engine.TracedEngine has it), of "
                "a model that draws, or of one that is given further batches as ndarrays"
            )()
        # One object may be an input and a cotangent; of each there is a derivative of its own.
        tensors = [tf.identity(x) for x in tensors]
        given = [tf.convert_to_tensor(x) for x in given]
        end = inputs + len(self._remote.variables)
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
        places = self._sources(inputs)
        return [*(None if n is None else of_source.get(n) for n in places), *found[len(wanted) :]]

    def _pull_back(
        self,
        plan: Plan,
        inputs: int,
        call: int,
        assignment: dict[int, tuple[int, ...]] | None,
        arrays: Sequence[np.ndarray],
        tangents: Sequence[tuple[int, np.ndarray]] = (),
        wanted: list[int] | None = None,
    ) -> list[np.ndarray]:
        end = inputs + len(self._remote.variables)
        given = iter(arrays[end:])
        cotangents = [next(given) if _is_float(spec) else None for spec in plan.outputs]
        return self._remote.compute(
            plan,
            Kind.SECOND if tangents else Kind.BACKWARD,
            Operands(arrays[:inputs], arrays[inputs:end], cotangents, tangents),
            call=call,
            assignment=assignment,
            wanted=plan.sources if wanted is None else wanted,
        ).gradients

    @staticmethod
    def _cotangent(spec: ArraySpec, batch: int, seed: Any) -> np.ndarray | None:
        if not _is_float(spec):
            return None
        array = np.asarray(seed, spec.dtype)
        if array.shape != (batch, *spec.shape):
            raise InputError(
                f"a cotangent has the shape of its output: expected {(batch, *spec.shape)}, "
                f"came {array.shape}"
            )
        return array


class _Ticket:
    """An eager forward call. When the last tape that could ask for it goes, workers let go too."""

    def __init__(
        self, remote: RemoteModel, call: int, assignment: dict[int, tuple[int, ...]]
    ) -> None:
        self.call = call
        self.assignment = assignment
        weakref.finalize(self, remote.pool.forget, call).atexit = False


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


def _is_float(spec: ArraySpec) -> bool:
    return np.dtype(spec.dtype).kind in "fc"
