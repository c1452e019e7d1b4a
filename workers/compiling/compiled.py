"""The fastest form of a model's method that gives what the eager one gives.

Tries XLA, then a graph, then leaves it eager; says which it was and what stopped a better one.
Owns that choice. What is called, with what, and what happens to the outputs is the replica's.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import record

from workers import collector
from workers.compiling import compile_cache, gradients, programs
from workers.compiling.compile_cache import Guarded
from workers.compiling.taped import asked_once
from workers.engine import circuit
from workers.errors import NotForXLAError, UntraceableError
from workers.tensors import differentiable, for_xla, in_graph, leaves

gradients.register()

#: From the best to the one that always works.
LEVELS = ("xla", "graph", "eager")

#: How far a compiled output may lie from the eager one, relative to the largest entry of that
#: output: far above rounding in single precision, far below a branch that was taken otherwise.
_SAME = 1e-3

#: Where it lies further, how far in what the output itself goes when the inputs go this part of
#: themselves: what cancels in it (1 minus a sum of probabilities) is no better known than that.
_ROUNDINGS, _PART = 16, 2.0**-16


@dataclass(frozen=True)
class Choice:
    """A level of ``LEVELS``, why it is not a better one, and the seconds it took to compile."""

    level: str
    reason: str
    seconds: float

    def after(self, other: Choice, instead: str) -> Choice:
        """This one, with the reason for which ``other``, a better form, was not taken, and what is
        done ``instead``."""
        reason = "; ".join(filter(None, (f"{instead}: {other.reason}", self.reason)))
        return Choice(self.level, reason, self.seconds + other.seconds)


def at_level(function: Callable[..., Any], level: str, program: str = "") -> Callable[..., Any]:
    """``function`` of tensors, compiled as the level says; ``program``: see ``compile_cache``."""
    if level == "eager":
        return function
    if level == "graph":
        return Compiled(function, level)
    named = compile_cache.named_lastingly(function, program)
    return Guarded(lambda: Compiled(named, level), programs.forget)


class Compiled:
    """A function of tensors whose traces are found by shapes and dtypes alone.

    The search of a ``tf.function``, which also sees structures, constants and variables, takes
    0.1 ms of each call. For XLA a trace is made within what a call of the function has around it,
    without which it has XlaEinsum for ``tf.einsum``, whose gradient lacks a conjugation where
    numbers are complex (TensorFlow 2.21).
    """

    def __init__(self, function: Callable[..., Any], level: str) -> None:
        self._xla = level == "xla"
        alone = _of_its_own(function)
        self._function: Any = tf.function(alone, jit_compile=self._xla, autograph=False)
        self._traces: dict[Any, tuple[Any, Callable[..., Any]]] = {}

    def __call__(self, *tensors: tf.Tensor) -> Any:
        if not tf.executing_eagerly():
            return in_graph(self._function, *tensors)
        return self._traced(tensors)[1](*tensors)

    def variables(self, *tensors: tf.Tensor) -> Sequence[tf.Variable]:
        """Those that a call with such tensors, which is traced now, reads."""
        found: Sequence[tf.Variable] = self._traced(tensors)[0].variables
        return found

    def leads(self, inputs: int, variables: Sequence[tf.Variable]) -> tuple[tuple[bool, ...], ...]:
        """For each output of what has been traced, which of so many inputs and of the variables its
        operations lead back to: others it has no gradient for."""
        graph = next(iter(self._traces.values()))[0].graph
        captured = {id(handle): inner for handle, inner in graph.captures}
        roots = [*graph.inputs[:inputs], *(captured.get(id(v.handle)) for v in variables)]
        found = []
        for output in graph.outputs:
            seen, ahead = set(), [output]
            while ahead:
                tensor = ahead.pop()
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    ahead += tensor.op.inputs
            found.append(tuple(root is not None and id(root) in seen for root in roots))
        return tuple(found)

    def with_captures(self, others: Mapping[int, tf.Variable], tensors: Sequence[tf.Tensor]) -> Any:
        """A call in which other variables stand for those it reads, by the ``id`` of a handle."""
        trace = self._traced(tensors)[0]
        captured = [others[id(x)].handle if id(x) in others else x for x in trace.captured_inputs]
        return trace._call_flat(list(tensors), captured)

    def _traced(self, tensors: Sequence[tf.Tensor]) -> tuple[Any, Callable[..., Any]]:
        """A trace, and what to call."""
        key = tuple((*x.shape, x.dtype) for x in tensors)
        if key not in self._traces:
            with _tapes_listen(), for_xla() if self._xla else contextlib.nullcontext():
                trace = in_graph(self._function.get_concrete_function, *tensors)
            self._traces[key] = trace, programs.compiled(trace) if self._xla else trace
        return self._traces[key]


@contextlib.contextmanager
def _tapes_listen() -> Iterator[None]:
    """Within ``stop_recording`` tapes listen to what is traced here: some may be the function's."""
    stopped = pywrap_tfe.TFE_Py_TapeSetIsStopped()
    if stopped:
        pywrap_tfe.TFE_Py_TapeSetRestartOnThread()
    try:
        yield
    finally:
        if stopped:
            pywrap_tfe.TFE_Py_TapeSetStopOnThread()


def _of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, not taken by TensorFlow for all others that are made by the same lines, and
    warned of for being traced so often."""
    alone = functools.partial(function)
    alone.__name__ = getattr(function, "__name__", "pooled")  # type: ignore[attr-defined]
    return alone


@collector.waiting()
def choose(
    function: Callable[..., Any],
    inputs: Sequence[tf.Tensor],
    expected: Sequence[tf.Tensor],
    use: Callable[[Callable[..., Any], str], Any],
    ready: Mapping[str, Callable[..., Any] | None] = MappingProxyType({}),
    before: Callable[[], Any] = lambda: None,
    *,
    draws: bool = False,
    failed: bool = False,
    alike: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    levels: Sequence[str] = LEVELS[:-1],
    program: str = "",
    use_first: bool = False,
) -> Choice:
    """The best level at which ``function(*inputs)`` gives what it gave eagerly.

    Args:
        function: the method, of tensors alone.
        inputs: a tile of them.
        expected: what it returned for them eagerly, flattened; of the first rows, or of all. What
            the function returns beyond that is not looked at.
        use: called with the compiled function and its level, to take its gradient, say. If it
            fails, the level is none.
        ready: functions that are compiled already, by level.
        before: called before each trial: it puts back what the function draws from.
        draws: whether it draws. XLA has generators of its own, which from the same seed give other
            draws; then the graph that it compiles is what is compared with the eager function,
            within ``alike``.
        failed: whether circuits failed eagerly, which the model caught.
        levels: those to try, in turn.
        program: see ``at_level``.
        use_first: to ``use`` it before it is compared, since another process begins with that.
    """
    began = time.perf_counter()
    reasons = []
    for level in levels:
        try:
            compiled = ready.get(level) or at_level(function, level, program)
            if use_first:
                use(compiled, level)
            before()
            with circuit.tally() as traced:
                outputs = _unrecorded(compiled, inputs)[: len(expected)]
            if draws:
                before()
                with alike():
                    graph = leaves(at_level(function, "graph")(*inputs))[: len(expected)]
                apart = _other_kind(outputs, graph) or first_difference(graph, expected)
            else:
                apart = _difference(function, inputs, outputs, expected)
            if traced.failures and (apart or not failed):
                apart = f"a circuit fails, which the model catches: {traced.failures[0]}"
            if apart:
                reasons.append(f"{level}: {apart}")
                continue
            if not use_first:
                use(compiled, level)
            return Choice(level, _joined(reasons), time.perf_counter() - began)
        except Exception as error:  # whatever stops a trace: the next level is tried
            if isinstance(error, UntraceableError) and not isinstance(error, NotForXLAError):
                reasons += [f"{other}: {_why(error)}" for other in levels[levels.index(level) :]]
                break
            reasons.append(f"{level}: {_why(error)}")
    return Choice("eager", _joined(reasons), time.perf_counter() - began)


def _unrecorded(function: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """What a ``Compiled`` function gives, of which a tape is not told that has another program
    (``taped``): for it TensorFlow would compile one more."""
    made = function.made if isinstance(function, Guarded) else function
    variables = made.variables(*inputs)
    sources = [*filter(differentiable, inputs), *(v.handle for v in variables if differentiable(v))]
    once = asked_once(sources, [variable for variable in variables if variable.trainable])
    with record.stop_recording() if once else contextlib.nullcontext():
        return leaves(function(*inputs))


def _difference(
    function: Callable[..., Any],
    inputs: Sequence[tf.Tensor],
    outputs: Sequence[tf.Tensor],
    expected: Sequence[tf.Tensor],
) -> str:
    """``first_difference``, with roundings allowed where there is one."""
    apart = first_difference(outputs, expected)
    if apart and not _other_kind(outputs, expected):
        roundings = _roundings(function, inputs)[: len(expected)]
        apart = first_difference(outputs, expected, roundings)
    return apart


def _joined(reasons: Sequence[str]) -> str:
    """Reasons by level, those that are the same said once."""
    levels: dict[str, list[str]] = {}
    for reason in reasons:
        level, _, text = reason.partition(": ")
        levels.setdefault(text, []).append(level)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in levels.items())


def _other_kind(outputs: Sequence[tf.Tensor], expected: Sequence[tf.Tensor]) -> str:
    for number, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        a = a[: len(b)] if b.shape.rank and a.shape.rank and a.shape[0] > b.shape[0] else a
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {number} is {a.dtype.name} {a.shape}, eagerly {b.dtype.name} {b.shape}"
    return ""


def first_difference(
    outputs: Sequence[tf.Tensor], expected: Sequence[tf.Tensor], roundings: Sequence[float] = ()
) -> str:
    """What of the outputs is not what was expected, in words; empty if all is. ``roundings`` are
    allowed beyond."""
    other = _other_kind(outputs, expected)
    if other:
        return other
    allowed = roundings or [0.0] * len(expected)
    for number, (a, b, more) in enumerate(zip(outputs, expected, allowed, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        a = a[: len(b)] if b.ndim else a
        atol = _SAME * _scale(b) + _ROUNDINGS * more
        if not np.allclose(a, b, rtol=0, atol=atol, equal_nan=True):
            return f"output {number} differs from the eager one"
    return ""


def _roundings(function: Callable[..., Any], inputs: Sequence[tf.Tensor]) -> list[float]:
    """How far each output goes when the inputs go a little, up and down: in a graph, whose calls
    leave nothing for the next one."""
    graph = at_level(function, "graph")
    there, *moved = (
        [
            np.asarray(output)
            for output in leaves(
                graph(*(x * (1 + step) if x.dtype.is_floating else x for x in inputs))
            )
        ]
        for step in (0.0, _PART, -_PART)
    )
    apart = [[np.abs(a - b) for a, b in zip(outputs, there, strict=True)] for outputs in moved]
    return [
        float(max(x.max(initial=0.0, where=x < np.inf) for x in of_output))
        for of_output in zip(*apart, strict=True)
    ]


def _scale(array: np.ndarray) -> float:
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max()) if finite.size else 1.0


def _why(error: BaseException) -> str:
    """The error in one line, with the line of the user's code that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    workers = Path(__file__).resolve().parents[1]
    ours = (str(workers), str(workers.parent / "qpool"), "<")
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename and not frame.filename.startswith(ours)
    ]
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0][:200]}"
    if own:
        text += f" ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})"
    return text
