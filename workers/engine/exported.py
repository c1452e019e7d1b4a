"""Functions of tensors as StableHLO, which one process of a machine traces and all others load.

    function --trace--> forward: inputs -> outputs, residuals     } two modules, kept in memory
                        pull-back: inputs, residuals, cotangents  } and on disk under one name

A circuit is known before any number is (``plan.Circuit``), and so is what TensorFlow makes of it: a
thousand operations, which take half a second to trace and a third of one to lower, in each program
that runs the circuit and in each process. As a module it is one operation (``XlaCallModule``; see
https://openxla.org/stablehlo), and XLA sees the same instructions as before.

Owns how such a function is cut into modules, called and differentiated, and which are kept. What is
exported must depend on its name and its inputs' shapes alone. For programs of XLA, on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla
from tensorflow.python.eager import context
from tensorflow.python.eager.polymorphic_function import atomic_function
from tensorflow.python.framework import ops
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops import gradients_util
from tensorflow.python.ops.parallel_for.pfor import wrap

from workers import cache, names
from workers.context import during
from workers.custom_gradient import custom_gradient, vectoriser
from workers.tensors import for_xla, vjp, within_xla, without_loops

log = logging.getLogger("qpool")

#: Tensors to tensors. What it captures must be among ``Exportable.constants``.
Function = Callable[..., list[tf.Tensor]]

_written_out: ContextVar[bool] = ContextVar("written_out", default=False)

#: Modules that a process holds, at most.
_HELD = 32

_held: OrderedDict[str, Modules | None] = OrderedDict()

#: The version of XlaCallModule's conventions: arguments and results one by one, no tokens.
_VERSION = 9


def written_out() -> AbstractContextManager[Any]:
    """What is traced within is traced operation by operation: a derivative of a gradient then finds
    what the gradient has computed."""
    return during(_written_out, True)


@dataclass(frozen=True)
class Exportable:
    """A function of tensors of known shapes.

    Attributes:
        name: tells it from all others.
        function: what it computes.
        constants: eager tensors that it may capture, and that every process has alike.
        order: how many times a function has been differentiated to be this one. Of one that has
            been, a module gives no residuals: a derivative of it is asked for seldom.
    """

    name: str
    function: Function
    constants: tuple[tf.Tensor, ...] = ()
    order: int = 0

    def __call__(
        self, *tensors: tf.Tensor, checkpointed: bool = False, within: bool = False
    ) -> list[tf.Tensor]:
        """``function(*tensors)``, as a module where that may be, differentiable any number of
        times.

        ``checkpointed``: its inputs alone are kept for its gradient, which makes the residuals
        again (Griewank and Walther, ACM TOMS 26, 19, 2000). ``within``: XLA will compile it, which
        the graph does not say of a backward pass whose tape is outside.
        """
        within = within or within_xla()
        modules = self._modules(tensors) if within else None
        if modules is None and not checkpointed:
            return self.function(*tensors)
        outputs = None if modules is None else modules.outputs
        found: list[tf.Tensor] = []

        @custom_gradient
        def made(*tensors: tf.Tensor) -> tuple[list[tf.Tensor], Callable[..., Any]]:
            def pull_back(*cotangents: tf.Tensor) -> list[tf.Tensor]:
                if modules is None or modules.pull_back is None:
                    pulled = self.vjp(len(tensors))
                    return pulled(*tensors, *cotangents, checkpointed=True, within=within)
                made = modules.forward(self, tensors, len(tensors)) if checkpointed else found
                residuals, own = made[outputs:], cotangents[:outputs]
                return self._pulled_back(modules.pull_back, tensors, residuals, own)

            if modules is None:
                return self.function(*tensors), pull_back
            given = modules.forward(self, tensors, len(tensors))
            return given[:outputs] if checkpointed else given, pull_back

        # They may be another graph's, to which a further backward pass has no access.
        found += made(*map(tf.identity, tensors))
        return found[:outputs]

    def _pulled_back(
        self,
        module: Module,
        tensors: Sequence[tf.Tensor],
        residuals: Sequence[tf.Tensor],
        cotangents: Sequence[tf.Tensor],
    ) -> list[tf.Tensor]:
        inputs, kept = len(tensors), len(residuals)

        @custom_gradient
        def pulled(*given: tf.Tensor) -> tuple[list[tf.Tensor], Callable[..., Any]]:
            cotangents = given[inputs + kept :]

            def further(*tangents: tf.Tensor) -> list[tf.Tensor | None]:
                # Residuals are functions of the inputs: what comes through them is in theirs.
                second = self.vjp(inputs).vjp(inputs + len(cotangents))
                found = second(
                    *given[:inputs], *cotangents, *tangents, checkpointed=True, within=True
                )
                return [*found[:inputs], *[None] * kept, *found[inputs:]]

            return module(self, given, inputs), further

        found: list[tf.Tensor] = pulled(*map(tf.identity, (*tensors, *residuals, *cotangents)))
        return found

    def vjp(self, inputs: int) -> Exportable:
        """The vector-Jacobian product, of the inputs and then the outputs' cotangents: a gradient
        for each input."""

        def pulled(*given: tf.Tensor) -> list[tf.Tensor]:
            return vjp(self.function, given[:inputs], given[inputs:])

        return Exportable(f"vjp of {self.name}", pulled, self.constants, self.order + 1)

    def _modules(self, tensors: Sequence[tf.Tensor]) -> Modules | None:
        """None where the function is to be traced operation by operation."""
        if not _may_be_exported(tensors):
            return None
        specs = [tf.TensorSpec(x.shape, x.dtype) for x in tensors]
        shapes = [(x.shape.as_list(), x.dtype.name) for x in specs]
        name = json.dumps([self.name, shapes, _source()])
        try:
            modules = _held.pop(name)
        except KeyError:
            modules = self._found(name, specs)
        _held[name] = modules
        while len(_held) > _HELD:
            with contextlib.suppress(KeyError):  # another thread's turn
                _held.popitem(last=False)
        return modules

    def _found(self, name: str, specs: Sequence[tf.TensorSpec]) -> Modules | None:
        made = functools.partial(self._traced, name, specs)
        try:
            return Modules.from_bytes(cache.kept(name, made, Modules.from_bytes))
        except Exception as error:  # it is traced operation by operation, and fails there again
            log.info("%s is no module", self.name, exc_info=error)
            return None

    def _traced(self, name: str, specs: Sequence[tf.TensorSpec]) -> bytes:
        with _apart(name):
            return _Traced(self, specs).modules().to_bytes()


def _may_be_exported(tensors: Sequence[tf.Tensor]) -> bool:
    return (
        not _written_out.get()
        and not tf.executing_eagerly()
        and all(x.shape.is_fully_defined() for x in tensors)
        and not _other_devices()
    )


@functools.cache
def _other_devices() -> bool:
    with tf.init_scope():
        return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


@functools.cache
def _source() -> str:
    """What tells this code from another version of it."""
    told = hashlib.sha256()
    here = Path(__file__).parent
    for file in (*sorted(here.glob("*.py")), here.parent / "tensors.py"):
        told.update(file.read_bytes())
    return told.hexdigest()


@contextlib.contextmanager
def _apart(name: str) -> Iterator[None]:
    """Trace within as in every process, for XLA: by names that count from elsewhere."""
    with names.apart(name):
        around = FuncGraph("around")
        with around.as_default(), for_xla():
            yield


@dataclass(frozen=True)
class Module:
    """StableHLO, and what it takes and gives.

    Attributes:
        code: serialised.
        takes: of the arguments that it may be given, and then the constants, which ones.
        gives: shape and dtype of each result.
        of_cotangents: how many of the arguments are cotangents, which come first: none of a
            forward module.
    """

    code: bytes
    takes: tuple[int, ...]
    gives: tuple[tuple[tuple[int, ...], str], ...]
    of_cotangents: int

    def __call__(self, of: Exportable, given: Sequence[tf.Tensor], inputs: int) -> list[tf.Tensor]:
        there = [*given, *of.constants]
        taken = [there[n] for n in self.takes]
        found: list[tf.Tensor] = list(
            xla.call_module(
                taken,
                version=_VERSION,
                module=self.code,
                Tout=[tf.as_dtype(dtype) for _, dtype in self.gives],
                Sout=[tf.TensorShape(shape) for shape, _ in self.gives],
                platforms=["CPU"],
            )
        )
        found[0].op.pfor_converter = functools.partial(_vectorised, of, inputs, self)
        return found


@dataclass(frozen=True)
class Modules:
    """What is kept under a name. ``outputs`` of the forward module's results are the function's."""

    outputs: int
    forward: Module
    pull_back: Module | None = None

    def to_bytes(self) -> bytes:
        modules = [module for module in (self.forward, self.pull_back) if module is not None]
        told = [[m.takes, m.gives, m.of_cotangents, len(m.code)] for m in modules]
        head = json.dumps([self.outputs, told]).encode()
        return b"\n".join([head, b"".join(m.code for m in modules)])

    @staticmethod
    def from_bytes(found: bytes) -> Modules:
        """ValueError, of whatever kind, where it is none."""
        head, _, codes = found.partition(b"\n")
        outputs, told = json.loads(head)
        modules = []
        for takes, gives, of_cotangents, size in told:
            shapes = tuple((tuple(shape), dtype) for shape, dtype in gives)
            modules.append(Module(codes[:size], tuple(takes), shapes, of_cotangents))
            codes = codes[size:]
        return Modules(outputs, *modules)


class _Graph(FuncGraph):
    """A graph in which equal constants are one. Of a circuit's operations half are shapes, axes and
    permutations, a few ones again and again, which take a tenth to a third of a trace."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._constants: dict[bytes, Any] = {}

    def _create_op_internal(self, op_type: str, *args: Any, **kwargs: Any) -> Any:
        value = (kwargs.get("attrs") or {}).get("value")
        if op_type != "Const" or value is None:
            return super()._create_op_internal(op_type, *args, **kwargs)
        key = value.tensor.SerializeToString(deterministic=True)
        if key not in self._constants:
            self._constants[key] = super()._create_op_internal(op_type, *args, **kwargs)
        return self._constants[key]


class _PullBack(_Graph):
    """A graph of a backward pass. What the forward pass knows without computing it is a constant
    here: a shape, say, which XLA must know."""

    def capture(self, tensor: Any, name: str | None = None, shape: Any = None) -> Any:
        within = not tf.is_symbolic_tensor(tensor) or tensor.graph is self
        value = None if within else tf.get_static_value(tensor)
        if value is None:
            return super().capture(tensor, name, shape)
        with self.as_default():
            return tf.constant(value, tensor.dtype)


class _Traced:
    """A function's graphs: forward, with its residuals, and the pull-back."""

    def __init__(self, of: Exportable, specs: Sequence[tf.TensorSpec]) -> None:
        self._of = of
        self._forward: Any = _Graph("forward")
        forward = self._forward
        with forward.as_default(), written_out():
            forward.inputs = [tf.compat.v1.placeholder(x.dtype, x.shape) for x in specs]
            self._inputs = list(forward.inputs)
            forward.outputs = list(map(tf.identity, of.function(*forward.inputs)))
        self._outputs = len(forward.outputs)
        self._pull_back: FuncGraph | None = None
        if of.order == 0:
            self._differentiate()
        forward.inputs = [*self._inputs, *forward.internal_captures]

    def _differentiate(self) -> None:
        forward = self._forward
        with forward.as_default(), written_out():
            back: Any = _PullBack("pull_back")
        self._pull_back = back
        with back.as_default(), written_out():
            cotangents = [tf.compat.v1.placeholder(x.dtype, x.shape) for x in forward.outputs]
            for x in self._inputs:  # all, used or not: see ``_vectorised``
                back.capture(x)
            back.outputs = gradients_util._GradientsHelper(
                list(forward.outputs),
                self._inputs,
                grad_ys=cotangents,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
                src_graph=forward,
            )
            back.outputs = list(map(tf.convert_to_tensor, back.outputs))
        back.inputs = [*cotangents, *back.internal_captures]
        known = {id(x) for x in (*forward.inputs, *forward.internal_captures)}
        for x in back.external_captures:
            if tf.is_symbolic_tensor(x) and x.graph is forward and id(x) not in known:
                known.add(id(x))
                forward.outputs.append(x)

    def _cut(self) -> Iterator[tuple[FuncGraph, list[int], int]]:
        """Each graph, which of its module's arguments and constants its inputs are, and how many of
        them are cotangents."""
        yield self._forward, self._numbers(self._forward, self._inputs, len(self._inputs)), 0
        if self._pull_back is not None:
            count = len(self._inputs) + len(self._forward.outputs)  # residuals, then cotangents
            own = self._pull_back.inputs[: self._outputs]
            yield self._pull_back, self._numbers(self._pull_back, own, count), len(own)

    def _numbers(self, graph: FuncGraph, own: Sequence[tf.Tensor], constants: int) -> list[int]:
        first = 0 if graph is self._forward else constants - len(own)
        found = [first + n for n in range(len(own))]
        residuals = [id(x) for x in self._forward.outputs[self._outputs :]]
        inputs = [id(x) for x in self._inputs]
        tables = [id(x) for x in self._of.constants]
        within = {id(x): outer for outer, x in self._forward.captures}
        for captured in graph.external_captures:
            captured = within.get(id(captured), captured)
            if id(captured) in inputs and graph is not self._forward:
                found.append(inputs.index(id(captured)))
            elif id(captured) in residuals and graph is not self._forward:
                found.append(len(inputs) + residuals.index(id(captured)))
            elif id(captured) in tables:
                found.append(constants + tables.index(id(captured)))
            else:
                raise ValueError(f"it captures {captured}")
        return found

    def modules(self) -> Modules:
        modules = [_module(graph, takes, count) for graph, takes, count in self._cut()]
        return Modules(self._outputs, *modules)


def _module(graph: FuncGraph, takes: Sequence[int], of_cotangents: int) -> Module:
    gives = tuple((tuple(x.shape.as_list()), x.dtype.name) for x in graph.outputs)
    function = atomic_function.from_func_graph(f"exported_{ops.uid()}", graph, {})
    with tf.init_scope():
        code = context.context().get_compiler_ir(
            device_name=None,
            platform_name="CPU",
            function_name=function.name,
            flat_args=[tf.TensorSpec(x.shape, x.dtype) for x in graph.inputs],
            captured_inputs=[],
            stage="stablehlo_serialized",
        )
    return Module(code, tuple(takes), gives, of_cotangents)


def _vectorised(of: Exportable, inputs: int, module: Module, given: Any) -> list[Any]:
    """A module's operation, vectorised as the function is that it was made of.

    Nothing but a pull-back reads a residual, and one that is vectorised makes its own.
    """
    function, first = of.function, module.of_cotangents
    arguments = given.inputs[first : first + inputs]
    if first:
        function = of.vjp(inputs).function
        arguments = [*arguments, *given.inputs[:first]]
    shapes = [x.t.shape[1:] if x.is_stacked else x.t.shape for x in arguments]
    graph = FuncGraph("vectorised")
    with graph.as_default(), written_out(), without_loops():
        own = [
            tf.compat.v1.placeholder(x.t.dtype, shape)
            for x, shape in zip(arguments, shapes, strict=True)
        ]
        outputs = function(*own)
    converter = vectoriser(given.pfor, graph)
    captured = ((inner, wrap(outer, False)) for outer, inner in graph.captures)
    for inner, outer in (*zip(own, arguments, strict=True), *captured):
        converter._add_conversion(inner, outer)
    residuals = [
        wrap(tf.zeros(shape, tf.as_dtype(dtype)), False)
        for shape, dtype in module.gives[len(outputs) :]
    ]
    return [*map(converter._convert_helper, outputs), *residuals]
