"""Losses of a pooled model that are computed where its outputs are: one exchange a step.

Owns which losses a model has met, each with a replica of its own in the workers, and what is done
where a loss cannot go there.
"""

from __future__ import annotations

import functools
import logging
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from qpool.batches import Operands
from qpool.bridge.arguments import is_eager
from qpool.bridge.exchanges import alike, computed, rows_of
from qpool.bridge.gradient import Bridge
from workers.errors import InputError, ModelError, RemoteError, ShippingError, StatefulCallError
from workers.exchange.protocol import Kind
from workers.replica import functions, serialization
from workers.replica.with_loss import WithLoss
from workers.tensors import beside, leaves, tensors_of

if TYPE_CHECKING:
    from qpool.executors.remote import KnownPlan

log = logging.getLogger("qpool")

#: Losses that are kept, with what is compiled for them; the one used longest ago is let go. One
#: that has been as many, since it holds something else each time, is computed in this process.
_KEPT = 8

#: What says that a loss is none that workers can compute: those of the coordinator's process can.
_NOT_THERE = (ShippingError, ModelError, InputError, StatefulCallError, RemoteError)


class LossBridge(Bridge):
    """Calls of a ``WithLoss`` model, with the gradient of its mean loss."""

    def loss_and_gradient(self, values: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
        """Of a ``WithLoss`` model: outputs, the loss of each sample, and the gradient of their mean
        for each trainable variable; None where nothing depends on one. One exchange with workers.
        """
        arguments, inputs, as_tensor = self._arguments.all_sharded(values)
        sources = self._trainable_sources(len(inputs))
        wanted = tuple(source for source in sources if source is not None)
        if tf.executing_eagerly():
            arrays = [np.asarray(x) for x in inputs]
            self._arguments.check("__call__", arrays)
            plan = self._remote.plan(
                "__call__",
                arguments,
                as_tensor,
                arrays,
                self._weights,
                gradient=True,
                wanted=wanted,
            )
            found = self._of_mean(plan, len(inputs), wanted, [*arrays, *self._weights()])
            tensors = tensors_of(found)
        else:
            plan = self._plan_of_graph("__call__", arguments, as_tensor, inputs, wanted)

            tensors = self._of_mean_in_graph(plan, inputs, wanted)
        outputs, losses = self._pack(plan, tensors[: len(plan.outputs)])
        connected = _connected(plan, wanted)
        gradients: dict[int | None, Any] = dict(
            zip(connected, tensors[len(plan.outputs) :], strict=True)
        )
        if plan.level == "eager" and tf.executing_eagerly():
            gradients = {n: x for n, x in gradients.items() if n is None or plan.connects(n, x)}
        return outputs, losses, [gradients.get(source) for source in sources]

    def check(self, values: Sequence[Any]) -> None:
        """InputError unless these are batches of one length, and of the model's width."""
        _, inputs, _ = self._arguments.all_sharded(values)
        if all(is_eager(x) for x in inputs):
            self._arguments.check("__call__", [np.asarray(x) for x in inputs])

    @property
    def in_use(self) -> bool:
        """Whether a call has been probed."""
        return self._remote.in_use

    def _of_mean(
        self, plan: KnownPlan, inputs: int, wanted: Sequence[int], arrays: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Outputs, and gradients of the mean of the last one."""
        batch = len(arrays[0])
        mean: np.ndarray = np.full(batch, 1 / batch, plan.outputs[-1].dtype)
        cotangents = [*[None] * (len(plan.outputs) - 1), mean]
        connected = _connected(plan, wanted)
        operands = Operands(arrays[:inputs], arrays[inputs:], cotangents)
        found = self._remote.compute(plan, Kind.BOTH, operands, wanted=connected)
        return [*found.outputs, *found.gradients]

    def _of_mean_in_graph(
        self, plan: KnownPlan, inputs: Sequence[Any], wanted: Sequence[int]
    ) -> list[Any]:
        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            self._arguments.check("", arrays[: len(inputs)])
            return self._of_mean(plan, len(inputs), wanted, arrays)

        tensors = [tf.convert_to_tensor(x) for x in inputs]
        variables = self._remote.variables
        by_source = [variables[place] for place in self._remote.differentiable]
        results = rows_of(plan.outputs, tensors[0].shape[0])
        results += [alike(by_source[n - len(inputs)]) for n in _connected(plan, wanted)]
        return computed(run, [*tensors, *(variable.value() for variable in variables)], results)


def _connected(plan: KnownPlan, wanted: Sequence[int]) -> list[int]:
    """Those of the sources that have gradients."""
    sources = set(plan.sources)
    return [n for n in wanted if n in sources]


def on_a_tape(
    model: Any,
    call: Callable[..., Any],
    method: str,
    loss: Callable[..., Any],
    values: Sequence[Any],
) -> tuple[Any, Any, list[Any]]:
    """What ``LossBridge.loss_and_gradient`` gives, by a tape around the call."""
    variables = serialization.trainable_variables(model)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(variables)
        outputs = call(method, (values[0],), {})
        losses = tf.convert_to_tensor(loss(outputs, *values[1:]))
        mean = tf.reduce_mean(losses)
    return outputs, losses, tape.gradient(mean, variables)


class Losses:
    """The losses of one model. ``bridge`` makes a bridge to workers of a ``WithLoss`` model."""

    def __init__(self, model: Any, bridge: Callable[[WithLoss], LossBridge]) -> None:
        self._model = model
        self._bridge = bridge
        #: By method and loss: what is kept alive for the key, and the bridge or why there is none.
        self._known: OrderedDict[Any, tuple[Any, LossBridge | str]] = OrderedDict()
        #: How many losses have been of one code.
        self._made: Counter[Any] = Counter()

    def find(self, method: str, loss: Callable[..., Any]) -> LossBridge | None:
        """The bridge for this loss; None where it has to be computed in this process."""
        identity, alive = _identity(loss)
        key = method, identity
        if key not in self._known:
            code = method, identity[0]
            self._made[code] += 1
            if self._made[code] > _KEPT:
                self._tell_once(code)
                return None
            try:
                with tf.init_scope():  # variables have values there, also where a step is traced
                    found: LossBridge | str = self._bridge(WithLoss(self._model, method, loss))
            except _NOT_THERE as error:
                found = self._refused(error)
            self._known[key] = alive, found
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)  # a graph may hold it yet
        self._known.move_to_end(key)
        found = self._known[key][1]
        return None if isinstance(found, str) else found

    def refuse(self, method: str, loss: Callable[..., Any], error: Exception) -> bool:
        """Whether this error of a first call means that the loss cannot be computed by workers."""
        if not isinstance(error, _NOT_THERE):
            return False
        identity, alive = _identity(loss)
        self._close(self._known.pop((method, identity), None))
        self._known[method, identity] = alive, self._refused(error)
        return True

    def stats(self) -> list[dict[str, Any]]:
        """For each loss: the method, and where it is computed."""
        found = []
        for (method, _), (_, bridge) in self._known.items():
            why_not = bridge if isinstance(bridge, str) else ""
            found.append({"method": method, "in_workers": not why_not, "why_not": why_not})
        return found

    @property
    def bridges(self) -> list[LossBridge]:
        """Those of the losses that workers compute."""
        return [found for _, found in self._known.values() if isinstance(found, LossBridge)]

    def close(self) -> None:
        for entry in self._known.values():
            self._close(entry)
        self._known.clear()

    def _tell_once(self, code: Any) -> None:
        if self._made[code] == _KEPT + 1:
            log.warning(
                "a loss holds something else at each call, for which it would be compiled anew: it "
                "is computed in this process. What changes from step to step belongs in a further "
                "batch, or in a variable that the loss holds"
            )

    @staticmethod
    def _close(entry: tuple[Any, LossBridge | str] | None) -> None:
        if entry is not None and isinstance(entry[1], LossBridge):
            entry[1].close()

    @staticmethod
    def _refused(error: Exception) -> str:
        log.info("a loss is computed in this process, not by the workers: %s", error)
        return f"{type(error).__name__}: {error}"


def _identity(loss: Any, alive: list[Any] | None = None) -> tuple[Any, list[Any]]:
    """What is the same for a function that is made anew by the same line with the same around it
    (what it closes over, what it finds in its module), and what is kept so that it stays the same.

    An object that can be called is itself, with the attributes that it has now.
    """
    alive = [] if alive is None else alive
    alive.append(loss)
    if isinstance(loss, types.FunctionType):
        around = [cell.cell_contents for cell in loss.__closure__ or () if _is_filled(cell)]
        around += [*(loss.__defaults__ or ()), *(loss.__kwdefaults__ or {}).values()]
        names = dict.fromkeys(functions.names(loss.__code__))
        around += [loss.__globals__[name] for name in names if name in loss.__globals__]
        return (loss.__code__, *(_mark(part, alive) for part in around)), alive
    if isinstance(loss, types.MethodType):
        code, _ = _identity(loss.__func__, alive)
        return (*code, id(loss.__self__), *_attributes(loss.__self__, alive)), alive
    if isinstance(loss, functools.partial):
        code, _ = _identity(loss.func, alive)
        given = [*loss.args, *loss.keywords, *loss.keywords.values()]
        return (*code, *(_mark(part, alive) for part in given)), alive
    return (type(loss), id(loss), *_attributes(loss, alive)), alive


def _mark(part: Any, alive: list[Any]) -> Any:
    """A plain value by what it is; a function of the user's by what it holds; anything else by its
    identity, which is kept from being another one's."""
    if isinstance(part, bool | int | float | complex | str | bytes | type(None)):
        return type(part), part
    own = isinstance(part, types.FunctionType) and not _is_of_a_library(part)
    if own and all(part is not known for known in alive):
        return _identity(part, alive)[0]
    alive.append(part)
    return id(part)


def _attributes(owner: Any, alive: list[Any]) -> Iterator[Any]:
    if not _is_of_a_library(type(owner)):  # theirs may change with each call
        for name, value in getattr(owner, "__dict__", {}).items():
            yield name, _mark(value, alive)


def _is_of_a_library(thing: Any) -> bool:
    return str(thing.__module__).startswith(("keras.", "tensorflow.", "numpy", "strawberryfields"))


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def of_each_sample(model: Any, call: Callable[..., Any], z: Any, cotangent: Any) -> list[tf.Tensor]:
    """For each variable the gradients of every sample, (samples, ...), by a tape around a call of
    each: see ``Executor.per_sample_gradients``."""
    method = "__call__" if callable(model) else "generate"
    variables = serialization.trainable_variables(model)
    z = tf.convert_to_tensor(z)
    rows = []
    for n in range(len(z)):
        with tf.GradientTape() as tape:
            outputs = call(method, (z[n : n + 1],), {})
        found = tape.gradient(
            leaves(outputs),
            variables,
            output_gradients=[seed[n : n + 1] for seed in beside(outputs, cotangent)],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        rows.append(map(tf.convert_to_tensor, found))
    return [tf.stack(column) for column in zip(*rows, strict=True)]
