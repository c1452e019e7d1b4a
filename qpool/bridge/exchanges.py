"""What a call and its derivatives ask of the workers: at once, or by an operation of a graph.

    tensors --copy--> arrays --> workers --> arrays --copy--> tensors

Owns how tensors get there and back, and which workers hold what of an earlier exchange. In a graph
each is a ``tf.numpy_function``. What a derivative is of, and whether it may be asked for, is
``gradient``'s.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from qpool.batches import Operands
from qpool.bridge import tapes
from workers.exchange.protocol import Kind
from workers.layout import ArraySpec
from workers.tensors import tensor_of, tensors_of

if TYPE_CHECKING:
    from qpool.executors.remote import KnownPlan, RemoteModel

#: Who computed which tiles.
_Assignment = dict[int, tuple[int, ...]]

#: Graph calls whose workers are remembered for their backward pass; older ones are recomputed.
_REMEMBERED_CALLS = 64


class Held:
    """An eager forward call. When the last tape that could ask for it goes, workers let go too."""

    def __init__(self, remote: RemoteModel, call: int, assignment: _Assignment) -> None:
        self.call = call
        self.assignment = assignment
        weakref.finalize(self, remote.pool.forget, call).atexit = False


class Exchanges:
    """Those of one plan, whose arguments are so many ``inputs`` and then all variables.

    ``check`` raises InputError for arrays that are no inputs; ``places`` are the arguments' numbers
    as sources, None for one without gradients.
    """

    def __init__(
        self,
        remote: RemoteModel,
        plan: KnownPlan,
        inputs: int,
        check: Callable[[Sequence[np.ndarray]], Any],
    ) -> None:
        self._remote, self._plan, self._inputs, self._check = remote, plan, inputs, check
        self._assignment: OrderedDict[int, _Assignment] = OrderedDict()
        numbers = {index: inputs + n for n, index in enumerate(remote.differentiable)}
        weights = [numbers.get(index) for index in range(len(remote.variables))]
        self.places: list[int | None] = [*range(inputs), *weights]

    def forward(self, tensors: Sequence[Any]) -> tuple[list[Any], Any]:
        """The outputs, and the ticket by which a derivative finds what workers keep of it."""
        if not tf.executing_eagerly():
            return self._forward_in_graph(tensors)
        result = self._compute(Kind.FORWARD_KEEPING, [np.asarray(x) for x in tensors], tensor_of)
        return result.outputs, Held(self._remote, result.call, result.assignment)

    def backward(self, ticket: Any, wanted: list[int], arguments: Sequence[Any]) -> list[Any]:
        """Gradients for the sources ``wanted``, of arguments and then cotangents."""
        if isinstance(ticket, Held):  # a graph that pulls back an eager call has no more of it
            self._assignment[ticket.call] = ticket.assignment

        def run(call: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
            assignment = self._assignment.pop(int(call), None)
            return self._pulled_back(int(call), assignment, arrays, wanted)

        sources = dict(zip(self.places, arguments, strict=False))
        return computed(run, [_call(ticket), *arguments], [alike(sources[n]) for n in wanted])

    def second(self, ticket: Any, arguments: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        """Gradients of the vjp for the plan's sources, then for its cotangents; ``arguments`` are
        its own, ``tangents`` cotangents of what it gives."""
        wanted, end = self._plan.sources, len(arguments)
        shaped_as = [self.places.index(n) for n in wanted] + [*range(len(self.places), end)]

        def run(call: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
            given = zip(wanted, arrays[end:], strict=True)
            used = [(n, tangent) for n, tangent in given if np.any(tangent)]
            if not used:
                return [np.zeros_like(arrays[n]) for n in shaped_as]
            return self._pulled_back(int(call), None, arrays[:end], wanted, used)

        tensors = [*arguments, *tangents]
        return computed(run, [_call(ticket), *tensors], [alike(tensors[n]) for n in shaped_as])

    def _forward_in_graph(self, tensors: Sequence[Any]) -> tuple[list[Any], Any]:
        kind = Kind.FORWARD_KEEPING if tapes.recording() else Kind.FORWARD

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            self._check(arrays[: self._inputs])
            result = self._compute(kind, arrays)
            self._assignment[result.call] = result.assignment
            while len(self._assignment) > _REMEMBERED_CALLS:
                self._assignment.popitem(last=False)
            return [np.asarray(result.call, np.int64), *result.outputs]

        rows = rows_of(self._plan.outputs, tensors[0].shape[0])
        ticket, *outputs = computed(run, tensors, [(tf.int64, ()), *rows])
        return outputs, ticket

    def _compute(self, kind: Kind, arrays: Sequence[np.ndarray], copy: Any = np.array) -> Any:
        operands = Operands(arrays[: self._inputs], arrays[self._inputs :])
        return self._remote.compute(self._plan, kind, operands, copy=copy)

    def _pulled_back(
        self,
        call: int,
        assignment: _Assignment | None,
        arrays: Sequence[np.ndarray],
        wanted: Sequence[int],
        tangents: Sequence[tuple[int, np.ndarray]] = (),
    ) -> list[np.ndarray]:
        inputs, end = self._inputs, len(self.places)
        given = iter(arrays[end:])
        cotangents = [next(given) if spec.is_float else None for spec in self._plan.outputs]
        return self._remote.compute(
            self._plan,
            Kind.SECOND if tangents else Kind.BACKWARD,
            Operands(arrays[:inputs], arrays[inputs:end], cotangents, tangents),
            call=call,
            assignment=assignment,
            wanted=wanted,
        ).gradients


def computed(
    run: Callable[..., list[np.ndarray]],
    tensors: Sequence[Any],
    results: Sequence[tuple[tf.DType, Any]],
) -> list[Any]:
    """What ``run`` makes of the tensors' arrays: at once, or by an operation of the graph that is
    being built. ``results`` are dtypes and shapes of what it gives."""
    if tf.executing_eagerly():
        return tensors_of(run(*map(np.asarray, tensors)))
    found = tf.numpy_function(run, list(tensors), [dtype for dtype, _ in results])
    for tensor, (_, shape) in zip(found, results, strict=True):
        tensor.set_shape(shape)
    return list(found)


def rows_of(specs: Sequence[ArraySpec], rows: int | None) -> list[tuple[tf.DType, Any]]:
    """Of outputs of so many rows: ``results``."""
    return [(tf.as_dtype(np.dtype(spec.dtype)), (rows, *spec.shape)) for spec in specs]


def alike(tensor: Any) -> tuple[tf.DType, Any]:
    """Of what is as a tensor: one of ``results``."""
    return tensor.dtype, tensor.shape


def _call(ticket: Any) -> Any:
    """The number of the call, an int64."""
    return np.int64(ticket.call) if isinstance(ticket, Held) else ticket
