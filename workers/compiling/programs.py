"""Programs that this process has compiled: what is equal to one of them is that one.

A notebook's cell that is run again, a sweep, an ensemble make a model like one before. Its trace
gives the same operations; XLA would compile them once more, and TensorFlow keeps what was compiled
as long as the process lives. Owns how equal programs are told, and which are kept.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context, record
from tensorflow.python.eager.polymorphic_function import atomic_function

from workers.compiling import compile_cache

#: Programs that are kept, at most: the definition of each, and what XLA has of it in any case.
_KEPT = 512

_known: OrderedDict[bytes, Any] = OrderedDict()

#: A number of ``workers.names`` in a name: all that tells two traces of one program apart.
_COUNTED = re.compile(rb"(?<=[_-])\d{19}")  # what follows it may look like a digit


def compiled(trace: Any) -> Callable[..., Any]:
    """``trace``, a concrete function for XLA, of tensors alone, and its gradients of any order. Its
    first call compiles it, one process at a time, if no equal one has been."""
    due = _share(trace)
    run = _prepared(trace)

    def call(*tensors: tf.Tensor) -> Any:
        nonlocal due
        if due is None:
            return trace(*tensors) if record.could_possibly_record() else run(*tensors)
        with compile_cache.turn(due):
            found = trace(*tensors)
        due = None
        return found

    return call


def _prepared(trace: Any) -> Callable[..., Any]:
    """``trace``, called eagerly where no tape listens, without what that asks each time: a third of
    the 260 us that a small circuit's call takes."""
    function, captured = trace._inference_function, list(trace.captured_inputs)
    given = function.function_type.flat_outputs
    one = isinstance(trace.structured_outputs, tf.TensorSpec | tf.Tensor)
    runtime = context.context()

    def run(*tensors: tf.Tensor) -> Any:
        try:
            found = runtime.call_function(function.name, [*tensors, *captured], len(given))
        except tf.errors.OpError:
            return trace(*tensors)  # which says more of what is wrong
        return found[0] if one else function.function_type.pack_output(found)

    plain = given and not any(kind.dtype in (tf.resource, tf.variant) for kind in given)
    return run if plain else trace  # type: ignore[no-any-return]


def forget() -> None:
    """No program is known any more: of some, TensorFlow remembers that it could not compile it."""
    _known.clear()


def _share(trace: Any) -> bytes | None:
    """Have the concrete function, and those that TensorFlow makes of it for a tape or an
    accumulator, run what an equal one runs. Its definition, if it is the first."""
    own = trace._inference_function
    definition = _definition(own)
    trace._inference_function = _equal(own, definition)
    select = trace._select_forward_and_backward_functions

    def selected(*args: Any) -> Any:
        found = select(*args)
        functions = found._functions
        if getattr(functions, "_forward", found) is None:
            found.forward()
            functions._forward = _equal(functions._forward, _definition(functions._forward))
            _share(functions._backward)
        return found

    trace._select_forward_and_backward_functions = selected
    return definition if trace._inference_function is own else None


def _equal(function: Any, definition: bytes) -> Any:
    """This function of the runtime, which is known from now, or an equal one that is, with what
    this one makes of its outputs: their structure is none of the definition's."""
    digest = hashlib.sha256(_COUNTED.sub(_in_order(), definition)).digest()
    known = _known.pop(digest, None)
    _known[digest] = _without_graph(function) if known is None else known
    while len(_known) > _KEPT:
        _known.popitem(last=False)
    if known is None:
        return function
    return atomic_function.AtomicFunction(
        known.name,
        known._bound_context,
        function.function_type,
        known.children,
        function.call_options,
        function.graph,
    )


def _definition(function: Any) -> bytes:
    """What a function of the runtime computes: operations, the numbers in them, what goes in and
    out, and the same of the functions that it calls."""
    found = []
    for each in _with_children(function):
        definition = each.definition
        definition.signature.control_output.sort()  # in TensorFlow a set's order
        for argument in definition.arg_attr.values():
            argument.attr.pop("_user_specified_name", None)  # of a variable, a number
        found.append(definition.SerializeToString(deterministic=True))
    return b"".join(found)


def _with_children(function: Any) -> Iterator[Any]:
    yield function
    for child in function.children:
        yield from _with_children(child)


def _in_order() -> Callable[[re.Match[bytes]], bytes]:
    """Numbers by where they come first, of one length, for lengths are part of a definition."""
    seen: dict[bytes, bytes] = {}
    return lambda found: seen.setdefault(found.group(), b"%019d" % len(seen))


def _without_graph(function: Any) -> Any:
    """The function that the runtime has, without the Python graph that it was made from, which
    refers to the model."""
    return atomic_function.AtomicFunction(
        function.name,
        function._bound_context,
        function.function_type,
        [_without_graph(child) for child in function.children],
        function.call_options,
    )
